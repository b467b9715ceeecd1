"""What became of one input of many (see `kvmpy.runs` and `kvmpy.map`)."""

from reprlib import repr as shortened
from typing import Any, Final, Generic, NamedTuple, TypeVar

from kvmpy.machine import Machine
from kvmpy.result import CRASHES
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.registers import Registers

__all__ = ["Outcome"]

_T = TypeVar("_T")


class Outcome(NamedTuple, Generic[_T]):
    """What became of one input.

    `outcome`, `detail` and `value` are as in `Result`; `exception` is what ring-3 code raised.
    `packed` are the general registers at the end; after an exception rip, rsp and rflags are those
    of the code that raised it. `machine` is the machine as the run has left it:
    good for a look until the next outcome is asked for. `collected` are the bytes that were asked
    for, and `touched` the addresses of the pages that differed from the snapshot at the end.

    `console` is what `Machine.console` was at the end, where that was asked for.

    From `kvmpy.map`, and after pickling, `machine` is None: it lives in another process, or is at
    another input by now. Two more outcomes come from there only: "error", where Python code raised
    `error` (a device, the function that writes the input), and "worker-died", where that input has
    ended its worker process each time. `packed` is empty for both.
    """

    input: _T
    outcome: str
    detail: str
    value: int | None
    exception: GuestException | None
    packed: bytes
    collected: bytes
    machine: Machine | Any  # Any, not None: who calls `runs` need not ask each time
    touched: frozenset[int] = frozenset()
    error: BaseException | None = None
    console: bytes = b""

    @property
    def registers(self) -> Registers:
        """The general registers at the end."""
        return Registers.unpack(self.packed)

    @property
    def crashed(self) -> bool:
        """Whether the guest died of its own fault."""
        return self.outcome in CRASHES

    def __repr__(self) -> str:
        """One line, whatever the size of the input and of what was collected."""
        text = f"<Outcome {self.outcome}"
        if self.detail:
            text += f" ({self.detail})"
        text += f", input {shortened(self.input)}"
        if self.packed:
            text += f", rip {self.registers.rip:#x}"
        if self.collected:
            text += f", {len(self.collected)} bytes collected"
        if self.touched:
            text += f", {len(self.touched)} page{'s' * (len(self.touched) > 1)} touched"
        if self.error is not None:
            text += f", {shortened(self.error)}"
        return text + ">"

    def __reduce__(self) -> tuple[Any, ...]:
        return Outcome, (*self[:_MACHINE], None, *self[_MACHINE + 1 :])


_MACHINE: Final = Outcome._fields.index("machine")
