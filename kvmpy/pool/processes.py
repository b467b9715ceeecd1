"""The default pool: worker processes, each of which may die without harm to the others.

A `ProcessPoolExecutor` is broken for good when one of its processes dies, and does not tell
which call was the one. So each worker is a pool of one, which has one call at a time.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Final

from kvmpy.errors import HostError, KvmpyError
from kvmpy.pool.checks import GUARD

__all__ = ["Processes", "WorkerDied"]

_START_FAILURES: Final = 3
"""Workers in a row that may die before they are ready, once one was."""


class WorkerDied(KvmpyError, RuntimeError):
    """The worker process that had a call has died; the call may be made again."""


class Processes(AbstractContextManager["Processes"]):
    """Calls functions in up to `workers` processes, which are started when they are needed.

    They are spawned, not forked: KVM refuses a vCPU to another process than its maker.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lock = threading.RLock()  # a call that is done at once is noted inside of submit
        self._calls: deque[_Call] = deque()
        self._alive: list[_Worker] = []
        self._dead: list[_Worker] = []
        self._failures = -1  # to start, in a row; -1: none has started so far
        self._closed = False

    def submit(self, function: Callable[..., Any], /, *args: Any) -> "Future[Any]":
        """Have it called; the future may come to WorkerDied, or HostError if none can start."""
        call = _Call(function, args)
        with self._lock:
            self._calls.append(call)
            self._give_out()
        return call.future

    def _give_out(self) -> None:
        while self._calls and not self._closed:
            worker = next((one for one in self._alive if one.call is None), None)
            if worker is None and len(self._alive) == self._workers:
                return
            call = self._calls.popleft()
            if not call.begin():
                continue
            try:
                worker = worker or self._start()
            except Exception as error:  # on whatever thread this is, the call's owner learns of it
                call.future.set_exception(HostError(f"a worker process cannot start: {error}"))
            else:
                worker.call = call
                made = worker.submit(call)
                made.add_done_callback(partial(self._done, worker))

    def _start(self) -> "_Worker":
        self._alive.append(_Worker())
        return self._alive[-1]

    def _done(self, worker: "_Worker", done: "Future[Any]") -> None:
        """Note what a call came to; on the thread that reads the worker's answers."""
        error = None if done.cancelled() else done.exception()
        with self._lock:
            call, worker.call = worker.call, None
            if self._closed or call is None:
                return
            if worker.has_started:
                self._failures = 0
            if isinstance(error, BrokenProcessPool):
                self._alive.remove(worker)
                self._dead.append(worker)
                error = self._death(worker)
                if error is None:
                    self._calls.appendleft(call)
                    call = None
            self._give_out()
        if call is not None and error is not None:
            call.future.set_exception(error)
        elif call is not None:
            call.future.set_result(done.result())

    def _death(self, worker: "_Worker") -> Exception | None:
        """What it means for the call; None if it is to be made by another worker."""
        if worker.has_started:
            return WorkerDied(f"the worker process {worker.ending()}")
        if 0 <= self._failures < _START_FAILURES:
            self._failures += 1
            return None
        return HostError(f"a worker process {worker.ending()} while it started: {GUARD}")

    def __exit__(self, *error: object) -> None:
        """End all of them: idle ones at once, those that run a guest by force."""
        with self._lock:
            self._closed = True
            workers = self._alive + self._dead
            calls = [worker.call for worker in workers if worker.call] + list(self._calls)
            for worker in workers:
                if worker.call is not None or not worker.has_started:
                    worker.kill()
        for call in calls:
            call.future.cancel()
        for worker in workers:
            worker.executor.shutdown(wait=True, cancel_futures=True)


class _Call:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.future: Future[Any] = Future()
        self._begun = False

    def begin(self) -> bool:
        """Whether it is still wanted; True for a call that is made again."""
        self._begun = self._begun or self.future.set_running_or_notify_cancel()
        return self._begun


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self._context = _Context()
        self.executor = ProcessPoolExecutor(1, self._context, initializer=_begin)
        self.call: _Call | None = None
        self._started = self.executor.submit(os.getpid)  # broken if it could not

    @property
    def has_started(self) -> bool:
        """Whether it was ready to work."""
        return self._started.done() and self._started.exception() is None

    def submit(self, call: "_Call") -> "Future[Any]":
        """Have it make a call."""
        try:
            return self.executor.submit(call.function, *call.args)
        except RuntimeError as error:  # it has died already, or the interpreter is at its end
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def ending(self) -> str:
        """How it ended, in words."""
        (process,) = self._context.made
        process.join(1)  # whoever was first to learn of it, the exit code may be yet to come
        code = process.exitcode
        if code is None:
            return "ended"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def kill(self) -> None:
        """End it whatever it does."""
        for process in self._context.made:
            process.kill()


class _Process(SpawnProcess):
    """A process that Ctrl-C on the terminal does not reach, not even while it starts."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    """Remembers the processes made with it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        self.made.append(_Process(*args, **options))
        return self.made[-1]


def _begin() -> None:
    """Start a worker: Ctrl-C is for the parent, which ends it, and so does the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
