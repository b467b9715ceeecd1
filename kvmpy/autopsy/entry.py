"""Rules of VM entry that a guest's registers can break, for a host that refused to enter it.

Source: SDM Vol.3 27.3.1.1 (control registers), 27.3.1.2 (segments), 27.3.1.4 (RIP, RFLAGS). Those
of AMD's VMRUN (APM Vol.2 15.5.1) are fewer, and among them.
"""

from collections.abc import Iterator

from kvmpy.autopsy.scene import Scene
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS, RFLAGS_RESERVED
from kvmpy.x86.state import SpecialRegisters

__all__ = ["broken_rules"]


def broken_rules(scene: Scene) -> list[str]:
    """What is wrong with the registers, a sentence each; empty where nothing is found."""
    special = scene.special
    return [
        *_control(special),
        *_segments(special, bool(scene.registers.rflags & RFLAGS.VM)),
        *_rest(scene),
    ]


def _control(special: SpecialRegisters) -> Iterator[str]:
    cr0, cr4, efer = special.cr0, special.cr4, special.efer
    paging, long_mode = bool(cr0 & CR0.PG), bool(efer & EFER.LMA)
    if paging and not cr0 & CR0.PE:
        yield "CR0.PG is set and CR0.PE is clear"
    if cr0 & CR0.NW and not cr0 & CR0.CD:
        yield "CR0.NW is set and CR0.CD is clear"
    if long_mode and not cr4 & CR4.PAE:
        yield "EFER.LMA is set and CR4.PAE is clear"
    if long_mode and not paging:
        yield "EFER.LMA is set and CR0.PG is clear"
    if paging and long_mode != bool(efer & EFER.LME):
        yield "with paging on, EFER.LMA and EFER.LME differ"
    if cr4 & CR4.PCIDE and not long_mode:
        yield "CR4.PCIDE is set outside of long mode"
    if special.cr3 >> 52 & 0x7FF:
        yield f"CR3 {special.cr3:#x} has reserved bits set"


def _segments(special: SpecialRegisters, virtual_8086: bool) -> Iterator[str]:
    cs, ss, tr = special.cs, special.ss, special.tr
    long_mode = bool(special.efer & EFER.LMA)
    if tr.unusable or not tr.present or tr.type not in (3, 11):
        yield f"TR holds no busy TSS (type {tr.type:#x})"
    elif long_mode and tr.type != 11:
        yield "TR holds a 16-bit TSS in long mode"
    if virtual_8086 or not special.cr0 & CR0.PE:
        return
    if not cs.s or not cs.type & 8:
        yield f"CS {cs.selector:#x} is no code segment (type {cs.type:#x})"
    if not cs.present or cs.unusable:
        yield f"CS {cs.selector:#x} is not present"
    if long_mode and cs.l and cs.db:
        yield "CS.L and CS.D are both set"
    if not cs.type & 4 and cs.dpl != ss.dpl:
        yield f"CS.DPL {cs.dpl} and SS.DPL {ss.dpl} differ"
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"):
        segment = getattr(special, name)
        if segment.unusable:
            continue
        low, high = segment.limit & 0xFFF, segment.limit >> 20
        if (segment.g and low != 0xFFF) or (not segment.g and high):
            yield f"{name.upper()}'s limit {segment.limit:#x} does not fit G = {segment.g}"
    if not ss.unusable and (not ss.s or ss.type & 9 != 1 or not ss.type & 2):
        yield f"SS {ss.selector:#x} is no accessed, writable data (type {ss.type:#x})"


def _rest(scene: Scene) -> Iterator[str]:
    rip, rflags, special = scene.registers.rip, scene.registers.rflags, scene.special
    long_code = special.efer & EFER.LMA and special.cs.l
    if long_code and not is_canonical(rip, canonical_bits(special)):
        yield f"RIP {rip:#x} is not canonical"
    if not long_code and rip >> 32:
        yield f"RIP {rip:#x} is above 4 GiB outside of 64-bit code"
    if not rflags & RFLAGS.FIXED:
        yield "RFLAGS bit 1 is clear"
    if rflags & RFLAGS_RESERVED:
        yield f"RFLAGS {rflags:#x} has reserved bits set"
    if special.efer & EFER.LMA and rflags & RFLAGS.VM:
        yield "RFLAGS.VM is set in long mode"
