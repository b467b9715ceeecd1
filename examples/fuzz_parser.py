"""Fuzz a parser in C, natively in ring 3, from a snapshot: python examples/fuzz_parser.py

gcc builds fuzz_parser.c with -fsanitize-coverage=trace-pc, and guests/c/kvmpy_harness.h makes a
guest of it, which is run until it is ready, and then once for each input from a snapshot. Inputs
that go new ways are kept, and mutated in turn, until one of them makes the guest crash.
"""

import shlex
import shutil
import subprocess
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from random import Random
from time import monotonic

from kvmpy import Coverage, Entropy, Harness, Machine, Outcome, Snapshot, load_image, runs
from kvmpy.boot.guests import guests_directory
from kvmpy.x86.paging import walk

CAPACITY, MAP_SIZE, BATCH = 256, 4096, 64
SOURCE = Path(__file__).with_name("fuzz_parser.c")
FLAGS = shlex.split(
    "gcc -std=c11 -O1 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector "
    "-fcf-protection=none -fno-asynchronous-unwind-tables -mno-red-zone"
)
LINK = shlex.split("-nostdlib -static -no-pie -Wl,--build-id=none -Wl,--defsym=kvmpy_base=0x200000")


def build(source: Path, directory: Path) -> Path:
    """Compile a target for libFuzzer to a guest; only the target itself counts its edges."""
    here = guests_directory() / "c"
    main, target, guest = (str(directory / name) for name in ("main.c", "target.o", "guest.elf"))
    Path(main).write_text(f'#include "kvmpy_harness.h"\nKVMPY_FUZZ({CAPACITY}, {MAP_SIZE});\n')
    parts = ["-fsanitize-coverage=trace-pc", "-c", str(source), "-o", target]
    subprocess.run([*FLAGS, *parts], check=True)
    parts = [f"-I{here}", f"-Wl,-T,{here}/guest.ld", f"{here}/start.S", main, target, "-o", guest]
    subprocess.run([*FLAGS, *LINK, *parts], check=True)
    return Path(guest)


def prepare(guest: Path, harness: Harness) -> Snapshot:
    """Run the guest until it is ready for inputs."""
    with Machine.from_image(load_image(guest), memory="4M", strict=True) as machine:
        # Nothing is mapped at 0 to 2 MiB, so that null pointers lead to a page fault.
        null = walk(machine.memory.read_u64, machine.cpus[0].get_sregs().cr3, 0)
        machine.memory.write_u64(null.levels[-1].address, 0)
        harness.attach(machine)
        result = machine.run(timeout=10)
        if result.outcome != "ready":
            raise SystemExit(f"the guest was to be ready, and this came of it: {result}")
        return machine.snapshot()


def mutate(random: Random, corpus: list[bytes]) -> bytes:
    """An input of the corpus, rather one of the last, with one to four changes."""
    data = bytearray(random.choice(corpus[-8:] if random.random() < 0.5 else corpus))
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(5)
        if kind == 0 or not data:
            data[at:at] = random.randbytes(random.choice((1, 1, 2, 4)))
        elif kind == 1:
            data[at : at + 1] = random.randbytes(1)
        elif kind == 2:
            data[at - 1] ^= 1 << random.randrange(8)
        elif kind == 3:
            del data[at : at + random.randint(1, 4)]
        else:
            other = random.choice(corpus)
            data[at:] = other[random.randrange(len(other) + 1) :]
    return bytes(data[:CAPACITY])


def fuzz(snapshot: Snapshot, harness: Harness, seed: int, seconds: float) -> Outcome[bytes] | None:
    """The outcome of the first input that crashes the guest, or None when the time is over."""
    random, corpus, coverage = Random(seed), [b""], Coverage(MAP_SIZE)
    started = monotonic()

    def inputs() -> Iterator[bytes]:
        while monotonic() < started + seconds:
            yield harness.pack(mutate(random, corpus))

    outcomes = runs(
        snapshot, inputs(), harness.buffer, timeout=1, scope="registers", batch=BATCH,
        collect=harness.coverage, attach=harness.attach,
    )  # fmt: skip
    for number, one in enumerate(outcomes, 1):
        new = coverage.add(one.collected)
        if new or one.crashed:
            corpus.append(one.input[8:])
            rate, edges = number / (monotonic() - started), len(coverage.edges)
            seen = f"{edges} edges, {len(corpus)} inputs: {corpus[-1]!r}"
            print(f"{number:8} runs, {rate:6.0f}/s, {seen}")
        if one.crashed:
            return one
    return None


def main() -> None:
    """Fuzz, and say what was found."""
    parser = ArgumentParser(description="Fuzz a small parser in C on KVM.")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the same: the same runs")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="give up after")
    options = parser.parse_args()
    if shutil.which("gcc") is None:
        raise SystemExit("gcc is not installed, and it has to compile the parser: install gcc")
    harness = Harness(Entropy(options.seed, fixed=True))
    with tempfile.TemporaryDirectory() as directory:
        snapshot = prepare(build(SOURCE, Path(directory)), harness)
    found = fuzz(snapshot, harness, options.seed, options.seconds)
    if found is None:
        raise SystemExit(f"no crash within {options.seconds} s")
    print(f"crash: {found.outcome}: {found.detail}\ninput: {found.input[8:]!r}")


if __name__ == "__main__":
    main()
