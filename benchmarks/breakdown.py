"""Where the time goes, for bounds that are not met: `python -m benchmarks.breakdown`.

The way of a port access through Python, piece by piece; and the life of a small machine, by
what the kernel takes and what Python does between its calls.
"""

import cProfile
import pstats
import sys
import timeit
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from benchmarks import exits, floor, host, life
from benchmarks.bare import bare_life
from benchmarks.stats import interleave
from kvmpy import KVM
from kvmpy.abi import ffi
from kvmpy.errors import KvmpyError
from kvmpy.vcpuregs import SYNC_REGS

__all__ = ["main"]

LIVES = 300
_KERNEL = ("kvmpy_ioctl", "kvmpy_ioctl_buffer", "kvmpy_run", "posix.close", "mmap.mmap", "open")

# Each with what `exit_pieces` has in hand; the empty loop is taken off.
_PIECES = (
    ("cffi call, GIL released and taken, C loop", "step(loop)"),
    (
        "table lookup, if it is not the access before again",
        "function, offset, size, limit, name = served[code]",
    ),
    ("value read", "access[0]"),
    ("device called", "function(0, 1, 0)"),
)


def exit_pieces() -> list[tuple[str, float]]:
    """Nanoseconds of each piece of an access's way through Python, hot."""
    with exits.machine(False) as made:
        made.run(max_exits=1)
        loop = made.cpus[0].loop
        loop.exits_left = (1 << 64) - 1
        ((code, served),) = made.dispatch.served.items()
        at = ffi.offsetof("struct kvmpy_loop", "value")
        names: dict[str, Any] = {
            "step": floor.load().lib.noop_run,
            "loop": loop,
            "served": made.dispatch.served,
            "code": code + 0,
            "access": memoryview(ffi.buffer(loop))[at : at + 8].cast("Q"),
            "function": served[0],
        }
        setup = "; ".join(f"{name} = names[{name!r}]" for name in names)
        number = 100_000

        def best(statement: str) -> float:
            timer = timeit.Timer(statement, setup, globals={"names": names})
            return min(timer.repeat(9, number)) / number * 1e9

        empty = best("pass")
        return [(name, best(statement) - empty) for name, statement in _PIECES]


def life_profile() -> tuple[float, list[tuple[str, float]]]:
    """Microseconds of one life in the kernel, and of Python's functions in it, most first."""
    with KVM() as kvm:
        cpuid = b"".join(entry.pack() for entry in kvm.get_supported_cpuid())
    life.by_descriptors(cpuid)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(LIVES):
        life.by_descriptors(cpuid)
    profile.disable()
    kernel, python = 0.0, []
    for (path, line, name), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        taken = own / LIVES * 1e6
        if path == "~" and any(word in name for word in _KERNEL):
            kernel += taken
        else:
            place = name if path == "~" else f"{path.rpartition('/')[2]}:{line} {name}"
            python.append((place, taken))
    return kernel, sorted(python, key=lambda one: -one[1])


def lives() -> list[tuple[str, float]]:
    """Median microseconds of a life in C, by bare ioctls from Python, and by kvmpy's classes."""
    with KVM() as kvm:
        cpuid = b"".join(entry.pack() for entry in kvm.get_supported_cpuid())
    kinds: dict[str, Callable[[], None]] = {
        "C": floor.Guest(life.GUEST, life.MEMORY, valid=SYNC_REGS).life,
        "bare ioctls from Python": bare_life(),
        "KVM, VM and VCPU": partial(life.by_descriptors, cpuid),
        "Machine": life.by_machine,
    }
    subjects = {name: partial(life.life_turn, live) for name, live in kinds.items()}
    samples = interleave(9, 25, subjects)
    return [(name, median(values)) for name, values in samples.items()]


def main() -> int:
    """Print both."""
    try:
        print(host.title(host.describe()))
        print("\nA port access on its way through Python, in ns, everything in the caches:")
        pieces = exit_pieces()
        for name, taken in [*pieces, ("sum", sum(taken for _, taken in pieces))]:
            print(f"  {taken:7.1f}  {name}")
        compared, (kernel, python) = lives(), life_profile()
    except KvmpyError as error:
        print(f"benchmarks.breakdown: {error}", file=sys.stderr)
        return 1
    print("\nA life, in us:")
    for name, taken in compared:
        print(f"  {taken:7.1f}  {name}")
    print("\nA life of KVM, VM and VCPU, in us, as cProfile sees it:")
    print(f"  {kernel:7.1f}  ioctl, mmap, open, close")
    print(f"  {sum(taken for _, taken in python):7.1f}  Python, of which")
    for name, taken in python[:12]:
        print(f"  {taken:7.1f}    {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
