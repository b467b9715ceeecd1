"""The cost of an exit: a port served in C, by Python, without KVM, and on two threads."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.floor import FloorError, Guest, load
from benchmarks.stats import Row, Turn, compare, interleave
from kvmpy import Machine
from kvmpy.abi import ffi, lib
from kvmpy.devices.native import Sink
from kvmpy.serve import serve
from kvmpy.vcpuregs import SYNC_REGS

__all__ = [
    "GUEST",
    "kvmpy_turn",
    "machine",
    "measure_exits",
    "measure_noop",
    "measure_threads",
    "turn",
]

PORT = 0x42
MEMORY = 4 << 20
GUEST = bytes.fromhex("ba 42 00 00 00  ee  eb fd")
"""mov edx, 0x42; again: out dx, al; jmp again"""
WARM_UP = 200


def machine(served_in_c: bool) -> Machine:
    """A machine of kvmpy's that runs the guest, with its port served by C or by Python."""
    made = Machine(MEMORY)
    if served_in_c:
        made.attach_port(PORT, 1, Sink())
    else:

        @made.on_port(PORT)
        def nothing(offset: int, size: int, value: int | None) -> None:
            pass

    made.load(GUEST)
    return made


@contextmanager
def sampled_turn(exits: int) -> Iterator[Turn]:
    """Served in C, with the clock taken at each entry and exit, as `kvmpy bench` does."""
    with machine(True) as made:
        loop = made.cpus[0].loop
        room = ffi.new("uint64_t[]", 2 * exits)
        loop.samples, loop.sample_room = room, exits
        loop.watch |= lib.KVMPY_SAMPLE

        def run(count: int) -> None:
            loop.sample_count = 0
            made.run(max_exits=count)

        try:
            yield turn(run, exits)
        finally:
            loop.watch &= ~lib.KVMPY_SAMPLE
            loop.samples = ffi.NULL


def turn(run: Callable[[int], Any], exits: int) -> Turn:
    """A turn that gives nanoseconds per exit, warmed up by a short run of its own."""

    def timed() -> float:
        run(WARM_UP)
        start = time.perf_counter_ns()
        run(exits)
        return (time.perf_counter_ns() - start) / exits

    return timed


def _runner(made: Machine) -> Callable[[int], Any]:
    return lambda count: made.run(max_exits=count)


@contextmanager
def kvmpy_turn(served_in_c: bool, exits: int) -> Iterator[Turn]:
    with machine(served_in_c) as made:
        yield turn(_runner(made), exits)


@contextmanager
def floor_turn(guest: Guest, exits: int) -> Iterator[Turn]:
    with guest.open() as made:
        yield turn(made.run, exits)


def measure_exits(rounds: int, turns: int, exits: int) -> list[Row]:
    """A port served in C and one served by Python, each over the bare C loop.

    The bare loop asks KVM for the general registers with every exit, as kvmpy does, where the
    host can do that (KVM_CAP_SYNC_REGS); what it costs has a row of its own.
    """
    guest, plain = (Guest(GUEST, MEMORY, valid=valid) for valid in (SYNC_REGS, 0))
    samples = interleave(
        rounds,
        turns,
        {
            "plain": lambda: floor_turn(plain, exits),
            "floor": lambda: floor_turn(guest, exits),
            "c": lambda: kvmpy_turn(True, exits),
            "sampled": lambda: sampled_turn(exits),
            "python": lambda: kvmpy_turn(False, exits),
        },
    )
    floor, plain_floor = samples["floor"], samples["plain"]
    return [
        compare("port served in C", "ratio", "ns", 1.02, samples["c"], floor),
        compare("the same, sampled", "ratio", "ns", 1.03, samples["sampled"], floor),
        compare("port served by Python", "difference", "ns", 500, samples["python"], floor),
        compare("registers with each exit (in C)", "ratio", "ns", None, floor, plain_floor),
    ]


@contextmanager
def noop_turn(step: Callable[[Any], int], exits: int) -> Iterator[Turn]:
    with machine(False) as made:
        made.run(max_exits=1)
        loop = made.cpus[0].loop

        def run(count: int) -> None:
            made.cpus[0].begin(max_exits=count)
            try:
                serve(step, loop, made.dispatch, lambda: None)
            finally:
                lib.kvmpy_end(loop)

        yield turn(run, exits)


def measure_noop(rounds: int, turns: int, exits: int) -> list[Row]:
    """The path of a port served by Python, where KVM_RUN does nothing."""
    step = load().lib.noop_run
    samples = interleave(rounds, turns, {"noop": lambda: noop_turn(step, exits)})
    return [compare("same, KVM_RUN a no-op", "value", "ns", 200, samples["noop"])]


def _on_two_threads(runs: list[Callable[[int], Any]], exits: int) -> float:
    """Nanoseconds per exit of the slower of two runs that start together."""
    start = threading.Barrier(len(runs))
    taken: list[float] = []

    def work(timed: Turn) -> None:
        start.wait()
        taken.append(timed())

    threads = [threading.Thread(target=work, args=(turn(run, exits),)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(taken) < len(runs):
        raise FloorError("a thread of the benchmark failed, as is said above")
    return max(taken)


@contextmanager
def two_of_kvmpy(served_in_c: bool, exits: int) -> Iterator[Turn]:
    with machine(served_in_c) as one, machine(served_in_c) as two:
        yield lambda: _on_two_threads([_runner(one), _runner(two)], exits)


@contextmanager
def two_floors(guest: Guest, exits: int) -> Iterator[Turn]:
    with guest.open() as one, guest.open() as two:
        yield lambda: _on_two_threads([one.run, two.run], exits)


def measure_threads(rounds: int, turns: int, exits: int) -> list[Row]:
    """Two machines on two threads, over two C loops on two threads."""
    guest = Guest(GUEST, MEMORY, valid=SYNC_REGS)
    samples = interleave(
        rounds,
        turns,
        {
            "floor": lambda: two_floors(guest, exits),
            "c": lambda: two_of_kvmpy(True, exits),
            "python": lambda: two_of_kvmpy(False, exits),
        },
    )
    floor = samples["floor"]
    return [
        compare("two threads, served in C", "ratio", "ns", 1.15, samples["c"], floor),
        compare("two threads, served by Python", "ratio", "ns", 1.15, samples["python"], floor),
    ]
