"""One worker process, seen from the thread that has it, and what it does itself."""

import multiprocessing
import os
import pickle
import select
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, Final

from kvmpy.errors import KvmpyError
from kvmpy.pool.carried import carried
from kvmpy.pool.channel import Channel, death_of, pair
from kvmpy.pool.checks import WORKER

__all__ = ["Worker", "WorkerDied"]

_PATIENCE: Final = 5.0
"""Seconds for an idle worker to end by itself."""


class WorkerDied(KvmpyError, RuntimeError):
    """The worker process that had a call has died; the call may be made again.

    `ending` says how; `by_signal` is whether that came from outside of Python.
    """

    def __init__(self, ending: str, by_signal: bool = False) -> None:
        super().__init__(f"the worker process {ending}")
        self.ending, self.by_signal = ending, by_signal


class Worker:
    """A process, started by `start` again when it has died. One thread's, but for `kill`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._killed = False
        self._process: SpawnProcess | None = None
        self._death = -1
        self._channel: Channel | None = None

    @property
    def alive(self) -> bool:
        """Whether it was started, and has not been seen to die."""
        return self._channel is not None

    def start(self) -> None:
        """Start the process; OSError if there can be none, WorkerDied if it ended meanwhile."""
        self._launch()
        self._receive()

    def _launch(self) -> None:
        # A frame of its own: WorkerDied, which a future keeps, must not hold the process by its
        # traceback. The collector would end that later, on the caller's thread, and a Ctrl-C that
        # comes in the midst of multiprocessing's finalizer is dropped.
        ours, theirs = pair()
        process = _Process(target=_work, args=(theirs,), name=WORKER)
        try:
            with theirs:  # this process keeps none: the other has a copy
                process.start()
            self._death = death_of(process.ident or 0, process.sentinel)
        except BaseException:
            ours.close()  # which ends it, if there is one
            raise
        self._channel = Channel(ours, self._death)
        with self._lock:
            self._process = process
            if self._killed:
                process.kill()

    def ask(self, packed: bytes) -> Any:
        """What the pickled call comes to; raises what it raises, or WorkerDied."""
        assert self._channel is not None
        try:
            self._channel.send(packed)
        except (EOFError, OSError):
            raise self._died() from None
        fine, value = pickle.loads(self._receive())
        if fine:
            return value
        raise value

    def _receive(self) -> bytearray:
        assert self._channel is not None
        try:
            return self._channel.receive()
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> WorkerDied:
        code = self._ended(1)
        if code is None:
            return WorkerDied("ended")
        if code < 0:
            return WorkerDied(f"was ended by {signal.Signals(-code).name}", by_signal=True)
        return WorkerDied(f"exited with {code}")

    def _ended(self, patience: float) -> int | None:
        """Have it ended, by force after so many seconds; its exit code, if that can be known."""
        with self._lock:
            process, self._process = self._process, None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if process is None:
            return None
        waiting = select.poll()
        waiting.register(self._death, select.POLLIN)
        if not waiting.poll(1000 * patience):
            process.kill()
        os.close(self._death)
        process.join()  # it is dead; its sentinel may be held open by what it has forked
        return process.exitcode

    def kill(self) -> None:
        """End it whatever it does, for good; from any thread."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """Have it end by itself, which idle ones do at once."""
        if self._channel is not None:
            with suppress(EOFError, OSError):
                self._channel.send(b"")
        self._ended(_PATIENCE)


class _Process(SpawnProcess):
    """A process that Ctrl-C on the terminal does not reach, not even while it starts.

    It is spawned, not forked: KVM refuses a vCPU to another process than its maker.
    """

    def start(self) -> None:
        resource_tracker.ensure_running()  # or it is started meanwhile, which unblocks SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the worker ------------------------------------------------------------------------------------


def _work(end: socket.socket) -> None:
    """Make calls until there are none. Ctrl-C is for the parent, whose end is that of this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel = Channel(end)
    with suppress(EOFError, OSError):  # the parent is gone
        channel.send(b"ready")
        while packed := channel.receive():
            channel.send(_answer(packed))


def _answer(packed: bytearray) -> bytes:
    try:
        function, args = pickle.loads(packed)
        made: Callable[..., Any] = function
        return pickle.dumps((True, made(*args)))
    except BaseException as error:  # a device may raise SystemExit
        return pickle.dumps((False, carried(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
