"""`kvmpy.map` with two workers beside one, on guests that take about a millisecond each.

    python -m benchmarks.mapping

One prepared guest in ring 3, where all of these hosts run it on the processor itself, counts for
as long as one run is to take. Each round has the same inputs mapped by one worker and by two, in
turn. A turn's figure is the seconds from the first outcome to the last: workers have started, and
their machines are made.
"""

import time
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice

import kvmpy
from benchmarks import host
from benchmarks.report import print_table
from benchmarks.stats import Prepared, Row, compare, interleave
from kvmpy import Machine, Snapshot, assemble

__all__ = ["measure_mapping"]

INPUT = 0x30000
BOUND = 1 / 1.7
"""The most that two workers may take of what one takes."""
WARM = 400
_FIRST_COUNT = 100_000

GUEST = f"""
mov esi, {INPUT}
mov ecx, [rsi]
again:
dec ecx
jnz again
out 0xf4, eax
"""


def prepared() -> Snapshot:
    """The guest; its input is a number of turns of its loop, as 4 bytes."""
    with Machine("1M", ring=3) as machine:
        machine.load(assemble(GUEST, mode="long", at=0x4000))
        return machine.snapshot()


def counted(count: int) -> bytes:
    return count.to_bytes(4, "little")


def loop_count(snapshot: Snapshot, seconds: float) -> int:
    """The number of turns that takes about so long, in time of the processor's."""
    count = _FIRST_COUNT
    for _ in range(3):
        started = time.thread_time()  # whoever else wants the processor
        for _one in kvmpy.runs(snapshot, [counted(count)] * 50, INPUT, timeout=10):
            pass
        count = int(count * seconds / ((time.thread_time() - started) / 50)) or 1
    return count


def turn(snapshot: Snapshot, inputs: list[bytes], workers: int) -> float:
    """The seconds for so many inputs, without the start of the workers."""
    warm = WARM * workers  # outcomes; by then each worker has had its share
    made = kvmpy.map(
        snapshot, inputs[:1] * warm + inputs, write_to=INPUT, timeout=10, workers=workers
    )
    with closing(made):
        for _ in islice(made, warm):
            pass
        started = time.perf_counter()
        for one in made:
            assert one.outcome == "debug-exit", one.detail
        return time.perf_counter() - started


def measure_mapping(rounds: int = 9, number: int = 1000, milliseconds: float = 1.0) -> Row:
    """Seconds of two workers over those of one, round by round."""
    snapshot = prepared()
    count = loop_count(snapshot, milliseconds / 1000)
    inputs = [counted(count)] * number

    def taken(workers: int) -> Prepared:
        return nullcontext(partial(turn, snapshot, inputs, workers))

    subjects = {"one": partial(taken, 1), "two": partial(taken, 2)}
    samples = interleave(rounds, 1, subjects)
    name = f"map, 2 workers over 1, guests of {milliseconds:g} ms"
    return compare(name, "ratio", "s", BOUND, samples["two"], samples["one"])


def main() -> None:
    row = measure_mapping()
    print_table(host.describe(), [row])
    assert row.figure is not None
    figures = (1 / row.figure.median, 1 / row.figure.greatest, 1 / row.figure.least)
    print("two workers are {:.2f} times as fast as one ({:.2f} to {:.2f})".format(*figures))


if __name__ == "__main__":
    main()
