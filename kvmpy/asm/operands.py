"""Operands of instructions, in Intel syntax.

A bare `label` is refused as an operand, because GNU as reads memory there and NASM takes
the address: `offset label` and `[label]` say which.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

from kvmpy.asm.expressions import Binary, Expression, Number, Register, Unary
from kvmpy.asm.parser import LocalLabels, parse_tokens
from kvmpy.asm.registers import ADDRESS_BITS, POINTER_SIZES, REGISTERS, SEGMENT_PREFIXES
from kvmpy.asm.tokens import Token
from kvmpy.errors import AssemblyError

__all__ = [
    "FarPointer",
    "Immediate",
    "Memory",
    "Operand",
    "RegisterOperand",
    "Rounding",
    "expressions_of",
    "parse_operand",
]


@dataclass(frozen=True, slots=True)
class RegisterOperand:
    """A register, with AVX-512 decorations such as {k1}{z}."""

    name: str
    decorations: str = ""


@dataclass(frozen=True, slots=True)
class Rounding:
    """An AVX-512 operand of its own: {sae}, {rn-sae} and the like."""

    text: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A number, or an address where `offset` says so or the instruction is a branch.

    `size` is in bytes, 0 where none is given; `word` is short, near, far or nothing.
    """

    value: Expression
    offset: bool = False
    size: int = 0
    word: str = ""


@dataclass(frozen=True, slots=True)
class FarPointer:
    """`selector:offset`, of a far jump or call."""

    selector: Expression
    offset: Expression
    size: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory operand; `size` in bytes and 0 where none is given."""

    displacement: Expression
    base: str = ""
    index: str = ""
    scale: int = 1
    segment: str = ""
    size: int = 0
    far: bool = False
    decorations: str = ""


_ZERO = Number(0)

Operand: TypeAlias = RegisterOperand | Rounding | Immediate | FarPointer | Memory


def expressions_of(operand: Operand) -> list[Expression]:
    """The expressions that an operand holds."""
    match operand:
        case Immediate(value):
            return [value]
        case FarPointer(selector, offset):
            return [selector, offset]
        case Memory(displacement):
            return [displacement]
    return []


def parse_operand(tokens: list[Token], labels: LocalLabels) -> Operand:
    """Parse the tokens of one operand; raises AssemblyError."""
    rest = list(tokens)
    decorations = ""
    while len(rest) > 1 and rest[-1].kind == "decoration":
        decorations = rest.pop().text.lower() + decorations
    if rest[0].kind == "decoration":
        return Rounding(rest[0].text.lower())
    words = _Words(rest)
    segment = _take_segment(rest)
    if any(token == Token("operator", "[") for token in rest):
        return _memory(rest, labels, words, segment, decorations)
    if segment:
        return Memory(parse_tokens(rest, labels), segment=segment, size=words.size, far=words.far)
    colon = Token("operator", ":")
    if colon in rest:
        cut = rest.index(colon)
        selector, offset = parse_tokens(rest[:cut], labels), parse_tokens(rest[cut + 1 :], labels)
        return FarPointer(selector, offset, words.size)
    value = parse_tokens(rest, labels)
    if isinstance(value, Register):
        if words.any:
            raise AssemblyError(f"the register {value.name} takes no size")
        return RegisterOperand(value.name, decorations)
    return Immediate(value, words.offset, words.size, words.distance)


class _Words:
    """The keywords before an operand, taken off its tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        self.size = 0
        self.offset = self.far = self.any = False
        self.distance = ""
        while len(tokens) > 1 and tokens[0].kind == "name":
            word = tokens[0].text.lower()
            if word in POINTER_SIZES:
                self.size = POINTER_SIZES[word]
            elif word == "offset":
                self.offset = True
            elif word in ("short", "near", "far"):
                self.distance = word
                self.far = word == "far"
            else:
                return
            self.any = True
            tokens.pop(0)
            if tokens[0].text.lower() == "ptr" and (word in POINTER_SIZES or word == "far"):
                tokens.pop(0)
            if not tokens:
                raise AssemblyError(f"an operand is missing after {word}")


def _take_segment(tokens: list[Token]) -> str:
    """Take `es:` off the front of the tokens."""
    if len(tokens) > 2 and tokens[1] == Token("operator", ":"):
        name = tokens[0].text.lower()
        if name in SEGMENT_PREFIXES:
            del tokens[:2]
            return name
        if name in REGISTERS:
            raise AssemblyError(f"{name} is no segment register")
    return ""


def _memory(
    tokens: list[Token], labels: LocalLabels, words: _Words, segment: str, decorations: str
) -> Memory:
    """`[...]`, which must be the whole of what is left of the operand."""
    brackets = [index for index, token in enumerate(tokens) if token.text in ("[", "]")]
    if len(brackets) != 2 or brackets[0] != 0 or tokens[brackets[1]].text != "]":
        raise AssemblyError("write a memory operand as [base + index*scale + displacement]")
    if brackets[1] != len(tokens) - 1:
        raise AssemblyError("write everything inside of one pair of brackets")
    if words.offset or words.distance in ("short", "near"):
        raise AssemblyError("offset, short and near do not go with a memory operand")
    inside = tokens[1:-1]
    inner = _take_segment(inside)
    if inner and segment:
        raise AssemblyError("two segments in one operand")
    sums = _Sum()
    sums.add(parse_tokens(inside, labels), negative=False)
    base, index, scale = sums.registers()
    return Memory(
        sums.displacement, base, index, scale, segment or inner, words.size, words.far, decorations
    )


@dataclass(slots=True)
class _Sum:
    """Sorts the terms of an address into registers with scales and a displacement."""

    displacement: Expression = _ZERO
    terms: list[tuple[str, int]] = field(default_factory=list)

    def add(self, term: Expression, negative: bool) -> None:
        """Take in one term, or the terms of a sum."""
        match term:
            case Binary("+" | "-" as operation, left, right):
                self.add(left, negative)
                self.add(right, negative != (operation == "-"))
            case Register(name) if not negative:
                self.terms.append((name, 0))
            case Binary("*", Register(name), Number(scale)) if not negative:
                self.terms.append((name, scale))
            case Binary("*", Number(scale), Register(name)) if not negative:
                self.terms.append((name, scale))
            case _:
                self._add_displacement(term, negative)

    def _add_displacement(self, term: Expression, negative: bool) -> None:
        if _holds_register(term):
            raise AssemblyError("a register can only be added, or multiplied by 1, 2, 4 or 8")
        if self.displacement != _ZERO:
            self.displacement = Binary("-" if negative else "+", self.displacement, term)
        else:
            self.displacement = Unary("-", term) if negative else term

    def registers(self) -> tuple[str, str, int]:
        """Base, index and scale; an unscaled register is the base where there is a choice."""
        ordered = sorted(self.terms, key=lambda term: term[1] != 0)
        for name, scale in ordered:
            if name not in ADDRESS_BITS:
                raise AssemblyError(f"the register {name} cannot hold an address")
            if scale not in (0, 1, 2, 4, 8):
                raise AssemblyError(f"a scale of {scale}: it must be 1, 2, 4 or 8")
        bits = {ADDRESS_BITS[name] for name, _ in ordered} - {0}
        if len(ordered) > 2 or len(bits) > 1:
            raise AssemblyError("an address takes two registers at most, of one size")
        if len(ordered) == 2 and ordered[0][1] == 0:
            (first, _), (second, scale) = ordered
            if (second.endswith("sp") and scale == 0) or ADDRESS_BITS[first] == 0:
                first, second = second, first
            return first, second, max(scale, 1)
        if len(ordered) == 2:
            raise AssemblyError("only one register of an address can have a scale")
        if not ordered:
            return "", "", 1
        name, scale = ordered[0]
        if scale > 1 or ADDRESS_BITS[name] == 0:
            return "", name, max(scale, 1)
        return name, "", 1


def _holds_register(expression: Expression) -> bool:
    match expression:
        case Register():
            return True
        case Unary(_, operand):
            return _holds_register(operand)
        case Binary(_, left, right):
            return _holds_register(left) or _holds_register(right)
    return False
