"""`kvmpy bench`: exit latencies, with what it takes to judge them."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmpy.cli import HOST_FAILED
from kvmpy.cli.benchwords import BenchCommand, need_numpy, show
from kvmpy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmpy.bench import Case, Measurement

__all__ = ["bench"]

# Samples of a batch, batches, and the seconds after which none is taken again.
QUICK = (200, 5, 35.0)
FULL = (300, 20, 240.0)


@click.command(cls=BenchCommand)
@click.argument("operations", nargs=-1, metavar="[OPERATION]...")
@click.option("--level", "levels", multiple=True, help="kernel, c or python; repeatable.")
@click.option("--mode", "modes", multiple=True, help="real, protected, long or ring3; repeatable.")
@click.option("--quick", is_flag=True, help="Fewer samples, and long mode only: under a minute.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N",
              help="Samples of each batch, at most 1,000,000.")  # fmt: skip
@click.option("--batches", type=click.IntRange(1, 1000), metavar="N",
              help="Batches of each case: 20, or 5 with --quick.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the result, as kvmpy/bench/schema.json describes it.")  # fmt: skip
@click.option("--raw", is_flag=True, help="Every sample goes into the JSON; needs --json.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a line for each case.")  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw ECDFs and waterfalls; the suffix chooses the format.")  # fmt: skip
@click.option("--list", "listing", is_flag=True, help="Say what can be measured.")
def bench(
    *,
    operations: tuple[str, ...],
    levels: tuple[str, ...],
    modes: tuple[str, ...],
    quick: bool,
    samples: int | None,
    batches: int | None,
    json_path: Path | None,
    raw: bool,
    csv_path: Path | None,
    plot_path: Path | None,
    listing: bool,
) -> int:
    """Measure what exits cost: all operations, or those that are named.

    Batches are taken in random order, those of a case in processes of their own.
    benchmarks/README.md says what each number includes.
    """
    need_numpy()
    from rich.console import Console
    from rich.progress import Progress

    from kvmpy.bench import cases, environment, measure_cases
    from kvmpy.bench.catalogue import left_out
    from kvmpy.bench.plot import plot
    from kvmpy.bench.report import table
    from kvmpy.bench.results import document, save, to_csv
    from kvmpy.bench.runner import pinning
    from kvmpy.bench.waterfall import table as waterfall_table
    from kvmpy.bench.waterfall import waterfalls
    from kvmpy.kvm import KVM

    if listing:
        _list()
        return 0
    if raw and json_path is None:
        raise ConfigError("--raw puts every sample into the JSON: give --json FILE as well")
    plan = cases(operations, levels, modes)
    if quick and not modes:
        plan = [case for case in plan if case.mode in ("long", "-")]
    for name in left_out(operations, plan):
        click.echo(f"not measured, since it has no such level or mode: {name}", err=True)
    _check_outputs(json_path, csv_path, plot_path)
    KVM().close()  # whatever is wrong with it is one message, not one for each case
    count, times, seconds = QUICK if quick else FULL
    facts = environment()
    if pinning()[0] is None:
        click.echo("one CPU: batches are not pinned, and what takes two has no result", err=True)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        measured = measure_cases(
            plan,
            samples or count,
            batches or times,
            tsc_hz=facts["tsc_hz"],
            seconds=seconds,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not measured:
        click.echo("interrupted before anything was measured: nothing is written", err=True)
        return 130
    falls = waterfalls(measured)
    tables = [table(measured, facts)] + [waterfall_table(falls)] * bool(falls)
    with ExitStack() as last:  # what took minutes is kept and shown, whichever of these fails
        last.callback(show, *tables)
        if plot_path is not None:
            last.callback(plot, measured, facts, plot_path)
        if csv_path is not None:
            last.callback(save, csv_path, to_csv(measured, facts))
        if json_path is not None:
            done = {one.case for one in measured}
            missing = [case for case in plan if case not in done]
            command = ["kvmpy", *sys.argv[1:]]
            result = document(measured, facts, command, raw=raw, missing=missing)
            last.callback(save, json_path, json.dumps(result, indent=1) + "\n")
    return _end(measured, plan)


def _end(measured: "Sequence[Measurement]", plan: "Sequence[Case]") -> int:
    """The exit status; and what an interrupted run lacks, in a line."""
    from kvmpy.bench.model import FAILED

    whole = sum(one.complete for one in measured)
    if whole == len(plan):
        failed = [str(one.case) for one in measured if one.status == FAILED]
        if failed:
            click.echo(f"failed: {', '.join(failed)}; the table says why", err=True)
        return HOST_FAILED if failed else 0
    begun = f"{len(measured) - whole} more in part" if len(measured) > whole else "no other"
    click.echo(f"interrupted: {whole} of {len(plan)} cases whole, {begun}", err=True)
    return 130


def _check_outputs(json_path: Path | None, csv_path: Path | None, plot_path: Path | None) -> None:
    """Refuse before measuring what could not be written after it."""
    from kvmpy.bench.plot import check_suffix
    from kvmpy.bench.results import check_writable

    for path in (json_path, csv_path, plot_path):
        if path is not None:
            check_writable(path)
    if plot_path is not None:
        check_suffix(plot_path)


def _list() -> None:
    from kvmpy.bench import OPERATIONS

    width = max(map(len, OPERATIONS))
    for name, row in OPERATIONS.items():
        click.echo(f"{name:<{width}}  {row.about}; {', '.join(row.levels)}; {', '.join(row.modes)}")
