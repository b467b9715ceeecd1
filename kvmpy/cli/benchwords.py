"""The words of `kvmpy bench` that are no operation: compare and self-test."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

from kvmpy.cli.options import Number
from kvmpy.errors import ConfigError

__all__ = ["BenchCommand", "need_numpy", "show"]

UNTOLD: Final = 3  # the exit status of a comparison that found nothing slower, and could not have


def need_numpy() -> None:
    """Raise ConfigError where what measuring needs is not installed."""
    if find_spec("numpy") is None:
        raise ConfigError("kvmpy bench needs numpy: pip install 'kvmpy[bench]'")


def show(*tables: Any) -> None:
    """Print rich tables; in a file or a pipe, in one width that is enough for them.

    Their text is shown as it stands, since some of it comes from files. Raises OSError where
    standard output takes nothing: rich itself would end the process, with a bad result's status.
    """
    from rich.console import Console

    width = None if Console().is_terminal else 200
    console = Console(width=width, markup=False, emoji=False)
    with console.capture() as capture:
        for one in tables:
            console.print(one)
    click.echo(capture.get(), nl=False)


class BenchCommand(click.Command):
    """The command that measures, unless its first word is one of `WORDS`."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of the command that the first word names."""
        if args and args[0] in WORDS:
            word, *rest = args
            return WORDS[word].make_context(f"{info_name} {word}", rest, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the words into the help text."""
        with formatter.section("Words"):
            formatter.write_dl([(name, one.get_short_help_str()) for name, one in WORDS.items()])


@click.command()
@click.argument("first", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("second", type=click.Path(path_type=Path), metavar="B.json")
@click.option("--across-backends", "across", is_flag=True,
              help="Compare results of unlike backends, and say so on every line.")  # fmt: skip
@click.option("--fail-if-slower", "limit", type=Number(min=0), metavar="PCT",
              help="Exit status 1 if anything is slower by more than PCT percent; 3 if not, but "
              "some cases have too few batches to tell, or are gone in B.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the comparisons.")  # fmt: skip
def compare(
    first: Path, second: Path, across: bool, limit: float | None, json_path: Path | None
) -> int:
    """Say what B has faster than A, what slower, and where no difference is seen.

    A and B are results of `kvmpy bench --json`. Any difference is found by accident in at most
    one of a hundred comparisons of whole results.
    """
    need_numpy()
    from kvmpy.bench.compare import compare as compared
    from kvmpy.bench.compare import reference_change, refuse_unlike
    from kvmpy.bench.results import check_writable, load, save
    from kvmpy.bench.told import cut_short, document, gone, limits, untold
    from kvmpy.bench.versus import table

    if json_path is not None:
        check_writable(json_path)
    documents = load(first), load(second)
    if not across:
        refuse_unlike(*documents)
    found = compared(*documents)
    change = reference_change(*documents)
    with ExitStack() as last:  # what was found is kept and shown, whichever of the two fails
        last.callback(show, table(found, *documents))
        if json_path is not None:
            text = json.dumps(document(found, *documents, change), indent=1) + "\n"
            last.callback(save, json_path, text)
    if abs(change - 1) > 0.05:
        click.echo(
            f"The same reference took {change:.2f} times as long in {second} as in {first}: the "
            "machine itself was not the same, and no difference above is one of kvmpy or KVM.",
            err=True,
        )
    for path, result in zip((first, second), documents, strict=True):
        if cut_short(result):
            click.echo(f"{path} is the result of an interrupted run", err=True)
    slower = [one for one in found if one.verdict == "slower"]
    bad = [one for one in slower if limit is not None and one.ratio > 1 + limit / 100]
    for one in bad:
        click.echo(f"{one.case} is slower by {one.ratio - 1:.1%}", err=True)
    lacking = limits(untold(found), gone(*documents))
    if lacking:
        click.echo(f"not all could be told: {lacking}", err=True)
    if bad:
        return 1
    return UNTOLD if lacking and limit is not None else 0


@click.command("self-test")
def self_test() -> int:
    """Say whether this machine can be trusted now; exit status 1 if not."""
    need_numpy()
    from kvmpy.bench.selftest import self_test as tested
    from kvmpy.bench.selftest import table

    checks = tested()
    show(table(checks))
    bad = [check.name for check in checks if not check.good]
    if not bad:
        click.echo("This machine can be trusted now.")
        return 0
    click.echo(f"Not now: {', '.join(bad)}. benchmarks/README.md says how to make it quiet.")
    return 1


WORDS: Final[Mapping[str, click.Command]] = {"compare": compare, "self-test": self_test}
