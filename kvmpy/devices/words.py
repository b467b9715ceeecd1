"""An access in words, for traces: "THR <- 'A'"."""

from collections.abc import Mapping

__all__ = ["moved", "register"]


def moved(value: int | None, size: int, write: bool, *, letter: bool = False) -> str:
    """The arrow and the value: "<- 0x41" written, "-> 0x41" read, "-> ?" not answered yet.

    With `letter` the lowest byte is a character.
    """
    arrow = "<-" if write else "->"
    if value is None:
        return f"{arrow} ?"
    if letter:
        return f"{arrow} {chr(value & 0xFF)!a}"
    return f"{arrow} {value:#0{2 + 2 * size}x}"


def register(names: Mapping[int, str], offset: int, size: int, value: int, write: bool) -> str:
    """The same after the name of the register at `offset`, or the offset where it has none."""
    return f"{names.get(offset, f'+{offset:#x}')} {moved(value, size, write)}"
