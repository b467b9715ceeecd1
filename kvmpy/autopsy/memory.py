"""Whether an access to memory faults, and why: canonical form, segments, page tables."""

from dataclasses import dataclass
from typing import Final

from kvmpy.autopsy.fault import GP, PF, SS, Fault
from kvmpy.autopsy.scene import Scene
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.views.pages import Access, PageWalk
from kvmpy.x86.flags import CR0, CR4

__all__ = ["Touch", "check_fetch", "check_touch", "page_fault"]

_PAGE: Final = 4096
_PS: Final = 1 << 7
_CACHING: Final = 0x18  # CR3's PWT and PCD (SDM Vol.3 2.5)
_NEAR_ZERO: Final = 0x1000
_BIG: Final = {"PT": 1 << 21, "PD": 1 << 30}  # what an entry of the level above maps with PS set
_REFUSALS: Final = (
    ("no-execute", "nx"),
    ("SMEP", "smep"),
    ("SMAP", "smap"),
    ("supervisor page", "supervisor-page"),
    ("read-only", "write-protected"),
)


@dataclass(frozen=True, slots=True)
class Touch:
    """One access to memory: `segment` is what it goes through, `what` says it in words.

    `implicit` says that the instruction uses the stack by itself, as PUSH and RET do: an operand
    with RBP or RSP in its address goes through SS as well, and may be anything.
    """

    linear: int
    size: int
    access: Access
    segment: str
    offset: int
    what: str
    implicit: bool = False


def check_touch(scene: Scene, touch: Touch) -> Fault | None:
    """The exception that an access raises, None where it is allowed."""
    fault = _check_segment(scene, touch)
    if fault is not None:
        return fault
    last = touch.linear + touch.size - 1 & (1 << 64) - 1
    for linear in (touch.linear, last):  # the first byte first: CR2 has its address
        walk = scene.walk(linear, touch.access)
        if not walk.allowed:
            return page_fault(scene, walk, touch.what, stack=_is_stack(scene, touch))
    return None


def _is_stack(scene: Scene, touch: Touch) -> bool:
    """Whether it is the stack that is wrong, not an operand that happens to go through SS."""
    if touch.implicit or touch.segment != "ss":
        return touch.implicit
    return not scene.walk(scene.stack_address(0), "read").allowed


def _check_segment(scene: Scene, touch: Touch) -> Fault | None:
    special, stack = scene.special, touch.segment == "ss"
    vector = SS if stack else GP
    if scene.mode.bits == 64:
        bits = canonical_bits(special)
        end = touch.linear + touch.size - 1 & (1 << 64) - 1
        if is_canonical(touch.linear, bits) and is_canonical(end, bits):
            return None
        what = f"{touch.what}, which is"
        if is_canonical(touch.linear, bits):
            what = f"{touch.what}, whose last byte, at {end:#x}, is"
        why = f"{what} not canonical: bits 63 to {bits - 1} are not all equal"
        return Fault("non-canonical", why, vector, 0, touch.linear)
    segment = scene.segment(touch.segment)
    name = touch.segment.upper()
    if special.cr0 & CR0.PE:
        if segment.unusable or not segment.present:
            return Fault("null-selector", f"{touch.what} through {name}, which is null", GP, 0)
        writable = not segment.type & 8 and segment.type & 2
        if touch.access == "write" and not writable:
            why = f"{touch.what} through {name} {segment.selector:#x}, which is not writable"
            return Fault("segment-rights", why, vector, 0)
        if touch.access == "read" and segment.type & 8 and not segment.type & 2:
            why = f"{touch.what} through {name} {segment.selector:#x}, which is execute-only"
            return Fault("segment-rights", why, vector, 0)
    mask = 0xFFFF_FFFF if segment.db or not stack else 0xFFFF
    offset = touch.offset & mask
    down = not segment.type & 8 and segment.type & 4
    outside = offset <= segment.limit if down else offset + touch.size - 1 > segment.limit
    if outside:
        why = f"{touch.what}: offset {offset:#x} is beyond {name}'s limit {segment.limit:#x}"
        return Fault("segment-limit", why, vector, 0, touch.linear)
    return None


def check_fetch(scene: Scene) -> Fault | None:
    """Why no instruction can be fetched at RIP, None where it can."""
    special, rip = scene.special, scene.registers.rip
    if scene.mode.bits != 64 and rip > special.cs.limit:
        why = f"rip {rip:#x} is beyond CS's limit {special.cs.limit:#x}"
        return Fault("segment-limit", why, GP, 0, scene.linear)
    walk = scene.walk(scene.linear, "fetch")
    if walk.end == "not canonical":
        why = f"rip {rip:#x} is not canonical: {walk.why}"
        return Fault("non-canonical", why, GP, 0, scene.linear)
    if not walk.allowed:
        return page_fault(scene, walk, f"the fetch at rip {rip:#x}", stack=False)
    if not walk.in_ram:
        physical = f", physical {walk.physical:#x}" if walk.physical != walk.linear else ""
        return Fault("no-ram", f"there is no RAM at rip {rip:#x}{physical}", address=walk.linear)
    return None


def page_fault(scene: Scene, walk: PageWalk, what: str, *, stack: bool) -> Fault:
    """The page fault (or #GP, #SS) that a walk that failed means."""
    if walk.end == "not canonical":
        why = f"{what}, which is not canonical: {walk.why}"
        return Fault("non-canonical", why, SS if stack else GP, 0, walk.linear)
    cause = _cause(scene, walk, stack)
    why = f"{what}: {walk.why.removesuffix(': #PF')}{_root(scene, walk)}"
    if cause in ("missing-ps", "missing-pse"):
        above = walk.entries[-2]
        why += f"; the {above.name} entry above it at {above.address:#x} is {above.value:#x}"
    return Fault(cause, why, PF, walk.error_code, walk.linear)


def _root(scene: Scene, walk: PageWalk) -> str:
    """What CR3 has to do with a walk that fails at its first table; empty for one that goes on."""
    if len(walk.entries) != 1:
        return ""
    cr3 = scene.special.cr3
    if walk.end == "outside RAM":
        return f"; that address is CR3's, {cr3:#x}"
    unused = 0x1F if walk.mode == "PAE" else 0xFFF
    ignored = unused & ~_CACHING
    if not cr3 & ignored or (scene.special.cr4 & CR4.PCIDE and scene.mode.long):
        return ""
    return (
        f"; CR3 is {cr3:#x}, and tables begin at multiples of {unused + 1:#x}: its low bits are no "
        "part of the address"
    )


def _cause(scene: Scene, walk: PageWalk, stack: bool) -> str:
    if _stack_is_in_tables(scene, walk):
        return "stack-in-page-tables"
    if walk.end == "page":
        return next(cause for words, cause in _REFUSALS if words in walk.why)
    if walk.mode == "2-level" and len(walk.entries) == 2 and (walk.entries[0].value or 0) & _PS:
        return "missing-pse"
    if _lacks_large_bit(scene, walk):
        return "missing-ps"
    if walk.end == "reserved bit":
        return "reserved-bit"
    if walk.end == "outside RAM":
        return "tables-outside-ram"
    if stack:
        rsp = scene.registers.rsp
        return "no-stack" if rsp < _NEAR_ZERO or rsp >= (1 << 64) - _NEAR_ZERO else "stack-unmapped"
    return "page-not-present"


def _lacks_large_bit(scene: Scene, walk: PageWalk) -> bool:
    """Whether the entry above was meant to map a large page: its "table" is no table.

    It has the address of the page that a walk to this address would be expected to come to, or
    what is at its address has no entry that is present.
    """
    if len(walk.entries) < 2:
        return False
    above, last = walk.entries[-2], walk.entries[-1]
    size = _BIG.get(last.name)
    if size is None or above.value is None:
        return False
    address = above.value & 0xF_FFFF_FFFF_F000
    if address % size:
        return False
    if address == walk.linear & -size:
        return True
    table = scene.read(address, _PAGE) or b""
    return not any(table[at] & 1 for at in range(0, len(table), 8))


def _stack_is_in_tables(scene: Scene, walk: PageWalk) -> bool:
    """Whether RSP, which is taken for a physical address if it leads nowhere, is in a table."""
    if not walk.entries or walk.end in ("page", "outside RAM"):
        return False
    rsp = scene.stack_address(0)
    physical = scene.walk(rsp, "read").physical
    top = rsp if physical is None else physical
    if top < _PAGE:
        return False  # a stack pointer of zero says nothing
    last = walk.entries[-1]
    table = last.address & -_PAGE
    if not table <= top <= last.address + 8 or top >= table + _PAGE:
        return False
    # An empty stack just below the tables points at their first entry: nothing was pushed there.
    return top != table
