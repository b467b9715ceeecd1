"""What is found out once in each process."""

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Once"]

_T = TypeVar("_T")


class Once(Generic[_T]):
    """A value of this process: a child that was forked finds out its own.

    Threads that ask at the same time may find it out twice; each gets one.
    """

    def __init__(self) -> None:
        self._found: tuple[int, _T] | None = None

    def get(self, find: Callable[[], _T]) -> _T:
        """The value, by `find` where nobody has asked yet."""
        found, process = self._found, os.getpid()
        if found is None or found[0] != process:
            self._found = found = process, find()
        return found[1]

    def forget(self) -> None:
        """Find it out again the next time."""
        self._found = None
