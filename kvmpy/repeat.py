"""One prepared guest, run once for each input: a loop of resets, without a machine for each."""

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import index
from reprlib import repr as shortened
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from kvmpy.abi import ffi, lib
from kvmpy.errors import AddressError, ConfigError
from kvmpy.exits import OFFSET_REASON
from kvmpy.machine import Machine
from kvmpy.memory import Memory
from kvmpy.result import CRASHES
from kvmpy.running import LAST_END, exit_limit, raised_with
from kvmpy.serve import serve
from kvmpy.sizes import check_count
from kvmpy.snapshot import Snapshot
from kvmpy.snapshot.reset import DIRTY_LOG
from kvmpy.snapshot.touched import Touched
from kvmpy.vcpu import nanoseconds
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.registers import Registers

__all__ = ["Outcome", "WriteTo", "check_collect", "runs"]

_T = TypeVar("_T")
WriteTo: TypeAlias = int | Callable[[Machine, Any], object] | None
"""Where an input goes: a guest-physical address, or a function of the machine and the input."""

_EXIT: Final = lib.KVMPY_EXIT
_STOPPED: Final = lib.KVMPY_STOPPED
_HALT: Final = 5  # KVM_EXIT_HLT
_RUN_SIZE: Final = ffi.sizeof("struct kvmpy_run")
_RUN_REGS: Final = _RUN_SIZE - Registers.SIZE  # struct kvm_regs is the last of it
_FASTEST_BEAT_NS: Final = 1_000_000
_LARGEST_BATCH: Final = 1 << 16


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


def runs(
    snapshot: Snapshot,
    inputs: Iterable[_T],
    write_to: WriteTo = None,
    *,
    timeout: float | None = None,
    max_exits: int | None = None,
    scope: str = "all",
    batch: int = 1,
    collect: tuple[int, int] | None = None,
    touched: bool = False,
    console: bool = False,
    attach: Callable[[Machine], object] | None = None,
    machine: Machine | None = None,
) -> Iterator[Outcome[_T]]:
    """Run the guest once from `snapshot` for each input, and say what became of it.

    Each input is written to `write_to` after the machine was reset: at an address (the input is
    bytes then), or by a function `f(machine, input)`. `timeout` is in seconds, above 0, for each
    run. `scope` is that of `Machine.reset_to`. With `collect`, an address and a size, so many bytes
    of RAM at the end of each run are the outcome's `collected`. With `touched`, so are the
    guest-physical addresses of the pages of RAM that the input and the run have changed. With
    `console`, so is all that the guest has written to its console by then, also that which it wrote
    before the snapshot.

    With `batch` above 1 (up to 65536), so many inputs are run before the first of their outcomes is
    given, and `outcome.machine` is then no more as that run has left it. That saves Python's part
    of each run: for a guest of a few microseconds that has a `kvmpy.devices.Harness`, 40 us a run
    became 29 with scope "registers", and 64 became 53 with "all" (nested, AMD EPYC). It does for
    runs that end in C: by HLT, a triple fault, or a device `EndRun`, as a harness's DONE is. The
    debug-exit device at port 0xf4 is Python's.

    The machine is a new one, with `attach` as in `Machine.from_snapshot`, unless `machine` is
    given, which is left open. Raises AddressError for an input that does not fit into RAM at that
    address. A device's exception is raised as it is; what guests do to themselves is an outcome.
    What is raised for an input comes after the outcomes of all inputs before it.
    """
    limit = exit_limit(max_exits)
    check_count("batch", batch, _LARGEST_BATCH)
    check_collect(collect)
    time, mine = nanoseconds(timeout), machine is None
    if not time:  # some would come to an end all the same, and others not
        raise ConfigError(f"timeout={timeout}: give 1e-9 seconds or more, or None for no limit")
    if machine is None:
        machine = Machine.from_snapshot(snapshot, attach)
    loop, before = machine.cpus[0].loop, machine.cpus[0].loop.heartbeat_ns
    try:
        machine.reset_to(snapshot, scope)
        if time >= 0:  # a deadline is seen at a heartbeat
            loop.heartbeat_ns = min(before, max(_FASTEST_BEAT_NS, time // 4))
        by_tables = machine.resetter.method != DIRTY_LOG
        if machine.has_native_state or callable(write_to) or by_tables:
            batch = 1  # between two runs there is something to do in Python
        prepared = _Prepared(machine, write_to, collect, batch, touched, console=console)
        prepared.native.timeout_ns, prepared.native.max_exits = time, limit
        for chunk in _chunks(inputs, batch):
            if machine.resetter is not prepared.resetter:  # gone to another snapshot meanwhile
                machine.reset_to(snapshot, scope)
                prepared.use(machine.resetter)
            done = 0
            while done < len(chunk):
                taken, data = prepared.take(chunk[done:])
                yield from _run(prepared, chunk[done : done + taken])
                done += taken
                del data  # C reads it until here
    finally:
        lib.kvmpy_quiet(loop)
        loop.heartbeat_ns = before
        if mine:
            # Whatever ends the loop, a view that somebody holds goes when they let go of it.
            machine.__exit__(GeneratorExit, GeneratorExit(), None)


def check_collect(collect: tuple[int, int] | None) -> None:
    """Raise ConfigError unless it is None, or an address and a size above 0."""
    if collect is not None:
        try:
            _, size = map(index, collect)
        except (TypeError, ValueError):
            size = 0
        if size < 1:
            raise ConfigError(f"collect={collect!r:.80}: give (address, size), a size above 0")


def _chunks(inputs: Iterable[_T], size: int) -> Iterator[list[_T]]:
    left = iter(inputs)
    while chunk := list(islice(left, size)):
        yield chunk


class _Prepared:
    """A machine at the snapshot, where its inputs go, and what C works with (csrc/reset.h)."""

    def __init__(
        self,
        machine: Machine,
        write_to: WriteTo,
        collect: tuple[int, int] | None,
        batch: int,
        touched: bool,
        *,
        console: bool,
    ) -> None:
        self.machine, self.console = machine, console
        self.write = write_to if callable(write_to) else None
        self.native = made = ffi.new("struct kvmpy_batch *")
        made.loop = machine.cpus[0].loop
        self.touched = Touched(machine.memory, batch) if touched else None
        self.use(machine.resetter)
        self.room, self.address = 0, write_to
        if isinstance(write_to, int):
            region = self._region(write_to, 1)
            logged = [one for one in machine.memory if not one.readonly]
            made.region, made.offset = logged.index(region), write_to - region.address
            self.room = region.end - write_to
            if machine.resetter.method != "dirty-log":  # C has no place to note what it writes
                self.write = lambda machine, data: machine.memory.write(write_to, data)
        elif self.write is None and write_to is not None:
            raise ConfigError(f"write_to={write_to!r}: give an address, or a function")
        self.collected, self.size = bytearray(), 0
        if collect is not None:
            address, self.size = collect
            region = self._region(address, self.size)
            self.collected = bytearray(batch * self.size)
            start = region.host_address + address - region.address
            made.collect, made.collect_size = ffi.cast("uint8_t *", start), self.size
            made.collected = self._room = ffi.from_buffer(self.collected, require_writable=True)
        self.runs = made.runs = ffi.new("struct kvmpy_run[]", batch)
        self.ends = made.ends = ffi.new("uint64_t[]", batch)
        self.registers = memoryview(ffi.buffer(self.runs))

    def use(self, resetter: Any) -> None:
        """Go back with that."""
        self.resetter = resetter
        self.native.reset = resetter.native
        if self.touched is not None:
            self.touched.use(resetter, self.native)

    def _region(self, address: int, size: int) -> Memory:
        for region in self.machine.memory:
            if region.address <= address and address + size <= region.end and not region.readonly:
                return region
        raise AddressError(f"{size} bytes at {address:#x} are not in writable RAM")

    def take(self, chunk: list[Any]) -> tuple[int, Any]:
        """Give C the inputs up to the first that is no good, which raises when it is the first.

        How many it has, and what has to be kept alive until it is done.
        """
        if not self.room:
            return len(chunk), None
        try:
            data = self._place(chunk)
        except (TypeError, ValueError):
            for good, one in enumerate(chunk):
                try:
                    self._place([one])
                except (TypeError, ValueError):
                    if not good:
                        raise
                    return good, self._place(chunk[:good])
            raise
        return len(chunk), data

    def _place(self, chunk: list[Any]) -> Any:
        end = 0
        for at, one in enumerate(chunk):
            size = len(one) if type(one) is bytes else _size(one)
            if size > self.room:
                raise AddressError(
                    f"an input of {size} bytes at {self.address:#x} does not fit into the RAM there"
                )
            end += size
            self.ends[at] = end
        self.native.data = data = ffi.from_buffer(chunk[0] if len(chunk) == 1 else b"".join(chunk))
        return data

    def finish(self, at: int) -> None:
        """Note what C notes of a run that it ends itself."""
        vcpu = self.machine.cpus[0]
        self.runs[at].reason = vcpu.run_page[OFFSET_REASON]
        self.runs[at].value = vcpu.loop.value
        if self.touched is not None:
            self.touched.find(at)
        start = at * _RUN_SIZE + _RUN_REGS
        self.registers[start : start + Registers.SIZE] = vcpu.get_packed_regs()
        if self.size:
            there = ffi.buffer(self.native.collect, self.size)
            self.collected[at * self.size : (at + 1) * self.size] = there[:]

    def packed(self, at: int) -> bytes:
        """The general registers after that run."""
        start = at * _RUN_SIZE + _RUN_REGS
        return bytes(self.registers[start : start + Registers.SIZE])


def _size(given: Any) -> int:
    try:
        return memoryview(given).nbytes
    except TypeError:
        raise ConfigError(f"an input for an address is bytes, not {given!r}") from None


def _run(prepared: _Prepared, chunk: list[_T]) -> Iterator[Outcome[_T]]:
    """Run a chunk of inputs; their outcomes."""
    machine, native, runs = prepared.machine, prepared.native, prepared.runs
    done, total = 0, len(chunk)
    native.count, drain = total, machine._drain(machine.cpus[0])
    while done < total:
        machine.check_stopped()
        native.first = first = done
        error = None
        try:
            try:
                _resume(prepared)
                machine.before_reset()
                done = _call(prepared, chunk)
                over = runs[done - 1].code
                if over > LAST_END:
                    runs[done - 1].code = over = _serve(prepared, done - 1)
            finally:
                lib.kvmpy_pause(native.loop)
            drain()
            if over < 0:
                raise machine.cpus[0].run_error(-over)
        except BaseException as raised:
            lib.kvmpy_unread(native.loop)
            if done - first < 2 or isinstance(raised, KeyboardInterrupt):
                raise
            error, done = raised, done - 1  # the runs before were over
        # All of them before the first is given: the machine is still as the last run left it.
        last = done - 1 if error is None else done  # of those that a device can have ended
        found = [_outcome(prepared, chunk[at], at, at == last) for at in range(first, done)]
        if prepared.console:
            # Python, and the console is that, has served none of them but the last; C leaves a run
            # to it where writes are posted, too.
            printed = prepared.resetter.snapshot.console
            found = [one._replace(console=printed) for one in found]
            if error is None:
                found[-1] = found[-1]._replace(console=machine.console)
        yield from found
        if error is not None:
            raise error


def _resume(prepared: _Prepared) -> None:
    """Take the vCPU, so that no other thread closes the machine."""
    (cpu, *_), native = prepared.machine.cpus, prepared.native
    code = lib.kvmpy_resume(native.loop, native.timeout_ns)
    if code < 0:
        raise cpu.begin_error(-code)
    cpu.run_page  # noqa: B018 - closed by another thread meanwhile
    cpu._runner = threading.get_ident()


def _call(prepared: _Prepared, chunk: list[_T]) -> int:
    native = prepared.native
    if prepared.write is None:
        done: int = lib.kvmpy_run_batch(native)
        if done < 0:
            raise prepared.resetter.error(-done)
        return done
    prepared.resetter.reset()
    loop = native.loop
    lib.kvmpy_pause(loop)  # the function is no device: it may do all that is done between runs
    prepared.write(prepared.machine, chunk[0])
    _resume(prepared)
    loop.raw, loop.exits_left = False, native.max_exits  # finishing an exit has left it raw
    code = lib.kvmpy_run(loop)
    prepared.runs[0].code = code
    if 0 <= code <= LAST_END:
        prepared.finish(0)
    return 1


def _serve(prepared: _Prepared, at: int) -> int:
    """Go on with a run that needs Python."""
    machine, loop = prepared.machine, prepared.native.loop
    drain = machine._drain(machine.cpus[0])
    loop.awaiting = 0  # the access is handed over once more
    code = serve(lib.kvmpy_run, loop, machine.dispatch, drain)
    drain()
    if code >= 0:
        prepared.finish(at)
    return code


def _outcome(prepared: _Prepared, given: _T, at: int, last: bool) -> Outcome[_T]:
    machine, code = prepared.machine, prepared.runs[at].code
    size = prepared.size
    collected = bytes(prepared.collected[at * size : (at + 1) * size]) if size else b""
    packed = prepared.packed(at)
    touched = prepared.touched.pages(at) if prepared.touched else frozenset()
    exception = None
    value: int | GuestException | None
    if code == _EXIT and prepared.runs[at].reason == _HALT:
        outcome, detail, value = "halt", "", None
    elif code == lib.KVMPY_ENDED:
        value = prepared.runs[at].value
        outcome, detail = "ended", f"value {value}"
    elif code == _STOPPED and not last:  # not by a device of its own
        outcome, detail, value = "stopped", "", None
    else:
        outcome, detail, value = machine._came_to(code, machine.cpus[0])
    if isinstance(value, GuestException):
        exception, value = value, None
        packed = raised_with(machine.cpus[0].get_packed_regs(), exception)
    return Outcome(given, outcome, detail, value, exception, packed, collected, machine, touched)
