"""A VM on real KVM: memory slots, dirty logs, clock, statistics, capabilities, closing."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpy import (
    KVM,
    VCPU,
    VM,
    ClosedError,
    ConfigError,
    Halt,
    HostError,
    Memory,
    MmioWrite,
    OverlapError,
    PortIn,
    PortOut,
    UnsupportedError,
    modes,
)
from kvmpy.vm import IDENTITY_MAP_ADDRESS, TSS_ADDRESS
from kvmpy.x86.registers import Registers
from kvmpy.x86.segments import Segment
from kvmpy.x86.state import ClockData

pytestmark = pytest.mark.usefixtures("kvm_host")

PAGE = 4096
MIB = 1 << 20
CODE = 0x1000
DATA = 0x20000
TIMEOUT = 10.0


@pytest.fixture
def vm() -> Iterator[VM]:
    with KVM() as kvm, kvm.create_vm() as created:
        yield created


def real_mode(vm: VM, code: str) -> VCPU:
    """A vCPU in real mode at CODE, where `code` is written, with DS at DATA."""
    vm.memory.write(CODE, bytes.fromhex(code))
    cpu = vm.create_vcpu()
    special = cpu.get_sregs()
    special.cs = Segment.real_mode(0, code=True)
    special.ds = Segment.real_mode(DATA >> 4)
    cpu.set_sregs(special)
    registers = cpu.get_regs()
    registers.rip, registers.rflags = CODE, 2
    cpu.set_regs(registers)
    return cpu


def pages(bitmap: bytes) -> set[int]:
    number = int.from_bytes(bitmap, "little")
    return {page for page in range(8 * len(bitmap)) if number >> page & 1}


# Slots -------------------------------------------------------------------------------------


def test_added_memory_is_the_guests(vm: VM) -> None:
    ram = vm.add_memory(0, MIB)
    cpu = real_mode(vm, "a00500 40 a20600 f4")  # mov al,[5]; inc ax; mov [6],al; hlt
    ram.write_u8(DATA + 5, 0x41)
    assert cpu.run(TIMEOUT) == Halt()
    assert ram.read(DATA + 5, 2) == b"AB"
    assert list(vm.memory) == [ram] and ram.slot == 0


def test_removed_memory_is_the_guests_no_more(vm: VM) -> None:
    vm.add_memory(0, DATA)
    extra = vm.add_memory(DATA, PAGE)
    cpu = real_mode(vm, "c606000041 c606000142 f4")  # mov byte [0],'A'; mov byte [0x100],'B'
    vm.remove_memory(extra)
    with pytest.raises(ClosedError):
        extra.read(DATA, 1)
    assert cpu.run(TIMEOUT) == MmioWrite(DATA, b"A")
    extra = vm.add_memory(DATA, PAGE)
    assert cpu.run(TIMEOUT) == Halt()
    assert extra.read(DATA, 0x101) == bytes(0x100) + b"B"


def test_slots_are_used_again(vm: VM) -> None:
    regions = [vm.add_memory(n * MIB, PAGE) for n in range(4)]
    assert [region.slot for region in regions] == [0, 1, 2, 3]
    vm.remove_memory(regions[1])
    vm.remove_memory(regions[2])
    assert [vm.add_memory((9 + n) * MIB, PAGE).slot for n in range(3)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (DATA, 0x4000),
        (DATA - PAGE, 2 * PAGE),
        (DATA + 0x3000, PAGE),
        (DATA + 0x1000, PAGE),
        (0, MIB),
    ],
)
def test_overlap_names_both(vm: VM, address: int, size: int) -> None:
    vm.add_memory(DATA, 0x4000)
    message = rf"\[{address:#x}, {address + size:#x}\) overlaps the slot at \[0x20000, 0x24000\)"
    with pytest.raises(OverlapError, match=message):
        vm.add_memory(address, size)
    assert len(vm.memory) == 1


def test_neighbours_do_not_overlap(vm: VM) -> None:
    vm.add_memory(DATA, PAGE)
    vm.add_memory(DATA + PAGE, PAGE)
    vm.add_memory(DATA - PAGE, PAGE)
    vm.memory.write(DATA - 2, b"x" * (PAGE + 4))
    assert vm.memory.read(DATA - 3, PAGE + 6) == b"\0" + b"x" * (PAGE + 4) + b"\0"


@pytest.mark.parametrize(
    ("address", "size"), [(0, 0), (0, -PAGE), (1, PAGE), (-PAGE, PAGE), (0, 100), (1 << 52, PAGE)]
)
def test_bad_ranges_are_refused(vm: VM, address: int, size: int) -> None:
    with pytest.raises(ConfigError):
        vm.add_memory(address, size)
    assert len(vm.memory) == 0


def test_too_many_slots(vm: VM, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVM() as kvm:
        limit = kvm.check_extension("NR_MEMSLOTS")
    monkeypatch.setattr(vm, "_free_slot", lambda: limit)  # all below are taken
    before = descriptors()
    with pytest.raises(HostError, match=f"KVM_SET_USER_MEMORY_REGION failed.*slot {limit}"):
        vm.add_memory(0, PAGE, backing="shared")
    assert len(vm.memory) == 0 and descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_memory_with_views_is_not_removed(vm: VM) -> None:
    ram = vm.add_memory(0, PAGE)
    with ram.view, pytest.raises(BufferError, match="live views"):
        vm.remove_memory(ram)
    ram.write(0, b"still there")
    vm.remove_memory(ram)
    assert len(vm.memory) == 0


def test_memory_of_another_vm_is_refused(vm: VM) -> None:
    with KVM() as kvm, kvm.create_vm() as other:
        # The same slot number here belongs to something larger: its bitmap would not fit.
        foreign = other.add_memory(0, PAGE, log_dirty=True)
        vm.add_memory(0, 64 * MIB, log_dirty=True)
        for call in (
            lambda: vm.remove_memory(foreign),
            lambda: vm.get_dirty_log(foreign),
            lambda: vm.clear_dirty_log(foreign, bytes(8)),
            lambda: vm.set_log_dirty(foreign, True),
        ):
            with pytest.raises(ConfigError, match="is not part of this VM"):
                call()
        foreign.write(0, b"untouched")


def test_memory_that_was_removed_is_refused(vm: VM) -> None:
    gone = vm.add_memory(0, PAGE, log_dirty=True)
    vm.remove_memory(gone)
    vm.add_memory(0, 64 * MIB, log_dirty=True)
    with pytest.raises(ConfigError, match="is not part of this VM"):
        vm.get_dirty_log(gone)


def test_rom_is_read_but_not_written_by_the_guest(vm: VM) -> None:
    if not vm.check_extension("READONLY_MEM"):
        pytest.skip("this host's KVM lacks KVM_CAP_READONLY_MEM")
    vm.add_memory(0, DATA)
    rom = vm.add_memory(DATA, PAGE, readonly=True)
    rom.write(DATA + 5, b"R")  # the host may
    cpu = real_mode(vm, "c606050041 a00500 e610 f4")  # mov byte [5],'A'; mov al,[5]; out 0x10,al
    assert cpu.run(TIMEOUT) == MmioWrite(DATA + 5, b"A")
    assert cpu.run(TIMEOUT) == PortOut(0x10, 1, b"R")
    assert rom.read_u8(DATA + 5) == ord("R")


def test_memory_above_4_gib(vm: VM) -> None:
    layout = modes.build("long", 0, MIB, 2 * MIB)
    high = 1 << 32
    vm.add_memory(0, MIB).write(layout.base, layout.data)
    vm.memory.write(CODE, bytes.fromhex("48bb 0000000001000000 8a03 fec0 884301 f4"))
    # mov rbx, 1 << 32; mov al, [rbx]; inc al; mov [rbx + 1], al; hlt
    ram = vm.add_memory(high, 2 * MIB)
    ram.write_u8(high, 0x41)
    cpu = vm.create_vcpu()
    registers, special = modes.entry_state(layout, CODE, cpu.get_sregs())
    cpu.set_sregs(special)
    cpu.set_regs(registers)
    assert cpu.run(TIMEOUT) == Halt()
    assert vm.memory.read(high, 2) == b"AB"


def test_shared_memory_of_two_vms(vm: VM) -> None:
    ram = vm.add_memory(0, MIB, backing="shared")
    cpu = real_mode(vm, "c606050041 f4")  # mov byte [5],'A'; hlt
    assert cpu.run(TIMEOUT) == Halt()
    with KVM() as kvm, kvm.create_vm() as second:
        second.add_memory(0, MIB, backing="shared", fd=ram.fd)
        reader = real_mode(second, "a00500 e610 f4")  # mov al,[5]; out 0x10,al; hlt
        assert reader.run(TIMEOUT) == PortOut(0x10, 1, b"A")


def test_guest_writes_to_private_memory_stay_in_the_vm(vm: VM, tmp_path: Path) -> None:
    path = tmp_path / "image"
    image = bytearray(MIB)
    image[DATA] = 0x31
    path.write_bytes(image)
    with path.open("rb") as file:
        ram = vm.add_memory(0, MIB, backing="private", fd=file.fileno())
    cpu = real_mode(vm, "fe060000 f4")  # inc byte [0]; hlt
    assert cpu.run(TIMEOUT) == Halt()
    assert ram.read_u8(DATA) == 0x32
    assert path.read_bytes() == image


# Dirty logs --------------------------------------------------------------------------------

# mov byte [0], 1; mov byte [0x3000], 2; hlt
WRITES_PAGES_0_AND_3 = "c606000001 c606003002 f4"


def test_dirty_log_has_the_pages_that_the_guest_wrote(vm: VM) -> None:
    vm.add_memory(0, DATA)
    ram = vm.add_memory(DATA, 100 * PAGE, log_dirty=True)
    cpu = real_mode(vm, WRITES_PAGES_0_AND_3)
    ram.write(DATA + 9 * PAGE, b"by the host")
    assert cpu.run(TIMEOUT) == Halt()
    bitmap = vm.get_dirty_log(ram)
    assert len(bitmap) == 16  # 100 bits in whole 64-bit words
    assert pages(bitmap) == {0, 3}
    assert pages(vm.get_dirty_log(ram)) == set()


def test_dirty_log_is_switched_on_and_off(vm: VM) -> None:
    vm.add_memory(0, DATA)
    ram = vm.add_memory(DATA, 8 * PAGE)
    # Write page 1, tell, and again.
    cpu = real_mode(vm, "fe060010 e610 ebf8")  # again: inc byte [0x1000]; out 0x10,al; jmp again
    with pytest.raises(HostError, match="log_dirty=True"):
        vm.get_dirty_log(ram)
    cpu.run(TIMEOUT)
    vm.set_log_dirty(ram, True)
    assert ram.log_dirty
    assert pages(vm.get_dirty_log(ram)) == set()
    assert cpu.run(TIMEOUT) == PortOut(0x10, 1, b"\0")
    assert pages(vm.get_dirty_log(ram)) == {1}
    vm.set_log_dirty(ram, False)
    with pytest.raises(HostError):
        vm.get_dirty_log(ram)
    assert ram.read_u8(DATA + PAGE) == 2


def test_failing_to_switch_the_log_leaves_the_region_as_it_was(
    vm: VM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = vm.add_memory(0, PAGE)

    def refuse(*_: Any) -> None:
        raise HostError("no", 22)

    monkeypatch.setattr(vm, "_set_slot", refuse)
    with pytest.raises(HostError):
        vm.set_log_dirty(ram, True)
    assert not ram.log_dirty


def test_manual_protection_clears_only_what_it_is_told(vm: VM) -> None:
    if not vm.check_extension("MANUAL_DIRTY_LOG_PROTECT2"):
        pytest.skip("this host's KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    vm.enable_cap("MANUAL_DIRTY_LOG_PROTECT2", 1)
    vm.add_memory(0, DATA)
    ram = vm.add_memory(DATA, 72 * PAGE, log_dirty=True)
    # again: inc byte [0]; inc byte [0x1000]; out 0x10,al; jmp again
    cpu = real_mode(vm, "fe060000 fe060010 e610 ebf4")
    cpu.run(TIMEOUT)
    assert pages(vm.get_dirty_log(ram)) == {0, 1}
    assert pages(vm.get_dirty_log(ram)) == {0, 1}, "nobody cleared it"
    vm.clear_dirty_log(ram, b"\x02" + bytes(7), first_page=0, pages=64)
    assert pages(vm.get_dirty_log(ram)) == {0}
    vm.clear_dirty_log(ram, b"\x01" + bytes(8))  # one bit of 72
    assert pages(vm.get_dirty_log(ram)) == set()
    vm.clear_dirty_log(ram, b"\xff", first_page=64)  # the last 8 pages, in one byte
    cpu.run(TIMEOUT)
    assert pages(vm.get_dirty_log(ram)) == {0, 1}, "cleared pages are watched again"


def test_clearing_needs_a_log_and_a_bitmap_that_fits(vm: VM) -> None:
    ram = vm.add_memory(0, 72 * PAGE, log_dirty=True)
    for bitmap, first, count in [(bytes(8), 0, 72), (bytes(9), 0, 73), (b"", 0, 1), (b"a", 0, -1)]:
        with pytest.raises(ConfigError, match="does not hold"):
            vm.clear_dirty_log(ram, bitmap, first, count)
    with pytest.raises(ConfigError):
        vm.clear_dirty_log(ram, bytes(9), -64)
    with pytest.raises(HostError, match="first_page is a multiple of 64"):
        vm.clear_dirty_log(ram, bytes(8), 1, 64)
    vm.set_log_dirty(ram, False)
    with pytest.raises(HostError, match="log_dirty=True"):
        vm.clear_dirty_log(ram, bytes(9))


# The rest of a VM --------------------------------------------------------------------------


def test_tss_and_identity_map_can_be_moved_before_the_first_vcpu(vm: VM) -> None:
    if not vm.check_extension("SET_IDENTITY_MAP_ADDR"):
        pytest.skip("this host's KVM lacks KVM_CAP_SET_IDENTITY_MAP_ADDR")
    vm.set_tss_addr(TSS_ADDRESS - MIB)
    vm.set_identity_map_addr(IDENTITY_MAP_ADDRESS - MIB)
    vm.create_vcpu()
    with pytest.raises(HostError, match="KVM_SET_IDENTITY_MAP_ADDR"):
        vm.set_identity_map_addr(IDENTITY_MAP_ADDRESS)
    with pytest.raises(HostError, match="KVM_SET_TSS_ADDR"):
        vm.set_tss_addr(0xFFFF_F000)  # three pages do not fit below 4 GiB


def test_clock_runs_and_is_set(vm: VM) -> None:
    first = vm.get_clock()
    assert vm.get_clock().clock >= first.clock
    hour = 3600 * 10**9
    vm.set_clock(ClockData(clock=first.clock + 100 * hour))
    assert 100 * hour <= vm.get_clock().clock - first.clock < 101 * hour


def test_statistics_by_name(vm: VM) -> None:
    if not vm.check_extension("BINARY_STATS_FD"):
        pytest.skip("this host's KVM lacks KVM_CAP_BINARY_STATS_FD")
    with vm.stats() as stats:
        first = stats.read()
        assert "remote_tlb_flush" in first
        assert all(name.isidentifier() for name in first)
        for value in first.values():
            numbers = value if isinstance(value, tuple) else (value,)
            assert all(0 <= number < 1 << 64 for number in numbers)
        assert set(stats.read()) == set(first)
    with pytest.raises(ClosedError, match="the statistics of the VM is closed"):
        stats.read()


def test_statistics_count_exits(vm: VM) -> None:
    if not vm.check_extension("BINARY_STATS_FD"):
        pytest.skip("this host's KVM lacks KVM_CAP_BINARY_STATS_FD")
    vm.add_memory(0, MIB)
    cpu = real_mode(vm, "e610 ebfc")  # again: out 0x10,al; jmp again
    with cpu.stats() as stats:
        before = stats.read()["exits"]
        for _ in range(20):
            cpu.run(TIMEOUT)
        after = stats.read()["exits"]
    assert isinstance(before, int) and isinstance(after, int)
    assert after >= before + 20 - 1


def test_capabilities_are_enabled_or_refused_by_name(vm: VM) -> None:
    with pytest.raises(ConfigError, match="no capability is named 'NO_SUCH'"):
        vm.enable_cap("NO_SUCH")
    with pytest.raises(ConfigError, match="no capability is named 'NO_SUCH'"):
        vm.check_extension("NO_SUCH")
    with pytest.raises(UnsupportedError, match=r"lacks KVM_CAP_S390_PSW$"):
        vm.enable_cap("KVM_CAP_S390_PSW")
    with pytest.raises(HostError, match="KVM_CAP_SPLIT_IRQCHIP") as caught:
        vm.enable_cap("SPLIT_IRQCHIP", 1 << 40)
    assert not isinstance(caught.value, UnsupportedError)
    assert vm.check_extension("KVM_CAP_SPLIT_IRQCHIP") == vm.check_extension(121) == 1


def test_ioctl_that_this_descriptor_does_not_know(vm: VM) -> None:
    with pytest.raises(UnsupportedError, match=r"no KVM_GET_XSAVE2 \(KVM_CAP_XSAVE2\)"):
        vm.ioctl("GET_XSAVE2", bytearray(4096))


def test_vcpus_are_numbered_and_their_ids_are_theirs(vm: VM) -> None:
    cpus = [vm.create_vcpu(), vm.create_vcpu(), vm.create_vcpu(5)]
    assert [cpu.index for cpu in cpus] == [0, 1, 5] and vm.vcpus == cpus
    before = descriptors()
    for index in (5, 1 << 20):
        with pytest.raises(HostError, match="vCPU's id must be new and below KVM's maximum"):
            vm.create_vcpu(index)
    assert vm.vcpus == cpus and descriptors() == before


# Closing -----------------------------------------------------------------------------------


def test_closed_vm_says_so(vm: VM) -> None:
    ram, cpu = vm.add_memory(0, PAGE), vm.create_vcpu()
    ram.write(0, b"\xe4\x20")  # in al,0x20
    special = cpu.get_sregs()
    special.cs = Segment.real_mode(0, code=True)
    cpu.set_sregs(special)
    cpu.set_regs(Registers())
    assert cpu.run(TIMEOUT) == PortIn(0x20, 1)  # and stays pending
    vm.close()
    vm.close()
    assert vm.closed and cpu.closed and len(vm.memory) == 0
    for call in (
        lambda: vm.add_memory(0, PAGE),
        vm.create_vcpu,
        vm.get_clock,
        vm.stats,
        vm.create_irqchip,
        lambda: vm.check_extension("IRQCHIP"),
        vm.__enter__,
    ):
        with pytest.raises(ClosedError, match="the VM is closed"):
            call()
    of_vcpu: tuple[Callable[[], object], ...] = (
        *(cpu.run, cpu.finish, cpu.get_regs, cpu.get_sregs, cpu.get_xsave),
        *(cpu.nmi, cpu.get_cpuid2, cpu.stats, lambda: cpu.reply(b""), lambda: cpu.sync_regs),
    )
    for use in of_vcpu:
        with pytest.raises(ClosedError, match="vCPU 0 is closed"):
            use()
    with pytest.raises(ClosedError):
        ram.read(0, 1)
    cpu.kick()  # nothing to end, and no crash


def test_nothing_is_closed_while_a_view_lives(vm: VM) -> None:
    vm.add_memory(0, MIB)
    last = vm.add_memory(MIB, PAGE)
    cpu = real_mode(vm, "e610 f4")  # out 0x10,al; hlt
    view = last.view
    for _ in range(2):
        with pytest.raises(BufferError, match="the RAM at 0x100000 has live views"):
            vm.close()
    assert isinstance(cpu.run(TIMEOUT), PortOut)
    vm.memory.write(MIB - 1, b"ab")
    view.release()
    vm.close()


def test_leaving_with_a_live_view_is_an_error(vm: VM) -> None:
    ram = vm.add_memory(0, PAGE)
    with pytest.raises(BufferError), vm:
        view = ram.view
    assert not vm.closed
    view.release()


def test_closing_never_hides_an_exception(vm: VM) -> None:
    gc.collect()  # what earlier tests left behind
    before = descriptors()
    ram, cpu = vm.add_memory(0, PAGE, backing="shared"), vm.create_vcpu()
    with pytest.raises(ZeroDivisionError), vm:
        view = ram.view
        view[0] = 1 // 0
    assert vm.closed and cpu.closed
    view[0] = 7  # the mapping goes with its last view, and so does its own descriptor
    with pytest.raises(ClosedError):
        ram.read(0, 1)
    del view
    gc.collect()
    assert descriptors() == before - 1


@pytest.fixture
def running(vm: VM) -> Iterator[VCPU]:
    """The second vCPU of a VM, running an endless loop on another thread."""
    vm.add_memory(0, MIB)
    vm.create_vcpu()
    cpu = real_mode(vm, "ebfe")  # here: jmp here
    thread = threading.Thread(target=cpu.run, args=(TIMEOUT,))
    thread.start()
    while not cpu.loop.running:
        time.sleep(0.001)
    time.sleep(0.01)
    yield cpu
    cpu.kick()
    thread.join(2 * TIMEOUT)
    assert not thread.is_alive()


def test_nothing_is_closed_while_a_vcpu_runs(vm: VM, running: VCPU) -> None:
    for close in (vm.close, running.close):
        with pytest.raises(ConfigError, match="vCPU 1 is running: stop it before closing it"):
            close()
    assert not vm.closed and not any(cpu.closed for cpu in vm.vcpus)
    regs = vm.vcpus[0].get_regs()
    for call in (lambda: running.set_regs(regs), running.finish, running.get_xsave):
        with pytest.raises(ConfigError, match="vCPU 1 is running on another thread"):
            call()
    with pytest.raises(ConfigError, match="vCPU 1 is already running"):
        running.run(TIMEOUT)


def test_running_vcpu_does_not_hide_an_exception(vm: VM, running: VCPU) -> None:
    with pytest.raises(ZeroDivisionError) as caught, vm:
        1 / 0  # noqa: B018
    assert any("vCPU 1 is running" in note for note in caught.value.__notes__)
    assert not vm.closed and not any(cpu.closed for cpu in vm.vcpus)


def test_vm_that_is_dropped_warns_and_closes() -> None:
    before = descriptors()
    with KVM() as kvm:
        vm: VM | None = kvm.create_vm()
        assert vm is not None
        ram: Memory | None = vm.add_memory(0, PAGE, backing="shared")
        with pytest.warns(ResourceWarning, match="the VM was never closed"):
            vm = ram = None
    assert vm is ram is None
    assert descriptors() == before
