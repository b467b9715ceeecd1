"""The `monitor` commands: what gdb has no packets for, in words."""

import shlex
from collections.abc import Callable
from typing import Any, Final

from kvmpy.errors import ConfigError, KvmpyError
from kvmpy.gdb.control import Control
from kvmpy.sizes import parse_address
from kvmpy.views.descriptors import gdt_view
from kvmpy.views.gates import idt_view
from kvmpy.views.pages import page_walk
from kvmpy.x86.paging import PageFlags
from kvmpy.x86.registers import REGISTER_NAMES
from kvmpy.x86.state import SpecialRegisters

__all__ = ["COMMANDS", "Monitor"]

_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_MOST: Final = 4096


class Monitor:
    """Runs the commands on `machine`, whose vCPUs are `control`'s."""

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
        names = [one for one in COMMANDS if one.startswith(name)]
        if name not in COMMANDS and len(names) != 1:
            return f"no command {name!r}: try `monitor help`\n"
        usage, _, function = COMMANDS[name if name in COMMANDS else names[0]]
        try:
            lines = function(self, cpu, *arguments)
        except KvmpyError as error:
            return f"{error}\n"
        except TypeError:
            return f"usage: monitor {usage}\n"
        return "".join(f"{one}\n" for one in lines)

    def special(self, cpu: int) -> SpecialRegisters:
        """The special registers of a vCPU."""
        return self.control.registers(cpu).special


def _help(monitor: Monitor, cpu: int) -> list[str]:
    return [f"{usage:<18} {words}" for usage, words, _ in COMMANDS.values()]


def _regs(monitor: Monitor, cpu: int) -> list[str]:
    values = monitor.control.registers(cpu).general.as_dict()
    names = list(REGISTER_NAMES)
    return [
        "  ".join(f"{name:>6} {values[name]:016x}" for name in names[at : at + 3])
        for at in range(0, len(names), 3)
    ]


def _cr(monitor: Monitor, cpu: int) -> list[str]:
    special = monitor.special(cpu)
    names = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
    lines = ["  ".join(f"{name} {getattr(special, name):x}" for name in names)]
    for name in _SEGMENTS:
        one = getattr(special, name)
        bits = f"type {one.type:x} s {one.s} dpl {one.dpl} p {one.present} l {one.l} db {one.db}"
        lines.append(f"{name:>4} {one.selector:04x} base {one.base:x} limit {one.limit:x} {bits}")
    for name in ("gdt", "idt"):
        table = getattr(special, name)
        lines.append(f"{name:>4}      base {table.base:x} limit {table.limit:x}")
    return lines


def _gdt(monitor: Monitor, cpu: int) -> list[str]:
    view = gdt_view(monitor.control.memory.read_ram, monitor.special(cpu))
    lines = [f"GDT at {view.base:#x}, limit {view.limit:#x}{_note(view.problem)}"]
    for one in view.entries:
        if any(one.raw):
            base = "" if one.segment is None else f" base {one.segment.base:#x} dpl "
            dpl = "" if one.segment is None else str(one.segment.dpl)
            lines.append(f"  {one.selector:04x} {one.kind}{base}{dpl}{_note(one.problem)}")
    return lines


def _idt(monitor: Monitor, cpu: int) -> list[str]:
    view = idt_view(monitor.control.memory.read_ram, monitor.special(cpu))
    lines = [f"{view.name} at {view.base:#x}, limit {view.limit:#x}{_note(view.problem)}"]
    for one in view.entries:
        if any(one.raw):
            target = f"{one.selector:04x}:{one.offset:x}"
            lines.append(
                f"  {one.vector:3} {one.name:4} {one.kind} {target} dpl {one.dpl}"
                f"{_note(one.problem)}"
            )
    return lines


def _note(problem: str) -> str:
    return f" - {problem}" if problem else ""


def _walk(monitor: Monitor, cpu: int, address: str) -> list[str]:
    linear = parse_address(address)
    found = page_walk(monitor.control.memory.read_ram, monitor.special(cpu), linear)
    lines = [f"{found.mode}, CR3 {monitor.special(cpu).cr3:#x}"]
    for one in found.entries:
        value = "(no RAM)" if one.value is None else f"{one.value:016x}"
        note = one.problem or " ".join(flag.name or "" for flag in PageFlags if flag & one.flags)
        lines.append(f"  {one.name}[{one.index}] at {one.address:#x}: {value} {note}")
    where = "nowhere" if found.physical is None else f"physical {found.physical:#x}"
    return [*lines, f"{linear:#x} leads to {where}: {found.why}"]


def _code(monitor: Monitor, cpu: int, address: str = "", count: str = "8") -> list[str]:
    from capstone import CS_ARCH_X86, CS_MODE_16, CS_MODE_32, CS_MODE_64, Cs

    special, wanted = monitor.special(cpu), parse_address(count)
    start = parse_address(address) if address else monitor.control.registers(cpu).pc
    if wanted > _MOST // 16:
        raise ConfigError(f"{wanted} instructions: at most {_MOST // 16}")
    data = monitor.control.memory.read(special, start, 15 * wanted)
    mode = CS_MODE_64 if special.cs.l else CS_MODE_32 if special.cs.db else CS_MODE_16
    lines = [
        f"{one.address:#10x}: {one.bytes.hex(' '):<24} {one.mnemonic} {one.op_str}".rstrip()
        for one in Cs(CS_ARCH_X86, mode).disasm(data, start, wanted)
    ]
    return lines or [f"no instruction at {start:#x}"]


def _map(monitor: Monitor, cpu: int) -> list[str]:
    regions = [f"  [{one.address:#x}, {one.end:#x}) RAM" for one in monitor.control.memory.ram]
    layout = monitor.machine.layout.describe()
    return [*regions, *(f"    [{one.start:#x}, {one.end:#x}) {one.name}" for one in layout)]


def _mem(monitor: Monitor, cpu: int, address: str, size: str = "64") -> list[str]:
    start, length = parse_address(address), parse_address(size)
    if length > _MOST:
        raise ConfigError(f"{length} bytes: at most {_MOST}")
    data = monitor.control.memory.ram.read(start, length)
    lines = []
    for at in range(0, length, 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start + at:#010x}  {row.hex(' '):<47}  {text}")
    return lines


def _devices(monitor: Monitor, cpu: int) -> list[str]:
    dispatch = monitor.machine.dispatch
    return [
        f"  {bus.kind} [{one.base:#x}, {one.base + one.size:#x}) {one.name}"
        for bus in (dispatch.ports, dispatch.mmio)
        for one in bus
    ]


def _exits(monitor: Monitor, cpu: int) -> list[str]:
    counts = monitor.machine.cpus[cpu].exit_counts()
    return [f"  {name:<18} {count}" for name, count in counts.items()] or ["  none yet"]


def _snapshot(monitor: Monitor, cpu: int) -> list[str]:
    monitor.origin = monitor.machine.snapshot()
    return ["`monitor reset` goes back to here"]


def _reset(monitor: Monitor, cpu: int) -> list[str]:
    monitor.machine.restore(monitor.origin)
    monitor.control.forget()
    return ["the guest is as it was; `maintenance flush register-cache` has gdb look again"]


def _phys(monitor: Monitor, cpu: int, on: str) -> list[str]:
    if on not in ("on", "off"):
        raise ConfigError(f"{on!r}: on or off")
    monitor.control.memory.physical = on == "on"
    return [f"addresses of memory are {'physical' if on == 'on' else 'linear'} ones"]


COMMANDS: Final[dict[str, tuple[str, str, Callable[..., list[str]]]]] = {
    "help": ("help", "this list", _help),
    "code": ("code [ADDR [N]]", "instructions, as the vCPU's mode reads them", _code),
    "regs": ("regs", "the general registers", _regs),
    "cr": ("cr", "control registers, segments, tables", _cr),
    "gdt": ("gdt", "the GDT, decoded", _gdt),
    "idt": ("idt", "the IDT, decoded", _idt),
    "walk": ("walk ADDR", "the page tables for a linear address", _walk),
    "map": ("map", "RAM, and what kvmpy keeps there", _map),
    "mem": ("mem ADDR [SIZE]", "bytes at a physical address", _mem),
    "phys": ("phys on|off", "have gdb's own addresses be physical", _phys),
    "devices": ("devices", "who answers which ports and addresses", _devices),
    "exits": ("exits", "the vCPU's exits so far, by kind", _exits),
    "snapshot": ("snapshot", "keep all of the guest as it is now", _snapshot),
    "reset": ("reset", "back to the snapshot, at first the start", _reset),
}
"""Usage, words and function of each command."""
