"""The snapshot file, byte by byte: header and named values (docs/snapshot-format.md).

Nothing in here trusts what it reads: whatever the bytes, it is a value or a SnapshotError.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvmpy.errors import SnapshotError
from kvmpy.memory import PAGE_SIZE

__all__ = [
    "COMPRESSIONS",
    "MOST_BYTES",
    "Bytes",
    "Header",
    "digest",
    "pack_values",
    "unpack_values",
]

MAGIC: Final = b"kvmpysnapshot\r\n\x1a"
VERSION: Final = 1
COMPRESSIONS: Final = (None, "zstd")
_DIGEST: Final = 32
MOST_BYTES: Final = 256 << 20  # of values, and of tables: a crafted file must not take for ever
Bytes: TypeAlias = bytes | bytearray | memoryview

_HEADER = struct.Struct("<16sIIQ QQ32s QQ32s")
_NAMED = struct.Struct("<II")


def digest(*data: Bytes) -> bytes:
    """The checksum of all that is in a snapshot file: SHA-256."""
    made = hashlib.sha256()
    for piece in data:
        made.update(piece)
    return made.digest()


@dataclass(frozen=True, slots=True)
class Header:
    """The first page of the file. Offsets and sizes are in bytes from its beginning."""

    compress: str | None
    file_size: int
    values_offset: int
    values_size: int
    values_digest: bytes
    tables_offset: int
    tables_size: int
    tables_digest: bytes

    SIZE = PAGE_SIZE

    def pack(self) -> bytes:
        """One page: the fields, their checksum, and zeros."""
        fields = _HEADER.pack(
            MAGIC,
            VERSION,
            COMPRESSIONS.index(self.compress),
            self.file_size,
            self.values_offset,
            self.values_size,
            self.values_digest,
            self.tables_offset,
            self.tables_size,
            self.tables_digest,
        )
        return (fields + digest(fields)).ljust(self.SIZE, b"\0")

    @classmethod
    def unpack(cls, page: bytes, file_size: int) -> "Header":
        """Read it; SnapshotError says what it is if it is none, or not of a file of that size."""
        if page[: len(MAGIC)] != MAGIC:
            raise SnapshotError("is no snapshot: it does not begin like one")
        if len(page) < cls.SIZE:
            raise SnapshotError(f"is cut off: {len(page)} bytes are left of it")
        _, version, compress, size, *places = _HEADER.unpack_from(page)
        if version != VERSION:
            raise SnapshotError(
                f"has format version {version}, and this kvmpy reads version {VERSION}: "
                "save it again with the kvmpy that wrote it, or load it there"
            )
        end = _HEADER.size + _DIGEST
        if digest(page[: _HEADER.size]) != page[_HEADER.size : end] or any(page[end:]):
            raise SnapshotError("was altered: its header does not match the header's checksum")
        if size != file_size:
            verb = "is cut off" if file_size < size else "was altered"
            raise SnapshotError(f"{verb}: it has {file_size} bytes and should have {size}")
        if compress >= len(COMPRESSIONS):
            raise SnapshotError(f"has compression {compress}, which this kvmpy does not know")
        made = cls(COMPRESSIONS[compress], size, *places)
        if (
            made.values_offset < cls.SIZE
            or made.tables_offset != made.values_offset + made.values_size
            or size != made.tables_offset + made.tables_size
            or max(made.values_size, made.tables_size) > MOST_BYTES
        ):
            raise SnapshotError("is malformed: its parts are not where they must be")
        return made


# Named values -------------------------------------------------------------------------------


def pack_values(values: Mapping[str, bytes]) -> bytes:
    """Byte strings by name, one after another."""
    made = bytearray()
    for name, data in values.items():
        encoded = name.encode()
        made += _NAMED.pack(len(encoded), len(data)) + encoded + data
    return bytes(made)


def unpack_values(data: Bytes) -> dict[str, bytes]:
    """The same back."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        if at + _NAMED.size > len(data):
            raise SnapshotError("is malformed: a value is cut off")
        name_size, size = _NAMED.unpack_from(data, at)
        start = at + _NAMED.size + name_size
        at = start + size
        if at > len(data):
            raise SnapshotError("is malformed: a value is longer than all of them")
        try:
            name = bytes(data[start - name_size : start]).decode()
        except UnicodeDecodeError:
            raise SnapshotError("is malformed: a value's name is no text") from None
        if name in found:
            raise SnapshotError(f"is malformed: the value {name!r} is there twice")
        found[name] = bytes(data[start:at])
    return found
