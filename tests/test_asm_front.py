"""The assembler's front end without Keystone: text, expressions, operands, own encodings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.asm.branches import BRANCHES, encode_branch
from kvmpy.asm.client import Answer
from kvmpy.asm.expand import MAX_STATEMENTS, expand
from kvmpy.asm.expressions import Value, evaluate
from kvmpy.asm.fixed import encode_far, encode_fixed, encode_push, encode_return
from kvmpy.asm.operands import FarPointer, Immediate, Memory, RegisterOperand, parse_operand
from kvmpy.asm.parser import parse_expression
from kvmpy.asm.source import split_statements
from kvmpy.asm.tokens import tokenize, unquote
from kvmpy.asm.verify import Number, Place, check_answer
from kvmpy.errors import AssemblyError


class Names:
    """A scope for expressions: symbols from a dictionary, at address 0x1000."""

    here = 0x1000

    def __init__(self, **values):
        self.values = values

    def lookup(self, name):
        return self.values[name]


def value(text, **values):
    return evaluate(parse_expression(text, {}), Names(**values))


def texts(source):
    return [(each.line, each.text) for each in split_statements(source)]


def test_statements_are_cut_at_newlines_and_semicolons():
    assert texts("cli; hlt\nnop") == [(1, "cli"), (1, "hlt"), (2, "nop")]


def test_comments_go_and_lines_stay():
    source = "cli # a; b\nhlt // c\n/* d\ne */ nop /* f */\n\nret"
    assert texts(source) == [(1, "cli"), (2, "hlt"), (3, ""), (4, "nop"), (5, ""), (6, "ret")]


def test_quotes_protect_separators_and_comments():
    source = """.ascii "a;b#c//d/*e*/\\"f"; mov al, ';'; mov al, '"'; mov al, '\\''; mov al, '#'"""
    assert [text for _, text in texts(source)] == [
        '.ascii "a;b#c//d/*e*/\\"f"',
        "mov al, ';'",
        "mov al, '\"'",
        "mov al, '\\''",
        "mov al, '#'",
    ]


def test_labels_are_statements_of_their_own():
    assert texts("a: b: 1: nop") == [(1, "a:"), (1, "b:"), (1, "1:"), (1, "nop")]
    assert texts("mov al, es:[di]") == [(1, "mov al, es:[di]")]


@pytest.mark.parametrize("source", ['.ascii "x', "mov al, 'x", "nop /* x", 'nop\n"', "nop\n'\\\n'"])
def test_what_does_not_end_is_refused(source):
    with pytest.raises(AssemblyError, match="does not end") as caught:
        split_statements(source)
    assert caught.value.line == 1 + source.startswith("nop\n")


@given(st.text(alphabet="ab;#/*'\"\\\n: ", max_size=60))
def test_every_line_of_any_text_is_accounted_for(source):
    try:
        statements = split_statements(source)
    except AssemblyError as error:
        assert 1 <= error.line <= source.count("\n") + 1
    else:
        assert {each.line for each in statements} == set(range(1, source.count("\n") + 2))


@pytest.mark.parametrize(
    ("literal", "data"),
    [
        (r'"a\n\t\r\0"', b"a\n\t\r\0"),
        (r'"\\\"\x41\101\b\f"', b'\\"AA\b\f'),
        (r'"\1012"', b"A2"),
        ('"é"', "é".encode()),
        ("'\\''", b"'"),
    ],
)
def test_escapes(literal, data):
    assert unquote(literal) == data


@pytest.mark.parametrize("literal", [r'"\x414"', r'"\q"', r'"\400"', r'"\x"'])
def test_escapes_that_assemblers_read_differently_are_refused(literal):
    with pytest.raises(AssemblyError):
        unquote(literal)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0x10 + 0b11 - 0o7 + 5", 16 + 3 - 7 + 5),
        ("2 * (3 + 4)", 14),
        ("-7 / 2", -3),
        ("-7 % 2", -1),
        ("~0 & 0xff", 0xFF),
        ("1<<3 | 1<<5", 0x28),
        ("'A'", 65),
        ("10 - 3 - 2", 5),
        ("-(-1)", 1),
    ],
)
def test_expressions(text, number):
    assert value(text) == Value(number)


def test_labels_weigh_and_differences_do_not():
    names = {"a": Value(0x2000, 1), "b": Value(0x2010, 1), "n": Value(3)}
    assert value("b - a + n", **names) == Value(0x13, 0)
    assert value("b + n*2", **names) == Value(0x2016, 1)
    assert value(". - a", **names) == Value(-0x1000, 0)
    assert value("(b >> 4) & 0xff", **names) == Value(1, 0)
    assert value("-a", **names) == Value(-0x2000, -1)


@pytest.mark.parametrize("text", ["1 + 2 & 3", "1 << 2 + 3", "1 | 2 ^ 3 & 4", "4 & 2 - 1"])
def test_precedence_that_c_and_gnu_as_dispute_needs_parentheses(text):
    with pytest.raises(AssemblyError, match="parentheses"):
        value(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1 +", "(1", "1)", "1 2", "010", "0ffh", "1/0", "1 << 65", "1 << -1", "rax", '"a"'),
        *("'ab'", "0x", "1" * 30, "(" * 50 + "1" + ")" * 50, "+".join("1" * 150), "2 * -"),
        *("[1]", "@"),
    ],
)
def test_bad_expressions_are_refused(text):
    with pytest.raises(AssemblyError):
        value(text)


@given(st.integers(-(2**63), 2**63), st.integers(-(2**63), 2**63).filter(bool))
def test_division_rounds_towards_zero(left, right):
    quotient = value(f"({left}) / ({right})").number
    remainder = value(f"({left}) % ({right})").number
    assert quotient * right + remainder == left
    assert abs(remainder) < abs(right)
    assert remainder == 0 or (remainder < 0) == (left < 0)


def operand(text):
    return parse_operand(tokenize(text), {})


def memory(text):
    parsed = operand(text)
    number = evaluate(parsed.displacement, Names(x=Value(0x100, 1))).number
    return parsed.base, parsed.index, parsed.scale, number


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[rax]", ("rax", "", 1, 0)),
        ("[rax + rbx*4 - 8]", ("rax", "rbx", 4, -8)),
        ("[4*rbx + 2 + rax + 3]", ("rax", "rbx", 4, 5)),
        ("[rbx*1]", ("rbx", "", 1, 0)),
        ("[rax + rsp]", ("rsp", "rax", 1, 0)),
        ("[rcx*8 + x + 4]", ("", "rcx", 8, 0x104)),
        ("[x]", ("", "", 1, 0x100)),
        ("[-(4) + bx + si]", ("bx", "si", 1, -4)),
        ("[RAX + 1 - (2 - 3)]", ("rax", "", 1, 2)),
        ("[rax + ymm1*4]", ("rax", "ymm1", 4, 0)),
    ],
)
def test_memory_operands(text, parts):
    assert memory(text) == parts


def test_sizes_segments_and_other_operands():
    assert operand("dword ptr fs:[rax]").segment == "fs"
    assert operand("dword ptr [fs:rax]").segment == "fs"
    assert operand("QWORD PTR [rax]").size == 8
    assert operand("byte [rax]").size == 1
    assert isinstance(operand("gs:0x30"), Memory)
    assert operand("st(3)") == RegisterOperand("st(3)")
    assert operand("zmm1{k1}{z}") == RegisterOperand("zmm1", "{k1}{z}")
    assert operand("offset x").offset
    assert operand("short x").word == "short"
    assert isinstance(operand("8:x"), FarPointer)
    assert isinstance(operand("5"), Immediate)


@pytest.mark.parametrize(
    "text",
    [
        *("[rax+rbx+rcx]", "[rax*3]", "[rax-rbx]", "[rax*2+rbx*2]", "[eax+rbx]", "rax[4]"),
        *("[rax][4]", "[rax", "rax]", "[]", "[al]", "[cr0]", "ax:[5]", "dword ptr eax"),
        *("offset [rax]", "fs:[gs:rax]", "[rax*rbx]", "[~rax]", "[es]"),
    ],
)
def test_bad_operands_are_refused(text):
    with pytest.raises(AssemblyError):
        operand(text)


@pytest.mark.parametrize(
    ("bits", "mnemonic", "distance", "target", "code"),
    [
        (64, "jmp", "", 0x1000, "ebfe"),
        (64, "jmp", "", 0x1081, "eb7f"),
        (64, "jmp", "", 0x1082, "e97d000000"),
        (64, "jmp", "near", 0x1000, "e9fbffffff"),
        (16, "jmp", "", 0x2000, "e9fd0f"),
        (32, "jz", "", 0x0, "0f84faefffff"),
        (16, "jz", "", 0x0, "0f84fcef"),
        (64, "jnle", "short", 0x1000, "7ffe"),
        (64, "call", "", 0x1005, "e800000000"),
        (16, "call", "", 0x1003, "e80000"),
        (32, "call", "", 0xFFFFFFFF, "e8faefffff"),
        (64, "loop", "", 0x1000, "e2fe"),
        (64, "jrcxz", "", 0x1000, "e3fe"),
        (64, "jecxz", "", 0x1000, "67e3fd"),
        (16, "jcxz", "", 0x1000, "e3fe"),
        (32, "jcxz", "", 0x1000, "67e3fd"),
    ],
)
def test_branches(bits, mnemonic, distance, target, code):
    assert encode_branch(bits, mnemonic, distance, target, 0x1000).hex() == code


@pytest.mark.parametrize(
    ("bits", "mnemonic", "distance", "target"),
    [
        (64, "jmp", "short", 0x2000),
        (64, "loop", "", 0x2000),
        (64, "call", "short", 0x1010),
        (64, "loop", "near", 0x1000),
        (64, "jmp", "", 0x1_8000_0000),
        (16, "jmp", "", 0xF000),
        (64, "jcxz", "", 0x1000),
        (32, "jrcxz", "", 0x1000),
        (32, "jmp", "", 1 << 32),
        (64, "jmp", "", -1),
    ],
)
def test_branches_out_of_reach_are_refused(bits, mnemonic, distance, target):
    with pytest.raises(AssemblyError):
        encode_branch(bits, mnemonic, distance, target, 0x1000)


def test_every_condition_has_a_branch():
    assert len(BRANCHES) == 30 + 2 + 5 + 3


@pytest.mark.parametrize(
    ("bits", "mnemonic", "data", "code"),
    [
        (16, "ret", 0, "c3"),
        (16, "ret", 32, "66c3"),
        (32, "iret", 0, "cf"),
        (16, "iretd", 0, "66cf"),
        (64, "iretq", 0, "48cf"),
        (32, "pushf", 0, "9c"),
        (16, "stosd", 0, "66ab"),
        (64, "movsq", 0, "48a5"),
        (32, "insw", 0, "666d"),
        (64, "pushfq", 0, "9c"),
        (64, "sysretq", 0, "480f07"),
    ],
)
def test_instructions_that_depend_on_the_mode(bits, mnemonic, data, code):
    assert encode_fixed(bits, mnemonic, data).hex() == code


@pytest.mark.parametrize(
    ("bits", "mnemonic"), [(64, "pusha"), (32, "iretq"), (16, "movsq"), (32, "pushfq")]
)
def test_instructions_that_a_mode_lacks_are_refused(bits, mnemonic):
    with pytest.raises(AssemblyError):
        encode_fixed(bits, mnemonic)


@pytest.mark.parametrize(
    ("bits", "number", "size", "code"),
    [
        (16, 5, 0, "6a05"),
        (16, 0xFFFF, 0, "6aff"),
        (16, 0x1234, 0, "683412"),
        (16, 5, 32, "666a05"),
        (32, 0xFFFFFFFF, 0, "6aff"),
        (64, 0x7FFFFFFF, 0, "68ffffff7f"),
        (64, 0xFFFFFFFF80000000, 0, "6800000080"),
        (64, -129, 0, "687fffffff"),
        (64, 0x1234, 16, "66683412"),
    ],
)
def test_push_of_a_number(bits, number, size, code):
    assert encode_push(bits, number, size).hex() == code


@pytest.mark.parametrize(
    ("bits", "number", "size"),
    [(64, 0x80000000, 0), (16, 0x10000, 0), (32, -0x80000001, 0), (64, 5, 32), (32, 5, 64)],
)
def test_push_of_a_number_that_does_not_fit(bits, number, size):
    with pytest.raises(AssemblyError):
        encode_push(bits, number, size)


def test_far_pointers_and_returns():
    assert encode_far(16, "ljmp", 8, 0x7C00, 0).hex() == "ea007c0800"
    assert encode_far(16, "ljmp", 8, 0x12345, 32).hex() == "66ea452301000800"
    assert encode_far(32, "lcall", 8, 0x12345, 0).hex() == "9a452301000800"
    assert encode_return(16, "ret", 4, 0).hex() == "c20400"
    assert encode_return(32, "retf", 0xFFFF, 0).hex() == "caffff"
    for arguments in [
        (64, "ljmp", 8, 0, 0),
        (16, "ljmp", 8, 0x10000, 0),
        (16, "jmp", 1 << 16, 0, 0),
    ]:
        with pytest.raises(AssemblyError):
            encode_far(*arguments)


def place(**changes):
    fields = {"segment": "", "base": "rax", "index": "", "scale": 1, "displacement": 8}
    return Place(**(fields | {"size": 0, "bits": 64} | changes))


def answer(*operands):
    return Answer(b"\x90", "", ("op", [list(each) for each in operands]))


MEMORY = ("m", "", "rax", "", 1, 8, 4)


@pytest.mark.parametrize(
    ("operand", "decoded"),
    [
        (Number(0x1FF), ("i", 0xFF, 1)),
        (Number(-129), ("i", 0x7F, 1)),
        (Number(0x80000000), ("i", 0, 2)),
        ("rbx", ("r", "rax")),
        (place(base="rcx"), MEMORY),
        (place(index="rbx", scale=2), MEMORY),
        (place(displacement=0x80000000), ("m", "", "rax", "", 1, -0x80000000, 4)),
        (place(segment="fs"), MEMORY),
        (place(size=8), MEMORY),
        (place(base="eax", bits=32), MEMORY),
        (place(), ("r", "rax")),
    ],
)
def test_wrong_code_is_refused(operand, decoded):
    with pytest.raises(AssemblyError):
        check_answer(64, (operand,), answer(decoded))


@pytest.mark.parametrize(
    ("operand", "decoded"),
    [
        (Number(0xFF), ("i", -1, 1)),
        (Number(-1), ("i", 0xFF, 1)),
        (Number(1 << 64 - 1), ("i", -(1 << 63), 8)),
        (place(), MEMORY),
        (place(size=4), MEMORY),
        (place(base="rax", index="rbx"), ("m", "", "rbx", "rax", 1, 8, 4)),
        (place(segment="ds"), MEMORY),
        ("st", ("r", "st(1)")),
    ],
)
def test_right_code_is_kept(operand, decoded):
    assert check_answer(64, (operand,), answer(decoded)) == b"\x90"


def test_code_that_cannot_be_decoded_is_refused():
    with pytest.raises(AssemblyError):
        check_answer(64, (), Answer(b"\x06", "", None))


def expanded(source):
    return [each.text for each in expand(split_statements(source)) if each.text]


def test_repeats_nest_and_count_with_constants():
    source = "n = 2\n.rept n*2-1\nnop\n.rept 2\nhlt\n.endr\n.endr"
    assert expanded(source) == ["n = 2"] + ["nop", "hlt", "hlt"] * 3


def test_macros_take_arguments_and_defaults():
    source = ".macro put what, port=0xe9\nmov al, \\what; out \\port, al\nx\\@:\n.endm\n"
    source += "put 'a', 5\nput ','"
    assert expanded(source) == [
        *("mov al, 'a'", "out 5, al", "x1:"),
        *("mov al, ','", "out 0xe9, al", "x2:"),
    ]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("nop\n.rept 3\nnop", 2),
        (".rept x\n.endr", 1),
        (".rept .\n.endr", 1),
        (".rept -1\n.endr", 1),
        (f".rept {MAX_STATEMENTS + 1}\nnop\n.endr", 1),
        (f".rept {MAX_STATEMENTS}\nnop\nnop\n.endr", 2),
        ("\n.macro m\nm\n.endm\nm", 5),
        (".macro m a\n.endm\nm", 3),
        (".macro m a\n.endm\nm 1, 2", 3),
        (".macro m\n.endm\n.macro m\n.endm", 3),
        (".macro\n.endm", 1),
        (".macro m 1\n.endm", 1),
    ],
)
def test_bad_repeats_and_macros_are_refused_by_line(source, line):
    with pytest.raises(AssemblyError) as caught:
        expand(split_statements(source))
    assert caught.value.line in (line, line + 1)
