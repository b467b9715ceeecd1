"""Every number, size and offset that kvmpy uses, against the kernel's headers, by a C program."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmpy import abi, exits, interrupts, kvm, memory, vcpustate, vm
from kvmpy.abi import IOCTLS
from kvmpy.descriptor import Descriptor
from kvmpy.errors import ClosedError, ConfigError, HostError, UnsupportedError
from kvmpy.interrupts import InterruptController, IrqchipRoute, MsiRoute
from kvmpy.vcpuregs import REGS, SREGS, SYNC_REGS, SYNC_SREGS
from kvmpy.vcpustate import VcpuState
from kvmpy.vm import VM
from kvmpy.x86.state import CPUIDEntry, MPState

HEADER = Path("/usr/include/linux/kvm.h")

# KVM_EXIT names that differ from kvmpy's by more than case and hyphens.
EXIT_NAMES = {
    "halt": "HLT",
    "interrupted": "INTR",
    "msr-read": "X86_RDMSR",
    "msr-write": "X86_WRMSR",
    "bus-lock": "X86_BUS_LOCK",
}
OTHER_ARCHITECTURES = re.compile("S390|DCR|OSI|PAPR|WATCHDOG|EPR|ARM|RISCV|LOONGARCH")

# What kvmpy says, and the C expression that the kernel has for it.
CONSTANTS: dict[str, tuple[int, str]] = {
    "API version": (kvm.API_VERSION, "KVM_API_VERSION"),
    "KVMIO": (abi.KVMIO, "KVMIO"),
    "KVM_RUN's size": (exits.RUN_SIZE, "sizeof(struct kvm_run)"),
    "immediate_exit": (exits.OFFSET_IMMEDIATE_EXIT, "offsetof(struct kvm_run, immediate_exit)"),
    "exit_reason": (exits.OFFSET_REASON, "offsetof(struct kvm_run, exit_reason)"),
    "cr8": (exits.OFFSET_CR8, "offsetof(struct kvm_run, cr8)"),
    "union": (exits.OFFSET_UNION, "offsetof(struct kvm_run, io)"),
    "valid_regs": (exits.OFFSET_VALID_REGS, "offsetof(struct kvm_run, kvm_valid_regs)"),
    "dirty_regs": (exits.OFFSET_DIRTY_REGS, "offsetof(struct kvm_run, kvm_dirty_regs)"),
    "sync regs": (REGS.start, "offsetof(struct kvm_run, s.regs.regs)"),
    "sync regs end": (REGS.stop, "offsetof(struct kvm_run, s.regs.sregs)"),
    "sync sregs": (SREGS.start, "offsetof(struct kvm_run, s.regs.sregs)"),
    "sync sregs end": (SREGS.stop, "offsetof(struct kvm_run, s.regs.events)"),
    "request window": (0, "offsetof(struct kvm_run, request_interrupt_window)"),
    "ready": (12, "offsetof(struct kvm_run, ready_for_interrupt_injection)"),
    "SYNC_REGS": (SYNC_REGS, "KVM_SYNC_X86_REGS"),
    "SYNC_SREGS": (SYNC_SREGS, "KVM_SYNC_X86_SREGS"),
    "PIC_MASTER": (interrupts.PIC_MASTER, "KVM_IRQCHIP_PIC_MASTER"),
    "PIC_SLAVE": (interrupts.PIC_SLAVE, "KVM_IRQCHIP_PIC_SLAVE"),
    "IOAPIC": (interrupts.IOAPIC, "KVM_IRQCHIP_IOAPIC"),
    "an irqchip's state": (8, "offsetof(struct kvm_irqchip, chip)"),
    "the LAPIC's state": (vcpustate.LAPIC_SIZE, "sizeof(struct kvm_lapic_state)"),
    "MAP_NORESERVE": (memory.MAP_NORESERVE, "MAP_NORESERVE"),
    "coalesced first": (0, "offsetof(struct kvm_coalesced_mmio_ring, first)"),
    "coalesced last": (4, "offsetof(struct kvm_coalesced_mmio_ring, last)"),
    "coalesced entries": (8, "offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio)"),
    "a coalesced entry": (24, "sizeof(struct kvm_coalesced_mmio)"),
    "coalesced len": (8, "offsetof(struct kvm_coalesced_mmio, len)"),
    "coalesced pio": (12, "offsetof(struct kvm_coalesced_mmio, pio)"),
    "coalesced data": (16, "offsetof(struct kvm_coalesced_mmio, data)"),
    "statistics header": (24, "sizeof(struct kvm_stats_header)"),
    "statistics data_offset": (20, "offsetof(struct kvm_stats_header, data_offset)"),
    "statistics descriptor": (16, "offsetof(struct kvm_stats_desc, name)"),
    "statistics offset": (8, "offsetof(struct kvm_stats_desc, offset)"),
    "statistics size": (6, "offsetof(struct kvm_stats_desc, size)"),
    "emulation failure bytes": (1, "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES"),
    "suberror 1": (1, "KVM_INTERNAL_ERROR_EMULATION"),
    "suberror 2": (2, "KVM_INTERNAL_ERROR_SIMUL_EX"),
    "suberror 3": (3, "KVM_INTERNAL_ERROR_DELIVERY_EV"),
    "suberror 4": (4, "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON"),
}


def exit_name(name: str) -> str:
    return "KVM_EXIT_" + EXIT_NAMES.get(name, name.upper().replace("-", "_"))


Value = int | str | None  # a number, a C expression, or an address that the test cannot know


@dataclass(frozen=True)
class Packed:
    """What a method hands to an ioctl: a struct, and what its members must then hold."""

    ioctl: str
    struct: str
    call: Callable[[Any], object]
    members: dict[str, Value]
    size: str = ""

    @property
    def sizeof(self) -> str:
        return self.size or f"sizeof(struct {self.struct})"


BIG = 0x1122_3344_5566_7788
PACKED_BY_VM = (
    Packed(
        "IRQFD",
        "kvm_irqfd",
        lambda it: it.irqfd(7, 9, resample_fd=11, deassign=True),
        {
            "fd": 7,
            "gsi": 9,
            "flags": "KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE",
            "resamplefd": 11,
        },
    ),
    Packed(
        "IOEVENTFD",
        "kvm_ioeventfd",
        lambda it: it.ioeventfd(7, BIG, 4, port=True, value=BIG + 1, deassign=True),
        {
            "datamatch": BIG + 1,
            "addr": BIG,
            "len": 4,
            "fd": 7,
            "flags": "KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO"
            " | KVM_IOEVENTFD_FLAG_DEASSIGN",
        },
    ),
    Packed(
        "SIGNAL_MSI",
        "kvm_msi",
        lambda it: it.signal_msi(BIG, 0x99),
        {"address_lo": 0x5566_7788, "address_hi": 0x1122_3344, "data": 0x99, "flags": 0},
    ),
    Packed(
        "REGISTER_COALESCED_MMIO",
        "kvm_coalesced_mmio_zone",
        lambda it: it.register_coalesced(BIG, 0x20, port=True),
        {"addr": BIG, "size": 0x20, "pio": 1},
    ),
    Packed(
        "UNREGISTER_COALESCED_MMIO",
        "kvm_coalesced_mmio_zone",
        lambda it: it.unregister_coalesced(BIG, 0x20),
        {"addr": BIG, "size": 0x20, "pio": 0},
    ),
    Packed(
        "ENABLE_CAP",
        "kvm_enable_cap",
        lambda it: it.enable_cap("KVM_CAP_SPLIT_IRQCHIP", 1, 2, 3, BIG),
        {
            "cap": "KVM_CAP_SPLIT_IRQCHIP",
            "flags": 0,
            "args[0]": 1,
            "args[1]": 2,
            "args[2]": 3,
            "args[3]": BIG,
        },
    ),
    Packed(
        "CREATE_PIT2",
        "kvm_pit_config",
        lambda it: it.create_pit(speaker_dummy=True),
        {"flags": "KVM_PIT_SPEAKER_DUMMY"},
    ),
    Packed(
        "IRQ_LINE_STATUS",
        "kvm_irq_level",
        lambda it: it.irq_line(5, True),
        {"irq": 5, "level": 1},
    ),
    Packed("GET_IRQCHIP", "kvm_irqchip", lambda it: it.get_irqchip(2), {"chip_id": 2}),
    Packed(
        "SET_IRQCHIP",
        "kvm_irqchip",
        lambda it: it.set_irqchip(1, b"\xaa" + bytes(510) + b"\xbb"),
        {"chip_id": 1, "chip.dummy[0]": 0xAA, "chip.dummy[511]": 0xBB},
    ),
    Packed(
        "SET_GSI_ROUTING",
        "kvm_irq_routing",
        lambda it: it.set_gsi_routing([IrqchipRoute(3, 2, 9), MsiRoute(4, BIG, 0x77)]),
        {
            "nr": 2,
            "flags": 0,
            "entries[0].gsi": 3,
            "entries[0].type": "KVM_IRQ_ROUTING_IRQCHIP",
            "entries[0].u.irqchip.irqchip": 2,
            "entries[0].u.irqchip.pin": 9,
            "entries[1].gsi": 4,
            "entries[1].type": "KVM_IRQ_ROUTING_MSI",
            "entries[1].u.msi.address_lo": 0x5566_7788,
            "entries[1].u.msi.address_hi": 0x1122_3344,
            "entries[1].u.msi.data": 0x77,
        },
        "sizeof(struct kvm_irq_routing) + 2 * sizeof(struct kvm_irq_routing_entry)",
    ),
    Packed(
        "SET_USER_MEMORY_REGION",
        "kvm_userspace_memory_region",
        lambda it: it.add_memory(1 << 32, 0x2000, readonly=True, log_dirty=True),
        {
            "slot": 0,
            "flags": "KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY",
            "guest_phys_addr": 1 << 32,
            "memory_size": 0x2000,
            "userspace_addr": None,
        },
    ),
    Packed(
        "GET_DIRTY_LOG",
        "kvm_dirty_log",
        lambda it: [it.add_memory(0, 4096), it.get_dirty_log(it.add_memory(8192, 4096))],
        {"slot": 1, "dirty_bitmap": None},
    ),
    Packed(
        "CLEAR_DIRTY_LOG",
        "kvm_clear_dirty_log",
        lambda it: it.clear_dirty_log(it.add_memory(0, 1 << 20), b"\xff" * 8, 128, 64),
        {"slot": 0, "num_pages": 64, "first_page": 128, "dirty_bitmap": None},
    ),
)
PACKED_BY_VCPU = (
    Packed(
        "SET_GUEST_DEBUG",
        "kvm_guest_debug",
        lambda it: it.set_guest_debug(
            single_step=True, software_breakpoints=True, breakpoints={0x1000: "x", BIG: "w4"}
        ),
        {
            "control": "KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP"
            " | KVM_GUESTDBG_USE_HW_BP",
            "arch.debugreg[0]": 0x1000,
            "arch.debugreg[1]": BIG,
            # G0, G1; R/W1 = 01 (write), LEN1 = 11 (4 bytes): SDM Vol.3 18.2.4
            "arch.debugreg[7]": 1 << 1 | 1 << 3 | 0b01 << 20 | 0b11 << 22,
        },
    ),
    Packed("SET_GUEST_DEBUG", "kvm_guest_debug", lambda it: it.set_guest_debug(), {"control": 0}),
    Packed(
        "TRANSLATE",
        "kvm_translation",
        lambda it: it.translate(BIG),
        {"linear_address": BIG},
    ),
    Packed("INTERRUPT", "kvm_interrupt", lambda it: it.interrupt(0x21), {"irq": 0x21}),
    Packed(
        "SET_MP_STATE",
        "kvm_mp_state",
        lambda it: it.set_mp_state(MPState.HALTED),
        {"mp_state": "KVM_MP_STATE_HALTED"},
    ),
    Packed(
        "SET_MSRS",
        "kvm_msrs",
        lambda it: it.set_msrs({0xC000_0080: BIG, 0x10: 3}, strict=False),
        {
            "nmsrs": 2,
            "entries[0].index": 0xC000_0080,
            "entries[0].data": BIG,
            "entries[1].index": 0x10,
            "entries[1].data": 3,
        },
        "sizeof(struct kvm_msrs) + 2 * sizeof(struct kvm_msr_entry)",
    ),
    Packed(
        "SET_CPUID2",
        "kvm_cpuid2",
        lambda it: it.set_cpuid2([CPUIDEntry(1), CPUIDEntry(7, 2, 1, edx=5)]),
        {
            "nent": 2,
            "entries[0].function": 1,
            "entries[1].function": 7,
            "entries[1].index": 2,
            "entries[1].flags": "KVM_CPUID_FLAG_SIGNIFCANT_INDEX",
            "entries[1].edx": 5,
        },
        "sizeof(struct kvm_cpuid2) + 2 * sizeof(struct kvm_cpuid_entry2)",
    ),
)

# The members of struct kvm_run that each kind of exit is decoded from.
RUN_MEMBERS: dict[str, tuple[str, ...]] = {
    "io": ("direction", "size", "port", "count", "data_offset"),
    "mmio": ("phys_addr", "data", "len", "is_write"),
    "hw": ("hardware_exit_reason",),
    "fail_entry": ("hardware_entry_failure_reason", "cpu"),
    "debug": ("arch.exception", "arch.pc", "arch.dr6", "arch.dr7"),
    "internal": ("suberror", "ndata", "data[0]", "data[15]"),
    "emulation_failure": ("flags", "insn_size", "insn_bytes"),
    "msr": ("error", "reason", "index", "data"),
    "system_event": ("type", "ndata", "data[0]", "data[15]"),
}
DECODED = (
    ("IO", {"io.direction": 0, "io.size": 2, "io.port": 0x3F8, "io.count": 3}),
    ("MMIO", {"mmio.phys_addr": BIG, "mmio.len": 4, "mmio.is_write": 0}),
    ("UNKNOWN", {"hw.hardware_exit_reason": BIG}),
    ("FAIL_ENTRY", {"fail_entry.hardware_entry_failure_reason": BIG, "fail_entry.cpu": 3}),
    (
        "DEBUG",
        {"debug.arch.exception": 1, "debug.arch.pc": BIG, "debug.arch.dr6": 2, "debug.arch.dr7": 3},
    ),
    (
        "INTERNAL_ERROR",
        {"internal.suberror": 3, "internal.ndata": 16, "internal.data[0]": BIG}
        | {"internal.data[15]": 9},
    ),
    ("X86_RDMSR", {"msr.reason": 2, "msr.index": 0xC000_0080}),
    ("X86_WRMSR", {"msr.reason": 4, "msr.index": 0x10, "msr.data": BIG}),
    (
        "SYSTEM_EVENT",
        {"system_event.type": 2, "system_event.ndata": 16, "system_event.data[0]": BIG}
        | {"system_event.data[15]": 9},
    ),
)
EXPECTED_EXITS = {
    "IO": exits.PortIn(0x3F8, 2, 3),
    "MMIO": exits.MmioRead(BIG, 4),
    "UNKNOWN": exits.UnknownExit(BIG),
    "FAIL_ENTRY": exits.FailEntry(BIG, 3),
    "DEBUG": exits.Debug(1, BIG, 2, 3),
    "INTERNAL_ERROR": exits.InternalError(3, (BIG, *[0] * 14, 9)),
    "X86_RDMSR": exits.MsrRead(0xC000_0080, 2),
    "X86_WRMSR": exits.MsrWrite(0x10, BIG, 4),
    "SYSTEM_EVENT": exits.SystemEvent(2, (BIG, *[0] * 14, 9)),
}


def c_source() -> str:
    """A program that prints a line `key<TAB>number` for everything the tests ask for."""
    lines = [f"#include <{name}>" for name in ("linux/kvm.h", "sys/mman.h", "stddef.h", "stdio.h")]
    lines += ['#define SHOW(key, x) printf(key "\\t%llu\\n", (unsigned long long)(x))']
    lines += ["int main(void) {"]
    macros = [f"KVM_{name}" for name in IOCTLS] + [exit_name(n) for n in exits.REASONS.values()]
    constants = dict.fromkeys([c for _, c in CONSTANTS.values()])
    for packed in PACKED_BY_VM + PACKED_BY_VCPU:
        constants[packed.sizeof] = None
        for member, value in packed.members.items():
            constants[f"offsetof(struct {packed.struct}, {member})"] = None
            constants[f"sizeof(((struct {packed.struct} *)0)->{member})"] = None
            if isinstance(value, str):
                constants[value] = None
    for union, members in RUN_MEMBERS.items():
        for member in members:
            constants[f"offsetof(struct kvm_run, {union}.{member})"] = None
            constants[f"sizeof(((struct kvm_run *)0)->{union}.{member})"] = None
    for name in macros:
        lines += [f"#ifdef {name}", f'SHOW("{name}", {name});', "#endif"]
    for expression in constants:
        guard = next(iter(re.findall(r"\bKVM_[A-Z0-9_]+", expression)), None)
        line = f'SHOW("{expression}", {expression});'
        # KVM_IRQCHIP_* and KVM_MP_STATE_* are #define as well; only KVM_CAP_* may be new.
        lines += [f"#ifdef {guard}", line, "#endif"] if guard else [line]
    return "\n".join([*lines, "return 0; }", ""])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the kernel's headers say, by C expression."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc or gcc) to read the kernel's headers with")
    if not HEADER.exists():
        pytest.skip(f"no kernel headers: {HEADER} is missing (package linux-libc-dev)")
    directory = tmp_path_factory.mktemp("abi")
    (directory / "abi.c").write_text(c_source())
    command = [compiler, "-o", str(directory / "abi"), str(directory / "abi.c")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert built.returncode == 0, built.stderr
    output = subprocess.run(
        [directory / "abi"], capture_output=True, text=True, timeout=10, check=True
    )
    pairs = (line.split("\t") for line in output.stdout.splitlines())
    return {key: int(value) for key, value in pairs}


def value_in(kernel: dict[str, int], expression: str) -> int:
    if expression not in kernel:
        pytest.skip(f"{expression} is newer than this machine's kernel headers")
    return kernel[expression]


@pytest.mark.parametrize("name", IOCTLS)
def test_ioctl_has_the_kernels_number_and_size(name: str, kernel: dict[str, int]) -> None:
    row = IOCTLS[name]
    assert row.number == value_in(kernel, f"KVM_{name}")
    assert row.size == row.number >> 16 & 0x3FFF


@pytest.mark.parametrize("reason", exits.REASONS)
def test_exit_reason_has_the_kernels_number(reason: int, kernel: dict[str, int]) -> None:
    assert reason == value_in(kernel, exit_name(exits.REASONS[reason]))


def test_no_exit_reason_of_x86_is_left_out() -> None:
    if not HEADER.exists():
        pytest.skip(f"no kernel headers: {HEADER} is missing (package linux-libc-dev)")
    found = re.findall(r"^#define KVM_EXIT_(\w+)\s+(\d+)", HEADER.read_text(), re.MULTILINE)
    reasons = {int(n): name for name, n in found if not name.startswith(("IO_", "HYPERV_", "XEN_"))}
    assert len(reasons) > 30, "the pattern no longer fits the header"
    left_out = {
        number: name
        for number, name in reasons.items()
        if number not in exits.REASONS and number <= max(exits.REASONS)
    }
    assert {n: name for n, name in left_out.items() if not OTHER_ARCHITECTURES.match(name)} == {}


@pytest.mark.parametrize("key", CONSTANTS)
def test_constant_is_the_kernels(key: str, kernel: dict[str, int]) -> None:
    ours, expression = CONSTANTS[key]
    assert ours == value_in(kernel, expression)


# What methods hand to the kernel ------------------------------------------------------------


class BareVcpu(VcpuState):
    """The state ioctls without a vCPU behind them."""

    def _settle(self, *, writing: bool = False) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The last argument of each ioctl, which is not issued."""
    calls: dict[str, bytes] = {}

    def record(fd: int, name: str, argument: Any = 0, hint: str = "") -> int:
        calls[name] = b"" if isinstance(argument, int) else bytes(argument)
        return 2 if name == "SET_MSRS" else 0

    monkeypatch.setattr("kvmpy.descriptor.ioctl", record)
    return calls


def expected(packed: Packed, kernel: dict[str, int], found: bytes) -> bytes:
    buffer = bytearray(value_in(kernel, packed.sizeof))
    for member, value in packed.members.items():
        at = kernel[f"offsetof(struct {packed.struct}, {member})"]
        size = kernel[f"sizeof(((struct {packed.struct} *)0)->{member})"]
        if value is None:  # an address of the program's
            assert any(found[at : at + size])
            buffer[at : at + size] = found[at : at + size]
        else:
            number = value_in(kernel, value) if isinstance(value, str) else value
            buffer[at : at + size] = number.to_bytes(size, "little")
    return bytes(buffer)


@pytest.mark.parametrize("packed", PACKED_BY_VM, ids=lambda packed: packed.ioctl)
def test_vm_hands_over_the_kernels_struct(
    packed: Packed, kernel: dict[str, int], recorded: dict[str, bytes]
) -> None:
    with VM(os.open(os.devnull, os.O_RDWR), 4096) as it:
        packed.call(it)
    found = recorded[packed.ioctl]
    assert found == expected(packed, kernel, found)


@pytest.mark.parametrize("packed", PACKED_BY_VCPU, ids=lambda packed: packed.ioctl)
def test_vcpu_hands_over_the_kernels_struct(
    packed: Packed, kernel: dict[str, int], recorded: dict[str, bytes]
) -> None:
    with BareVcpu(os.open(os.devnull, os.O_RDWR), "vCPU 0") as it:
        packed.call(it)
    found = recorded[packed.ioctl]
    assert found == expected(packed, kernel, found)


def test_unregister_is_a_zone_too(recorded: dict[str, bytes]) -> None:
    with InterruptController(os.open(os.devnull, os.O_RDWR), "the VM") as it:
        it.register_coalesced(0x10, 2, port=True)
        it.unregister_coalesced(0x10, 2, port=True)
    assert recorded["REGISTER_COALESCED_MMIO"] == recorded["UNREGISTER_COALESCED_MMIO"]


# What exits are decoded from ---------------------------------------------------------------


@pytest.mark.parametrize(("reason", "members"), DECODED, ids=lambda v: v if type(v) is str else "")
def test_exit_is_decoded_from_the_kernels_struct(
    reason: str, members: dict[str, int], kernel: dict[str, int]
) -> None:
    run = bytearray(exits.RUN_SIZE)
    run[8:12] = value_in(kernel, f"KVM_EXIT_{reason}").to_bytes(4, "little")
    for member, value in members.items():
        at = kernel[f"offsetof(struct kvm_run, {member})"]
        size = kernel[f"sizeof(((struct kvm_run *)0)->{member})"]
        run[at : at + size] = value.to_bytes(size, "little")
    assert exits.decode(run) == EXPECTED_EXITS[reason]


def test_emulation_failure_is_decoded_from_the_kernels_struct(kernel: dict[str, int]) -> None:
    run = bytearray(exits.RUN_SIZE)
    numbers = {"internal.suberror": 1, "internal.ndata": 4, "emulation_failure.flags": 1}
    numbers |= {"emulation_failure.insn_size": 3, "emulation_failure.insn_bytes": 0x00C3050F}
    for member, value in numbers.items():
        at = kernel[f"offsetof(struct kvm_run, {member})"]
        size = kernel[f"sizeof(((struct kvm_run *)0)->{member})"]
        run[at : at + size] = value.to_bytes(size, "little")
    run[8] = value_in(kernel, "KVM_EXIT_INTERNAL_ERROR")
    exit_ = exits.decode(run)
    assert isinstance(exit_, exits.InternalError)
    assert exit_.instruction == b"\x0f\x05\xc3"
    assert exit_.reason == "the emulator lacks the instruction"


# The one-line ioctl ------------------------------------------------------------------------


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDWR)
    yield fd
    os.close(fd)


def test_unknown_ioctl_names_itself_and_its_capability(null: int) -> None:
    with pytest.raises(UnsupportedError, match=r"no KVM_GET_XSAVE2 \(KVM_CAP_XSAVE2\)$"):
        abi.ioctl(null, "GET_XSAVE2", bytearray(4096))
    with pytest.raises(UnsupportedError, match=r"no KVM_RUN$"):
        abi.ioctl(null, "RUN")


def test_error_carries_errno_name_and_hint() -> None:
    with pytest.raises(HostError) as caught:
        abi.ioctl(1 << 20, "RUN", hint="open it first")
    assert caught.value.errno == errno.EBADF
    assert str(caught.value) == "KVM_RUN failed: Bad file descriptor (EBADF); open it first"


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_number_out_of_range_is_refused(null: int, number: int) -> None:
    with pytest.raises(ConfigError, match="KVM_CREATE_VCPU"):
        abi.ioctl(null, "CREATE_VCPU", number)


def test_buffer_must_be_writable(null: int) -> None:
    with pytest.raises(BufferError):
        abi.ioctl(null, "GET_REGS", b"constant")  # type: ignore[arg-type]


def test_descriptor_closes_once_and_then_refuses() -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    it = Descriptor(fd, "the thing")
    assert not it.closed and it.fd == fd and repr(it) == f"<Descriptor the thing, fd {fd}>"
    it.close()
    again = os.open(os.devnull, os.O_RDWR)  # the same number: a second close must not hit it
    try:
        it.close()
        os.fstat(again)
        assert it.closed and repr(it) == "<Descriptor the thing, closed>"
        with pytest.raises(ClosedError, match="the thing is closed"):
            it.ioctl("RUN")
        with pytest.raises(ClosedError), it:
            pass
    finally:
        os.close(again)


def test_descriptor_left_open_warns_and_closes() -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    it = Descriptor(fd, "the thing")
    with pytest.warns(ResourceWarning, match="the thing was never closed"):
        del it
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.irq_line(-1, True),
        lambda it: it.irq_line(1 << 32, True),
        lambda it: it.irqfd(-1, 5),
        lambda it: it.irqfd(3, 5, resample_fd=-1),
        lambda it: it.ioeventfd(3, -1),
        lambda it: it.ioeventfd(3, 1, value=1 << 64),
        lambda it: it.signal_msi(-1, 0),
        lambda it: it.signal_msi(0, 1 << 32),
        lambda it: it.register_coalesced(1 << 64, 1),
        lambda it: it.set_gsi_routing([IrqchipRoute(-1, 0, 0)]),
        lambda it: it.set_gsi_routing([MsiRoute(1, 1 << 64, 0)]),
        lambda it: it.get_irqchip(-1),
        lambda it: it.set_irqchip(0, bytes(511)),
        lambda it: it.set_pit(bytes(111)),
        lambda it: it.enable_cap("NO_SUCH_CAP"),
        lambda it: it.enable_cap("SPLIT_IRQCHIP", -1),
        lambda it: it.enable_cap("SPLIT_IRQCHIP", 1, 2, 3, 4, 5),
        lambda it: it.set_tss_addr(-1),
        lambda it: it.set_identity_map_addr(1 << 64),
        lambda it: it.create_vcpu(-1),
    ],
)
def test_vm_refuses_numbers_that_no_struct_holds(call: Callable[[VM], object]) -> None:
    with VM(os.open(os.devnull, os.O_RDWR), 4096) as it, pytest.raises(ConfigError):
        call(it)


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.interrupt(256),
        lambda it: it.interrupt(-1),
        lambda it: it.translate(-1),
        lambda it: it.get_msrs([-1]),
        lambda it: it.set_msrs({1 << 32: 0}),
        lambda it: it.set_msrs({1: -1}),
        lambda it: it.set_lapic(bytes(1023)),
        lambda it: it.set_xsave(bytes(4095)),
        lambda it: it.set_cpuid2(bytes(41)),
        lambda it: it.set_guest_debug(breakpoints={-1: "x"}),
        lambda it: it.set_guest_debug(breakpoints={1: "x4"}),
        lambda it: it.set_guest_debug(breakpoints=dict.fromkeys(range(5), "x")),
    ],
)
def test_vcpu_refuses_values_that_no_struct_holds(call: Callable[[VcpuState], object]) -> None:
    with BareVcpu(os.open(os.devnull, os.O_RDWR), "vCPU 0") as it, pytest.raises(ConfigError):
        call(it)


def test_tss_and_identity_map_do_not_meet() -> None:
    # One page of identity map, three of TSS (KVM API, 4.36 and 4.40), all below 4 GiB.
    assert vm.IDENTITY_MAP_ADDRESS + 0x1000 <= vm.TSS_ADDRESS
    assert vm.TSS_ADDRESS + 0x3000 <= 1 << 32
