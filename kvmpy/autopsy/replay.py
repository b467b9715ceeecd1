"""Running a copy of the guest to its end once more, the last part of it instruction by instruction.

The copy is the caller's to make, anew for each pass: a first pass counts the exits to the end, and
a second one stops before the last of them and single-steps from there. Both have a deadline.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final, Protocol

from kvmpy.autopsy.instruction import decode
from kvmpy.autopsy.scene import Scene
from kvmpy.errors import KvmpyError
from kvmpy.exits import (
    Debug,
    Exit,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from kvmpy.vcpu import VCPU

__all__ = ["MOST_STEPS", "Copy", "MakeCopy", "Replay", "replay_copy"]

MOST_STEPS: Final = 10_000
"""Instructions that are stepped at most: some 50 us each."""
_SECONDS: Final = 1.5  # for each pass
_KEPT: Final = 6  # instructions and exits that are told


class Ending(Protocol):
    """How a copy ended: what a `Result` says."""

    @property
    def outcome(self) -> str:
        """A key of kvmpy.result.OUTCOMES."""

    @property
    def exits(self) -> Mapping[str, int]:
        """Exits by kind."""


class Copy(Protocol):
    """What is asked of a copy of the machine."""

    @property
    def cpus(self) -> list[VCPU]:
        """Its vCPUs."""

    def run(self, timeout: float | None = None, max_exits: int | None = None) -> Ending:
        """Run it."""

    def exits(self, timeout: float | None = None, max_exits: int | None = None) -> Iterator[Exit]:
        """Run it and see its exits."""


MakeCopy = Callable[[], AbstractContextManager[Copy]]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay has seen: the state before the last instruction, and lines on what came before.

    `scene` is None where the end was not reached, and `note` says why.
    """

    scene: Scene | None
    last: tuple[str, ...]
    note: str
    steps: int = 0


def replay_copy(
    make: MakeCopy,
    dead: Scene,
    outcome: str,
    scene_of: Callable[[Copy], Scene],
    *,
    reset: bool = False,
) -> Replay:
    """Run copies to the same end; never longer than a few seconds.

    `dead` is the state at that end, unless the processor has `reset` it.
    """
    try:
        with make() as copy:
            ending = copy.run(timeout=_SECONDS)
        count = sum(ending.exits.values())
        if ending.outcome != outcome:
            return Replay(None, (), f"a copy of the guest ended otherwise ({ending.outcome}): it "
                          "depends on input, time or devices")  # fmt: skip
        with make() as copy:
            return _step(copy, count, dead, scene_of, reset)
    except KvmpyError as error:
        return Replay(None, (), f"a copy of the guest could not be run: {error}")


def _step(
    copy: Copy, count: int, dead: Scene, scene_of: Callable[[Copy], Scene], reset: bool
) -> Replay:
    cpu = copy.cpus[0]
    seen = max(0, count - 1 - _KEPT)
    if seen:
        copy.run(timeout=_SECONDS, max_exits=seen)
    last = []
    if count - 1 - seen:
        last = [_say(exit_) for exit_ in copy.exits(_SECONDS, count - 1 - seen)]
    cpu.finish()
    cpu.set_guest_debug(single_step=True)
    trail: deque[Scene] = deque(maxlen=_KEPT)
    codes: dict[tuple[int, int], bytes] = {}  # the tables may be gone when they are told
    deadline = time.monotonic() + _SECONDS
    for steps in range(MOST_STEPS):
        scene = scene_of(copy)
        at = (scene.special.cr3, scene.linear)
        if at not in codes:
            codes[at] = scene.instruction_bytes
        trail.append(replace(scene, code=codes[at]))
        left = deadline - time.monotonic()
        exit_ = cpu.run(max(0.0, left))
        if isinstance(exit_, Shutdown | InternalError):
            if not reset and scene.linear != dead.linear:
                note = "single-stepping a copy of the guest changed what it does"
                return Replay(None, tuple(last), note)
            # The copy is closed then, and its RAM at the end is that of the dead one.
            scene = replace(scene, read=dead.read)
            return Replay(scene, (*last, *map(_told, list(trail)[:-1])), "", steps + 1)
        if isinstance(exit_, Interrupted):
            return Replay(None, tuple(last), "stepping a copy of the guest took too long", steps)
        if not isinstance(exit_, Debug):
            return Replay(None, tuple(last), f"a copy of the guest left its way: {_say(exit_)}")
    note = f"the guest ran more than {MOST_STEPS} instructions after its last exit"
    return Replay(None, tuple(last), note, MOST_STEPS)


def _say(exit_: Exit) -> str:
    match exit_:
        case PortIn(port=port, size=size):
            return f"in: {size} bytes from port {port:#x}"
        case PortOut(port=port, values=values):
            return f"out: {values[0]:#x} to port {port:#x}"
        case MmioRead(address=address, size=size):
            return f"mmio: read of {size} bytes at {address:#x}"
        case MmioWrite(address=address, value=value):
            return f"mmio: write of {value:#x} at {address:#x}"
        case _:
            return str(exit_)


def _told(scene: Scene) -> str:
    instruction = decode(scene)
    return f"{scene.registers.rip:#x}: {instruction.text if instruction else '(no instruction)'}"
