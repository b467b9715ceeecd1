"""kvmpy's speed beside that of the same work in C: `python -m benchmarks.core`."""

import sys
from dataclasses import dataclass

from benchmarks import command, exits, life, process, registers

__all__ = ["main"]

ROUNDS = 21


@dataclass(frozen=True)
class Effort:
    """Turns per round, and exits per turn."""

    turns: int
    exits: int
    noops: int
    lives: int


FULL = Effort(turns=7, exits=5000, noops=20_000, lives=25)
QUICK = Effort(turns=3, exits=100, noops=1000, lives=3)


def steps(rounds: int, quick: bool) -> list[command.Step]:
    """What is measured, by name, in the order of the table."""
    effort = QUICK if quick else FULL
    return [
        ("exits", lambda: exits.measure_exits(rounds, effort.turns, effort.exits)),
        ("no-op", lambda: exits.measure_noop(rounds, effort.turns, effort.noops)),
        ("lives", lambda: life.measure_life(rounds, effort.lives)),
        ("processes", lambda: process.measure_process(rounds)),
        ("registers", lambda: registers.measure_registers(rounds)),
        ("threads", lambda: exits.measure_threads(rounds, effort.turns, effort.exits)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and, if asked to, write; 0 whatever the figures are."""
    return command.run("benchmarks.core", __doc__, steps, arguments, rounds=ROUNDS)


if __name__ == "__main__":
    sys.exit(main())
