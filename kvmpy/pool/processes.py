"""The default pool: worker processes, each of which may die without harm to the others.

A `ProcessPoolExecutor` is broken for good when one of its processes dies, does not tell which
call was the one, and waits for ever for the rest of an answer that a killed process has begun.
So here a thread has each worker, which has one call at a time.
"""

import atexit
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Final

from kvmpy.errors import HostError
from kvmpy.pool.checks import GUARD
from kvmpy.pool.worker import Worker, WorkerDied

__all__ = ["Processes", "WorkerDied"]

_START_FAILURES: Final = 3
"""Workers in a row that may die before they are ready."""


class Processes(AbstractContextManager["Processes"]):
    """Calls functions in up to `workers` processes, which are started when they are needed."""

    def __init__(self, workers: int) -> None:
        self._most = workers
        self._home = os.getpid()
        # Guards all that is below. A signal handler may raise in the midst of a Condition's own
        # `with`, which is Python, and leave it locked for ever: on the caller's thread the lock
        # itself is taken.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._calls: deque[_Call] = deque()
        self._threads: list[threading.Thread] = []
        self._busy: set[Worker] = set()
        self._failures = 0  # to start, in a row
        self._one_started = False
        self._closed = False
        atexit.register(self.close)

    def submit(self, function: Callable[..., Any], /, *args: Any) -> "Future[Any]":
        """Have it called; the future may come to WorkerDied, or HostError if none can start."""
        call = _Call(pickle.dumps((function, args)))
        with self._lock:
            self._calls.append(call)
            idle = len(self._threads) - len(self._busy)
            if idle < len(self._calls) and len(self._threads) < self._most:
                # A daemon: one that is left behind must not keep the interpreter from its end.
                thread = threading.Thread(target=self._serve, daemon=True, name="kvmpy.map")
                try:
                    thread.start()
                except RuntimeError as error:
                    raise HostError(f"a worker process cannot start: {error}") from error
                self._threads.append(thread)
            self._changed.notify()
        return call.future

    # The threads ------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Have calls made, one after the other, by one worker."""
        worker = Worker()
        try:
            while (call := self._next(worker)) is not None:
                self._make(call, worker)
                del call  # with its inputs
        finally:
            worker.end()

    def _make(self, call: "_Call", worker: Worker) -> None:
        try:
            while not worker.alive:
                self._start(worker)
            value = worker.ask(call.packed)
        except BaseException as error:  # on this thread it would be lost
            call.future.set_exception(error)
        else:
            call.future.set_result(value)

    def _next(self, worker: Worker) -> "_Call | None":
        """Wait for a call that is still wanted; None at the end."""
        with self._changed:
            self._busy.discard(worker)
            while True:
                self._changed.wait_for(lambda: self._calls or self._closed)
                if self._closed:
                    return None
                call = self._calls.popleft()
                if call.future.set_running_or_notify_cancel():
                    self._busy.add(worker)
                    return call

    def _start(self, worker: Worker) -> None:
        """Start it; HostError if that is hopeless."""
        try:
            worker.start()
        except WorkerDied as error:
            with self._changed:
                self._failures += 1
                failures, never = self._failures, not self._one_started
            if never and not error.by_signal:
                text = f"a worker process {error.ending} while it started: {GUARD}"
                raise HostError(text) from None
            if failures > _START_FAILURES or self._closed:
                raise HostError(
                    f"{failures} worker processes in a row have died while they started; "
                    f"the last {error.ending}"
                ) from None
        except Exception as error:
            raise HostError(f"a worker process cannot start: {error}") from error
        else:
            with self._changed:
                self._failures, self._one_started = 0, True

    # The end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End all of them: idle ones at once, those that run a guest by force."""
        if os.getpid() != self._home:  # in a process that was forked they are not its own
            return
        with self._lock:
            self._closed = True
            calls = list(self._calls)
            self._calls.clear()
            for worker in self._busy:
                worker.kill()
            self._changed.notify_all()
        for call in calls:
            call.future.cancel()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.close)

    def __exit__(self, *error: object) -> None:
        self.close()


class _Call:
    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.future: Future[Any] = Future()
