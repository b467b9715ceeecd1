"""What became of an exception: its gate, its stack, and the faults on the way to the handler.

Sources: SDM Vol.3 6.12 to 6.14 (delivery), 6.15, table 6-5 (what makes a double fault).
"""

from dataclasses import replace
from typing import Final, NamedTuple

from kvmpy.autopsy.fault import DOUBLE_FAULT, GP, NP, PF, SS, TS, Fault
from kvmpy.autopsy.memory import page_fault
from kvmpy.autopsy.scene import Scene
from kvmpy.autopsy.selectors import check_descriptor, check_mark
from kvmpy.views.descriptors import look_up
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.views.gates import Gate, gate_at
from kvmpy.views.taskstate import tss_view
from kvmpy.x86.exceptions import ERROR_CODE_VECTORS, EXCEPTIONS
from kvmpy.x86.flags import CR0
from kvmpy.x86.segments import Segment

__all__ = ["Chain", "chain", "deliver"]

_CONTRIBUTORY: Final = frozenset((0, TS, NP, SS, GP))
# Asked for, but by no INT n, INT3 or INTO: EXT is set (SDM Vol.3 6.13).
_NO_SOFTWARE: Final = (1, 6)
_LONGEST: Final = 6  # a chain has four at most: #UD, #GP, #DF, and what stops that
_GATE_CAUSES: Final = (
    ("not present: #NP", "gate-not-present"),
    ("empty", "empty-gate"),
    ("not a gate", "wrong-gate"),
    ("not canonical", "non-canonical"),
    ("selector", "gate-selector"),
    ("segment", "gate-selector"),
)


class Chain(NamedTuple):
    """A first fault and those that its delivery led to, and whether they shut the processor down.

    Where they do not, the last of them was delivered: a handler has run.
    """

    faults: tuple[Fault, ...]
    shuts_down: bool


def chain(scene: Scene, first: Fault) -> Chain:
    """Deliver `first`, what that raises, and so on, as the processor would."""
    faults, current = [first], first
    while len(faults) < _LONGEST and current.vector is not None:
        problem = deliver(scene, current)
        if problem is None:
            break
        if problem.vector is None:  # no exception: the host cannot go on
            return Chain((*faults, problem), True)
        if current.vector == DOUBLE_FAULT:
            faults.append(problem)
            return Chain(tuple(faults), True)
        if _doubles(current.vector, problem.vector):
            faults.append(
                replace(problem, why=f"{problem.why}; that makes it a double fault (#DF)")
            )
            current = Fault(problem.cause, problem.why, DOUBLE_FAULT, 0)
        else:
            faults.append(problem)
            current = problem
    return Chain(tuple(faults), False)


def _doubles(first: int, second: int | None) -> bool:
    if first in _CONTRIBUTORY:
        return second in _CONTRIBUTORY
    return first == PF and (second in _CONTRIBUTORY or second == PF)


def deliver(scene: Scene, fault: Fault) -> Fault | None:
    """Why an exception cannot reach its handler, None where it can."""
    assert fault.vector is not None
    name = EXCEPTIONS.get(fault.vector, (f"vector {fault.vector:#x}",))[0]
    error = fault.vector << 3 | 2 | (not fault.deliberate or fault.vector in _NO_SOFTWARE)
    table = _table_fault(scene, fault.vector, name, error)
    if table is not None:
        return table
    gate = gate_at(scene.read, scene.special, fault.vector)
    if not scene.special.cr0 & CR0.PE:
        return None
    asked = fault.deliberate and fault.vector not in _NO_SOFTWARE
    if asked and gate.kind.endswith("gate") and gate.dpl < scene.cpl:
        # Looked at right after the type, before P and the selector (SDM Vol.2 INT n).
        why = (
            f"the IDT's gate of {name} has DPL {gate.dpl}: INT n of ring {scene.cpl} may not use it"
        )
        return Fault("gate-dpl", why, GP, error)
    if gate.problem:
        return _descriptor_fault(scene, gate, name) or _gate_fault(gate, name, error)
    if gate.kind == "task gate":
        return None  # not looked into
    handler = look_up(scene.read, scene.special, gate.selector).segment
    if handler is None:
        return None
    problem = _stack_fault(scene, fault, gate, handler, name)
    if problem is None and not handler.type & 1:
        problem = check_mark(scene, gate.selector, "accessed")
    return problem


def _table_fault(scene: Scene, vector: int, name: str, error: int) -> Fault | None:
    special = scene.special
    size = 16 if scene.mode.long else 8 if special.cr0 & CR0.PE else 4
    last = vector * size + size - 1
    if last > special.idt.limit:
        none = special.idt.limit < size
        why = f"no IDT is loaded (IDTR's limit is {special.idt.limit:#x})"
        if not none:
            why = (
                f"the gate of {name} ends at byte {last:#x} of the IDT, beyond its limit "
                f"{special.idt.limit:#x}"
            )
        return Fault("no-idt" if none else "idt-limit", why, GP, error)
    for at in (vector * size, last):
        walk = scene.walk(special.idt.base + at, "read", cpl=0)
        if not walk.allowed:
            what = f"reading the gate of {name} in the IDT at {special.idt.base + at:#x}"
            return page_fault(scene, walk, what, stack=False)
        if not walk.in_ram:
            why = f"the IDT at {special.idt.base:#x} is not in RAM: its gates read as ones"
            return Fault("idt-outside-ram", why, GP, error)
    return None


def _descriptor_fault(scene: Scene, gate: Gate, name: str) -> Fault | None:
    """What reading the handler's descriptor raises, where the table is in no page."""
    if "segment" not in gate.problem:
        return None
    what = f"reading the descriptor that the gate of {name} names,"
    return check_descriptor(scene, gate.selector, what=what)


def _gate_fault(gate: Gate, name: str, error: int) -> Fault:
    cause = next(cause for words, cause in _GATE_CAUSES if words in gate.problem)
    text, _, vector = gate.problem.rpartition(": ")
    if cause == "gate-selector":
        error = gate.selector & 0xFFFC | 1
    why = f"the IDT's gate of {name} is {text}" if cause != "gate-selector" else (
        f"the IDT's gate of {name} names selector {gate.selector:#x}: {text}"
    )  # fmt: skip
    return Fault(cause, why, NP if vector == "#NP" else GP, error)


def _stack_fault(
    scene: Scene, fault: Fault, gate: Gate, handler: Segment, name: str
) -> Fault | None:
    """What pushing the frame raises."""
    conforming = bool(handler.type & 4)
    ring = scene.cpl if conforming else handler.dpl
    inward = ring < scene.cpl
    top, where, problem = _stack_top(scene, gate, ring, inward)
    if problem is not None:
        return problem
    size = 8 if scene.mode.long else 4 if "32" in gate.kind else 2
    words = 5 if scene.mode.long or inward else 3
    words += fault.vector in ERROR_CODE_VECTORS and not fault.deliberate
    if scene.mode.long:
        top &= ~15
    mask = (1 << 64) - 1 if scene.mode.long else 0xFFFF_FFFF
    for at in (top - size & mask, top - words * size & mask):
        what = f"pushing the frame of {name} to {at:#x} ({where})"
        if scene.mode.long and not is_canonical(at, canonical_bits(scene.special)):
            return Fault("non-canonical", f"{what}, which is not canonical", SS, 0, at)
        walk = scene.walk(at, "write", cpl=ring)
        if not walk.allowed:
            problem = page_fault(scene, walk, what, stack=True)
            if inward and top == 0 and not gate.ist:
                problem = problem.because("no-rsp0", f"the TSS's RSP{ring} is 0")
            elif gate.ist and top == 0:
                problem = problem.because("no-ist", f"the TSS's IST{gate.ist} is 0")
            return problem
        if not walk.in_ram:
            return Fault("delivery-exit", f"{what}, where there is no RAM", address=at)
    return None


def _stack_top(scene: Scene, gate: Gate, ring: int, inward: bool) -> tuple[int, str, Fault | None]:
    """The stack pointer that the frame goes below, what it is called, and why there is none."""
    if not inward and not gate.ist:
        return scene.stack_address(0), "RSP" if scene.mode.long else "SS:ESP", None
    view = tss_view(scene.read, scene.special)
    field = f"ist{gate.ist}" if gate.ist else f"rsp{ring}" if view.bits == 64 else f"esp{ring}"
    if field not in view.fields:
        problem = "; ".join(view.problems) or f"the TSS has no {field.upper()}"
        why = f"there is no stack for ring {ring}: {problem}"
        return 0, "", Fault("no-tss", why, TS, view.selector & 0xFFFC)
    top, base = view.fields[field], 0
    if view.bits == 32:
        stack = look_up(scene.read, scene.special, view.fields[f"ss{ring}"]).segment
        base = stack.base if stack is not None else 0
    return base + top, f"the TSS's {field.upper()}", None
