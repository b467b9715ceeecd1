"""One prepared guest, run once for each input: a loop of resets, without a machine for each."""

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

from kvmpy.abi import lib
from kvmpy.errors import ConfigError
from kvmpy.machine import Machine
from kvmpy.outcome import Outcome
from kvmpy.prepared import Prepared, WriteTo, check_collect
from kvmpy.running import LAST_END, exit_limit, raised_with
from kvmpy.serve import serve
from kvmpy.sizes import check_count
from kvmpy.snapshot import Snapshot
from kvmpy.snapshot.reset import DIRTY_LOG
from kvmpy.vcpu import nanoseconds
from kvmpy.x86.exceptions import GuestException

__all__ = ["runs"]

_T = TypeVar("_T")
_EXIT: Final = lib.KVMPY_EXIT
_STOPPED: Final = lib.KVMPY_STOPPED
_HALT: Final = 5  # KVM_EXIT_HLT
_FASTEST_BEAT_NS: Final = 1_000_000
_LARGEST_BATCH: Final = 1 << 16


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
        with machine.vm.whole:  # another thread may go back with it, too
            machine.reset_to(snapshot, scope)
            resetter = machine.resetter
        if time >= 0:  # a deadline is seen at a heartbeat
            loop.heartbeat_ns = min(before, max(_FASTEST_BEAT_NS, time // 4))
        by_tables = resetter.method != DIRTY_LOG
        if machine.has_native_state or callable(write_to) or by_tables:
            batch = 1  # between two runs there is something to do in Python
        prepared = Prepared(
            machine, write_to, collect, batch, touched, resetter=resetter, console=console
        )
        prepared.native.timeout_ns, prepared.native.max_exits = time, limit
        for chunk in _chunks(inputs, batch):
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


def _chunks(inputs: Iterable[_T], size: int) -> Iterator[list[_T]]:
    left = iter(inputs)
    while chunk := list(islice(left, size)):
        yield chunk


def _run(prepared: Prepared, chunk: list[_T]) -> Iterator[Outcome[_T]]:
    """Run a chunk of inputs; their outcomes."""
    machine, native, runs = prepared.machine, prepared.native, prepared.runs
    done, total = 0, len(chunk)
    native.count, drain = total, machine._drain(machine.cpus[0])
    while done < total:
        machine.check_stopped()
        used = prepared.resetter
        if machine.resetter is not used:  # gone to another snapshot, or to other RAM, meanwhile
            with machine.vm.whole:
                machine.reset_to(used.snapshot, used.scope)
                prepared.use(machine.resetter)
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


def _resume(prepared: Prepared) -> None:
    """Take the vCPU, so that no other thread closes the machine."""
    (cpu, *_), native = prepared.machine.cpus, prepared.native
    code = lib.kvmpy_resume(native.loop, native.timeout_ns)
    if code < 0:
        raise cpu.begin_error(-code)
    cpu.run_page  # noqa: B018 - closed by another thread meanwhile
    cpu._runner = threading.get_ident()


def _call(prepared: Prepared, chunk: list[_T]) -> int:
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
    if not prepared.resetter.fits():  # C looks at its RAM after the run
        raise ConfigError("write_to has given the machine other RAM or vCPUs")
    loop.raw, loop.exits_left = False, native.max_exits  # finishing an exit has left it raw
    code = lib.kvmpy_run(loop)
    prepared.runs[0].code = code
    if 0 <= code <= LAST_END:
        prepared.finish(0)
    return 1


def _serve(prepared: Prepared, at: int) -> int:
    """Go on with a run that needs Python."""
    machine, loop = prepared.machine, prepared.native.loop
    drain = machine._drain(machine.cpus[0])
    loop.awaiting = 0  # the access is handed over once more
    code = serve(lib.kvmpy_run, loop, machine.dispatch, drain)
    drain()
    if code >= 0:
        prepared.finish(at)
    return code


def _outcome(prepared: Prepared, given: _T, at: int, last: bool) -> Outcome[_T]:
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
