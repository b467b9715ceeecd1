"""Snapshots, resets and spawns beside the same work in C: `python -m benchmarks.snapshots`."""

import sys
from dataclasses import dataclass

from benchmarks import command, crowd, mapping, resets, spawns

__all__ = ["main"]


@dataclass(frozen=True)
class Effort:
    """Turns per round, and what a turn does so often."""

    turns: int
    resets: int
    spawns: int
    machines: int
    crowds: int
    maps: int
    inputs: int


FULL = Effort(turns=3, resets=2000, spawns=25, machines=200, crowds=3, maps=7, inputs=500)
QUICK = Effort(turns=1, resets=50, spawns=3, machines=20, crowds=1, maps=1, inputs=40)


def steps(rounds: int, quick: bool) -> list[command.Step]:
    """What is measured, by name, in the order of the table."""
    effort = QUICK if quick else FULL
    return [
        ("resets", lambda: resets.measure_resets(rounds, effort.turns, effort.resets)),
        ("spawns", lambda: spawns.measure_spawns(rounds, effort.spawns)),
        ("the pool", lambda: crowd.measure_pool(rounds, effort.spawns)),
        ("memory", lambda: crowd.measure_crowd(effort.crowds, effort.machines)),
        ("two workers", lambda: [mapping.measure_mapping(effort.maps, effort.inputs)]),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and, if asked to, write; 0 whatever the figures are."""
    return command.run("benchmarks.snapshots", __doc__, steps, arguments, rounds=11)


if __name__ == "__main__":
    sys.exit(main())
