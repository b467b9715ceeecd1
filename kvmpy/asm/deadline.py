"""The time that one source may take."""

import time

from kvmpy.errors import AssemblyError

__all__ = ["Deadline"]


class Deadline:
    """A number of seconds, counted from now."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def extend(self, seconds: float) -> None:
        """Leave out of account a wait that is not the source's fault."""
        self._end += seconds

    def left(self) -> float:
        """The seconds that are left; raises AssemblyError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise AssemblyError(f"the source takes more than {self._seconds:g} s to assemble")
        return left
