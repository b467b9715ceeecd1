"""The diagnosis of an exception out of ring 3 that a reporting stub has told of.

What it was is known then: its vector, error code and address. What remains is why.
"""

from dataclasses import replace
from typing import Final

from kvmpy.autopsy.debug import before_trap, check_single_step
from kvmpy.autopsy.examine import Finding, describe, first_fault, unseen
from kvmpy.autopsy.fault import GP, PF, UD, Fault
from kvmpy.autopsy.instruction import Instruction
from kvmpy.autopsy.memory import page_fault
from kvmpy.autopsy.scene import Scene
from kvmpy.autopsy.system import check_privilege
from kvmpy.autopsy.zeros import check_zeros, zeros_before
from kvmpy.views.pages import Access
from kvmpy.x86.exceptions import EXCEPTIONS, GuestException

__all__ = ["explain_exception"]

_DB, _MF, _AC, _XM = 1, 16, 17, 19
_WRITE, _FETCH = 1 << 1, 1 << 4  # of a page fault's error code (SDM Vol.3 4.7)
_CONTROL: Final = {_MF: "x87's control word (FNINIT sets it)", _XM: "MXCSR (0x1f80 masks all)"}


def explain_exception(scene: Scene, exception: GuestException) -> Finding:
    """Why the exception was raised: `scene` is that of ring 3."""
    asked = before_trap(scene, exception.vector)
    if asked is not None:
        fault, instruction = first_fault(asked)
        if fault is not None and fault.deliberate and fault.vector == exception.vector:
            text = describe(asked, instruction)
            return Finding(fault.cause, (fault,), text, True, rip=asked.registers.rip)
    fault, instruction = first_fault(scene)
    text = describe(scene, instruction)
    if fault is None or fault.vector != exception.vector:
        fault = _by_vector(scene, instruction, exception, fault)
    if fault is None:
        why = f"{EXCEPTIONS.get(exception.vector, ('', 'an interrupt'))[1]}, as the frame says"
        found = Fault("unknown", why, exception.vector, exception.error_code, exception.address)
        return Finding("unknown", (found,), text, True)
    zeros = check_zeros(scene)
    cause, notes = zeros if zeros is not None else (fault.cause, ())
    notes += zeros_before(scene) if instruction is None and not notes else ()
    return Finding(cause, (fault,), text, True, notes)


def _by_vector(
    scene: Scene,
    instruction: Instruction | None,
    exception: GuestException,
    expected: Fault | None,
) -> Fault | None:
    """The fault with that vector, where the instruction alone does not lead to it."""
    vector = exception.vector
    if vector == UD:
        return _refused(scene, instruction, expected)
    if vector == PF:
        return _page_fault(scene, instruction, exception)
    if vector == _DB:
        return check_single_step(scene)
    if vector in _CONTROL:
        why = f"an error that is not masked in {_CONTROL[vector]}"
        return Fault("floating-point", why, vector)
    if instruction is None:
        return None
    if vector == _AC:
        return _alignment(instruction)
    fault = unseen(scene, instruction)
    if fault is None and vector == GP:
        fault = check_privilege(scene, instruction)
    return fault if fault is not None and fault.vector == vector else None


def _refused(scene: Scene, instruction: Instruction | None, expected: Fault | None) -> Fault:
    """A #UD: where another exception was to be expected, a host that emulates has made it one."""
    if expected is None or expected.vector is None:
        text = describe(scene, instruction)
        return Fault("invalid-opcode", f"neither processor nor host take it: {text}", UD)
    name = EXCEPTIONS.get(expected.vector, (f"vector {expected.vector:#x}",))[0]
    cause = "invalid-opcode" if expected.deliberate else expected.cause
    why = f"{expected.why}; a processor raises {name} then, and this host #UD"
    return Fault(cause, why, UD, address=expected.address)


def _page_fault(
    scene: Scene, instruction: Instruction | None, exception: GuestException
) -> Fault | None:
    """By CR2 and the error code: of gathers and masked moves no more is known."""
    error, address = exception.error_code or 0, exception.address
    if address is None:
        return None
    access: Access = "fetch" if error & _FETCH else "write" if error & _WRITE else "read"
    walk = scene.walk(address, access)
    if walk.allowed or walk.end == "not canonical":
        return None
    name = instruction.mnemonic if instruction is not None else "the guest"
    word = {"fetch": "fetches", "write": "writes to", "read": "reads"}[access]
    found = page_fault(scene, walk, f"{name} {word} {address:#x}", stack=False)
    return replace(found, error_code=error)


def _alignment(instruction: Instruction) -> Fault | None:
    for touch in instruction.touches():
        if touch.linear % touch.size:
            why = f"{touch.what}, which is no multiple of {touch.size}, with RFLAGS.AC set"
            return Fault("unaligned", why, _AC, 0, touch.linear)
    return None
