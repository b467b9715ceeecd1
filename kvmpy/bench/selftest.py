"""Whether this machine can be trusted now: its clocks, its steadiness, and a known delay."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvmpy.abi import lib
from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import Case, Conditions, Floats
from kvmpy.bench.runner import pinning
from kvmpy.bench.takes import periods
from kvmpy.bench.worker import disturbances
from kvmpy.devices import Sink

__all__ = ["Check", "self_test", "table"]

_READINGS: Final = 100_000
_WORKS: Final = 400
_WORK: Final = 10_000  # pairs of readings, about half a millisecond
_EXITS: Final = 20_000
_DELAYS: Final = 50
_SHORT, _LONG = 0.5e-3, 1.5e-3  # seconds that a guest waits, by its TSC
_CASE: Final = Case("pio-out", "c", "long")
_CONDITIONS: Final = Conditions(count=_EXITS)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, what would be good, and whether it is."""

    name: str
    found: str
    wanted: str
    good: bool


def self_test() -> list[Check]:
    """Look at the clocks, the CPU, the neighbours, and a delay that is known.

    It takes about two seconds. Raises KVMUnavailableError without KVM.
    """
    before = disturbances()
    with _pinned() as cpu:
        checks = [*_clock(), _pinning(cpu), _speed(), _exits(), _delay()]
    after = disturbances()
    return [*checks, *_interference({name: after[name] - before[name] for name in after})]


@contextmanager
def _pinned() -> Iterator[int | None]:
    allowed, (cpu, _) = os.sched_getaffinity(0), pinning()
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield cpu
    finally:
        os.sched_setaffinity(0, allowed)


def _clock() -> Iterator[Check]:
    readings = np.array([time.monotonic_ns() for _ in range(_READINGS)])
    steps = np.diff(readings)
    backward = int((steps < 0).sum())
    yield Check("clock runs backwards", f"{backward} times", "never", backward == 0)
    finest = int(steps[steps > 0].min())
    yield Check("clock's finest step seen", f"{finest} ns", "at most 200 ns", finest <= 200)
    cost = min(lib.kvmpy_clock_cost(1000) for _ in range(20)) / 1000
    yield Check("cost of a sample (two readings)", f"{cost:.0f} ns", "at most 200 ns", cost <= 200)


def _pinning(cpu: int | None) -> Check:
    found = "one CPU, shared with all else" if cpu is None else f"to CPU {cpu}"
    return Check("pinned", found, "a CPU to itself", cpu is not None)


def _speed() -> Check:
    """The same work again and again: its fastest and slowest twentieths of the time."""
    times = np.array([lib.kvmpy_clock_cost(_WORK) for _ in range(_WORKS)], np.float64)
    return _swing("swing of the CPU's speed", times)


def _swing(name: str, times: Floats) -> Check:
    parts = [float(np.median(part)) for part in np.array_split(times, 20)]
    swing = max(parts) / min(parts) - 1
    return Check(name, f"{swing:.1%}", "at most 5%", swing <= 0.05)


def _exits() -> Check:
    bench = GuestBench(Kind("port", "out1", "port-out", 1), _CASE, _CONDITIONS)
    with bench.machine:
        bench.attach(Sink())
        return _swing(f"swing of {_EXITS:,} exits", periods(bench).samples)


def _delay() -> Check:
    """A guest waits by its TSC: the difference of two waits is known, whatever is around them."""
    bench = GuestBench(Kind("delay", "wait"), _CASE, _CONDITIONS)
    with bench.machine:
        hz = bench.cpu.get_tsc_khz() * 1000

        def wait(seconds: float) -> float:
            bench.start("wait", 1, rsi=round(seconds * hz))
            pair = bench.sample(1, bench.run_to_its_end)
            return float(pair[0, 1] - pair[0, 0]) / 1e9

        # In turns, so that what changes meanwhile happens to both.
        pairs = [(wait(_SHORT), wait(_LONG)) for _ in range(_DELAYS)]
    measured = float(np.median([after - before for before, after in pairs]))
    off = measured / (_LONG - _SHORT) - 1
    found = f"{measured * 1e6:,.1f} us ({off:+.2%})"
    wanted = f"{(_LONG - _SHORT) * 1e6:,.0f} us, within 1%"
    return Check("a guest's wait, by the host's clock", found, wanted, abs(off) <= 0.01)


def _interference(seen: dict[str, int]) -> Iterator[Check]:
    stolen, switched = seen["steal_ticks"], seen["involuntary_switches"]
    yield Check("stolen by the host meanwhile", f"{stolen} ticks", "none", stolen == 0)
    yield Check("preempted meanwhile", f"{switched} times", "at most 20 times", switched <= 20)
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    yield Check("load", f"{load:.1f} on {cpus} CPUs", "at least one CPU idle", load <= cpus - 1)


def table(checks: list[Check]) -> Any:
    """A rich table, a row for each."""
    from rich.table import Table

    made = Table(title="Can this machine be trusted now?")
    for name in ("", "found", "wanted", "verdict"):
        made.add_column(name)
    for check in checks:
        made.add_row(check.name, check.found, check.wanted, "good" if check.good else "NOT GOOD")
    return made
