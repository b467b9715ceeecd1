"""A script: `kvmpy.map` while workers are killed, the iterator is closed, Ctrl-C comes, at random.

`python pool_storm.py ROUNDS SEED` prints "ok" if none of it hangs, loses an input, or leaves
something behind. Answers are large, so that most of the time one is on its way.
"""

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random

import kvmpy

INPUT = 0x30000


def prepared() -> kvmpy.Snapshot:
    with kvmpy.Machine("4M", ring=3) as machine:
        machine.load(kvmpy.assemble("out 0xf4, eax", at=0x4000))
        return machine.snapshot()


@contextmanager
def meanwhile(do: Callable[[], object], random: Random, pause: float) -> Iterator[None]:
    """Have something done again and again, on another thread."""
    over = threading.Event()

    def again() -> None:
        while not over.wait(random.uniform(0, pause)):
            do()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def storm(snapshot: kvmpy.Snapshot, random: Random) -> None:
    kind = random.choice(["close", "kill", "interrupt"])

    def kill() -> None:
        workers = multiprocessing.active_children()
        if workers:
            random.choice(workers).kill()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    inputs = (number.to_bytes(4, "little") for number in count())
    made = kvmpy.map(snapshot, inputs, write_to=INPUT, collect=(0, 1 << 20), workers=2)
    try:
        if kind == "kill":
            with meanwhile(kill, random, 0.8):
                take(made, 50)
        elif kind == "interrupt":
            timer = threading.Timer(random.uniform(0, 1), interrupt)
            timer.start()
            try:
                take(made, 1 << 60)
            finally:
                timer.join()
        else:
            take(made, random.randrange(1, 20))
    except KeyboardInterrupt:
        assert kind == "interrupt"
    except kvmpy.HostError as error:  # all that were started were killed at once
        assert kind == "kill" and "while they started" in str(error)
    made.close()


def take(made: Iterator[kvmpy.Outcome[bytes]], most: int) -> None:
    for number, one in zip(range(most), made, strict=False):
        assert one.input == number.to_bytes(4, "little")
        assert one.outcome in ("debug-exit", "worker-died")
        assert len(one.collected) == (1 << 20 if one.outcome == "debug-exit" else 0)


def main(rounds: int, seed: int) -> None:
    random, snapshot = Random(seed), prepared()
    # What is left to the collector may take a Ctrl-C with it: Python drops what a finalizer raises.
    gc.disable()
    with tempfile.TemporaryDirectory() as directory:
        tempfile.tempdir = directory
        for number in range(rounds):
            started = time.monotonic()
            storm(snapshot, random)
            assert list(Path(directory).iterdir()) == []
            assert multiprocessing.active_children() == []
            assert list(multiprocessing.process._dangling) == []  # type: ignore[attr-defined]
            print(number, f"{time.monotonic() - started:.2f}", flush=True)
    assert threading.active_count() == 1
    print("ok")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
