"""A guest that is saved, and goes on in another process, ends as if nothing had been."""

import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from test_snapshot import END, EVERYWHERE, NATIVE, attach, code, end_state, guests, machine_of

from kvmpy import Machine, Snapshot

pytestmark = pytest.mark.usefixtures("kvm_host")


def serve() -> None:
    """Load the files that standard input names, run each to its end, and say what came of it."""
    for line in sys.stdin:
        snapshot = Snapshot.load(line.strip(), verify="all")
        with Machine.from_snapshot(snapshot, attach) as machine:
            answer = pickle.dumps(end_state(machine))
        sys.stdout.buffer.write(struct.pack("<I", len(answer)) + answer)
        sys.stdout.buffer.flush()


class Elsewhere:
    """A process that serves."""

    def __init__(self) -> None:
        script = f"import sys; sys.path[:0] = {sys.path!r}\nimport {__name__} as m; m.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def end_state(self, path: Path) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{path}\n".encode())
        stdin.flush()
        (size,) = struct.unpack("<I", stdout.read(4))
        return pickle.loads(stdout.read(size))

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    made = Elsewhere()
    yield made
    made.close()


def check(pieces: list[str], ring: int, elsewhere: Elsewhere, path: Path, way: str | None) -> None:
    """At every exit: saved there, and from it the same end in another process."""
    body = b"".join(map(code, pieces)) + code(END)
    with machine_of(body, ring) as machine:
        whole = end_state(machine)
        exits = sum(machine.cpus[0].exit_counts().values())
    assert whole[0] == "debug-exit"
    with machine_of(body, ring) as machine:
        for _ in range(exits):
            machine.snapshot().save(path, compress=way)  # an increment from the second one on
            assert elsewhere.end_state(path) == whole
            machine.run(max_exits=1, timeout=10)


@settings(max_examples=6)
@pytest.mark.parametrize("way", [None, "zstd"])
@given(pieces=guests(EVERYWHERE))
def test_in_ring_0(
    elsewhere: Elsewhere, tmp_path: Path, way: str | None, pieces: list[str]
) -> None:
    check(pieces, 0, elsewhere, tmp_path / "one", way)


@settings(max_examples=6)
@pytest.mark.parametrize("way", [None, "zstd"])
@given(pieces=guests(EVERYWHERE + NATIVE))
def test_in_ring_3(
    elsewhere: Elsewhere, tmp_path: Path, way: str | None, pieces: list[str]
) -> None:
    check(pieces, 3, elsewhere, tmp_path / "one", way)
