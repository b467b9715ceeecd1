"""The state of a vCPU on real KVM: what is written is read back, by the mapping and by ioctls."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import (
    KVM,
    VCPU,
    VM,
    ConfigError,
    Debug,
    Halt,
    HostError,
    Interrupted,
    IrqWindowOpen,
    MmioRead,
    MmioWrite,
    PendingExitError,
    PortIn,
    PortOut,
    modes,
)
from kvmpy.vcpuregs import SYNC_REGS, SYNC_SREGS
from kvmpy.x86.flags import CR0, CR4
from kvmpy.x86.registers import REGISTER_NAMES, Registers
from kvmpy.x86.segments import DescriptorTable, Segment
from kvmpy.x86.state import FPU, DebugRegisters, MPState, SpecialRegisters, VcpuEvents, XCRs

pytestmark = pytest.mark.usefixtures("kvm_host")

MIB = 1 << 20
CODE = 0x1000
HANDLER = 0x1100
TIMEOUT = 10.0
TELLS = "e610 ebfc"  # again: out 0x10,al; jmp again
TOLD = 0x10
PATHS = ["ioctl", "written by mapping", "general by mapping", "all by mapping"]

u64 = st.integers(0, (1 << 64) - 1)
canonical = st.one_of(
    st.integers(0, (1 << 47) - 1), st.integers((1 << 64) - (1 << 47), (1 << 64) - 1)
)
# CF, PF, AF, ZF, SF, IF, DF, OF, AC and ID: what every mode keeps; bit 1 reads as one
flags = u64.map(lambda value: value & 0x240ED5 & ~(1 << 9) | 2)


def use(cpu: VCPU, path: str) -> VCPU:
    """Have the registers of a vCPU go by the mapping or by ioctls."""
    host = cpu.can_sync
    cpu.get_xcrs()  # hands over what waits in the mapping
    if path == "ioctl":
        cpu.can_sync = 0
    needed = {"ioctl": 0, "written by mapping": 0, "general by mapping": SYNC_REGS}
    cpu.sync_regs = needed.get(path, SYNC_REGS | SYNC_SREGS)
    if path != "ioctl" and host & (SYNC_REGS | SYNC_SREGS) != SYNC_REGS | SYNC_SREGS:
        pytest.skip("this host's KVM lacks KVM_CAP_SYNC_REGS for general and special registers")
    return cpu


@contextmanager
def machine(mode: str, code: str = TELLS, irqchip: bool = False) -> Iterator[tuple[VM, VCPU]]:
    """A vCPU that starts at CODE, where `code` is, in that mode."""
    layout = modes.build(mode, 0, MIB)
    with KVM() as kvm, kvm.create_vm() as vm:
        if irqchip:
            vm.create_split_irqchip()
        vm.add_memory(0, MIB).write(layout.base, layout.data)
        vm.memory.write(CODE, bytes.fromhex(code))
        cpu = vm.create_vcpu()
        cpu.set_cpuid2(kvm.get_supported_cpuid())
        registers, special = modes.entry_state(layout, CODE, cpu.get_sregs())
        cpu.set_sregs(special)
        cpu.set_regs(registers)
        yield vm, cpu


@pytest.fixture
def long(request: pytest.FixtureRequest) -> Iterator[VCPU]:
    with machine("long") as (_, cpu):
        yield cpu


@pytest.fixture(scope="module", params=PATHS)
def each_path(request: pytest.FixtureRequest, kvm_host: None) -> Iterator[VCPU]:
    """One vCPU in long mode for many examples, for each way to its registers."""
    with machine("long") as (_, cpu):
        yield use(cpu, request.param)


def ask_kvm(cpu: VCPU) -> tuple[Registers, SpecialRegisters]:
    """The registers as KVM itself has them, by ioctl."""
    cpu.get_xcrs()  # hands over what waits in the mapping
    buffers = bytearray(Registers.SIZE), bytearray(SpecialRegisters.SIZE)
    cpu.ioctl("GET_REGS", buffers[0])
    cpu.ioctl("GET_SREGS", buffers[1])
    return Registers.unpack(buffers[0]), SpecialRegisters.unpack(buffers[1])


# General and special registers -------------------------------------------------------------

registers_strategy = st.builds(
    Registers, **{name: u64 for name in REGISTER_NAMES if name != "rflags"}, rflags=flags
)


@given(registers=registers_strategy)
def test_general_registers_are_read_back(each_path: VCPU, registers: Registers) -> None:
    each_path.set_regs(registers)
    assert each_path.get_regs() == registers
    assert ask_kvm(each_path)[0] == registers
    assert each_path.get_regs() == registers


@given(registers=registers_strategy)
def test_general_registers_reach_the_guest_and_come_back(
    each_path: VCPU, registers: Registers
) -> None:
    registers = replace(registers, rip=CODE)
    each_path.set_regs(registers)
    exit_ = each_path.run(TIMEOUT)
    assert exit_ == PortOut(TOLD, 1, bytes([registers.rax & 0xFF]))
    found = each_path.get_regs()
    assert found == ask_kvm(each_path)[0]
    # RIP is past the OUT once it is finished; RF may come and go (SDM Vol.3 18.3.1.1)
    assert found.rip == CODE + 2
    assert replace(found, rip=CODE, rflags=found.rflags & ~(1 << 16)) == registers


@given(
    fs=canonical,
    gs=canonical,
    gdt=st.builds(DescriptorTable, canonical, st.integers(0, 0xFFFF)),
    idt=st.builds(DescriptorTable, canonical, st.integers(0, 0xFFFF)),
    cr2=u64,
    cr4=st.sets(st.sampled_from([CR4.TSD, CR4.DE, CR4.PGE, CR4.MCE])),
    cr8=st.integers(0, 15),
    selector=st.integers(0, 0xFFFF),
)
def test_special_registers_are_read_back_also_after_a_run(
    each_path: VCPU,
    fs: int,
    gs: int,
    gdt: DescriptorTable,
    idt: DescriptorTable,
    cr2: int,
    cr4: set[CR4],
    cr8: int,
    selector: int,
) -> None:
    cpu = each_path
    special = cpu.get_sregs()
    special.fs.base, special.gs.base, special.es.selector = fs, gs, selector & ~3
    special.gdt, special.idt, special.cr2, special.cr8 = gdt, idt, cr2, cr8
    special.cr4 = special.cr4 & ~int(CR4.TSD | CR4.DE | CR4.PGE | CR4.MCE) | sum(cr4)
    cpu.set_sregs(special)
    assert cpu.get_sregs() == special
    cpu.set_regs(Registers(rip=CODE))
    assert isinstance(cpu.run(TIMEOUT), PortOut)
    assert cpu.get_sregs() == special
    assert ask_kvm(cpu)[1] == special


@pytest.mark.parametrize("path", PATHS)
def test_real_mode_state_is_read_back(path: str) -> None:
    with machine("real") as (_, cpu):
        use(cpu, path)
        special = cpu.get_sregs()
        special.ds, special.es = Segment.real_mode(0x1234), Segment.real_mode(0xFFFF)
        cpu.set_sregs(special)
        assert isinstance(cpu.run(TIMEOUT), PortOut)
        assert cpu.get_sregs() == ask_kvm(cpu)[1] == special


ENTERS = [lambda cpu: cpu.run(TIMEOUT), lambda cpu: cpu.get_fpu()]
REFUSED: list[tuple[str, Callable[[SpecialRegisters], object]]] = [
    ("cr0=0x80000010", lambda s: setattr(s, "cr0", CR0.PG | CR0.ET)),
    ("cr4=0x8000000000000000", lambda s: setattr(s, "cr4", 1 << 63)),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("enter", ENTERS, ids=["run", "state"])
@pytest.mark.parametrize(("text", "spoil"), REFUSED, ids=[text for text, _ in REFUSED])
def test_registers_that_kvm_refuses(
    long: VCPU,
    path: str,
    enter: Callable[[VCPU], object],
    text: str,
    spoil: Callable[[SpecialRegisters], object],
) -> None:
    cpu = use(long, path)
    cpu.run(TIMEOUT)
    cpu.finish()
    special = cpu.get_sregs()
    special.cr8 = 3
    cpu.set_sregs(special)
    cpu.get_xcrs()  # hands it over: a second write would replace one that waits
    wrong = special.copy()
    wrong.cr8 = 9
    spoil(wrong)
    with pytest.raises(ConfigError, match=f"KVM refuses the special registers.*{text}"):
        cpu.set_sregs(wrong)
        enter(cpu)
    # Nothing of it is left, and the guest goes on.
    assert cpu.get_sregs() == special
    assert isinstance(cpu.run(TIMEOUT), PortOut)
    assert cpu.get_sregs() == ask_kvm(cpu)[1] == special


@pytest.mark.parametrize(
    ("field", "value"), [("cr8", 16), ("cr8", -1), ("cr3", 1 << 64), ("interrupt_bitmap", b"")]
)
def test_values_that_no_register_holds(long: VCPU, field: str, value: Any) -> None:
    special = long.get_sregs()
    setattr(special, field, value)
    with pytest.raises(ConfigError, match=field):
        long.set_sregs(special)
    with pytest.raises(ConfigError, match="rsp"):
        long.set_regs(Registers(rsp=-1))
    assert isinstance(long.run(TIMEOUT), PortOut)


# One program on two vCPUs: by ioctls, and by the mapping in any of its ways.
steps = st.lists(
    st.one_of(
        st.just(("run", 0)),
        st.just(("finish", 0)),
        st.tuples(st.just("rbx"), u64),
        st.tuples(st.just("cr2"), u64),
        st.tuples(st.just("cr8"), st.integers(0, 15)),
        st.tuples(st.just("fs_base"), canonical),
        st.tuples(st.just("dr0"), canonical),
        st.tuples(st.just("sync_regs"), st.sampled_from([0, 1, 2, 3])),
    ),
    max_size=15,
)


def take(cpu: VCPU, step: str, value: int) -> object:
    """One step; the exit, where it gives one."""
    match step:
        case "run":
            return cpu.run(TIMEOUT)
        case "finish":
            cpu.finish()
        case "rbx":
            cpu.set_regs(replace(cpu.get_regs(), rbx=value))
        case "cr2" | "cr8":
            special = cpu.get_sregs()
            setattr(special, step, value)
            cpu.set_sregs(special)
        case "fs_base":
            cpu.set_msrs({0xC000_0100: value})
        case "dr0":
            cpu.set_debugregs(DebugRegisters(db=(value, 0, 0, 0)))
        case "sync_regs":
            cpu.sync_regs = value
    return None


@given(steps=steps)
@settings(max_examples=40)
def test_mapping_and_ioctls_never_differ(steps: list[tuple[str, int]]) -> None:
    counts = "48ffc0 e610 ebf9"  # again: inc rax; out 0x10,al; jmp again
    with machine("long", counts) as (_, one), machine("long", counts) as (_, other):
        use(one, "ioctl")
        use(other, "general by mapping")
        for step, value in steps:
            assert take(one, step, value) == take(other, step, value)
            assert one.get_regs() == other.get_regs(), step
            assert one.get_sregs() == other.get_sregs(), step
        assert ask_kvm(one) == ask_kvm(other)


def test_general_registers_after_an_exit_cost_no_ioctl(
    long: VCPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(long, "general by mapping")
    long.run(TIMEOUT)
    calls: list[str] = []

    def note(fd: int, name: str, *_: object) -> int:
        calls.append(name)
        return 0

    monkeypatch.setattr("kvmpy.descriptor.ioctl", note)
    registers = long.get_regs()
    assert calls == [] and registers.rip in (CODE, CODE + 2)
    long.get_sregs()
    assert calls == ["GET_SREGS"]


def test_registers_asked_for_between_exits_are_not_those_of_an_earlier_one() -> None:
    # mov rcx,0x1234; mov cr2,rcx; out 0x10,al; hlt
    with machine("long", "48c7c134120000 0f22d1 e610 f4") as (_, cpu):
        use(cpu, "general by mapping")
        cpu.run(TIMEOUT)
        cpu.sync_regs = SYNC_REGS | SYNC_SREGS
        assert cpu.get_sregs().cr2 == 0x1234


# x87, SSE, AVX -----------------------------------------------------------------------------

st_register = st.binary(min_size=10, max_size=10).map(lambda value: value + bytes(6))
xmm_register = st.binary(min_size=16, max_size=16)


@given(
    fpr=st.tuples(*[st_register] * 8),
    xmm=st.tuples(*[xmm_register] * 16),
    ftwx=st.integers(0, 255),
    top=st.integers(0, 7),
    rounding=st.integers(0, 3),
)
def test_fpu_is_read_back(
    each_path: VCPU,
    fpr: tuple[bytes, ...],
    xmm: tuple[bytes, ...],
    ftwx: int,
    top: int,
    rounding: int,
) -> None:
    control = 0x37F | rounding << 10
    fpu = FPU(fpr, control, top << 11, ftwx, xmm=xmm)
    each_path.set_fpu(fpu)
    for _ in range(2):
        # KVM on x86 leaves MXCSR out of KVM_GET_FPU and KVM_SET_FPU.
        assert replace(each_path.get_fpu(), mxcsr=fpu.mxcsr) == fpu
        each_path.set_regs(Registers(rip=CODE))
        each_path.run(TIMEOUT)


LEGACY = 416
"""x87 and SSE registers end here in the XSAVE area (SDM Vol.1 10.5.1)."""


def avx_offset(cpu: VCPU) -> int | None:
    """Where the upper halves of YMM0 to YMM15 are (SDM Vol.1 13.4.3), None without AVX."""
    leaves = {(leaf.function, leaf.index): leaf for leaf in cpu.get_cpuid2()}
    if (0xD, 0) not in leaves or not leaves[0xD, 0].eax & 4:
        return None
    return leaves[0xD, 2].ebx


@given(
    x87=st.binary(min_size=80, max_size=80),
    sse=st.binary(min_size=256, max_size=256),
    avx=st.binary(min_size=256, max_size=256),
)
def test_xsave_area_is_read_back_also_after_a_run(
    each_path: VCPU, x87: bytes, sse: bytes, avx: bytes
) -> None:
    cpu = each_path
    if not cpu.get_cpuid2() or not _has_xsave(cpu):
        pytest.skip("this host's KVM offers no XSAVE to guests")
    upper = avx_offset(cpu)
    area = bytearray(len(cpu.get_xsave()))
    struct.pack_into("<HHBxH", area, 0, 0x37F, 0, 0xFF, 0)  # FCW, FSW, FTW, FOP
    struct.pack_into("<I", area, 24, 0x1F80)  # MXCSR
    for number in range(8):
        area[32 + 16 * number : 42 + 16 * number] = x87[10 * number : 10 * number + 10]
    area[160:LEGACY] = sse
    struct.pack_into("<Q", area, 512, 0b11 if upper is None else 0b111)  # XSTATE_BV
    if upper is not None:
        area[upper : upper + 256] = avx
    cpu.set_xsave(bytes(area))
    for _ in range(2):
        found = cpu.get_xsave()
        assert len(found) == len(area)
        assert found[:28] + found[32:LEGACY] == area[:28] + area[32:LEGACY]
        if upper is not None:
            assert found[upper : upper + 256] == avx
        cpu.set_regs(Registers(rip=CODE))
        cpu.run(TIMEOUT)


def _has_xsave(cpu: VCPU) -> bool:
    return any(leaf.function == 0xD for leaf in cpu.get_cpuid2())


def test_xsave_area_of_another_size_or_content_is_refused(long: VCPU) -> None:
    area = long.get_xsave()
    with pytest.raises(ConfigError, match=f"{len(area)} bytes, not {len(area) - 1}"):
        long.set_xsave(area[1:])
    wrong = bytearray(area)
    struct.pack_into("<Q", wrong, 512, 1 << 62)  # a component that no processor has
    with pytest.raises(HostError, match="KVM_SET_XSAVE"):
        long.set_xsave(bytes(wrong))


def test_xcr0_is_read_back(long: VCPU) -> None:
    if not _has_xsave(long):
        pytest.skip("this host's KVM offers no XSAVE to guests")
    assert long.get_xcrs().values == {0: 1}  # x87 alone, after reset (SDM Vol.1 13.3)
    long.set_xcrs(XCRs({0: 3}))
    assert long.get_xcrs().values == {0: 3}
    with pytest.raises(HostError, match="KVM_SET_XCRS"):
        long.set_xcrs(XCRs({0: 2}))  # SSE without x87
    assert long.get_xcrs().values == {0: 3}


# MSRs, debug registers, CPUID --------------------------------------------------------------

STAR, LSTAR, SFMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC000_0100, 0xC000_0101, 0xC000_0102
ADDRESSES = (0x175, 0x176, LSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE)


@given(
    values=st.dictionaries(st.sampled_from(ADDRESSES), canonical),
    star=u64,
    mask=st.integers(0, (1 << 32) - 1),
)
def test_msrs_are_read_back(each_path: VCPU, values: dict[int, int], star: int, mask: int) -> None:
    values = values | {STAR: star, SFMASK: mask}
    assert each_path.set_msrs(values) == ()
    assert each_path.get_msrs(values) == values
    special = each_path.get_sregs()
    assert special.fs.base == values.get(FS_BASE, special.fs.base)
    assert special.gs.base == values.get(GS_BASE, special.gs.base)


def test_more_msrs_than_kvm_takes_in_one_call(long: VCPU) -> None:
    found = long.get_msrs([LSTAR] * 150 + [STAR] * 300)
    assert set(found) == {LSTAR, STAR}
    # Other bits of the index, the same MSR nowhere: all are refused, and all are named.
    lacking = {0xDEAD_0000 + number: 0 for number in range(300)}
    assert long.set_msrs({**lacking, STAR: 7}, strict=False) == tuple(lacking)
    assert long.get_msrs([STAR]) == {STAR: 7}


def test_msr_that_the_vcpu_lacks_is_named(long: VCPU) -> None:
    with pytest.raises(ConfigError, match="vCPU 0 has no MSR 0xdeadbeef to read"):
        long.get_msrs([STAR, 0xDEAD_BEEF, LSTAR])
    assert long.get_msrs([]) == {}


def test_refused_msr_is_named_and_the_rest_is_as_asked(long: VCPU) -> None:
    wrong = 1 << 62  # not canonical, where linear addresses have 57 bits neither
    long.set_msrs({STAR: 1, SFMASK: 1})
    with pytest.raises(ConfigError, match=f"vCPU 0 refuses {wrong:#x} for MSR {LSTAR:#x}"):
        long.set_msrs({STAR: 2, LSTAR: wrong, SFMASK: 2})
    assert long.get_msrs([STAR, SFMASK]) == {STAR: 2, SFMASK: 1}
    refused = long.set_msrs({LSTAR: wrong, STAR: 3, GS_BASE: wrong, SFMASK: 3}, strict=False)
    assert refused == (LSTAR, GS_BASE)
    assert long.get_msrs([STAR, SFMASK]) == {STAR: 3, SFMASK: 3}
    assert long.set_msrs({}) == ()


def test_all_of_the_hosts_msrs_are_written_back(long: VCPU) -> None:
    with KVM() as kvm:
        indices = kvm.get_msr_index_list()
    values = long.get_msrs(indices)
    assert list(values) == indices
    refused = long.set_msrs(values, strict=False)
    assert set(refused) < set(indices)


@given(
    db=st.tuples(canonical, canonical, canonical, canonical),
    hit=st.integers(0, 15),
    enabled=st.integers(0, 255),
)
def test_debug_registers_are_read_back(
    each_path: VCPU, db: tuple[int, int, int, int], hit: int, enabled: int
) -> None:
    registers = DebugRegisters(db, 0xFFFF_0FF0 | hit, 0x400 | enabled)
    each_path.set_debugregs(registers)
    assert each_path.get_debugregs() == registers
    each_path.set_debugregs(DebugRegisters())


def test_debug_registers_of_64_bits_are_refused(long: VCPU) -> None:
    with pytest.raises(HostError, match="KVM_SET_DEBUGREGS"):
        long.set_debugregs(DebugRegisters(dr7=1 << 32))


def test_cpuid_is_what_was_set_until_the_first_run(long: VCPU) -> None:
    with KVM() as kvm:
        supported = kvm.get_supported_cpuid()
    found = long.get_cpuid2()
    given = {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in supported}
    kept = [(e.function, e.index) for e in found]
    assert kept == [place for place in given if place in kept]
    # Some KVMs leave out what answers nothing but zeros, as a leaf that is not there does.
    assert {given[place] for place in given if place not in kept} <= {(0, 0, 0, 0)}
    packed = b"".join(entry.pack() for entry in found)
    long.set_cpuid2(packed)
    assert long.get_cpuid2() == found
    long.run(TIMEOUT)
    changed = [replace(found[0], ebx=found[0].ebx ^ 1), *found[1:]]
    with pytest.raises(HostError, match="CPUID can be set before the first run only"):
        long.set_cpuid2(changed)


# Events, interrupts, run state -------------------------------------------------------------


@contextmanager
def with_handlers(code: str) -> Iterator[tuple[VM, VCPU]]:
    """Real mode; vector n leads to: out 0x40 + n, al; iret."""
    with machine("real", code) as (vm, cpu):
        for vector in range(64):
            at = HANDLER + 4 * vector
            vm.memory.write(at, bytes([0xE6, 0x40 + vector, 0xCF]))
            vm.memory.write(4 * vector, struct.pack("<HH", at, 0))
        yield vm, cpu


@given(
    error_code=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    masked=st.integers(0, 1),
    pending=st.integers(0, 1),
)
def test_events_are_read_back(
    each_path: VCPU, error_code: int | None, masked: int, pending: int
) -> None:
    events = VcpuEvents(nmi_masked=masked, nmi_pending=pending, flags=1)  # VALID_NMI_PENDING
    events.exception_injected, events.exception_nr = 1, 6 if error_code is None else 13
    events.exception_has_error_code = int(error_code is not None)
    events.exception_error_code = error_code or 0
    each_path.set_vcpu_events(events)
    found = each_path.get_vcpu_events()
    assert replace(found, flags=1, interrupt_shadow=0, sipi_vector=0) == events
    each_path.set_vcpu_events(VcpuEvents(flags=1))
    assert not each_path.get_vcpu_events().exception_injected


def test_injected_exception_is_delivered() -> None:
    with with_handlers(TELLS) as (_, cpu):
        cpu.set_vcpu_events(VcpuEvents(exception_injected=1, exception_nr=6))
        assert cpu.run(TIMEOUT) == PortOut(0x46, 1, b"\0")
        assert cpu.run(TIMEOUT) == PortOut(TOLD, 1, b"\0")


def test_interrupt_waits_for_its_window() -> None:
    # out 0x10,al; sti; nop; again: nop; jmp again
    with with_handlers("e610 fb 90 90 ebfd") as (_, cpu):
        assert isinstance(cpu.run(TIMEOUT), PortOut)
        assert not cpu.ready_for_interrupt
        cpu.request_irq_window()
        assert cpu.run(TIMEOUT) == IrqWindowOpen()
        assert cpu.ready_for_interrupt
        cpu.request_irq_window(False)
        cpu.interrupt(0x21)
        events = cpu.get_vcpu_events()
        assert (events.interrupt_injected, events.interrupt_nr) == (1, 0x21)
        assert cpu.run(TIMEOUT) == PortOut(0x61, 1, b"\0")
        assert cpu.run(0.05) == Interrupted("timeout")


def test_nmi_is_delivered() -> None:
    with with_handlers(TELLS) as (_, cpu):
        cpu.nmi()
        assert cpu.run(TIMEOUT) == PortOut(0x42, 1, b"\0")
        assert cpu.get_vcpu_events().nmi_masked == 1
        assert cpu.run(TIMEOUT) == PortOut(TOLD, 1, b"\0")
        assert cpu.get_vcpu_events().nmi_masked == 0, "IRET ends it"


def test_run_state_without_an_irqchip_is_runnable(long: VCPU) -> None:
    assert long.get_mp_state() is MPState.RUNNABLE
    long.set_mp_state(MPState.RUNNABLE)
    with pytest.raises(HostError, match="KVM_SET_MP_STATE"):
        long.set_mp_state(MPState.HALTED)


def test_run_state_with_an_irqchip_is_read_back() -> None:
    with machine("long", irqchip=True) as (vm, cpu):
        other = vm.create_vcpu()
        assert other.get_mp_state() is MPState.UNINITIALIZED
        for state in (MPState.HALTED, MPState.INIT_RECEIVED, MPState.RUNNABLE):
            other.set_mp_state(state)
            assert other.get_mp_state() is state
        cpu.set_mp_state(MPState.HALTED)
        assert cpu.run(0.05) == Interrupted("timeout"), "a halted vCPU does not run"
        cpu.interrupt(0x21)
        with pytest.raises(HostError, match="KVM_INTERRUPT"):
            cpu.interrupt(0x22)  # before the first is taken


# Debugging, translation --------------------------------------------------------------------


def test_single_steps(long: VCPU) -> None:
    code = "90 90 90 e610 f4"
    with machine("long", code) as (vm, cpu):
        if not vm.check_extension("SET_GUEST_DEBUG"):
            pytest.skip("this host's KVM lacks KVM_CAP_SET_GUEST_DEBUG")
        cpu.set_guest_debug(single_step=True)
        for pc in (CODE + 1, CODE + 2):
            exit_ = cpu.run(TIMEOUT)
            assert isinstance(exit_, Debug) and (exit_.pc, exit_.exception) == (pc, 1)
            assert exit_.dr6 & 1 << 14  # BS: a single step (SDM Vol.3 18.2.3)
            registers = cpu.get_regs()
            assert registers.rip == pc and not registers.rflags & 1 << 8, "TF is KVM's own"
        cpu.set_guest_debug()
        assert isinstance(cpu.run(TIMEOUT), PortOut)


def test_execution_breakpoint() -> None:
    with machine("long", "90 90 90 e610 f4") as (vm, cpu):
        if not vm.check_extension("SET_GUEST_DEBUG"):
            pytest.skip("this host's KVM lacks KVM_CAP_SET_GUEST_DEBUG")
        cpu.set_guest_debug(breakpoints={0x9999: "x", CODE + 2: "x"})
        exit_ = cpu.run(TIMEOUT)
        assert isinstance(exit_, Debug) and exit_.pc == CODE + 2
        assert exit_.dr6 & 0xF == 0b10  # the second one
        cpu.set_guest_debug()
        assert isinstance(cpu.run(TIMEOUT), PortOut)


def test_translation_follows_the_page_tables(long: VCPU) -> None:
    assert long.translate(CODE + 5).physical == CODE + 5
    assert long.translate(1 << 40).physical is None
    special = long.get_sregs()
    special.cr3 = MIB  # no tables there: it is the register just written that counts
    long.set_sregs(special)
    assert long.translate(CODE).physical is None


# State at a pending exit -------------------------------------------------------------------


def test_reading_state_finishes_an_in_with_all_ones() -> None:
    with machine("long", "31c0 e420 e610 f4") as (_, cpu):  # xor eax,eax; in al,0x20; out; hlt
        assert cpu.run(TIMEOUT) == PortIn(0x20, 1)
        cpu.get_fpu()
        assert cpu.get_regs().rax == 0xFF
        assert cpu.get_regs().rip == CODE + 4
        with pytest.raises(PendingExitError, match="asks for no reply"):
            cpu.reply(b"\0")
        assert cpu.run(TIMEOUT) == PortOut(TOLD, 1, b"\xff")


def test_new_rip_at_a_pending_exit_counts() -> None:
    with machine("long", "e420 f4 90 e611 f4") as (_, cpu):  # in al,0x20; hlt; nop; out 0x11,al
        assert cpu.run(TIMEOUT) == PortIn(0x20, 1)
        cpu.reply(b"A")
        cpu.set_regs(replace(cpu.get_regs(), rip=CODE + 4, rax=0x42))
        assert cpu.run(TIMEOUT) == PortOut(0x11, 1, b"B")
        assert cpu.run(TIMEOUT) == Halt()


@pytest.mark.parametrize("path", PATHS)
def test_state_is_refused_in_the_middle_of_a_split_access(path: str) -> None:
    # mov rbx,0x200ffe; mov [rbx],ecx; mov eax,[rbx]; hlt: two bytes on each of two pages
    with machine("long", "48c7c3fe0f2000 890b 8b03 f4") as (_, cpu):
        use(cpu, path)
        cpu.set_regs(replace(cpu.get_regs(), rcx=0x44332211))
        calls: list[Callable[[], object]] = [cpu.get_fpu, lambda: cpu.set_regs(Registers())]
        for call in calls:
            assert cpu.run(TIMEOUT) == MmioWrite(0x200FFE, b"\x11\x22")
            with pytest.raises(PendingExitError, match="next exit with run"):
                call()
            assert cpu.run(TIMEOUT) == MmioWrite(0x201000, b"\x33\x44")
            cpu.get_fpu()  # this one finishes it
            assert cpu.get_regs().rip == CODE + 9
            cpu.set_regs(replace(cpu.get_regs(), rip=CODE + 7))
        cpu.set_regs(replace(cpu.get_regs(), rip=CODE + 9))
        assert cpu.run(TIMEOUT) == MmioRead(0x200FFE, 2)
        cpu.reply(b"\x01\x02")
        with pytest.raises(PendingExitError):
            cpu.get_xsave()
        assert cpu.run(TIMEOUT) == MmioRead(0x201000, 2)
        cpu.reply(b"\x03\x04")
        cpu.get_xsave()
        assert cpu.get_regs().rax == 0x04030201


def test_replies_fit_the_question(long: VCPU) -> None:
    with pytest.raises(PendingExitError, match="asks for no reply"):
        long.reply(b"\0")  # before any exit
    assert isinstance(long.run(TIMEOUT), PortOut)
    for error in (False, True):
        with pytest.raises(PendingExitError, match="port-out"):
            long.reply(b"", error=error)
    with machine("long", "66e520 f4") as (_, cpu):  # in ax,0x20
        cpu.run(TIMEOUT)
        for data in (b"", b"\1", b"\1\2\3"):
            with pytest.raises(ConfigError, match="a reply of 2 bytes"):
                cpu.reply(data)
        cpu.reply(b"\1\2")
        assert cpu.run(TIMEOUT) == Halt()
        assert cpu.get_regs().rax & 0xFFFF == 0x0201


def test_string_input_takes_count_elements() -> None:
    # mov rdi,0x8000; mov ecx,10; mov edx,0x20; cld; rep insw; hlt
    code = "48c7c700800000 b90a000000 ba20000000 fc f3666d f4"
    with machine("long", code) as (vm, cpu):
        sent = b""
        while isinstance(exit_ := cpu.run(TIMEOUT), PortIn):
            data = bytes(range(len(sent), len(sent) + exit_.size * exit_.count))
            cpu.reply(data)
            sent += data
        assert exit_ == Halt()
        assert sent == bytes(range(20)) == vm.memory.read(0x8000, 20)
