"""A loop of resets: a guest in ring 3 writes N pages and exits once, and goes back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.snapfloor import FloorSnapshot
from benchmarks.stats import Row, Turn, compare, interleave
from kvmpy import Machine, Snapshot, assemble, runs
from kvmpy.devices import EndRun

__all__ = ["measure_resets", "writer"]

MMIO = 0xD0000000
FIRST = 0x100000
MEMORY = 4 << 20
COUNTS = (1, 16, 256)
WARM_UP = 300


def attach(machine: Machine) -> None:
    """Attach what the guest exits to."""
    machine.attach_mmio(MMIO, 4, EndRun())


def writer(pages: int, memory: int = MEMORY, ring: int = 3) -> Snapshot:
    """A machine whose guest writes so many pages and then exits."""
    text = f"""
        mov edi, {FIRST}
        mov ecx, {pages}
    next:
        mov [rdi], rcx
        add rdi, 4096
        dec ecx
        jnz next
        mov edi, {MMIO:#x}
        mov [rdi], eax
    again:
        jmp again
    """
    with Machine(memory, ring=ring) as machine:
        attach(machine)
        machine.load(assemble(text, at=0x1000))
        return machine.snapshot()


def _turn(run: Callable[[int], Any], times: int) -> Turn:
    def timed() -> float:
        run(WARM_UP)
        start = time.perf_counter_ns()
        run(times)
        return (time.perf_counter_ns() - start) / times

    return timed


@contextmanager
def _floor(snapshot: FloorSnapshot, method: str, pages: int, times: int) -> Iterator[Turn]:
    reset = snapshot.reset(method, FIRST, pages)
    with snapshot.spawn() as machine:
        if method == "logged":
            machine.log()
        yield _turn(partial(machine.resets, reset), times)


@contextmanager
def _loop(snapshot: Snapshot, times: int, **options: Any) -> Iterator[Turn]:
    with Machine.from_snapshot(snapshot, attach) as machine:

        def run(count: int) -> None:
            ended = 0
            for one in runs(snapshot, range(count), timeout=10, machine=machine, **options):
                ended += one.outcome == "ended"
            if ended != count:
                raise RuntimeError(f"{count - ended} of {count} runs did not end")

        yield _turn(run, times)


@contextmanager
def _reset_to(snapshot: Snapshot, times: int) -> Iterator[Turn]:
    with Machine.from_snapshot(snapshot, attach) as machine:

        def run(count: int) -> None:
            for _ in range(count):
                machine.reset_to(snapshot, "registers")
                machine.run(timeout=10)

        yield _turn(run, times)


def measure_resets(rounds: int, turns: int, times: int) -> list[Row]:
    """For each number of pages: kvmpy's loops over C with the pages known, and C's other ways."""
    rows = []
    for pages in COUNTS:
        snapshot = writer(pages)
        floor = FloorSnapshot(snapshot)
        count = times if pages < 100 else times // 3
        subjects: dict[str, Callable[[], Any]] = {
            method: partial(_floor, floor, method, pages, count)
            for method in ("known", "logged", "discarded")
        }
        subjects["batch"] = partial(_loop, snapshot, count, scope="registers", batch=64)
        subjects["single"] = partial(_loop, snapshot, count, scope="registers")
        subjects["all"] = partial(_loop, snapshot, count, batch=64)
        subjects["reset_to"] = partial(_reset_to, snapshot, count)
        samples = interleave(rounds, turns, subjects)
        best = samples["known"]
        rows += [
            compare(f"reset, {pages} pages: runs(batch=64)", "ratio", "ns", 1.25, *pair)
            for pair in [(samples["batch"], best)]
        ]
        for name, what in (
            ("single", "runs()"),
            ("reset_to", "reset_to() and run()"),
            ("all", "runs(batch=64), scope all"),
            ("logged", "C, by the dirty log"),
            ("discarded", "C, by discarding"),
        ):
            rows.append(compare(f"  {what}", "ratio", "ns", None, samples[name], best))
    return rows
