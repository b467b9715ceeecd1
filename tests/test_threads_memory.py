"""Memory that C or KVM has addresses of, taken away by another thread, a child or a caller."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmpy import ConfigError, Machine, runs
from kvmpy.memory import Memory

pytestmark = pytest.mark.usefixtures("kvm_host")

FAR = 1 << 30
SIZE = 32 << 20
HALT = b"\xf4"
PATIENCE = 10.0


def machine_with_more(code: bytes = HALT, **options: Any) -> Machine:
    """With a second region of RAM, at FAR."""
    machine = Machine("1M", **options)
    machine.load(code)
    machine.vm.add_memory(FAR, SIZE)
    return machine


def far(machine: Machine) -> Memory:
    return next(region for region in machine.memory if region.address == FAR)


def replace_far(machine: Machine) -> None:
    """RAM of the same shape, which lies elsewhere in this process."""
    old = far(machine)
    made = Memory(FAR, SIZE, slot=old.slot)  # before the other goes, so not in its place
    machine.vm.remove_memory(old)
    machine.vm.adopt_memory(made)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_over_inputs_goes_on_with_ram_that_was_replaced(batch: int) -> None:
    with machine_with_more() as machine:
        machine.memory.write(FAR, b"before")
        snapshot, found = machine.snapshot(), []
        made = runs(
            snapshot, [b"1", b"2", b"3", b"4"], FAR, machine=machine, collect=(FAR, 6),
            touched=True, batch=batch,
        )  # fmt: skip
        for one in made:
            found.append((one.collected, one.touched))
            if len(found) == 2:
                replace_far(machine)
                machine.reset_to(snapshot)
        assert found == [(digit + b"efore", frozenset({FAR})) for digit in (b"1", b"2", b"3", b"4")]


def test_a_loop_over_inputs_whose_function_takes_ram_away() -> None:
    with machine_with_more() as machine:
        snapshot = machine.snapshot()

        def write(machine: Machine, given: bytes) -> None:
            machine.vm.remove_memory(far(machine))

        with pytest.raises(ConfigError, match="other RAM"):
            list(runs(snapshot, [b""], write, machine=machine, collect=(FAR, 6)))


def test_ram_comes_and_goes_when_no_other_thread_saves_or_restores() -> None:
    with machine_with_more() as machine:
        region = far(machine)
        works = (
            lambda: machine.vm.remove_memory(region),
            lambda: machine.vm.add_memory(2 * FAR, SIZE),
            machine.vm.create_vcpu,
        )
        for work in works:
            thread = threading.Thread(target=work)
            with machine.vm.whole:
                thread.start()
                thread.join(0.02)
                assert thread.is_alive()
                assert [one.address for one in machine.memory if one is region] in ([], [FAR])
            thread.join(PATIENCE)
        assert [one.address for one in machine.memory] == [0, 2 * FAR]
        assert len(machine.cpus) == 2


def test_ram_stays_while_a_loop_over_inputs_has_its_address() -> None:
    with machine_with_more(bytes.fromhex("e610 f4")) as machine:  # out 0x10, al; hlt
        region, told = far(machine), []

        @machine.on_port(0x10)
        def device(offset: int, size: int, value: int | None) -> None:
            with pytest.raises(ConfigError, match=r"in use by kvmpy\.runs"):
                machine.vm.remove_memory(region)
            told.append(region in list(machine.memory))

        made = runs(machine.snapshot(), [b"1", b"2"], FAR, machine=machine, collect=(FAR, 1))
        assert [one.collected for one in made] == [b"1", b"2"]
        assert told == [True, True]
        machine.vm.remove_memory(region)


def test_a_region_that_a_guest_has_is_not_unmapped_by_itself() -> None:
    with machine_with_more() as machine:
        region = far(machine)
        with pytest.raises(ConfigError, match="remove_memory"):
            region.close()
        region.write(FAR, b"still there")
        machine.vm.remove_memory(region)
        region.close()


@contextmanager
def hasty_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_a_recorder_that_several_threads_replace_at_once_is_kept() -> None:
    with machine_with_more() as machine:
        (cpu,) = machine.cpus
        lost, stop = [], threading.Event()

        def start() -> None:
            while not stop.is_set():
                machine.trace.start(0)

        threads = [threading.Thread(target=start) for _ in range(3)]
        with hasty_switching():
            for thread in threads:
                thread.start()
            until = time.monotonic() + 0.7
            while time.monotonic() < until and not lost:
                with cpu.alone:
                    if all(ring.recorder != cpu.loop.recorder for ring in cpu.keeps):
                        lost.append(cpu.loop.recorder)
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not lost
        assert machine.run(PATIENCE).outcome == "halt"
