"""A machine made from a snapshot, to its first exit: over the same calls in C."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.snapfloor import FloorSnapshot
from benchmarks.stats import Row, Turn, compare, interleave
from kvmpy import Machine, Snapshot, assemble

__all__ = ["measure_spawns"]

MEMORIES = (("4 MiB", 4 << 20), ("1 GiB", 1 << 30))


def _halting(memory: int) -> Snapshot:
    with Machine(memory) as machine:
        machine.load(assemble("hlt", at=0x1000))
        return machine.snapshot()


@contextmanager
def _floor(snapshot: FloorSnapshot) -> Iterator[Turn]:
    def timed() -> float:
        with snapshot.spawn() as machine:
            return float(machine.nanoseconds) / 1000

    yield timed


@contextmanager
def _spawn(snapshot: Snapshot) -> Iterator[Turn]:
    def timed() -> float:
        start = time.perf_counter_ns()
        with Machine.from_snapshot(snapshot) as machine:
            machine.run()
            return (time.perf_counter_ns() - start) / 1000

    yield timed


def measure_spawns(rounds: int, turns: int) -> list[Row]:
    """For a small machine and a large one."""
    rows = []
    for name, memory in MEMORIES:
        snapshot = _halting(memory)
        subjects: dict[str, Callable[[], Any]] = {
            "floor": partial(_floor, FloorSnapshot(snapshot)),
            "spawn": partial(_spawn, snapshot),
        }
        interleave(1, 2, subjects)  # what is made once per process is made now
        samples = interleave(rounds, turns, subjects)
        what = f"spawn from {name} to the first exit"
        rows.append(compare(what, "ratio", "us", 1.15, samples["spawn"], samples["floor"]))
    return rows
