"""What one instruction did, as values, and as lines of text."""

from dataclasses import dataclass
from typing import NamedTuple

from kvmpy.exits import (
    Exit,
    Halt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from kvmpy.stepping.transitions import Transition
from kvmpy.views.cpumode import CpuMode
from kvmpy.views.show import Grid, Shown

__all__ = ["Change", "MemoryValue", "Step", "exit_words"]

_MOST_BYTES = 16


class Change(NamedTuple):
    """A register, or a flag, that an instruction changed."""

    name: str
    before: int
    after: int


class MemoryValue(NamedTuple):
    """A memory operand: `size` bytes at a linear address, before and after the instruction.

    `access` is "read", "write" or "read-write". The bytes are None where they are not in RAM, and
    `before` also for what a push has overwritten.
    """

    address: int
    size: int
    access: str
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True, slots=True)
class Step(Shown):
    """One step of one vCPU.

    `address` is RIP before it, `linear` that through CS. `data` and `text` are the instruction's
    bytes and disassembly, empty where they could not be read or where `native` says that ring-3
    code ran on its own, through any number of instructions, up to the next exit. `changes` are
    registers and flags. `exits` are those that the step gave, served already. `outcome`, `detail`
    and `value` are as in `Result`, and empty unless the step was the guest's last one. `note` says
    in words what is not as one would expect.
    """

    number: int
    mode: CpuMode
    ring: int
    address: int
    linear: int
    symbol: str
    data: bytes
    text: str
    changes: tuple[Change, ...] = ()
    memory: tuple[MemoryValue, ...] = ()
    transitions: tuple[Transition, ...] = ()
    exits: tuple[Exit, ...] = ()
    outcome: str = ""
    detail: str = ""
    value: int | None = None
    note: str = ""
    native: bool = False

    def grids(self) -> tuple[Grid, ...]:
        """The instruction, and below it what it did."""
        first, *rest = self.lines(diff=True)
        return (Grid(first, notes=tuple(line.strip() for line in rest)),)

    def lines(self, diff: bool = False) -> list[str]:
        """The step as text; with `diff`, a line for each change, with the value before."""
        text = self.text or ("(native)" if self.native else "(no instruction)")
        line = f"{self.number:>5}  {self.address:08x}  {self.symbol:<16}  "
        line += f"{self.data.hex(' '):<23}  {text}"
        if self.changes and not diff:
            line = f"{line:<88}  " + " ".join(f"{c.name}={c.after:#x}" for c in self.changes)
        below = []
        if diff:
            below += [f"{c.name}: {c.before:#x} -> {c.after:#x}" for c in self.changes]
        # Of operands that are a device's, the exits say it all.
        there = (one for one in self.memory if not self.exits or one.before or one.after)
        below += map(_memory_words, there)
        # A signal is no exit of the guest's: the outcome says what it was for.
        below += [exit_words(one) for one in self.exits if not isinstance(one, Interrupted)]
        below += [self.note] if self.note else []
        below += map(str, self.transitions)
        if self.outcome:
            below.append(f"the guest ends: {self.outcome}{f' ({self.detail})' * bool(self.detail)}")
        return [line.rstrip(), *(f"         {text}" for text in below)]


def _memory_words(value: MemoryValue) -> str:
    where = f"[{value.address:#x}]"
    before, after = _number(value.before), _number(value.after)
    if value.access == "read":
        return f"{where} is {before}"
    if value.before is None:
        return f"{where} = {after}"
    return f"{where}: {before} -> {after}" if before != after else f"{where} stays {after}"


def _number(data: bytes | None) -> str:
    if data is None:
        return "(no RAM)"
    if len(data) > _MOST_BYTES:
        return data[:_MOST_BYTES].hex(" ") + " ..."
    words = (data[at : at + 8] for at in range(0, len(data), 8))
    return ", ".join(f"{int.from_bytes(word, 'little'):#x}" for word in words)


def exit_words(exit_: Exit) -> str:
    """An exit in a few words."""
    match exit_:
        case PortOut(port=port, size=size, data=data):
            shown = ", ".join(f"{value:#x}" for value in exit_.values[:8])
            text = data.decode("latin-1")
            letters = f" {text!r}" if text.isascii() and text.isprintable() and size == 1 else ""
            return f"exit: {shown}{letters} to port {port:#x}"
        case PortIn(port=port, size=size, count=count):
            return f"exit: a read of {_bytes(size * count)} from port {port:#x}"
        case MmioWrite(address=address, data=data):
            return f"exit: {_number(data)}, {_bytes(len(data))}, to MMIO {address:#x}"
        case MmioRead(address=address, size=size):
            return f"exit: a read of {_bytes(size)} from MMIO {address:#x}"
        case Halt():
            return "exit: HLT"
        case Shutdown():
            return "exit: shutdown, of a triple fault"
        case InternalError(instruction=code):
            return f"exit: KVM could not go on, {exit_.reason}: {code.hex(' ')}".rstrip(": ")
    return f"exit: {exit_}"


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"
