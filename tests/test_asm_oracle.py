"""The assembler against GNU as: single instructions, and whole programs linked by ld."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import capstone
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.asm import assemble
from kvmpy.errors import AssemblyError

pytestmark = pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("ld")), reason="GNU as and ld are not installed"
)
MODES = {16: "real", 32: "protected", 64: "long"}
CAPSTONE = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
AT = 0x4000


def gnu(source, bits, at=AT):
    """What GNU as and ld make of the source; None where they refuse it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text, made, linked = (directory / each for each in ("a.s", "a.o", "a.bin"))
        text.write_text(f".intel_syntax noprefix\n.code{bits}\n{source}\n")
        wide = bits == 64
        steps = [
            ["as", "--64" if wide else "--32", "-o", made, text],
            [
                *("ld", "-m", "elf_x86_64" if wide else "elf_i386", "-N", "-e", "0"),
                *(f"-Ttext={at:#x}", "--oformat", "binary", "-o", linked, made),
            ],
        ]
        for step in steps:
            if subprocess.run(step, capture_output=True, timeout=30, check=False).returncode:
                return None
        return linked.read_bytes()


REGISTERS = {
    8: ["al", "cl", "dl", "bh"],
    16: ["ax", "cx", "si", "bp"],
    32: ["eax", "ecx", "edi", "esp"],
    64: ["rax", "rdx", "r9", "r12", "rbp"],
}
POINTERS = {8: "byte ptr", 16: "word ptr", 32: "dword ptr", 64: "qword ptr"}
MEMORY = {
    16: ["[bx]", "[bp+si+5]", "[0x1234]", "[di-0x200]", "es:[di]", "[esp+4]", "[eax+ecx*4+8]"],
    32: ["[ebx]", "[ebp+esi*2-5]", "[0x1234]", "[ecx*8+0x10]", "fs:[0x30]", "[esp]", "[bx+si]"],
    64: ["[rbx]", "[rbp+r12*2-5]", "[0x1234]", "[rcx*8+0x10]", "gs:[0x30]", "[r13]", "[rip+9]"],
}
BINARY = "add or adc sbb and sub xor cmp mov test"
UNARY = "not neg inc dec mul div imul idiv"
SHIFTS = "shl shr sar rol ror rcl rcr"
PLAIN = "nop hlt cli sti cld lahf cpuid rdmsr ret iret pushf popf leave movsb stosd lodsw"
NUMBERS = [0, 1, -1, 5, 127, 128, -128, -129, 255, 256, 0x7FFF, 0xFFFF, 0x12345, 0x7FFFFFFF]


@st.composite
def instructions(draw, bits):
    """An instruction that both assemblers may well accept."""
    size = draw(st.sampled_from([8, 16, 32] + [64] * (bits == 64)))
    register = draw(st.sampled_from(REGISTERS[size]))
    other = draw(st.sampled_from(REGISTERS[size]))
    memory = f"{POINTERS[size]} {draw(st.sampled_from(MEMORY[bits]))}"
    place = draw(st.sampled_from([register, memory]))
    # A number that needs all of its bits is read as signed by one assembler, not by both.
    number = draw(st.sampled_from([n for n in NUMBERS if -(1 << size - 1) <= n < 1 << size - 1]))
    two = draw(st.sampled_from(BINARY.split()))
    one = draw(st.sampled_from(UNARY.split()))
    shift = draw(st.sampled_from(SHIFTS.split()))
    return draw(
        st.sampled_from(
            [
                f"{two} {place}, {other}",
                f"{two} {place}, {number}",
                f"{two} {register}, {memory}" if two != "test" else f"lea ecx, {memory[-6:]}",
                f"{one} {place}",
                f"{shift} {place}, {draw(st.sampled_from(['1', '3', 'cl']))}",
                f"push {draw(st.sampled_from(NUMBERS[:10]))}",
                f"movzx ecx, {draw(st.sampled_from(['al', 'byte ptr ' + MEMORY[bits][0]]))}",
                f"set{draw(st.sampled_from(['z', 'nc', 'g']))} al",
                f"out {draw(st.sampled_from(['0xe9', 'dx']))}, {REGISTERS[min(size, 32)][0]}",
                f"in {REGISTERS[min(size, 32)][0]}, dx",
                f"push {draw(st.sampled_from(['fs', 'gs', REGISTERS[bits][1]]))}",
                f"mov {draw(st.sampled_from(['ds', 'es', 'ss']))}, cx",
                f"{draw(st.sampled_from(['lgdt', 'sidt', 'fxsave']))} {MEMORY[bits][1]}",
                draw(st.sampled_from(PLAIN.split())),
                f"rep {draw(st.sampled_from(['movsb', 'stosb']))}",
            ]
        )
    )


def meaning(code, bits):
    """The instructions in `code` as an independent disassembler reads them."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, CAPSTONE[bits])
    return [(each.mnemonic, each.op_str) for each in decoder.disasm(code, AT)]


@pytest.mark.parametrize("bits", [16, 32, 64])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_instructions_mean_what_gnu_as_says(bits, data):
    lines = data.draw(st.lists(instructions(bits), min_size=20, max_size=40))
    kept = []
    for line in lines:
        try:
            kept.append((line, bytes(assemble(line, MODES[bits], AT))))
        except AssemblyError:
            continue
    expected = gnu("\n".join(line for line, _ in kept), bits)
    if expected is None:
        kept = [(line, code) for line, code in kept if gnu(line, bits) is not None]
        expected = gnu("\n".join(line for line, _ in kept), bits)
    ours = b"".join(code for _, code in kept)
    if ours != expected:
        assert meaning(ours, bits) == meaning(expected, bits)


LABELS = [f"l{n}" for n in range(6)]
DATA = [
    *(".byte 1, 2, 'c'", ".word 0xaa55", ".long {label}", ".long {label} - {other}", ".space 40"),
    *(
        ".space 100, 0xcc",
        r'.ascii "a;b\n\101"',
        '.asciz "#\'"',
        ".balign 8, 0xcc",
        ".p2align 4, 0",
    ),
    *(".fill 3, 2, 0x1234", ".rept 3\nnop\n.endr", ".long . - {label}", ".skip 130"),
]
FLOW = [
    *("jmp {label}", "jz {label}", "call {label}", "jnle {label}", "1: jmp 1b", "jmp 1f; nop; 1:"),
    *("cmp byte ptr [{label}], 5", "mov ecx, offset {label}", "mov ecx, [{label} + 4]", "nop"),
]
LONG_FLOW = [
    *(
        "lea rsi, [rip + {label}]",
        "mov rcx, [rip + {label} + 8]",
        "mov qword ptr [rip + {label}], 5",
    ),
    *("mov rdi, offset {label}", ".quad {label}", "mov eax, [{label} + rbx*4]"),
]


@st.composite
def programs(draw, bits):
    """A program with labels, branches, references and data, each label defined once."""
    forms = DATA + FLOW + (LONG_FLOW if bits == 64 else [])
    lines = []
    for label in LABELS:
        for form in draw(st.lists(st.sampled_from(forms), max_size=6)):
            names = st.sampled_from(LABELS)
            lines.append(form.format(label=draw(names), other=draw(names)))
        lines.append(f"{label}:")
    return "\n".join([*lines, ".byte 0xcc"])


@pytest.mark.parametrize("bits", [16, 32, 64])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_programs_are_what_as_and_ld_make(bits, data):
    source = data.draw(programs(bits))
    expected = gnu(source, bits)
    assert expected is not None
    assert assemble(source, MODES[bits], AT, timeout=20) == expected
