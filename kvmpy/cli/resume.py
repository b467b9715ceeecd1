"""`kvmpy resume`: go on with a guest that `kvmpy snapshot` or `Snapshot.save` has saved."""

from pathlib import Path

import click

from kvmpy.cli.report import Report
from kvmpy.cli.run import (
    GDB,
    INPUT,
    MAX_EXITS,
    NO_AUTOPSY,
    REPORT,
    TIMEOUT,
    input_of,
    run_machine,
)
from kvmpy.cli.stdio import write_output
from kvmpy.machine import Machine
from kvmpy.snapshot import Snapshot

__all__ = ["resume"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@INPUT
@TIMEOUT
@MAX_EXITS
@click.option("--verify", type=click.Choice(("auto", "all", "index")), default="auto",
              show_default=True, help="Which checksums to compare first.")  # fmt: skip
@click.option("--across-backends", is_flag=True,
              help="Try it though it was saved under another backend.")  # fmt: skip
@GDB
@REPORT
@NO_AUTOPSY
def resume(
    *,
    file: Path,
    input_path: Path | None,
    timeout: float | None,
    max_exits: int | None,
    verify: str,
    across_backends: bool,
    gdb: str | None,
    report_path: Path | None,
    no_autopsy: bool,
) -> int:
    """Go on with the guest saved in FILE; console, report and exit status are those of run."""
    report = Report(report_path)
    source = input_of(input_path)
    snapshot = Snapshot.load(file, verify=verify)
    report.mode = snapshot.config.mode
    with Machine.from_snapshot(
        snapshot, output=write_output, input=source, across_backends=across_backends
    ) as machine:
        start = None if no_autopsy else snapshot
        return run_machine(machine, report, timeout, max_exits, gdb=gdb, start=start)
