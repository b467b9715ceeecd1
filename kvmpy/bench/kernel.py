"""Instructions whose exits KVM answers itself: no one else hears of them."""

import struct
from functools import partial
from typing import Final

from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.bench.takes import blocks

__all__ = ["ROWS"]

_RING0: Final = ("real", "protected", "long")
_ROWS: Final = (
    ("cpuid", "cpuid", "CPUID of leaf 0", (*_RING0, "ring3")),
    ("rdmsr", "rdmsr", "RDMSR of IA32_MISC_ENABLE", _RING0),
    ("wrmsr", "wrmsr", "WRMSR of IA32_MISC_ENABLE, the value that it has", _RING0),
    ("tsc-deadline", "tsc_deadline", "WRMSR of IA32_TSC_DEADLINE, which arms a timer", _RING0),
    ("cr0-write", "write_cr0", "MOV to CR0, the value that it has", _RING0),
    ("cr3-write", "write_cr3", "MOV to CR3, the value that it has", _RING0),
    ("cr8-write", "write_cr8", "MOV to CR8, the value that it has", ("long",)),
    # Not from real mode: where it is no instruction, the interrupt table leads to nowhere.
    ("vmcall", "vmcall", "VMCALL, Intel's hypercall, with RAX 0", ("protected", "long")),
    ("vmmcall", "vmmcall", "VMMCALL, AMD's hypercall, with RAX 0", ("protected", "long")),
)
_LABELS: Final = {name: label for name, label, _, _ in _ROWS}
_SPURIOUS: Final = 0xF0  # offsets of the local APIC's registers, SDM Vol.3 10.4.1
_LVT_TIMER: Final = 0x320
_ENABLED: Final = 0x1FF
_DEADLINE_MODE: Final = 0b10 << 17  # SDM Vol.3 10.5.4.1
_VECTOR: Final = 0x40


def _measure(case: Case, conditions: Conditions) -> Batch:
    kind = Kind("kernel", _LABELS[case.operation])
    timer = case.operation == "tsc-deadline"
    bench = GuestBench(kind, case, conditions, irqchip="split" if timer else None)
    if timer:
        _arm_by_deadline(bench)
    batch = bench.proven(partial(blocks, bench))
    # Each round of the loop is at least three instructions, emulated or run by the processor;
    # only the former, and exits, are in KVM's statistics.
    claimed = batch.proof["claimed"]
    seen = max(batch.proof.get("kvm_exits", claimed), batch.proof.get("kvm_insn_emulation", 0))
    if seen < claimed:
        reason = f"KVM counts {seen} exits and emulations for {claimed} of them"
        raise Unmeasured("does not exit here", reason)
    return batch


def _arm_by_deadline(bench: GuestBench) -> None:
    """Put the local APIC's timer into its TSC-deadline mode, without which the MSR does nothing."""
    registers = bytearray(bench.cpu.get_lapic())
    struct.pack_into("<I", registers, _SPURIOUS, _ENABLED)
    struct.pack_into("<I", registers, _LVT_TIMER, _DEADLINE_MODE | _VECTOR)
    bench.cpu.set_lapic(bytes(registers))


ROWS: Final = tuple(
    Operation(
        name,
        "kernel",
        about,
        "a 64th of one entry with 64 of them in a loop, and of the exit after them",
        _measure,
        ("kernel",),
        modes,
    )
    for name, _, about, modes in _ROWS
)
"""The operations of this module."""
