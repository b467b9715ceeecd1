"""A virtual machine's descriptor: its memory slots, vCPUs, clock and statistics."""

import mmap
import os
import struct
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Final, NamedTuple

from kvmpy.abi import address_of, pack
from kvmpy.errors import ConfigError, HostError, OverlapError, UnsupportedError
from kvmpy.interrupts import InterruptController
from kvmpy.memory import PAGE_SIZE, AddressSpace, Memory
from kvmpy.stats import Stats
from kvmpy.vcpu import VCPU
from kvmpy.x86.state import ClockData

__all__ = ["IDENTITY_MAP_ADDRESS", "SPARE_PAGE", "TSS_ADDRESS", "VM", "Facts"]

# Intel's VMX without "unrestricted guest" keeps four pages of its own in guest-physical
# memory: out of the way of RAM, below the firmware's place (KVM API, 4.36 and 4.40).
IDENTITY_MAP_ADDRESS: Final = 0xFFFBC000
TSS_ADDRESS: Final = 0xFFFBD000

# RAM of a memory slot that comes and goes without a guest's running: one page for all.
SPARE_PAGE: Final = mmap.mmap(-1, PAGE_SIZE)

_LOG_DIRTY, _READONLY = 1, 2  # KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY


class Facts(NamedTuple):
    """What every VM of this host's is like, as its capabilities say."""

    vcpu_mmap_size: int
    sync_regs: int
    ring_page: int
    xsave_size: int


class VM(InterruptController):
    """One VM, made by `KVM.create_vm()`. Closing it closes its vCPUs and unmaps its RAM.

    It owns the descriptor `fd` from the start, also if its construction fails.
    `memory` is all of its RAM by guest-physical address; `vcpus` are its vCPUs, in order.
    """

    def __init__(self, fd: int, vcpu_mmap_size: int | Facts) -> None:
        # First what closing needs: a signal handler may raise anywhere.
        self._whole, self._process = threading.RLock(), os.getpid()
        self.memory = AddressSpace()
        self.vcpus: list[VCPU] = []
        super().__init__(fd, "the VM")
        self.logs_for_reset = False
        """Whether the dirty log is kvmpy's own (see `snapshot.reset`)."""
        self.for_vmx = False
        """Whether it has the addresses that only VMX needs."""
        if isinstance(vcpu_mmap_size, Facts):  # somebody has found them out, and made the VM
            self.facts = vcpu_mmap_size
            return
        self.facts = Facts(
            vcpu_mmap_size,
            self.check_extension("SYNC_REGS"),
            self.check_extension("COALESCED_MMIO"),
            self.check_extension("XSAVE2"),
        )
        try:
            self.set_identity_map_addr(IDENTITY_MAP_ADDRESS)
            self.set_tss_addr(TSS_ADDRESS)
            self.for_vmx = True
        except UnsupportedError:
            pass  # and where VMX is, they exist
        except BaseException:
            self.close()
            raise

    def set_tss_addr(self, address: int) -> None:
        """Where VMX may keep three pages for itself; set by default (KVM_SET_TSS_ADDR)."""
        self.ioctl("SET_TSS_ADDR", address)

    def set_identity_map_addr(self, address: int) -> None:
        """Where VMX may keep one page for itself; set by default, before the first vCPU."""
        self.ioctl("SET_IDENTITY_MAP_ADDR", pack("SET_IDENTITY_MAP_ADDR", "<Q", address))

    # Memory -------------------------------------------------------------------------------

    def add_memory(
        self,
        address: int,
        size: int,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        backing: str = "anonymous",
        fd: int | None = None,
        offset: int = 0,
        huge: bool = False,
    ) -> Memory:
        """Give the guest `size` bytes of RAM at guest-physical `address`.

        `readonly`: the guest's writes become MMIO exits. `log_dirty`: KVM notes the pages
        that the guest writes (`get_dirty_log`). See `Memory` for backing, fd, offset, huge.
        Raises OverlapError, naming both, where there is RAM already.
        """
        options = {"readonly": readonly, "log_dirty": log_dirty, "huge": huge}
        with self.whole:  # a free slot and place stay free until they are taken
            other = self.memory.overlapping(address, size)
            if other is not None:
                raise OverlapError(
                    f"memory [{address:#x}, {address + size:#x}) overlaps the slot at "
                    f"[{other.address:#x}, {other.end:#x})"
                )
            slot = self._free_slot()
            self.fd  # noqa: B018 - refuse a closed VM before anything is mapped
            region = Memory(
                address, size, slot=slot, backing=backing, fd=fd, offset=offset, **options
            )
            self.adopt_memory(region)
        return region

    def adopt_memory(self, region: Memory) -> None:
        """Give the guest a region that was made already, in a slot that is free."""
        with self.whole:
            try:
                self._set_slot(region, region.size)
            except BaseException:
                region.close()
                raise
            self.memory.add(region)
            region.in_vm = True

    def remove_memory(self, region: Memory) -> None:
        """Take a region away from the guest and unmap it; BufferError while it has views.

        Waits while another thread saves or restores the VM, and raises ConfigError while
        `kvmpy.runs` is at a run of it.
        """
        with self.whole:
            self._check_mine(region)
            region.check_no_views()
            # A loop over inputs says that it begins, and then looks whether it has all its RAM:
            # here it is the other way round, so that at least one of both sees the other.
            self.memory.remove(region)
            try:
                if any(cpu.loop.batch for cpu in self.vcpus):
                    raise ConfigError(f"{region!r} is in use by kvmpy.runs: wait for an outcome")
                self._set_slot(region, 0)
            except BaseException:
                self.memory.add(region)
                raise
            region.in_vm = False
            region.close()

    def set_log_dirty(self, region: Memory, on: bool) -> None:
        """Start or stop noting the pages of a region that the guest writes."""
        self._check_mine(region)
        before, region.log_dirty = region.log_dirty, on
        try:
            self._set_slot(region, region.size)
        except BaseException:
            region.log_dirty = before
            raise

    def _check_mine(self, region: Memory) -> None:
        # Another region's slot may be a larger one here, whose bitmap is larger, too.
        if region not in list(self.memory):
            raise ConfigError(f"{region!r} is not part of this VM")

    def _free_slot(self) -> int:
        used = {region.slot for region in self.memory}
        return next(slot for slot in range(len(used) + 1) if slot not in used)

    def _set_slot(self, region: Memory, size: int) -> None:
        flags = region.log_dirty * _LOG_DIRTY | region.readonly * _READONLY
        packed = struct.pack(
            "<IIQQQ", region.slot, flags, region.address, size, region.host_address
        )
        self.ioctl("SET_USER_MEMORY_REGION", bytearray(packed), f"for {region!r}")

    def get_dirty_log(self, region: Memory) -> bytes:
        """A bit for each 4 KiB page written since the last call, lowest page first.

        The kernel clears its own bits at the same time, unless manual protection
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) is enabled.
        """
        self._check_mine(region)
        bitmap = bytearray((region.size // PAGE_SIZE + 63) // 64 * 8)
        request = bytearray(struct.pack("<IIQ", region.slot, 0, address_of(bitmap)))
        self.ioctl("GET_DIRTY_LOG", request, "add the memory with log_dirty=True")
        return bytes(bitmap)

    def clear_dirty_log(
        self, region: Memory, bitmap: bytes, first_page: int = 0, pages: int | None = None
    ) -> None:
        """Clear the pages of `bitmap` and watch them again.

        It goes with manual protection: without, `get_dirty_log` has cleared them already.
        """
        self._check_mine(region)
        count = region.size // PAGE_SIZE - first_page if pages is None else pages
        if first_page < 0 or count < 0 or len(bitmap) * 8 < count:
            raise ConfigError(f"a bitmap of {len(bitmap)} bytes does not hold {count} pages")
        data = bytearray(bitmap.ljust((count + 63) // 64 * 8, b"\0"))  # KVM reads whole words
        numbers = (region.slot, count, first_page, address_of(data))
        request = pack("CLEAR_DIRTY_LOG", "<IIQQ", *numbers)
        hint = "add the memory with log_dirty=True; first_page is a multiple of 64, and so is "
        self.ioctl("CLEAR_DIRTY_LOG", request, hint + "pages, but for the last of the region")

    def spare_slot(self) -> tuple[int, int]:
        """The number of a slot that is free, and an address that no RAM is at."""
        end = max((region.end for region in self.memory), default=0)
        return self._free_slot(), end

    def drop_mappings(self) -> None:
        """Have KVM forget what it has derived from the guest's page tables.

        With shadow paging, and in a processor's TLB, that stays when the host writes page tables
        without the guest: deleting any memory slot ends it (KVM API, 4.35).
        """
        slot, address = self.spare_slot()
        add, delete = (
            struct.pack("<IIQQQ", slot, 0, address, size, address_of(SPARE_PAGE))
            for size in (PAGE_SIZE, 0)
        )
        try:
            self.ioctl("SET_USER_MEMORY_REGION", bytearray(add))
        except BaseException:  # a signal handler's may come after the call
            with suppress(HostError):
                self.ioctl("SET_USER_MEMORY_REGION", bytearray(delete))
            raise
        self.ioctl("SET_USER_MEMORY_REGION", bytearray(delete))

    # vCPUs, clock, statistics -------------------------------------------------------------

    def create_vcpu(self, index: int | None = None) -> VCPU:
        """A new vCPU; its id is `index`, by default the number of those there are."""
        with self.whole:
            number = len(self.vcpus) if index is None else index
            hint = "a vCPU's id must be new and below KVM's maximum"
            return self.adopt_vcpu(self.ioctl("CREATE_VCPU", number, hint), number)

    def adopt_vcpu(self, fd: int, index: int) -> VCPU:
        """A vCPU that was made already; `fd` is then its own."""
        vcpu = VCPU(
            fd,
            index,
            self.facts.vcpu_mmap_size,
            sync_regs=self.facts.sync_regs,
            ring_page=self.facts.ring_page,
            xsave_size=self.facts.xsave_size,
        )
        self.vcpus.append(vcpu)
        return vcpu

    def get_clock(self) -> ClockData:
        """The VM's kvmclock in nanoseconds, with flags (KVM_GET_CLOCK)."""
        buffer = bytearray(ClockData.SIZE)
        self.ioctl("GET_CLOCK", buffer)
        return ClockData.unpack(buffer)

    def set_clock(self, clock: ClockData) -> None:
        """Set the VM's kvmclock (KVM_SET_CLOCK)."""
        self.ioctl("SET_CLOCK", bytearray(clock.pack()))

    def stats(self) -> Stats:
        """The VM's statistics descriptor; the caller closes it."""
        return Stats(self.fd, self.what)

    # Closing ------------------------------------------------------------------------------

    @property
    def whole(self) -> AbstractContextManager[object]:
        """For `with`, while all of the VM is saved, restored or closed: C then has its addresses.

        Other threads wait.
        """
        # In the child of a fork, the thread that holds the lock may not exist.
        return self._whole if self._process == os.getpid() else nullcontext()

    def close(self) -> None:
        """Close the vCPUs and the VM, unmap the RAM; again: nothing.

        Raises BufferError while a view of the RAM is alive, and ConfigError while a vCPU
        runs; nothing is closed then. Waits while another thread saves or restores the VM.
        """
        self._close(abandon=False)

    def _close(self, *, abandon: bool) -> None:
        with self.whole:
            for region in () if abandon else self.memory:
                region.check_no_views()
            held = []
            try:
                for vcpu in self.vcpus:  # all of them, or none is closed
                    vcpu.hold()
                    held.append(vcpu)
            except BaseException:
                for vcpu in held:
                    vcpu.release()
                raise
            for vcpu in self.vcpus:
                vcpu.close()
            super().close()
            for region in list(self.memory):
                region.in_vm = False
                if abandon:
                    region.abandon()
                else:
                    region.close()
                self.memory.remove(region)
            self.memory.closed = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # With an exception under way, frames in its traceback may hold views: close all but
        # those mappings, which go when the views go, and let the exception through.
        if error is None:
            self.close()
            return
        try:
            self._close(abandon=True)
        except ConfigError as running:  # on another thread, which needs what would be closed
            error.add_note(f"not closed: {running}")

    def _dispose(self) -> None:
        self._close(abandon=True)
