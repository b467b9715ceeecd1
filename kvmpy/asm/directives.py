"""Directives that make bytes: data, strings and padding. Keystone sees none of them."""

from dataclasses import dataclass
from typing import TypeAlias

from kvmpy.asm.expressions import Expression, Scope, evaluate
from kvmpy.errors import AssemblyError

__all__ = [
    "DATA_SIZES",
    "IGNORED",
    "MAX_SIZE",
    "REFUSED",
    "SECTIONS",
    "STRINGS",
    "Align",
    "Data",
    "Directive",
    "Literal",
    "Origin",
    "Space",
    "emit",
    "expressions_of",
]

MAX_SIZE = 16 << 20
"""The largest program, in bytes."""

DATA_SIZES = {
    ".byte": 1,
    ".2byte": 2,
    ".hword": 2,
    ".short": 2,
    ".value": 2,
    ".word": 2,
    ".4byte": 4,
    ".int": 4,
    ".long": 4,
    ".8byte": 8,
    ".quad": 8,
}
"""Directives for numbers, and the bytes that each number takes."""

STRINGS = {".ascii": b"", ".asciz": b"\0", ".string": b"\0"}
"""Directives for strings, and what ends each string."""

SECTIONS = {".text": 0, ".rodata": 1, ".data": 2, ".bss": 3}
"""Sections, in the order in which they follow each other in the program."""

IGNORED = {
    ".extern",
    ".file",
    ".global",
    ".globl",
    ".ident",
    ".intel_syntax",
    ".size",
    ".type",
}
"""Directives for linkers and debuggers, which a flat program has no use for."""

REFUSED = {
    ".include": "the assembler reads no files of the host",
    ".incbin": "the assembler reads no files of the host; load the data beside the program",
    ".att_syntax": "the dialect is Intel syntax",
    ".code16gcc": "it is for 32-bit code out of a compiler; use .code16",
    ".if": "there is no conditional assembly; build the source in Python",
    ".ifdef": "there is no conditional assembly; build the source in Python",
    ".ifndef": "there is no conditional assembly; build the source in Python",
    ".irp": "use .rept, or build the source in Python",
    ".irpc": "use .rept, or build the source in Python",
    ".endr": "there is no .rept that it could end",
    ".endm": "there is no .macro that it could end",
    ".float": "write the bit pattern with .long",
    ".single": "write the bit pattern with .long",
    ".double": "write the bit pattern with .quad",
    ".octa": "write two numbers with .quad",
    ".comm": "write a label and .space",
    ".lcomm": "write a label and .space",
    ".end": "end the text instead",
}
"""Directives that GNU as has, and what to do without them."""


@dataclass(frozen=True, slots=True)
class Data:
    """Numbers of `size` bytes each."""

    size: int
    values: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are known already."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Space:
    """`count` times a number of `size` bytes; `fill` is 0 where it is None."""

    count: Expression
    size: Expression | int
    fill: Expression | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Padding up to an offset in the section, or to an address where it is a label's."""

    target: Expression
    fill: Expression | None


@dataclass(frozen=True, slots=True)
class Align:
    """Padding to a multiple of a power of two, given as such or as its exponent."""

    alignment: Expression
    exponent: bool
    fill: Expression | None
    most: Expression | None
    code: bool


Directive: TypeAlias = Data | Literal | Space | Origin | Align


def expressions_of(directive: Directive) -> list[Expression]:
    """The expressions that a directive holds."""
    match directive:
        case Data(_, values):
            return list(values)
        case Space(count, size, fill):
            found = [count, fill] if isinstance(size, int) else [count, size, fill]
        case Origin(target, fill):
            found = [target, fill]
        case Align(alignment, _, fill, most):
            found = [alignment, fill, most]
        case _:
            found = []
    return [expression for expression in found if expression is not None]


def emit(directive: Directive, scope: Scope, start: int) -> bytes:
    """The bytes of a directive at the scope's address, in a section that begins at `start`.

    Raises AssemblyError for numbers that do not fit, and for padding that is negative or
    larger than a program may be.
    """
    match directive:
        case Data(size, values):
            return b"".join(_number(evaluate(each, scope).number, size) for each in values)
        case Literal(data):
            return data
        case Space(count, size, fill):
            width = size if isinstance(size, int) else evaluate(size, scope).number
            if not 0 <= width <= 8:
                raise AssemblyError(f"a size of {width}: .fill takes 0 to 8 bytes")
            return _repeat(evaluate(count, scope).number, width, _fill(fill, scope, width))
        case Origin(target, fill):
            number, weight = evaluate(target, scope)
            end = number if weight else start + number
            if end < scope.here:
                raise AssemblyError(
                    f"padding to {end - start:#x} from {scope.here - start:#x} would go backwards"
                )
            return _repeat(end - scope.here, 1, _fill(fill, scope, 1))
        case Align():
            return _align(directive, scope)


def _align(directive: Align, scope: Scope) -> bytes:
    """Alignment counts from address 0, not from the start of the program."""
    alignment = evaluate(directive.alignment, scope).number
    if directive.exponent:
        if not 0 <= alignment <= 24:
            raise AssemblyError(f"an alignment to 2**{alignment}: 0 to 24 are possible")
        alignment = 1 << alignment
    if alignment == 0:
        return b""
    if alignment < 0 or alignment & (alignment - 1):
        raise AssemblyError(f"an alignment of {alignment}: it must be a power of two")
    count = -scope.here % alignment
    if directive.most is not None and count > evaluate(directive.most, scope).number:
        return b""
    default = b"\x90" if directive.code else b"\0"
    return _repeat(count, 1, _fill(directive.fill, scope, 1) if directive.fill else default)


def _fill(fill: Expression | None, scope: Scope, size: int) -> bytes:
    return _number(evaluate(fill, scope).number if fill is not None else 0, size)


def _number(number: int, size: int) -> bytes:
    """A number in little-endian order, signed or unsigned; too large a number is refused."""
    if not -(1 << 8 * size >> 1) <= number < max(1 << 8 * size, 1):
        raise AssemblyError(f"{number:#x} does not fit {size} byte{'s' * (size != 1)}")
    return (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _repeat(count: int, size: int, unit: bytes) -> bytes:
    if not 0 <= count * size <= MAX_SIZE:
        what = "a negative amount" if count < 0 else f"more than the {MAX_SIZE:#x} bytes possible"
        raise AssemblyError(f"padding by {count:#x} bytes is {what}")
    return unit * count
