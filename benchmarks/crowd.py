"""Many machines of one snapshot: a pool of prepared ones, and the memory of two hundred."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.resets import attach, writer
from benchmarks.stats import Row, Turn, compare, interleave
from kvmpy import Machine, Snapshot, Spares

__all__ = ["measure_crowd", "measure_pool"]

MACHINES = 200
PAGES = 16
MEMORY = 64 << 20


@contextmanager
def _request(snapshot: Snapshot) -> Iterator[Turn]:
    with Spares(snapshot, 2, attach) as spares:

        def timed() -> float:
            start = time.perf_counter_ns()
            machine = spares.take()
            result = machine.run(timeout=10)
            taken = (time.perf_counter_ns() - start) / 1000
            spares.give(machine)
            if result.outcome != "ended":
                raise RuntimeError(f"the guest ended in {result}")
            return taken

        yield timed


def measure_pool(rounds: int, turns: int) -> list[Row]:
    """From the request for a machine to its guest's first exit, in ring 3 and in ring 0."""
    subjects: dict[str, Callable[[], Any]] = {
        f"ring {ring}": partial(_request, writer(1, ring=ring)) for ring in (3, 0)
    }
    samples = interleave(rounds, turns, subjects)
    return [
        compare(f"pool of machines: request to first exit, {ring}", "value", "us", 100, taken)
        for ring, taken in samples.items()
    ]


def _private() -> float:
    """KiB of memory that only this process has."""
    text = Path("/proc/self/smaps_rollup").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return float(sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")))


def _available() -> float:
    """KiB of memory that the host could still give, the kernel's own use taken off."""
    text = Path("/proc/meminfo").read_text()
    return float(text.partition("MemAvailable:")[2].split()[0])


def _crowd(snapshot: Snapshot, count: int) -> tuple[float, float]:
    """KiB of private memory for each machine, and of the host's for each."""
    with ExitStack() as stack:
        private, available = _private(), _available()
        for _ in range(count):
            machine = stack.enter_context(Machine.from_snapshot(snapshot, attach))
            machine.run(timeout=10)
        return (_private() - private) / count, (available - _available()) / count


def measure_crowd(rounds: int, count: int = MACHINES) -> list[Row]:
    """Machines of 64 MiB that each write 16 pages."""
    snapshot = writer(PAGES, MEMORY)
    _crowd(snapshot, 2)  # what is made once
    taken = [_crowd(snapshot, count) for _ in range(rounds)]
    what = f"each of {count} machines of 64 MiB, {PAGES} pages written"
    return [
        compare(f"{what}: private memory", "value", "KiB", 400, [one for one, _ in taken]),
        compare(
            "  the host's, the kernel's part too", "value", "KiB", None, [two for _, two in taken]
        ),
    ]
