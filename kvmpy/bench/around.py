"""Ways around an exit: eventfds that KVM signals itself, and writes that it collects."""

import os
from functools import partial
from typing import Final

from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import MODES, Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.bench.takes import BLOCK, blocks
from kvmpy.errors import HostError, KvmpyError, UnsupportedError

__all__ = ["ROWS"]

_SIZE: Final = 4
_PORT: Final = 0x20  # with the three after it, since a zone collects any write into it
_RING: Final = 128  # writes that surely find room in the ring
_KINDS: Final = {"pio": Kind("port", "out4"), "mmio": Kind("mmio", "write4")}


def _ioeventfd(bench: GuestBench, port: bool) -> Batch:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        at = bench.port if port else bench.address
        bench.machine.vm.ioeventfd(fd, at, _SIZE, port=port)
        return blocks(bench, partial(_signalled, bench, fd))
    finally:
        os.close(fd)


def _signalled(bench: GuestBench, fd: int) -> None:
    try:
        count = os.eventfd_read(fd)
    except BlockingIOError:
        count = 0
    if count != BLOCK:
        raise KvmpyError(f"{bench.case}: the eventfd counts {count} of {BLOCK} writes")


def _coalesced(bench: GuestBench, port: bool) -> Batch:
    vm = bench.machine.vm
    if not vm.check_extension("COALESCED_PIO" if port else "COALESCED_MMIO"):
        raise Unmeasured("not available here", "this host's KVM collects no such writes")
    bench.most_stamps = _RING
    vm.register_coalesced(bench.port if port else bench.address, _SIZE, port=port)
    return blocks(bench, partial(_drained, bench))


def _drained(bench: GuestBench) -> None:
    count = sum(1 for _ in bench.cpu.drain_ring())
    if count != BLOCK:
        raise KvmpyError(f"{bench.case}: the ring holds {count} of {BLOCK} writes")


_WAYS: Final = {"ioeventfd": _ioeventfd, "coalesced": _coalesced}


def _measure(case: Case, conditions: Conditions) -> Batch:
    way, _, bus = case.operation.partition("-")
    bench = GuestBench(_KINDS[bus], case, conditions, port=_PORT)
    try:
        batch = bench.proven(partial(_WAYS[way], bench, bus == "pio"))
    except (UnsupportedError, HostError) as error:
        raise Unmeasured("not available here", str(error)) from None
    return batch


ROWS: Final = tuple(
    Operation(
        f"{way}-{bus}",
        "around",
        f"a {_SIZE}-byte {'port' if bus == 'pio' else 'MMIO'} write that {what}",
        "a 64th of one entry with 64 of them in a loop, and of the exit after them",
        _measure,
        ("kernel",),
        MODES,
    )
    for way, what in (("ioeventfd", "signals an eventfd"), ("coalesced", "KVM puts into a ring"))
    for bus in _KINDS
)
"""The operations of this module."""
