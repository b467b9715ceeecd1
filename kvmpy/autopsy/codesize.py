"""Whether code runs in a 16-bit segment, and whether that may be what its author meant."""

from typing import Final

from kvmpy.autopsy.scene import Scene
from kvmpy.views.code import decoder
from kvmpy.views.descriptors import look_up
from kvmpy.x86.flags import CR0
from kvmpy.x86.segments import Segment
from kvmpy.x86.tables import Selector

__all__ = ["may_be_meant", "wrong_size"]

_ENDS: Final = ("ud2", "hlt", "ret", "retf", "iret", "jmp", "ljmp")  # nothing need follow
_LONGEST_TAIL: Final = 8  # bytes of an instruction that the bytes at RIP may cut off


def wrong_size(scene: Scene) -> str:
    """A note where 16-bit code runs in protected or long mode, by a descriptor that says so."""
    if scene.mode.bits != 16 or not scene.special.cr0 & CR0.PE:
        return ""
    selector = scene.special.cs.selector
    segment = look_up(scene.read, scene.special, selector).segment
    if not selector & ~3 or segment is None or not segment.s or not segment.type & 8:
        return ""
    if selector == Selector.CODE16 and segment == Segment.code16(Selector.CODE16):
        return ""  # kvmpy's own: the guest was started in it
    if segment.db or segment.l:
        return ""
    return f"CS is {selector:#x}, whose descriptor has L = 0 and D = 0: the code is read as 16-bit"


def may_be_meant(scene: Scene) -> bool:
    """Whether what is read as 16-bit code may have been written as such.

    A segment of up to 64 KiB outside of long mode is what a way back to real mode needs. Longer
    code, read so, soon executes the upper halves of its numbers, which are zeros, or no code.
    """
    if scene.mode.long or scene.special.cs.limit > 0xFFFF:
        return False
    code = scene.instruction_bytes
    at = 0
    for one in decoder(scene.mode).disasm(code, scene.registers.rip):
        if code[at : at + 2] == b"\0\0":
            return False
        at += one.size
        if one.mnemonic in _ENDS:
            return True
    return at + _LONGEST_TAIL > len(code)
