"""`kvmpy snapshot`: run a guest to a place and save it there; look at what is saved."""

from pathlib import Path
from typing import Final

import click

from kvmpy.cli import BAD_INPUT, complain
from kvmpy.cli.options import VerbsOfGuest
from kvmpy.cli.run import (
    CRASHED,
    INPUT,
    TIMED_OUT,
    TIMEOUT,
    guest_options,
    image_of,
    input_of,
)
from kvmpy.cli.stdio import write_output
from kvmpy.cli.until import PLACE, Place, crashed, run_until
from kvmpy.machine import Machine
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot import Snapshot
from kvmpy.snapshot.load import SnapshotFile
from kvmpy.snapshot.newfile import check_new_file
from kvmpy.snapshot.zstd import compressor
from kvmpy.x86.registers import Registers

__all__ = ["snapshot"]

_TAKE: Final = "take"
_FILE: Final = click.Path(path_type=Path)


@click.group(
    cls=VerbsOfGuest,
    default=_TAKE,
    usage=("GUEST --at PLACE --out FILE [OPTIONS]", "info FILE...", "diff FILE FILE"),
)
def snapshot() -> None:
    """Run GUEST to a place and save all of the machine there, for `kvmpy resume`."""


@snapshot.command(_TAKE, short_help="What is done without a word, too.")
@guest_options
@INPUT
@TIMEOUT
@click.option("--at", "place", type=PLACE, required=True, metavar="PLACE",
              help="exit=N, port=P (after an access to it) or symbol=NAME.")  # fmt: skip
@click.option("--out", type=_FILE, required=True, metavar="FILE", help="The file to write.")
@click.option("--compress", type=click.Choice(("zstd",)), help="Smaller, and slower to load.")
def take(
    *,
    guest: str,
    mode: str,
    ring: str | None,
    memory: int | None,
    load: int | None,
    entry: int | None,
    strict: bool,
    input_path: Path | None,
    timeout: float | None,
    place: Place,
    out: Path,
    compress: str | None,
) -> int:
    """Run GUEST to a place and save all of the machine there (what `kvmpy snapshot GUEST` does).

    Exit status: 0 saved; 2 bad input, or the guest ended before; 124 timeout; 125 the host failed;
    126 the guest crashed before; 130 Ctrl-C.
    """
    check_new_file(out)  # what would fail after the run is better known before
    if compress is not None:
        compressor()
    image = image_of(guest, mode, ring, load, entry)
    options = {"output": write_output, "input": input_of(input_path), "strict": strict}
    with Machine.from_image(image, memory, **options) as machine:
        ended = run_until(machine, image, place, timeout)
        if ended is not None:
            complain(f"the guest ended before it came to {place}: {ended.text}")
            if ended.outcome == "timeout":
                return TIMED_OUT
            return CRASHED if crashed(ended) else BAD_INPUT
        machine.snapshot().save(out, compress=compress)
    return 0


@snapshot.command()
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
@click.option("--verify", is_flag=True, help="Compare the checksums of all pages, too.")
def info(files: tuple[Path, ...], verify: bool) -> None:
    """Say what is in snapshot files; without KVM."""
    for file in files:
        opened = SnapshotFile(file)
        if verify:
            opened.verify()
        click.echo("\n".join(_described(opened, verify)))


def _described(file: SnapshotFile, verified: bool) -> list[str]:
    what, header = file.contents, file.header
    config = what.config
    pages = sum(table.pages for table in file.tables)
    repeats = sum(len(table.repeats) for table in file.tables)
    registers = Registers.unpack(what.cpus[0]["REGS"])
    entry = "none" if what.entry is None else f"{what.entry:#x}"
    rows = {
        "backend": what.backend,
        "mode": f"{config.mode}, ring {config.ring}",
        "RAM": f"{pages * PAGE_SIZE} bytes, {pages} pages",
        "stored": f"{file.stored // PAGE_SIZE} pages, {repeats} more repeat one, others are zeros",
        "file": f"{header.file_size} bytes, {file.disk_size} on the disk",
        "compression": header.compress or "none: machines map it",
        "checksums": "right" if verified else "right, those of pages not compared (--verify)",
        "vCPUs": f"{len(what.cpus)}, irqchip {config.irqchip or 'none'}",
        "entry": f"{entry}, RIP {registers.rip:#x}",
        "devices": ", ".join(what.devices) or "none",
        "attached": ", ".join(map(str, what.attached)) or "standard devices only",
        "console": f"{len(what.console)} bytes",
    }
    width = max(map(len, rows))
    return [f"{file.path}", *(f"  {name:<{width}}  {text}" for name, text in rows.items())]


@snapshot.command()
@click.argument("one", type=_FILE, metavar="FILE")
@click.argument("other", type=_FILE, metavar="FILE")
def diff(one: Path, other: Path) -> int:
    """Say what differs between two snapshots. Exit status: 0 nothing, 1 something."""
    found = Snapshot.load(one).diff(Snapshot.load(other))
    click.echo(str(found))
    return int(bool(found))
