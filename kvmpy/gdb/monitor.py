"""The `monitor` commands: what gdb has no packets for, in words."""

import shlex
from collections.abc import Callable
from typing import Any, Final

from kvmpy.errors import ConfigError, KvmpyError
from kvmpy.gdb.control import Control
from kvmpy.sizes import parse_address

__all__ = ["COMMANDS", "Monitor"]

_MOST_CODE: Final = 256
_MOST_BYTES: Final = 4096
_LONGEST: Final = 1 << 17
"""Characters of an answer, which is one packet."""
_ACCESSES: Final = ("read", "write", "fetch")


class Monitor:
    """Runs the commands on `machine`, a `Machine`, whose vCPUs are `control`'s."""

    def __init__(self, control: Control, machine: Any) -> None:
        self.control, self.machine = control, machine
        self.origin = machine.snapshot()
        """Where `reset` goes."""

    def run(self, cpu: int, line: str) -> str:
        """Carry out a command line; what it prints, or what was wrong with it."""
        try:
            name, *arguments = shlex.split(line) or ["help"]
        except ValueError as error:
            return f"{error}\n"
        if name not in COMMANDS:
            return f"no command {name!r}: try `monitor help`\n"
        usage, _, most, function = COMMANDS[name]
        least = usage.count(" ") - usage.count("[")
        if not least <= len(arguments) <= most:
            return f"usage: monitor {usage}\n"
        try:
            self.control.registers(cpu)  # with the exit at hand finished
            text = str(function(self, cpu, *arguments))
        except KvmpyError as error:
            return f"{error}\n"
        return f"{text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}\n"


def _view(name: str) -> Callable[[Monitor, int], object]:
    """A command that shows one of a machine's views."""
    return lambda monitor, cpu: getattr(monitor.machine.view.cpu(cpu), name)()


def _help(monitor: Monitor, cpu: int) -> str:
    return "\n".join(f"{usage:<22} {words}" for usage, words, _, _ in COMMANDS.values())


def _walk(monitor: Monitor, cpu: int, address: str, access: str = "read") -> object:
    if access not in _ACCESSES:
        raise ConfigError(f"{access!r}: use one of {', '.join(_ACCESSES)}")
    return monitor.machine.view.cpu(cpu).walk(parse_address(address), access)


def _code(monitor: Monitor, cpu: int, offset: str = "", count: str = "8") -> object:
    wanted = parse_address(count)
    if not 0 < wanted <= _MOST_CODE:
        raise ConfigError(f"{wanted} instructions: 1 to {_MOST_CODE}")
    start = parse_address(offset) if offset else None
    return monitor.machine.view.cpu(cpu).disassemble(start, wanted)


def _mem(monitor: Monitor, cpu: int, address: str, size: str = "64") -> object:
    start, length = parse_address(address), parse_address(size)
    if not 0 < length <= _MOST_BYTES:
        raise ConfigError(f"{length} bytes: 1 to {_MOST_BYTES}")
    return monitor.machine.view.cpu(cpu).hexdump(start, length, linear=False)


def _exits(monitor: Monitor, cpu: int) -> str:
    counts = monitor.machine.cpus[cpu].exit_counts()
    return "\n".join(f"  {name:<18} {count}" for name, count in counts.items()) or "  none yet"


def _snapshot(monitor: Monitor, cpu: int) -> str:
    monitor.origin = monitor.machine.snapshot()
    return "`monitor reset` goes back to here"


def _reset(monitor: Monitor, cpu: int) -> str:
    monitor.machine.restore(monitor.origin)
    monitor.control.forget()
    return "the guest is as it was; `maintenance flush register-cache` has gdb look again"


def _phys(monitor: Monitor, cpu: int, on: str) -> str:
    if on not in ("on", "off"):
        raise ConfigError(f"{on!r}: on or off")
    monitor.control.memory.physical = on == "on"
    return f"addresses of memory are {'physical' if on == 'on' else 'linear'} ones"


# Usage, words, the most arguments, and the function.
COMMANDS: Final[dict[str, tuple[str, str, int, Callable[..., object]]]] = {
    "help": ("help", "this list", 0, _help),
    "code": ("code [OFFSET [COUNT]]", "instructions, as the vCPU's mode reads them", 2, _code),
    "regs": ("regs", "the general registers, RIP and RFLAGS", 0, _view("registers")),
    "cr": ("cr", "control registers, bit by bit", 0, _view("control")),
    "segments": ("segments", "segments and their hidden parts", 0, _view("segments")),
    "gdt": ("gdt", "the GDT, decoded", 0, _view("gdt")),
    "ldt": ("ldt", "the LDT, decoded", 0, _view("ldt")),
    "idt": ("idt", "the IDT, decoded", 0, _view("idt")),
    "tss": ("tss", "the TSS, decoded", 0, _view("tss")),
    "walk": ("walk ADDRESS [ACCESS]", "the page walk for a linear address", 2, _walk),
    "map": ("map", "all that the page tables map", 0, _view("map")),
    "devices": ("devices", "RAM, and who answers where", 0, _view("memory_map")),
    "mem": ("mem ADDRESS [SIZE]", "bytes at a physical address", 2, _mem),
    "phys": ("phys ON_OR_OFF", "have gdb's own addresses be physical", 1, _phys),
    "exits": ("exits", "the vCPU's exits so far, by kind", 0, _exits),
    "snapshot": ("snapshot", "keep all of the guest as it is now", 0, _snapshot),
    "reset": ("reset", "back to the snapshot, at first the start", 0, _reset),
}
"""The commands by name."""
