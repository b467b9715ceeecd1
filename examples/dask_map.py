"""Many runs on a Dask cluster: here of two processes on this machine.

    pip install distributed && python examples/dask_map.py

For workers on other machines the snapshot goes to a file that all of them can read.
"""

import tempfile
from pathlib import Path

from dask.distributed import Client, LocalCluster

import kvmpy

INPUT = 0x30000
GUEST = kvmpy.assemble(
    """
    mov esi, 0x30000
    mov eax, [rsi]
    imul eax, eax
    out 0xf4, eax
    """,
    mode="long",
    at=0x4000,
)


def main() -> None:
    """Square the numbers from 0 to 999."""
    with kvmpy.Machine("1M") as machine:
        machine.load(GUEST)
        snapshot = machine.snapshot()
    inputs = [number.to_bytes(4, "little") for number in range(1000)]
    with (
        tempfile.TemporaryDirectory() as shared,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        snapshot.save(Path(shared) / "squares.snapshot")
        executor = client.get_executor()
        squares = kvmpy.map(
            snapshot, inputs, executor, write_to=INPUT, timeout=1, workers=len(cluster.workers)
        )
        print(sum(one.value or 0 for one in squares))


if __name__ == "__main__":
    main()
