"""Machines made before they are needed: from a request to the guest in microseconds."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakSet

from kvmpy.errors import ClosedError, ConfigError, KvmpyError
from kvmpy.machine import Machine
from kvmpy.sizes import check_count
from kvmpy.snapshot import Snapshot

__all__ = ["Spares"]


class Spares:
    """A pool of `size` machines at `snapshot`; a context manager. Any thread may ask it.

    `attach` and `options` are those of `Machine.from_snapshot`, `scope` is that of
    `Machine.reset_to`. A machine that comes back is brought back to the snapshot then, so that the
    next one to ask need not wait for it.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        size: int = 1,
        attach: Callable[[Machine], object] | None = None,
        *,
        scope: str = "all",
        **options: Any,
    ) -> None:
        check_count("size", size)
        self.snapshot, self.size = snapshot, size
        self._attach, self._scope, self._options = attach, scope, options
        self._ready: deque[Machine] = deque()
        self._out: WeakSet[Machine] = WeakSet()  # not kept alive: some are never given back
        self._lock, self._closed = Lock(), False
        try:
            for _ in range(size):
                self._ready.append(self._made())
        except BaseException:
            self.close()
            raise

    def _made(self) -> Machine:
        machine = Machine.from_snapshot(self.snapshot, self._attach, **self._options)
        try:
            machine.reset_to(self.snapshot, self._scope)
        except BaseException:
            machine.close()
            raise
        return machine

    def __len__(self) -> int:
        """How many machines are ready."""
        return len(self._ready)

    def take(self) -> Machine:
        """A machine at the snapshot: the caller's until `give`. Where none is ready, a new one."""
        if self._closed:
            raise ClosedError("this pool of machines is closed")
        try:
            machine = self._ready.pop()
        except IndexError:
            machine = self._made()
        with self._lock:
            self._out.add(machine)
        return machine

    def give(self, machine: Machine) -> None:
        """Take a machine back. One that cannot be reset, or is too many, is closed.

        Raises ConfigError for one that was not taken from here, or is back already.
        """
        with self._lock:
            if not isinstance(machine, Machine) or machine not in self._out:
                raise ConfigError(
                    f"{machine!r} is not out of this pool: give back what `take` gave, once"
                )
            self._out.remove(machine)
        try:
            machine.reset_to(self.snapshot, self._scope)
        except KvmpyError:
            self._drop(machine)
            return
        except BaseException:
            self._drop(machine)
            raise
        with self._lock:
            if not self._closed and len(self._ready) < self.size:
                self._ready.append(machine)
                return
        machine.close()

    def _drop(self, machine: Machine) -> None:
        machine.stop()
        machine.__exit__(KvmpyError, KvmpyError(), None)  # a view may be alive

    @contextmanager
    def machine(self) -> Iterator[Machine]:
        """A machine at the snapshot, for the time of a `with`."""
        machine = self.take()
        try:
            yield machine
        finally:
            self.give(machine)

    def close(self) -> None:
        """Close the machines that are ready; those that are out are closed when they come back."""
        with self._lock:
            self._closed = True
        while self._ready:
            self._ready.pop().close()

    def __enter__(self) -> "Spares":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{len(self)} of {self.size} machines ready>"
