"""Inputs out in chunks, outcomes back: how much at a time, how far ahead, in what order."""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeAlias, TypeVar

from kvmpy.outcome import Outcome
from kvmpy.pool.processes import WorkerDied
from kvmpy.pool.work import Answer

__all__ = ["LEASE", "Flow"]

_T = TypeVar("_T")
_Submit: TypeAlias = Callable[[list[Any]], Any]

TARGET: Final = 0.05
"""Seconds that a chunk should take: what goes around it is under 1 ms."""
LEASE: Final = 0.2
"""Seconds after which a worker hands back the inputs that it has not begun: some took longer."""
_LARGEST: Final = 4096
_LARGEST_BYTES: Final = 4 << 20
_AHEAD: Final = 3
"""Chunks for each worker that are given out."""
_WAITING: Final = 6
"""Chunks for each worker whose outcomes wait for those before them."""
_BEAT: Final = 0.1
"""Seconds after which Python looks for signals: one that a thread of an executor's took, as the
threads that run vCPUs may, ends no wait here."""
_STRIKES: Final = 3
"""Workers that one input may end."""


@dataclass(eq=False)
class _Chunk(Generic[_T]):
    first: int
    inputs: list[_T]
    strikes: int = 0
    future: Any = None


class Flow(Generic[_T]):
    """What is on its way. Its iterator is the only one that touches it."""

    def __init__(
        self,
        inputs: Iterable[_T],
        workers: int,
        chunk_size: int | None,
        *,
        ordered: bool,
        answer_size: int | None = None,
        total: int | None = None,
    ) -> None:
        self._inputs, self._workers = iter(inputs), workers
        self._fixed, self._ordered, self._total = chunk_size, ordered, total
        self._size = chunk_size or 1
        self._largest = max(1, min(_LARGEST, _LARGEST_BYTES // (answer_size or 1)))
        self._each: float | None = None  # seconds for one input
        self._taken = 0  # inputs
        self._failed: Exception | None = None  # what taking one raised
        self._exhausted = False
        self._again: deque[_Chunk[_T]] = deque()  # those that came back, to be given out again
        self._pending: set[_Chunk[_T]] = set()
        self._completed: SimpleQueue[_Chunk[_T]] = SimpleQueue()
        self._ready: dict[int, Outcome[_T]] = {}  # by number of the input
        self._next = 0

    def outcomes(self, submit: _Submit) -> Generator[Outcome[_T], None, None]:
        """Give out inputs, and what became of them."""
        while True:
            self._fill(submit)
            if not self._pending:
                break
            self._receive(self._one_completed())
            while not self._completed.empty():
                self._receive(self._completed.get())
            self._fill(submit)  # before the consumer has its time
            yield from self._due()
        if self._failed is not None:
            raise self._failed

    def _one_completed(self) -> _Chunk[_T]:
        while True:
            with suppress(Empty):
                return self._completed.get(timeout=_BEAT)

    def cancel(self) -> None:
        """Give up what has not been begun."""
        for chunk in self._pending:
            chunk.future.cancel()

    # Out ------------------------------------------------------------------------------------

    def _fill(self, submit: _Submit) -> None:
        while len(self._pending) < _AHEAD * self._workers:
            if self._again:
                chunk = self._again.popleft()
            elif len(self._ready) > _WAITING * self._workers * self._size:
                return
            else:
                inputs = self._take()
                if not inputs:
                    return
                chunk = _Chunk(self._taken - len(inputs), inputs)
            chunk.future = submit(chunk.inputs)
            self._pending.add(chunk)
            chunk.future.add_done_callback(partial(self._complete, chunk))

    def _complete(self, chunk: _Chunk[_T], _: Any) -> None:
        self._completed.put(chunk)

    def _take(self) -> list[_T]:
        """The next chunk's inputs; fewer where they are large, slow to come, or the last."""
        size = self._size
        if self._total is not None and self._fixed is None:
            size = min(size, max(1, (self._total - self._taken) // (2 * self._workers)))
        taken: list[_T] = []
        weight, until = 0, time.monotonic() + TARGET
        while len(taken) < size and not self._exhausted:
            try:
                one = next(self._inputs)
            except StopIteration:
                self._exhausted = True
                break
            except Exception as error:  # raised when all before it have their outcomes
                self._exhausted, self._failed = True, error
                break
            taken.append(one)
            if isinstance(one, bytes | bytearray):
                weight += len(one)
            elif isinstance(one, memoryview):
                weight += one.nbytes
            if self._fixed is None and (weight > _LARGEST_BYTES or time.monotonic() > until):
                break
        self._taken += len(taken)
        return taken

    # Back -----------------------------------------------------------------------------------

    def _receive(self, chunk: _Chunk[_T]) -> None:
        self._pending.discard(chunk)
        try:
            answers, seconds = chunk.future.result()
        except WorkerDied as error:
            self._died(chunk, str(error))
            return
        self._keep(chunk, answers)
        if answers:
            self._measure(len(answers), seconds)
        if len(answers) < len(chunk.inputs):
            self._repeat(chunk, len(answers), self._size)

    def _keep(self, chunk: _Chunk[_T], answers: list[Answer]) -> None:
        for number, answer in enumerate(answers):
            fields = (chunk.inputs[number], *answer[:6], None, *answer[6:])
            self._ready[chunk.first + number] = Outcome(*fields)

    def _measure(self, count: int, seconds: float) -> None:
        if self._fixed is not None:
            return
        each = seconds / count
        self._each = each if self._each is None else 0.7 * self._each + 0.3 * each
        wanted = math.ceil(TARGET / max(self._each, 1e-9))
        self._size = max(1, min(wanted, max(self._size, 4 * count), self._largest))

    def _repeat(self, chunk: _Chunk[_T], start: int, size: int) -> None:
        """Have a chunk's inputs from number `start` on given out again, in so large pieces."""
        pieces = [
            _Chunk(chunk.first + at, chunk.inputs[at : at + size])
            for at in range(start, len(chunk.inputs), size)
        ]
        self._again.extendleft(reversed(pieces))

    def _died(self, chunk: _Chunk[_T], words: str) -> None:
        if len(chunk.inputs) > 1:  # one of them, or none: alone, each shows it
            self._repeat(chunk, 0, 1)
            return
        chunk.strikes += 1
        if chunk.strikes < _STRIKES:
            self._again.appendleft(chunk)
            return
        detail = f"{words}, {_STRIKES} times with this input"
        self._keep(chunk, [("worker-died", detail, None, None, b"", b"", frozenset(), None)])

    def _due(self) -> Generator[Outcome[_T], None, None]:
        """Outcomes whose turn it is."""
        if self._ordered:
            while self._next in self._ready:
                self._next += 1
                yield self._ready.pop(self._next - 1)
        else:
            while self._ready:
                yield self._ready.pop(next(iter(self._ready)))
