"""An autopsy from its parts: the diagnosis, and a replay where that does not settle it."""

from collections.abc import Callable, Sequence
from typing import Final

from kvmpy.autopsy.autopsy import Autopsy
from kvmpy.autopsy.doubt import contradiction
from kvmpy.autopsy.entry import broken_rules
from kvmpy.autopsy.examine import Finding, explain_gap, explain_shutdown
from kvmpy.autopsy.fault import Fault
from kvmpy.autopsy.recursion import recursion
from kvmpy.autopsy.replay import Copy, MakeCopy, Replay, replay_copy
from kvmpy.autopsy.reported import explain_exception
from kvmpy.autopsy.scene import Scene
from kvmpy.exits import Exit, FailEntry, InternalError
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.flags import CR0

__all__ = ["OUTCOMES", "conduct"]

OUTCOMES: Final = ("shutdown", "internal-error", "fail-entry", "exception")
"""The outcomes that there is something to find out about."""

_ARRIVALS: Final = ("no-ram", "executing-zeros", "fell-off-code", "invalid-opcode", "nx")
_INIT: Final = "the processor has reset the vCPU (as after INIT): its state at the end is gone"


def conduct(
    scene: Scene,
    outcome: str,
    exit_: Exit | None,
    exception: GuestException | None,
    *,
    last: Sequence[str] = (),
    make_copy: MakeCopy | None = None,
    scene_of: Callable[[Copy], Scene] | None = None,
    cheap: bool = False,
) -> Autopsy:
    """Explain an end of `OUTCOMES`; any other gives the cause "unknown" and says so.

    `make_copy` gives copies of the machine as it was before the run, and `scene_of` their state.
    `cheap` says that a replay takes next to no time: then it is done for what came before alone.
    """
    reset = outcome == "shutdown" and _is_reset(scene)
    finding = Finding("unknown", (), _INIT, False) if reset else _find(
        scene, outcome, exit_, exception
    )  # fmt: skip
    dead, notes = scene, list(finding.notes)
    seen: Replay | None = None
    arrival = finding.cause in _ARRIVALS or finding.instruction.startswith("no code")
    needed = not finding.settled or arrival
    if outcome in ("shutdown", "internal-error") and (needed or cheap):
        if make_copy is not None and scene_of is not None:
            seen = replay_copy(make_copy, scene, outcome, scene_of, reset=reset)
            notes += [seen.note] if seen.note and needed else []
        elif not finding.settled:
            notes.append("no snapshot to replay from: take one before the run to know more")
    if seen is not None and seen.scene is not None and (reset or not finding.settled):
        scene = seen.scene
        again = _find(scene, outcome, exit_, exception)
        if again.faults or reset:
            notes = [note for note in notes if note not in finding.notes]
            finding = again
        notes += again.notes
        if reset:
            notes.append(f"{_INIT}; this is that of a copy, before its last instruction")
    known = outcome in ("shutdown", "exception") and not reset
    doubt = contradiction(dead, finding.faults) if known else ""
    again_and_again = recursion(scene) if outcome in ("shutdown", "internal-error") else ""
    notes += [note for note in (doubt, again_and_again) if note]
    return Autopsy(
        cause=finding.cause,
        outcome=outcome,
        rip=scene.registers.rip if finding.rip is None else finding.rip,
        instruction=finding.instruction,
        faults=finding.faults,
        last=(*last, *(seen.last if seen is not None else ())),
        notes=tuple(dict.fromkeys(notes)),
        replayed=seen is not None and seen.scene is not None,
        certain=finding.settled and not doubt,
    )


def _is_reset(scene: Scene) -> bool:
    """Whether it is the state after INIT (SDM Vol.3 table 9-1), as AMD leaves it at a shutdown."""
    cs, registers = scene.special.cs, scene.registers
    return (
        not scene.special.cr0 & CR0.PE
        and registers.rip == 0xFFF0
        and cs.selector == 0xF000
        and cs.base == 0xFFFF_0000
    )


def _find(
    scene: Scene, outcome: str, exit_: Exit | None, exception: GuestException | None
) -> Finding:
    if outcome == "shutdown":
        return explain_shutdown(scene)
    if outcome == "internal-error" and isinstance(exit_, InternalError):
        return explain_gap(scene, exit_.reason, exit_.suberror)
    if outcome == "exception" and exception is not None:
        return explain_exception(scene, exception)
    if outcome == "fail-entry":
        rules = broken_rules(scene)
        why = "; ".join(rules) or "none of the rules that kvmpy checks is broken"
        if isinstance(exit_, FailEntry):
            why += f" (hardware reason {exit_.hardware_reason:#x})"
        fault = Fault("bad-entry-state", why)
        return Finding("bad-entry-state", (fault,), "VM entry", bool(rules))
    note = f"the guest ended with {outcome}: no crash that leaves something to find out"
    return Finding("unknown", (), note, True)
