"""Breakpoints and watchpoints: which there are, and how they are in the guest while it runs.

While the guest is stopped, its memory is its own. `arm` puts breakpoints there, `disarm` takes
them back. A software breakpoint is int3. Where KVM does not report it to the host, it still ends
KVM_RUN in ring 0, with an instruction that KVM cannot emulate; in real mode, where it would not,
HLT takes its place; and for ring 3 there are `traps`.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from kvmpy.errors import AddressError, ConfigError, UnsupportedError
from kvmpy.gdb.host import Host
from kvmpy.gdb.memory import GuestMemory
from kvmpy.gdb.traps import BREAKPOINT, EXCEPTION_VECTORS, INVALID_OPCODE, Trap, traps
from kvmpy.modes import Layout
from kvmpy.vcpu import VCPU
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import cpl_of
from kvmpy.x86.flags import CR0
from kvmpy.x86.state import SpecialRegisters

__all__ = ["HLT", "INT3", "Breakpoints", "Patch"]

INT3, HLT = b"\xcc", b"\xf4"
SOFTWARE, HARDWARE, WRITE, READ, ACCESS = range(5)
"""The types of the packets Z and z."""
_MOST: Final = 4096
_EXCEPTION_GATES: Final = 16 * len(EXCEPTION_VECTORS)
_REASONS: Final = {WRITE: "watch", READ: "rwatch", ACCESS: "awatch"}


class Patch(NamedTuple):
    """Bytes of the guest's that are replaced while it runs, at physical `address`."""

    address: int
    original: bytes
    written: bytes


class Breakpoints:
    """The breakpoints of one machine."""

    def __init__(self, memory: GuestMemory, layout: Layout, host: Host, irqchip: bool) -> None:
        self.memory, self.layout, self.host = memory, layout, host
        self.irqchip = irqchip
        self.software: set[int] = set()
        self.hardware: dict[tuple[int, int], int] = {}
        """Length by type and linear address, in the order in which debug registers get them."""
        self._found: tuple[tuple[object, ...], list[Trap]] | None = None
        self.patches: list[Patch] = []
        self.planted: dict[int, bytes] = {}
        """What stands in for each software breakpoint, by linear address, while armed."""
        self.handlers: dict[int, tuple[int, ...]] = {}
        """The vectors whose handler begins at a linear address, while armed."""

    # The packets Z and z ----------------------------------------------------------------------

    def insert(self, kind: int, address: int, size: int, special: SpecialRegisters) -> None:
        """Take a breakpoint in; again: nothing.

        Raises UnsupportedError for one that the host's KVM does not have here, AddressError where
        there is no memory, ConfigError for a length or number of them that x86 does not have.
        """
        if kind == SOFTWARE and not self._by_register(special):
            if self.memory.locate(special, address) is None:
                raise AddressError(f"no RAM at {address:#x}")
            if len(self.software) >= _MOST:
                raise ConfigError(f"there are {_MOST} breakpoints already")
            self.software.add(address)
            return
        self._check_hardware(kind, address, size, special)
        if (kind, address) not in self.hardware and len(self.hardware) == 4:
            raise ConfigError("x86 has 4 debug registers, and all are taken")
        self.hardware[kind, address] = size

    def _by_register(self, special: SpecialRegisters) -> bool:
        """Whether a software breakpoint needs a debug register: HLT would wait in the kernel."""
        return self.irqchip and not self.host.int3 and not special.cr0 & CR0.PE

    def _check_hardware(
        self, kind: int, address: int, size: int, special: SpecialRegisters
    ) -> None:
        if kind in (SOFTWARE, HARDWARE):
            native = cpl_of(special) == 3 and special.cs.l
            if not (self.host.hardware_ring3 if native else self.host.hardware):
                where = "64-bit ring 3" if native else "ring 0"
                raise UnsupportedError(
                    f"this KVM has no hardware breakpoints in {where}: use break"
                )
            return
        if not self.host.watch:
            raise UnsupportedError("this KVM has no watchpoints")
        if size not in (1, 2, 4, 8) or address % size:
            raise ConfigError(
                f"{size} bytes at {address:#x}: a watchpoint is of 1, 2, 4 or 8, aligned"
            )

    def remove(self, kind: int, address: int) -> None:
        """Take a breakpoint out; one that is not there: nothing."""
        if kind == SOFTWARE:
            self.software.discard(address)
        self.hardware.pop((kind, address), None)

    def clear(self) -> None:
        """Take all out."""
        self.software.clear()
        self.hardware.clear()

    def at(self, pc: int) -> bool:
        """Whether an instruction at that linear address would not be reached without a stop."""
        return pc in self.software or any(
            address == pc and kind <= HARDWARE for kind, address in self.hardware
        )

    # In the guest -----------------------------------------------------------------------------

    def arm(
        self, cpus: Iterable[VCPU], lifted: int | None = None, *, stepping: bool = False
    ) -> None:
        """Put software breakpoints, but not that at `lifted`, and traps in the guest's memory.

        With `stepping`, RFLAGS.TF is about to be used.
        """
        for cpu in cpus:
            special = cpu.get_sregs()
            for linear in sorted(self.software):
                if linear != lifted and linear not in self.planted:
                    real = not special.cr0 & CR0.PE and not self.host.int3
                    self._plant(special, linear, HLT if real else INT3)
            self._arm_traps(special, stepping)

    def _arm_traps(self, special: SpecialRegisters, stepping: bool) -> None:
        vectors: tuple[int, ...] = ()
        if self.software and not self.host.int3_ring3:
            vectors += (BREAKPOINT, INVALID_OPCODE)
        if stepping:  # DEBUG is what ends the step, unless another exception does
            vectors = EXCEPTION_VECTORS
        for trap in self._traps(special, vectors) if vectors else ():
            known = self.handlers.get(trap.handler)
            if known is None and trap.handler not in self.planted:
                self._put(special, trap.handler, INT3)
            if known is None or trap.vector not in known:
                self.handlers[trap.handler] = (*(known or ()), trap.vector)
            if trap.entry:
                self._put(special, trap.gate, trap.entry)

    def _traps(self, special: SpecialRegisters, vectors: tuple[int, ...]) -> list[Trap]:
        """Those for an IDT, found anew only if it is another one: a step is no time for that."""
        idt, gdt, read = special.idt, special.gdt, self.memory.read_ram
        entries = read_linear(read, special, idt.base, min(idt.limit + 1, _EXCEPTION_GATES))
        key = (vectors, entries, idt.base, idt.limit, gdt.base, gdt.limit, special.cr0, special.cr3)
        if self._found is None or self._found[0] != key:
            self._found = key, list(traps(read, special, self.layout, vectors))
        return self._found[1]

    def _plant(self, special: SpecialRegisters, linear: int, code: bytes) -> None:
        if self._put(special, linear, code):
            self.planted[linear] = code

    def _put(self, special: SpecialRegisters, linear: int, data: bytes) -> bool:
        """Replace bytes; page by page, for they may cross into another one."""
        before, self.memory.physical = self.memory.physical, False
        try:
            places = [self.memory.locate(special, linear + at) for at in range(len(data))]
        finally:
            self.memory.physical = before
        if None in places:
            return False
        for place, byte in zip(places, data, strict=True):
            assert place is not None
            original = self.memory.ram.read(place, 1)
            self.memory.ram.write(place, bytes((byte,)))
            self.patches.append(Patch(place, original, bytes((byte,))))
        return True

    def disarm(self) -> None:
        """Give the guest its memory back, but for what it has overwritten meanwhile."""
        while self.patches:
            patch = self.patches.pop()
            if self.memory.ram.read(patch.address, 1) == patch.written:
                self.memory.ram.write(patch.address, patch.original)
        self.planted.clear()
        self.handlers.clear()

    def registers(self, lifted: int | None = None) -> dict[int, str]:
        """What is for the debug registers: "x", "w4" and so on by linear address."""
        points = {}
        for (kind, address), size in self.hardware.items():
            if kind > HARDWARE:
                points[address] = f"{'w' if kind == WRITE else 'rw'}{size}"
            elif address != lifted:
                points[address] = "x"
        return points

    def reason(self, address: int) -> str:
        """Which kind of watchpoint is at that address: "watch", "rwatch" or "awatch"."""
        kinds = [kind for kind, there in self.hardware if there == address and kind in _REASONS]
        return _REASONS[kinds[0]] if kinds else "hwbreak"
