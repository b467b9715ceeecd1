"""What recording costs an exit: `python -m benchmarks.recorder`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks import command, exits
from benchmarks.stats import Row, Turn, compare, interleave

__all__ = ["main"]

ROUNDS = 21
RECORDS = 65536
FULL = (7, 5000)
QUICK = (3, 100)


@contextmanager
def recording(served_in_c: bool, count: int, records: int) -> Iterator[Turn]:
    """A port that is served while exits are recorded, or, with 0 records, counted."""
    with exits.machine(served_in_c) as made:
        made.trace.start(records)
        yield exits.turn(lambda number: made.run(max_exits=number), count)


def measure(rounds: int, turns: int, count: int) -> list[Row]:
    """Counting and full recording over the same exits with the recorder off."""
    rows = []
    for name, served_in_c in (("in C", True), ("by Python", False)):
        samples = interleave(
            rounds,
            turns,
            {
                "off": partial(exits.kvmpy_turn, served_in_c, count),
                "counting": partial(recording, served_in_c, count, 0),
                "full": partial(recording, served_in_c, count, RECORDS),
            },
        )
        off = samples["off"]
        rows += [
            compare(f"served {name}, counting", "ratio", "ns", 1.01, samples["counting"], off),
            compare(f"served {name}, full records", "ratio", "ns", 1.04, samples["full"], off),
        ]
    return rows


def steps(rounds: int, quick: bool) -> list[command.Step]:
    """What is measured, by name, in the order of the table."""
    return [("the recorder", lambda: measure(rounds, *(QUICK if quick else FULL)))]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and, if asked to, write; 0 whatever the figures are."""
    return command.run("benchmarks.recorder", __doc__, steps, arguments, rounds=ROUNDS)


if __name__ == "__main__":
    sys.exit(main())
