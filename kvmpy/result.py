"""What a run came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmpy.exits import Exit
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.registers import Registers

__all__ = ["CRASHES", "OUTCOMES", "Result"]

OUTCOMES = {
    "halt": "the guest executed HLT",
    "reset": "the guest asked for a reset",
    "power-off": "the guest switched the machine off",
    "ended": "the guest wrote to a device that ends the run",
    "debug-exit": "the guest wrote to the debug-exit device",
    "shutdown": "triple fault: an exception while delivering an exception could not be delivered",
    "internal-error": "KVM could not go on",
    "fail-entry": "the processor refused to enter the guest in this state",
    "unclaimed": "the guest touched what no device claims",
    "exception": "the guest's ring-3 code raised an exception",
    "timeout": "the time given to the run was over",
    "max-exits": "the number of exits given to the run was reached",
    "stopped": "stop() was called",
    "ready": "the guest told its harness that it is ready for inputs",
    "crash": "the guest told its harness of a crash",
}
"""The outcomes of a run and what each means. A run can also end by an exit that belongs to
nothing in the machine, such as a breakpoint; its outcome is then that exit's kind."""

CRASHES = ("shutdown", "internal-error", "fail-entry", "unclaimed", "exception", "crash")
"""The outcomes of guests that died of their own fault."""


@dataclass(frozen=True, slots=True)
class Result(Shown):
    """One run of one vCPU; in a notebook, a table of its exits and the registers at its end.

    `outcome` is one of `OUTCOMES`; `detail` says more, in words, where there is more.
    `exits` counts this run's exits by kind, whoever served them; `seconds` is its duration.
    `value` is what the guest wrote to the debug-exit device, `exception` what its ring-3 code
    raised, `exit` the exit that ended the run, each None where there was none. `unclaimed` are
    lines on accesses nobody claimed.
    """

    outcome: str
    packed: bytes = field(repr=False)
    """struct kvm_regs, of which `registers` makes something when it is asked for."""
    seconds: float
    exits: Mapping[str, int] = field(default_factory=dict)
    detail: str = ""
    value: int | None = None
    exception: GuestException | None = None
    exit: Exit | None = None
    unclaimed: tuple[str, ...] = ()

    @property
    def registers(self) -> Registers:
        """The general registers at the end."""
        return Registers.unpack(self.packed)

    @property
    def crashed(self) -> bool:
        """Whether the guest died of its own fault."""
        return self.outcome in CRASHES

    def __str__(self) -> str:
        text = OUTCOMES.get(self.outcome, self.outcome)
        total = sum(self.exits.values())
        end = f" ({self.detail})" if self.detail else ""
        return f"{self.outcome}: {text}{end}; {total} exits in {self.seconds:.6f} s"

    def grids(self) -> tuple[Grid, ...]:
        """What happened, exits by kind, and the registers; a line of `str` says it in short."""
        from kvmpy.views.registers import RegistersView  # only a result that is shown needs it

        rows = [(kind, f"{count:,}") for kind, count in self.exits.items()]
        said = Grid(str(self), ("exit", "count"), rows, self.unclaimed)
        return (said, *RegistersView(self.registers).grids()[:1])
