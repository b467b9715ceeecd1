"""Operations whose exits no device answers: HLT, MSRs, debug events, and failures of KVM's.

They come to Python one by one. A sample is the time from the entry of the guest to its exit, which
the C loop takes; what Python does after it is no part of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import MODES, Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.bench.takes import entries
from kvmpy.errors import UnsupportedError
from kvmpy.exits import InternalError, decode

__all__ = ["ROWS"]

_MSR_UNKNOWN: Final = 1 << 1  # KVM_MSR_EXIT_REASON_UNKNOWN
_EMULATION: Final = 1  # KVM_INTERNAL_ERROR_EMULATION
_FOREVER: Final = 0x7FFFFFFF
_RING0: Final = MODES[:3]


def _halt(bench: GuestBench) -> Batch:
    if bench.case.mode == "ring3":
        raise Unmeasured("not available here", "HLT is for ring 0")
    bench.start("halt", _FOREVER)
    return entries(bench)


def _msr(bench: GuestBench) -> Batch:
    try:
        bench.machine.vm.enable_cap("X86_USER_SPACE_MSR", _MSR_UNKNOWN)
    except UnsupportedError as error:
        raise Unmeasured("not available here", str(error)) from None
    bench.start(bench.kind.label, _FOREVER)
    if bench.kind.label == "write":
        return entries(bench)  # the run page says from the start that it is no error
    return entries(bench, partial(bench.cpu.reply, bytes(8)))


def _step(bench: GuestBench) -> Batch:
    bench.start("empty", _FOREVER)
    bench.costs = ("clock",)  # one instruction is no round of the loop
    bench.cpu.set_guest_debug(single_step=True)
    try:
        return entries(bench)
    finally:
        bench.cpu.set_guest_debug()


def _failure(bench: GuestBench) -> Batch:
    """Instructions cannot be fetched from where there is no RAM, and no KVM emulates those."""
    bench.start("empty", 0)
    bench.costs = ("clock",)
    registers, special = bench.cpu.get_regs(), bench.cpu.get_sregs()
    registers.rip = bench.address
    if bench.case.mode == "real":
        registers.rip, special.cs.selector, special.cs.base = 0, bench.address >> 4, bench.address
        bench.cpu.set_sregs(special)
    bench.cpu.set_regs(registers)
    batch = entries(bench)
    exit_ = decode(memoryview(bench.cpu.run_page))
    if not isinstance(exit_, InternalError) or exit_.suberror != _EMULATION:
        raise Unmeasured("not available here", f"the exit is {exit_}, not a failed emulation")
    return batch


_Take: TypeAlias = Callable[[GuestBench], Batch]
_ROWS: Final[tuple[tuple[str, str, Kind, _Take, tuple[str, ...]], ...]] = (
    ("halt", "HLT", Kind("halt", "halt", "halt"), _halt, MODES),
    ("msr-read", "RDMSR, answered in user space", Kind("msr", "read", "msr-read"), _msr, _RING0),
    ("msr-write", "WRMSR, served in user space", Kind("msr", "write", "msr-write"), _msr, _RING0),
    ("single-step", "a single-stepped instruction", Kind("port", "empty", "debug"), _step, MODES),
    (
        "emulation-failure",
        "an instruction that KVM cannot emulate",
        Kind("port", "empty", "internal-error"),
        _failure,
        MODES,
    ),
)


def _measure(kind: Kind, take: _Take, case: Case, conditions: Conditions) -> Batch:
    bench = GuestBench(kind, case, conditions)
    bench.most_stamps = 0  # between its stamps would lie what Python does after the exit
    return bench.proven(partial(take, bench))


ROWS: Final = tuple(
    Operation(
        name,
        "exits",
        about,
        "from the entry of the guest to its exit, and the guest's instructions between",
        partial(_measure, kind, take),
        ("c",),
        modes,
    )
    for name, about, kind, take, modes in _ROWS
)
"""The operations of this module."""
