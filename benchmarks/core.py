"""kvmpy's speed beside that of the same work in C: `python -m benchmarks.core`."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import exits, host, life, process, registers, report
from benchmarks.stats import Row
from kvmpy.errors import KvmpyError

__all__ = ["main"]

ROUNDS, QUICK_ROUNDS = 21, 3


@dataclass(frozen=True)
class Effort:
    """Turns per round, and exits per turn."""

    turns: int
    exits: int
    noops: int
    lives: int


FULL = Effort(turns=7, exits=5000, noops=20_000, lives=25)
QUICK = Effort(turns=3, exits=100, noops=1000, lives=3)
LEAST_ROUNDS = 15


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _rounds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds: give 1 to 10000")
    return int(text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="benchmarks.core", description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="a few seconds, and no good figures")
    parser.add_argument("--rounds", metavar="N", type=_rounds, help=f"default: {ROUNDS}")
    options = parser.parse_args(arguments)
    if options.json is not None:
        try:
            options.json.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {options.json}: {error.strerror}")
    return options


def measure(rounds: int, effort: Effort) -> list[Row]:
    """Every row, in the order of the table."""
    steps: list[tuple[str, Any]] = [
        ("exits", lambda: exits.measure_exits(rounds, effort.turns, effort.exits)),
        ("no-op", lambda: exits.measure_noop(rounds, effort.turns, effort.noops)),
        ("lives", lambda: life.measure_life(rounds, effort.lives)),
        ("processes", lambda: process.measure_process(rounds)),
        ("registers", lambda: registers.measure_registers(rounds)),
        ("threads", lambda: exits.measure_threads(rounds, effort.turns, effort.exits)),
    ]
    rows: list[Row] = []
    for name, step in steps:
        if sys.stderr.isatty():
            print(f"\r\x1b[Kmeasuring {name} ...", end="", file=sys.stderr, flush=True)
        rows += step()
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and, if asked to, write; 0 whatever the figures are."""
    options = _parse(arguments)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    described = host.describe()
    try:
        rows = measure(rounds, QUICK if options.quick else FULL)
    except (KvmpyError, process.Failed) as error:
        print(f"benchmarks.core: {error}", file=sys.stderr)
        return 1
    report.print_table(described, rows)
    if rounds < LEAST_ROUNDS or options.quick:
        print("Too few samples for figures that stand up: run it without --quick.")
    if options.json is not None:
        report.write_json(options.json, described, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
