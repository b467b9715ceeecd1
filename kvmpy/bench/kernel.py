"""Instructions whose exits KVM answers itself: no one else hears of them."""

from typing import Final

from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import Batch, Case, Conditions, Operation, Unmeasured

__all__ = ["ROWS"]

_RING0: Final = ("real", "protected", "long")
_ROWS: Final = (
    ("cpuid", "cpuid", "CPUID of leaf 0", (*_RING0, "ring3")),
    ("rdmsr", "rdmsr", "RDMSR of IA32_MISC_ENABLE", _RING0),
    ("wrmsr", "wrmsr", "WRMSR of IA32_MISC_ENABLE, the value that it has", _RING0),
    ("cr0-write", "write_cr0", "MOV to CR0, the value that it has", _RING0),
    ("cr3-write", "write_cr3", "MOV to CR3, the value that it has", _RING0),
    ("cr8-write", "write_cr8", "MOV to CR8, the value that it has", ("long",)),
    # Not from real mode: where it is no instruction, the interrupt table leads to nowhere.
    ("vmcall", "vmcall", "VMCALL, Intel's hypercall, with RAX 0", ("protected", "long")),
    ("vmmcall", "vmmcall", "VMMCALL, AMD's hypercall, with RAX 0", ("protected", "long")),
)
_LABELS: Final = {name: label for name, label, _, _ in _ROWS}


def _measure(case: Case, conditions: Conditions) -> Batch:
    bench = GuestBench(Kind("kernel", _LABELS[case.operation], "", 0), case, conditions)
    batch = bench.proven(bench.blocks)
    # Each round of the loop is at least three instructions, emulated or run by the processor;
    # only the former, and exits, are in KVM's statistics.
    claimed = batch.proof["claimed"]
    seen = max(batch.proof.get("kvm_exits", claimed), batch.proof.get("kvm_insn_emulation", 0))
    if seen < claimed:
        reason = f"KVM counts {seen} exits and emulations for {claimed} of them"
        raise Unmeasured("does not exit here", reason)
    return batch


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
