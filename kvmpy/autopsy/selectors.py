"""Why a selector cannot be loaded: into CS by far transfers, into data segments, TR, LDTR.

Sources: SDM Vol.2 (MOV, JMP, CALL, RET, IRET, LTR, LLDT: exceptions), Vol.3 5.5 to 5.8.
"""

from kvmpy.autopsy.fault import GP, NP, SS, Fault, selector_error
from kvmpy.autopsy.memory import page_fault
from kvmpy.autopsy.scene import Scene
from kvmpy.views.descriptors import Descriptor, look_up
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.x86.segments import Segment

__all__ = [
    "check_code",
    "check_data",
    "check_descriptor",
    "check_mark",
    "check_stack",
    "check_system",
]

_BUSY, _AVAILABLE, _LDT = (3, 11), (1, 9), 2
_CALL_GATES = (4, 12)


def check_descriptor(scene: Scene, selector: int, *, size: int = 8, what: str = "") -> Fault | None:
    """The #PF that reading a descriptor raises; nothing where it is beyond its table's limit.

    The processor reads it as a supervisor, whatever the ring (SDM Vol.3 4.6.1).
    """
    local, start = bool(selector & 4), selector & ~7
    table = scene.special.ldt if local else scene.special.gdt
    absent = local and (scene.special.ldt.unusable or not scene.special.ldt.present)
    if absent or start + size - 1 > table.limit:
        return None
    name, address = "LDT" if local else "GDT", table.base + start
    for linear in (address, address + size - 1):  # the first byte first: CR2 has its address
        walk = scene.walk(linear, "read", cpl=0)
        if not walk.allowed:
            words = what or f"reading descriptor {start:#x}"
            return page_fault(scene, walk, f"{words} in the {name} at {address:#x}", stack=False)
    return None


def _found(scene: Scene, selector: int, what: str) -> Descriptor | Fault:
    """The descriptor, or the #PF or #GP that looking it up raises."""
    unmapped = check_descriptor(scene, selector)
    if unmapped is not None:
        return unmapped
    found = look_up(scene.read, scene.special, selector)
    error = selector_error(selector)
    if found.kind in ("none", "cut off"):
        table = "ldt-limit" if selector & 4 else "gdt-limit"
        why = f"{what} selector {selector:#x}: {found.problem}"
        if found.kind == "cut off" and not found.raw:
            base = (scene.special.ldt if selector & 4 else scene.special.gdt).base
            base += selector & ~7
            why = f"{what} selector {selector:#x}: its descriptor at {base:#x} is not in RAM"
        return Fault(table, why, GP, error)
    return found


def check_code(scene: Scene, selector: int, offset: int, what: str, *, back: bool) -> Fault | None:
    """What loading CS by a far jump or call, or (`back`) by RETF or IRET, raises."""
    if not selector & ~3:
        return Fault("null-selector", f"{what} code selector {selector:#x}, which is null", GP, 0)
    found = _found(scene, selector, f"{what} code")
    if isinstance(found, Fault):
        return found
    error = selector_error(selector)
    text = f"{what} code selector {selector:#x}, which is {found.kind}"
    segment = found.segment
    if segment is None or not segment.s or not segment.type & 8:
        gate = found.target is not None and not back
        tss = segment is not None and not segment.s and segment.type in (*_AVAILABLE, *_BUSY)
        if (gate and found.raw[5] & 0xF in _CALL_GATES) or (tss and not scene.mode.long):
            return None  # a call gate or a task: not looked into
        where = "" if any(found.raw) else f": {_table(scene, selector)} has zeros there"
        return Fault("not-code", f"{text}, no code segment{where}", GP, error)
    if scene.mode.long and segment.l and segment.db:
        return Fault("descriptor-bits", f"{text}: L and D are both set", GP, error)
    if _wrong_ring(selector & 3, segment, scene.cpl, back):
        rings = f"DPL {segment.dpl}, RPL {selector & 3}, but the current ring is {scene.cpl}"
        why = f"{text}: {rings}"
        return Fault("wrong-ring", why, GP, error)
    if not segment.present:
        why = f"{what} code selector {selector:#x}, whose descriptor is not present (P = 0)"
        return Fault("not-present-segment", why, NP, error)
    if scene.mode.long and segment.l:
        if not is_canonical(offset, canonical_bits(scene.special)):
            return Fault("non-canonical", f"{what} {offset:#x}, which is not canonical", GP, 0)
    elif offset & 0xFFFF_FFFF > segment.limit:
        why = f"{what} {offset:#x}, beyond the code segment's limit {segment.limit:#x}"
        return Fault("segment-limit", why, GP, 0)
    return None if segment.type & 1 else check_mark(scene, selector, "accessed")


def check_mark(scene: Scene, selector: int, bit: str) -> Fault | None:
    """The #PF of setting a descriptor's accessed or busy bit in a page that is read-only."""
    table = scene.special.ldt if selector & 4 else scene.special.gdt
    address = table.base + (selector & ~7)
    walk = scene.walk(address, "write", cpl=0)
    if walk.allowed or walk.end != "page":
        return None
    what = f"setting the {bit} bit of descriptor {selector & ~7:#x} at {address:#x}"
    return page_fault(scene, walk, what, stack=False)


def _table(scene: Scene, selector: int) -> str:
    name, table = ("LDT", scene.special.ldt) if selector & 4 else ("GDT", scene.special.gdt)
    return f"the {name} at {table.base:#x}, limit {table.limit:#x},"


def _wrong_ring(rpl: int, segment: Segment, cpl: int, back: bool) -> bool:
    conforming = bool(segment.type & 4)
    if back:
        return rpl < cpl or (segment.dpl > rpl if conforming else segment.dpl != rpl)
    if conforming:
        return segment.dpl > cpl
    return rpl > cpl or segment.dpl != cpl


def check_stack(scene: Scene, selector: int, cpl: int, what: str, *, bits: int) -> Fault | None:
    """What loading SS raises, for code of `bits` at ring `cpl`."""
    if not selector & ~3:
        if bits == 64 and cpl != 3 and selector & 3 == cpl:
            return None
        why = f"{what} stack selector {selector:#x}, which is null"
        return Fault("null-selector", why, GP, 0)
    found = _found(scene, selector, f"{what} stack")
    if isinstance(found, Fault):
        return found
    error, segment = selector_error(selector), found.segment
    if segment is None or not segment.s or segment.type & 8 or not segment.type & 2:
        why = f"{what} stack selector {selector:#x}, which is {found.kind}, not writable data"
        return Fault("segment-rights", why, GP, error)
    if selector & 3 != cpl or segment.dpl != cpl:
        why = (
            f"{what} stack selector {selector:#x}: DPL {segment.dpl} and RPL {selector & 3} must "
            f"both be {cpl}"
        )
        return Fault("wrong-ring", why, GP, error)
    if not segment.present:
        why = f"{what} stack selector {selector:#x}, whose descriptor is not present (P = 0)"
        return Fault("not-present-segment", why, SS, error)
    return None if segment.type & 1 else check_mark(scene, selector, "accessed")


def check_data(scene: Scene, selector: int, name: str) -> Fault | None:
    """What loading DS, ES, FS or GS raises."""
    if not selector & ~3:
        return None
    found = _found(scene, selector, f"loading {name.upper()} with the")
    if isinstance(found, Fault):
        return found
    error, segment = selector_error(selector), found.segment
    text = f"loading {name.upper()} with selector {selector:#x}, which is {found.kind}"
    if segment is None or not segment.s or (segment.type & 8 and not segment.type & 2):
        return Fault("segment-rights", f"{text}: not readable", GP, error)
    conforming = segment.type & 12 == 12
    if not conforming and max(selector & 3, scene.cpl) > segment.dpl:
        why = f"{text}: DPL {segment.dpl} is below ring {max(selector & 3, scene.cpl)}"
        return Fault("wrong-ring", why, GP, error)
    if not segment.present:
        why = f"loading {name.upper()} with selector {selector:#x}, whose descriptor is not present"
        return Fault("not-present-segment", why, NP, error)
    return None if segment.type & 1 else check_mark(scene, selector, "accessed")


def check_system(scene: Scene, selector: int, register: str) -> Fault | None:
    """What LTR or LLDT raises."""
    what = f"loading {register} with"
    if not selector & ~3:
        if register == "LDTR":
            return None
        return Fault("null-selector", f"{what} selector {selector:#x}, which is null", GP, 0)
    error = selector_error(selector)
    if selector & 4:
        why = f"{what} selector {selector:#x}, which is in the LDT (bit 2 is set)"
        return Fault("wrong-descriptor", why, GP, error)
    found = _found(scene, selector, f"{what} the")
    if isinstance(found, Fault):
        return found
    segment = found.segment
    wanted = (_LDT,) if register == "LDTR" else (9,) if scene.mode.long else _AVAILABLE
    if segment is None or segment.s or segment.type not in wanted:
        busy = register == "TR" and segment is not None and not segment.s and segment.type in _BUSY
        why = f"{what} selector {selector:#x}, which is {found.kind}"
        return Fault("tss-busy" if busy else "wrong-descriptor", why, GP, error)
    if not segment.present:
        why = f"{what} selector {selector:#x}, whose descriptor is not present (P = 0)"
        return Fault("not-present-segment", why, NP, error)
    upper = check_descriptor(scene, selector, size=16) if scene.mode.long else None
    if upper is not None:
        return upper
    if scene.mode.long and len(found.raw) < 16:
        return Fault("gdt-limit", f"{what} selector {selector:#x}: {found.problem}", GP, error)
    if not is_canonical(segment.base, canonical_bits(scene.special)):
        why = f"{what} selector {selector:#x}, whose base {segment.base:#x} is not canonical"
        return Fault("non-canonical", why, GP, error)
    return check_mark(scene, selector, "busy") if register == "TR" else None
