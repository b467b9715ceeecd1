"""Running vCPUs under a debugger: on, one instruction, over a breakpoint; and why one stopped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from threading import Event
from typing import Final, Protocol

from kvmpy.abi import lib
from kvmpy.errors import PendingExitError, UnsupportedError
from kvmpy.exits import Debug, InternalError
from kvmpy.gdb.breakpoints import HLT, INT3, Breakpoints
from kvmpy.gdb.crew import Came, Watch, run_together, wants_stop
from kvmpy.gdb.host import Host
from kvmpy.gdb.memory import GuestMemory
from kvmpy.gdb.registers import RegisterFile, linear_pc
from kvmpy.gdb.stops import SIGINT, SIGTRAP, Action, Ended, Failed, Stop, crash, exception
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
from kvmpy.views.pages import cpl_of
from kvmpy.vm import VM
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.flags import RFLAGS

__all__ = ["Control", "Debuggee"]

_SLICE: Final = 0.05
_TURN: Final = 0.001
_TURN_NS: Final = 1_000_000
_BS: Final = 1 << 14  # DR6: a single step
_BP: Final = 3  # the vector of int3
_TF: Final = int(RFLAGS.TF)


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


class Control:
    """All vCPUs of a machine: either all are stopped, or `resume` is running."""

    def __init__(self, machine: Debuggee, host: Host) -> None:
        self.machine, self.host = machine, host
        self.memory = GuestMemory(machine.vm.memory)
        self.points = Breakpoints(self.memory, machine.layout, host, bool(machine.vm.irqchip))
        self.ended: dict[int, Result] = {}
        """vCPUs that have halted for good, and how."""
        self._pending: dict[int, Stop] = {}
        self._stopped_at: dict[int, int] = {}
        self._files: dict[int, RegisterFile] = {}
        self._debug: dict[int, tuple[bool, dict[int, str]]] = {}
        self._stray: set[int] = set()  # vCPUs whose ring-3 code got TF, and has not trapped yet
        self._stopping = Event()
        self._last = 0

    @property
    def count(self) -> int:
        """How many vCPUs there are."""
        return len(self.machine.cpus)

    # Registers ------------------------------------------------------------------------------

    def registers(self, cpu: int) -> RegisterFile:
        """The registers of a stopped vCPU."""
        if cpu not in self._files:
            self._settle(cpu)
            self._files[cpu] = RegisterFile(self.machine.cpus[cpu], self.memory.read_ram)
        return self._files[cpu]

    def reread(self, cpu: int) -> None:
        """Drop what is known of a vCPU's registers."""
        self._files.pop(cpu, None)

    def forget(self) -> None:
        """The vCPUs' state was changed by somebody else."""
        self._files.clear()
        self._pending.clear()
        self._stopped_at.clear()
        self.ended.clear()
        self._stray.clear()

    def _settle(self, cpu: int) -> None:
        """Finish the exit at hand; one that comes of it is looked at no further."""
        try:
            self.machine.cpus[cpu].finish()
        except PendingExitError:
            self.machine.run(timeout=_SLICE, cpu=cpu)

    # Running --------------------------------------------------------------------------------

    def resume(self, actions: Mapping[int, Action], watch: Watch) -> Came:
        """Run the vCPUs that have an action, until one stops or `watch` wants it."""
        wanted = {cpu: action for cpu, action in actions.items() if cpu not in self.ended}
        if not wanted:
            cpu, result = next(iter(self.ended.items()))
            return Ended(cpu, result)
        for cpu in wanted:
            pending = self._pending.pop(cpu, None)
            if pending is not None and self._still_holds(pending):
                return self._noted(pending)
        if self.memory.written:
            self.machine.vm.drop_mappings()  # page tables may have changed under KVM
            self.memory.written = False
        self._files.clear()
        self._stopping.clear()
        steppers = [cpu for cpu, action in wanted.items() if action.kind != "c"]
        others = [cpu for cpu in wanted if cpu not in steppers]
        others.sort(key=lambda cpu: cpu == self._last)  # who stopped last, starts last
        if steppers:
            came = self._step_all(steppers, wanted, others, watch)
        else:
            came = self._go(others, watch)
        return self._noted(came)

    def _noted(self, came: Came) -> Came:
        self._last = came.cpu
        if isinstance(came, Ended) and came.result.outcome == "halt":
            self.ended[came.cpu] = came.result
        for cpu in range(self.count):
            self._settle(cpu)
            self._stopped_at[cpu] = self._pc(cpu)
        return came

    def _pc(self, cpu: int) -> int:
        vcpu = self.machine.cpus[cpu]
        return linear_pc(vcpu.get_regs(), vcpu.get_sregs())

    def _still_holds(self, stop: Stop) -> bool:
        return stop.reason not in ("swbreak", "hwbreak") or self.points.at(self._pc(stop.cpu))

    def _go(self, cpus: list[int], watch: Watch) -> Came:
        """Run these until one stops; over the breakpoint at which each stopped last."""
        for cpu in cpus:
            pc = self._pc(cpu)
            if self.points.at(pc) and self._stopped_at.get(cpu) == pc:
                came = self._step(cpu, watch)
                if not isinstance(came, Stop) or came.reason != "step":
                    return came
        with self._armed(cpus):
            for cpu in cpus:
                self._set_debug(cpu, False, self.points.registers())
            found, interrupted = run_together(cpus, self._run_on, self._kick, watch)
            return self._first(found, interrupted, self._last if self._last in cpus else cpus[0])

    def _first(self, found: list[Came], interrupted: bool, cpu: int) -> Came:
        """What to tell of several things that came: failures, then stops, then ends."""
        order: list[type] = [Failed, Stop, Ended]
        ranked = sorted(found, key=lambda came: order.index(type(came)))
        halted = [c for c in ranked if isinstance(c, Ended) and c.result.outcome == "halt"]
        for one in halted:
            self.ended[one.cpu] = one.result
        ranked = [came for came in ranked if came not in halted] or (
            [] if interrupted or len(self.ended) < self.count else [*halted]
        )
        if interrupted or not ranked:
            self._pending.update((c.cpu, c) for c in ranked if isinstance(c, Stop))
            first = next((c for c in ranked if not isinstance(c, Stop)), None)
            return first or Stop(cpu, SIGINT if interrupted else SIGTRAP)
        self._pending.update((c.cpu, c) for c in ranked[1:] if isinstance(c, Stop))
        return ranked[0]

    @contextmanager
    def _armed(
        self, cpus: list[int], lifted: int | None = None, *, stepping: bool = False
    ) -> Iterator[None]:
        vcpus = [self.machine.cpus[cpu] for cpu in cpus]
        stepping = stepping or bool(self._stray.intersection(cpus))
        try:
            self.points.arm(vcpus, lifted, stepping=stepping)
            yield
        finally:
            self.points.disarm()

    def _set_debug(self, cpu: int, step: bool, registers: dict[int, str]) -> None:
        if self._debug.get(cpu, (False, {})) == (step, registers):
            return
        self.machine.cpus[cpu].set_guest_debug(
            single_step=step, software_breakpoints=self.host.int3, breakpoints=registers
        )
        self._debug[cpu] = step, registers

    def _kick(self, cpu: int) -> None:
        self._stopping.set()
        self.machine.cpus[cpu].kick()

    def _run_on(self, cpu: int) -> Came | None:
        """Run one until it stops; None once it was told to."""
        while not self._stopping.is_set():
            came = self._judged(cpu, self.machine.run(cpu=cpu), stepping=False)
            if came is not None:
                return came
        lib.kvmpy_unkick(self.machine.cpus[cpu].loop)
        return None

    # One instruction ------------------------------------------------------------------------

    def _step_all(
        self, steppers: list[int], actions: Mapping[int, Action], others: list[int], watch: Watch
    ) -> Came:
        while True:
            for cpu in steppers:
                came = self._step(cpu, watch)
                if not isinstance(came, Stop) or came.reason != "step":
                    return came
                action, pc = actions[cpu], self._pc(cpu)
                if action.kind == "s" or not action.start <= pc < action.end:
                    self._turns(others)
                    return came
                if self.points.at(pc):
                    return Stop(cpu, SIGTRAP, "swbreak")
                if wants_stop(watch):
                    return Stop(cpu, SIGINT)
            self._turns(others)

    def _turns(self, cpus: list[int]) -> None:
        """Let those that are to run beside a step have a moment: somebody may wait for them."""
        for cpu in cpus:
            if self.points.at(self._pc(cpu)):
                continue
            loop = self.machine.cpus[cpu].loop
            before, loop.heartbeat_ns = loop.heartbeat_ns, _TURN_NS
            try:
                with self._armed([cpu]):
                    self._set_debug(cpu, False, self.points.registers())
                    result = self.machine.run(timeout=_TURN, cpu=cpu)
                    came = self._judged(cpu, result, stepping=False)
            finally:
                loop.heartbeat_ns = before
            if isinstance(came, Stop):
                self._pending[cpu] = came
            elif isinstance(came, Ended):
                self.ended[cpu] = came.result

    def _step(self, cpu: int, watch: Watch) -> Came:
        """One instruction of one vCPU, also where a breakpoint is."""
        vcpu = self.machine.cpus[cpu]
        registers, special = vcpu.get_regs(), vcpu.get_sregs()
        pc = linear_pc(registers, special)
        native = bool(cpl_of(special) == 3 and special.cs.l)
        by_flag = native and not self.host.step_ring3
        halts = not self.machine.vm.irqchip and not cpl_of(special)
        # A single step of KVM's is one instruction and no more: nothing needs to be in its way.
        with self._armed([cpu], pc, stepping=True) if by_flag else nullcontext():
            if by_flag:
                if DEBUG not in self._vectors() and self.machine.layout.stubs is None:
                    raise UnsupportedError(
                        "this KVM cannot step 64-bit ring-3 code of a guest without an IDT"
                    )
                registers.rflags |= _TF
                vcpu.set_regs(registers)
                self._stray.add(cpu)
            elif not native and not self.host.step:
                raise UnsupportedError("this KVM has no single-stepping")
            # HLT under a single step is a step like any other, and its exit is lost.
            plain = by_flag or (halts and self.memory.read(special, pc, 1) == HLT)
            self._set_debug(cpu, not plain, self.points.registers(lifted=pc))
            came = None
            while came is None:
                came = self._step_on(cpu, registers.rip)
                if came is None and wants_stop(watch):
                    came = Stop(cpu, SIGINT)
            self._set_debug(cpu, False, self.points.registers())
        if by_flag:
            self._clear_flag(cpu)
        return came

    def _step_on(self, cpu: int, start: int) -> Came | None:
        """Go on with a step that began at RIP = `start`, until it ends, or an exit of it is served.

        Where an exit comes after RIP has moved on, as that of OUT does, KVM forgets that a step
        ends there, and runs the next instruction as well.
        """
        result = self.machine.run(timeout=_SLICE, max_exits=1, cpu=cpu)
        if result.outcome != "max-exits":
            return self._judged(cpu, result, stepping=True)
        if result.registers.rip == start:
            return None
        self._settle(cpu)
        return Stop(cpu, SIGTRAP, "step")

    def _vectors(self) -> set[int]:
        return {vector for vectors in self.points.handlers.values() for vector in vectors}

    def _clear_flag(self, cpu: int) -> None:
        """Take TF back, if the vCPU is still in the code that got it."""
        vcpu = self.machine.cpus[cpu]
        self._settle(cpu)
        if cpl_of(vcpu.get_sregs()) == 3:
            registers = vcpu.get_regs()
            registers.rflags &= ~_TF
            vcpu.set_regs(registers)
            self._stray.discard(cpu)

    # Why it stopped -------------------------------------------------------------------------

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
        pc = linear_pc(result.registers, vcpu.get_sregs())
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
            if stepping and raised is not None and raised.rflags & _TF and cpu in self._stray:
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

    # The end of debugging -------------------------------------------------------------------

    def release(self) -> None:
        """Take every breakpoint out, also of the processors."""
        self.points.clear()
        for cpu in range(self.count):
            self._set_debug(cpu, False, {})
            lib.kvmpy_unkick(self.machine.cpus[cpu].loop)
