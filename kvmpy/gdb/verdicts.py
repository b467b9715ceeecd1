"""Why a vCPU stopped: a run's end, in the debugger's terms."""

from typing import Final, Protocol

from kvmpy.errors import PendingExitError
from kvmpy.exits import Debug, InternalError
from kvmpy.gdb.breakpoints import HLT, INT3, Breakpoints
from kvmpy.gdb.crew import Came
from kvmpy.gdb.host import Host
from kvmpy.gdb.memory import GuestMemory
from kvmpy.gdb.stops import SIGTRAP, Ended, Stop, crash, exception
from kvmpy.gdb.traps import (
    BREAKPOINT,
    DEBUG,
    INVALID_OPCODE,
    clear_pushed_flag,
    pushed,
    take_back,
)
from kvmpy.modes import Layout
from kvmpy.result import CRASHES, OUTCOMES, Result
from kvmpy.vcpu import VCPU
from kvmpy.views.cpumode import linear_rip
from kvmpy.views.pages import cpl_of
from kvmpy.vm import VM
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.flags import RFLAGS

__all__ = ["SLICE", "TF", "Debuggee", "Verdicts"]

SLICE: Final = 0.05
"""Seconds of a run that is looked at in between."""
TF: Final = int(RFLAGS.TF)
_BS: Final = 1 << 14  # DR6: a single step
_BP: Final = 3  # the vector of int3


class Debuggee(Protocol):
    """What of a machine is debugged."""

    vm: VM
    layout: Layout

    @property
    def cpus(self) -> list[VCPU]:
        """Its vCPUs."""

    def run(
        self, timeout: float | None = None, max_exits: int | None = None, cpu: int = 0
    ) -> Result:
        """Run one of them."""


class Verdicts:
    """What is in the guest to stop it, and what its stops mean by that."""

    def __init__(self, machine: Debuggee, host: Host) -> None:
        self.machine, self.host = machine, host
        self.memory = GuestMemory(machine.vm.memory)
        self.points = Breakpoints(self.memory, machine.layout, host, bool(machine.vm.irqchip))
        self._debug: dict[int, tuple[bool, dict[int, str]]] = {}
        self._stray: set[int] = set()  # vCPUs whose ring-3 code got TF, and has not trapped yet

    def _settle(self, cpu: int) -> None:
        """Finish the exit at hand; one that comes of it is looked at no further."""
        try:
            self.machine.cpus[cpu].finish()
        except PendingExitError:
            self.machine.run(timeout=SLICE, cpu=cpu)

    def _set_debug(self, cpu: int, step: bool, registers: dict[int, str]) -> None:
        if self._debug.get(cpu, (False, {})) == (step, registers):
            return
        self.machine.cpus[cpu].set_guest_debug(
            single_step=step, software_breakpoints=self.host.int3, breakpoints=registers
        )
        self._debug[cpu] = step, registers

    def _clear_flag(self, cpu: int) -> None:
        """Take TF back, if the vCPU is still in the code that got it."""
        vcpu = self.machine.cpus[cpu]
        self._settle(cpu)
        if cpl_of(vcpu.get_sregs()) == 3:
            registers = vcpu.get_regs()
            registers.rflags &= ~TF
            vcpu.set_regs(registers)
            self._stray.discard(cpu)

    def _judged(self, cpu: int, result: Result, *, stepping: bool) -> Came | None:
        """What a run came to; None where it is to go on."""
        vcpu, outcome = self.machine.cpus[cpu], result.outcome
        if outcome in ("timeout", "stopped"):
            return None
        if outcome == "exception" and result.exception is not None:
            self._settle(cpu)
            if self.machine.layout.vector_at(vcpu.get_regs().rip) is None:
                return None  # another vCPU's, which ended this one's run as well
            return self._raised(cpu, result.exception)
        registers = result.registers
        pc = linear_rip(vcpu.get_sregs(), registers.rip, registers.rflags)
        if isinstance(result.exit, Debug):
            return self._debugged(cpu, result.exit, pc)
        refused = isinstance(result.exit, InternalError) and result.exit.instruction[:1] == INT3
        if refused and pc in self.points.handlers:
            return self._trapped(cpu, pc, stepping)
        if refused and self.points.planted.get(pc) == INT3:
            return Stop(cpu, SIGTRAP, "swbreak")
        if outcome == "halt" and self.points.planted.get(pc - 1) == HLT:
            self._back(cpu)
            return Stop(cpu, SIGTRAP, "swbreak")
        if outcome in CRASHES or outcome not in OUTCOMES:
            return crash(cpu, result)
        return Ended(cpu, result)

    def _back(self, cpu: int) -> None:
        vcpu = self.machine.cpus[cpu]
        registers = vcpu.get_regs()
        registers.rip -= 1
        vcpu.set_regs(registers)

    def _debugged(self, cpu: int, exit_: Debug, pc: int) -> Came | None:
        vector = self.machine.layout.vector_at(pc)
        if vector is not None and exit_.dr6 & _BS:  # the step led to a reporting stub
            raised = pushed(self.memory.read_ram, self.machine.cpus[cpu], vector)
            if raised is not None:
                return self._raised(cpu, raised)
        registers = list(self._debug.get(cpu, (False, {}))[1].items())
        for number, (address, kind) in enumerate(registers):
            if exit_.dr6 >> number & 1:
                if kind == "x":
                    return Stop(cpu, SIGTRAP, "hwbreak")
                return Stop(cpu, SIGTRAP, self.points.reason(address), address)
        if exit_.exception == _BP and pc in self.points.planted:
            return Stop(cpu, SIGTRAP, "swbreak")
        if exit_.exception == _BP:
            return Stop(cpu, SIGTRAP, text="an int3 of the guest's own: set the pc past it")
        return Stop(cpu, SIGTRAP, "step")

    def _raised(self, cpu: int, raised: GuestException) -> Came | None:
        """An exception of ring 3: ours, or one to show where it was raised."""
        take_back(self.memory.read_ram, self.machine.cpus[cpu], raised)
        return self._ours(cpu, raised) or exception(cpu, raised)

    def _ours(self, cpu: int, raised: GuestException) -> Stop | None:
        """The stop that a ring-3 exception is, if a breakpoint or TF of ours raised it."""
        planted = self.points.planted
        if raised.vector == BREAKPOINT and planted.get(raised.rip - 1) == INT3:
            self._back(cpu)
            return Stop(cpu, SIGTRAP, "swbreak")
        if raised.vector == INVALID_OPCODE and planted.get(raised.rip) == INT3:
            return Stop(cpu, SIGTRAP, "swbreak")
        if raised.vector == DEBUG and cpu in self._stray:
            self._clear_flag(cpu)
            return Stop(cpu, SIGTRAP, "step")
        return None

    def _trapped(self, cpu: int, pc: int, stepping: bool) -> Came | None:
        """At a handler where we stopped it: our exception, or the guest's own to be handled."""
        vcpu = self.machine.cpus[cpu]
        for vector in self.points.handlers[pc]:
            raised = pushed(self.memory.read_ram, vcpu, vector)
            if raised is not None and self._is_ours(cpu, raised):
                take_back(self.memory.read_ram, vcpu, raised)
                stop = self._ours(cpu, raised)
                # A step that was cut short earlier: the guest goes on.
                return None if stop is not None and stop.reason == "step" and not stepping else stop
            if stepping and raised is not None and raised.rflags & TF and cpu in self._stray:
                # The instruction raised an exception of its own: the step ends in its handler.
                clear_pushed_flag(self.memory, vcpu, vector)
                self._stray.discard(cpu)
                return Stop(cpu, SIGTRAP, "step")
        if pc in self.points.planted:
            return Stop(cpu, SIGTRAP, "swbreak")
        return self._over(cpu, pc)

    def _is_ours(self, cpu: int, raised: GuestException) -> bool:
        planted = self.points.planted
        at = raised.rip - (raised.vector == BREAKPOINT)
        return (raised.vector == DEBUG and cpu in self._stray) or (
            raised.vector in (BREAKPOINT, INVALID_OPCODE) and planted.get(at) == INT3
        )

    def _over(self, cpu: int, pc: int) -> Came | None:
        """The handler's first instruction, which ours stands in for: run it, and go on."""
        vcpu = self.machine.cpus[cpu]
        place = self.memory.locate(vcpu.get_sregs(), pc)
        patch = next(one for one in self.points.patches if one.address == place)
        debug = self._debug.get(cpu, (False, {}))
        self.memory.ram.write(patch.address, patch.original)
        try:
            self._set_debug(cpu, True, debug[1])
            result = self.machine.run(timeout=1.0, cpu=cpu)
        finally:
            self.memory.ram.write(patch.address, patch.written)
            self._set_debug(cpu, *debug)
        if isinstance(result.exit, Debug):
            return None
        return self._judged(cpu, result, stepping=False)
