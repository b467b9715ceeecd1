"""What an exercise is: its text, the runs that are made of the student's guest, and the checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, TypeAlias

from kvmpy.boot.segments import Image
from kvmpy.machine import Machine
from kvmpy.result import Result
from kvmpy.trace.record import Record
from kvmpy.views.cpumode import CpuMode, cpu_mode
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Case", "Check", "Exercise", "Finding", "Moment", "Run"]


class Finding(NamedTuple):
    """What a check found: whether it is as it should be, and in words what was seen.

    `look` says where to look, if not where the exercise says.
    """

    passed: bool
    text: str
    look: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the student's guest, and what the checks know of it.

    `about` tells the student what was special in this run: "with 'abc' as input". `input` comes
    in at the serial port, in pieces if it is a sequence of them: the next one whenever the port
    looks for more, and an empty one says that there is nothing yet. `prepare` is called with the
    machine when the guest is loaded, to attach devices or to write memory; what it returns is
    `Run.kept`. `expect` holds what the checks compare with. The run ends after `timeout` seconds or
    `max_exits` exits.
    """

    about: str = ""
    input: bytes | Sequence[bytes] = b""
    prepare: Callable[[Machine], object] | None = None
    expect: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 3.0
    max_exits: int = 20_000


class Moment(NamedTuple):
    """The processor when it wrote to the console: what it wrote, and its special registers."""

    data: bytes
    special: SpecialRegisters

    @property
    def mode(self) -> CpuMode:
        """The mode that the code ran in."""
        return cpu_mode(self.special)

    @property
    def ring(self) -> int:
        """The privilege level, which is DPL of SS (SDM Vol.3 25.4.1)."""
        return self.special.ss.dpl


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is over. The machine is still open: look at its registers, memory and views."""

    case: Case
    image: Image
    machine: Machine
    result: Result
    records: Sequence[Record]
    """Each exit, as `machine.trace` has them; the first 65536."""
    moments: Sequence[Moment]
    """Each write to the console; the first 4096."""
    kept: Any = None
    """What the case's `prepare` returned."""

    @property
    def console(self) -> bytes:
        """What the guest wrote to the debug console and the serial port."""
        return self.machine.console


Check: TypeAlias = Callable[[Run], Finding]


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise. `number` is "PAGE.N"; `page` its file in docs/; `text` what is to be done.

    `cases` makes the runs, with random numbers that are others each time, so that a guest cannot
    know what it will be asked. `mode` and `ring` are those that a flat binary starts in (a source
    and an ELF file say it themselves). `look` is where to look when a check fails. `needs` are
    probes (`kvmpy.probe`) without which this host cannot run the solution.
    """

    number: str
    title: str
    page: str
    text: str
    checks: tuple[Check, ...]
    look: str
    cases: Callable[[Random], Sequence[Case]] = lambda random: (Case(),)
    mode: str = "long"
    ring: int | None = None
    needs: tuple[str, ...] = ()
