"""Instructions that raise by themselves: traps, privilege, disabled units, bad operands.

Sources: SDM Vol.2 (each instruction's exceptions), Vol.3 2.8, 5.9 (privileged instructions), 13.1.
"""

from typing import Final

from kvmpy.autopsy.alignment import SSE
from kvmpy.autopsy.control import check_load, check_move, check_msr
from kvmpy.autopsy.fault import GP, NM, UD, Fault
from kvmpy.autopsy.instruction import Instruction
from kvmpy.autopsy.scene import Scene
from kvmpy.autopsy.selectors import check_system
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.views.taskstate import tss_view
from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS

__all__ = ["check_instruction", "check_privilege"]

_PRIVILEGED: Final = frozenset(
    [
        "hlt",
        "lgdt",
        "lidt",
        "lldt",
        "ltr",
        "lmsw",
        "clts",
        "invd",
        "wbinvd",
        "invlpg",
        "invpcid",
        "rdmsr",
        "wrmsr",
        "swapgs",
        "sysexit",
        "sysexitq",
        "sysret",
        "sysretq",
        "xsetbv",
        "monitor",
        "mwait",
    ]
)
_UMIP: Final = ("sgdt", "sidt", "sldt", "smsw", "str")
_IO: Final = frozenset(("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd"))
_XSAVE: Final = ("xsetbv", "xgetbv", "xsave", "xrstor")
_FS_GS_BASE: Final = ("rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase")
_TRAPS: Final = {"int3": 3, "into": 4, "int1": 1}
_WITHOUT_STATE: Final = frozenset(
    [
        "prefetcht0",
        "prefetcht1",
        "prefetcht2",
        "prefetchnta",
        "lfence",
        "mfence",
        "sfence",
        "clflush",
        "pause",
        "movnti",
        "crc32",
        "popcnt",
        "monitor",
        "mwait",
    ]
)


def check_instruction(scene: Scene, instruction: Instruction) -> Fault | None:
    """What the instruction raises whatever memory it touches."""
    name = instruction.mnemonic
    if name in _TRAPS and (name != "into" or scene.registers.rflags & RFLAGS.OF):
        vector = _TRAPS[name]
        return Fault("trap", f"{name} raises it on purpose", vector, deliberate=True)
    if name == "int":
        number = instruction.value(0) or 0
        return Fault("trap", f"int {number:#x} asks for vector {number:#x}", number,
                     deliberate=True)  # fmt: skip
    if name in ("ud0", "ud1", "ud2"):
        return Fault("trap", f"{name} raises it on purpose", UD, deliberate=True)
    fault = (
        _enabled(scene, name) or check_privilege(scene, instruction) or _units(scene, instruction)
    )
    if fault is not None:
        return fault
    if name == "mov" and instruction.operands:
        return check_move(scene, instruction)
    if name in ("pop", "lds", "les", "lfs", "lgs", "lss"):
        return check_load(scene, instruction)
    if name in ("wrmsr", "rdmsr", "xsetbv"):
        return check_msr(scene, name)
    if name in ("wrfsbase", "wrgsbase"):
        return _base(scene, instruction)
    if name in ("ltr", "lldt"):
        selector = instruction.value(0, 2)
        register = "TR" if name == "ltr" else "LDTR"
        return None if selector is None else check_system(scene, selector & 0xFFFF, register)
    if name in ("lgdt", "lidt"):
        return _table_register(scene, instruction)
    if name in ("div", "idiv"):
        return _divide(scene, instruction)
    if name == "aam" and instruction.raw[-1] == 0:
        return Fault("divide-error", "aam divides AL by zero", 0)
    return None


def _enabled(scene: Scene, name: str) -> Fault | None:
    """What is no instruction until a bit is set, in every ring (SDM Vol.2 XSETBV, SYSCALL)."""
    if name.startswith(_XSAVE) and not scene.special.cr4 & CR4.OSXSAVE:
        return Fault("not-enabled", f"{name} with CR4.OSXSAVE (bit 18) clear", UD)
    if name in ("syscall", "sysret", "sysretq") and not scene.special.efer & EFER.SCE:
        return Fault("not-enabled", f"{name} with EFER.SCE (bit 0) clear", UD)
    if name in _FS_GS_BASE and not scene.special.cr4 & CR4.FSGSBASE:
        return Fault("not-enabled", f"{name} with CR4.FSGSBASE (bit 16) clear", UD)
    return None


def check_privilege(scene: Scene, instruction: Instruction) -> Fault | None:
    """What an instruction raises that this ring may not use."""
    name, cpl = instruction.mnemonic, scene.cpl
    if not cpl:
        return None
    special, iopl = scene.special, scene.registers.rflags >> 12 & 3
    registers = {instruction.register_operand(0)[:2], instruction.register_operand(1)[:2]}
    if name in _PRIVILEGED or (name == "mov" and registers & {"cr", "dr"}):
        return Fault("privileged", f"{name} in ring {cpl}: only ring 0 may", GP, 0)
    if name in ("cli", "sti") and iopl < cpl:
        return Fault("privileged", f"{name} in ring {cpl} with IOPL {iopl}", GP, 0)
    if name == "rdpmc" and not special.cr4 & CR4.PCE:
        return Fault("privileged", f"rdpmc in ring {cpl} with CR4.PCE clear", GP, 0)
    if name in ("rdtsc", "rdtscp") and special.cr4 & CR4.TSD:
        return Fault("privileged", f"{name} in ring {cpl} with CR4.TSD set", GP, 0)
    if name in _UMIP and special.cr4 & CR4.UMIP:
        return Fault("privileged", f"{name} in ring {cpl} with CR4.UMIP set", GP, 0)
    if name in _IO and iopl < cpl:
        return _port(scene, instruction)
    return None


def _port(scene: Scene, instruction: Instruction) -> Fault | None:
    """What the I/O permission bitmap says (SDM Vol.1 19.5.2)."""
    name, operands = instruction.mnemonic, instruction.operands
    if name in ("in", "out"):
        data, number = (0, 1) if name == "in" else (1, 0)
        size, port = operands[data].size, instruction.value(number) or 0
    else:
        size, port = {"b": 1, "w": 2, "d": 4}[name[-1]], scene.register("dx")
    opened = tss_view(scene.read, scene.special).ports
    if any(first <= port and port + size - 1 <= last for first, last in opened):
        return None
    why = f"{instruction.text} to port {port:#x} in ring {scene.cpl}, which the TSS does not open"
    return Fault("port-closed", why, GP, 0)


def _units(scene: Scene, instruction: Instruction) -> Fault | None:
    """Whether x87, SSE or AVX are switched off."""
    special, name = scene.special, instruction.mnemonic
    if name in _WITHOUT_STATE:
        return None
    if any(group.startswith("avx") for group in instruction.groups):
        if not special.cr4 & CR4.OSXSAVE:
            why = f"{name} is AVX, and CR4.OSXSAVE is clear"
            return Fault("avx-disabled", why, UD)
    elif instruction.groups & SSE:
        if special.cr0 & CR0.EM:
            return Fault("sse-disabled", f"{name} is SSE, and CR0.EM is set", UD)
        if not special.cr4 & CR4.OSFXSR:
            return Fault("sse-disabled", f"{name} is SSE, and CR4.OSFXSR is clear", UD)
    elif not instruction.groups & {"fpu", "mmx"}:
        return None
    elif special.cr0 & CR0.EM:
        vector = UD if "mmx" in instruction.groups else NM
        return Fault("fpu-disabled", f"{name} is x87 or MMX, and CR0.EM is set", vector)
    if special.cr0 & CR0.TS:
        return Fault("fpu-disabled", f"{name} with CR0.TS set", NM)
    return None


def _table_register(scene: Scene, instruction: Instruction) -> Fault | None:
    if scene.mode.bits != 64:
        return None
    base = scene.number(instruction.memory_address() + 2, 8)
    if base is None or is_canonical(base, canonical_bits(scene.special)):
        return None
    why = f"{instruction.mnemonic} of the base {base:#x}, which is not canonical"
    return Fault("non-canonical", why, GP, 0)


def _base(scene: Scene, instruction: Instruction) -> Fault | None:
    value = instruction.value(0) or 0
    if is_canonical(value, canonical_bits(scene.special)):
        return None
    why = f"{instruction.mnemonic} of {value:#x}, which is not canonical"
    return Fault("non-canonical", why, GP, 0)


def _divide(scene: Scene, instruction: Instruction) -> Fault | None:
    divisor = instruction.value(0)
    size = instruction.operands[0].size
    if divisor is None:
        return None
    bits = 8 * size
    divisor &= (1 << bits) - 1
    if not divisor:
        return Fault("divide-error", f"{instruction.text} divides by zero", 0)
    if size == 1:
        dividend = scene.register("ax")
    else:
        low, high = {2: ("ax", "dx"), 4: ("eax", "edx"), 8: ("rax", "rdx")}[size]
        dividend = scene.register(high) << bits | scene.register(low)
    if instruction.mnemonic == "idiv":
        quotient = _quotient(_signed(dividend, 2 * bits), _signed(divisor, bits))
        fits = -(1 << bits - 1) <= quotient < 1 << bits - 1
    else:
        quotient = dividend // divisor
        fits = quotient < 1 << bits
    if fits:
        return None
    why = f"{instruction.text}: the quotient {quotient:#x} does not fit {bits} bits"
    return Fault("divide-error", why, 0)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _quotient(dividend: int, divisor: int) -> int:
    """The quotient, rounded towards zero as the processor does."""
    quotient = abs(dividend) // abs(divisor)
    return quotient if (dividend < 0) == (divisor < 0) else -quotient
