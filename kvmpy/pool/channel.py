"""Messages between two processes, where each may be killed in the midst of one.

The end of a pipe is no sign of that: a process that has been forked from either holds it open.
So the parent looks at its child's death itself, and what it does never waits for one that is dead.
"""

import contextlib
import os
import select
import socket
import struct
from typing import Final

__all__ = ["Channel", "death_of", "pair"]

_SIZE: Final = struct.Struct("<Q")


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, for a `Channel` each."""
    return socket.socketpair()


def death_of(pid: int, sentinel: int) -> int:
    """A descriptor that can be read once the child has died; the caller closes it.

    Its pidfd; where that cannot be had (pidfd_open(2) is of Linux 5.3), a copy of multiprocessing's
    `sentinel`, which a process forked from the child keeps from telling.
    """
    with contextlib.suppress(AttributeError, OSError):
        return os.pidfd_open(pid)
    return os.dup(sentinel)


class Channel:
    """One end. With `death`, of the process at the other end, it raises EOFError after that.

    What was sent as a whole before is received nevertheless.
    """

    def __init__(self, end: socket.socket, death: int | None = None) -> None:
        self._end, self._death = end, death
        self._over = False
        end.setblocking(death is None)

    def send(self, data: bytes) -> None:
        """Send a message; OSError or EOFError if nobody will read it."""
        left = memoryview(_SIZE.pack(len(data)) + data)
        while left:
            try:
                left = left[self._end.send(left, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def receive(self) -> bytearray:
        """The next message; OSError or EOFError if there will be none, or the rest of one."""
        (size,) = _SIZE.unpack(self._exactly(_SIZE.size))
        return self._exactly(size)

    def _exactly(self, size: int) -> bytearray:
        data, got = bytearray(size), 0
        with memoryview(data) as room:
            while got < size:
                try:
                    count = self._end.recv_into(room[got:])
                except BlockingIOError:
                    self._wait(select.POLLIN)
                    continue
                if not count:
                    raise EOFError
                got += count
        return data

    def _wait(self, events: int) -> None:
        if self._over:
            raise EOFError
        assert self._death is not None  # or it is blocking
        waiting = select.poll()
        waiting.register(self._end, events)
        waiting.register(self._death, select.POLLIN)
        self._over = any(descriptor == self._death for descriptor, _ in waiting.poll())

    def close(self) -> None:
        """Close this end."""
        self._end.close()
