"""The state of a vCPU that each takes an ioctl: all but the general and special registers.

Each method carries its ioctl's name. State is written, and kept, only between instructions:
before each of these calls the exit at hand is finished (see `VCPU.finish`).
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvmpy.abi import pack
from kvmpy.descriptor import Descriptor
from kvmpy.errors import ConfigError
from kvmpy.stats import Stats
from kvmpy.x86.state import FPU, CPUIDEntry, DebugRegisters, MPState, VcpuEvents, XCRs

__all__ = ["Translation", "VcpuState", "wrong_kind"]

LAPIC_SIZE: Final = 1024
_MSR = struct.Struct("<IIQ")
_XSTATE_BV: Final = 512  # in the XSAVE area (SDM Vol.1 13.4.2)
_X87_SSE: Final = 3
_MSRS_AT_ONCE: Final = 128  # KVM takes fewer than 256 in one call


def wrong_kind(name: str, kind: str, given: object) -> ConfigError:
    """The error of a method that was given something else: asked for when it has failed only."""
    return ConfigError(f"{name} takes {kind}, not {type(given).__name__}")


@dataclass(frozen=True, slots=True)
class Translation:
    """Where a linear address leads: None for `physical` where nothing is mapped."""

    physical: int | None
    writable: bool
    user: bool


class VcpuState(Descriptor):
    """The state ioctls of a vCPU's descriptor."""

    _xsave_size = 0

    def _settle(self, *, writing: bool = False) -> None:
        """Finish the exit at hand and hand written registers to KVM.

        With `writing`, what the mapping says of the registers counts no more.
        """
        raise NotImplementedError

    def read_state(self, name: str, size: int) -> bytes:
        """The packed struct that the ioctl `name` gives, of `size` bytes."""
        self._settle()
        buffer = bytearray(size)
        self.ioctl(name, buffer)
        return bytes(buffer)

    def write_state(self, name: str, data: bytes | bytearray, size: int | None = None) -> None:
        """Hand a packed struct to the ioctl `name`; with `size`, it must have so many bytes."""
        try:
            if size is not None and len(data) != size:
                raise ConfigError(f"KVM_{name} takes {size} bytes, not {len(data)}")
        except TypeError:
            raise wrong_kind(name.lower(), f"{size} bytes", data) from None
        self._settle(writing=True)
        self.ioctl(name, bytearray(data))

    def _write_packed(self, name: str, kind: Any, value: Any) -> None:
        """Hand a struct that packs itself to the ioctl `name`."""
        if not isinstance(value, kind):
            raise wrong_kind(name.lower(), kind.__name__, value)
        self.write_state(name, value.pack())

    def get_fpu(self) -> FPU:
        """x87 and SSE registers, without MXCSR, which KVM leaves out; `get_xsave` has all."""
        return FPU.unpack(self.read_state("GET_FPU", FPU.SIZE))

    def set_fpu(self, fpu: FPU) -> None:
        """Write x87 and SSE registers; KVM ignores `mxcsr`."""
        if not isinstance(fpu, FPU):
            raise wrong_kind("set_fpu", "FPU", fpu)  # before the area is touched
        area = bytearray(self.get_xsave())
        if area[_XSTATE_BV] & _X87_SSE != _X87_SSE:
            # KVM_SET_FPU does not say that they are in use: KVM_RUN would take initial values.
            area[_XSTATE_BV] |= _X87_SSE
            self.set_xsave(bytes(area))
        self.write_state("SET_FPU", fpu.pack())

    def get_xsave(self) -> bytes:
        """The XSAVE area in standard format, 4096 bytes or more (SDM Vol.1 13.4)."""
        size = max(4096, self._xsave_size)
        return self.read_state("GET_XSAVE2" if self._xsave_size else "GET_XSAVE", size)

    def set_xsave(self, area: bytes) -> None:
        """Write back what `get_xsave` gave."""
        self.write_state("SET_XSAVE", area, max(4096, self._xsave_size))

    def get_xcrs(self) -> XCRs:
        """The extended control registers (XCR0)."""
        return XCRs.unpack(self.read_state("GET_XCRS", XCRs.SIZE))

    def set_xcrs(self, xcrs: XCRs) -> None:
        """Write the extended control registers."""
        self._write_packed("SET_XCRS", XCRs, xcrs)

    def get_debugregs(self) -> DebugRegisters:
        """DR0 to DR3, DR6 and DR7."""
        return DebugRegisters.unpack(self.read_state("GET_DEBUGREGS", DebugRegisters.SIZE))

    def set_debugregs(self, registers: DebugRegisters) -> None:
        """Write DR0 to DR3, DR6 and DR7."""
        self._write_packed("SET_DEBUGREGS", DebugRegisters, registers)

    def get_vcpu_events(self) -> VcpuEvents:
        """Exceptions, interrupts and NMIs that are pending or being delivered."""
        return VcpuEvents.unpack(self.read_state("GET_VCPU_EVENTS", VcpuEvents.SIZE))

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """Write pending events; `events.flags` says which fields count."""
        self._write_packed("SET_VCPU_EVENTS", VcpuEvents, events)

    def get_mp_state(self) -> MPState:
        """Runnable, halted, waiting for INIT or SIPI."""
        return MPState(struct.unpack("<I", self.read_state("GET_MP_STATE", 4))[0])

    def set_mp_state(self, state: MPState) -> None:
        """Set the run state; other than runnable it needs an in-kernel local APIC."""
        self.write_state("SET_MP_STATE", pack("SET_MP_STATE", "<I", state))

    def get_lapic(self) -> bytes:
        """The 1024 bytes of the in-kernel local APIC's registers; it needs an irqchip."""
        return self.read_state("GET_LAPIC", LAPIC_SIZE)

    def set_lapic(self, registers: bytes) -> None:
        """Write back what `get_lapic` gave."""
        self.write_state("SET_LAPIC", registers, LAPIC_SIZE)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """The values of MSRs by index; ConfigError names one that the vCPU does not have."""
        wanted = list(indices)
        found: dict[int, int] = {}
        for at in range(0, len(wanted), _MSRS_AT_ONCE):
            part = wanted[at : at + _MSRS_AT_ONCE]
            data, done = self._msrs("GET_MSRS", [(index, 0) for index in part])
            if done < len(part):
                raise ConfigError(f"{self.what} has no MSR {part[done]:#x} to read")
            found.update((index, value) for index, _, value in _MSR.iter_unpack(data[8:]))
        return found

    def set_msrs(self, values: Mapping[int, int], *, strict: bool = True) -> tuple[int, ...]:
        """Write MSRs by index, in order, and say which the vCPU refused.

        With `strict` the first refusal is a ConfigError that names it, and those after it are
        not written; without, they are, and the refused indices are returned.
        """
        try:
            left, refused = list(values.items()), []
        except AttributeError:
            raise wrong_kind("set_msrs", "values by index", values) from None
        for index, value in left:
            try:
                fits = 0 <= index < 1 << 32 and 0 <= value < 1 << 64
                text = "" if fits else f"MSR {index:#x} = {value:#x}"
            except (TypeError, ValueError):  # not numbers, or floats
                fits, text = False, f"MSR {index!r} = {value!r}"
            if not fits:
                raise ConfigError(f"{text}: 32 bits of index, 64 of value")
        while left:
            part = left[:_MSRS_AT_ONCE]
            _, done = self._msrs("SET_MSRS", part)
            left = left[done:]
            if done < len(part):
                index, value = left.pop(0)
                if strict:
                    raise ConfigError(f"{self.what} refuses {value:#x} for MSR {index:#x}")
                refused.append(index)
        return tuple(refused)

    def _msrs(self, name: str, values: list[tuple[int, int]]) -> tuple[bytearray, int]:
        self._settle(writing=name == "SET_MSRS")
        buffer = bytearray(struct.pack("<II", len(values), 0))
        for index, value in values:
            buffer += pack(name, "<IIQ", index, 0, value)
        return buffer, self.ioctl(name, buffer)

    def get_cpuid2(self) -> list[CPUIDEntry]:
        """The CPUID leaves that the vCPU gives its guest."""
        buffer = bytearray(8 + 40 * 256)
        struct.pack_into("<I", buffer, 0, 256)
        self.ioctl("GET_CPUID2", buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return [CPUIDEntry.unpack(buffer[at : at + 40]) for at in range(8, 8 + 40 * count, 40)]

    def set_cpuid2(self, entries: Iterable[CPUIDEntry] | bytes) -> None:
        """Set the CPUID leaves, before the first run; packed entries are taken as they are."""
        if isinstance(entries, bytes):
            packed = entries
        else:
            try:
                packed = b"".join(entry.pack() for entry in entries)
            except (AttributeError, TypeError):
                raise wrong_kind("set_cpuid2", "CPUIDEntry values", entries) from None
        if len(packed) % CPUIDEntry.SIZE:
            raise ConfigError(f"packed CPUID entries have 40 bytes each, not {len(packed)} in all")
        header = struct.pack("<II", len(packed) // CPUIDEntry.SIZE, 0)
        hint = "CPUID can be set before the first run only, to what the host supports"
        self.ioctl("SET_CPUID2", bytearray(header + packed), hint)

    def set_guest_debug(
        self,
        *,
        single_step: bool = False,
        software_breakpoints: bool = False,
        breakpoints: Mapping[int, str] | None = None,
    ) -> None:
        """Have the guest's debug events exit as `Debug` (KVM_SET_GUEST_DEBUG).

        `breakpoints` are up to four linear addresses with "x" (execute, 1 byte) or "w" or
        "rw" and a length, such as "w4" (SDM Vol.3 18.2). Without arguments: off.
        """
        points = dict(breakpoints or {})
        if len(points) > 4:
            raise ConfigError(f"{len(points)} hardware breakpoints: x86 has 4")
        dr7 = 0
        for number, kind in enumerate(points.values()):
            if kind not in _BREAKPOINTS:
                raise ConfigError(f"breakpoint {kind!r}: use one of {', '.join(_BREAKPOINTS)}")
            dr7 |= 2 << 2 * number | _BREAKPOINTS[kind] << 16 + 4 * number
        # KVM_GUESTDBG_ENABLE, _SINGLESTEP, _USE_SW_BP, _USE_HW_BP
        control = single_step << 1 | software_breakpoints << 16 | bool(points) << 17
        registers = [*points, *[0] * (4 - len(points)), 0, 0, 0, dr7]
        packed = pack("SET_GUEST_DEBUG", "<II8Q", control | bool(control), 0, *registers)
        self.write_state("SET_GUEST_DEBUG", packed)

    def translate(self, address: int) -> Translation:
        """Walk the guest's page tables for a linear address (KVM_TRANSLATE)."""
        self._settle()
        buffer = pack("TRANSLATE", "<Q16x", address)
        self.ioctl("TRANSLATE", buffer)
        physical, valid, writable, user = struct.unpack_from("<QBBB", buffer, 8)
        return Translation(physical if valid else None, bool(writable), bool(user))

    def interrupt(self, vector: int) -> None:
        """Queue a maskable interrupt; without an in-kernel PIC only (KVM_INTERRUPT)."""
        if not 0 <= vector <= 255:
            raise ConfigError(f"interrupt vector {vector}: 0 to 255")
        self.write_state("INTERRUPT", struct.pack("<I", vector))

    def nmi(self) -> None:
        """Queue a non-maskable interrupt (KVM_NMI)."""
        self._settle()
        self.ioctl("NMI")

    def get_tsc_khz(self) -> int:
        """The guest's TSC frequency in kHz (KVM_GET_TSC_KHZ)."""
        return self.ioctl("GET_TSC_KHZ")

    def stats(self) -> Stats:
        """The vCPU's statistics descriptor; the caller closes it."""
        return Stats(self.fd, self.what)


_BREAKPOINTS = {  # R/W and LEN fields of DR7, SDM Vol.3 18.2.4
    "x": 0b0000,
    "w1": 0b0001,
    "w2": 0b0101,
    "w4": 0b1101,
    "w8": 0b1001,
    "rw1": 0b0011,
    "rw2": 0b0111,
    "rw4": 0b1111,
    "rw8": 0b1011,
}
