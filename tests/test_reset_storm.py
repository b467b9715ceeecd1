"""Signal handlers that raise, at any moment of a snapshot, a reset or a loop over inputs."""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_reset import INPUT, SUMMING, given_input
from test_snapshot import DATA, PORT, attach, code, end_state, machine_of

from kvmpy import Machine, runs

# A handler may raise in a finalizer, too, or in place of one.
pytestmark = [pytest.mark.usefixtures("kvm_host"), pytest.mark.filterwarnings("ignore")]


class Struck(Exception):
    """What the handler raises."""


@contextmanager
def storm(microseconds: int) -> Iterator[None]:
    def strike(number: int, frame: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def strikes(action: Callable[[], object], seconds: float) -> int:
    """Do something again and again, and strike a bit later each time; how often it was hit."""
    hit, delay, end = 0, 1, time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with storm(delay):
                action()
            delay = 1  # it was done before
        except Struck:
            hit += 1
            delay += 7
    return hit


GUEST = f"""
mov edi, {DATA}
add eax, [rdi]
inc dword ptr [rdi]
in al, {PORT}
add eax, [rdi + 4096]
mov [rdi + 8192], eax
out {PORT}, eax
out 0xf4, al
hlt
"""


@pytest.mark.parametrize("ring", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_struck_at_any_moment_the_next_reset_brings_all_back(ring: int) -> None:
    with machine_of(code(GUEST), ring) as machine:
        first = machine.snapshot()
        machine.memory.write(DATA, b"second snapshot!" * 300)
        second = machine.snapshot()
        ends = []
        for snapshot in (first, second):
            machine.restore(snapshot)
            ends.append(end_state(machine))
        assert ends[0] != ends[1]

        def everything() -> None:
            machine.reset_to(first)
            with machine.memory.view as view:
                view[DATA + 5] = 1
            machine.run(timeout=10)
            machine.reset_to(first)
            machine.memory.write(DATA + 5000, b"noise")
            machine.snapshot()
            registers = machine.cpus[0].get_regs()
            machine.cpus[0].set_regs(registers)
            machine.reset_to(first)
            machine.restore(second)
            machine.run(timeout=10)

        hit = 0
        for _ in range(3):
            hit += strikes(everything, 0.15)
            gc.collect()
            for snapshot, end in zip((first, second), ends, strict=True):
                for way in (machine.reset_to, machine.restore, machine.reset_to):
                    way(snapshot)
                    assert end_state(machine) == end
            last = machine.snapshot()
            with Machine.from_snapshot(last, attach) as other:
                assert other.memory.read(0, 1 << 20) == machine.memory.read(0, 1 << 20)
        assert hit > 10


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("mine", [False, True])
def test_struck_at_any_moment_a_loop_leaves_nothing_behind(batch: int, mine: bool) -> None:
    with machine_of(code(SUMMING), 3) as machine:
        snapshot = machine.snapshot()
        inputs = [given_input(*range(number)) for number in (1, 4, 6, 2, 5)]
        given: dict[str, Any] = {"machine": machine} if mine else {"attach": attach}
        seen: list[int] = []

        def loop() -> None:
            seen.clear()
            made = runs(snapshot, inputs * 4, INPUT, timeout=10, batch=batch, **given)
            seen.extend(one.value or 0 for one in made)

        loop()
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        hit = strikes(loop, 0.3)
        gc.collect()
        if mine:  # where Python makes a descriptor, it can be struck before anybody has it
            assert len(os.listdir("/proc/self/fd")) <= before
        assert hit > 3
        loop()
        assert seen == [sum(one[1:]) for one in inputs] * 4
        assert not machine.cpus[0].loop.running
        machine.reset_to(snapshot)
        machine.memory.write(INPUT, given_input(9))
        assert machine.run(timeout=10).value == 9
