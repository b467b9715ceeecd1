"""A vCPU's general and special registers, without an ioctl where the host permits it.

The registers of the last exit lie in the mapping that KVM and the program share, if the host
has KVM_CAP_SYNC_REGS: reading them costs no system call, and writing them takes effect when
the guest is entered next (KVM API, 5 "The kvm_run structure", kvm_valid_regs).
"""

import errno
import mmap
import struct
import threading
from typing import Any, Final

from kvmpy.errors import ClosedError, ConfigError, HostError
from kvmpy.exits import OFFSET_CR8, OFFSET_DIRTY_REGS, OFFSET_SYNC, OFFSET_VALID_REGS
from kvmpy.vcpustate import VcpuState, wrong_kind
from kvmpy.x86.events import VcpuEvents
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["EVENTS", "REGS", "SREGS", "SYNC_EVENTS", "SYNC_REGS", "SYNC_SREGS", "VcpuRegisters"]

SYNC_REGS: Final = 1  # KVM_SYNC_X86_REGS
SYNC_SREGS: Final = 2  # KVM_SYNC_X86_SREGS
SYNC_EVENTS: Final = 4  # KVM_SYNC_X86_EVENTS
REGS: Final = slice(OFFSET_SYNC, OFFSET_SYNC + Registers.SIZE)
SREGS: Final = slice(REGS.stop, REGS.stop + SpecialRegisters.SIZE)
EVENTS: Final = slice(SREGS.stop, SREGS.stop + VcpuEvents.SIZE)
# In the order in which KVM_RUN takes them.
_WAITING: Final = (
    (SYNC_SREGS, "SET_SREGS", SREGS),
    (SYNC_REGS, "SET_REGS", REGS),
    (SYNC_EVENTS, "SET_VCPU_EVENTS", EVENTS),
)


class VcpuRegisters(VcpuState):
    """The registers, in the mapping or by ioctl."""

    loop: Any
    can_sync = 0
    """The KVM_SYNC_X86_* bits that the host supports."""

    def __init__(self, fd: int, what: str) -> None:
        self._run: mmap.mmap | None = None
        super().__init__(fd, what)
        self._runner = 0  # the thread that runs the vCPU, or ran it last
        self.outdated_at = 0
        """How often it had been entered when an ioctl last outdated the mapping."""
        self._written_sregs = b""  # KVM fills the mapping again also when it refuses them

    @property
    def run_page(self) -> mmap.mmap:
        """The mapping shared with KVM: struct kvm_run, port data, the coalesced ring."""
        if self._run is None:
            raise ClosedError(f"{self.what} is closed")
        return self._run

    @property
    def running_here(self) -> bool:
        """Whether the calling thread is running the vCPU: true inside of a device."""
        return bool(self.loop.running) and self._runner == threading.get_ident()

    def finish(self) -> None:
        """Finish the exit at hand (see `VCPU.finish`)."""
        raise NotImplementedError

    def _settle(self, *, writing: bool = False) -> None:
        self._check_mine()
        self.finish()
        self._flush()
        if writing:  # an MSR is EFER or a segment's base, the LAPIC has CR8, and so on
            self.outdated_at = self.loop.entries

    def outdate(self) -> None:
        """What the mapping says of the registers counts no more: somebody wrote others."""
        self.outdated_at = self.loop.entries

    def _check_mine(self) -> None:
        self.run_page  # noqa: B018
        if self.loop.running and self._runner != threading.get_ident():
            raise ConfigError(f"{self.what} is running on another thread: stop it first")

    @property
    def sync_regs(self) -> int:
        """Which registers each exit brings along: 1 general, 2 special (KVM_SYNC_X86_*)."""
        return self.run_page[OFFSET_VALID_REGS]

    @sync_regs.setter
    def sync_regs(self, bits: int) -> None:
        self.run_page[OFFSET_VALID_REGS] = bits & self.can_sync
        self.outdated_at = self.loop.entries  # the last exit brought along what was asked for then

    def _page_with(self, bit: int) -> mmap.mmap | None:
        """The mapping, if it has the current values of a set of registers."""
        page = self.run_page
        if page[OFFSET_DIRTY_REGS] & bit:
            return page
        brought = page[OFFSET_VALID_REGS] & bit and self.loop.entries > self.outdated_at
        return page if brought else None

    def get_regs(self) -> Registers:
        """The general registers, RIP and RFLAGS, as they were at the last exit.

        At an IN or OUT exit, RIP may be on either side of the instruction: `finish` first.
        """
        return Registers.unpack(self.get_packed_regs())

    def get_packed_regs(self) -> bytes:
        """The same as struct kvm_regs."""
        if (page := self._page_with(SYNC_REGS)) is not None:
            return page[REGS]
        buffer = bytearray(Registers.SIZE)
        self.ioctl("GET_REGS", buffer)
        return bytes(buffer)

    def set_regs(self, registers: Registers) -> None:
        """Write the general registers, RIP and RFLAGS, once the exit at hand is finished."""
        try:
            packed = registers.pack()
        except AttributeError:
            raise wrong_kind("set_regs", "Registers", registers) from None
        self._check_mine()
        self.finish()
        try:
            self._write("SET_REGS", SYNC_REGS, REGS, packed)
        except IndexError:  # it packs itself, but to another size
            raise wrong_kind("set_regs", "Registers", registers) from None

    def get_sregs(self) -> SpecialRegisters:
        """Segments, descriptor tables, control registers, EFER and the APIC base."""
        if (page := self._page_with(SYNC_SREGS)) is not None:
            return SpecialRegisters.unpack(page[SREGS])
        buffer = bytearray(SpecialRegisters.SIZE)
        self.ioctl("GET_SREGS", buffer)
        return SpecialRegisters.unpack(buffer)

    def set_sregs(self, registers: SpecialRegisters) -> None:
        """Write the special registers, once the exit at hand is finished.

        Values that KVM refuses are a ConfigError, here or, where the mapping takes them, of
        the next call that enters the guest or asks KVM for other state.
        """
        try:
            packed, cr8 = registers.pack(), registers.cr8
        except AttributeError:
            raise wrong_kind("set_sregs", "SpecialRegisters", registers) from None
        if cr8 > 15:
            raise ConfigError(f"SpecialRegisters: cr8 = {cr8:#x} is not 0 to 0xf")
        self._check_mine()
        self.finish()
        self._keep_cr8(cr8)
        self._written_sregs = packed
        self._write("SET_SREGS", SYNC_SREGS, SREGS, packed)

    def set_packed_sregs(self, packed: bytes) -> None:
        """Write special registers that KVM has given, as they are."""
        if len(packed) != SpecialRegisters.SIZE:
            raise ConfigError(f"struct kvm_sregs has {SpecialRegisters.SIZE} bytes")
        self._check_mine()
        self.finish()
        self._keep_cr8(SpecialRegisters.unpack(packed).cr8)
        self._written_sregs = packed
        self._write("SET_SREGS", SYNC_SREGS, SREGS, packed)

    def begin_with(self, registers: bytes, special: bytes, events: bytes, cr8: int) -> None:
        """Have a new vCPU begin with what KVM has given of another, CR8 as in `special`."""
        page = self.run_page
        page[REGS], page[SREGS], page[EVENTS] = registers, special, events
        page[OFFSET_CR8 : OFFSET_CR8 + 8] = cr8.to_bytes(8, "little")
        page[OFFSET_DIRTY_REGS] = SYNC_REGS | SYNC_SREGS | SYNC_EVENTS
        self._written_sregs = special

    def _write(self, name: str, bit: int, where: slice, packed: bytes) -> None:
        if self.can_sync & bit:
            self.run_page[where] = packed
            self.run_page[OFFSET_DIRTY_REGS] |= bit
        else:
            self._set(name, packed)

    def _set(self, name: str, packed: bytes) -> None:
        try:
            self.ioctl(name, bytearray(packed))
        except HostError as error:
            if name == "SET_SREGS" and error.errno == errno.EINVAL:
                raise self._refusal() from None
            raise

    def _keep_cr8(self, cr8: int) -> None:
        """Without an in-kernel local APIC, KVM_RUN takes CR8 from kvm_run (KVM API, 5, cr8)."""
        struct.pack_into("<Q", self.run_page, OFFSET_CR8, cr8)

    def _refusal(self) -> ConfigError:
        self._keep_cr8(self.get_sregs().cr8)
        sregs = SpecialRegisters.unpack(self._written_sregs)
        return ConfigError(
            f"KVM refuses the special registers that were set: cr0={sregs.cr0:#x} "
            f"cr3={sregs.cr3:#x} cr4={sregs.cr4:#x} efer={sregs.efer:#x}; "
            "see SDM Vol.3 2.5 for what goes together"
        )

    def _flush(self) -> None:
        """Hand registers that wait in the mapping to KVM, for ioctls that look at them."""
        page = self.run_page
        for bit, name, where in _WAITING:
            if page[OFFSET_DIRTY_REGS] & bit:
                page[OFFSET_DIRTY_REGS] &= ~bit
                self.outdated_at = self.loop.entries
                self._set(name, page[where])
