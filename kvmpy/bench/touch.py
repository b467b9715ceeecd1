"""The first touch of a page: a fault that only KVM and the host see."""

import mmap
import resource
from functools import partial
from typing import Final

import numpy as np

from kvmpy.abi import address_of
from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.errors import KvmpyError
from kvmpy.memory import PAGE_SIZE

__all__ = ["ROWS"]

_HUGE: Final = 2 << 20
_PAGES: Final = _HUGE // PAGE_SIZE
_SHARE: Final = 64  # samples asked for, to one entry of the guest: it touches 512 pages
_THP: Final = "/sys/kernel/mm/transparent_hugepage/enabled"


def _touch(bench: GuestBench, huge: bool) -> Batch:
    """A sample is a 512th of one entry that touches 2 MiB of RAM which the host has just taken."""
    wanted = bench.conditions
    region = next(iter(bench.machine.memory)).buffer
    # Above the image, and where 2 MiB of the host's addresses begin, as a huge page wants it.
    start = _HUGE + -address_of(region) % _HUGE
    region.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE, start, _HUGE)
    warmup, count = 2, max(2, wanted.count // _SHARE)
    rows, faults = [], 0
    for _ in range(warmup + count):
        region.madvise(mmap.MADV_DONTNEED, start, _HUGE)
        bench.start("touch", _PAGES, rdi=start)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        rows.append(bench.sample(1, bench.run_to_its_end))
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if bench.cpu.get_regs().rdi != start + _HUGE:
            raise KvmpyError(f"{bench.case}: the guest left out pages")
    pairs = np.concatenate(rows)
    total = _PAGES * len(pairs)
    if not huge and faults < total:
        raise Unmeasured("does not exit here", f"the host counts {faults} faults for {total} pages")
    if huge and faults > total // 2:
        raise Unmeasured("not available here", f"{faults} faults for {total} pages: none is huge")
    samples = np.diff(pairs, axis=1)[warmup:, 0].astype(np.float64) / _PAGES
    proof = {"claimed": total, "counted": total, "per_sample": _PAGES, "host_faults": faults}
    return Batch(bench.case, samples, host=pairs[warmup:], proof=proof)


def _measure(case: Case, conditions: Conditions) -> Batch:
    huge = case.operation.endswith("huge")
    if huge and not _huge_pages():
        raise Unmeasured("not available here", f"transparent huge pages are off in {_THP}")
    bench = GuestBench(Kind("touch", "touch"), case, conditions, memory="8M")
    return bench.proven(partial(_touch, bench, huge))


def _huge_pages() -> bool:
    try:
        with open(_THP) as file:
            return "[never]" not in file.read()
    except OSError:
        return False


ROWS: Final = tuple(
    Operation(
        name,
        "kernel",
        f"the first touch of a 4 KiB page, the host's pages being {what}",
        "a 512th of one entry that touches 2 MiB of fresh RAM, in order, and of the exit after it",
        _measure,
        ("kernel",),
        ("long", "ring3"),
    )
    for name, what in (("page-fault", "small"), ("page-fault-huge", "huge"))
)
"""The operations of this module."""
