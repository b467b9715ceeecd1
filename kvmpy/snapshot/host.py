"""What a snapshot's vCPUs need of a host: features of the CPU, XSAVE components, MSRs.

A vCPU that runs on with less than its guest was told that it has fails at some later moment, in the
guest; so a snapshot from another host is refused before that.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvmpy.errors import UnsupportedError
from kvmpy.kvm import KVM, packed_cpuid, unpack_cpuid
from kvmpy.once import Once
from kvmpy.snapshot.cpu import CpuState, msr_indices
from kvmpy.x86.state import CPUIDEntry, XCRs

__all__ = ["check_host"]

# Leaf, subleaf, register, and bits that are no features: those follow CR4 and APIC_BASE, or say
# that there is a hypervisor (SDM Vol.2A CPUID; APM Vol.3 appendix E).
_FEATURES: Final = (
    (1, 0, "ecx", 1 << 3 | 1 << 27 | 1 << 31),  # MONITOR, OSXSAVE, hypervisor
    (1, 0, "edx", 1 << 9),  # APIC
    (7, 0, "ebx", 0),
    (7, 0, "ecx", 1 << 4),  # OSPKE
    (7, 0, "edx", 0),
    (7, 1, "eax", 0),
    (7, 1, "edx", 0),
    (0xD, 0, "eax", 0),
    (0xD, 0, "edx", 0),
    (0xD, 1, "eax", 0),
    (0x80000001, 0, "ecx", 0),
    (0x80000001, 0, "edx", 1 << 9),
    (0x80000008, 0, "ebx", 0),
)
_NAMES: Final = {
    (1, "ecx"): {0: "sse3", 1: "pclmulqdq", 9: "ssse3", 12: "fma", 13: "cx16", 19: "sse4_1",
                 20: "sse4_2", 22: "movbe", 23: "popcnt", 25: "aes", 26: "xsave", 28: "avx",
                 29: "f16c", 30: "rdrand"},
    (7, "ebx"): {0: "fsgsbase", 3: "bmi1", 5: "avx2", 7: "smep", 8: "bmi2", 9: "erms",
                 10: "invpcid", 16: "avx512f", 18: "rdseed", 19: "adx", 20: "smap", 29: "sha"},
    (7, "ecx"): {2: "umip", 3: "pku", 8: "gfni", 16: "la57", 22: "rdpid"},
    (0xD, "eax"): {2: "the AVX state", 5: "the AVX-512 state", 9: "the PKRU state"},
    (0x80000001, "edx"): {20: "nx", 26: "pdpe1gb", 27: "rdtscp", 29: "lm"},
}  # fmt: skip
_Leaves = dict[tuple[int, int], CPUIDEntry]


class _Host(NamedTuple):
    """What vCPUs have here."""

    leaves: tuple[_Leaves, _Leaves]
    msrs: frozenset[int]
    xsave: int


_here: Final = Once[_Host]()


def _host() -> _Host:
    return _here.get(_found)


def _found() -> _Host:
    """Found out by making a vCPU.

    What a vCPU reads back counts beside what KVM says that it supports: not every KVM lets CPUID be
    set, and then each vCPU has more than that.
    """
    with KVM() as kvm, kvm.create_vm() as vm:
        packed = packed_cpuid(kvm)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid2(packed)
        leaves = (_leaves(unpack_cpuid(packed)), _leaves(vcpu.get_cpuid2()))
        msrs = frozenset(msr_indices(vcpu, tuple(kvm.get_msr_index_list())))
        return _Host(leaves, msrs, len(vcpu.get_xsave()))


def _leaves(entries: Sequence[CPUIDEntry]) -> _Leaves:
    return {(one.function, one.index): one for one in entries}


def check_host(cpus: Sequence[CpuState]) -> None:
    """Raise UnsupportedError, naming what vCPUs in that state need and this host lacks."""
    host = _host()
    for state in cpus:
        if missing := [*_missing(state, host)]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UnsupportedError(
                f"the snapshot needs what this host's vCPUs do not have: "
                f"{', '.join(missing[:5])}{more}; use a host like that which it was taken on"
            )


def _missing(state: CpuState, host: _Host) -> Iterator[str]:
    needed = _leaves(unpack_cpuid(state["CPUID2"]))
    for function, index, register, ignored in _FEATURES:
        has = 0
        for leaves in host.leaves:
            if (function, index) in leaves:
                has |= getattr(leaves[function, index], register)
        wanted = needed.get((function, index))
        lacking = getattr(wanted, register, 0) & ~has & ~ignored
        names = _NAMES.get((function, register), {})
        for bit in range(32):
            if lacking >> bit & 1:
                place = f"CPUID {function:#x}.{index} {register} bit {bit}"
                yield f"{names[bit]} ({place})" if bit in names else place
    yield from _missing_state(state, host)


def _missing_state(state: CpuState, host: _Host) -> Iterator[str]:
    components = 3  # x87 and SSE, which every processor has
    for leaves in host.leaves:
        if leaf := leaves.get((0xD, 0)):
            components |= leaf.eax | leaf.edx << 32
    if lacking := XCRs.unpack(state["XCRS"]).values.get(0, 0) & ~components:
        yield f"XSAVE components {lacking:#x} in XCR0"
    (in_use,) = struct.unpack_from("<Q", state["XSAVE"], 512)  # XSTATE_BV
    if lacking := in_use & ~components:
        yield f"XSAVE components {lacking:#x} in use"
    if len(state["XSAVE"]) > host.xsave:
        yield f"an XSAVE area of {len(state['XSAVE'])} bytes (here: {host.xsave})"
    for index, _, value in struct.iter_unpack("<IIQ", state["MSRS"]):
        if value and index not in host.msrs:
            yield f"MSR {index:#x}"
