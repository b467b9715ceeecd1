"""The one helper of all structures: a C structure's integer fields as a table."""

import struct
from collections.abc import Iterable
from operator import attrgetter
from typing import TypeAlias

from kvmpy.errors import ConfigError

__all__ = ["Bytes", "Layout", "check_size"]

Bytes: TypeAlias = bytes | bytearray | memoryview
"""What every `unpack` reads from; any other object with the buffer protocol does as well."""


class Layout:
    """The little-endian fields of a C structure, in order, with all padding written out.

    `owner` is the structure's name for messages. `fields` are (name, code) pairs; the code is
    one of the `struct` module's: B, H, I, Q for unsigned integers of 8, 16, 32, 64 bits. A pair
    whose name is empty is padding, such as ("", "3x").
    """

    def __init__(self, owner: str, fields: Iterable[tuple[str, str]]) -> None:
        table = tuple(fields)
        self.owner = owner
        self.fields = tuple((name, code) for name, code in table if name)
        self.struct = struct.Struct("<" + "".join(code for _, code in table))
        self.size = self.struct.size
        self._values = attrgetter(*(name for name, _ in self.fields))
        self.unpack_from = self.struct.unpack_from

    def values_of(self, source: object) -> tuple[int, ...]:
        """Return the attributes of `source` that have the fields' names, in their order."""
        values: tuple[int, ...] = self._values(source)
        return values

    def pack(self, *values: int) -> bytes:
        """Return the structure's bytes.

        Raises ConfigError, which names the field, for a value that does not fit it.
        """
        try:
            return self.struct.pack(*values)
        except struct.error:
            raise self._misfit(values) from None

    def _misfit(self, values: tuple[int, ...]) -> ConfigError:
        for (name, code), value in zip(self.fields, values, strict=True):
            largest = (1 << 8 * struct.calcsize("<" + code)) - 1
            if not isinstance(value, int) or not 0 <= value <= largest:
                shown = f"{value:#x}" if isinstance(value, int) else f"{value!r:.60}"
                return ConfigError(
                    f"{self.owner}: {name} = {shown} is not an integer of 0 to {largest:#x}"
                )
        raise AssertionError("every value fits")  # struct.pack said that one does not


def check_size(owner: str, name: str, value: object, size: int) -> None:
    """Raise ConfigError unless `value` is a bytes-like object of exactly `size` bytes."""
    if not isinstance(value, bytes | bytearray | memoryview) or len(value) != size:
        raise ConfigError(f"{owner}: {name} must be {size} bytes, not {value!r:.60}")
