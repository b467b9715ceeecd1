"""What a peer is: a way to do a piece of work, tried once before anything is timed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TypeAlias

from benchmarks.stats import Turn
from kvmpy.errors import KvmpyError
from kvmpy.kvm import backend, nested

__all__ = ["Opened", "PeerError", "Subject", "deadline", "kvm_name", "prepared", "tried"]

TRIAL_SECONDS = 60.0

Opened: TypeAlias = AbstractContextManager[Callable[[], int]]
"""A peer made ready: inside, a function does the work once and returns the proof of it."""


class PeerError(KvmpyError):
    """A peer is not installed, or does not do the work; the message says which and why."""


@dataclass(frozen=True)
class Subject:
    """One peer for one piece of work.

    `runs_on` names what executes the guest. `open` makes the peer ready, outside of the time
    taken, and gives the function that does the work once; what that returns is compared with
    `proof`, so that work not done is not timed. `missing` says why the peer cannot take part,
    and is empty where it can; `note` says what its figure includes.
    """

    name: str
    runs_on: str
    open: Callable[[], Opened]
    proof: int
    note: str = ""
    missing: str = ""

    def check(self, seen: int) -> None:
        """Raise PeerError where what the work returned is not the proof of it."""
        if seen != self.proof:
            raise PeerError(f"{self.name}: the proof of the work is {seen}, not {self.proof}")


def kvm_name() -> str:
    """What runs a guest under KVM here, such as "KVM (kvm_intel, nested)"."""
    return f"KVM ({backend()}{', nested' if nested() else ''})"


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise PeerError after that time, in the main thread, where its code sees signals.

    The timer goes off again and again, since one signal may come just before KVM_RUN does.
    The handler and the timer that were there before are put back.
    """

    def over(number: int, frame: FrameType | None) -> None:
        raise PeerError(f"{what} did not end within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def tried(subject: Subject, seconds: float = TRIAL_SECONDS) -> Subject:
    """The subject after one run that was not timed; with the reason where it failed."""
    if subject.missing:
        return subject
    try:
        with deadline(seconds, subject.name), subject.open() as run:
            subject.check(run())
    except (KvmpyError, OSError) as error:
        return replace(subject, missing=f"not available here: {' '.join(str(error).split())}")
    return subject


@contextmanager
def prepared(subject: Subject, per_second: float) -> Iterator[Turn]:
    """A turn of the subject's, warm; it gives seconds times `per_second`."""
    with subject.open() as run:
        subject.check(run())

        def timed() -> float:
            start = time.perf_counter_ns()
            seen = run()
            taken = time.perf_counter_ns() - start
            subject.check(seen)
            return taken / 1e9 * per_second

        yield timed
