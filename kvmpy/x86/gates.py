"""Gate descriptors, the entries of an IDT (SDM Vol.3 6.11 and 6.14.1)."""

import struct

from kvmpy.errors import ConfigError

__all__ = ["interrupt_gate32", "interrupt_gate64"]

_INTERRUPT_GATE = 0xE
_PRESENT = 0x80


def _attributes(dpl: int) -> int:
    if not 0 <= dpl <= 3:
        raise ConfigError(f"gate: dpl = {dpl} is not 0 to 3")
    return _PRESENT | dpl << 5 | _INTERRUPT_GATE


def interrupt_gate64(offset: int, selector: int, ist: int = 0, dpl: int = 0) -> bytes:
    """Return a 16-byte interrupt gate of long mode; entering it clears RFLAGS.IF.

    `offset` is the handler's linear address and `selector` its code segment; `ist` of 1 to 7
    takes the stack from the TSS's interrupt stack table. Raises ConfigError for a value that
    does not fit its field.
    """
    if not 0 <= ist <= 7:
        raise ConfigError(f"gate: ist = {ist} is not 0 to 7")
    if not 0 <= offset < 1 << 64:
        raise ConfigError(f"gate: offset = {offset:#x} needs more than 64 bits")
    low, middle, high = offset & 0xFFFF, offset >> 16 & 0xFFFF, offset >> 32
    _check_selector(selector)
    return struct.pack("<HHBBHII", low, selector, ist, _attributes(dpl), middle, high, 0)


def interrupt_gate32(offset: int, selector: int, dpl: int = 0) -> bytes:
    """Return an 8-byte interrupt gate of protected mode; entering it clears EFLAGS.IF.

    Raises ConfigError for a value that does not fit its field.
    """
    if not 0 <= offset < 1 << 32:
        raise ConfigError(f"gate: offset = {offset:#x} needs more than 32 bits")
    _check_selector(selector)
    return struct.pack("<HHBBH", offset & 0xFFFF, selector, 0, _attributes(dpl), offset >> 16)


def _check_selector(selector: int) -> None:
    if not 0 <= selector <= 0xFFFF:
        raise ConfigError(f"gate: selector = {selector:#x} is not 0 to 0xffff")
