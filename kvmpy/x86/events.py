"""Exceptions, interrupts and NMIs in flight (KVM API: KVM_GET_VCPU_EVENTS)."""

from dataclasses import dataclass
from typing import ClassVar

from kvmpy.x86.layout import Bytes, Layout

__all__ = ["VcpuEvents"]

_LAYOUT = Layout(
    "VcpuEvents",
    (
        ("exception_injected", "B"),
        ("exception_nr", "B"),
        ("exception_has_error_code", "B"),
        ("exception_pending", "B"),
        ("exception_error_code", "I"),
        ("interrupt_injected", "B"),
        ("interrupt_nr", "B"),
        ("interrupt_soft", "B"),
        ("interrupt_shadow", "B"),
        ("nmi_injected", "B"),
        ("nmi_pending", "B"),
        ("nmi_masked", "B"),
        ("", "x"),
        ("sipi_vector", "I"),
        ("flags", "I"),
        ("smi_smm", "B"),
        ("smi_pending", "B"),
        ("smi_smm_inside_nmi", "B"),
        ("smi_latched_init", "B"),
        ("triple_fault_pending", "B"),
        ("", "26x"),
        ("exception_has_payload", "B"),
        ("exception_payload", "Q"),
    ),
)


@dataclass(slots=True)
class VcpuEvents:
    """struct kvm_vcpu_events with its inner structures flattened; bit-wide fields are 0 or 1.

    `flags` (KVM_VCPUEVENT_VALID_*) says which of nmi_pending (bit 0), sipi_vector (1),
    interrupt_shadow (2), smi_* (3), exception_pending and the payload (4) and
    triple_fault_pending (5) hold; the last two need a capability to be enabled.
    """

    SIZE: ClassVar[int] = _LAYOUT.size

    exception_injected: int = 0
    exception_nr: int = 0
    exception_has_error_code: int = 0
    exception_pending: int = 0
    exception_error_code: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    flags: int = 0
    smi_smm: int = 0
    smi_pending: int = 0
    smi_smm_inside_nmi: int = 0
    smi_latched_init: int = 0
    triple_fault_pending: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0

    def pack(self) -> bytes:
        """Return struct kvm_vcpu_events; raise ConfigError naming a field that does not fit."""
        return _LAYOUT.pack(*_LAYOUT.values_of(self))

    @classmethod
    def unpack(cls, buffer: Bytes) -> "VcpuEvents":
        """Read struct kvm_vcpu_events from the first `SIZE` bytes of `buffer`."""
        return cls(*_LAYOUT.unpack_from(buffer))
