"""Records as JSON lines: a line that says what it is, one for each record, one for the end."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from kvmpy.errors import ConfigError
from kvmpy.kvm import backend
from kvmpy.trace.record import Record

__all__ = ["FORMAT", "as_line", "end_line", "first_line", "lines", "parse", "read"]

FORMAT: Final = 1
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


def parse(line: str) -> Record | None:
    """The record of a line, None for the line at the end; ValueError says what is wrong."""
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    if "end" in found:
        return None
    missing = [name for name in _NAMES if name not in found]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    values: dict[str, Any] = {name: found[name] for name in _NAMES}
    for name, value in values.items():
        types = _TYPES.get(name, (int,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"its {name!r} is {value!r:.40}")
    return Record(**values)


def read(path: Path) -> Iterator[Record]:
    """The records of a file. ConfigError, with the line, for what is no trace."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from _read(path, file)
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no trace: it is no text") from None


def _read(path: Path, file: Iterable[str]) -> Iterator[Record]:
    rows = iter(file)
    try:
        head = json.loads(next(rows, ""))
        known = isinstance(head, dict) and head.get("kvmpy-trace") == FORMAT
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise ConfigError(
            f"{path} is no trace of kvmpy's: `kvmpy trace --out FILE.jsonl` makes one"
        )
    for number, row in enumerate(rows, 2):
        try:
            record = parse(row)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: no record: {error}") from None
        if record is None:
            return
        yield record
