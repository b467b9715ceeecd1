"""Running a machine's vCPUs, and what comes of it: outcomes, results, exits one by one."""

import time
from collections.abc import Callable, Iterator
from operator import index
from typing import Any, Final

from kvmpy.abi import lib
from kvmpy.bus import Claim
from kvmpy.counts import ExitCounts
from kvmpy.dispatch import Dispatch
from kvmpy.errors import ConfigError, PendingExitError
from kvmpy.exits import (
    OFFSET_REASON,
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    Shutdown,
    decode,
    exit_kind,
)
from kvmpy.modes import Layout
from kvmpy.result import Result
from kvmpy.serve import serve, serve_one, serve_posted
from kvmpy.trace import Trace
from kvmpy.vcpu import NO_LIMIT, VCPU, nanoseconds
from kvmpy.vm import VM
from kvmpy.x86.exceptions import GuestException, decode_exception
from kvmpy.x86.registers import Registers

__all__ = ["LAST_END", "Running", "exit_limit", "raised_with"]

_OUTCOMES: Final = {
    lib.KVMPY_STOPPED: "stopped",
    lib.KVMPY_DEADLINE: "timeout",
    lib.KVMPY_MAX_EXITS: "max-exits",
}
LAST_END: Final = lib.KVMPY_ENDED
"""Numbers of the C loop's up to this one end a run."""
_HALT: Final = 5  # KVM_EXIT_HLT
_LAST: Final = (Halt, Shutdown, InternalError, FailEntry, Interrupted)


class Running:
    """The part of a machine that runs: `Machine` makes what it works on."""

    vm: VM
    layout: Layout
    entry: int | None
    _dispatch: Dispatch | None = None
    _trace: Trace | None = None

    def __init__(self, *, strict: bool, posted: bool) -> None:
        self._strict, self._posted = strict, posted
        # Per vCPU, since each of those that run ends with it.
        self._ends: dict[VCPU, tuple[str, str, int | GuestException | None]] = {}
        self._watched: set[VCPU] = set()  # those whose exit is being served for exits()
        self.seconds = 0.0
        """How long the last run took."""

    @property
    def dispatch(self) -> Dispatch:
        """Who answers which access."""
        raise NotImplementedError

    @property
    def cpus(self) -> list[VCPU]:
        """The vCPUs, in order."""
        return self.vm.vcpus

    @property
    def trace(self) -> Trace:
        """The recorder of exits, off until `trace.start()`; see `kvmpy.trace`."""
        trace = self._trace
        if trace is None:  # one for all threads that ask
            trace = vars(self).setdefault("_trace", Trace(self.cpus, self.claim_at))
        return trace

    def claim_at(self, port: bool, address: int) -> Claim | None:
        """Which device answers at a port, or at a guest-physical address; None for nobody."""
        return (self.dispatch.ports if port else self.dispatch.mmio).find(address)

    def run(
        self, timeout: float | None = None, max_exits: int | None = None, cpu: int = 0
    ) -> Result:
        """Run a vCPU on this thread until the guest ends, or for `timeout` seconds, or exits.

        What the guest does to itself is the result's outcome. An exception of a device's is
        raised here, and so is KeyboardInterrupt; after either, the guest can be run on. After the
        outcome "exception" it cannot: kvmpy's stub that reported it stands at a HLT, so that
        another run ends with "halt". Reset the machine, or `set_entry`.
        """
        vcpu = self._ready(cpu)
        limit, before, drain = exit_limit(max_exits), vcpu.counters(), self._drain(vcpu)
        started = time.perf_counter()
        loop = vcpu.begin(timeout, max_exits=limit)
        try:
            try:
                code = self._serve(loop, drain)
            finally:
                lib.kvmpy_end(loop)
                self.seconds = seconds = time.perf_counter() - started
            drain()
            if code < 0:
                raise vcpu.run_error(-code)
            return self._result(code, vcpu, seconds, before)
        except BaseException as error:
            lib.kvmpy_unread(loop)  # a signal handler's: the next run ends as this one would
            if isinstance(error, KeyboardInterrupt):
                drain()
            raise

    def _serve(self, loop: Any, drain: Callable[[], None]) -> int:
        if self._dispatch is None:  # many a guest ends without a device
            code: int = lib.kvmpy_run(loop)
            if code <= LAST_END:
                return code
            loop.awaiting = 0  # the access is handed over once more
        return serve(lib.kvmpy_run, loop, self.dispatch, drain)

    def exits(
        self, timeout: float | None = None, max_exits: int | None = None, cpu: int = 0
    ) -> Iterator[Exit]:
        """Run a vCPU and see each of its exits, after the machine's devices have served it.

        The last one says how it ended; `Interrupted` for a timeout or `stop()`.
        """
        vcpu = self._ready(cpu)
        if self._posted:
            raise ConfigError("posted_console hides exits: make the machine without it to see them")
        left, drain = exit_limit(max_exits), self._drain(vcpu)
        nanoseconds(timeout)  # refuse a bad one
        deadline = None if timeout is None else time.monotonic() + timeout
        while left:
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            exit_ = vcpu.run(rest)
            try:
                self._watched.add(vcpu)  # in here, as a signal handler may raise right after it
                serve_one(vcpu, self.dispatch, exit_)
            finally:
                self._watched.discard(vcpu)
            left -= 1
            drain()
            yield exit_
            if self._ends.pop(vcpu, None) is not None or isinstance(exit_, _LAST):
                return

    def stop(self) -> None:
        """End the runs under way, from any thread, with the outcome "stopped".

        Where none is under way, it ends the next one: a stop is never lost.
        """
        for cpu in self.cpus:
            cpu.kick()

    def _ready(self, cpu: int) -> VCPU:
        self.vm.fd  # noqa: B018 - refuse a closed machine
        cpus = self.vm.vcpus
        if not 0 <= cpu < len(cpus):
            raise ConfigError(f"there is no vCPU {cpu}: this machine has {len(cpus)}")
        if self.entry is None:
            raise ConfigError("nothing is loaded: load() a guest before running it")
        return cpus[cpu]

    def _drain(self, vcpu: VCPU) -> Callable[[], None]:
        trace = self._trace
        if trace is None or trace.sink is None:
            return (lambda: serve_posted(vcpu, self.dispatch)) if self._posted else _nothing
        live = trace

        def drain() -> None:
            if self._posted:
                serve_posted(vcpu, self.dispatch)
            live.drain(vcpu)

        return drain

    def _finish_exit(self, vcpu: VCPU) -> None:
        vcpu.loop.raw = False
        if not vcpu.loop.incomplete and not vcpu.loop.open:
            return
        code = serve(lib.kvmpy_finish, vcpu.loop, self.dispatch, _nothing)
        if code == lib.KVMPY_EXIT:
            raise PendingExitError(f"{vcpu.what} has an exit that waits to be seen: run it first")
        if code < 0:
            raise vcpu.run_error(-code)

    def _finish_run(
        self, outcome: str, detail: str = "", value: int | GuestException | None = None
    ) -> None:
        """End the runs under way with an outcome; devices call it."""
        for cpu in self.cpus:
            running = cpu.loop.running
            if running or cpu in self._watched:
                self._ends.setdefault(cpu, (outcome, detail, value))
            if running:
                cpu.kick()

    def end_run(self, outcome: str, detail: str = "", value: int | None = None) -> None:
        """End the runs under way with an outcome of your own: for devices to call."""
        self._finish_run(outcome, detail, value)

    def _on_unclaimed(self, what: str) -> None:
        if self._strict:
            self._finish_run("unclaimed", what)

    def _on_end(self, value: int) -> None:
        self._finish_run("ended", f"value {value}", value)

    def _report_exception(self, offset: int, size: int, value: int | None) -> int | None:
        """A reporting stub ran: decode the frame that the processor pushed for it."""
        if value is None:
            return 0xFF
        for cpu in self.cpus:
            if not (cpu.running_here or cpu in self._watched):
                continue
            registers = cpu.get_regs()
            vector = self.layout.vector_at(registers.rip)
            if vector is not None:  # otherwise the guest itself wrote to the port
                bits = 64 if self.layout.mode == "long" else 32
                frame = self.vm.memory.read(registers.rsp, 6 * bits // 8)
                exception = decode_exception(vector, frame, cpu.get_sregs().cr2, bits)
                self._finish_run("exception", str(exception), exception)
        return None

    def _came_to(self, code: int, vcpu: VCPU) -> tuple[str, str, int | GuestException | None]:
        """Outcome, detail and value of a run that ended with this number of the C loop's."""
        if code == lib.KVMPY_STOPPED and vcpu in self._ends:
            return self._ends.pop(vcpu)
        if code == lib.KVMPY_ENDED:
            value = int(vcpu.loop.value)
            self._on_end(value)  # those that run beside it
            return "ended", f"value {value}", value
        if code != lib.KVMPY_EXIT:
            return _OUTCOMES[code], "", None
        if vcpu.run_page[OFFSET_REASON] == _HALT:  # by far the most frequent
            return "halt", "", None
        outcome, detail = _ending(decode(memoryview(vcpu.run_page)), vcpu)
        return outcome, detail, None

    def _result(self, code: int, vcpu: VCPU, seconds: float, before: bytes) -> Result:
        exit_ = decode(memoryview(vcpu.run_page)) if code == lib.KVMPY_EXIT else None
        outcome, detail, value = self._came_to(code, vcpu)
        packed = vcpu.get_packed_regs()
        if isinstance(value, GuestException):
            packed = raised_with(packed, value)
        return Result(
            outcome=outcome,
            packed=packed,
            seconds=seconds,
            exits=ExitCounts(before, vcpu.counters()),
            detail=detail,
            value=value if isinstance(value, int) else None,
            exception=value if isinstance(value, GuestException) else None,
            exit=exit_,
            unclaimed=tuple(self.unclaimed()) if self._any_unclaimed else (),
        )

    @property
    def _any_unclaimed(self) -> bool:
        return self._dispatch is not None and self._dispatch.any_unclaimed

    def unclaimed(self) -> list[str]:
        """A line for each address at which accesses found no device, with their number."""
        return [line for one in self.dispatch.unclaimed.values() for line in one.lines()]


def raised_with(packed: bytes, exception: GuestException) -> bytes:
    """The registers of the code that raised an exception, of those of the stub that reported it."""
    registers = Registers.unpack(packed)
    registers.rip, registers.rsp = exception.rip, exception.rsp
    registers.rflags = exception.rflags
    return registers.pack()


def _nothing() -> None:
    pass


def _ending(exit_: Exit, vcpu: VCPU) -> tuple[str, str]:
    """The outcome and the detail of an exit that ends a run."""
    match exit_:
        case Halt() | Shutdown():
            detail = ""
        case InternalError(instruction=code):
            detail = exit_.reason + (f": {code.hex(' ')}" if code else "")
        case FailEntry(hardware_reason=reason):
            detail = f"hardware reason {reason:#x}"
        case _:
            detail = str(exit_)
    return exit_kind(vcpu.run_page[8]), detail


def exit_limit(max_exits: int | None) -> int:
    """How many exits end a run; ConfigError for what is no such number."""
    if max_exits is None:
        return NO_LIMIT
    try:
        limit = index(max_exits)
    except TypeError:
        limit = 0
    if not 0 < limit <= NO_LIMIT:
        raise ConfigError(f"max_exits={max_exits!r:.80}: give 1 or more, or None for no limit")
    return limit
