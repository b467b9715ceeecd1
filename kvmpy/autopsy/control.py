"""What loading control registers, MSRs and segment registers raises.

Sources: SDM Vol.2 (MOV CR, WRMSR, MOV), Vol.3 2.5 (control registers), 4.4.1 (PAE), 10.8.5 (the
order in which long mode is entered).
"""

from typing import Final

from kvmpy.autopsy.debug import check_general_detect
from kvmpy.autopsy.fault import GP, UD, Fault
from kvmpy.autopsy.instruction import Instruction
from kvmpy.autopsy.scene import Scene
from kvmpy.autopsy.selectors import check_data, check_stack
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.x86.flags import CR0, CR4, EFER

__all__ = ["check_load", "check_move", "check_msr"]

_SEGMENTS: Final = ("ss", "ds", "es", "fs", "gs")
_NO_REGISTERS: Final = {f"cr{number}" for number in (1, 5, 6, 7, *range(9, 16))} | {
    f"dr{number}" for number in range(8, 16)
}
_DEBUG_ALIASES: Final = {"dr4", "dr5"}  # of DR6 and DR7, until CR4.DE is set
_EFER_MSR: Final = 0xC000_0080
_EFER_KNOWN: Final = sum(EFER)
_BASES: Final = {
    0xC000_0100: "FS.base", 0xC000_0101: "GS.base", 0xC000_0102: "KERNEL_GS_BASE",
    0xC000_0082: "LSTAR", 0xC000_0083: "CSTAR", 0x175: "SYSENTER_ESP", 0x176: "SYSENTER_EIP",
}  # fmt: skip
_CR4_KNOWN: Final = sum(CR4)


def check_load(scene: Scene, instruction: Instruction) -> Fault | None:
    """What POP of a segment register, LDS, LES, LFS, LGS or LSS raises."""
    if instruction.mnemonic == "pop":
        target = instruction.register_operand(0)
        slot = scene.stack_slot(0, instruction.stack_bytes)
        return check_segment(scene, target, slot) if target in _SEGMENTS else None
    at = instruction.memory_address() + instruction.far_offset_bytes
    return check_segment(scene, instruction.mnemonic[1:], scene.number(at, 2))


def check_segment(scene: Scene, name: str, selector: int | None) -> Fault | None:
    """What loading SS, DS, ES, FS or GS raises; nothing where the selector is not known."""
    if selector is None or not scene.special.cr0 & CR0.PE:
        return None
    if name == "ss":
        bits = scene.mode.bits
        return check_stack(scene, selector & 0xFFFF, scene.cpl, "loading SS with", bits=bits)
    return check_data(scene, selector & 0xFFFF, name)


def check_move(scene: Scene, instruction: Instruction) -> Fault | None:
    """What MOV to a segment or control register raises."""
    target = instruction.register_operand(0)
    if target == "cs":
        return Fault("invalid-opcode", "MOV cannot load CS: use a far jump or return", UD)
    if target in _SEGMENTS:
        return check_segment(scene, target, instruction.value(1, 2))
    if {target, instruction.register_operand(1)} & _NO_REGISTERS:
        return Fault("invalid-opcode", f"{instruction.text}: there is no such register", UD)
    aliases = {target, instruction.register_operand(1)} & _DEBUG_ALIASES
    if aliases and scene.special.cr4 & CR4.DE:
        name = aliases.pop().upper()
        why = f"{instruction.text} with CR4.DE (bit 3) set: {name} is reserved then"
        return Fault("invalid-opcode", why, UD)
    if "dr" in (target[:2], instruction.register_operand(1)[:2]):
        detected = check_general_detect(scene)
        if detected is not None:
            return detected
    if not target.startswith(("cr", "dr")):
        return None
    value = instruction.value(1) or 0
    if target in ("dr4", "dr5", "dr6", "dr7") and value >> 32:
        why = f"{target.upper()} = {value:#x}: bits 63 to 32 are reserved"
        return Fault("reserved-control-bit", why, GP, 0)
    if target == "cr0":
        return _cr0(scene, value)
    if target == "cr4":
        return _cr4(scene, value)
    if target == "cr3" and scene.mode.bits == 64:
        return _cr3(scene, value)
    if target == "cr8" and value > 15:
        return Fault("reserved-control-bit", f"CR8 = {value:#x} is above 15", GP, 0)
    return None


def _cr3(scene: Scene, value: int) -> Fault | None:
    bits = scene.physical_bits
    if value & (1 << 63) - (1 << bits):
        why = f"CR3 = {value:#x}: bits 62 to {bits} are reserved"
        return Fault("reserved-control-bit", why, GP, 0)
    if value >> 63 and not scene.special.cr4 & CR4.PCIDE:
        why = f"CR3 = {value:#x}: bit 63 is reserved while CR4.PCIDE is clear"
        return Fault("reserved-control-bit", why, GP, 0)
    return None


def _cr0(scene: Scene, value: int) -> Fault | None:
    special = scene.special
    text = f"CR0 = {value:#x}"
    if value >> 32:
        return Fault("reserved-control-bit", f"{text}: bits 63 to 32 are reserved", GP, 0)
    if value & CR0.PG and not value & CR0.PE:
        return Fault("pg-without-pe", f"{text} has PG set and PE clear", GP, 0)
    if value & CR0.NW and not value & CR0.CD:
        return Fault("reserved-control-bit", f"{text} has NW set and CD clear", GP, 0)
    if not value & CR0.PG:
        if special.cr0 & CR0.PG and scene.mode.bits == 64:
            return Fault("pg-cleared-in-64-bit", f"{text} clears PG in 64-bit code", GP, 0)
        return None
    if special.cr0 & CR0.PG:
        return None
    if special.efer & EFER.LME:
        if not special.cr4 & CR4.PAE:
            why = f"{text} sets PG with EFER.LME set and CR4.PAE clear"
            return Fault("pg-without-pae", why, GP, 0)
        if special.cs.l:
            return Fault("pg-in-64-bit-segment", f"{text} sets PG while CS.L is set", GP, 0)
        return None
    if special.cr4 & CR4.PAE:
        return _pae_entries(scene, text)
    return None


def _pae_entries(scene: Scene, text: str) -> Fault | None:
    """MOV to CR0 loads the four entries of a PAE PDPT, and checks them (SDM Vol.3 4.4.1)."""
    table = scene.special.cr3 & 0xFFFF_FFE0
    for number in range(4):
        raw = scene.read(table + 8 * number, 8)
        entry = int.from_bytes(raw or b"", "little")
        if entry & 1 and entry & 0x1E6:
            why = (
                f"{text} sets PG with EFER.LME clear, so that CR3 is taken for a PAE page-directory"
                f"-pointer table, and its entry {number}, {entry:#x}, has reserved bits set"
            )
            return Fault("pg-without-lme", why, GP, 0)
    return None


def _cr4(scene: Scene, value: int) -> Fault | None:
    text = f"CR4 = {value:#x}"
    unknown = value & ~_CR4_KNOWN
    if unknown:
        return Fault("reserved-control-bit", f"{text}: {unknown:#x} is reserved", GP, 0)
    if scene.mode.long and not value & CR4.PAE:
        return Fault("pae-cleared", f"{text} clears PAE in long mode", GP, 0)
    if scene.mode.long and (value ^ scene.special.cr4) & CR4.LA57:
        return Fault("reserved-control-bit", f"{text} changes LA57 in long mode", GP, 0)
    if value & CR4.PCIDE and not scene.mode.long:
        return Fault("reserved-control-bit", f"{text} sets PCIDE outside of long mode", GP, 0)
    if value & ~scene.special.cr4 & CR4.PCIDE and scene.special.cr3 & 0xFFF:
        why = f"{text} sets PCIDE while bits 11 to 0 of CR3, {scene.special.cr3:#x}, are not 0"
        return Fault("reserved-control-bit", why, GP, 0)
    return None


def check_msr(scene: Scene, name: str) -> Fault | None:
    """What RDMSR, WRMSR or XSETBV raises, as far as the architecture says."""
    if name == "xsetbv":
        return _xcr(scene)
    index = scene.register("ecx")
    value = scene.register("edx") << 32 | scene.register("eax")
    if name == "rdmsr":
        return None
    if index == _EFER_MSR:
        if value & ~_EFER_KNOWN:
            why = f"EFER = {value:#x}: {value & ~_EFER_KNOWN:#x} is reserved"
            return Fault("bad-msr", why, GP, 0)
        if scene.special.cr0 & CR0.PG and (value ^ scene.special.efer) & EFER.LME:
            word = "sets" if value & EFER.LME else "clears"
            return Fault("lme-with-paging", f"wrmsr {word} EFER.LME while CR0.PG is set", GP, 0)
    elif index in _BASES and not is_canonical(value, canonical_bits(scene.special)):
        return Fault("non-canonical", f"{_BASES[index]} = {value:#x} is not canonical", GP, 0)
    return None


def _xcr(scene: Scene) -> Fault | None:
    """XSETBV's value (SDM Vol.1 13.3)."""
    number = scene.register("ecx")
    value = scene.register("edx") << 32 | scene.register("eax")
    text = f"XCR{number} = {value:#x}"
    why = ""
    if number:
        why = f"{text}: ECX names the register, and there is only XCR0"
    elif not value & 1:
        why = f"{text}: bit 0 (x87) must be set"
    elif value & 6 == 4:
        why = f"{text} sets bit 2 (AVX) without bit 1 (SSE)"
    elif value & 0xE0 and value & 0xE6 != 0xE6:
        why = f"{text}: bits 5 to 7 (AVX-512) go together, and with bits 1 and 2"
    return Fault("reserved-control-bit", why, GP, 0) if why else None
