"""Inputs out in chunks, outcomes back: sizes, order, how far ahead. No guest runs here."""

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from io import StringIO
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvmpy import Outcome
from kvmpy.pool.bar import with_bar
from kvmpy.pool.flow import LEASE, TARGET, Flow
from kvmpy.pool.processes import WorkerDied


def answers(inputs: list[Any]) -> list[tuple[Any, ...]]:
    return [("halt", "", one, None, b"", b"", frozenset(), None) for one in inputs]


class Later:
    """Workers that answer when they are told to, in any order."""

    def __init__(self, each: Callable[[Any], float] = lambda one: 0.001) -> None:
        self.each = each
        self.chunks: list[list[Any]] = []
        self.waiting: list[tuple[list[Any], Future[Any]]] = []

    def submit(self, inputs: list[Any]) -> Future[Any]:
        self.chunks.append(inputs)
        self.waiting.append((inputs, Future()))
        return self.waiting[-1][1]

    def answer(self, number: int = 0, lease: float = LEASE) -> None:
        inputs, future = self.waiting.pop(number % len(self.waiting))
        seconds, done = 0.0, 0
        while done < len(inputs) and (not done or seconds < lease):
            seconds += self.each(inputs[done])
            done += 1
        future.set_result((answers(inputs[:done]), seconds))


class AtOnce(Later):
    def submit(self, inputs: list[Any]) -> Future[Any]:
        future = super().submit(inputs)
        self.answer()
        return future


def flow_of(inputs: Any, workers: int = 2, size: int | None = None, **options: Any) -> Flow[Any]:
    options.setdefault("ordered", True)
    return Flow(inputs, workers, size, **options)


def test_a_chunk_takes_the_time_it_should() -> None:
    workers = AtOnce(lambda one: 0.001)
    for number, one in enumerate(flow_of(count()).outcomes(workers.submit)):
        assert one.input == one.value == number
        if number == 2000:
            break
    sizes = [len(chunk) for chunk in workers.chunks]
    assert sizes[0] == 1
    assert max(sizes) == sizes[-1] == TARGET / 0.001
    assert all(b <= 4 * a for a, b in pairwise(sizes))


def test_ctrl_c_that_another_thread_takes_is_not_lost() -> None:
    workers, over, gave_up = Later(), threading.Event(), list[bool]()

    def work() -> None:
        time.sleep(0.2)  # the main thread is waiting now
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if not over.wait(20):
            gave_up.append(True)
            workers.answer()

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        next(flow_of(range(1)).outcomes(workers.submit))
    over.set()
    thread.join()
    assert not gave_up


@pytest.mark.parametrize("total", [1, 7, 64, 1000])
def test_the_last_inputs_are_shared_out(total: int) -> None:
    workers = AtOnce(lambda one: 1e-6)
    assert len(list(flow_of(range(total), total=total).outcomes(workers.submit))) == total
    assert len(workers.chunks[-1]) == 1
    assert max(map(len, workers.chunks)) <= max(1, total / 4)


def test_large_inputs_and_answers_make_small_chunks() -> None:
    for one in (bytes(3 << 20), memoryview(bytes(3 << 20)).cast("Q")):
        large = AtOnce(lambda one: 1e-6)
        list(flow_of([one] * 20).outcomes(large.submit))
        assert max(map(len, large.chunks)) == 2
    large = AtOnce(lambda one: 1e-6)
    list(flow_of(iter(range(100)), answer_size=1 << 20).outcomes(large.submit))
    assert max(map(len, large.chunks)) == 4


@given(
    total=st.integers(0, 60),
    workers=st.integers(1, 4),
    size=st.none() | st.integers(1, 9),
    slow=st.sets(st.integers(0, 60)),
    turns=st.lists(st.integers(0, 30), min_size=1),
    ordered=st.booleans(),
)
def test_each_input_has_one_outcome_whatever_comes_first(
    total: int, workers: int, size: int | None, slow: set[int], turns: list[int], ordered: bool
) -> None:
    """Chunks are completed in any order, and some only in part."""
    later = Later(lambda one: LEASE if one in slow else 0.01)
    flow = flow_of(iter(range(total)), workers, size, ordered=ordered)
    order = iter(turns * 100)

    class Eager:
        """A queue that has a chunk completed when there is none."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get(self, timeout: float | None = None) -> Any:
            if self.inner.empty():
                later.answer(next(order))
            return self.inner.get()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    flow._completed = Eager(flow._completed)  # type: ignore[assignment]
    found = [one.input for one in flow.outcomes(later.submit)]
    assert sorted(found) == list(range(total))
    if ordered:
        assert found == sorted(found)


@pytest.mark.parametrize("ordered", [True, False])
def test_endless_inputs_are_taken_as_they_are_needed(ordered: bool) -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    workers = AtOnce()
    made = flow_of(endless(), workers=2, size=5, ordered=ordered).outcomes(workers.submit)
    for number in range(1, 200):
        next(made)
        assert taken <= number + 5 * 2 * (3 + 6) + 5


def test_in_order_no_more_waits_than_so_much() -> None:
    later = Later()
    flow = flow_of(count(), workers=2, size=5)
    flow._fill(later.submit)
    while len(later.waiting) > 1:  # the first chunk is not done
        later.answer(1)
        flow._receive(flow._completed.get())
        flow._fill(later.submit)
    assert len(flow._ready) <= 5 * 2 * (3 + 6)
    later.answer(0)
    flow._receive(flow._completed.get())
    assert next(iter(flow._due())).input == 0


def test_what_the_inputs_raise_comes_after_the_outcomes_of_those_before() -> None:
    def broken() -> Iterator[int]:
        yield from range(7)
        raise LookupError("no more")

    made = flow_of(broken(), size=4).outcomes(AtOnce().submit)
    assert [next(made).input for _ in range(7)] == list(range(7))
    with pytest.raises(LookupError, match="no more"):
        next(made)


def test_an_input_that_ends_its_workers_is_found_among_others() -> None:
    tries: dict[int, int] = {}

    def submit(inputs: list[int]) -> Future[Any]:
        future: Future[Any] = Future()
        for one in inputs:
            tries[one] = tries.get(one, 0) + 1
        if 13 in inputs or (5 in inputs and tries[5] == 1):
            future.set_exception(WorkerDied("was ended by SIGKILL"))
        else:
            future.set_result((answers(inputs), 0.1))
        return future

    found = list(flow_of(range(20), size=10).outcomes(submit))
    assert [one.input for one in found] == list(range(20))
    assert [one.input for one in found if one.outcome != "halt"] == [13]
    assert found[13].outcome == "worker-died"
    assert found[13].detail == "the worker process was ended by SIGKILL, 3 times with this input"
    assert (tries[13], tries[5], tries[12]) == (4, 2, 2)


def outcomes(number: int) -> Generator[Outcome[int], None, None]:
    for at in range(number):
        yield Outcome(at, "shutdown" if at == 3 else "halt", "", None, None, b"", b"", None)


@pytest.mark.parametrize("total", [8, None])
def test_a_bar_on_a_terminal(total: int | None) -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    assert len(list(with_bar(outcomes(8), total, console))) == 8
    assert f"8/{total or '?'}" in out.getvalue()
    assert "1 crashes" in out.getvalue()


def test_no_bar_elsewhere_and_the_end_is_passed_on() -> None:
    out = StringIO()
    inner = outcomes(8)
    made = with_bar(inner, 8, Console(file=out))
    next(made)
    made.close()
    assert out.getvalue() == ""
    assert next(inner, None) is None
