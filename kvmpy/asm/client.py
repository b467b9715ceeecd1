"""The parent's side of the worker process: one, warm, shared by all threads.

The worker is started at the first request and again after it died or was killed. It lives
in a session of its own, so Ctrl-C does not reach it, and ends when the parent closes its
end of the socket, that is at the latest when the parent ends. A fork of the parent drops
the socket, and starts a worker of its own when it needs one.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from kvmpy.errors import AssemblyError

__all__ = ["Answer", "Encoded", "WorkerDied", "WorkerHung", "encode", "worker_pid"]

Query: TypeAlias = tuple[int, str, int | None]

_START_SECONDS = 30.0
"""How long the libraries may take to load, also on a busy machine."""

_GRACE_SECONDS = 1.0
"""How long the worker's own alarm waits beyond the parent's deadline."""

_BATCH = 200
"""Instructions per request: few enough that neither side's buffer of the socket fills up."""


class Answer(NamedTuple):
    """What became of one instruction: code and how it decodes, or Keystone's message."""

    code: bytes | None
    message: str
    decoded: tuple[str, list[list[Any]]] | None


class Encoded(NamedTuple):
    """Answers in the order of the queries, and the seconds that they took.

    Waiting for other threads and for the start of the worker does not count.
    """

    answers: list[Answer]
    seconds: float


class WorkerDied(Exception):
    """The worker ended after some `answers`, while it had the query `index` at hand."""

    def __init__(self, answers: list[Answer], index: int) -> None:
        super().__init__(index)
        self.answers = answers
        self.index = index


class WorkerHung(WorkerDied):
    """The worker was killed, because the query `index` was not done at the deadline."""


class _Worker:
    """A running worker process and the socket to it."""

    def __init__(self) -> None:
        """Start it and wait until it has loaded its libraries."""
        path = [entry for entry in sys.path if entry]
        command = [
            sys.executable,
            *("-I", "-S", "-X", "utf8"),
            str(Path(__file__).with_name("worker.py")),
            json.dumps(path),
        ]
        ours, theirs = socket.socketpair()
        with theirs:
            self._socket = _above_standard(ours)
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                self._socket.close()
                raise AssemblyError(f"the assembler's process cannot start: {error}") from error
        self._buffer = b""
        try:
            problem = json.loads(self._line(time.monotonic() + _START_SECONDS))
        except (OSError, ValueError) as error:
            self.stop()
            raise AssemblyError("the assembler's process ended while it started") from error
        except BaseException:
            self.stop()
            raise
        if problem is not None:
            self.stop()
            raise AssemblyError(f"the assembler needs keystone-engine and capstone: {problem}")

    def _line(self, deadline: float) -> bytes:
        """The next answer; raises TimeoutError at the deadline, EOFError at the end."""
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def encode(self, queries: list[Query], deadline: float) -> list[Answer]:
        """Send queries and collect the answers; any failure leaves the worker unusable."""
        seconds = max(deadline - time.monotonic(), 0.001) + _GRACE_SECONDS
        answers: list[Answer] = []
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(json.dumps([seconds, queries]).encode() + b"\n")
            while len(answers) < len(queries):
                code, message, decoded = json.loads(self._line(deadline))
                data = None if code is None else bytes.fromhex(code)
                answers.append(Answer(data, message, decoded and tuple(decoded)))
        except TimeoutError:
            raise WorkerHung(answers, len(answers)) from None
        except (OSError, EOFError):
            raise WorkerDied(answers, len(answers)) from None
        return answers

    def stop(self) -> None:
        """Kill the worker, whatever it does, and wait for its end. A second call is fine."""
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Let go of a worker that belongs to the process this one was forked from."""
        self._socket.close()
        self.process.returncode = 0  # it is no child of this process: there is no status


def _above_standard(connection: socket.socket) -> socket.socket:
    """Move a socket that was given a closed standard stream's number out of its place."""
    if connection.fileno() > 2:
        return connection
    import fcntl

    number = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    connection.close()
    return socket.socket(fileno=number)


class _Shared:
    """The process's one worker, and the lock that each request holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None

    def discard(self) -> None:
        """Stop the worker; the next request starts another."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.stop()


_shared = _Shared()


def _after_fork() -> None:
    """In a forked child: the worker and perhaps the lock are another process's."""
    if _shared.worker is not None:
        _shared.worker.forget()
    _shared.worker = None
    _shared.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_shared.discard)


def worker_pid() -> int | None:
    """The process id of the worker, None where none has been started."""
    worker = _shared.worker
    return None if worker is None else worker.process.pid


def encode(queries: list[Query], seconds: float) -> Encoded:
    """Have instructions encoded, within `seconds` from when the worker is ready and free.

    Raises WorkerHung or WorkerDied with the index of the query at fault, and AssemblyError
    where the worker cannot be started at all.
    """
    answers: list[Answer] = []
    failed = -1
    spent = 0.0
    with _shared.lock:
        while len(answers) < len(queries):
            worker = _ready_worker()
            began = time.monotonic()
            deadline = began + seconds - spent
            try:
                while len(answers) < len(queries):
                    answers += worker.encode(queries[len(answers) :][:_BATCH], deadline)
            except WorkerDied as error:
                _shared.discard()
                answers += error.answers
                # The worker may have been killed from outside, so each query gets two tries.
                if isinstance(error, WorkerHung) or failed == len(answers):
                    raise type(error)(error.answers, len(answers)) from None
                failed = len(answers)
            except BaseException:
                # An answer may still be under way: the next request would take it for its own.
                _shared.discard()
                raise
            finally:
                spent += time.monotonic() - began
    return Encoded(answers, spent)


def _ready_worker() -> _Worker:
    """The running worker; one that died while it was idle is replaced."""
    if _shared.worker is not None and _shared.worker.process.poll() is not None:
        _shared.discard()
    if _shared.worker is None:
        _shared.worker = _Worker()
    return _shared.worker
