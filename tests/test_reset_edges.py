"""Resets and loops over inputs, where the machine, its host or its devices are not as expected."""

import array
import gc
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from test_reset import INPUT, SUMMING, given_input
from test_snapshot import DATA, END, MEMORY, MMIO, PORT, attach, code, machine_of

from kvmpy import ClosedError, ConfigError, HostError, Machine, runs
from kvmpy.interrupts import MsiRoute
from kvmpy.memory import PAGE_SIZE
from kvmpy.vcpu import VCPU

pytestmark = pytest.mark.usefixtures("kvm_host")

FAR = 16 << 20


@pytest.fixture
def summing() -> Iterator[Machine]:
    with machine_of(code(SUMMING), 0) as machine:
        yield machine


def sums(machine: Machine, snapshot: Any, **options: Any) -> list[int | None]:
    inputs = [given_input(*range(number)) for number in (2, 5, 3, 4)]
    made = runs(snapshot, inputs, INPUT, timeout=10, machine=machine, collect=(DATA, 4), **options)
    return [int.from_bytes(one.collected, "little") for one in made]


# RAM that KVM does not log -------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_a_loop_over_inputs_where_the_log_is_another_s(summing: Machine, batch: int) -> None:
    (region,) = summing.memory
    summing.vm.set_log_dirty(region, True)
    snapshot = summing.snapshot()
    assert sums(summing, snapshot, batch=batch) == [1, 10, 3, 6]
    assert summing.resetter.method == "copy-on-write"


@pytest.mark.parametrize("way", [Machine.restore, Machine.reset_to])
def test_what_the_host_writes_to_read_only_ram_is_taken_back(way: Any, summing: Machine) -> None:
    summing.vm.add_memory(FAR, 2 * PAGE_SIZE, readonly=True)
    summing.memory.write(FAR, b"rom")
    snapshot = summing.snapshot()
    for _ in range(3):
        way(summing, snapshot)
        assert summing.memory.read(FAR, 5) == b"rom\0\0"
        summing.memory.write(FAR, b"noise")
    with Machine.from_snapshot(snapshot, attach) as other:
        assert [region.readonly for region in other.memory] == [False, True]
        assert other.memory.read(FAR, 5) == b"rom\0\0"


@pytest.mark.parametrize("way", [Machine.restore, Machine.reset_to])
def test_what_others_write_to_shared_ram_is_taken_back(way: Any, summing: Machine) -> None:
    region = summing.vm.add_memory(FAR, PAGE_SIZE, backing="shared")
    region.write(FAR, b"ours")
    snapshot = summing.snapshot()
    assert region.fd is not None
    with mmap.mmap(region.fd, PAGE_SIZE) as others:
        for _ in range(3):
            way(summing, snapshot)
            assert others[:5] == b"ours\0"
            others[:5] = b"noise"


@pytest.mark.parametrize("huge", [False, True])
def test_ram_above_4_gib_and_huge_pages(huge: bool) -> None:
    high = (4 << 30) + 0x1000
    with Machine("3100M", huge=huge) as machine:
        machine.load(code(END), 0x1000)
        machine.memory.write(high, b"high")
        snapshot = machine.snapshot()
        for _ in range(2):
            for way in (machine.reset_to, machine.restore, machine.reset_to):
                machine.memory.write(high, b"noise")
                machine.run(timeout=10)
                way(snapshot)
                assert machine.memory.read(high, 5) == b"high\0"
        with Machine.from_snapshot(snapshot) as other:
            assert other.memory.read(high, 5) == b"high\0"


# A machine that is not what it was ----------------------------------------------------------


def remove(machine: Machine) -> None:
    machine.vm.remove_memory(list(machine.memory)[1])


def add(machine: Machine) -> None:
    machine.vm.add_memory(MEMORY, PAGE_SIZE, log_dirty=True)


def replace(machine: Machine) -> None:
    """The same slot, logged, so that KVM sees no difference."""
    remove(machine)
    machine.vm.add_memory(2 * FAR, PAGE_SIZE, log_dirty=True)


def add_cpu(machine: Machine) -> None:
    machine.vm.create_vcpu()


@pytest.mark.parametrize("change", [remove, add, replace, add_cpu])
def test_other_ram_or_vcpus_are_refused_when_going_back(
    change: Callable[[Machine], None], summing: Machine
) -> None:
    summing.vm.add_memory(FAR, PAGE_SIZE)
    snapshot = summing.snapshot()
    summing.reset_to(snapshot)
    loop = runs(snapshot, [given_input(1)] * 3, INPUT, timeout=10, machine=summing)
    next(loop)
    change(summing)
    with pytest.raises(ConfigError, match="other RAM or vCPUs"):
        next(loop)
    with pytest.raises(ConfigError, match=r"other RAM|vCPUs"):
        summing.reset_to(snapshot)


def test_ram_that_was_replaced_by_its_like_is_brought_back(summing: Machine) -> None:
    region = summing.vm.add_memory(FAR, PAGE_SIZE)
    region.write(FAR, b"data")
    snapshot = summing.snapshot()
    summing.reset_to(snapshot)
    summing.vm.remove_memory(region)
    summing.vm.add_memory(FAR, PAGE_SIZE)
    for _ in range(2):
        summing.reset_to(snapshot)
        assert summing.memory.read(FAR, 4) == b"data"
        summing.memory.write(FAR, b"more")


def test_devices_and_an_entry_that_were_replaced_start_anew(summing: Machine) -> None:
    snapshot = summing.snapshot()
    summing.reset_to(snapshot)
    for bus, at in ((summing.dispatch.ports, PORT), (summing.dispatch.mmio, MMIO)):
        claim = bus.find(at)
        assert claim is not None
        summing.detach(claim)
    summing.set_entry(0x2000)
    with pytest.raises(ConfigError, match="attach it first"):
        summing.reset_to(snapshot)
    attach(summing)
    claim = summing.dispatch.ports.find(PORT)
    assert claim is not None
    for _ in range(2):
        claim.device.write(0, 1, 99)
        summing.set_entry(0x2000)
        summing.reset_to(snapshot)
        assert (summing.entry, claim.device.value) == (0x1000, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("irqchip", ["split", "full"])
def test_interrupt_routes_are_brought_back(irqchip: str) -> None:
    with Machine(MEMORY, irqchip=irqchip) as machine:
        machine.load(code("cli\n" + END), 0x1000)
        first = machine.snapshot()
        machine.vm.set_gsi_routing([MsiRoute(5, 0xFEE00000, 0x41)])
        second = machine.snapshot()
        for way in (machine.restore, machine.reset_to, machine.reset_to):
            way(second)
            machine.vm.irq_line(5, True)
            assert machine.cpus[0].get_lapic() == second.cpus[0]["LAPIC"]  # it is not enabled
            assert machine.vm.gsi_routes == (MsiRoute(5, 0xFEE00000, 0x41),)
            way(first)
            assert machine.vm.gsi_routes is None
        if irqchip == "full":  # the PIC sees its line again
            machine.vm.irq_line(5, True)
            assert machine.vm.get_irqchip(0) != first.vm.chips[0]


def test_a_machine_closed_in_the_midst_of_a_loop(summing: Machine) -> None:
    snapshot = summing.snapshot()
    loop = runs(snapshot, [given_input(1)] * 3, INPUT, timeout=10, machine=summing)
    next(loop)
    summing.close()
    with Machine(MEMORY), pytest.raises(ClosedError):  # which has the descriptors' numbers
        next(loop)


# Stops, threads, callbacks, processes -------------------------------------------------------


def test_a_stop_ends_the_run_that_it_meets(summing: Machine) -> None:
    """And not the one whose device ended it, later in the same batch."""
    snapshot = summing.snapshot()

    def inputs() -> Iterator[bytes]:
        yield given_input(1)
        summing.stop()
        yield from (given_input(2), given_input(3))

    made = list(runs(snapshot, inputs(), INPUT, timeout=10, machine=summing, batch=3))
    assert [(one.outcome, one.value) for one in made] == [
        ("stopped", None),
        ("debug-exit", 2),
        ("debug-exit", 3),
    ]


WAYS: tuple[Callable[[Machine, Any], object], ...] = (
    lambda machine, snapshot: machine.snapshot(),
    Machine.restore,
    Machine.reset_to,
    lambda machine, snapshot: list(runs(snapshot, [b"x"], INPUT, machine=machine, timeout=1)),
    lambda machine, snapshot: machine.fork(attach),
)


@pytest.mark.parametrize("run", ["run", "exits", "runs", "thread"])
def test_nothing_goes_back_while_the_guest_runs(run: str, summing: Machine) -> None:
    """Not from inside of a device, whoever called it, and not from another thread."""
    refused: list[str] = []
    snapshot = summing.snapshot()

    def try_all() -> None:
        for way in WAYS:
            try:
                way(summing, snapshot)
            except ConfigError as error:
                refused.append(str(error))

    @summing.on_port(0x60)
    def device(offset: int, size: int, value: int | None) -> int:
        if run == "thread":
            thread = threading.Thread(target=try_all)
            thread.start()
            thread.join()
        else:
            try_all()
        return 5

    summing.memory.write(0x1000, code("in al, 0x60\nout 0xf4, al\nhlt"))
    snapshot = summing.snapshot()
    summing.reset_to(snapshot)
    if run == "exits":
        list(summing.exits(timeout=10))
    elif run == "runs":
        assert next(runs(snapshot, [b""], INPUT, timeout=10, machine=summing)).value == 5
    else:
        assert summing.run(timeout=10).value == 5
    assert len(refused) == len(WAYS)
    assert all("running" in text for text in refused)


def test_in_the_child_of_a_fork_every_way_is_refused_but_a_new_machine(summing: Machine) -> None:
    snapshot = summing.snapshot()
    summing.reset_to(snapshot)
    loop = runs(snapshot, [given_input(1)] * 2, INPUT, timeout=10, machine=summing)
    next(loop)  # its timer ticks
    child = os.fork()
    if child == 0:
        good = False
        try:
            refused = 0
            for way in WAYS[:-1]:
                try:
                    way(summing, snapshot)
                except HostError:
                    refused += 1
            with Machine.from_snapshot(snapshot, attach) as other:
                other.memory.write(INPUT, given_input(4))
                good = other.run(timeout=10).value == 4 and refused == len(WAYS) - 1
            loop.close()
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert next(loop).value == 1
    summing.reset_to(snapshot)
    summing.memory.write(INPUT, given_input(3))
    assert summing.run(timeout=10).value == 3


class Waits:
    """A device whose state is saved and loaded when a thread lets it."""

    name = "waits"

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing comes of it."""

    def save_state(self) -> bytes:
        self.entered.set()
        assert self.go.wait(60)
        return b""

    def load_state(self, state: bytes) -> None:
        self.save_state()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS[:3])
def test_close_waits_for_what_another_thread_has_begun(way: Any) -> None:
    """C has addresses of the RAM meanwhile, and of the vCPU's mapping."""
    device, ended = Waits(), list[bool]()
    machine = machine_of(code(SUMMING), 0)
    machine.attach_port(0x70, 1, device)
    snapshot = machine.snapshot()
    for _ in range(2):
        machine.reset_to(snapshot)
    device.entered.clear()
    device.go.clear()

    def work() -> None:
        way(machine, snapshot)
        ended.append(machine.vm.closed)

    worker = threading.Thread(target=work)
    closer = threading.Thread(target=machine.close)
    worker.start()
    assert device.entered.wait(60)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive() and not machine.vm.closed
    child = os.fork()
    if child == 0:  # here nobody will ever be done with it
        try:
            machine.close()
        finally:
            os._exit(0 if machine.vm.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    device.go.set()
    worker.join(60)
    closer.join(60)
    assert len(ended) == 1 and machine.vm.closed


# The posted console -------------------------------------------------------------------------

POSTING = "mov al, 'A'\nout 0xe9, al\nagain: jmp again"


def post(machine: Machine) -> VCPU:
    """Leave a byte in the ring, as a device's exception does."""
    (cpu,) = machine.cpus
    cpu.run(timeout=0.1)
    assert [value for *_, value in machine.cpus[0].drain_ring()] == [65]
    machine.set_entry(0x1000)
    cpu.run(timeout=0.1)
    return cpu


@pytest.mark.parametrize("way", [Machine.restore, Machine.reset_to])
def test_what_the_guest_has_posted_goes_with_what_it_did(way: Any) -> None:
    with Machine(MEMORY, posted_console=True) as machine:
        machine.load(code(POSTING), 0x1000)
        snapshot = machine.snapshot()
        for _ in range(2):
            way(machine, snapshot)
            cpu = post(machine)
            way(machine, snapshot)
            assert list(cpu.drain_ring()) == []
        post(machine)
        assert machine.snapshot().console == b"A"


@pytest.mark.parametrize("batch", [1, 4])
def test_what_a_run_has_posted_is_its_own(batch: int) -> None:
    with Machine(MEMORY, posted_console=True) as machine:
        machine.load(code(POSTING), 0x1000)
        snapshot = machine.snapshot()
        made = runs(snapshot, range(8), timeout=0.02, machine=machine, batch=batch)
        seen = [(one.outcome, machine.console) for one in made]
        assert {outcome for outcome, _ in seen} == {"timeout"}
        assert {console for _, console in seen} <= {b"A", b""}
        if batch == 1:
            assert seen.count(("timeout", b"A")) > 4


# What comes out ------------------------------------------------------------------------------


def holding_a_view(machine: Machine) -> None:
    attach(machine)

    @machine.on_port(0x61)
    def device(offset: int, size: int, value: int | None) -> int:
        view = machine.memory.view
        raise ValueError(f"broken, of {len(view)}")


def failing(machine: Machine) -> None:
    view = machine.memory.view
    raise ValueError(f"broken, of {len(view)}")


def test_a_view_in_a_frame_of_the_traceback_hides_no_exception(summing: Machine) -> None:
    summing.memory.write(0x1000, code("in al, 0x61\nhlt"))
    snapshot = summing.snapshot()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="broken"):
        Machine.from_snapshot(snapshot, failing)
    with pytest.raises(ValueError, match="broken"):
        list(runs(snapshot, range(2), timeout=10, attach=holding_a_view))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("left", [False, True])
def test_a_view_outlives_the_loop_that_it_is_of(summing: Machine, left: bool) -> None:
    snapshot = summing.snapshot()
    loop = runs(snapshot, [given_input(7)] * 2, INPUT, timeout=10, attach=attach)
    for one in loop:
        view = one.machine.memory.view
        if left:
            break
    loop.close()  # type: ignore[attr-defined]
    assert view[INPUT : INPUT + 2] == given_input(7)
    assert one.machine.vm.closed
    view.release()


@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_are_anything_that_is_bytes(summing: Machine, batch: int) -> None:
    snapshot = summing.snapshot()
    words = array.array("I", [0x030201_03, 0])
    inputs = [words, memoryview(words), bytearray(given_input(1, 2, 3)), given_input(1, 2, 3)]
    made = runs(snapshot, inputs, INPUT, timeout=10, machine=summing, batch=batch)
    assert [one.value for one in made] == [6] * 4
    for wrong in ("text", 7, None):
        loop = runs(snapshot, [b"\1", wrong], INPUT, timeout=10, machine=summing, batch=batch)
        with pytest.raises(ConfigError, match="an input for an address is bytes"):
            list(loop)


def test_inputs_by_a_function_end_as_those_by_an_address(summing: Machine) -> None:
    """Also after a run that was left at an access."""
    snapshot = summing.snapshot()
    inputs = [given_input(*range(number)) for number in (1, 4, 2, 5)]

    def write(machine: Machine, one: bytes) -> None:
        assert not machine.cpus[0].loop.running
        machine.memory.write(INPUT, one)

    for where in (INPUT, write):
        made = runs(snapshot, inputs, where, timeout=10, machine=summing)
        assert [(one.outcome, one.value) for one in made] == [
            ("debug-exit", sum(one[1:])) for one in inputs
        ]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 64])
def test_a_machine_that_another_thread_closes_at_any_moment(batch: int) -> None:
    """Between two runs or in one: a typed error, and RAM that nobody has taken away."""
    for _ in range(3):
        machine = machine_of(code(SUMMING), 3)
        snapshot, begun = machine.snapshot(), threading.Event()

        def close(machine: Machine = machine, begun: threading.Event = begun) -> None:
            begun.wait()
            while not machine.vm.closed:
                with suppress(ConfigError):  # it runs
                    machine.close()

        thread = threading.Thread(target=close)
        thread.start()
        try:
            inputs = [given_input(3)] * 1000
            for one in runs(snapshot, inputs, INPUT, timeout=10, machine=machine, batch=batch):
                assert one.value == 3
                begun.set()
        except ClosedError:
            pass
        thread.join()
