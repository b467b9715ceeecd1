"""Guest memory: one region of RAM, and the address space that regions make up.

Both are read and written by guest-physical address, and check every access. A region is an
mmap, so that Python refuses to unmap it while somebody holds a view of it.
"""

import bisect
import mmap
import os
from collections.abc import Iterator
from operator import attrgetter, index
from typing import Final

from kvmpy.abi import address_of
from kvmpy.access import PAGE_SIZE, Bytes, GuestAccess
from kvmpy.errors import AddressError, ClosedError, ConfigError, HostError

__all__ = ["MAP_NORESERVE", "PAGE_SIZE", "AddressSpace", "Memory"]

MAP_NORESERVE: Final = 0x4000  # asm-generic/mman.h; in Python's mmap only from 3.13 on
_FLAGS: Final = {
    "anonymous": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
    "shared": mmap.MAP_SHARED,
    "private": mmap.MAP_PRIVATE,
}
_LARGEST: Final = 1 << 43  # KVM's bound on one slot: 2**31 pages


class Memory(GuestAccess):
    """A region of guest RAM of `size` bytes at guest-physical `address`, in the VM's `slot`.

    `backing` is "anonymous"; "shared": a memfd, whose descriptor is `fd` (own or given), so
    that other processes and VMs can map it; or "private": a copy-on-write view of the file
    `fd` from `offset` on, which the guest's writes never reach. `huge` advises huge pages.

    Raises ConfigError for a size or address that is no multiple of 4096 or out of all
    bounds, and HostError where the host cannot map it.
    """

    def __init__(
        self,
        address: int,
        size: int,
        *,
        slot: int = 0,
        readonly: bool = False,
        log_dirty: bool = False,
        backing: str = "anonymous",
        fd: int | None = None,
        offset: int = 0,
        huge: bool = False,
    ) -> None:
        _check_range(address, size)
        self.address, self.size, self.slot = address, size, slot
        self.readonly, self.log_dirty, self.backing = readonly, log_dirty, backing
        self.fd: int | None = None
        self.origin: object = None
        """What kvmpy's own snapshots note: the image that the region was made from or is in."""
        self.written: bytearray | None = None
        """Where `write` marks pages, a bit each, if anybody wants to know."""
        self.in_vm = False
        """Whether a guest has it: then unmapping it would give that guest what is mapped next."""
        self._viewed = self._given = False
        self._mmap = self._map(backing, fd, offset)
        if huge:
            self._advise_huge()

    @property
    def end(self) -> int:
        """The first guest-physical address after the region."""
        return self.address + self.size

    def _map(self, backing: str, fd: int | None, offset: int) -> mmap.mmap:
        flags = _FLAGS.get(backing)
        if flags is None:
            raise ConfigError(f"memory backing {backing!r}: use anonymous, shared or private")
        if backing == "private" and fd is None:
            raise ConfigError("memory backing 'private' needs the descriptor of a file")
        if backing == "anonymous" and fd is not None:
            raise ConfigError("memory backing 'anonymous' takes no file descriptor")
        if fd is not None:
            self._check_file(fd, offset)
        try:
            if backing == "shared":
                self.fd = os.memfd_create("kvmpy") if fd is None else os.dup(fd)
                if fd is None:
                    os.truncate(self.fd, self.size)
            file = self.fd if backing == "shared" else fd
            return mmap.mmap(
                -1 if file is None else file, self.size, flags=flags | MAP_NORESERVE, offset=offset
            )
        except (OSError, ValueError, OverflowError) as error:
            self._close_fd()
            what = f"cannot map {self.size} bytes of guest RAM ({backing})"
            raise _host_error(what, error) from error

    def _check_file(self, fd: int, offset: int) -> None:
        # Touching a page beyond the file's end would kill the process with SIGBUS.
        try:
            file_size = os.fstat(fd).st_size
        except (OSError, OverflowError) as error:
            what = f"cannot back guest RAM with file descriptor {fd}"
            raise _host_error(what, error) from error
        if offset < 0 or file_size < offset + self.size:
            raise ConfigError(
                f"the file has {file_size} bytes; the region needs {self.size} "
                f"from offset {offset} on"
            )

    def _advise_huge(self) -> None:
        try:
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            self.close()
            what = "no huge pages for guest RAM (leave out huge=True)"
            raise _host_error(what, error) from error

    def _offset(self, address: int, length: int) -> int:
        if length < 0:
            raise AddressError(f"a length of {length} bytes at address {address:#x}")
        if not (self.address <= address and address + length <= self.end):
            raise AddressError(
                f"{length} bytes at address {address:#x} lie outside of RAM "
                f"[{self.address:#x}, {self.end:#x})"
            )
        return address - self.address

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes at guest-physical `address`."""
        start = self._offset(address, length)
        return self._open()[start : start + length]

    def write(self, address: int, data: Bytes) -> None:
        """Write `data` at guest-physical `address`; the host may write read-only RAM too."""
        view = memoryview(data).cast("B")
        start = self._offset(address, len(view))
        self._open()[start : start + len(view)] = view
        if self.written is not None and len(view):
            for page in range(start // PAGE_SIZE, (start + len(view) - 1) // PAGE_SIZE + 1):
                self.written[page >> 3] |= 1 << (page & 7)

    def may_have_changed(self) -> bool:
        """Whether a view or the buffer may have been written through since the last call."""
        viewed = self._viewed
        if viewed:
            try:
                self.check_no_views()
            except BufferError:
                return True
            self._viewed = False
        return viewed or self._given

    @property
    def view(self) -> memoryview:
        """A zero-copy, writable memoryview of the whole region, indexed from 0.

        The VM cannot be closed while it, or anything made from it, is alive.
        """
        self._viewed = True
        return memoryview(self._open())

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping itself."""
        self._given = True
        return self._open()

    @property
    def mapping(self) -> mmap.mmap:
        """The mapping, for those of kvmpy's own who mark in `written` what they write."""
        return self._open()

    @property
    def host_address(self) -> int:
        """Where the region lies in this process."""
        return address_of(self._open())

    def _open(self) -> mmap.mmap:
        if self._mmap.closed:
            raise ClosedError(f"the RAM at {self.address:#x} is closed")
        return self._mmap

    def check_no_views(self) -> None:
        """Raise BufferError while a view of the region is alive."""
        if self._mmap.closed:
            return
        try:
            # Refuses live views before it looks at the size, and then refuses the size: the
            # one call that says whether close() would work and never does anything.
            self._mmap.resize(-1)
        except BufferError:
            raise BufferError(
                f"the RAM at {self.address:#x} has live views: release them before closing"
            ) from None
        except ValueError:
            pass

    def close(self) -> None:
        """Unmap the region; BufferError, with nothing done, while a view of it is alive.

        Raises ConfigError for a region that is in a VM.
        """
        if self.in_vm:
            raise ConfigError(f"{self!r} is a guest's RAM: vm.remove_memory takes it away from it")
        self.check_no_views()
        self._mmap.close()
        self._close_fd()

    def abandon(self) -> None:
        """Unmap the region as soon as the last view of it is gone."""
        self._close_fd()
        try:
            self._mmap.close()
        except BufferError:
            self._mmap = mmap.mmap(-1, PAGE_SIZE)
            self._mmap.close()

    def _close_fd(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __repr__(self) -> str:
        return f"<Memory [{self.address:#x}, {self.end:#x}) slot {self.slot} {self.backing}>"


def _host_error(what: str, error: Exception) -> HostError:
    reason = getattr(error, "strerror", None) or str(error)
    return HostError(f"{what}: {reason}", getattr(error, "errno", 0) or 0)


def _check_range(address: int, size: int) -> None:
    index(address), index(size)
    if size <= 0 or size % PAGE_SIZE:
        raise ConfigError(f"a memory size of {size} bytes: give a positive multiple of 4096")
    if address < 0 or address % PAGE_SIZE:
        raise ConfigError(f"memory at address {address:#x}: give a multiple of 4096")
    if size > _LARGEST:
        raise ConfigError(f"a memory size of {size} bytes: one region holds at most {_LARGEST}")
    if address + size > 1 << 52:
        raise ConfigError(f"memory at [{address:#x}, {address + size:#x}) ends above 2**52")


class AddressSpace(GuestAccess):
    """All RAM of a VM by guest-physical address; accesses may span adjacent regions."""

    def __init__(self) -> None:
        self._regions: list[Memory] = []
        self.closed = False
        """Whether its VM was closed."""

    def __iter__(self) -> Iterator[Memory]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)

    def check_open(self) -> None:
        """Raise ClosedError where the VM was closed."""
        if self.closed:
            raise ClosedError("the RAM is closed, with its VM")

    def overlapping(self, address: int, size: int) -> Memory | None:
        """The first region that shares an address with [address, address + size)."""
        for region in self._regions:
            if region.address < address + size and address < region.end:
                return region
        return None

    def add(self, region: Memory) -> None:
        """Take a region in; the caller has checked that it overlaps no other."""
        bisect.insort(self._regions, region, key=attrgetter("address"))

    def remove(self, region: Memory) -> None:
        """Leave a region out again."""
        self._regions.remove(region)

    def _pieces(self, address: int, length: int) -> list[tuple[Memory, int, int]]:
        """(region, address, length) of each region that the range touches, without a gap."""
        if length < 0:
            raise AddressError(f"a length of {length} bytes at address {address:#x}")
        pieces, at, left = [], address, length
        for region in self._regions:
            if left and region.address <= at < region.end:
                step = min(left, region.end - at)
                pieces.append((region, at, step))
                at, left = at + step, left - step
        if left:
            self.check_open()
            index(address)  # a float is refused as what it is
            ram = ", ".join(f"[{region.address:#x}, {region.end:#x})" for region in self._regions)
            raise AddressError(
                f"{length} bytes at address {address:#x} lie outside of RAM {ram or '(none)'}"
            )
        return pieces

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes at guest-physical `address`."""
        return b"".join(region.read(at, step) for region, at, step in self._pieces(address, length))

    def write(self, address: int, data: Bytes) -> None:
        """Write `data` at guest-physical `address`."""
        view = memoryview(data).cast("B")
        for region, at, step in self._pieces(address, len(view)):
            region.write(at, bytes(view[at - address : at - address + step]))

    @property
    def view(self) -> memoryview:
        """A zero-copy memoryview of the region at address 0, so that index equals address.

        Raises AddressError where there is none; each region has a `view` of its own.
        """
        self.check_open()
        if not self._regions or self._regions[0].address:
            raise AddressError("there is no RAM at address 0: use the view of a region")
        return self._regions[0].view
