"""`assemble` as a whole: what it returns, what the dialect means, how it refuses."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import capstone
import pytest

from kvmpy.asm import ListingLine, Program, assemble
from kvmpy.errors import AssemblyError, ConfigError

BITS = {"real": capstone.CS_MODE_16, "protected": capstone.CS_MODE_32, "long": capstone.CS_MODE_64}


def disassemble(code, mode="long", at=0):
    """The code as text, by a library that is not the assembler's."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, BITS[mode])
    lines = [f"{each.mnemonic} {each.op_str}".strip() for each in decoder.disasm(code, at)]
    assert sum(each.size for each in decoder.disasm(code, at)) == len(code)
    return lines


def refused(source, mode="long", at=0x1000):
    with pytest.raises(AssemblyError) as caught:
        assemble(source, mode, at)
    assert caught.value.line is not None
    assert caught.value.text
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_example_of_the_readme():
    program = assemble("mov al, 'A'; out 0xe9, al; hlt", mode="long", at=0x4000)
    assert program == bytes.fromhex("b041e6e9f4")
    assert program.origin == 0x4000
    assert program.symbols == {}
    assert disassemble(program) == ["mov al, 0x41", "out 0xe9, al", "hlt"]


def test_a_program_is_bytes_with_symbols_and_a_listing():
    program = assemble("n = 3\nstart: nop # one\n.Lx: 1: jmp 1b\n.word start", "real", 0x7C00)
    assert isinstance(program, bytes)
    assert type(program[1:]) is bytes
    assert program.symbols == {"n": 3, "start": 0x7C00}
    assert program.listing == (
        ListingLine(1, 0x7C00, b"", "n = 3"),
        ListingLine(2, 0x7C00, b"\x90", "start: nop # one"),
        ListingLine(3, 0x7C01, b"\xeb\xfe", ".Lx: 1: jmp 1b"),
        ListingLine(4, 0x7C03, b"\x00\x7c", ".word start"),
    )
    with pytest.raises(AttributeError):
        program.listing[0].line = 5


def test_a_program_survives_pickling_and_copying():
    program = assemble("start: nop", at=0x1000)
    again = pickle.loads(pickle.dumps(program))
    assert (again, again.origin, again.symbols) == (program, 0x1000, {"start": 0x1000})
    assert again.listing == program.listing
    assert type(again) is Program


def test_the_listing_shows_every_line_beside_its_bytes():
    source = "# a\n.rept 2\nnop\n.endr\n.macro m\nhlt\n.endm\nm; cli\nd: .space 40, 0xcc"
    listing = assemble(source, at=0x1000).format_listing().splitlines()
    assert [line[:5].strip() for line in listing[:14]] == [
        *("1", "2", "3", "3", "4", "5", "6", "7", "8", "8", "8", "9", "", ""),
    ]
    assert "    3  00001001  90                       nop" in listing
    assert "... 8 more bytes" in "\n".join(listing)
    assert listing[-2:] == ["Symbols", "00001004  d"]


def test_the_listing_adds_up_to_the_bytes():
    program = assemble("a: nop; b: mov eax, [a]; .data; .byte 1; .text; jmp b", at=0x2000)
    whole = sorted((line.address, line.data) for line in program.listing if line.data)
    assert b"".join(data for _, data in whole) == program
    assert all(program[at - 0x2000 :].startswith(data) for at, data in whole)


@pytest.mark.parametrize(
    ("mode", "source", "text"),
    [
        ("long", "mov rbx, [0x1000]", "mov rbx, qword ptr [0x1000]"),
        ("long", "mov rax, [0x1000]", "mov rax, qword ptr [0x1000]"),
        ("long", "mov byte ptr [0x1000], 5", "mov byte ptr [0x1000], 5"),
        ("long", "add word ptr [x], 5\n.set x, 0x1234", "add word ptr [0x1234], 5"),
        ("long", "mov rbx, [rip + 0x10]", "mov rbx, qword ptr [rip + 0x10]"),
        ("long", "mov rbx, [rip + x + 4]; x:", "mov rbx, qword ptr [rip + 4]"),
        ("long", "cmp dword ptr [rip + x], 7; x:", "cmp dword ptr [rip], 7"),
        ("long", "lea rsi, [x]; x:", "lea rsi, [0x1008]"),
        ("long", "mov rbx, fs:[0x28]", "mov rbx, qword ptr fs:[0x28]"),
        ("long", "mov eax, [x + rbx*4]; x:", "mov eax, dword ptr [rbx*4 + 0x1007]"),
        ("long", "mov rdi, offset x; x:", "mov rdi, 0x1007"),
        ("long", "movabs rax, [0x123456789abc]", "movabs rax, qword ptr [0x123456789abc]"),
        ("real", "mov bx, [x]; x:", "mov bx, word ptr [0x1004]"),
        ("real", "mov eax, [ecx*4 + 8]", "mov eax, dword ptr [ecx*4 + 8]"),
        ("real", "mov ax, offset x; x:", "mov ax, 0x1003"),
        ("protected", "mov ebx, [x]; x:", "mov ebx, dword ptr [0x1006]"),
        ("protected", "lgdt [x]; x:", "lgdt [0x1007]"),
    ],
)
def test_memory_operands_mean_what_they_say(mode, source, text):
    assert disassemble(assemble(source, mode, 0x1000), mode) == [text]


def test_modes_switch_inside_of_a_source():
    program = assemble(
        ".code16; push 1\n.code32; push 2\n.code64; push rax; mov rax, 3", "protected"
    )
    assert program == bytes.fromhex("6a01 6a02 50 48c7c003000000")
    assert assemble("mov ax, 5", "protected16") == assemble("mov ax, 5", "real") != b"\x66\xb8\5\0"


def test_branches_take_the_short_form_where_it_reaches():
    assert assemble("jmp x; .space 127; x:")[:2] == b"\xeb\x7f"
    assert assemble("jmp x; .space 128; x:")[:5] == b"\xe9\x80\0\0\0"
    assert assemble("x: .space 126; jmp x")[-2:] == b"\xeb\x80"
    assert assemble("x: .space 127; jmp x")[-5:] == b"\xe9\x7c\xff\xff\xff"


def test_a_branch_that_grows_can_push_another_out_of_reach():
    program = assemble("jmp a; .space 61; jmp c; .space 62; a: .space 70; c:")
    assert program[:5] == b"\xe9" + (61 + 5 + 62).to_bytes(4, "little")
    assert program[66:71] == b"\xe9" + (62 + 70).to_bytes(4, "little")


def test_data_strings_and_padding():
    source = r"""
        .byte 1, -1, 'A', 0xff
        .word 0xaa55; .long -2; .quad end - start, start
start:  .ascii "a;\n", "b"
        .asciz "c"; .string "d"
        .space 2; .skip 1, 7; .zero 1; .fill 2, 3, 0x010203
        .balign 4, 0xcc
end:
    """
    program = assemble(source, at=0x100)
    start, end = 0x100 + 4 + 2 + 4 + 16, program.symbols["end"]
    assert program.symbols["start"] == start
    assert end % 4 == 0
    assert program == (
        b"\x01\xff\x41\xff\x55\xaa\xfe\xff\xff\xff"
        + (end - start).to_bytes(8, "little")
        + start.to_bytes(8, "little")
        + b"a;\nbc\0d\0\0\0\7\0\3\2\1\3\2\1"
        + b"\xcc" * (-(start + 18) % 4)
    )


def test_org_and_fill_pad_a_boot_sector():
    by_org = assemble("cli; hlt; .org 510; .word 0xaa55", "real", 0x7C00)
    by_fill = assemble("s: cli; hlt; .fill 510 - (. - s), 1, 0; .word 0xaa55", "real", 0x7C00)
    by_label = assemble("s: cli; hlt; .org s + 510; .word 0xaa55", "real", 0x7C00)
    assert by_org == by_fill == by_label == b"\xfa\xf4" + bytes(508) + b"\x55\xaa"


def test_alignment_counts_addresses_and_fills_code_with_nops():
    assert assemble(".balign 16", at=0x1001) == b"\x90" * 15
    assert assemble(".p2align 4, 0", at=0x100C) == bytes(4)
    assert assemble(".align 8,, 3", at=0x1004) == b""
    assert assemble(".data; .align 8", at=0x1004) == bytes(4)


def test_sections_follow_each_other():
    source = ".data; d: .byte 1\n.text; mov al, [d]\n.bss; b: .space 2\n.section .rodata; .byte 2"
    program = assemble(source, "protected", 0x1000)
    assert program == bytes.fromhex("a006100000 02 01 0000")
    assert program.symbols == {"d": 0x1006, "b": 0x1007}


def test_numeric_labels_look_both_ways():
    assert assemble("1: jmp 1f; 1: jmp 1b; 1:") == b"\xeb\x00\xeb\xfe"


def test_variables_change_as_the_source_goes_on():
    assert assemble(".set i, 1\n.rept 4\n.byte i\n.set i, i * 2\n.endr") == b"\1\2\4\10"
    assert "before the first" in refused(".byte i\ni = 1\ni = 2")


def test_constants_may_be_defined_below_their_use():
    assert assemble(".byte n; mov al, n; n = 5") == b"\5\xb0\5"


def test_prefixes():
    assert assemble("rep movsb; lock add dword ptr [rax], 1") == bytes.fromhex("f3a4 f0830001")
    assert assemble("rep; stosb\nfs lodsb") == bytes.fromhex("f3aa 64ac")
    assert assemble("data32 lgdt [bx]; data32 ret", "real") == bytes.fromhex("660f0117 66c3")


@pytest.mark.parametrize(
    ("mode", "source", "code"),
    [
        ("real", "ret", "c3"),
        ("real", "jmp far [bx]", "ff2f"),
        ("real", "ljmp 8:x; x:", "ea05100800"),
        ("real", "data32 ljmp 8:x; x:", "66ea081000000800"),
        ("protected", "ljmp 8:x; x:", "ea071000000800"),
        ("protected", "lgdt [eax]", "0f0110"),
        ("protected", "push ds; pop fs; mov ds, ax", "1e 0fa1 8ed8"),
        ("protected", "iret", "cf"),
        ("long", "int 3; int 0x21", "cc cd21"),
        ("long", "jmp fword ptr [rbx]", "ff2b"),
        ("long", "pop [rbx]", "8f03"),
        ("long", "endbr64; vmrun", "f30f1efa 0f01d8"),
    ],
)
def test_what_keystone_gets_wrong_is_put_right(mode, source, code):
    assert assemble(source, mode, 0x1000) == bytes.fromhex(code)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nop\nbogus eax", "line 2: .*bogus"),
        ("mov al, 256", "0x100 does not fit 8 bits"),
        ("mov ax, 0x12345", "does not fit 16 bits"),
        ("add rax, 0x80000000", "line 1"),
        ("mov eax, nowhere", "nowhere is not defined"),
        ("jmp 1f", "no label 1: below"),
        ("jmp 1b", "no label 1: above"),
        ("mov eax, x; x:", "offset"),
        ("x: x:", "line 1 as well"),
        ("x = 1\nx:", "line 1 as well"),
        ("eax: nop", "register"),
        ("mov [rax], 5", "size"),
        ("mov rax, [0x100000000]", "rip"),
        ("mov eax, [rax+0x80000000]", "displacement"),
        ("vaddps zmm0, zmm1, zmmword ptr [rax+64]", "Keystone"),
        ("nop dword ptr [rax]", "nop"),
        ("mov dword ptr [rax], dword ptr [rbx]", "two memory"),
        ('.incbin "/etc/passwd"', "reads no files"),
        ('.include "/etc/passwd"', "reads no files"),
        (".section .init", ".init"),
        (".org 0x7c00", "at="),
        ("nop; .org 0", "backwards"),
        (".space -1", "negative"),
        (".space 1 << 40", "more than"),
        (".byte 256", "does not fit 1 byte"),
        (".byte", "needs a number"),
        (".ascii x", "double quotes"),
        (".align 3", "power of two"),
        (".bogus", "unknown"),
        (".att_syntax", "Intel"),
        ("mov %eax, 5", "%"),
        ("a = a + 1", "depends on itself"),
        ("a = b\nb = a + 1", "depends on itself"),
        (".space 5 - (x - .)\nx:", "depends on itself|negative"),
        (". = 5", ".org"),
        ("lock nop", "lock"),
        ("rep add eax, 1", "rep"),
        ("mov eax, r8d:5", "no segment"),
        ("xbegin 5", "xbegin"),
        ("movl eax, 5", "movl"),
        ("ljmp 8:0", "64-bit"),
        ("mov eax, 'ab'", "character"),
        ("é", "no label"),
        ("\0", "no label"),
    ],
)
def test_bad_source_is_refused_with_line_and_text(source, words):
    assert re.search(words, refused(source))


@pytest.mark.parametrize("source", ["mov rax, 5", "mov al, r8b", "mov eax, [rip + 5]", "swapgs"])
@pytest.mark.parametrize("mode", ["real", "protected"])
def test_64_bit_code_is_refused_elsewhere(source, mode):
    assert "64-bit" in refused(source, mode)


def test_labels_that_do_not_fit_are_refused():
    assert "16 bits" in refused("mov si, offset x; x:", "real", 0x10000)
    assert "32 bits" in refused("mov esi, offset x; x:", "long", 1 << 40)
    assert assemble("mov rsi, offset x; x:", at=1 << 40).symbols["x"] == (1 << 40) + 10


def test_high_addresses_work_with_rip():
    at = 0xFFFF_8000_0000_0000
    program = assemble("lea rsi, [rip + x]; jmp x; nop; x: .quad x", at=at)
    assert program[:7].hex() == "488d3503000000"
    assert program[-8:] == (at + 10).to_bytes(8, "little")


def test_bad_arguments():
    for arguments in [("nop", "wide"), ("nop", "long", -1), ("nop", "long", 1 << 64)]:
        with pytest.raises(ConfigError):
            assemble(*arguments)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            assemble("nop", timeout=timeout)
    with pytest.raises(AssemblyError):
        assemble("nop; nop", at=(1 << 64) - 1)


def test_nothing_is_also_a_program():
    assert assemble("") == b""
    assert assemble("# only this\r\n\r\n").format_listing().count("\n") == 3


def test_a_large_source_is_quick_enough_to_finish():
    source = "\n".join(
        f"l{n}: mov eax, {n % 50}; add ebx, [l{n}]; jnz l{n // 2}" for n in range(1000)
    )
    program = assemble(source, timeout=30)
    assert len(program.symbols) == 1000
    with pytest.raises(AssemblyError, match="more than"):
        assemble(source, timeout=1e-6)


def test_importing_the_assembler_is_cheap():
    code = (
        "import sys; before = set(sys.modules); import kvmpy.asm; "
        "new = set(sys.modules) - before; "
        "print(sorted(new & {'keystone', 'capstone', 'kvmpy.asm.client', 'kvmpy.asm.layout'}))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "[]"
