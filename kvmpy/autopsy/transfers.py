"""Far jumps and calls, far returns, IRET, INT n: what they raise before they go anywhere."""

from collections.abc import Sequence
from typing import Final

from kvmpy.autopsy.fault import GP, PF, Fault
from kvmpy.autopsy.instruction import Instruction
from kvmpy.autopsy.scene import Scene
from kvmpy.autopsy.selectors import check_code, check_stack
from kvmpy.views.descriptors import look_up
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.x86.flags import CR0, RFLAGS, may_be_rflags

__all__ = ["check_transfer"]

_IRET: Final = "IRET pops RIP, CS, RFLAGS, RSP, SS"


def check_transfer(scene: Scene, instruction: Instruction) -> Fault | None:
    """What a jump, call or return raises, beyond its accesses to memory."""
    name = instruction.mnemonic
    if instruction.is_far:
        return _far(scene, instruction) if scene.special.cr0 & CR0.PE else None
    if name in ("retf", "retfq"):
        return _return(scene, instruction) if scene.special.cr0 & CR0.PE else None
    if name.startswith("iret"):
        return _interrupt_return(scene, instruction) if scene.special.cr0 & CR0.PE else None
    target: int | None = None
    if name in ("jmp", "call") and instruction.operands:
        target = instruction.value(0)
    elif name == "ret":
        target = scene.stack_slot(0, instruction.operand_bytes)
    if target is not None and scene.mode.bits != 64:
        return _near(scene, name, target & (1 << 8 * instruction.operand_bytes) - 1)
    bits = canonical_bits(scene.special)
    if target is None or is_canonical(target & (1 << 64) - 1, bits):
        return None
    why = f"{name} goes to {target:#x}, which is not canonical"
    if name != "ret":
        return Fault("non-canonical", why, GP, 0)
    slot = f"it is what the stack has at {scene.stack_address(0):#x}"
    return Fault("bad-return", f"{why}: {slot}", GP, 0)


def _near(scene: Scene, name: str, target: int) -> Fault | None:
    limit = scene.special.cs.limit
    if target <= limit:
        return None
    why = f"{name} goes to {target:#x}, beyond CS's limit {limit:#x}"
    return Fault("segment-limit", why, GP, 0)


def _far(scene: Scene, instruction: Instruction) -> Fault | None:
    if instruction.memory_operands:
        at, size = instruction.memory_address(), instruction.far_offset_bytes
        offset, selector = scene.number(at, size), scene.number(at + size, 2)
    else:
        selector, offset = instruction.value(0), instruction.value(1)
    if selector is None or offset is None:
        return None
    return check_code(scene, selector, offset, "it goes to", back=False)


def _return(scene: Scene, instruction: Instruction) -> Fault | None:
    size = instruction.stack_bytes
    rip, cs = scene.stack_slot(0, size), scene.stack_slot(1, size)
    if rip is None or cs is None:
        return None
    return _frame(scene, (rip, cs), "RETF pops RIP, then CS", size)


def _frame(scene: Scene, words: Sequence[int], layout: str, size: int) -> Fault | None:
    rip, cs = words[0], words[1] & 0xFFFF
    fault = check_code(scene, cs, rip, "the frame has the", back=True)
    own = ("not-present-segment", "non-canonical", "wrong-ring")
    if fault is None or fault.vector == PF or fault.cause in own:
        return fault
    slip = _slip(scene, words, size)
    note = _frame_words(words, layout)
    return fault.because("bad-frame", f"{note} ({slip})" if slip else note)


def _slip(scene: Scene, words: Sequence[int], size: int) -> str:
    """What mistake it was, where the frame looks like that of a usual one."""
    if scene.mode.bits == 64 and size == 4 and _is_code(scene, scene.stack_slot(1, 8) or 0):
        return "it has words of 8 bytes, and this pops words of 4: IRETQ and LRETQ pop 8"
    whole = len(words) == 5
    if whole and _is_code(scene, words[2]) and may_be_rflags(words[3]):
        return "it begins a word later: an error code, or what was pushed last, is still there"
    swapped = _is_code(scene, words[0])
    if whole and swapped and may_be_rflags(words[1]) and not may_be_rflags(words[2]):
        return f"it begins a word earlier: {words[0]:#x} would be CS, and RIP was popped already"
    return f"{words[0]:#x} would be a code selector: the two are swapped" if swapped else ""


def _is_code(scene: Scene, word: int) -> bool:
    segment = look_up(scene.read, scene.special, word & 0xFFFF).segment
    return bool(0 < word & ~3 < 0x10000 and segment is not None and segment.s and segment.type & 8)


def _frame_words(words: Sequence[int], layout: str) -> str:
    return f"{layout}; the frame is {', '.join(f'{word:#x}' for word in words)}"


def _interrupt_return(scene: Scene, instruction: Instruction) -> Fault | None:
    size = instruction.stack_bytes
    if scene.registers.rflags & RFLAGS.NT and not scene.mode.long:
        return None  # a return from a nested task: not looked into
    rip, cs, flags = (scene.stack_slot(number, size) for number in range(3))
    if rip is None or cs is None or flags is None:
        return None
    if flags & RFLAGS.VM and not scene.cpl and not scene.mode.long and size == 4:
        return None  # to virtual-8086 mode, whose selectors are no selectors
    if scene.registers.rflags & RFLAGS.NT:
        return Fault("nested-task", "IRET with RFLAGS.NT set: long mode has no tasks", GP, 0)
    whole = scene.mode.bits == 64 or cs & 3 != scene.cpl  # else it pops no stack
    words = [scene.stack_slot(number, size) for number in range(5 if whole else 3)]
    known = [word for word in words if word is not None]
    fault = _frame(scene, known, _IRET, size)
    if fault is not None:
        return fault
    code = look_up(scene.read, scene.special, cs & 0xFFFF).segment
    ring, long_code = cs & 3, bool(code and code.l) and scene.mode.long
    if scene.mode.bits != 64 and ring == scene.cpl:
        return None  # it does not pop SS
    ss = scene.stack_slot(4, size)
    if ss is None:
        return None
    fault = check_stack(scene, ss & 0xFFFF, ring, "the frame has the", bits=64 if long_code else 32)
    if fault is None or fault.vector == PF:
        return fault
    return fault.because("bad-stack-segment", _frame_words(known, _IRET))
