"""A snapshot's file, open for reading and checked.

A file is not trusted. What says where things are is checked when it is opened; pages are checked
as `verify` says, and those that are expanded always.
"""

import errno
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvmpy.abi import host_error
from kvmpy.errors import ConfigError, KvmpyError, SnapshotError
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot.config import Saved
from kvmpy.snapshot.image import Image, data_pages, mark, set_bits
from kvmpy.snapshot.layout import Header, digest, unpack_values
from kvmpy.snapshot.ram import expanded, mapped
from kvmpy.snapshot.regions import RegionTable, block_runs, unpack_tables
from kvmpy.snapshot.values import Contents, contents

__all__ = ["SnapshotFile"]

_QUICK: Final = 64 << 20  # bytes of pages that "auto" checks; some 40 ms
_VERIFY: Final = ("auto", "all", "index")


class SnapshotFile:
    """A snapshot's file, open for reading. Raises SnapshotError for one that is none, or damaged.

    `digest` is the checksum of its header, which covers all others.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.fd = _open(self.path)
        self._close = weakref.finalize(self, os.close, self.fd)
        try:
            self._read()
        except SnapshotError as error:
            self._close()
            raise SnapshotError(f"{self.path}: {error}") from None
        except OSError as error:
            self._close()
            raise SnapshotError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _read(self) -> None:
        status = os.fstat(self.fd)
        page = os.pread(self.fd, Header.SIZE, 0)
        self.header = header = Header.unpack(page, status.st_size)
        self.digest = digest(page)
        self.disk_size = status.st_blocks * 512
        """The bytes that it takes on the disk, in which holes do not count."""
        values = self._part(header.values_offset, header.values_size, header.values_digest)
        self.contents: Contents = contents(unpack_values(values))
        tables = self._part(header.tables_offset, header.tables_size, header.tables_digest)
        self.tables: list[RegionTable] = unpack_tables(tables, header)

    def _part(self, offset: int, size: int, expected: bytes) -> bytes:
        data = os.pread(self.fd, size, offset)
        if digest(data) != expected:
            raise SnapshotError("was altered: its index does not match the index's checksum")
        return data

    @property
    def saved(self) -> Saved:
        """Where it is, and what it is known by."""
        return Saved(self.path, self.digest)

    @property
    def stored(self) -> int:
        """The bytes of all pages that it holds, before they were compressed."""
        return sum(table.stored_pages for table in self.tables) * PAGE_SIZE

    def images(self, verify: str = "auto") -> tuple[Image, ...]:
        """The RAM; `verify` is "all", "index" (no pages), or "auto": all if they are few."""
        if verify not in _VERIFY:
            raise ConfigError(f"verify={verify!r}: use {', '.join(map(repr, _VERIFY))}")
        in_place = self.header.compress is None
        few = verify == "auto" and self.stored <= _QUICK
        read = any(table.repeats for table in self.tables)  # all of it, in any case
        if in_place and (few or read or verify == "all"):
            self.verify()
        try:
            if in_place:
                return tuple(mapped(self.fd, table) for table in self.tables)
            return tuple(expanded(self.fd, table) for table in self.tables)
        except SnapshotError as error:
            raise SnapshotError(f"{self.path}: {error}") from None
        except KvmpyError:
            raise
        except (OSError, ValueError) as error:  # ValueError: more than can be mapped
            code = getattr(error, "errno", None) or errno.ENOMEM
            raise host_error(code, f"loading the snapshot {self.path}") from None

    def verify(self) -> None:
        """Check every page; SnapshotError says which are not what was saved."""
        try:
            for table in self.tables:
                for number, runs in enumerate(block_runs(table.stored)):
                    table.check(number, digest(*self._stored(table, number, runs)))
                if self.header.compress is None:
                    self._check_zeros(table)
        except SnapshotError as error:
            raise SnapshotError(f"{self.path}: {error}") from None
        except OSError as error:
            raise SnapshotError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _stored(
        self, table: RegionTable, number: int, runs: list[tuple[int, int]]
    ) -> Iterator[bytes]:
        """A block's bytes as they are in the file. Not by a mapping, where an error is a signal."""
        if self.header.compress is not None:
            block = table.blocks[number]
            yield os.pread(self.fd, block.size, block.offset)
            return
        for first, count in runs:
            offset = table.offset + first * PAGE_SIZE
            yield os.pread(self.fd, count * PAGE_SIZE, offset)

    def _check_zeros(self, table: RegionTable) -> None:
        """That what is not stored reads as zeros: of a hole, that is known without reading it."""
        left = set_bits(table.pages, [])
        for first, count in data_pages(self.fd, table.offset, table.size):
            mark(left, first, count)
        left = bytearray(a & ~b for a, b in zip(left, table.stored, strict=True))
        for runs in block_runs(left):
            for first, count in runs:
                size = count * PAGE_SIZE
                if os.pread(self.fd, size, table.offset + first * PAGE_SIZE) != bytes(size):
                    raise SnapshotError("was altered: there is something in its pages of zeros")


def _open(path: Path) -> int:
    """A descriptor of a regular file: opening anything else may wait, or act on a device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SnapshotError(f"{path}: cannot be opened: {reason}") from None
    raise SnapshotError(f"{path}: is no regular file: name a file that Snapshot.save made")
