"""What a worker does: run a chunk of inputs on its machine, and say what became of each."""

import os
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from kvmpy.errors import ClosedError
from kvmpy.outcome import Outcome
from kvmpy.pool import held
from kvmpy.pool.carried import carried, portable
from kvmpy.repeat import runs
from kvmpy.snapshot import Snapshot

__all__ = ["Answer", "Options", "Work", "do", "do_packed"]

Answer: TypeAlias = tuple[Any, ...]
"""An `Outcome` without what does not travel: its first field and its machine."""


@dataclass(frozen=True, slots=True)
class Options:
    """How each input is run; see `kvmpy.runs`."""

    write_to: Any = None
    timeout: float | None = None
    max_exits: int | None = None
    scope: str = "all"
    batch: int = 1
    collect: tuple[int, int] | None = None
    touched: bool = False
    console: bool = False


class Work:
    """What is to be done with each input. It travels to workers, its snapshot by way of a file."""

    def __init__(
        self, snapshot: Snapshot, attach: Any, options: Options, *, key: str = "", home: int = 0
    ) -> None:
        self.snapshot, self.attach, self.options = snapshot, attach, options
        self.key = key or uuid.uuid4().hex
        self.home = home or os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._directory: TemporaryDirectory[str] | None = None
        self._saved: Snapshot | None = None

    def saved(self) -> Snapshot:
        """The snapshot in a file: where it is already, or in a temporary one."""
        if self.snapshot.path is not None:
            return self.snapshot
        with self._lock:  # an executor may pickle on a thread of its own, and late
            if self._closed:
                raise ClosedError("the iterator of kvmpy.map was closed")
            if self._saved is None:
                self._directory = TemporaryDirectory(prefix="kvmpy-")
                self._saved = replace(self.snapshot)  # the user's own stays in no file
                self._saved.save(Path(self._directory.name) / "snapshot")
            return self._saved

    def close(self) -> None:
        """Remove the temporary file."""
        with self._lock:
            self._closed, self._saved = True, None
            if self._directory is not None:
                self._directory.cleanup()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.saved(), self.attach, self.options, self.key, self.home)


def _arrived(snapshot: Snapshot, attach: Any, options: Options, key: str, home: int) -> Work:
    return Work(snapshot, attach, options, key=key, home=home)


def do_packed(work: bytes, inputs: bytes, seconds: float | None) -> tuple[list[Answer], float]:
    """The same as `do`, for pickled work and inputs; work is unpickled once."""
    return do(_unpacked(work), pickle.loads(inputs), seconds)


@lru_cache(maxsize=2)
def _unpacked(work: bytes) -> Work:
    made: Work = pickle.loads(work)
    return made


def do(work: Work, inputs: list[Any], seconds: float | None) -> tuple[list[Answer], float]:
    """Run `inputs`, or as many as can be begun in so many seconds; how long it took."""
    try:
        return _do(work, inputs, seconds)
    except Exception as error:
        if work.home == os.getpid():
            raise
        raise portable(error) from error  # or it breaks the pool


def _do(work: Work, inputs: list[Any], seconds: float | None) -> tuple[list[Answer], float]:
    with held.using(work.key, work.home) as mine:
        if mine is None:  # the iterator was closed
            return [], 0.0
        machine, snapshot = mine.machine(work.snapshot, work.attach)
        how = work.options
        started, answers = time.perf_counter(), list[Answer]()
        feed = _Feed(inputs, seconds, mine)
        while feed.more():
            before = feed.given
            try:
                for one in runs(
                    snapshot,
                    feed.rest(),
                    how.write_to,
                    timeout=how.timeout,
                    max_exits=how.max_exits,
                    scope=how.scope,
                    batch=how.batch,
                    collect=how.collect,
                    touched=how.touched,
                    console=how.console,
                    machine=machine,
                ):
                    answers.append(_answer(one))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a device may raise SystemExit
                if feed.given == before:  # a setting, which is wrong for all inputs
                    raise
                answers.append(_failed(error))
                machine.resetter = None  # whatever state it was left in
                feed.at = len(answers)
        return answers, time.perf_counter() - started


class _Feed:
    """Gives out inputs until the time is over."""

    def __init__(self, inputs: list[Any], seconds: float | None, mine: held.Held) -> None:
        self.inputs, self.mine = inputs, mine
        self.end = None if seconds is None else time.perf_counter() + seconds
        self.at = self.given = 0

    def more(self) -> bool:
        """Whether another one is to be run; the first one is in any case."""
        if self.at == len(self.inputs) or self.mine.ended:
            return False
        return not self.at or self.end is None or time.perf_counter() < self.end

    def rest(self) -> Iterator[Any]:
        """Those from number `at` on."""
        while self.more():
            self.at += 1
            self.given += 1
            yield self.inputs[self.at - 1]


def _answer(one: Outcome[Any]) -> Answer:
    return (*one[1:7], one.touched, None, one.console)


def _failed(error: BaseException) -> Answer:
    """An exception in Python as an outcome."""
    detail = f"{type(error).__name__}: {error}".splitlines()[0]
    return "error", detail, None, None, b"", b"", frozenset(), carried(error)
