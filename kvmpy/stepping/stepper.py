"""Stepping a machine's guest by KVM_SET_GUEST_DEBUG.

Not every KVM steps as the API's document says, so what this looks at is what the guest's registers
say before and after:

- An exit to a device comes in the midst of an instruction. It is served and finished, and with that
  the step is over; if KVM reports the trap of the same instruction once more, that is left out.
- HLT may be stepped over without its exit: the step ends with `Halt` all the same.
- Ring 3 is stepped where `probe("single-step-ring3")` says that it can be. Elsewhere ring-3 code
  runs natively up to its next exit, which is one step that says so. What it leads to without an
  exit, such as a system call's handler, is not seen.
- The trap may come an instruction late, as after MOV SS: the step's note has what it took then.
- An exception is taken within the step of the instruction that raises it, and the first instruction
  of its handler may be in the same step.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from kvmpy.errors import ConfigError, PendingExitError, UnsupportedError
from kvmpy.exits import (
    Debug,
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from kvmpy.probe import probe
from kvmpy.running import Running
from kvmpy.serve import serve_one
from kvmpy.stepping.changes import changes
from kvmpy.stepping.exceptions import returns_to_ring3, taken
from kvmpy.stepping.late import held_back
from kvmpy.stepping.operands import operands, stack_operand, values, with_values
from kvmpy.stepping.step import MemoryValue, Step
from kvmpy.stepping.transitions import transitions
from kvmpy.vcpu import VCPU, nanoseconds
from kvmpy.views.code import LONGEST, decoder
from kvmpy.views.cpumode import CpuMode, cpu_mode, linear_rip
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import cpl_of, reader
from kvmpy.views.symbols import Symbols
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["trace_instructions"]

_SERVED: Final = (PortIn, PortOut, MmioRead, MmioWrite, MsrRead, MsrWrite)
_RING3: Final = "single-step-ring3"
_NATIVE: Final = "ring 3 ran natively up to this exit, for it cannot be stepped here"
_BOTH: Final = 3  # KVM_SYNC_X86_REGS, _SREGS


def trace_instructions(
    machine: Running,
    symbols: Mapping[str, int],
    *,
    count: int | None = None,
    until: int | str | None = None,
    timeout: float | None = None,
    cpu: int = 0,
) -> Iterator[Step]:
    """Run a vCPU one instruction at a time; see `Machine.trace_instructions`."""
    vcpu = machine._ready(cpu)
    if machine._posted:
        raise ConfigError("posted_console hides exits: make the machine without it to step it")
    if count is not None and count < 0:
        raise ConfigError(f"count={count}: give 0 or more, or None for no limit")
    nanoseconds(timeout)  # refuse a bad one
    found = probe("single-step")
    if found.answer not in ("yes", "unknown"):
        raise UnsupportedError(f"this host's KVM cannot step: {found.detail}")
    place = _place(until, symbols)
    return _Stepper(machine, vcpu, Symbols(symbols), timeout).steps(count, place)


def _place(until: int | str | None, symbols: Mapping[str, int]) -> int | None:
    if not isinstance(until, str):
        return until
    if until not in symbols:
        known = ", ".join(sorted(symbols)[:8]) or "none: symbols come from .S and ELF files"
        raise ConfigError(f"no symbol {until!r}; there is {known}")
    return symbols[until]


class _Moment:
    """The vCPU before or after a step, and the instruction that it is at."""

    def __init__(self, vcpu: VCPU) -> None:
        self.registers: Registers = vcpu.get_regs()
        self.special: SpecialRegisters = vcpu.get_sregs()
        self.mode: CpuMode = cpu_mode(self.special, self.registers.rflags)
        self.ring = cpl_of(self.special)
        self.linear = linear_rip(self.special, self.registers.rip, self.registers.rflags)


class _Stepper:
    def __init__(
        self, machine: Running, vcpu: VCPU, symbols: Symbols, timeout: float | None
    ) -> None:
        self.machine, self.vcpu, self.symbols = machine, vcpu, symbols
        self.read = reader(machine.vm.memory.read)
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.decoders: dict[CpuMode, Any] = {}
        self.served = False  # whether the last step was that of an exit to a device
        self.stepping = False
        self.outcome = self.detail = ""
        self.value: int | None = None

    def steps(self, count: int | None, until: int | None) -> Iterator[Step]:
        before_sync = self.vcpu.sync_regs
        self.vcpu.finish()
        self.vcpu.sync_regs = _BOTH
        number = 0
        try:
            now = _Moment(self.vcpu)
            while count is None or number < count:
                number += 1
                step, now = self._step(number, now)
                yield step
                if step.outcome or now.linear == until:
                    return
        finally:
            if not self.vcpu.closed:
                self.vcpu.sync_regs = before_sync
                self._debug(False)

    def _debug(self, on: bool) -> None:
        if on is not self.stepping:
            self.vcpu.set_guest_debug(single_step=on)
            self.stepping = on

    def _step(self, number: int, before: _Moment) -> tuple[Step, _Moment]:
        native = before.ring == 3 and not self._steps_ring3()
        self._debug(not native)
        instruction, data = (None, b"") if native else self._decode(before)
        mnemonic = instruction.mnemonic if instruction else ""
        old, special = before.registers, before.special
        named = operands(instruction, before.mode, old, special) if instruction else []
        earlier = values(named, self.read, special)
        exits, last = self._advance(before)
        after = _Moment(self.vcpu)
        if isinstance(last, Debug) and mnemonic == "hlt" and self.machine.vm.irqchip is None:
            # Stepped over: KVM on VMX and SVM reports HLT, others the trap after it.
            last = Halt()
        self._end(last)
        if last is not None and not isinstance(last, Debug):
            exits.append(last)
        memory = with_values(named, earlier, values(named, self.read, special))
        step = Step(
            number=number,
            mode=before.mode,
            ring=before.ring,
            address=old.rip,
            linear=before.linear,
            symbol=self.symbols.at(before.linear),
            data=data,
            text=f"{mnemonic} {instruction.op_str}".rstrip() if instruction else "",
            changes=changes(old, after.registers, special, after.special, before.mode),
            memory=memory + self._stack(mnemonic, before, after),
            transitions=transitions(special, after.special),
            exits=tuple(exits),
            outcome=self.outcome,
            detail=self.detail,
            value=self.value,
            note=f"{_NATIVE} ({self._why()})"
            if native
            else self._note(before, after, instruction, len(data)),
            native=native,
        )
        return step, after

    def _stack(self, mnemonic: str, before: _Moment, after: _Moment) -> tuple[MemoryValue, ...]:
        special = before.special
        found = stack_operand(mnemonic, before.registers, after.registers, special, before.mode)
        there = values(found, self.read, special)
        pushed = any(access == "write" for _, _, access in found)
        return with_values(found, [None for _ in found] if pushed else there, there)

    def _decode(self, moment: _Moment, further: int = 0) -> tuple[Any, bytes]:
        """The instruction at RIP, or so many bytes `further`, and its bytes."""
        mode = moment.mode
        if mode not in self.decoders:
            self.decoders[mode] = decoder(mode, detail=True)
        code = read_linear(self.read, moment.special, moment.linear + further, LONGEST)
        one = next(self.decoders[mode].disasm(code, moment.registers.rip + further, 1), None)
        return one, b"" if one is None else bytes(one.bytes)

    def _rest(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _advance(self, before: _Moment) -> tuple[list[Exit], Exit | None]:
        """Run up to the end of the instruction: the exits that were served, and the last one."""
        exits: list[Exit] = []
        repeated = self.served
        self.served = False
        while True:
            exit_ = self.vcpu.run(self._rest())
            if isinstance(exit_, Debug) and repeated and not exits:
                repeated = False
                if self.vcpu.get_regs() == before.registers:
                    continue  # the trap of the instruction whose exit was served
            if not isinstance(exit_, _SERVED):
                return exits, exit_
            exits.append(exit_)
            if self._serve(exit_):
                self.served = True
                return exits, None

    def _serve(self, exit_: Exit) -> bool:
        """Serve and finish an exit; False where KVM has another one for the instruction."""
        machine = self.machine
        machine._watched.add(self.vcpu)
        try:
            serve_one(self.vcpu, machine.dispatch, exit_)
            try:
                self.vcpu.finish()
            except PendingExitError:
                return self.vcpu in machine._ends
        finally:
            machine._watched.discard(self.vcpu)
        return True

    def _end(self, last: Exit | None) -> None:
        """Note how the run ended, if it did."""
        ended = self.machine._ends.pop(self.vcpu, None)
        if ended is not None:
            self.outcome, self.detail, value = ended
            self.value = value if isinstance(value, int) else None
            return
        match last:
            case None | Debug():
                pass
            case Halt():
                self.outcome = "halt"
            case Shutdown():
                self.outcome = "shutdown"
            case InternalError():
                self.outcome, self.detail = "internal-error", last.reason
            case FailEntry(hardware_reason=reason):
                self.outcome, self.detail = "fail-entry", f"hardware reason {reason:#x}"
            case Interrupted(why=why):
                self.outcome = why
            case _:
                self.outcome = type(last).__name__

    def _note(self, before: _Moment, after: _Moment, instruction: Any, size: int) -> str:
        start, now = before.registers.rip, after.registers.rip
        mnemonic = instruction.mnemonic if instruction else ""
        if mnemonic == "hlt" and not self.outcome:
            return "HLT was stepped over: run, the vCPU would wait here for an interrupt"
        if self.outcome or now in (start, start + size):
            return ""
        note = taken(self.read, mnemonic, before.registers, after.registers, after.special)
        unseen = before.ring == after.ring == 0 and not self._steps_ring3()
        if unseen and returns_to_ring3(self.read, mnemonic, before.registers, before.special):
            unseen_text = f"ring 3 ran in this step, for it cannot be stepped here ({self._why()})"
            note = f"{unseen_text}; {note}" if note else unseen_text
        if note or before.special.cs != after.special.cs:
            return note
        return held_back(instruction, lambda rip: self._decode(before, rip - start)[0], now)

    def _steps_ring3(self) -> bool:
        return probe(_RING3).answer == "yes"

    def _why(self) -> str:
        return probe(_RING3).detail
