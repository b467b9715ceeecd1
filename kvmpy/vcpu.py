"""A vCPU's descriptor: running it, its exits, and finishing them."""

import errno
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.counts import ExitCounts
from kvmpy.errors import ClosedError, ConfigError, HostError, PendingExitError
from kvmpy.exits import (
    OFFSET_DIRTY_REGS,
    OFFSET_REASON,
    OFFSET_UNION,
    OFFSET_VALID_REGS,
    Exit,
    Interrupted,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    PortIn,
    PortOut,
    decode,
    exit_kind,
)
from kvmpy.vcpuregs import SYNC_REGS, SYNC_SREGS, VcpuRegisters

__all__ = ["VCPU"]

HEARTBEAT_NS: Final = 50_000_000
NO_LIMIT: Final = (1 << 64) - 1
_RUN_ERRORS = {
    errno.ENOSPC: "the VM has no memory: add_memory() first",
    errno.EIO: "a vCPU runs only in the process that made its VM: make a new one after fork",
    errno.EFAULT: "the guest touched memory that the host cannot reach",
}


class VCPU(VcpuRegisters):
    """One vCPU, made by `VM.create_vcpu()`; its id is `index`.

    It is run by one thread at a time, in the process that made it. It owns the descriptor
    `fd` from the start, also if its construction fails.
    """

    def __init__(
        self,
        fd: int,
        index: int,
        mmap_size: int,
        *,
        sync_regs: int,
        ring_page: int,
        xsave_size: int,
    ) -> None:
        # First what closing needs: a signal handler may raise anywhere.
        self.loop: Any = ffi.new("struct kvmpy_loop *")
        """The C loop's view of this vCPU (csrc/loop.h)."""
        self._process = os.getpid()
        self._closing = threading.RLock()  # kick() touches the mapping, from any thread
        super().__init__(fd, f"vCPU {index}")
        self.index = index
        self.can_sync = sync_regs
        self._xsave_size = xsave_size
        self.finisher: Callable[[], None] | None = None
        """Serves what finishing an exit brings up; a machine sets it."""
        self.keeps: list[object] = []
        """Whatever the C loop has pointers to (a recorder, see `trace`)."""
        self._counters = memoryview(ffi.buffer(ffi.addressof(self.loop, "exits")))
        try:
            self._run = run = mmap.mmap(fd, mmap_size)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise host_error(error.errno or 0, f"mapping {self.what}") from error
            raise
        self.loop.fd = fd
        self.loop.run = ffi.cast("void *", address_of(run))
        self.loop.heartbeat_ns = HEARTBEAT_NS
        self._ring_offset = ring_page * mmap.PAGESIZE
        run[OFFSET_VALID_REGS] = sync_regs & SYNC_REGS

    def close(self) -> None:
        """Unmap and close the vCPU; calling it again does nothing."""
        with self.alone:
            run, self._run = self._run, None  # a thread that begins now finds it closed
            if run is not None:
                try:
                    self._hold()
                except BaseException:
                    self._run = run
                    raise
                lib.kvmpy_retire(self.loop)
                lib.kvmpy_forget(self.loop)
                with suppress(BufferError):  # a frame of a traceback's looks at it still
                    run.close()
        super().close()

    def hold(self) -> None:
        """Keep all threads from running it, to be closed or `release`d; ConfigError if one does."""
        with self.alone:
            if self._run is not None:
                self._hold()

    def release(self) -> None:
        """Take `hold` back."""
        with self.alone:
            if self._run is not None:
                lib.kvmpy_release(self.loop)

    def _hold(self) -> None:
        self.check_stopped()
        if self._process == os.getpid() and lib.kvmpy_hold(self.loop) < 0:
            raise self._still_running()

    @property
    def alone(self) -> AbstractContextManager[object]:
        """For `with`, while what the C loop points to is replaced, used or taken away."""
        # In the child of a fork, the thread that holds the lock may not exist.
        return self._closing if self._process == os.getpid() else nullcontext()

    def record_to(self, ring: Any) -> None:
        """Have the C loop fill another `trace.Ring`, from any thread."""
        with self.alone:  # or another one's might be in use, and not be kept
            self.keeps = [*self.keeps, ring]
            self.loop.recorder = ring.recorder
            if not lib.kvmpy_in_use(self.loop):  # or else a thread has the old one in its hands
                self.keeps = [ring]

    def check_stopped(self) -> None:
        """Raise ConfigError while a thread runs the vCPU."""
        # In the child of a fork, no thread runs what another thread of the parent's ran.
        if self.loop.running and self._process == os.getpid():
            raise self._still_running()

    def _still_running(self) -> ConfigError:
        return ConfigError(f"{self.what} is running: stop it before closing it")

    # Running ------------------------------------------------------------------------------

    def begin(
        self, timeout: float | None = None, *, raw: bool = False, max_exits: int = NO_LIMIT
    ) -> Any:
        """Make this thread the one that runs the vCPU, for the C loop's functions.

        Next comes a `try` whose `finally` calls `lib.kvmpy_end(vcpu.loop)`, and not a method:
        a signal handler may raise before the first line of whatever is written in Python.
        """
        self.run_page  # noqa: B018 - refuse a closed one
        loop = self.loop
        if loop.running:
            raise self.begin_error(errno.EBUSY)
        try:
            code = lib.kvmpy_begin(loop, nanoseconds(timeout))
            if code < 0:
                raise self.begin_error(-code)
            self.run_page  # noqa: B018 - closed by another thread meanwhile
            self._runner = threading.get_ident()
        except BaseException:
            lib.kvmpy_end(loop)
            raise
        loop.raw, loop.exits_left = raw, max_exits
        return loop

    def begin_error(self, code: int) -> Exception:
        """The exception for an errno of kvmpy_begin()'s."""
        held = self.loop.finishing == lib.KVMPY_HELD
        self.run_page  # noqa: B018 - C says that of a closed one, too
        if code == errno.EBUSY and held:
            return ClosedError(f"{self.what} is being closed")
        if code == errno.EBUSY:
            return ConfigError(f"{self.what} is already running: one thread at a time, once")
        if code == errno.ENOSPC:
            return HostError("all real-time signals are taken: kvmpy needs one for itself", code)
        return host_error(code, "making the timer of a vCPU")

    def run(self, timeout: float | None = None) -> Exit:
        """Enter the guest and return its next exit; `timeout` is in seconds.

        A `kick()` or the timeout give `Interrupted`. Ctrl-C raises KeyboardInterrupt, and the
        vCPU can be run on. A read (`PortIn`, `MmioRead`, `MsrRead`) is answered by `reply`
        before the next run, or else reads as all ones, an MSR as 0.
        """
        self.run_page  # noqa: B018 - refuse a closed one
        if self.loop.open and self.finisher is not None:
            self.finisher()
        loop = self.begin(timeout, raw=True)
        try:
            try:
                return self._next_exit(loop)
            finally:
                lib.kvmpy_end(loop)
        except BaseException:
            lib.kvmpy_unread(loop)  # the next run returns what this one cannot
            raise

    def _next_exit(self, loop: Any) -> Exit:
        while True:
            code = lib.kvmpy_run(loop)
            if code == lib.KVMPY_EXIT:
                return decode(memoryview(self.run_page))
            if code == lib.KVMPY_STOPPED:
                return Interrupted("stopped")
            if code == lib.KVMPY_DEADLINE:
                return Interrupted("timeout")
            if code < 0:
                raise self.run_error(-code)

    def run_error(self, code: int) -> Exception:
        """The exception for an errno of KVM_RUN's, with what to do about it."""
        dirty = self.run_page[OFFSET_DIRTY_REGS]
        if code == errno.EINVAL and dirty & SYNC_SREGS:
            self.run_page[OFFSET_DIRTY_REGS] = dirty & ~SYNC_SREGS
            return self._refusal()
        if code == errno.EBUSY:
            return ConfigError(f"{self.what} is run or finished by another thread: one at a time")
        return host_error(code, f"KVM_RUN of {self.what}", _RUN_ERRORS.get(code, ""))

    def kick(self) -> None:
        """End the run under way, or the next one, with `Interrupted`; from any thread."""
        with self.alone:
            if self._run is not None:
                lib.kvmpy_kick(self.loop)

    def reply(self, data: bytes, *, error: bool = False) -> None:
        """Answer the read that the last exit asked for: `size` times `count` bytes.

        For an MSR it is 8 bytes, and with `error` (also for `MsrWrite`) the guest gets #GP.
        """
        run = self.run_page
        exit_ = decode(memoryview(run))
        match exit_:
            case PortIn(size=size, count=count):
                (at,) = struct.unpack_from("<Q", run, OFFSET_UNION + 8)
                expected = size * count
            case MmioRead(size=size):
                at, expected = OFFSET_UNION + 8, size
            case MsrRead():
                at, expected = OFFSET_UNION + 16, 8
            case _:
                at = expected = 0
        kind = exit_kind(run[OFFSET_REASON], isinstance(exit_, PortOut | MmioWrite))
        refusable = error and isinstance(exit_, MsrRead | MsrWrite)
        if not self.loop.incomplete or not (expected or refusable):
            raise PendingExitError(f"the last exit ({kind}) asks for no reply")
        if len(data) != expected:
            raise ConfigError(f"this {kind} takes a reply of {expected} bytes, not {len(data)}")
        run[at : at + expected] = data
        if kind.startswith("msr"):
            run[OFFSET_UNION] = error

    def finish(self) -> None:
        """Finish the exit at hand, without running the guest any further.

        An IN, OUT, MMIO or MSR access is carried out by KVM only when the vCPU is entered
        again, so this comes before its state is written or kept. Where that gives another
        exit (one access split in two), it raises PendingExitError, and `run()` returns it.
        """
        self._check_mine()
        if not self.loop.incomplete and not self.loop.open:
            return
        if self.finisher is not None:
            self.finisher()
            return
        before, self.loop.raw = self.loop.raw, True  # nobody is there to serve what comes
        code = lib.kvmpy_finish(self.loop)
        self.loop.raw = before
        if code == lib.KVMPY_EXIT:
            raise PendingExitError("the access is split: take its next exit with run() first")
        if code < 0:
            raise self.run_error(-code)

    # Interrupt window, counts, the coalesced ring ----------------------------------------

    def request_irq_window(self, on: bool = True) -> None:
        """Ask for an `IrqWindowOpen` exit as soon as the guest can take an interrupt."""
        self.run_page[0] = on

    @property
    def ready_for_interrupt(self) -> bool:
        """Whether `interrupt` can be called now; look at it after every exit."""
        return bool(self.run_page[12])

    def exit_counts(self) -> dict[str, int]:
        """How many exits of each kind there have been, in C and in Python alike."""
        return dict(ExitCounts(bytes(len(self._counters)), self.counters()))

    def counters(self) -> bytes:
        """The C loop's counters of exits, copied; see `ExitCounts`."""
        return bytes(self._counters)

    def drain_ring(self) -> Iterator[tuple[bool, int, int, int]]:
        """Take the writes out of the VM's coalesced ring: (is a port, address, size, value).

        They leave it one by one: those that the caller does not come to stay there. All vCPUs
        of a VM share one ring, so one thread at a time may do this.
        """
        run, at = self.run_page, self._ring_offset
        entries = (mmap.PAGESIZE - 8) // 24
        first, last = struct.unpack_from("<II", run, at)
        while first != last:
            address, size, pio, data = struct.unpack_from("<QIIQ", run, at + 8 + 24 * first)
            first = (first + 1) % entries
            # At once: pack_into would clear it first, and KVM may look at it meanwhile.
            run[at : at + 4] = first.to_bytes(4, "little")
            yield bool(pio), address, size, data & (1 << 8 * size) - 1

    def watch_ring(self) -> None:
        """Have the C loop look for coalesced writes after every exit."""
        self.loop.ring = ffi.cast("uint32_t *", address_of(self.run_page) + self._ring_offset)


def nanoseconds(timeout: float | None) -> int:
    """Seconds as nanoseconds for the C loop, where -1 means no deadline."""
    if timeout is None:
        return -1
    try:
        good = 0 <= timeout < 1e9
    except TypeError:
        good = False
    if not good:
        raise ConfigError(
            f"a timeout of {timeout!r:.80} seconds: give 0 or more, or None for no limit"
        )
    return int(timeout * 1_000_000_000)
