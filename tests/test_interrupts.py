"""Interrupt controllers, routes and eventfds on real guests.

The guests are real-mode code at CODE. HLT with an in-kernel local APIC blocks in KVM_RUN, so
every run has a timeout.
"""

import os
import struct
import threading
from collections.abc import Iterator

import pytest

from kvmpy import (
    KVM,
    VCPU,
    VM,
    ConfigError,
    Exit,
    Halt,
    HostError,
    Interrupted,
    MmioWrite,
    PortOut,
)
from kvmpy.interrupts import IOAPIC, PIC_MASTER, PIC_SLAVE, IrqchipRoute, MsiRoute
from kvmpy.x86.segments import Segment

pytestmark = pytest.mark.usefixtures("kvm_host")

TIMEOUT = 10.0
SHORT = 0.05
RAM = 0x20000
"""RAM ends here, and DS starts here: DS:x is MMIO."""
CODE = 0x1000
HANDLER = 0x1100
LAPIC_BASE = 0xFEE0_0000

READY, HANDLED, PORT = 0x10, 0x11, 0x30
# sti; out READY,al; wait: hlt; jmp wait
WAITS = "fb e610 f4 ebfd"
# out HANDLED,al; mov al,0x20; out 0x20,al (EOI to the PIC); iret
PIC_HANDLER = "e611 b020 e620 cf"
# out HANDLED,al; a32 mov dword [fs:0xfee000b0],0 (EOI to the local APIC); iret
LAPIC_HANDLER = "e611 64 67 66 c705 b000e0fe 00000000 cf"
# ICW1-4: edge-triggered, vectors from 0x20 on, slave at input 2, 8086 mode; then the mask
PIC_INIT = "b011 e620 b020 e621 b004 e621 b001 e621 b0{mask:02x} e621"


@pytest.fixture
def vm() -> Iterator[VM]:
    with KVM() as kvm, kvm.create_vm() as created:
        created.add_memory(0, RAM)
        yield created


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def events(fd: int) -> int:
    """How often the eventfd was signalled since it was last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def real_mode(vm: VM, code: str, handler: str = PIC_HANDLER) -> VCPU:
    """A vCPU at CODE, where `code` is written; interrupts 0x20 to 0x7f lead to `handler`."""
    vm.memory.write(CODE, bytes.fromhex(code))
    vm.memory.write(HANDLER, bytes.fromhex(handler))
    for vector in range(0x20, 0x80):
        vm.memory.write(4 * vector, struct.pack("<HH", HANDLER, 0))
    cpu = vm.create_vcpu()
    special = cpu.get_sregs()
    special.cs = Segment.real_mode(0, code=True)
    special.ds = Segment.real_mode(RAM >> 4)
    special.fs = Segment.real_mode(0)
    special.fs.limit, special.fs.g = 0xFFFF_FFFF, 1  # for the local APIC
    cpu.set_sregs(special)
    registers = cpu.get_regs()
    registers.rip, registers.rsp, registers.rflags = CODE, 0x8000, 2
    cpu.set_regs(registers)
    return cpu


def enable_lapic(cpu: VCPU) -> None:
    """Software-enable the local APIC (SVR, offset 0xf0: SDM Vol.3 11.9)."""
    state = bytearray(cpu.get_lapic())
    struct.pack_into("<I", state, 0xF0, 0x1FF)
    cpu.set_lapic(bytes(state))


def is_out(exit_: Exit, port: int) -> bool:
    return isinstance(exit_, PortOut) and exit_.port == port


@pytest.fixture
def pic_guest(vm: VM) -> VCPU:
    """A guest that waits for IRQ 5 through the PIC."""
    vm.create_irqchip()
    cpu = real_mode(vm, PIC_INIT.format(mask=0xFF & ~(1 << 5)) + WAITS)
    assert is_out(cpu.run(TIMEOUT), READY)
    return cpu


@pytest.fixture
def msi_guest(vm: VM) -> VCPU:
    """A guest with a split irqchip that waits for messages."""
    if not vm.check_extension("SPLIT_IRQCHIP"):
        pytest.skip("this host's KVM lacks KVM_CAP_SPLIT_IRQCHIP")
    vm.create_split_irqchip()
    cpu = real_mode(vm, WAITS, LAPIC_HANDLER)
    enable_lapic(cpu)
    assert is_out(cpu.run(TIMEOUT), READY)
    return cpu


# The full irqchip --------------------------------------------------------------------------


def test_irq_line_reaches_the_guest_through_the_pic(vm: VM, pic_guest: VCPU) -> None:
    assert vm.irqchip == "full"
    for _ in range(3):
        assert vm.irq_line(5, True) > 0
        assert is_out(pic_guest.run(TIMEOUT), HANDLED)
        vm.irq_line(5, False)
    assert pic_guest.run(SHORT) == Interrupted("timeout"), "no more interrupts than edges"


def test_masked_line_does_not_reach_the_guest(vm: VM, pic_guest: VCPU) -> None:
    vm.irq_line(6, True)
    assert pic_guest.run(SHORT) == Interrupted("timeout")


def test_irq_line_reaches_the_guest_through_the_ioapic(vm: VM) -> None:
    vm.create_irqchip()
    cpu = real_mode(vm, PIC_INIT.format(mask=0xFF) + WAITS, LAPIC_HANDLER)
    enable_lapic(cpu)
    state = bytearray(vm.get_irqchip(IOAPIC))
    # redirtbl[10]: vector 0x33, fixed, edge-triggered, not masked, to APIC 0 (82093AA, 3.2.4)
    struct.pack_into("<Q", state, 24 + 8 * 10, 0x33)
    vm.set_irqchip(IOAPIC, bytes(state))
    assert vm.get_irqchip(IOAPIC)[24 + 80 : 24 + 88] == struct.pack("<Q", 0x33)
    assert is_out(cpu.run(TIMEOUT), READY)
    assert vm.irq_line(10, True) > 0
    assert is_out(cpu.run(TIMEOUT), HANDLED)


def test_pic_state_is_read_and_written_back(vm: VM, pic_guest: VCPU) -> None:
    state = vm.get_irqchip(PIC_MASTER)
    # struct kvm_pic_state: last_irr, irr, imr, isr, priority_add, irq_base
    assert (state[2], state[5]) == (0xFF & ~(1 << 5), 0x20)
    other = bytearray(state)
    other[2], other[5] = 0xFF, 0x40
    vm.set_irqchip(PIC_MASTER, bytes(other))
    assert vm.get_irqchip(PIC_MASTER) == other
    vm.irq_line(5, True)
    assert pic_guest.run(SHORT) == Interrupted("timeout"), "all masked now"
    other[1], other[2] = 1 << 5, 0  # requested, not masked: vector 0x45
    vm.set_irqchip(PIC_MASTER, bytes(other))
    assert is_out(pic_guest.run(TIMEOUT), HANDLED)
    assert len(vm.get_irqchip(PIC_SLAVE)) == 512
    with pytest.raises(HostError, match="KVM_GET_IRQCHIP"):
        vm.get_irqchip(3)


def test_pit_ticks(vm: VM) -> None:
    vm.create_irqchip()
    vm.create_pit()
    # Channel 0, low then high byte, mode 2, a tick each 1193 / 1193182 s (8254 data sheet)
    program = "b034 e643 b0a9 e640 b004 e640"
    cpu = real_mode(vm, PIC_INIT.format(mask=0xFE) + program + WAITS)
    assert is_out(cpu.run(TIMEOUT), READY)
    for _ in range(5):
        assert is_out(cpu.run(TIMEOUT), HANDLED)
    state = vm.get_pit()
    assert len(state) == 112
    assert struct.unpack_from("<I", state) == (0x4A9,)
    slower = struct.pack("<I", 0x954) + state[4:]  # channels[0].count
    vm.set_pit(slower)
    assert struct.unpack_from("<I", vm.get_pit()) == (0x954,)
    assert is_out(cpu.run(TIMEOUT), HANDLED)


def test_resample_fd_tells_of_the_end_of_interrupt(vm: VM, pic_guest: VCPU, eventfd: int) -> None:
    if not vm.check_extension("IRQFD_RESAMPLE"):
        pytest.skip("this host's KVM lacks KVM_CAP_IRQFD_RESAMPLE")
    trigger = os.eventfd(0)
    try:
        vm.irqfd(trigger, 5, resample_fd=eventfd)
        os.eventfd_write(trigger, 1)
        assert is_out(pic_guest.run(TIMEOUT), HANDLED)
        assert events(eventfd) == 0, "not before the EOI"
        pic_guest.run(SHORT)
        assert events(eventfd) == 1
    finally:
        os.close(trigger)


def test_interrupt_wakes_a_halted_guest(vm: VM, pic_guest: VCPU, eventfd: int) -> None:
    vm.irqfd(eventfd, 5)
    assert pic_guest.run(SHORT) == Interrupted("timeout")  # it sits in HLT now
    timer = threading.Timer(SHORT, os.eventfd_write, (eventfd, 1))
    timer.start()
    assert is_out(pic_guest.run(TIMEOUT), HANDLED)
    timer.join()


# The split irqchip, MSI, routes, irqfd -----------------------------------------------------


def test_message_reaches_the_guest(vm: VM, msi_guest: VCPU) -> None:
    assert vm.irqchip == "split"
    for vector in (0x31, 0x7F, 0x20):
        assert vm.signal_msi(LAPIC_BASE, vector) > 0
        assert is_out(msi_guest.run(TIMEOUT), HANDLED)
    assert msi_guest.run(SHORT) == Interrupted("timeout")


def test_irqfd_follows_its_route(vm: VM, msi_guest: VCPU, eventfd: int) -> None:
    vm.set_gsi_routing([MsiRoute(3, LAPIC_BASE, 0x41), MsiRoute(4, LAPIC_BASE, 0x42)])
    vm.irqfd(eventfd, 4)
    with pytest.raises(HostError, match="KVM_IRQFD"):
        vm.irqfd(eventfd, 4)  # it is there already
    # Vector 0x42 alone leads to a handler that says so: out 0x12,al; EOI; iret
    vm.memory.write(0x1200, bytes.fromhex(LAPIC_HANDLER.replace("e611", "e612")))
    vm.memory.write(4 * 0x42, struct.pack("<HH", 0x1200, 0))
    os.eventfd_write(eventfd, 1)
    assert is_out(msi_guest.run(TIMEOUT), 0x12)
    vm.set_gsi_routing([MsiRoute(4, LAPIC_BASE, 0x41)])  # the whole table, anew
    os.eventfd_write(eventfd, 1)
    assert is_out(msi_guest.run(TIMEOUT), HANDLED)
    vm.irqfd(eventfd, 4, deassign=True)
    os.eventfd_write(eventfd, 1)
    assert msi_guest.run(SHORT) == Interrupted("timeout")


def test_line_of_a_routed_gsi_sends_its_message(vm: VM, msi_guest: VCPU) -> None:
    vm.set_gsi_routing([MsiRoute(7, LAPIC_BASE, 0x44)])
    assert vm.irq_line(7, True) > 0
    assert is_out(msi_guest.run(TIMEOUT), HANDLED)


def test_bad_routes_are_refused(vm: VM, msi_guest: VCPU) -> None:
    for route in (IrqchipRoute(1, 9, 0), MsiRoute(1 << 20, LAPIC_BASE, 0x20)):
        with pytest.raises(HostError, match="KVM_SET_GSI_ROUTING"):
            vm.set_gsi_routing([route])


def test_lapic_registers_are_written_back(msi_guest: VCPU) -> None:
    state = bytearray(msi_guest.get_lapic())
    assert len(state) == 1024
    struct.pack_into("<I", state, 0x3E0, 0b1011)  # divide configuration (SDM Vol.3 11.5.4)
    struct.pack_into("<I", state, 0x80, 0x30)  # task priority
    msi_guest.set_lapic(bytes(state))
    found = msi_guest.get_lapic()
    assert found[0x3E0] == 0b1011 and found[0x80] == 0x30
    assert msi_guest.get_sregs().cr8 == 3, "CR8 is the task priority"


# What needs an irqchip ---------------------------------------------------------------------


def test_calls_that_need_an_irqchip_say_so(vm: VM, eventfd: int) -> None:
    with pytest.raises(HostError, match="an IRQ line needs an irqchip"):
        vm.irq_line(5, True)
    with pytest.raises(HostError, match=r"create_irqchip\(\) first"):
        vm.create_pit()
    for call in (
        lambda: vm.get_irqchip(PIC_MASTER),
        lambda: vm.set_irqchip(PIC_MASTER, bytes(512)),
        vm.get_pit,
        lambda: vm.set_pit(bytes(112)),
        vm.create_vcpu().get_lapic,
    ):
        with pytest.raises(HostError):
            call()


def test_split_irqchip_has_no_pit(vm: VM, msi_guest: VCPU) -> None:
    with pytest.raises(HostError, match=r"create_irqchip\(\) first"):
        vm.create_pit()


def test_irqchip_comes_before_the_vcpus(vm: VM) -> None:
    vm.create_vcpu()
    with pytest.raises(HostError, match="before the first vCPU"):
        vm.create_irqchip()
    with pytest.raises(HostError):
        vm.create_split_irqchip()
    assert vm.irqchip is None


def test_only_one_irqchip(vm: VM) -> None:
    vm.create_irqchip()
    for create in (vm.create_irqchip, vm.create_split_irqchip):
        with pytest.raises(ConfigError, match="already has a full irqchip"):
            create()


# ioeventfd ---------------------------------------------------------------------------------

# mov al,1; out PORT,al; mov al,2; out PORT,al; mov [5],al; mov byte [5],7; hlt
WRITES = "b001 e630 b002 e630 a20500 c606050007 f4"
ALL_WRITES = [
    PortOut(PORT, 1, b"\x01"),
    PortOut(PORT, 1, b"\x02"),
    MmioWrite(RAM + 5, b"\x02"),
    MmioWrite(RAM + 5, b"\x07"),
]


def exits_until_halt(cpu: VCPU) -> list[Exit]:
    found: list[Exit] = []
    while (exit_ := cpu.run(TIMEOUT)) != Halt():
        assert not isinstance(exit_, Interrupted)
        found.append(exit_)
    return found


def restart(cpu: VCPU) -> None:
    registers = cpu.get_regs()
    registers.rip = CODE
    cpu.set_regs(registers)


def test_ioeventfd_takes_every_write(vm: VM, eventfd: int) -> None:
    vm.ioeventfd(eventfd, PORT, 1, port=True)
    cpu = real_mode(vm, WRITES)
    assert exits_until_halt(cpu) == ALL_WRITES[2:]
    assert events(eventfd) == 2
    vm.ioeventfd(eventfd, RAM + 5, 1)
    restart(cpu)
    assert exits_until_halt(cpu) == []
    assert events(eventfd) == 4


def test_ioeventfd_takes_a_value_only(vm: VM, eventfd: int) -> None:
    vm.ioeventfd(eventfd, PORT, 1, port=True, value=2)
    cpu = real_mode(vm, WRITES)
    assert exits_until_halt(cpu) == [ALL_WRITES[0], *ALL_WRITES[2:]]
    assert events(eventfd) == 1
    vm.ioeventfd(eventfd, RAM + 5, 1, value=7)
    restart(cpu)
    assert exits_until_halt(cpu) == [ALL_WRITES[0], ALL_WRITES[2]]
    assert events(eventfd) == 2


def test_ioeventfd_of_value_zero_is_not_one_of_any_value(vm: VM, eventfd: int) -> None:
    vm.ioeventfd(eventfd, PORT, 1, port=True, value=0)
    cpu = real_mode(vm, WRITES)
    assert exits_until_halt(cpu) == ALL_WRITES
    assert events(eventfd) == 0


def test_ioeventfd_is_taken_back(vm: VM, eventfd: int) -> None:
    vm.ioeventfd(eventfd, PORT, 1, port=True, value=2)
    with pytest.raises(HostError, match="KVM_IOEVENTFD"):
        vm.ioeventfd(eventfd, PORT, 1, port=True, deassign=True)  # of any value: another one
    vm.ioeventfd(eventfd, PORT, 1, port=True, value=2, deassign=True)
    assert exits_until_halt(real_mode(vm, WRITES)) == ALL_WRITES
    assert events(eventfd) == 0


def test_ioeventfd_of_any_size(vm: VM, eventfd: int) -> None:
    if not vm.check_extension("IOEVENTFD_ANY_LENGTH"):
        pytest.skip("this host's KVM lacks KVM_CAP_IOEVENTFD_ANY_LENGTH")
    vm.ioeventfd(eventfd, RAM)
    # mov byte [0],1; mov word [0],2; mov byte [1],3; hlt
    cpu = real_mode(vm, "c606000001 c70600000200 c606010003 f4")
    assert exits_until_halt(cpu) == [MmioWrite(RAM + 1, b"\x03")]
    assert events(eventfd) == 2


def test_bad_ioeventfds_are_refused(vm: VM, eventfd: int) -> None:
    vm.ioeventfd(eventfd, PORT, 1, port=True)
    with pytest.raises(HostError, match="EEXIST"):
        vm.ioeventfd(eventfd, PORT, 1, port=True)
    with pytest.raises(HostError, match="EINVAL"):
        vm.ioeventfd(eventfd, RAM, 3)
    with pytest.raises(HostError):
        vm.ioeventfd(1 << 20, RAM, 4)


# Coalesced writes --------------------------------------------------------------------------


def need_coalesced(vm: VM) -> None:
    for capability in ("COALESCED_MMIO", "COALESCED_PIO"):
        if not vm.check_extension(capability):
            pytest.skip(f"this host's KVM lacks KVM_CAP_{capability}")


def test_coalesced_writes_are_drained_in_order(vm: VM) -> None:
    need_coalesced(vm)
    vm.register_coalesced(PORT, 2, port=True)
    vm.register_coalesced(RAM, 0x100)
    # mov ax,0x4142; out PORT,al; mov [5],ax; out PORT,ax; mov byte [0x99],7; out PORT+1,al; hlt
    cpu = real_mode(vm, "b84241 e630 a30500 e730 c606990007 e631 f4")
    assert list(cpu.drain_ring()) == []
    assert cpu.run(TIMEOUT) == Halt()
    assert list(cpu.drain_ring()) == [
        (True, PORT, 1, 0x42),
        (False, RAM + 5, 2, 0x4142),
        (True, PORT, 2, 0x4142),
        (False, RAM + 0x99, 1, 7),
        (True, PORT + 1, 1, 0x42),
    ]
    assert list(cpu.drain_ring()) == []


def test_writes_outside_of_the_zones_exit_after_those_inside(vm: VM) -> None:
    need_coalesced(vm)
    vm.register_coalesced(PORT, 1, port=True)
    cpu = real_mode(vm, WRITES)
    assert cpu.run(TIMEOUT) == ALL_WRITES[2]
    assert [value for _, _, _, value in cpu.drain_ring()] == [1, 2]
    vm.unregister_coalesced(PORT, 1, port=True)
    assert exits_until_halt(cpu) == ALL_WRITES[3:]
    restart(cpu)
    assert exits_until_halt(cpu) == ALL_WRITES
    assert list(cpu.drain_ring()) == []


def test_full_ring_loses_nothing(vm: VM) -> None:
    need_coalesced(vm)
    vm.register_coalesced(PORT, 2, port=True)
    # mov cx,1000; again: mov ax,cx; out PORT,ax; loop again; hlt
    cpu = real_mode(vm, "b9e803 89c8 e730 e2fa f4")
    seen: list[int] = []
    exits = 0
    while (exit_ := cpu.run(TIMEOUT)) != Halt():
        assert isinstance(exit_, PortOut)
        seen += [value for _, _, _, value in cpu.drain_ring()]
        seen += exit_.values
        exits += 1
    seen += [value for _, _, _, value in cpu.drain_ring()]
    assert seen == list(range(1000, 0, -1))
    assert 0 < exits < 100
