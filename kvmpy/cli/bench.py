"""`kvmpy bench`: exit latencies, with what it takes to judge them."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from kvmpy.errors import ConfigError

__all__ = ["bench"]

QUICK = (500, 2)
FULL = (2000, 5)


@click.command()
@click.argument("operations", nargs=-1, metavar="[OPERATION]...")
@click.option("--level", "levels", multiple=True, help="kernel, c or python; repeatable.")
@click.option("--mode", "modes", multiple=True, help="real, protected, long or ring3; repeatable.")
@click.option("--quick", is_flag=True, help="Fewer samples, and long mode only: under a minute.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Samples of each batch.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the result, as kvmpy/bench/schema.json describes it.")  # fmt: skip
@click.option("--raw", is_flag=True, help="Every sample goes into the JSON.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a line for each case.")  # fmt: skip
@click.option("--list", "listing", is_flag=True, help="Say what can be measured.")
def bench(
    *,
    operations: tuple[str, ...],
    levels: tuple[str, ...],
    modes: tuple[str, ...],
    quick: bool,
    samples: int | None,
    json_path: Path | None,
    raw: bool,
    csv_path: Path | None,
    listing: bool,
) -> int:
    """Measure what exits cost: all operations, or those that are named.

    Each batch runs in a process of its own, in random order. benchmarks/README.md says what
    each number includes.
    """
    if find_spec("numpy") is None:
        raise ConfigError("kvmpy bench needs numpy: pip install 'kvmpy[bench]'")
    from rich.console import Console
    from rich.progress import Progress

    from kvmpy.bench import cases, environment, measure_cases
    from kvmpy.bench.report import table
    from kvmpy.bench.results import document, save, to_csv
    from kvmpy.kvm import KVM

    if listing:
        _list()
        return 0
    plan = cases(operations, levels, modes or (("long",) if quick else ()))
    for path in (json_path, csv_path):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"cannot write {path}: no such directory")
    KVM().close()  # whatever is wrong with it is one message, not one for each case
    count, batches = QUICK if quick else FULL
    facts = environment()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        measured = measure_cases(
            plan,
            samples or count,
            batches,
            tsc_hz=facts["tsc_hz"],
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table(measured, facts))
    if json_path is not None:
        result = document(measured, facts, ["kvmpy", *sys.argv[1:]], raw=raw)
        save(json_path, json.dumps(result, indent=1) + "\n")
    if csv_path is not None:
        save(csv_path, to_csv(measured))
    if len(measured) < len(plan):
        click.echo(f"interrupted: {len(measured)} of {len(plan)} cases", err=True)
        return 130
    return 0


def _list() -> None:
    from kvmpy.bench import OPERATIONS

    width = max(map(len, OPERATIONS))
    for name, row in OPERATIONS.items():
        click.echo(f"{name:<{width}}  {row.about}; {', '.join(row.levels)}; {', '.join(row.modes)}")
