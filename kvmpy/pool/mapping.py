"""`kvmpy.map`: what `kvmpy.runs` does, by many workers."""

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from kvmpy.errors import ConfigError
from kvmpy.machine import Machine
from kvmpy.outcome import Outcome
from kvmpy.pool.submits import Submits
from kvmpy.prepared import WriteTo, check_collect
from kvmpy.sizes import check_count
from kvmpy.snapshot import Snapshot
from kvmpy.vcpu import NO_LIMIT, nanoseconds

__all__ = ["map"]

_T = TypeVar("_T")


def map(
    snapshot: Snapshot,
    inputs: Iterable[_T],
    executor: Submits | None = None,
    *,
    write_to: WriteTo = None,
    timeout: float | None = None,
    max_exits: int | None = None,
    collect: tuple[int, int] | None = None,
    touched: bool = False,
    console: bool = False,
    attach: Callable[[Machine], object] | None = None,
    scope: str = "all",
    batch: int = 16,
    chunk_size: int | None = None,
    ordered: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Generator[Outcome[_T], None, None]:
    """Run the guest once from `snapshot` for each input, on many workers; their outcomes.

    `executor` is anything with a `submit` that returns futures; by default it is a pool of new
    processes, `workers` of them or as many as there are CPUs for this process, which ends with
    the iterator, also by its `close()`. For another executor `workers` is how many it has, where
    it does not tell.
    `write_to`, `timeout` (seconds, for each run), `max_exits`, `collect`, `touched`, `console`,
    `attach`, `scope` and `batch` are those of `kvmpy.runs`; a memoryview comes to a worker as
    bytes. Each worker has one machine, made with `attach`: if that is a `Harness`'s, a copy's.
    Where workers are processes, the two functions must be importable from a module, a snapshot that
    is in no file is saved to a temporary one, and a script needs `if __name__ == "__main__":`.

    `inputs` may be endless. They go out in chunks of `chunk_size`, by default so many as take a
    twentieth of a second, and are taken only as far as is needed to keep the workers busy.
    Outcomes come in the order of the inputs, or as they are completed if not `ordered`. With
    `progress`, and where standard error is a terminal, a bar shows how far it is.

    Nothing that happens to one input costs another: an exception of a device or of `write_to` is
    the outcome "error". Inputs of a worker process that has died are run again by the default
    pool, and one that has ended three of them is the outcome "worker-died". Raises ConfigError
    for settings that cannot be used, and HostError where workers cannot start; what `attach`
    raises, and a given executor that breaks, comes out of the iterator.
    """
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise ConfigError(
            f"executor={executor!r:.80} has no submit(): give an executor, or None for processes; "
            "where inputs go is given by name, write_to=..."
        )
    counts = {"batch": batch, "chunk_size": chunk_size, "workers": workers, "max_exits": max_exits}
    for name, number in counts.items():
        if number is not None:
            check_count(name, number, NO_LIMIT)
    check_collect(collect)
    if not (isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")):
        raise ConfigError(f"inputs={inputs!r:.80}: give something to iterate over")
    nanoseconds(timeout)  # refuse a bad one
    from kvmpy.pool.giving import outcomes  # multiprocessing is slow to load
    from kvmpy.pool.work import Options, Work

    options = Options(write_to, timeout, max_exits, scope, batch, collect, touched, console)
    return outcomes(
        Work(snapshot, attach, options),
        inputs,
        executor,
        chunk_size=chunk_size,
        ordered=ordered,
        workers=workers,
        progress=progress,
    )
