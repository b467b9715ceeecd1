"""Every size, offset and constant of kvmpy.x86 against the kernel's headers, by a C program."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from enum import IntFlag
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import ConfigError
from kvmpy.x86.flags import CR0, CR4, RFLAGS
from kvmpy.x86.registers import REGISTER_NAMES, Registers
from kvmpy.x86.segments import DescriptorTable, Segment
from kvmpy.x86.state import (
    FPU,
    ClockData,
    CPUIDEntry,
    DebugRegisters,
    MPState,
    SpecialRegisters,
    VcpuEvents,
    XCRs,
)

STRUCTS: dict[type[Any], str] = {
    Registers: "kvm_regs",
    Segment: "kvm_segment",
    DescriptorTable: "kvm_dtable",
    SpecialRegisters: "kvm_sregs",
    DebugRegisters: "kvm_debugregs",
    VcpuEvents: "kvm_vcpu_events",
    FPU: "kvm_fpu",
    XCRs: "kvm_xcrs",
    CPUIDEntry: "kvm_cpuid_entry2",
    ClockData: "kvm_clock_data",
}
KERNEL_FLAGS = {CR0: "X86_CR0_", CR4: "X86_CR4_", RFLAGS: "X86_EFLAGS_"}


def member_of(cls: type[Any], name: str) -> str:
    """The C member that holds the Python field `name`."""
    if cls is VcpuEvents and name not in {"exception_has_payload", "exception_payload"}:
        for group in ("exception", "interrupt", "nmi", "smi", "triple_fault"):
            if name.startswith(group + "_"):
                return f"{group}.{name.removeprefix(group + '_')}"
    return name


def c_lines() -> list[str]:
    lines = []
    for cls, struct in STRUCTS.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        members = [member_of(cls, field.name) for field in fields(cls)]
        if cls is XCRs:
            members = ["nr_xcrs", "flags", "xcrs", "xcrs[1].xcr", "xcrs[1].value"]
        for member in members:
            key = f"{struct}.{member}"
            lines.append(
                f'printf("{key} %zu\\n{key}.size %zu\\n", offsetof(struct {struct}, {member}),'
                f" sizeof(((struct {struct} *)0)->{member}));"
            )
    constants = [f"KVM_MP_STATE_{state.name}" for state in MPState]
    for flags, prefix in KERNEL_FLAGS.items():
        constants += [prefix + name for name in flags.__members__]
    for name in constants:
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", (unsigned long long){name});']
        lines += ["#endif"]
    return lines


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the kernel's headers say: sizes, offsets and constants by name."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc or gcc) to read the kernel's headers with")
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no kernel headers: /usr/include/linux/kvm.h is missing")
    directory = tmp_path_factory.mktemp("headers")
    includes = ("linux/kvm.h", "asm/processor-flags.h", "stddef.h", "stdio.h")
    source = [f"#include <{name}>" for name in includes]
    source += ["int main(void) {", *c_lines(), "return 0; }"]
    (directory / "headers.c").write_text("\n".join(source) + "\n")
    program = directory / "headers"
    command = [compiler, "-o", str(program), str(directory / "headers.c")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert built.returncode == 0, built.stderr
    output = subprocess.run([program], capture_output=True, text=True, timeout=10, check=True)
    return {name: int(value) for name, value in map(str.split, output.stdout.splitlines())}


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
def test_size_is_the_kernels(cls: type[Any], kernel: dict[str, int]) -> None:
    assert kernel[STRUCTS[cls]] == cls.SIZE == len(cls().pack())


FIELDS = [(cls, field.name) for cls in STRUCTS if cls is not XCRs for field in fields(cls)]
ALL_ONES: dict[tuple[type[Any], str], Callable[[int], Any]] = {
    (SpecialRegisters, "interrupt_bitmap"): lambda size: b"\xff" * size,
    (DebugRegisters, "db"): lambda size: (2**64 - 1,) * (size // 8),
    (FPU, "fpr"): lambda size: (b"\xff" * 16,) * (size // 16),
    (FPU, "xmm"): lambda size: (b"\xff" * 16,) * (size // 16),
}


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_field_is_where_the_kernel_has_it(
    cls: type[Any], name: str, kernel: dict[str, int]
) -> None:
    key = f"{STRUCTS[cls]}.{member_of(cls, name)}"
    offset, size = kernel[key], kernel[f"{key}.size"]
    zero = cls.unpack(bytes(cls.SIZE))
    if isinstance(getattr(zero, name), Segment | DescriptorTable):
        value = type(getattr(zero, name)).unpack(b"\xff" * size)
        ones = value.pack()
    else:
        value = ALL_ONES.get((cls, name), lambda size: (1 << 8 * size) - 1)(size)
        ones = b"\xff" * size
    setattr(zero, name, value)
    expected = bytes(offset) + ones + bytes(cls.SIZE - offset - size)
    assert zero.pack() == expected
    assert cls.unpack(expected) == zero


def test_xcrs_are_where_the_kernel_has_them(kernel: dict[str, int]) -> None:
    packed = XCRs({0: 7, 0x1234: 2**64 - 1}, flags=0xABCD).pack()

    def at(member: str) -> int:
        offset, size = kernel[f"kvm_xcrs.{member}"], kernel[f"kvm_xcrs.{member}.size"]
        return int.from_bytes(packed[offset : offset + size], "little")

    assert (at("nr_xcrs"), at("flags")) == (2, 0xABCD)
    assert (at("xcrs[1].xcr"), at("xcrs[1].value")) == (0x1234, 2**64 - 1)
    assert kernel["kvm_xcrs.xcrs.size"] == 16 * 16


def test_constants_are_the_kernels(kernel: dict[str, int]) -> None:
    for state in MPState:
        assert kernel.get(f"KVM_MP_STATE_{state.name}", state) == state
    compared = 0
    flags: type[IntFlag]
    for flags, prefix in KERNEL_FLAGS.items():
        for name, bit in flags.__members__.items():
            if prefix + name in kernel:
                assert kernel[prefix + name] == bit, name
                compared += 1
    assert compared > 40


def test_registers_are_in_the_kernels_order() -> None:
    packed = Registers(**{name: index for index, name in enumerate(REGISTER_NAMES)}).pack()
    assert list(packed[::8]) == list(range(18))
    assert Registers().rflags == 2
    assert tuple(Registers().as_dict()) == REGISTER_NAMES


@given(st.lists(st.integers(0, 2**64 - 1), min_size=18, max_size=18))
def test_registers_round_trip(values: list[int]) -> None:
    registers = Registers(*values)
    assert Registers.unpack(registers.pack()) == registers
    assert list(registers.as_dict().values()) == values


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_any_bytes_survive_unpack_and_pack(cls: type[Any], data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE + 8))
    state = cls.unpack(raw)
    assert cls.unpack(memoryview(state.pack())) == state
    assert cls.unpack(bytearray(raw)) == state


def test_sregs_copy_shares_nothing() -> None:
    original = SpecialRegisters(cs=Segment.code64(8), gdt=DescriptorTable(0x1000, 0x57))
    copy = original.copy()
    assert copy == original
    copy.cs.base = 0x100
    copy.gdt.limit = 1
    assert (original.cs.base, original.gdt.limit) == (0, 0x57)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (Registers(r11=1 << 64), "r11"),
        (Registers(rip=-1), "rip = -0x1"),
        (Registers(rax="1"), "rax"),  # type: ignore[arg-type]
        (Segment(limit=1 << 32), "limit"),
        (DescriptorTable(limit=1 << 16), "limit"),
        (SpecialRegisters(cr8=1 << 64), "cr8"),
        (SpecialRegisters(ss=Segment(dpl=256)), "dpl"),
        (SpecialRegisters(interrupt_bitmap=b"1"), "interrupt_bitmap"),
        (DebugRegisters(db=(0, 0, 1 << 64, 0)), "db[2]"),
        (DebugRegisters(db=(0, 0)), "db"),  # type: ignore[arg-type]
        (VcpuEvents(exception_nr=256), "exception_nr"),
        (FPU(mxcsr=-1), "mxcsr"),
        (FPU(xmm=(b"",) * 16), "xmm[0]"),
        (FPU(fpr=()), "fpr"),
        (XCRs({0: 1 << 64}), "value"),
        (XCRs(dict.fromkeys(range(17), 0)), "17"),
        (CPUIDEntry(ebx=1 << 32), "ebx"),
        (ClockData(clock=-5), "clock"),
    ],
)
def test_a_value_that_does_not_fit_is_named(state: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        state.pack()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
