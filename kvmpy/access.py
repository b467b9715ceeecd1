"""Typed access to guest memory by guest-physical address, whatever the memory is made of."""

from operator import index
from typing import Final, TypeAlias

from kvmpy.errors import AddressError, ConfigError

__all__ = ["PAGE_SIZE", "Bytes", "GuestAccess"]

PAGE_SIZE: Final = 4096

Bytes: TypeAlias = bytes | bytearray | memoryview


class GuestAccess:
    """Typed access by guest-physical address, on top of `read` and `write`."""

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes at `address`; AddressError where there is no RAM."""
        raise NotImplementedError

    def write(self, address: int, data: Bytes) -> None:
        """Write all of `data` at `address`; AddressError, with nothing written, where it
        does not fit into RAM."""
        raise NotImplementedError

    def read_u8(self, address: int) -> int:
        """The byte at `address`."""
        return self.read(address, 1)[0]

    def read_u16(self, address: int) -> int:
        """The little-endian integer of 2 bytes at `address`."""
        return int.from_bytes(self.read(address, 2), "little")

    def read_u32(self, address: int) -> int:
        """The little-endian integer of 4 bytes at `address`."""
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        """The little-endian integer of 8 bytes at `address`."""
        return int.from_bytes(self.read(address, 8), "little")

    def _write_integer(self, address: int, value: int, size: int) -> None:
        try:
            number = index(value)  # numpy's integers have no to_bytes()
        except TypeError:
            raise ConfigError(f"{value!r:.80} is no integer to write to memory") from None
        if not 0 <= number < 1 << 8 * size:
            raise ConfigError(f"{number:#x} does not fit {size} byte(s) of memory at {address:#x}")
        self.write(address, number.to_bytes(size, "little"))

    def write_u8(self, address: int, value: int) -> None:
        """Write one byte; ConfigError for a value outside of 0 to 0xff."""
        self._write_integer(address, value, 1)

    def write_u16(self, address: int, value: int) -> None:
        """Write 2 bytes, little-endian; ConfigError for a value that does not fit."""
        self._write_integer(address, value, 2)

    def write_u32(self, address: int, value: int) -> None:
        """Write 4 bytes, little-endian; ConfigError for a value that does not fit."""
        self._write_integer(address, value, 4)

    def write_u64(self, address: int, value: int) -> None:
        """Write 8 bytes, little-endian; ConfigError for a value that does not fit."""
        self._write_integer(address, value, 8)

    def read_string(self, address: int, limit: int = 4096) -> bytes:
        """The bytes at `address` up to a NUL, which is left out.

        Raises AddressError where there is no NUL within `limit` bytes or before RAM ends.
        """
        found = bytearray()
        while len(found) < limit:
            position = address + len(found)
            step = min(limit - len(found), PAGE_SIZE - position % PAGE_SIZE)
            chunk, nul, _ = self.read(position, step).partition(b"\0")
            found += chunk
            if nul:
                return bytes(found)
        raise AddressError(f"no NUL within {limit} bytes from address {address:#x}")

    def __getitem__(self, key: int | slice) -> int | bytes:
        """`ram[a]` is a byte as an integer, `ram[a:b]` the bytes of guest addresses a to b."""
        if isinstance(key, slice):
            start, stop = _bounds(key)
            return self.read(start, stop - start)
        return self.read_u8(key)

    def __setitem__(self, key: int | slice, value: int | Bytes) -> None:
        if isinstance(key, slice):
            start, stop = _bounds(key)
            if hasattr(value, "__index__") or memoryview(value).nbytes != stop - start:
                raise ConfigError(f"addresses {start:#x} to {stop:#x} take {stop - start} bytes")
            self.write(start, value)
        elif hasattr(value, "__index__"):
            self.write_u8(key, index(value))
        else:
            raise ConfigError(f"address {key:#x} takes one byte as an integer")


def _bounds(key: slice) -> tuple[int, int]:
    if key.start is None or key.stop is None or key.step not in (None, 1):
        raise AddressError("a slice of guest memory is [first address:end address]")
    if key.stop < key.start:
        raise AddressError(f"address {key.stop:#x} ends a slice that starts at {key.start:#x}")
    return key.start, key.stop
