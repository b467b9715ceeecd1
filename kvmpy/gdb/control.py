"""Running vCPUs under a debugger: on, one instruction, over a breakpoint; and why one stopped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from threading import Event
from typing import Final

from kvmpy.abi import lib
from kvmpy.errors import UnsupportedError
from kvmpy.gdb.breakpoints import HLT
from kvmpy.gdb.crew import Came, Watch, run_together, wants_stop
from kvmpy.gdb.host import Host
from kvmpy.gdb.registers import RegisterFile
from kvmpy.gdb.stops import SIGINT, SIGTRAP, Action, Ended, Failed, Stop
from kvmpy.gdb.traps import DEBUG
from kvmpy.gdb.verdicts import SLICE, TF, Debuggee, Verdicts
from kvmpy.result import Result
from kvmpy.views.cpumode import linear_rip
from kvmpy.views.pages import cpl_of

__all__ = ["Control"]

_TURN: Final = 0.001
_TURN_NS: Final = 1_000_000


class Control(Verdicts):
    """All vCPUs of a machine: either all are stopped, or `resume` is running."""

    def __init__(self, machine: Debuggee, host: Host) -> None:
        super().__init__(machine, host)
        self.ended: dict[int, Result] = {}
        """vCPUs that have halted for good, and how."""
        self._pending: dict[int, Stop] = {}
        self._stopped_at: dict[int, int] = {}
        self._files: dict[int, RegisterFile] = {}
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
        registers = vcpu.get_regs()
        return linear_rip(vcpu.get_sregs(), registers.rip, registers.rflags)

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
        pc = linear_rip(special, registers.rip, registers.rflags)
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
                registers.rflags |= TF
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
        result = self.machine.run(timeout=SLICE, max_exits=1, cpu=cpu)
        if result.outcome != "max-exits":
            return self._judged(cpu, result, stepping=True)
        if result.registers.rip == start:
            return None
        self._settle(cpu)
        return Stop(cpu, SIGTRAP, "step")

    def _vectors(self) -> set[int]:
        return {vector for vectors in self.points.handlers.values() for vector in vectors}

    # The end of debugging -------------------------------------------------------------------

    def release(self) -> None:
        """Take every breakpoint out, also of the processors."""
        self.points.clear()
        for cpu in range(self.count):
            self._set_debug(cpu, False, {})
            lib.kvmpy_unkick(self.machine.cpus[cpu].loop)
