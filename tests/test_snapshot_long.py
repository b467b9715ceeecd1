"""Snapshots by the thousand, of large machines, and where the host has no more to give."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_snapshot import COUNTING, DATA, MEMORY, attach, code, machine_of

from kvmpy import Machine

pytestmark = pytest.mark.usefixtures("kvm_host")


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_a_chain_of_a_thousand_increments() -> None:
    with machine_of(code(COUNTING), 0) as machine:
        kept = []
        for number in range(1100):
            machine.memory.write(DATA + number % 7 * 4096, number.to_bytes(4, "little"))
            kept.append(machine.snapshot())
        for number in (0, 1, 500, 1050, 1099):
            machine.restore(kept[number])
            assert machine.memory.read_u32(DATA + number % 7 * 4096) == number
            with Machine.from_snapshot(kept[number], attach) as other:
                assert other.memory.read(0, MEMORY) == machine.memory.read(0, MEMORY)
        assert kept[-1].diff(kept[-2]).pages == (DATA + 1099 % 7 * 4096,)


@pytest.mark.slow
def test_who_keeps_the_last_snapshot_only_keeps_few() -> None:
    with machine_of(code(COUNTING), 0) as machine:
        before = descriptors()
        for number in range(300):
            machine.memory.write(DATA, number.to_bytes(4, "little"))
            last = machine.snapshot()
        assert descriptors() - before < 100
        machine.memory.write(DATA, bytes(4))
        machine.restore(last)
        assert machine.memory.read_u32(DATA) == 299


def test_a_whole_image_lets_go_of_those_before() -> None:
    with machine_of(code(COUNTING), 0) as machine:
        first = machine.snapshot()
        machine.memory.write(0x80000, os.urandom(MEMORY // 2))
        second = machine.snapshot()
        assert second.parent is None
        machine.memory.write(0x80000, b"third")
        third = machine.snapshot()
        assert third.parent is second
        machine.restore(first)
        assert not any(machine.memory.read(0x80000, MEMORY // 2))
        machine.restore(third)
        assert machine.memory.read(0x80000, 5) == b"third"


def shared_memory() -> int:
    """Bytes in files in memory, of all processes."""
    with open("/proc/meminfo") as file:
        (line,) = (line for line in file if line.startswith("Shmem:"))
    return int(line.split()[1]) << 10


def test_ram_of_which_little_is_used_takes_little() -> None:
    """Above 4 GiB and far more than the host has; also between machines that share nothing."""
    far, size = (30 << 30) + 5, "40G"
    before = shared_memory()
    with Machine(size) as machine, Machine(size) as other:
        machine.load(code(COUNTING), 0x1000)
        machine.memory.write(far, b"first")
        first = machine.snapshot()
        assert first.images[1].address == 4 << 30
        machine.memory.write(far, b"other")
        second = machine.snapshot()
        assert first.diff(second).pages == (far & ~0xFFF,)
        machine.restore(first)
        assert machine.memory.read(far, 5) == b"first"
        machine.reset_to(second)
        machine.memory.write(far, b"noise")
        machine.reset_to(second)
        assert machine.memory.read(far, 5) == b"other"
        other.load(code(COUNTING), 0x1000)
        other.memory.write(far + 4096, b"noise")
        for snapshot in (second, first):
            other.restore(snapshot)
            assert other.memory.read(far, 5) == snapshot.read(far, 5)
            assert not any(other.memory.read(far + 4096, 5))
        assert other.snapshot().diff(first).pages == ()
        assert shared_memory() - before < 512 << 20


def private_memory() -> int:
    """Bytes that this process shares with nobody and no file."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def test_increments_take_no_more_than_their_pages(tmp_path: Path) -> None:
    """Who takes, compares or saves them keeps no copy of all that has changed since the first."""
    much, kept = 8 << 20, []
    with Machine("64M") as machine:
        machine.snapshot()
        machine.memory.write(0x100000, os.urandom(much))
        for number in range(1, 12):
            machine.memory.write(DATA, bytes([number]))
            kept.append(machine.snapshot())
            if number == 1:
                before = private_memory()
        assert kept[-1].diff(kept[-3]).pages == (DATA,)
        kept[-2].save(tmp_path / "one")
        assert kept[0].read(DATA, 1) == b"\1"
        assert private_memory() - before < 4 * much


STARVED = """
import gc, os, resource, sys
from test_snapshot import COUNTING, DATA, attach, code, machine_of
from kvmpy import KvmpyError, Machine, runs

what, first, step, count = sys.argv[1], *map(int, sys.argv[2:])
kind = getattr(resource, what)

def used():
    if what == "RLIMIT_NOFILE":
        return max(map(int, os.listdir("/proc/self/fd")))
    return int(open("/proc/self/statm").read().split()[0]) * 4096

refused = done = 0
with machine_of(code(COUNTING), 0) as machine:
    one = machine.snapshot()
    machine.memory.write(DATA, b"abc")
    two = machine.snapshot()
    machine.restore(one)
    Machine.from_snapshot(two, attach).close()
    calls = (
        lambda: Machine.from_snapshot(two, attach).close(),
        machine.snapshot,
        lambda: machine.restore(one),
        lambda: machine.reset_to(two),
        lambda: machine.reset_to(one),
        lambda: next(runs(one, [b"x"], DATA, timeout=5, max_exits=2, attach=attach)),
    )
    machine.resetter = None
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    for number in range(count):
        gc.collect()
        for call in calls:
            machine.restore(one)
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (used() + first + number * step, hard))
            try:
                call()
                done += 1
            except KvmpyError as error:
                refused += 1
                assert "\\n" not in str(error), error
            finally:
                resource.setrlimit(kind, (hard, hard))
            machine.restore(two)
            assert machine.memory.read(DATA, 3) == b"abc"
    machine.restore(one)
    gc.collect()
    left = len(os.listdir("/proc/self/fd")) - open_before
    assert left <= 4, left  # the last snapshot
assert refused and done, (refused, done)
"""


@pytest.mark.parametrize(
    "limit", [("RLIMIT_NOFILE", 1, 1, 7), ("RLIMIT_AS", 0, 640 << 10, 10)], ids=lambda one: one[0]
)
def test_a_host_without_more_of_something_gives_a_typed_error(limit: tuple[object, ...]) -> None:
    """In a process of its own, since a limit is the whole process's."""
    command = [sys.executable, "-c", STARVED, *map(str, limit)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
