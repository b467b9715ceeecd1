"""What `python -m benchmarks.core` and its like have in common: options, steps, the table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from benchmarks import host, process, report
from benchmarks.stats import Row
from kvmpy.errors import KvmpyError

__all__ = ["Parser", "Step", "Steps", "rounds_of", "run"]

QUICK_ROUNDS = 3
LEAST_ROUNDS = 11

Step: TypeAlias = tuple[str, Callable[[], list[Row]]]
"""What is measured, by name."""

Steps: TypeAlias = Callable[[int, bool], Sequence[Step]]
"""The steps for so many rounds, and whether they shall be quick."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def rounds_of(text: str) -> int:
    """The number that --rounds was given."""
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds: give 1 to 10000")
    return int(text)


def _parse(
    name: str, what: str | None, rounds: int, arguments: list[str] | None
) -> argparse.Namespace:
    parser = Parser(prog=name, description=what)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="a few seconds, and no good figures")
    parser.add_argument("--rounds", metavar="N", type=rounds_of, help=f"default: {rounds}")
    options = parser.parse_args(arguments)
    if options.json is not None:
        try:
            options.json.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {options.json}: {error.strerror}")
    return options


def _measure(steps: Sequence[Step]) -> list[Row]:
    """Every row, in the order of the table."""
    rows: list[Row] = []
    for name, step in steps:
        if sys.stderr.isatty():
            print(f"\r\x1b[Kmeasuring {name} ...", end="", file=sys.stderr, flush=True)
        rows += step()
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return rows


def run(
    name: str, what: str | None, steps: Steps, arguments: list[str] | None, *, rounds: int
) -> int:
    """Measure, print and, if asked to, write; the exit status: 0 whatever the figures are."""
    options = _parse(name, what, rounds, arguments)
    wanted = options.rounds or (QUICK_ROUNDS if options.quick else rounds)
    described = host.describe()
    try:
        rows = _measure(steps(wanted, options.quick))
    except (KvmpyError, process.Failed) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    report.print_table(described, rows)
    if wanted < LEAST_ROUNDS or options.quick:
        print("Too few samples for figures that stand up: run it without --quick.")
    if options.json is not None:
        report.write_json(options.json, described, rows)
    return 0
