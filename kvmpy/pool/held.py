"""The machines that a process holds for the work it was given: one for each of its threads."""

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from kvmpy.devices.harness import Harness
from kvmpy.machine import Machine
from kvmpy.snapshot import Snapshot

__all__ = ["Held", "opened", "using"]

_MOST = 2
"""Pieces of work whose machines a worker keeps, where nobody tells it that they are done."""


class Held:
    """The machines for one piece of work, in one process."""

    def __init__(self, local: bool) -> None:
        self.local = local
        """Whether the work was given out by this process, which then says when it is over."""
        self.snapshot: Snapshot | None = None
        self.machines: dict[int, Machine] = {}
        self.busy = 0
        self.ended = False

    def machine(self, snapshot: Snapshot, attach: Any) -> tuple[Machine, Snapshot]:
        """The calling thread's machine (KVM wants a vCPU to stay with its thread), and where it is.

        `snapshot` may be unpickled for each chunk; machines know theirs by identity.
        """
        self.snapshot = kept = self.snapshot or snapshot
        me = threading.get_ident()
        if me not in self.machines:
            self.machines[me] = Machine.from_snapshot(kept, _own(attach))
        return self.machines[me], kept

    def close(self) -> None:
        """Close all of them; none runs any more."""
        while self.machines:
            self.machines.popitem()[1].close()


def _own(attach: Any) -> Any:
    """`attach` for one more machine: that of a harness, of which each machine needs its own."""
    owner = getattr(attach, "__self__", None)
    return getattr(copy(owner), attach.__name__) if isinstance(owner, Harness) else attach


# By process as well: a child that was forked closes nothing of its parent's.
_held: dict[tuple[int, str], Held] = {}
_lock = threading.Lock()


@contextmanager
def opened(key: str) -> Iterator[None]:
    """While this process gives out that work; at the end, its threads' machines are closed."""
    name = (os.getpid(), key)
    with _lock:
        _held[name] = mine = Held(local=True)
    try:
        yield
    finally:
        with _lock:
            mine.ended = True
        while mine.busy:  # a thread that runs a guest cannot be left, and not be killed either
            for machine in list(mine.machines.values()):
                machine.stop()
            time.sleep(0.001)
        with _lock:
            del _held[name]
        mine.close()


@contextmanager
def using(key: str, home: int) -> Iterator[Held | None]:
    """What this process holds for that work, kept while it is in use; None if that is over."""
    me = os.getpid()
    with _lock:
        found = _held.pop((me, key), None)
        if found is None and home != me:
            found = Held(local=False)
        if found is not None:
            _held[me, key] = found  # now the last
            found.busy += 1
        old = _superfluous(me)
    for one in old:
        one.close()
    try:
        yield None if found is None or found.ended else found
    finally:
        if found is not None:
            with _lock:
                found.busy -= 1


def _superfluous(me: int) -> list[Held]:
    """Take out what is the longest unused, of work that others have given out."""
    names = [name for name, one in _held.items() if name[0] == me and not one.local]
    return [_held.pop(name) for name in names[:-_MOST] if not _held[name].busy]


@atexit.register
def _close_all() -> None:
    for (process, _), one in _held.items():
        if process == os.getpid() and not one.busy:
            one.close()
