"""The host's side: what ioctls and descriptors cost, without an instruction of any guest's.

A sample is the time from before a call, or the first of several, to after it, or the last; C
makes them and reads the clock. What has to be done around them is no part of it.
"""

import errno
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from kvmpy.abi import IOCTLS, address_of, lib
from kvmpy.bench.calls import timed
from kvmpy.bench.model import Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.calls import Call, close, ioctl
from kvmpy.errors import KvmpyError, UnsupportedError
from kvmpy.exits import OFFSET_DIRTY_REGS, OFFSET_IMMEDIATE_EXIT, OFFSET_VALID_REGS
from kvmpy.machine import Machine
from kvmpy.memory import PAGE_SIZE
from kvmpy.vcpu import VCPU
from kvmpy.vcpuregs import REGS, SREGS, SYNC_REGS, SYNC_SREGS

__all__ = ["ROWS"]

_MOST: Final = 200  # samples a batch: some calls take milliseconds
_WARMUP: Final = 10
_SPARE: Final = 0x10000000  # a guest-physical address where there is no RAM
_SLOT: Final = 1  # the machine's RAM has slot 0
_MANUAL: Final = 3  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_INITIALLY_SET
_LOG_DIRTY: Final = 1  # KVM_MEM_LOG_DIRTY_PAGES
_MARK: Final = 0x1122334455667788


class Listed(NamedTuple):
    """Calls to make in each round, which of them are timed, and whether they had their effect."""

    calls: Sequence[Call]
    first: int = 0
    last: int | None = None
    works: Callable[[], bool] = lambda: True


def _vm_create(machine: Machine) -> Listed:
    return Listed([ioctl("CREATE_VM", machine.kvm.fd), close(0)])


def _vcpu_create(machine: Machine) -> Listed:
    calls = [ioctl("CREATE_VM", machine.kvm.fd), ioctl("CREATE_VCPU", of=0), close(1), close(0)]
    return Listed(calls, 1)


def _vm_close(machine: Machine) -> Listed:
    (region,) = machine.memory
    slot = struct.pack("<IIQQQ", 0, 0, 0, region.size, region.host_address)
    calls = [
        ioctl("CREATE_VM", machine.kvm.fd),
        ioctl("SET_USER_MEMORY_REGION", argument=bytearray(slot), of=0),
        ioctl("CREATE_VCPU", of=0),
        close(2),
        close(0),
    ]
    return Listed(calls, 3, 4)


def _slot(machine: Machine, timed_call: int) -> Listed:
    host = next(iter(machine.memory)).host_address
    add, delete = (
        bytearray(struct.pack("<IIQQQ", _SLOT, 0, _SPARE, size, host))
        for size in (next(iter(machine.memory)).size, 0)
    )
    fd = machine.vm.fd
    calls = [ioctl("SET_USER_MEMORY_REGION", fd, one) for one in (add, delete)]
    return Listed(calls, timed_call)


def _get(name: str, machine: Machine) -> Listed:
    buffer = bytearray(IOCTLS[name].size)
    return Listed([ioctl(name, _vcpu(machine).fd, buffer)], works=lambda: any(buffer))


def _set_regs(machine: Machine) -> Listed:
    vcpu = _vcpu(machine)
    registers = vcpu.get_regs()
    registers.rax = _MARK
    calls = [ioctl("SET_REGS", vcpu.fd, bytearray(registers.pack()))]
    return Listed(calls, works=lambda: vcpu.get_regs().rax == _MARK)


def _set_sregs(machine: Machine) -> Listed:
    vcpu = _vcpu(machine)
    registers = vcpu.get_sregs()
    registers.cr2 = _MARK
    calls = [ioctl("SET_SREGS", vcpu.fd, bytearray(registers.pack()))]
    return Listed(calls, works=lambda: vcpu.get_sregs().cr2 == _MARK)


def _immediate(machine: Machine) -> Listed:
    """KVM_RUN that returns before it enters the guest."""
    vcpu = _vcpu(machine)
    vcpu.run_page[OFFSET_IMMEDIATE_EXIT] = 1
    return Listed([ioctl("RUN", vcpu.fd, error=errno.EINTR)])


def _sync(bit: int, where: slice, machine: Machine) -> Listed:
    """The same with a set of registers copied into the mapping on the way out."""
    listed, page = _immediate(machine), _vcpu(machine).run_page
    if not machine.cpus[0].can_sync & bit:
        raise Unmeasured("not available here", "this host's KVM lacks KVM_CAP_SYNC_REGS")
    page[OFFSET_VALID_REGS] = bit
    page[where] = bytes(where.stop - where.start)
    return Listed(listed.calls, works=lambda: any(page[where]))


def _sync_set(machine: Machine) -> Listed:
    """The same with the general registers taken from the mapping on the way in."""
    listed, vcpu = _sync(SYNC_REGS, REGS, machine), _vcpu(machine)
    page = vcpu.run_page
    page[OFFSET_VALID_REGS] = 0
    registers = vcpu.get_regs()
    registers.rax = _MARK
    page[REGS] = registers.pack()
    dirty = address_of(page) + OFFSET_DIRTY_REGS
    calls = [replace(call, poke=dirty, value=SYNC_REGS) for call in listed.calls]

    def works() -> bool:
        page[OFFSET_IMMEDIATE_EXIT] = 0
        return not page[OFFSET_DIRTY_REGS] and vcpu.get_regs().rax == _MARK

    return Listed(calls, works=works)


def _vcpu(machine: Machine) -> VCPU:
    """The vCPU, its registers with KVM and none of them in the mapping."""
    vcpu = machine.cpus[0]
    vcpu.sync_regs = 0
    vcpu.get_xcrs()  # as all state ioctls, it hands over what waits in the mapping
    return vcpu


def _dirty(pages: int, machine: Machine) -> tuple[bytearray, bytearray]:
    """Log a region of so many pages, all of them dirty from the start; its bitmap and slot."""
    machine.vm.enable_cap("MANUAL_DIRTY_LOG_PROTECT2", _MANUAL)
    region = machine.vm.add_memory(_SPARE, pages * PAGE_SIZE, log_dirty=True)
    host = region.host_address
    slot = struct.pack("<IIQQQ", region.slot, _LOG_DIRTY, _SPARE, region.size, host)
    return bytearray(-(-pages // 64) * 8), bytearray(slot)


def _ones(bitmap: bytearray) -> int:
    return int.from_bytes(bitmap, "little").bit_count()


def _dirty_get(pages: int, machine: Machine) -> Listed:
    bitmap, _ = _dirty(pages, machine)
    request = bytearray(struct.pack("<IIQ", _SLOT, 0, address_of(bitmap)))
    calls = [ioctl("GET_DIRTY_LOG", machine.vm.fd, request, points_to=bitmap)]
    return Listed(calls, works=lambda: _ones(bitmap) == pages)


def _dirty_clear(pages: int, machine: Machine) -> Listed:
    bitmap, slot = _dirty(pages, machine)
    bitmap[:] = b"\xff" * len(bitmap)
    quiet = bytearray(slot)
    struct.pack_into("<I", quiet, 4, 0)
    request = bytearray(struct.pack("<IIQQ", _SLOT, pages, 0, address_of(bitmap)))
    fd, region = machine.vm.fd, list(machine.memory)[1]
    calls = [
        ioctl("SET_USER_MEMORY_REGION", fd, quiet),
        ioctl("SET_USER_MEMORY_REGION", fd, slot),  # all are dirty again
        ioctl("CLEAR_DIRTY_LOG", fd, request, points_to=bitmap),
    ]
    return Listed(calls, 2, works=lambda: not any(machine.vm.get_dirty_log(region)))


def _restore(machine: Machine) -> Listed:
    """What a vCPU's state is made of, written back in the order in which KVM wants it."""
    vcpu, calls = _vcpu(machine), []
    xsave = machine.vm.check_extension("XSAVE2")
    for name in ("XCRS", "SREGS", "XSAVE", "REGS", "DEBUGREGS", "MP_STATE", "VCPU_EVENTS"):
        wide = name == "XSAVE" and xsave
        buffer = bytearray(xsave if wide else IOCTLS[f"GET_{name}"].size)
        vcpu.ioctl("GET_XSAVE2" if wide else f"GET_{name}", buffer)
        calls.append(ioctl(f"SET_{name}", vcpu.fd, buffer))
    return Listed(calls, 0, len(calls) - 1)


_Make: TypeAlias = Callable[[Machine], Listed]
_CALL: Final = "the system call, from before it to after it"
_IMMEDIATE: Final = "KVM_RUN with immediate_exit, which enters no guest"
_ROWS: Final[tuple[tuple[str, str, str, _Make], ...]] = (
    ("vm-create", "KVM_CREATE_VM", _CALL, _vm_create),
    ("vcpu-create", "KVM_CREATE_VCPU, the first of a VM without an irqchip", _CALL, _vcpu_create),
    (
        "vm-close",
        "close a VM of 4 MiB and a vCPU that has never run",
        "the closing of both descriptors",
        _vm_close,
    ),
    ("slot-add", "a memory slot of 4 MiB more", _CALL, partial(_slot, timed_call=0)),
    ("slot-delete", "a memory slot of 4 MiB less", _CALL, partial(_slot, timed_call=1)),
    ("regs-get", "KVM_GET_REGS", _CALL, partial(_get, "GET_REGS")),
    ("regs-set", "KVM_SET_REGS", _CALL, _set_regs),
    ("sregs-get", "KVM_GET_SREGS", _CALL, partial(_get, "GET_SREGS")),
    ("sregs-set", "KVM_SET_SREGS", _CALL, _set_sregs),
    ("immediate-exit", "KVM_RUN with immediate_exit", _IMMEDIATE, _immediate),
    (
        "sync-regs-get",
        "KVM_RUN with immediate_exit that brings the general registers along",
        _IMMEDIATE,
        partial(_sync, SYNC_REGS, REGS),
    ),
    (
        "sync-sregs-get",
        "KVM_RUN with immediate_exit that brings the special registers along",
        _IMMEDIATE,
        partial(_sync, SYNC_SREGS, SREGS),
    ),
    (
        "sync-regs-set",
        "KVM_RUN with immediate_exit that takes the general registers along",
        _IMMEDIATE,
        _sync_set,
    ),
    *(
        row
        for pages in (1, 256, 65536)
        for row in (
            (
                f"dirty-get-{pages}",
                f"KVM_GET_DIRTY_LOG of {pages:,} page{'s' * (pages > 1)}, all dirty",
                "the system call, which clears nothing; no page of them was ever touched",
                partial(_dirty_get, pages),
            ),
            (
                f"dirty-clear-{pages}",
                f"KVM_CLEAR_DIRTY_LOG of {pages:,} page{'s' * (pages > 1)}, all dirty",
                "the system call; no page of them was ever touched, so none gets protected",
                partial(_dirty_clear, pages),
            ),
        )
    ),
    (
        "state-restore",
        "the state of a vCPU, by seven ioctls",
        "XCRS, SREGS, XSAVE, REGS, DEBUGREGS, MP_STATE and VCPU_EVENTS, written; no memory",
        _restore,
    ),
)


def _measure(make: _Make, case: Case, conditions: Conditions) -> Batch:
    count = min(_MOST, conditions.count)
    try:
        with Machine("4M", devices=False) as machine:
            listed = make(machine)
            pairs = timed(listed.calls, _WARMUP + count, listed.first, listed.last)
            if not listed.works():
                raise KvmpyError(f"{case}: the calls did not do what they are for")
    except UnsupportedError as error:
        raise Unmeasured("not available here", str(error)) from None
    samples = np.diff(pairs, axis=1)[_WARMUP:, 0].astype(np.float64)
    proof = {"claimed": len(pairs), "counted": len(pairs), "per_sample": 1}
    cost = {"clock": lib.kvmpy_clock_cost(1000) / 1000}
    return Batch(case, samples, host=pairs[_WARMUP:], proof=proof, overhead=cost)


ROWS: Final = tuple(
    Operation(name, "host", about, includes, partial(_measure, make))
    for name, about, includes, make in _ROWS
)
"""The operations of this module."""
