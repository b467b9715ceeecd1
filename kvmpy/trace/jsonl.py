"""Records as JSON lines: a line that says what it is, one for each record, one for the end."""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from kvmpy.errors import ConfigError
from kvmpy.kvm import backend
from kvmpy.trace.record import Record

__all__ = ["FORMAT", "TraceFile", "as_line", "end_line", "first_line", "lines", "parse", "read"]

FORMAT: Final = 1
LONGEST_LINE: Final = 64 << 10
"""Bytes of the longest line that is read: a file that has no lines must not fill the memory."""
_NAMES: Final = Record._fields
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "kind": (str,),
    "level": (str,),
    "device": (str,),
    "text": (str,),
    "starts": (bool,),
    "address": (int, type(None)),
    "value": (int, type(None)),
    "rip": (int, type(None)),
}


def first_line() -> str:
    """What the file is, and under which KVM it was taken."""
    return json.dumps({"kvmpy-trace": FORMAT, "clock": "CLOCK_MONOTONIC ns", "backend": backend()})


def end_line(records: int, dropped: int) -> str:
    """That nothing more comes, and how much was lost."""
    return json.dumps({"end": {"records": records, "dropped": dropped}})


def as_line(record: Record) -> str:
    """One record."""
    return json.dumps(record._asdict())


def lines(records: Iterable[Record], dropped: int = 0) -> Iterator[str]:
    """A whole file."""
    count = 0
    yield first_line()
    for count, record in enumerate(records, 1):  # noqa: B007 - the last one is wanted
        yield as_line(record)
    yield end_line(count, dropped)


def parse(line: str) -> Record | int:
    """The record of a line, of the line at the end how many were dropped.

    ValueError says what is wrong.
    """
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    if "end" in found:
        _check_names(found, ("end",))
        if not isinstance(found["end"], dict):
            raise ValueError(f"its 'end' is {found['end']!r:.40}")
        end = _checked(found["end"], ("records", "dropped"))
        return int(end["dropped"])
    return Record(**_checked(found, _NAMES))


def _checked(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    _check_names(found, names)
    for name, value in found.items():
        types = _TYPES.get(name, (int,))
        good = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not good or (isinstance(value, int) and not 0 <= value < 1 << 64):
            raise ValueError(f"its {name!r} is {value!r:.40}")
    return found


def _check_names(found: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ValueError(f"it has {unknown[0]!r:.40}, which kvmpy does not know")


def read(path: Path) -> Iterator[Record]:
    """The records of a file, as `TraceFile` gives them."""
    return iter(TraceFile(path))


class TraceFile:
    """A file of records, which can be read again and again.

    One that was cut off, as a kill leaves it, is read up to there, even if its last line is not
    whole. While it is read ConfigError is raised, with the line, for what is no trace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records, self.dropped = 0, 0
        """How many there are, and how many were lost while the guest ran; of the last reading
        that came to the end."""
        self.cut = False
        """Whether the file has no line that says its end; of the same reading."""

    def __iter__(self) -> Iterator[Record]:
        try:
            with _open(self.path) as file:
                yield from self._read(file)
        except OSError as error:
            raise ConfigError(f"cannot read the trace {self.path}: {error.strerror}") from None

    def _read(self, file: BinaryIO) -> Iterator[Record]:
        try:
            head = json.loads(file.readline(LONGEST_LINE).decode())
            known = isinstance(head, dict) and head.get("kvmpy-trace") == FORMAT
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise ConfigError(
                f"{self.path} is no trace of kvmpy's: `kvmpy trace --out FILE.jsonl` makes one"
            )
        records, dropped, cut = 0, 0, True
        while row := file.readline(LONGEST_LINE):
            try:
                found = parse(row.decode())
            except ValueError as error:
                half = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
                if half and not row.endswith(b"\n") and len(row) < LONGEST_LINE:
                    break  # the writer did not come to its end
                what = _words(error, row)
                raise ConfigError(f"{self.path}, line {records + 2}: no record: {what}") from None
            if not isinstance(found, Record):
                dropped, cut = found, False
                break
            records += 1
            yield found
        self.records, self.dropped, self.cut = records, dropped, cut


def _words(error: ValueError, row: bytes) -> str:
    if len(row) == LONGEST_LINE and not row.endswith(b"\n"):
        return f"it is longer than {LONGEST_LINE >> 10} KiB"
    return "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)


def _open(path: Path) -> BinaryIO:
    # Opening a pipe may wait, and what is no regular file need not have an end.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise ConfigError(f"cannot read the trace {path}: it is not a regular file")
