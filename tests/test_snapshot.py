"""Snapshots: whatever is done in between, going back to one is as if it had never been."""

import functools
import gc
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import ConfigError, HostError, Machine, OverlapError, assemble
from kvmpy.bus import Stateful
from kvmpy.devices import Capture, Counter, PostCode, Serial16550A, standard
from kvmpy.devices.reset import ResetControl
from kvmpy.interrupts import MsiRoute
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot import Image, Plan
from kvmpy.snapshot.diff import without_in_use
from kvmpy.x86.state import MPState

pytestmark = pytest.mark.usefixtures("kvm_host")

MEMORY = 2 << 20
DATA = 0x20000  # four pages that guests work on
PORT, MMIO = 0x30, 0xD0000000
END = "mov al, 7\nout 0xf4, al\nhlt"
EVERYWHERE = (
    "add rax, rbx",
    "imul rbx, rax, 7",
    "xor rcx, rax",
    "adc rdx, rcx",
    "rol rdx, 5",
    "push rdx",
    "lea rax, [rax + rbx*4 + 1]",
    "bswap rcx",
    *(f"mov edi, {DATA + page * PAGE_SIZE + 8 * page}\nmov [rdi], rax" for page in range(4)),
    *(f"mov edi, {DATA + page * PAGE_SIZE + 8 * page}\nadd rbx, [rdi]" for page in range(4)),
    f"out {PORT}, al",
    f"out {PORT}, eax",
    f"in al, {PORT}",
    f"in eax, {PORT}",
    f"mov edi, {MMIO:#x}\nmov [rdi], ecx",
    f"mov edi, {MMIO + 8:#x}\nmov [rdi], rdx",
    f"mov edi, {MMIO:#x}\nmov rax, [rdi]",
    "out 0xe9, al",
    "mov edx, 0x3f8\nmov al, 'x'\nout dx, al",
)
NATIVE = (  # what kvm_pvm's emulator lacks in ring 0
    "movq xmm0, rax\npaddq xmm1, xmm0",
    "paddq xmm0, xmm1\nmovq rbx, xmm0",
    "popcnt rcx, rax",
)


class Accumulator:
    """A device whose answers depend on all that was written to it."""

    name = "accumulator"

    def __init__(self) -> None:
        self.value = 1

    def read(self, offset: int, size: int) -> int:
        self.value = (self.value * 33 + offset + size) & 0xFFFFFFFFFFFFFFFF
        return self.value & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = (self.value * 31 + value + offset) & 0xFFFFFFFFFFFFFFFF

    def save_state(self) -> bytes:
        return self.value.to_bytes(8, "little")

    def load_state(self, state: bytes) -> None:
        self.value = int.from_bytes(state, "little")


@functools.cache
def code(text: str) -> bytes:
    return bytes(assemble(text, mode="long", at=0x1000))


def attach(machine: Machine) -> None:
    device = Accumulator()
    machine.attach_port(PORT, 4, device)
    machine.attach_mmio(MMIO, PAGE_SIZE, device)


def machine_of(body: bytes, ring: int, **options: Any) -> Machine:
    machine = Machine(MEMORY, "long", ring, **options)
    attach(machine)
    machine.load(body, 0x1000)
    return machine


def end_state(machine: Machine) -> tuple[Any, ...]:
    """Run to the end; all that there is to see of it."""
    result = machine.run(timeout=10)
    cpu = machine.cpus[0]
    device = machine.dispatch.ports.find(PORT)
    assert device is not None
    return (
        result.outcome,
        result.value,
        cpu.get_regs(),
        cpu.get_sregs(),
        without_in_use(cpu.get_xsave()),
        machine.memory.read(0, MEMORY),
        device.device.value,
        machine.console,
    )


def disturb(machine: Machine) -> None:
    """Change all that a guest or a host can change."""
    machine.run(timeout=0.02)
    machine.memory.write(DATA, os.urandom(PAGE_SIZE * 3))
    machine.memory.view[0x1000:0x1010] = b"\xcc" * 16
    cpu = machine.cpus[0]
    registers = cpu.get_regs()
    registers.rax, registers.rsp, registers.rip = 0xDEAD, 0x40, 0x2000
    cpu.set_regs(registers)
    area = bytearray(cpu.get_xsave())
    area[160:176] = os.urandom(16)  # XMM0
    area[512] |= 3  # XSTATE_BV: x87 and SSE are not in their initial state
    cpu.set_xsave(bytes(area))
    machine._console.write(b"noise")
    claim = machine.dispatch.ports.find(PORT)
    assert claim is not None
    claim.device.write(0, 4, 99)


def guests(pieces: tuple[str, ...]) -> Any:
    return st.lists(st.sampled_from(pieces), min_size=1, max_size=14)


def check(pieces: list[str], ring: int, again: Callable[[Machine, Any], Iterator[Machine]]) -> None:
    """At every exit: a snapshot there, and from it the same end as without one."""
    body = b"".join(map(code, pieces)) + code(END)
    with machine_of(body, ring) as machine:
        whole = end_state(machine)
        exits = sum(machine.cpus[0].exit_counts().values())
    assert whole[0] == "debug-exit"
    for k in range(exits):
        with machine_of(body, ring) as machine:
            machine.run(max_exits=k, timeout=10) if k else None
            snapshot = machine.snapshot()
            disturb(machine)
            for other in again(machine, snapshot):
                assert end_state(other) == whole


def in_place(machine: Machine, snapshot: Any) -> Iterator[Machine]:
    for _ in range(2):
        machine.restore(snapshot)
        yield machine
        disturb(machine)


def spawned(machine: Machine, snapshot: Any) -> Iterator[Machine]:
    for _ in range(2):
        with Machine.from_snapshot(snapshot, attach) as other:
            yield other
            disturb(other)


def nested(machine: Machine, snapshot: Any) -> Iterator[Machine]:
    """Increments upon increments, and back across them."""
    middle = machine.snapshot()
    disturb(machine)
    last = machine.snapshot()
    assert last.parent is middle
    assert middle.parent is snapshot
    machine.restore(snapshot)
    yield machine
    machine.restore(last)
    machine.restore(middle)
    assert machine.snapshot().diff(middle).pages == ()
    machine.restore(snapshot)
    yield machine


WAYS = (in_place, spawned, pytest.param(nested, marks=pytest.mark.slow))


@settings(max_examples=12)
@pytest.mark.parametrize("way", WAYS)
@given(pieces=guests(EVERYWHERE))
def test_a_guest_in_ring_0_ends_as_if_nothing_had_been(way: Any, pieces: list[str]) -> None:
    check(pieces, 0, way)


@settings(max_examples=12)
@pytest.mark.parametrize("way", WAYS)
@given(pieces=guests(EVERYWHERE + NATIVE))
def test_a_guest_in_ring_3_ends_as_if_nothing_had_been(way: Any, pieces: list[str]) -> None:
    check(pieces, 3, way)


# What a snapshot has in it ------------------------------------------------------------------

COUNTING = (
    f"xor eax, eax\nagain:\ninc eax\nmov edi, {DATA}\nmov [rdi], eax\nout {PORT}, al\njmp again"
)


@pytest.fixture
def counting() -> Iterator[Machine]:
    with machine_of(code(COUNTING), 0) as machine:
        machine.run(max_exits=3, timeout=10)
        yield machine


def test_an_increment_holds_only_what_changed(counting: Machine) -> None:
    whole = counting.snapshot()
    counting.run(max_exits=2, timeout=10)
    part = counting.snapshot()
    assert part.parent is whole
    assert part.images[0].stored == PAGE_SIZE
    assert part.size < whole.size
    difference = whole.diff(part)
    assert difference.pages == (DATA,)
    assert difference.bytes == 1
    assert difference.registers["cpu0.rax"] == (3, 5)
    assert set(difference.devices) == {f"port {PORT:#x}"}
    assert not part.diff(part)
    assert "page 0x20000" in str(difference)
    assert part.read(DATA, 1) == b"\x05"
    assert whole.read(DATA, 1) == b"\x03"


def test_devices_and_routes_that_only_one_has_differ() -> None:
    with Machine(MEMORY, irqchip="split") as machine:
        before = machine.snapshot()

        @machine.on_port(0x60)
        def keyboard(offset: int, size: int, value: int | None) -> int:
            return 0

        machine.vm.set_gsi_routing([route := MsiRoute(1, 0xFEE00000, 0x31)])
        after = machine.snapshot()
    assert before.diff(after).devices == {
        "routes": (None, (route,)),
        "port 0x60, attached": (None, "port 0x60 (keyboard)"),
    }
    assert "attached: None -> port 0x60 (keyboard)" in str(before.diff(after))


def test_pages_of_zeros_and_pages_never_touched_take_nothing() -> None:
    with Machine("256M") as machine:
        machine.load(code(END), 0x1000)
        machine.memory.write(0x100000, bytes(1 << 20))
        snapshot = machine.snapshot()
        assert snapshot.images[0].stored < 64 << 10
        machine.memory.write(0x100000, b"x")
        machine.memory.write(0x100000, b"\0")
        assert machine.snapshot().diff(snapshot).pages == ()


def test_a_page_that_became_zero_is_one_that_changed(counting: Machine) -> None:
    whole = counting.snapshot()
    counting.memory.write(DATA, bytes(PAGE_SIZE))
    part = counting.snapshot()
    assert whole.diff(part).pages == (DATA,)
    counting.restore(whole)
    assert counting.memory.read(DATA, 1) == b"\x03"
    counting.restore(part)
    assert counting.memory.read(DATA, 1) == b"\0"
    with Machine.from_snapshot(part, attach) as other:
        assert other.memory.read(DATA, 1) == b"\0"


def test_much_that_changed_makes_a_whole_image_again(counting: Machine) -> None:
    counting.snapshot()
    counting.memory.write(0x80000, os.urandom(MEMORY // 2))
    part = counting.snapshot()
    assert part.images[0].parent is None
    with Machine.from_snapshot(part, attach) as other:
        assert other.memory.read(0x80000, MEMORY // 2) == counting.memory.read(0x80000, MEMORY // 2)


def test_what_the_host_writes_through_a_view_is_seen(counting: Machine) -> None:
    whole = counting.snapshot()
    view = counting.memory.view
    view[0x50000] = 1
    assert whole.diff(counting.snapshot()).pages == (0x50000,)
    counting.restore(whole)
    assert view[0x50000] == 0  # the same view, still good
    view.release()


def test_copies_do_not_see_each_others_writes(counting: Machine) -> None:
    snapshot = counting.snapshot()
    with Machine.from_snapshot(snapshot, attach) as one, counting.fork(attach) as other:
        one.memory.write(DATA, b"one")
        other.memory.write(DATA, b"two")
        counting.memory.write(DATA, b"mum")
        assert one.memory.read(DATA, 3) == b"one"
        assert other.memory.read(DATA, 3) == b"two"
        assert snapshot.read(DATA, 1) == b"\x03"
        assert one.run(max_exits=1, timeout=10).outcome == "max-exits"


def test_threads_that_look_at_a_snapshot_first_see_the_same_bytes(
    counting: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses in what each has got are used for as long as the snapshot is there."""
    counting.snapshot()
    counting.memory.write(DATA, b"changed")
    image = counting.snapshot().images[0]
    real, others = Image.add_increments, []

    def meanwhile(self: Image, start: int) -> None:
        real(self, start)
        if not others:  # another thread comes before this one is done
            others.append(None)
            others[0] = image.view()

    monkeypatch.setattr(Image, "add_increments", meanwhile)
    mine = image.view()
    assert mine is others[0] and mine is image.view()


def test_a_snapshot_outlives_its_machine() -> None:
    with machine_of(code(COUNTING), 3) as machine:
        machine.run(max_exits=4, timeout=10)
        snapshot = machine.snapshot()
    with Machine.from_snapshot(snapshot, attach) as other:
        other.run(max_exits=1, timeout=10)
        assert other.cpus[0].get_regs().rax == 5


def test_snapshots_that_nobody_has_leave_no_descriptor() -> None:
    with machine_of(code(COUNTING), 0) as machine:
        machine.snapshot()
        machine._at = None
        machine.vm.memory.read(0, 1)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            machine.run(max_exits=1, timeout=10)
            snapshot = machine.snapshot()
            machine.restore(snapshot)
            with Machine.from_snapshot(snapshot, attach):
                pass
            machine._at = None
        del snapshot
        for region in machine.memory:
            region.origin = None
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before


# Interrupt controllers, several vCPUs -------------------------------------------------------


def test_a_halted_guest_and_its_timer_go_on_where_they_were() -> None:
    """A LAPIC timer in flight, in a guest that sleeps: it fires in the copy, too."""
    body = assemble(
        """
        lidt [rip + register]
        mov edi, 0xfee00000
        mov dword ptr [rdi + 0xf0], 0x1ff
        mov dword ptr [rdi + 0x3e0], 0xb
        mov dword ptr [rdi + 0x320], 0x40
        mov dword ptr [rdi + 0x380], 60000000
        sti
        out 0x30, al
        wait:
        hlt
        jmp wait
        handler:
        mov al, 9
        out 0xf4, al
        .align 16
        idt:
        .space 1024
        .word handler & 0xffff, 8, 0x8e00, handler >> 16
        .long 0, 0
        end:
        register:
        .word end - idt - 1
        .quad idt
        """,
        mode="long",
        at=0x1000,
    )
    with Machine(MEMORY, irqchip="split") as machine:
        attach(machine)
        machine.load(body)
        machine.run(max_exits=1, timeout=10)
        assert machine.run(timeout=0.01).outcome == "timeout"  # it sleeps
        snapshot = machine.snapshot()
        left = struct.unpack_from("<I", snapshot.cpus[0]["LAPIC"], 0x390)[0]
        assert 0 < left < 60_000_000
        assert machine.run(timeout=10).outcome == "debug-exit"
        machine.restore(snapshot)
        assert machine.run(timeout=10).outcome == "debug-exit"
        with Machine.from_snapshot(snapshot, attach) as other:
            assert other.cpus[0].get_mp_state() == MPState.HALTED
            assert other.run(timeout=10).outcome == "debug-exit"


def test_an_interrupt_that_waits_is_delivered_in_the_copy() -> None:
    body = assemble(
        """
        lidt [rip + register]
        out 0x30, al
        sti
        nop
        hlt
        handler:
        mov al, 9
        out 0xf4, al
        .align 16
        idt:
        .space 1024
        .word handler & 0xffff, 8, 0x8e00, handler >> 16
        .long 0, 0
        end:
        register:
        .word end - idt - 1
        .quad idt
        """,
        mode="long",
        at=0x1000,
    )
    with Machine(MEMORY) as machine:
        attach(machine)
        machine.load(body)
        machine.run(max_exits=1, timeout=10)
        machine.cpus[0].interrupt(0x40)
        snapshot = machine.snapshot()
        assert machine.run(timeout=10).outcome == "debug-exit"
        machine.restore(snapshot)
        assert machine.run(timeout=10).outcome == "debug-exit"
        with Machine.from_snapshot(snapshot, attach) as other:
            assert other.run(timeout=10).outcome == "debug-exit"


@pytest.mark.parametrize("irqchip", [None, "split", "full"])
def test_each_of_several_vcpus_comes_back(irqchip: str | None) -> None:
    with Machine(MEMORY, cpus=2, irqchip=irqchip) as machine:
        attach(machine)
        machine.load(code(COUNTING), 0x1000)
        machine.cpus[1].set_mp_state(MPState.RUNNABLE)
        machine.run(max_exits=2, timeout=10, cpu=0)
        machine.run(max_exits=5, timeout=10, cpu=1)
        snapshot = machine.snapshot()
        for cpu in (0, 1):
            machine.run(max_exits=3, timeout=10, cpu=cpu)
        machine.restore(snapshot)
        with Machine.from_snapshot(snapshot, attach) as other:
            for one in (machine, other):
                assert [cpu.get_regs().rax for cpu in one.cpus] == [2, 5]
                assert one.run(max_exits=1, timeout=10, cpu=1).outcome == "max-exits"
                assert one.cpus[1].get_regs().rax == 6


def test_the_pic_and_the_pit_are_part_of_it() -> None:
    with Machine(MEMORY, irqchip="full") as machine:
        machine.vm.create_pit()
        machine.load(
            code("mov al, 0x5a\nout 0x21, al\nmov al, 0x34\nout 0x43, al\nout 0xf4, al\nhlt")
        )
        before = machine.snapshot()
        machine.run(timeout=10)
        snapshot = machine.snapshot()
        assert {"irqchip", "pit"} <= set(before.diff(snapshot).devices)
        pit = machine.vm.get_pit()
        machine.vm.set_irqchip(0, bytes(512))
        machine.restore(snapshot)
        with Machine.from_snapshot(snapshot) as other:
            for one in (machine, other):
                assert one.vm.get_irqchip(0) == snapshot.vm.chips[0]
                assert one.vm.get_irqchip(0)[2] == 0x5A  # the interrupt mask
                assert one.vm.get_pit()[12:16] == pit[12:16]
                assert not snapshot.diff(one.snapshot())


# Devices ------------------------------------------------------------------------------------


def test_each_device_with_a_state_gives_it_back() -> None:
    uart, other_uart = (Serial16550A(lambda data: None) for _ in range(2))
    for offset, value in ((3, 0x80), (0, 1), (1, 0), (3, 3), (2, 0xC7), (1, 5), (7, 0x42)):
        uart.write(offset, 1, value)
    uart.feed(b"ab")
    post, other_post = PostCode(), PostCode()
    post.write(0, 1, 0x55)
    control, other_control = (ResetControl(lambda: None) for _ in range(2))
    control.write(0, 1, 2)
    counter, other_counter = Counter(), Counter()
    counter.read(0, 1)
    capture, other_capture = Capture(), Capture()
    capture.write(0, 2, 0x4241)
    other_capture.write(0, 1, 0x43)
    for one, other in (
        (uart, other_uart),
        (post, other_post),
        (control, other_control),
        (counter, other_counter),
        (capture, other_capture),
    ):
        assert isinstance(one, Stateful)
        other.load_state(one.save_state())
        assert other.save_state() == one.save_state()
    assert [other_uart.read(offset, 1) for offset in (7, 3, 1, 0, 0)] == [0x42, 3, 5, 97, 98]
    assert (other_post.last, other_post.count, other_counter.count) == (0x55, 1, 1)
    assert other_capture.data() == b"AB"


def test_what_c_has_counted_is_part_of_it() -> None:
    with Machine(MEMORY) as machine:
        counter = Counter()
        machine.attach_port(PORT, 4, counter)
        machine.load(code(COUNTING), 0x1000)
        machine.run(max_exits=5, timeout=10)
        snapshot = machine.snapshot()
        machine.run(max_exits=5, timeout=10)
        assert counter.count == 10
        machine.restore(snapshot)
        assert counter.count == 5
        machine.run(max_exits=1, timeout=10)
        assert counter.count == 6


# Refusals -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(counting: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = counting.snapshot()
    with Machine(2 * MEMORY) as other, pytest.raises(ConfigError, match="other RAM"):
        other.restore(snapshot)
    with Machine(MEMORY, cpus=2) as other, pytest.raises(ConfigError, match="vCPUs"):
        other.restore(snapshot)
    with Machine(MEMORY, irqchip="split") as other, pytest.raises(ConfigError, match="irqchip"):
        other.restore(snapshot)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"port 0x30.*attach"):
        Machine.from_snapshot(snapshot)
    with pytest.raises(ConfigError, match="ring"):
        Machine.from_snapshot(snapshot, ring=3)
    with pytest.raises(OverlapError):
        Machine.from_snapshot(snapshot, lambda machine: machine.attach_port(0x3F8, 1, PostCode()))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr("kvmpy.snapshot.snapshot.backend", lambda: "kvm_other")
    for refused in (counting.restore, Machine.from_snapshot):
        with pytest.raises(ConfigError, match="across_backends"):
            refused(snapshot)
    counting.restore(snapshot, across_backends=True)


def test_a_machine_that_runs_is_not_saved(counting: Machine) -> None:
    seen: list[Exception] = []

    @counting.on_port(0x60)
    def device(offset: int, size: int, value: int | None) -> int:
        try:
            counting.snapshot()
        except ConfigError as error:
            seen.append(error)
        return 0

    counting.memory.write(0x1000, code("out 0x60, al\n" + END))
    counting.set_entry(0x1000)
    counting.run(timeout=10)
    assert "running" in str(seen[0])


def test_an_exit_at_hand_is_finished_first() -> None:
    """An IN that was answered is in the snapshot as done, and is not asked for again."""
    with machine_of(code(f"in al, {PORT}\n{COUNTING}"), 0) as machine:
        asked = machine.dispatch.ports.find(PORT)
        assert asked is not None
        machine.run(max_exits=1, timeout=10)
        snapshot = machine.snapshot()
        value = asked.device.value
        machine.restore(snapshot)
        machine.run(max_exits=1, timeout=10)  # the next one is OUT
        assert asked.device.value == (value * 31 + 1) & 0xFFFFFFFFFFFFFFFF


def test_the_standard_devices_with_a_state_are_those_that_a_snapshot_has() -> None:
    with Machine(MEMORY) as machine:
        machine.load(code("hlt"), 0x1000)
        snapshot = machine.snapshot()
    assert snapshot.devices and standard.has_all(snapshot.devices)
    assert set(snapshot.devices) == standard._STATEFUL
    assert not standard.has_all([*snapshot.devices, "port 0x30"])


def test_a_copy_has_its_devices_as_soon_as_it_needs_them() -> None:
    """From Python, from the guest, and for what has no snapshot of its own."""
    text = "mov edx, 0x3f8\nmov al, 'x'\nout dx, al\nmov edx, 0x3ff\nin al, dx\nout 0x80, al\nhlt"
    with Machine(MEMORY) as machine:
        machine.load(code(text), 0x1000)
        machine.dispatch.write(machine.dispatch.ports, 0x3FF, 1, 0x5A)  # the scratch register
        machine.dispatch.write(machine.dispatch.ports, 0x80, 1, 1)
        snapshot = machine.snapshot()
    with Machine.from_snapshot(snapshot) as copy:
        assert copy._dispatch is None
        assert copy.run(timeout=10).outcome == "halt"
        assert copy.console == b"x" and copy.cpus[0].get_regs().rax & 0xFF == 0x5A
        post = copy.devices["POST code"]
        assert isinstance(post, PostCode) and list(post.codes) == [1, 0x5A]
    with Machine.from_snapshot(snapshot) as copy:
        serial = copy.devices["serial"]
        assert isinstance(serial, Serial16550A) and serial.read(7, 1) == 0x5A
    with Machine.from_snapshot(snapshot) as copy:
        copy.reset_to(snapshot)
        assert copy.run(timeout=10).exits == {"port-out": 2, "port-in": 1, "halt": 1}
    with Machine.from_snapshot(snapshot) as copy:
        copy.memory.write(0x1000, b"\xf4")
        assert copy.run(timeout=10).unclaimed == () and copy._dispatch is None
        assert copy.snapshot().devices == snapshot.devices


def test_a_subclass_with_more_to_do_is_made_step_by_step() -> None:
    class Noted(Machine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.note = "made"

    with Machine(MEMORY) as machine:
        machine.load(code("hlt"), 0x1000)
        snapshot = machine.snapshot()
    with Noted.from_snapshot(snapshot) as copy:
        assert copy.note == "made" and copy.run(timeout=10).outcome == "halt"


def test_what_differs_from_a_new_vcpu_is_written() -> None:
    """Each kind of state that a copy gets by an ioctl of its own, and several vCPUs."""
    with Machine(MEMORY, cpus=2) as machine:
        machine.load(code("hlt"), 0x1000)
        cpu = machine.cpus[1]
        debug = cpu.get_debugregs()
        debug.db = (0x1234, 0, 0, 0)
        cpu.set_debugregs(debug)
        area = bytearray(cpu.get_xsave())
        area[512] |= 2
        area[160] = 77  # XMM0
        cpu.set_xsave(bytes(area))
        cpu.set_msrs({0xC0000082: 0x4321})  # LSTAR
        special = cpu.get_sregs()
        special.gdt.limit = 0x77
        cpu.set_sregs(special)
        snapshot = machine.snapshot()
    with Machine.from_snapshot(snapshot) as copy:
        assert copy._dispatch is None  # it was made in one go
        cpu = copy.cpus[1]
        assert cpu.get_debugregs().db[0] == 0x1234
        assert cpu.get_xsave()[160] == 77
        assert cpu.get_msrs([0xC0000082]) == {0xC0000082: 0x4321}
        assert cpu.get_sregs().gdt.limit == 0x77
        assert not snapshot.diff(copy.snapshot())


def test_a_copy_that_cannot_be_made_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine(MEMORY) as machine:
        machine.load(code("hlt"), 0x1000)
        snapshot = machine.snapshot()
    with Machine.from_snapshot(snapshot):
        pass
    plan = Plan.of(snapshot, 0)
    assert plan is not None
    last = plan._native[len(plan._calls) - 1]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    kept = last.request
    try:
        last.request = 0xAE00 + 0xFF  # no ioctl of a vCPU's
        with pytest.raises(HostError, match="KVM_SET_"):
            Machine.from_snapshot(snapshot)
    finally:
        last.request = kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with Machine.from_snapshot(snapshot) as copy:
        assert copy.run(timeout=10).outcome == "halt"
