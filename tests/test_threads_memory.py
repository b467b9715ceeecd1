"""Memory that C or KVM has addresses of, taken away by another thread, a child or a caller."""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from kvmpy import ClosedError, ConfigError, HostError, Machine, runs
from kvmpy.abi import lib
from kvmpy.devices import Capture, Sink
from kvmpy.memory import Memory
from kvmpy.snapshot.reset import DIRTY_LOG
from kvmpy.vcpu import VCPU

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
        machine.trace.start(0)

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


# What the C loop looks at --------------------------------------------------------------------


def test_ranges_stay_while_a_vcpu_may_be_looking_at_them() -> None:
    with machine_with_more() as machine:
        loop, dispatch = machine.cpus[0].loop, machine.dispatch
        before = weakref.ref(dispatch._ranges)
        loop.running = 1  # a thread serves an exit, and may have been interrupted in the midst
        for _ in range(20):
            machine.detach(machine.attach_mmio(2 * FAR, 4096, Sink()))
        assert before() is not None
        loop.entries += 2
        machine.detach(machine.attach_mmio(2 * FAR, 4096, Sink()))
        assert before() is None
        loop.running = 0
        for _ in range(20):
            machine.detach(machine.attach_mmio(2 * FAR, 4096, Sink()))
        assert len(dispatch._replaced) == 1


# A vCPU's mapping ----------------------------------------------------------------------------


def test_a_vcpu_that_a_thread_begins_to_run_while_it_is_closed_is_not_unmapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine_with_more() as machine:
        (cpu,) = machine.cpus
        with monkeypatch.context() as patched:
            patched.setattr(cpu, "check_stopped", lambda: None)  # it began right after that
            cpu.loop.running = 1
            with pytest.raises(ConfigError, match="is running"):
                cpu.close()
        cpu.loop.running = 0
        assert machine.run(PATIENCE).outcome == "halt"


def test_a_machine_of_which_a_vcpu_begins_to_run_is_closed_as_a_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine_with_more(cpus=2) as machine:
        with monkeypatch.context() as patched:
            patched.setattr(VCPU, "check_stopped", lambda self: None)  # it began right after that
            machine.cpus[1].loop.running = 1
            with pytest.raises(ConfigError, match="vCPU 1 is running"):
                machine.close()
        machine.cpus[1].loop.running = 0
        assert [machine.run(PATIENCE, cpu=number).outcome for number in (0, 1)] == ["halt"] * 2


def test_going_back_and_running_exclude_each_other_in_c() -> None:
    with machine_with_more() as machine:
        (cpu,) = machine.cpus
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        cpu.loop.running = 1  # another thread began after check_stopped()
        with pytest.raises(ConfigError, match="run or finished by another thread"):
            machine.resetter.reset()
        cpu.loop.running = 0
        machine.resetter.reset()
        assert not cpu.loop.finishing
        assert machine.run(PATIENCE).outcome == "halt"


def test_a_loop_over_inputs_and_another_thread_that_goes_back_are_told_of_each_other() -> None:
    with machine_with_more() as machine:
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        machine.resetter = None  # as in the middle of another thread's restore()
        with pytest.raises(ConfigError, match="another thread goes back"):
            machine.before_reset()


def test_a_reset_that_cannot_read_the_dirty_log_says_so() -> None:
    with machine_with_more() as machine:
        machine.reset_to(machine.snapshot())
        if machine.resetter.method != DIRTY_LOG:
            pytest.skip("this host's KVM has no manual dirty log")
        machine.vm.set_log_dirty(far(machine), False)
        with pytest.raises(HostError, match="the dirty log failed"):
            machine.resetter.reset()


# The child of a fork -------------------------------------------------------------------------


def status_of_child(work: Callable[[], object]) -> int:
    """How a forked child ends that does this; it is killed if it hangs."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def held_by_another_thread(lock: AbstractContextManager[object]) -> Iterator[None]:
    held, stop = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            stop.wait(2 * PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE)
    yield
    stop.set()
    thread.join()


def test_a_child_closes_while_another_thread_stops_the_machine() -> None:
    with machine_with_more() as machine, held_by_another_thread(machine.cpus[0].alone):
        assert status_of_child(machine.close) == 0


def test_a_child_asks_for_devices_while_another_thread_makes_them() -> None:
    """And makes machines of its own."""

    def work() -> None:
        assert made.devices
        with Machine.from_snapshot(snapshot) as own:
            assert own.devices
            assert own.run(PATIENCE).outcome == "halt"

    with machine_with_more() as machine:
        snapshot = machine.snapshot()
        with Machine.from_snapshot(snapshot) as made, held_by_another_thread(made.vm.whole):
            assert status_of_child(work) == 0


def test_a_child_closes_while_a_vcpu_writes_to_a_capture() -> None:
    with machine_with_more() as machine:
        capture = Capture()
        machine.attach_port(0x10, 1, capture)
        action: Any = capture.backing
        action._action.lock = 1  # as in the middle of another thread's write
        assert status_of_child(machine.close) == 0
        action._action.lock = 0


def test_a_child_that_is_forked_in_a_device_closes_the_machine_and_comes_back() -> None:
    machine, status = machine_with_more(bytes.fromhex("e610 f4")), []

    @machine.on_port(0x10)
    def device(offset: int, size: int, value: int | None) -> None:
        def work() -> None:
            with pytest.raises(ClosedError):
                machine.close()
                again()

        def again() -> None:  # what the C loop does when the device returns
            code = lib.kvmpy_run(machine.cpus[0].loop)
            assert code < 0
            raise machine.cpus[0].run_error(-code)

        status.append(status_of_child(work))

    assert machine.run(PATIENCE).outcome == "halt"
    assert status == [0]
    machine.close()
