"""Does Keystone's code mean what the source says?

Keystone cuts numbers that do not fit, and drops the index of some addresses, without a
word. So each encoding is decoded by Capstone, and its operands are compared with those of
the source.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from kvmpy.asm.client import Answer
from kvmpy.errors import AssemblyError

__all__ = ["Number", "Place", "Resolved", "check_answer"]


@dataclass(frozen=True, slots=True)
class Number:
    """An immediate operand."""

    value: int


@dataclass(frozen=True, slots=True)
class Place:
    """A memory operand; `size` in bytes or 0, `bits` is the address size."""

    segment: str
    base: str
    index: str
    scale: int
    displacement: int
    size: int
    bits: int


Resolved: TypeAlias = str | Number | Place
"""An operand without symbols: a register by name, a number, or memory."""

_STACK_BASES = {"sp", "bp", "esp", "ebp", "rsp", "rbp"}
_HINTS = {
    "Invalid operand": "Keystone knows no such operands of it in {bits}-bit code",
    "Invalid mnemonic": "Keystone knows no such instruction",
    "Missing CPU feature": "there is no such instruction in {bits}-bit code",
}


def check_answer(bits: int, operands: tuple[Resolved, ...], answer: Answer) -> bytes:
    """The code of an answer; raises AssemblyError for a refusal and for wrong code."""
    if answer.code is None:
        hint = _HINTS.get(answer.message, "Keystone refuses it: " + answer.message)
        unsized = any(isinstance(operand, Place) and not operand.size for operand in operands)
        if unsized and answer.message == "Invalid operand":
            hint += "; it may lack a size, such as dword ptr"
        raise AssemblyError(hint.format(bits=bits))
    if answer.decoded is None:
        raise AssemblyError("Keystone's encoding cannot be decoded again, so it is refused")
    _, decoded = answer.decoded
    for operand in operands:
        if not _found(bits, operand, decoded, answer.code):
            _refuse(operand, decoded)
    return answer.code


def _found(bits: int, operand: Resolved, decoded: list[list[Any]], code: bytes) -> bool:
    """Whether an operand of the source is among those of the code."""
    match operand:
        case Number(value):
            numbers = [each for each in decoded if each[0] == "i"]
            if not numbers:  # a comparison predicate, which Capstone puts into the mnemonic
                return -128 <= value <= 255 and code[-1] == value & 0xFF
            return any(_same_number(value, each[1], each[2] * 8) for each in numbers)
        case Place():
            return any(_same_place(bits, operand, each[1:]) for each in decoded if each[0] == "m")
        case str(name) if name.startswith("st"):
            return True  # Capstone leaves out the top of the x87 stack
        case _:
            return ["r", operand] in decoded


def _same_number(value: int, decoded: int, width: int) -> bool:
    """Equal as `width`-bit numbers, where the source's is one, signed or unsigned."""
    fits = -(1 << width - 1) <= value < 1 << width
    return fits and (value - decoded) % (1 << width) == 0


def _same_place(bits: int, place: Place, decoded: list[Any]) -> bool:
    """The same segment, registers, scale, displacement, and size where one is given."""
    segment, base, index, scale, displacement, size = decoded
    registers = (place.base, place.index, place.scale if place.index else 1)
    swapped = (place.index, place.base, 1)
    if registers != (base, index, scale) and (
        place.scale != 1 or not place.index or swapped != (base, index, scale)
    ):
        return False
    if _segment(bits, place.segment, place.base) != _segment(bits, segment, base):
        return False
    modulus = 1 << place.bits
    if not -(modulus >> 1) <= place.displacement < modulus:
        return False
    if (place.displacement - displacement) % modulus:
        return False
    return place.size in (0, size)


def _segment(bits: int, segment: str, base: str) -> str:
    """The segment that is used: the given one or the default (SDM Vol. 1 section 3.7.4)."""
    if bits == 64:
        return segment if segment in ("fs", "gs") else ""
    return segment or ("ss" if base in _STACK_BASES else "ds")


def _refuse(operand: Resolved, decoded: list[list[Any]]) -> None:
    """Say which operand came out differently."""
    match operand:
        case Number(value):
            sizes = [each[2] * 8 for each in decoded if each[0] == "i"]
            fit = f" does not fit {sizes[0]} bits" if sizes else " is lost in Keystone's encoding"
            raise AssemblyError(f"the number {value:#x}{fit}")
        case Place():
            raise AssemblyError(
                "the memory operand cannot be encoded as written: its displacement does not "
                "fit, its size is another, or Keystone drops a part of it"
            )
        case _:
            raise AssemblyError(f"Keystone's encoding lacks the register {operand}")
