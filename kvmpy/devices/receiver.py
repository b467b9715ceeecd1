"""What waits to be received at a serial port: looped-back bytes, then the host's."""

from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["FIFO_SIZE", "Receiver"]

FIFO_SIZE = 16


class Receiver:
    """The receiver of a 16550A, in front of a backlog of host input without bound.

    The chip's FIFO is a window on the front of the backlog, so that host input is never
    lost: neither when there is more than fits, nor when the guest clears the FIFO. In
    loopback mode (`looping`) the backlog is out of sight. Only bytes that are looped back
    meet the FIFO's true size: `depth`, 16 or (FIFOs disabled) 1.
    """

    def __init__(self, source: Callable[[], bytes] | None) -> None:
        self.source = source
        self.looping = False
        self.depth = 1
        self.overrun = False
        self._looped: deque[int] = deque()
        self._backlog: deque[int] = deque()

    def feed(self, data: bytes) -> None:
        """Append host input."""
        self._backlog.extend(data)

    def waiting(self) -> int:
        """Return how many bytes can be received, those past the FIFO's end included."""
        return len(self._looped) + (0 if self.looping else len(self._backlog))

    def poll(self) -> bool:
        """Ask the source, where nothing waits; return whether that brought input."""
        if self.source is None or self.looping or self.waiting():
            return False
        data = self.source()
        self.feed(data)
        return bool(data)

    def take(self) -> int:
        """Remove and return the oldest byte; 0 where there is none."""
        if self._looped:
            return self._looped.popleft()
        if self._backlog and not self.looping:
            return self._backlog.popleft()
        return 0

    def loop_back(self, byte: int) -> None:
        """Receive a byte from the transmitter; where there is no room, that is an overrun.

        A full FIFO keeps what it has; without FIFOs the newer byte replaces the older
        (PC16550D data sheet, 8.4).
        """
        if len(self._looped) < self.depth:
            self._looped.append(byte)
            return
        self.overrun = True
        if self.depth == 1:
            self._looped[0] = byte

    def clear(self) -> None:
        """Empty the FIFO: drop what was looped back."""
        self._looped.clear()

    def save(self) -> dict[str, int | list[int]]:
        """All of it but the source, as JSON."""
        return {
            "looping": self.looping,
            "depth": self.depth,
            "overrun": self.overrun,
            "looped": list(self._looped),
            "backlog": list(self._backlog),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take what `save` gave."""
        self.looping, self.depth = state["looping"], state["depth"]
        self.overrun = state["overrun"]
        self._looped, self._backlog = deque(state["looped"]), deque(state["backlog"])
