"""A port that ends the run with a status: QEMU's `isa-debug-exit` device.

QEMU has it at a port of the user's choice; 0xf4 with 4 ports is what kvm-unit-tests and
most hobby kernels ask for (QEMU hw/misc/debugexit.c).
"""

from collections.abc import Callable

__all__ = ["PORT", "SIZE", "DebugExit", "exit_status"]

PORT = 0xF4
SIZE = 4


def exit_status(value: int) -> int:
    """Return the process status for a debug exit of `value`, by QEMU's rule.

    It is always odd, so that no value of the guest's looks like the success of a halt.
    """
    return ((value << 1) | 1) & 0xFF


class DebugExit:
    """Calls `on_exit(value)` when the guest writes a value of any size; reads give 0."""

    name = "debug exit"

    def __init__(self, on_exit: Callable[[int], object]) -> None:
        self.on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Return 0, as QEMU's device does."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run with `value`."""
        self.on_exit(value)
