"""The diagnosis from a dead guest's state: the first fault, its chain, and the cause."""

from dataclasses import replace
from typing import Final, NamedTuple

from kvmpy.autopsy.alignment import alignment
from kvmpy.autopsy.codesize import may_be_meant, wrong_size
from kvmpy.autopsy.debug import asked_for, check_breakpoint, check_single_step
from kvmpy.autopsy.delivery import chain
from kvmpy.autopsy.fault import GP, UD, Fault
from kvmpy.autopsy.instruction import Instruction, decode
from kvmpy.autopsy.memory import check_fetch, check_touch
from kvmpy.autopsy.mnemonics import is_hint, is_too_long
from kvmpy.autopsy.scene import Scene
from kvmpy.autopsy.system import check_instruction
from kvmpy.autopsy.transfers import check_transfer
from kvmpy.autopsy.zeros import check_zeros, zeros_before
from kvmpy.x86.flags import CR0, RFLAGS

__all__ = ["Finding", "describe", "explain_gap", "explain_shutdown", "first_fault", "unseen"]

_REFUSED: Final = (
    "neither its operands nor the units that it needs are at fault: the processor, or the host's "
    "KVM, has refused the instruction itself; its #UD and #GP conditions are in SDM Vol.2"
)
_TOO_LONG: Final = "its prefixes make it longer than the 15 bytes that an instruction may have"
_INTERRUPT: Final = 0x20  # where most guests' hardware interrupts begin


class Finding(NamedTuple):
    """The cause, the faults in order, the instruction's text, and whether it fits the outcome.

    `rip` is where the instruction is, if RIP is past it.
    """

    cause: str
    faults: tuple[Fault, ...]
    instruction: str
    settled: bool
    notes: tuple[str, ...] = ()
    rip: int | None = None


def first_fault(scene: Scene) -> tuple[Fault | None, Instruction | None]:
    """What the instruction at RIP raises, and the instruction."""
    fault = check_breakpoint(scene)
    if fault is not None:
        return fault, decode(scene)
    fault = check_fetch(scene)
    if fault is not None:
        return fault, None
    instruction = decode(scene)
    if instruction is not None and scene.mode.bits != 64:
        last = scene.registers.rip + len(instruction.raw) - 1
        limit = scene.special.cs.limit
        if last > limit:
            why = f"{instruction.text} ends at {last:#x}, beyond CS's limit {limit:#x}"
            return Fault("segment-limit", why, GP, 0), instruction
    if instruction is None:
        code = scene.instruction_bytes
        beyond = scene.walk(scene.linear + len(code), "fetch")
        if len(code) < 15 and not beyond.allowed:
            what = f"the instruction at rip {scene.registers.rip:#x} goes on in another page"
            return Fault("page-not-present", f"{what}: {beyond.why}", 14, beyond.error_code), None
        if is_hint(code):
            return None, None
        if is_too_long(code):
            return Fault("invalid-opcode", f"{code[:8].hex(' ')} ...: {_TOO_LONG}", GP, 0), None
        why = f"{code[:8].hex(' ')} is no instruction in {scene.mode}"
        return Fault("invalid-opcode", why, UD), None
    return _raised(scene, instruction), instruction


def _raised(scene: Scene, instruction: Instruction) -> Fault | None:
    fault = check_instruction(scene, instruction)
    if fault is not None:
        return fault
    multiple = alignment(instruction)
    for touch in instruction.touches():
        if touch.linear % multiple:
            why = f"{touch.what}, which is no multiple of {multiple}"
            return Fault("unaligned", why, GP, 0, touch.linear)
        fault = check_touch(scene, touch)
        if fault is not None:
            return fault
    return check_transfer(scene, instruction)


def _cause_of(scene: Scene, faults: tuple[Fault, ...]) -> tuple[str, tuple[str, ...]]:
    """The cause that counts, and notes: a trap's is that nobody handled it."""
    first = faults[0]
    cause = first.cause
    if first.deliberate and len(faults) > 1:
        cause = faults[1].cause
    size = wrong_size(scene)
    if size and not may_be_meant(scene):
        return "wrong-code-size", (size,)
    zeros = check_zeros(scene)
    if zeros is not None:
        return zeros
    return cause, (f"{size}, which may be meant",) if size else ()


def explain_shutdown(scene: Scene) -> Finding:
    """A triple fault, from the state that it left."""
    fault, instruction = first_fault(scene)
    text = describe(scene, instruction)
    if fault is None:
        fault = check_single_step(scene) or unseen(scene, instruction)
    if fault is None:
        return _after_trap(scene) or _interrupted(scene, text)
    faults, shuts_down = chain(scene, fault)
    cause, notes = _cause_of(scene, faults)
    notes += zeros_before(scene) if instruction is None and not notes else ()
    return Finding(cause, faults, text, shuts_down, notes)


def _after_trap(scene: Scene) -> Finding | None:
    """INT3 or INT n just before RIP, where that could not be delivered: some hosts are past it."""
    asked = asked_for(scene)
    fault, instruction = first_fault(asked) if asked is not None else (None, None)
    if asked is None or fault is None or not fault.deliberate:
        return None
    faults, shuts_down = chain(scene, fault)
    if not shuts_down:
        return None
    text = describe(asked, instruction)
    return Finding(faults[1].cause, faults, text, True, rip=asked.registers.rip)


def _interrupted(scene: Scene, text: str) -> Finding:
    """An instruction that raises nothing: if it was an interrupt, it went as its delivery does."""
    why = "nothing in the instruction raises an exception: an interrupt, if any"
    event = Fault("trap", why, _INTERRUPT, deliberate=True)
    faults, shuts_down = chain(scene, event)
    if not shuts_down or not scene.registers.rflags & RFLAGS.IF:
        return Finding("unknown", (), text, False, (_REFUSED,) if shuts_down else ())
    faults = (replace(event, vector=None), *faults[1:])
    return Finding(faults[1].cause, faults, text, False)


def unseen(scene: Scene, instruction: Instruction | None) -> Fault | None:
    """What an instruction has raised that nothing but the processor can know."""
    if instruction is None:
        return None
    name = instruction.mnemonic
    if name in ("rdmsr", "wrmsr"):
        index = scene.register("ecx")
        value = scene.register("edx") << 32 | scene.register("eax")
        word = f"of {value:#x} to" if name == "wrmsr" else "of"
        why = f"{name} {word} MSR {index:#x}, which the host's KVM refuses"
        return Fault("bad-msr", why, GP, 0)
    if name in ("sysenter", "sysexit", "sysexitq"):
        why = f"{name}, most likely with IA32_SYSENTER_CS (MSR 0x174) null, as it is at a reset"
        return Fault("not-enabled", why, GP, 0)
    if name in ("vmcall", "vmmcall"):
        why = f"{name}, which the host's KVM takes for no hypercall"
        return Fault("invalid-opcode", why, UD)
    if name == "rdpmc":
        why = f"rdpmc of counter {scene.register('ecx'):#x}, which the host's KVM refuses"
        return Fault("bad-counter", why, GP, 0)
    target = instruction.register_operand(0)
    if name != "mov" or not target.startswith("cr"):
        return None
    value = instruction.value(1) or 0
    if (
        target == "cr0"
        and value & CR0.PG
        and not scene.special.cr0 & CR0.PG
        and not scene.mode.long
    ):
        why = f"CR0 = {value:#x} sets PG outside of long mode, which this host's KVM refuses"
        return Fault("host-lacks-paging", why, GP, 0)
    why = f"{target.upper()} = {value:#x}, which the host's KVM refuses"
    return Fault("reserved-control-bit", why, GP, 0)


def explain_gap(scene: Scene, reason: str, suberror: int) -> Finding:
    """An internal error: KVM could not go on."""
    fault = check_fetch(scene)
    if fault is not None:
        notes = _where_from(scene) or zeros_before(scene)
        return Finding(fault.cause, (fault,), describe(scene, None), True, notes)
    instruction = decode(scene)
    text = describe(scene, instruction)
    if suberror == 3:
        return Finding("delivery-exit", (Fault("delivery-exit", reason),), text, True)
    size = wrong_size(scene)
    gap = Fault("emulator-lacks", f"{text.partition(' (')[0]}: {reason}")
    if size and not may_be_meant(scene):
        return Finding("wrong-code-size", (gap,), text, True, (size,))
    zeros = check_zeros(scene)
    if zeros is not None:
        return Finding(zeros[0], (gap,), text, True, zeros[1])
    if instruction is not None:
        raised = check_instruction(scene, instruction)
        if raised is not None and not raised.deliberate:
            note = f"where it is emulated it raises {raised.name}: {raised.why}"
            return Finding("emulator-lacks", (gap,), text, True, (note,))
        raised = raised or check_transfer(scene, instruction)
        if raised is not None and not raised.deliberate:
            # Far transfers to what is no code segment are among what emulators do not carry out.
            note = f"a processor raises {raised.name}, and this host's KVM stops: {reason}"
            return Finding(raised.cause, (raised,), text, True, (note,))
    return Finding("emulator-lacks", (gap,), text, True)


def _where_from(scene: Scene) -> tuple[str, ...]:
    """A note where the stack tells how the guest came to RIP."""
    if scene.mode.bits == 64 and scene.stack_slot(-1, 8) == scene.registers.rip:
        return ("the word below RSP is RIP: a RET has popped it, so look at who pushed it",)
    return ()


def describe(scene: Scene, instruction: Instruction | None) -> str:
    """The instruction, or the bytes at RIP, with the mode and the ring."""
    if instruction is not None:
        return f"{instruction.text} ({scene.mode}, ring {scene.cpl})"
    code = scene.instruction_bytes
    shown = f"{code[:8].hex(' ')}" if code else "no code"
    return f"{shown} ({scene.mode}, ring {scene.cpl})"
