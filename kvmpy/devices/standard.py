"""The devices that every machine has, each attached where a PC or QEMU has it."""

from collections.abc import Callable, Collection
from typing import Final, Protocol

from ..bus import Claim, Device
from . import console, debugexit, post, power, reset, serial

__all__ = ["CONSOLE_PORTS", "attach", "has_all"]

CONSOLE_PORTS: Final = (console.PORT, console.FIRMWARE_PORT)


_STATEFUL: Final = frozenset(
    f"port {port:#x}" for port in (serial.PORT, post.PORT, reset.CONTROL_PORT)
)


def has_all(names: Collection[str]) -> bool:
    """Whether the devices of a snapshot, by bus and address, are all of these."""
    return _STATEFUL.issuperset(names)


class _Finish(Protocol):
    def __call__(self, outcome: str, detail: str = "", value: int | None = None) -> None: ...


def attach(
    attach_port: Callable[[int, int, Device], Claim],
    output: Callable[[bytes], object],
    input: Callable[[], bytes] | None,
    finish: _Finish,
) -> dict[str, Device]:
    """Attach the standard devices, and return them by name.

    Console and serial port write to `output`; the serial port reads from `input`; the devices
    that end a run call `finish` with the outcome.
    """
    debug_console = console.DebugConsole(output)
    uart = serial.Serial16550A(output, input)
    codes = post.PostCode()
    keyboard = reset.KeyboardReset(lambda: finish("reset", "by the keyboard controller"))
    control = reset.ResetControl(lambda: finish("reset", "by the reset control register"))
    debug_exit = debugexit.DebugExit(lambda value: finish("debug-exit", f"value {value}", value))
    power_off = power.PowerOff(lambda: finish("power-off"))

    attach_port(console.PORT, console.SIZE, debug_console)
    attach_port(console.FIRMWARE_PORT, console.SIZE, debug_console)
    attach_port(serial.PORT, serial.SIZE, uart)
    attach_port(post.PORT, post.SIZE, codes)
    attach_port(reset.KEYBOARD_PORT, reset.SIZE, keyboard)
    attach_port(reset.CONTROL_PORT, reset.SIZE, control)
    attach_port(debugexit.PORT, debugexit.SIZE, debug_exit)
    attach_port(power.PORT, power.SIZE, power_off)
    devices: tuple[Device, ...] = (
        debug_console,
        uart,
        codes,
        keyboard,
        control,
        debug_exit,
        power_off,
    )
    return {device.name: device for device in devices}
