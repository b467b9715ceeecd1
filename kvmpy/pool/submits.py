"""What `kvmpy.map` asks of an executor."""

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Submits"]


class Submits(Protocol):
    """What `map` needs of an executor: `submit`, which gives a future."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """A future of `function(*args)`, with `result`, `cancel` and `add_done_callback`."""
