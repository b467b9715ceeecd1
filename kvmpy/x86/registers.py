"""The general-purpose registers, RIP and RFLAGS (KVM API: KVM_GET_REGS, struct kvm_regs)."""

from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

from kvmpy.x86.layout import Bytes, Layout

__all__ = ["REGISTER_NAMES", "Registers"]

REGISTER_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags"),
)
"""The registers' names in the order of struct kvm_regs."""

_LAYOUT = Layout("Registers", ((name, "Q") for name in REGISTER_NAMES))
_unpack_from = _LAYOUT.unpack_from
_values = attrgetter(*REGISTER_NAMES)


@dataclass(slots=True)
class Registers:
    """The values of 18 registers, each an unsigned 64-bit integer.

    RFLAGS defaults to 2: bit 1 always reads as one (SDM Vol.1 3.4.3).
    """

    SIZE: ClassVar[int] = _LAYOUT.size

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2

    def pack(self) -> bytes:
        """Return struct kvm_regs; raise ConfigError naming a register outside of 64 bits."""
        return _LAYOUT.pack(*_values(self))

    @classmethod
    def unpack(cls, buffer: Bytes) -> "Registers":
        """Read struct kvm_regs from the first `SIZE` bytes of `buffer`."""
        return cls(*_unpack_from(buffer))

    def as_dict(self) -> dict[str, int]:
        """Return the values by lower-case name, in the order of `REGISTER_NAMES`."""
        return {name: getattr(self, name) for name in REGISTER_NAMES}
