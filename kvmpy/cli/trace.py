"""`kvmpy trace`: run a guest and show each of its exits in words; compare two traces."""

from functools import partial
from pathlib import Path
from typing import Final

import click

from kvmpy.cli import complain
from kvmpy.cli.live import Kept, Lines, Live, Output
from kvmpy.cli.options import VerbsOfGuest
from kvmpy.cli.report import Report
from kvmpy.cli.run import (
    INPUT,
    MAX_EXITS,
    REPORT,
    TIMEOUT,
    guest_options,
    image_of,
    input_of,
    run_machine,
)
from kvmpy.machine import Machine
from kvmpy.trace.diff import Parting, parting
from kvmpy.trace.exports import check_path
from kvmpy.trace.jsonl import TraceFile
from kvmpy.trace.record import Record
from kvmpy.trace.text import line

__all__ = ["trace"]

_GUEST: Final = "guest"
_FILE: Final = click.Path(path_type=Path)


@click.group(
    cls=VerbsOfGuest,
    default=_GUEST,
    usage=("GUEST [--out FILE.{txt,jsonl,json,html}] [OPTIONS]", "diff FILE.jsonl FILE.jsonl"),
)
def trace() -> None:
    """Run GUEST and show each of its exits: when, what, by whom it was served."""


@trace.command(_GUEST, short_help="What is done without a word, too.")
@guest_options
@INPUT
@TIMEOUT
@MAX_EXITS
@click.option("--out", type=_FILE, metavar="FILE",
              help="Write it to a .txt, .jsonl, .json (ui.perfetto.dev) or .html.")  # fmt: skip
@REPORT
def guest(
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
    max_exits: int | None,
    out: Path | None,
    report_path: Path | None,
) -> int:
    """Run GUEST and show each of its exits (what `kvmpy trace GUEST` does).

    Exits go to standard error or, with --out, to a file, a summary to standard error, the guest's
    console to standard output; where both are one, the console comes by lines. The exit status
    is that of `kvmpy run`.
    """
    report = Report(report_path)
    image = image_of(guest, mode, ring, load, entry)
    report.mode = image.mode
    source = input_of(input_path)
    with _output(out) as output:
        options = {"output": output.console, "input": source, "strict": strict}
        with Machine.from_image(image, memory, **options) as machine:
            recorder = machine.trace
            recorder.start(sink=output.record)
            output.flush = partial(recorder.drain, machine.cpus[0])
            status = run_machine(machine, report, timeout, max_exits)
            output.flush = recorder.stop
            recorder.stop()
            output.finish(recorder.dropped)
    return status


def _output(out: Path | None) -> Output:
    if out is None:
        return Live()
    check_path(out)
    return Lines(out) if out.suffix in (".txt", ".jsonl") else Kept(out)


@trace.command()
@click.argument("one", type=_FILE, metavar="FILE.jsonl")
@click.argument("other", type=_FILE, metavar="FILE.jsonl")
def diff(one: Path, other: Path) -> int:
    """Show the first exit where two traces part. Exit status: 0 they are the same, 1 they part."""
    files = (TraceFile(one), TraceFile(other))
    found = parting(*(file.__iter__ for file in files))
    for file in files:
        if file.cut:
            complain(f"{file.path} was cut off after {file.records} records")
        if file.dropped:
            complain(
                f"{file.path} lacks {file.dropped} records, which were dropped: "
                "only those that are there are compared"
            )
    if found is None:
        whole = not any(file.cut or file.dropped for file in files)
        click.echo("the same exits" + ("" if whole else ", of those that are there"))
        return 0
    click.echo("\n".join(_described(found, one, other)))
    return 1


def _described(found: Parting, one: Path, other: Path) -> list[str]:
    what = ", ".join(found.differing) or "one of them ends"
    lines = [f"vCPU {found.cpu}: they part after {found.exit} exits: {what}"]
    lines += [f"  {_exit(record)}" for record in found.before]
    for mark, path, records in (("-", one, found.one), ("+", other, found.other)):
        shown = [f"{mark} {_exit(record)}" for record in records] or [f"{mark} (its end)"]
        lines += [f"{mark * 3} {path}", *shown]
    return lines


def _exit(record: Record) -> str:
    """A record without what two runs never have in common: times."""
    text = line(record, record.left)[_WITHOUT_TIME:]
    return text[: text.rindex(record.level)].rstrip()


_WITHOUT_TIME: Final = 13
