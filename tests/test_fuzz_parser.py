"""The example that fuzzes a parser: its pieces, and that it finds the bug."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from kvmpy import Coverage, Entropy, Harness, load_image, runs

EXAMPLE = Path(__file__).parent.parent / "examples" / "fuzz_parser.py"
CRASHING = b"KVMPO\0D\2abC\0D\1x"  # data after the end
TARGET = """
#include <stddef.h>
#include <stdint.h>
_Noreturn void abort(void);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    volatile int zero = 0;
    switch (size ? data[0] : 0) {
    case 'a': abort();
    case 'd': return data[0] / zero;
    case 'u': __builtin_trap();
    case 'n': return *(volatile int *)(intptr_t)zero;
    case 'w': return *(volatile int *)0x700000000000;
    case 'm': return *(volatile int *)0x90000000;
    case 'h': for (;;) zero++;
    default: return (int)size;
    }
}
"""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_parser", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gcc() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which builds the parser, is not installed")


def outcomes(example: Any, source: Path, inputs: list[bytes], directory: Path) -> list[Any]:
    harness = Harness(Entropy(1, fixed=True))
    guest = example.build(source, directory)
    symbols = load_image(guest).symbols
    snapshot = example.prepare(guest, harness)
    assert harness.coverage == (symbols["kvmpy_map"], example.MAP_SIZE)
    assert harness.buffer == symbols["kvmpy_input"] + 8
    assert harness.buffer_size == 8 + example.CAPACITY
    return list(
        runs(
            snapshot, map(harness.pack, inputs), harness.buffer, timeout=0.2, batch=3,
            scope="registers", collect=harness.coverage, attach=harness.attach, touched=True,
        )
    )  # fmt: skip


def test_mutations_are_many_and_the_same_again(example: Any) -> None:
    def some() -> list[bytes]:
        random, corpus = Random(7), [b"", b"abc", b"KVMP" * 100]
        return [example.mutate(random, corpus) for _ in range(500)]

    assert some() == some()
    assert len(set(some())) > 200
    assert max(map(len, some())) == example.CAPACITY


@pytest.mark.usefixtures("kvm_host", "gcc")
def test_the_parser_goes_new_ways_and_crashes_where_it_should(example: Any, tmp_path: Path) -> None:
    ways = [b"", b"K", b"KV", b"KVM", b"KVMP", b"KVMPO\0", b"KVMPO\0D\1x", b"KVMPO\0C\0", CRASHING]
    harmless = [
        b"KVMPx\0",
        b"KVMPO\0O\0",
        b"KVMPD\1x",
        b"KVMPO\0D\x7fx",
        b"KVMPO\0D\x41" + b"x" * 65,
    ]
    found = outcomes(example, example.SOURCE, [*ways, *harmless, *ways], tmp_path)
    crashed = [one.input[8:] for one in found if one.crashed]
    assert crashed == [CRASHING, CRASHING]
    exception = found[len(ways) - 1].exception
    assert (exception.name, exception.address) == ("#PF", 0)
    assert [one.value for one in found[len(ways) : -len(ways)]] == [6, 3, 4, 2, 5]
    coverage = Coverage(example.MAP_SIZE)
    assert all(coverage.add(one.collected) for one in found[: len(ways)])
    first, last = found[: len(ways)], found[-len(ways) :]
    for one, other in zip(first, last, strict=True):  # the same input does the same
        assert (one.collected, one.touched, one.outcome) == (
            other.collected, other.touched, other.outcome,
        )  # fmt: skip


@pytest.mark.usefixtures("kvm_host", "gcc")
def test_all_ways_to_crash_are_told_apart(example: Any, tmp_path: Path) -> None:
    source = tmp_path / "target.c"
    source.write_text(TARGET)
    found = outcomes(example, source, [*map(bytes, zip(b"adunwmh", strict=True)), b"ok"], tmp_path)
    names = [one.exception.name if one.exception else one.outcome for one in found]
    assert names == ["crash", "#DE", "#UD", "#PF", "#PF", "unclaimed", "timeout", "ended"]
    assert [one.crashed for one in found] == [True] * 6 + [False] * 2
    assert re.fullmatch("code 134 at 0x20....", found[0].detail)
    assert (found[3].exception.address, found[4].exception.address) == (0, 0x700000000000)
    assert found[-1].value == 2


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        capture_output=True, text=True, timeout=100, check=False, env=environment or None,
    )  # fmt: skip


def test_without_gcc_it_says_so() -> None:
    done = run(PATH="/nonexistent")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gcc is not installed, and it has to compile the parser: install gcc\n"


@pytest.mark.usefixtures("kvm_host", "gcc")
def test_time_that_is_over_is_said() -> None:
    done = run("--seconds", "0.1")
    assert (done.returncode, done.stderr) == (1, "no crash within 0.1 s\n")
    assert " edges, " in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("kvm_host", "gcc")
def test_the_bug_is_found_and_found_again() -> None:
    first, second = run("--seed", "1"), run("--seed", "1")
    assert (first.returncode, first.stderr) == (0, "")
    crash = first.stdout.splitlines()[-2]
    assert crash.startswith("crash: exception: #PF (page fault) at rip 0x200")
    assert crash.endswith("unmapped address 0x0")
    assert first.stdout.splitlines()[-1].startswith("input: b'KVMPO")
    without_rates = [re.sub(r" +\d+/s", "", one.stdout) for one in (first, second)]
    assert without_rates[0] == without_rates[1]
