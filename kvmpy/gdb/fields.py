"""The fields of packets: numbers, bytes and actions, read strictly."""

import re
from typing import Final

from kvmpy.gdb.description import REGISTERS
from kvmpy.gdb.stops import Action

__all__ = ["MalformedError", "as_action", "as_number", "as_numbers", "as_register", "unhex"]

_HEX: Final = re.compile(rb"[0-9a-fA-F]+\Z")
_DIGITS: Final = 16


class MalformedError(Exception):
    """A packet that is not what the protocol says."""


def as_number(text: bytes) -> int:
    """A number in hex, of at most 64 bits."""
    if len(text) > _DIGITS or not _HEX.match(text):
        raise MalformedError
    return int(text, 16)


def as_numbers(text: bytes, count: int) -> list[int]:
    """So many numbers with commas between them."""
    parts = text.split(b",")
    if len(parts) != count:
        raise MalformedError
    return [as_number(part) for part in parts]


def unhex(text: bytes) -> bytes:
    """Bytes that are written in hex."""
    if len(text) % 2 or (text and not _HEX.match(text)):
        raise MalformedError
    return bytes.fromhex(text.decode("ascii"))


def as_register(text: bytes) -> int:
    """The number of a register that there is."""
    number = as_number(text)
    if number >= len(REGISTERS):
        raise MalformedError
    return number


def as_action(text: bytes) -> Action:
    """How a vCPU is to go on, as vCont says it."""
    kind, rest = text[:1].lower(), text[1:]
    if text[:1] in (b"C", b"S"):
        as_number(rest)
    elif kind == b"r":
        return Action("r", *as_numbers(rest, 2))
    elif kind not in (b"c", b"s") or rest:
        raise MalformedError
    return Action(kind.decode())
