"""A vCPU's registers in the form of gdb's packets, by their numbers in `REGISTERS`."""

from typing import Final

from kvmpy.errors import ConfigError
from kvmpy.gdb.description import REGISTERS, RIP, Register
from kvmpy.vcpu import VCPU
from kvmpy.views.cpumode import instruction_pointer, linear_rip
from kvmpy.views.descriptors import look_up
from kvmpy.views.pages import Read
from kvmpy.x86.flags import CR0
from kvmpy.x86.segments import Segment

__all__ = ["RegisterFile"]

_NAMES: Final = {"eflags": "rflags"}
_XSTATE_BV, _X87_SSE = 512, 3
# name: offset and bytes in the legacy region of an XSAVE area (SDM Vol.1 10.5.1, table 10-2).
# The selectors of FIP and FDP are part of its 64-bit pointers, and gdb gets the low halves.
_LEGACY: Final = {
    "fctrl": (0, 2), "fstat": (2, 2), "fop": (6, 2), "fioff": (8, 4), "fiseg": (12, 2),
    "fooff": (16, 4), "foseg": (20, 2), "mxcsr": (24, 4),
    **{f"st{n}": (32 + 16 * n, 10) for n in range(8)},
    **{f"xmm{n}": (160 + 16 * n, 16) for n in range(16)},
}  # fmt: skip
_TAG: Final = 4


class RegisterFile:
    """All registers of a stopped vCPU: read as they are asked for, written back by `flush`."""

    def __init__(self, cpu: VCPU, read: Read) -> None:
        self.cpu, self._read = cpu, read
        self.general, self.special = cpu.get_regs(), cpu.get_sregs()
        self._before = self.general.pack(), self.special.pack()
        self._area: bytearray | None = None
        self._float_changed = False

    @property
    def _floats(self) -> bytearray:
        if self._area is None:
            self._area = bytearray(self.cpu.get_xsave())
        return self._area

    @property
    def pc(self) -> int:
        """The linear address of the next instruction."""
        return linear_rip(self.special, self.general.rip, self.general.rflags)

    def get(self, number: int) -> bytes:
        """A register's bytes, lowest first."""
        register = REGISTERS[number]
        if register.name in _LEGACY:
            at, size = _LEGACY[register.name]
            return bytes(self._floats[at : at + size]).ljust(register.size, b"\0")
        return self._value(number, register).to_bytes(register.size, "little")

    def _value(self, number: int, register: Register) -> int:
        name = register.name
        if number == RIP:
            return self.pc
        if name == "ftag":
            return self._full_tag()
        if register.group == "general":
            return int(getattr(self.general, _NAMES.get(name, name))) & (1 << register.bits) - 1
        if register.group == "selector":
            return int(getattr(self.special, name).selector)
        if register.group in ("base", "table"):
            owner, _, part = name.partition("_")
            return int(getattr(getattr(self.special, owner), part))
        return int(getattr(self.special, name))

    def set(self, number: int, data: bytes) -> None:
        """Change a register; ConfigError for a value that it cannot have."""
        register = REGISTERS[number]
        if len(data) != register.size:
            raise ConfigError(f"{register.name} has {register.size} bytes, not {len(data)}")
        if data == self.get(number):
            return
        name, value = register.name, int.from_bytes(data, "little")
        if name in _LEGACY:
            at, size = _LEGACY[name]
            self._floats[at : at + size] = data[:size]
            self._float_changed = True
        elif name == "ftag":
            tags = (value >> 2 * n & 3 for n in range(8))
            self._floats[_TAG] = sum((tag != 3) << n for n, tag in enumerate(tags))
            self._float_changed = True
        elif number == RIP:
            self.general.rip = instruction_pointer(self.special, value, self.general.rflags)
        elif register.group == "general":
            setattr(self.general, _NAMES.get(name, name), value)
        elif register.group == "selector":
            self._load(name, value & 0xFFFF)
        elif register.group in ("base", "table"):
            owner, _, part = name.partition("_")
            setattr(getattr(self.special, owner), part, value & (0xFFFF if part == "limit" else -1))
        else:
            setattr(self.special, name, value)

    def _load(self, name: str, selector: int) -> None:
        """Load a segment register as the mode would have it."""
        if not self.special.cr0 & CR0.PE:
            segment = getattr(self.special, name)
            segment.selector, segment.base = selector, selector << 4
        elif not selector & ~3:
            setattr(self.special, name, Segment(selector=selector))
        else:
            found = look_up(self._read, self.special, selector)
            if found.segment is None or found.problem:
                raise ConfigError(f"{name} = {selector:#x}: {found.problem or found.kind}")
            setattr(self.special, name, found.segment)

    def _full_tag(self) -> int:
        """FTW from its abridged form (SDM Vol.1 10.5.1.1): 0 valid, 1 zero, 2 special, 3 empty."""
        area = self._floats
        top = area[3] >> 3 & 7
        tags = 0
        for number in range(8):
            tag = 3
            if area[_TAG] >> number & 1:
                at = 32 + 16 * (number - top & 7)
                mantissa = int.from_bytes(area[at : at + 8], "little")
                exponent = int.from_bytes(area[at + 8 : at + 10], "little") & 0x7FFF
                tag = 2 if exponent == 0x7FFF or not mantissa >> 63 else 0
                tag = 1 if not exponent and not mantissa else tag
            tags |= tag << 2 * number
        return tags

    def flush(self) -> None:
        """Write back what was changed. Raises ConfigError for what KVM refuses."""
        general, special = self.general.pack(), self.special.pack()
        if special != self._before[1]:
            self.cpu.set_sregs(self.special)
            self.cpu.get_mp_state()  # has KVM look at what waits in the mapping, and refuse it now
        if general != self._before[0]:
            self.cpu.set_regs(self.general)
        self._before = general, special
        if self._float_changed:
            self._floats[_XSTATE_BV] |= _X87_SSE
            self.cpu.set_xsave(bytes(self._floats))
            self._float_changed = False
