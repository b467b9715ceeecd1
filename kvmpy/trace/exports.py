"""Records into files: the ending of the name says in which form."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from kvmpy.errors import ConfigError, HostError
from kvmpy.trace import html, jsonl, perfetto, text
from kvmpy.trace.record import Record

__all__ = ["FORMS", "check_path", "save"]

FORMS: Final[dict[str, Callable[[Iterable[Record], int], Iterator[str]]]] = {
    ".txt": text.lines,
    ".jsonl": jsonl.lines,
    ".json": perfetto.lines,
    ".html": html.lines,
}


def check_path(path: Path) -> None:
    """Raise ConfigError for a name whose ending says nothing."""
    if path.suffix not in FORMS:
        known = ", ".join(FORMS)
        raise ConfigError(f"{path}: a trace is written to a file that ends in one of {known}")


def save(records: Iterable[Record], path: Path, dropped: int = 0) -> None:
    """Write them; ConfigError for a path that cannot be opened, HostError where writing fails."""
    check_path(path)
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from None
    try:
        with file:
            for line in FORMS[path.suffix](records, dropped):
                file.write(line + "\n")
    except OSError as error:
        what = f"writing the trace {path} failed: {error.strerror}"
        raise HostError(what, error.errno or 0) from None
