"""Between the iterator of `kvmpy.map` and its workers: which they are, and their end."""

import os
import pickle
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from kvmpy.errors import ConfigError
from kvmpy.outcome import Outcome
from kvmpy.pool import held
from kvmpy.pool.bar import with_bar
from kvmpy.pool.checks import check_function, check_main
from kvmpy.pool.flow import LEASE, Flow
from kvmpy.pool.processes import Processes
from kvmpy.pool.submits import Submits
from kvmpy.pool.work import Work, do, do_packed
from kvmpy.snapshot.snapshot import check_snapshot

__all__ = ["outcomes"]

_T = TypeVar("_T")


def outcomes(
    work: Work,
    inputs: Iterable[_T],
    executor: Submits | None,
    *,
    chunk_size: int | None,
    ordered: bool,
    workers: int | None,
    progress: bool,
) -> Generator[Outcome[_T], None, None]:
    """See `map`. What cannot work is refused here; nothing is made before the first `next`."""
    check_main()
    how = work.options
    if executor is None or isinstance(executor, ProcessPoolExecutor):
        check_function("attach", work.attach)
        check_function("write_to", how.write_to if callable(how.write_to) else None)
    check_snapshot(work.snapshot)
    total = len(inputs) if isinstance(inputs, Sized) else None
    many = workers or getattr(executor, "_max_workers", None) or _cpus()
    size = how.collect[1] if how.collect else None
    flow = Flow(inputs, many, chunk_size, ordered=ordered, answer_size=size, total=total)
    made = _outcomes(work, flow, executor, None if chunk_size else LEASE, many)
    return with_bar(made, total) if progress else made


def _outcomes(
    work: Work, flow: Flow[_T], executor: Submits | None, lease: float | None, workers: int
) -> Generator[Outcome[_T], None, None]:
    with ExitStack() as stack:
        stack.callback(work.close)
        if executor is None:
            pool = stack.enter_context(Processes(workers))
            packed = pickle.dumps(work)

            def submit(inputs: list[_T]) -> Any:
                return pool.submit(do_packed, packed, _pickled(inputs), lease)
        else:
            # Where its workers are threads, machines of this process are to be closed.
            stack.enter_context(held.opened(work.key))

            def submit(inputs: list[_T]) -> Any:
                return executor.submit(do, work, _portable(inputs), lease)

        stack.callback(flow.cancel)
        yield from flow.outcomes(submit)


def _pickled(inputs: list[Any]) -> bytes:
    try:
        return pickle.dumps(_portable(inputs))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(f"an input cannot be sent to a worker process: {error}") from error


def _portable(inputs: list[Any]) -> list[Any]:
    return [bytes(one) if type(one) is memoryview else one for one in inputs]


def _cpus() -> int:
    """How many CPUs this process may use."""
    count: Callable[[], int | None] | None = getattr(os, "process_cpu_count", None)  # 3.13
    return (count() if count else len(os.sched_getaffinity(0))) or 1
