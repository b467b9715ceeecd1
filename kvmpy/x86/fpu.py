"""x87 and SSE state (KVM API: KVM_GET_FPU, struct kvm_fpu; SDM Vol.1 8.1 and 10.2)."""

from dataclasses import dataclass
from typing import ClassVar

from kvmpy.errors import ConfigError
from kvmpy.x86.layout import Bytes, Layout, check_size

__all__ = ["FPU"]

_REGISTER_SIZE = 16
_FPR_COUNT, _XMM_COUNT = 8, 16
_CONTROL = Layout(
    "FPU",
    (
        *(("fcw", "H"), ("fsw", "H"), ("ftwx", "B"), ("", "x")),
        *(("last_opcode", "H"), ("last_ip", "Q"), ("last_dp", "Q")),
    ),
)
_MXCSR = Layout("FPU", (("mxcsr", "I"), ("", "4x")))
_CONTROL_OFFSET = _FPR_COUNT * _REGISTER_SIZE
_XMM_OFFSET = _CONTROL_OFFSET + _CONTROL.size
_MXCSR_OFFSET = _XMM_OFFSET + _XMM_COUNT * _REGISTER_SIZE


def _cut(buffer: Bytes, offset: int, count: int) -> tuple[bytes, ...]:
    end = offset + count * _REGISTER_SIZE
    return tuple(bytes(buffer[i : i + _REGISTER_SIZE]) for i in range(offset, end, _REGISTER_SIZE))


@dataclass(slots=True)
class FPU:
    """Eight x87 registers and sixteen XMM registers of 16 bytes each, with their control words.

    The x87 registers use 10 of their 16 bytes and are in stack order, ST0 first. `ftwx` is the
    tag word as FXSAVE abridges it: one bit for each register, 1 where it is not empty. The
    defaults are what FNINIT and reset leave (SDM Vol.3 table 10-1). AVX state is not in here:
    see KVM_GET_XSAVE2.
    """

    SIZE: ClassVar[int] = _MXCSR_OFFSET + _MXCSR.size

    fpr: tuple[bytes, ...] = (bytes(_REGISTER_SIZE),) * _FPR_COUNT
    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: tuple[bytes, ...] = (bytes(_REGISTER_SIZE),) * _XMM_COUNT
    mxcsr: int = 0x1F80

    def pack(self) -> bytes:
        """Return struct kvm_fpu; raise ConfigError naming a register that does not fit."""
        for name, registers, count in (
            ("fpr", self.fpr, _FPR_COUNT),
            ("xmm", self.xmm, _XMM_COUNT),
        ):
            if len(registers) != count:
                raise ConfigError(f"FPU: {name} must hold {count} registers, not {len(registers)}")
            for index, register in enumerate(registers):
                check_size("FPU", f"{name}[{index}]", register, _REGISTER_SIZE)
        control = _CONTROL.pack(*_CONTROL.values_of(self))
        return b"".join((*self.fpr, control, *self.xmm, _MXCSR.pack(self.mxcsr)))

    @classmethod
    def unpack(cls, buffer: Bytes) -> "FPU":
        """Read struct kvm_fpu from the first `SIZE` bytes of `buffer`."""
        fpr = _cut(buffer, 0, _FPR_COUNT)
        control = _CONTROL.unpack_from(buffer, _CONTROL_OFFSET)
        xmm = _cut(buffer, _XMM_OFFSET, _XMM_COUNT)
        (mxcsr,) = _MXCSR.unpack_from(buffer, _MXCSR_OFFSET)
        fcw, fsw, ftwx, last_opcode, last_ip, last_dp = control
        return cls(fpr, fcw, fsw, ftwx, last_opcode, last_ip, last_dp, xmm, mxcsr)
