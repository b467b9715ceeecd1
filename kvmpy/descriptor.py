"""What the classes for KVM's file descriptors share: ownership, closing, one-line ioctls."""

import os
import warnings
from types import TracebackType
from typing import Self

from kvmpy.abi import WritableBuffer, ioctl
from kvmpy.errors import ClosedError

__all__ = ["Descriptor"]


class Descriptor:
    """One file descriptor of KVM's, closed at most once; a context manager.

    `what` names it in messages: "the VM", "vCPU 0".
    """

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self.what = what

    @property
    def fd(self) -> int:
        """The descriptor; ClosedError after `close()`."""
        if self._fd < 0:
            raise ClosedError(f"{self.what} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._fd < 0

    def ioctl(self, name: str, argument: int | WritableBuffer = 0, hint: str = "") -> int:
        """Issue an ioctl of the table by its name without KVM_ (see `abi.IOCTLS`)."""
        return ioctl(self.fd, name, argument, hint)

    def close(self) -> None:
        """Close the descriptor; calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        self.fd  # noqa: B018 - a closed one is refused here
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An __init__ that failed early leaves no _fd; at exit the module may be half gone.
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"{self.what} was never closed", ResourceWarning, stacklevel=2)
            self._dispose()

    def _dispose(self) -> None:
        """Close whatever happens: nobody is left to hear of an error."""
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self._fd}"
        return f"<{type(self).__name__} {self.what}, {state}>"
