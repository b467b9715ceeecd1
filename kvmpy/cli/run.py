"""`kvmpy run`: boot a guest, its console on standard output, and say how it ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from kvmpy.boot.image import Image, load_image
from kvmpy.cli import HOST_FAILED, INTERRUPTED, complain
from kvmpy.cli.options import ADDRESS, SIZE, Number
from kvmpy.cli.postmortem import postmortem
from kvmpy.cli.report import Report
from kvmpy.cli.stdio import input_file, read_input, write_output
from kvmpy.devices import exit_status
from kvmpy.errors import ConfigError, HostError
from kvmpy.machine import Machine
from kvmpy.modes import MODES
from kvmpy.result import Result
from kvmpy.snapshot import Snapshot
from kvmpy.views.pages import page_walk, reader
from kvmpy.x86.flags import CR0

__all__ = [
    "CRASHED",
    "GDB",
    "INPUT",
    "KILLED",
    "MAX_EXITS",
    "NO_AUTOPSY",
    "REPORT",
    "TIMED_OUT",
    "TIMEOUT",
    "guest_options",
    "image_of",
    "input_of",
    "run",
    "run_machine",
]

TIMED_OUT: Final = 124
CRASHED: Final = 126
KILLED: Final = 137  # 128 + SIGKILL
_STATUS: Final = {
    "halt": 0,
    "reset": 0,
    "power-off": 0,
    "timeout": TIMED_OUT,
    "max-exits": TIMED_OUT,
    "interrupted": INTERRUPTED,
}


def guest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of verbs that boot a guest: those of `boot`."""
    for option in reversed(_GUEST_OPTIONS):
        command = option(command)
    return command


_GUEST_OPTIONS: Final = (
    click.argument("guest"),
    click.option("--mode", type=click.Choice(("auto", *MODES)), default="auto", show_default=True),
    click.option("--ring", type=click.Choice(("0", "3")), help="The privilege level to start at."),
    click.option("--memory", type=SIZE, metavar="SIZE", help="RAM, such as 64M.  [default: 16M]"),
    click.option("--load", type=ADDRESS, metavar="ADDR", help="Where a flat image goes."),
    click.option("--entry", type=ADDRESS, metavar="ADDR", help="Where the guest starts."),
    click.option("--strict", is_flag=True, help="An access that no device claims ends the run."),
)
INPUT: Final = click.option(
    "--input", "input_path", type=click.Path(path_type=Path), metavar="FILE",
    help="Feed the serial port from FILE instead of standard input.",
)  # fmt: skip
TIMEOUT: Final = click.option(
    "--timeout", type=Number(min=0, max=1e6), metavar="SECONDS",
    help="End the run after that long.",
)  # fmt: skip
MAX_EXITS: Final = click.option(
    "--max-exits", type=click.IntRange(min=1), metavar="N", help="... or that many exits."
)
REPORT: Final = click.option(
    "--report", "report_path", type=click.Path(path_type=Path), metavar="FILE",
    help="Write what happened to FILE as JSON.",
)  # fmt: skip
GDB: Final = click.option(
    "--gdb", metavar="ADDR", help="Wait for gdb at PORT on loopback, HOST:PORT or unix:PATH."
)
NO_AUTOPSY: Final = click.option(
    "--no-autopsy", is_flag=True, help="Do not look for the reason of a crash."
)


def image_of(guest: str, mode: str, ring: str | None, load: int | None, entry: int | None) -> Image:
    """The guest that those options are about."""
    level = None if ring is None else int(ring)
    return load_image(guest, mode=mode, ring=level, load=load, entry=entry)


def input_of(path: Path | None) -> Callable[[], bytes]:
    """What feeds the serial port."""
    return read_input() if path is None else input_file(path)


@click.command()
@guest_options
@INPUT
@TIMEOUT
@MAX_EXITS
@click.option("--posted-console", is_flag=True,
              help="Let KVM collect console bytes: cheaper, up to 50 ms late.")  # fmt: skip
@GDB
@REPORT
@NO_AUTOPSY
def run(
    *,
    guest: str,
    mode: str,
    ring: str | None,
    memory: int | None,
    load: int | None,
    entry: int | None,
    input_path: Path | None,
    timeout: float | None,
    max_exits: int | None,
    strict: bool,
    posted_console: bool,
    gdb: str | None,
    report_path: Path | None,
    no_autopsy: bool,
) -> int:
    """Run GUEST: a .S source, a static ELF64, a flat binary, or a shipped guest's name.

    Exit status: 0 halt, reset, power-off; ((v << 1) | 1) & 255 for a debug-exit of v; 2 bad
    input; 124 timeout or max-exits; 125 the host, kvmpy or a device failed; 126 the guest
    crashed; 130 Ctrl-C; 137 gdb killed it.
    """
    report = Report(report_path)
    image = image_of(guest, mode, ring, load, entry)
    report.mode = image.mode
    machine = Machine.from_image(
        image,
        memory,
        output=write_output,
        input=input_of(input_path),
        strict=strict,
        posted_console=posted_console,
    )
    with machine:
        start = None if no_autopsy else image
        return run_machine(machine, report, timeout, max_exits, gdb=gdb, start=start)


def run_machine(
    machine: Machine,
    report: Report,
    timeout: float | None,
    max_exits: int | None,
    *,
    gdb: str | None = None,
    start: Image | Snapshot | None = None,
) -> int:
    """Run it, or have gdb run it; say how it ended, and give the exit status.

    If it crashes, the autopsy replays it from `start` where it must; None is no autopsy.
    """
    try:
        if gdb is None:
            result = machine.run(timeout=timeout, max_exits=max_exits)
        elif timeout is not None or max_exits is not None:
            raise ConfigError("--gdb goes without --timeout and --max-exits: gdb ends the run")
        else:
            served = machine.gdb(gdb, complain)
            if served is None:
                complain("killed by gdb")
                return report.failed(machine, "killed", KILLED)
            result = served
    except KeyboardInterrupt:
        complain("interrupted")
        return report.failed(machine, "interrupted", INTERRUPTED)
    except ConfigError:
        raise  # an option of ours, not a failure of the run
    except HostError as error:
        complain(str(error))
        return report.failed(machine, "host-error", HOST_FAILED)
    except Exception as error:
        complain(f"a device failed: {error}; {' '.join(getattr(error, '__notes__', ()))}")
        return report.failed(machine, "device-error", HOST_FAILED)
    status = _status(result)
    for line in result.unclaimed:
        complain(f"no device claims {line}")
    if result.crashed:
        report.autopsy = postmortem(machine, result, start)
    elif status in (TIMED_OUT, HOST_FAILED) and result.outcome != "debug-exit":
        complain(str(result))
        complain(_where(machine))
        if result.outcome == "timeout" and (why := _without_gdt(machine)):
            complain(why)
    return report.finished(machine, result, status)


def _where(machine: Machine) -> str:
    """The instruction that the guest would go on with, in one line."""
    code = machine.view.disassemble(count=4)
    if not code.instructions:
        return f"at {code.problem}"
    one = code.instructions[0]
    text = f"at {one.address:#x}{one.symbol and ' ' + one.symbol}: {one.text}"
    if any(any(each.data) for each in code.instructions):
        return text
    text += " (zeros: a jump, call or return has led to where nothing was loaded"
    empty = ", or an exception or INT n to an empty vector" if code.mode.bits == 16 else ""
    return f"{text}{empty})"


def _without_gdt(machine: Machine) -> str:
    """A line where GDTR leads to no RAM: there KVM tries to load a segment for ever."""
    cpu = machine.cpus[0]
    special = cpu.get_sregs()
    gdt = special.gdt
    if not special.cr0 & CR0.PE or gdt.limit < 7:
        return ""
    walk = page_walk(reader(machine.memory.read), special, gdt.base, cpl=0)
    if walk.physical is None or walk.in_ram:
        return ""
    return (
        f"GDTR's base is {gdt.base:#x}, where there is no RAM: loading a segment register from "
        "there may never end; load GDTR (LGDT) with the address of the table"
    )


def _status(result: Result) -> int:
    if result.outcome == "debug-exit":
        return exit_status(result.value or 0)
    return CRASHED if result.crashed else _STATUS.get(result.outcome, HOST_FAILED)
