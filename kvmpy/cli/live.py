"""Where a traced guest's console and its records go, without one spoiling the other."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kvmpy.cli.stdio import write_output
from kvmpy.errors import ConfigError, HostError
from kvmpy.trace import Record, exports, jsonl
from kvmpy.trace.record import INTERRUPTED
from kvmpy.trace.split import Summary
from kvmpy.trace.text import HEADING, line, summary_lines

__all__ = ["Kept", "Lines", "Live", "Output", "say"]

_PATIENCE: Final = 0.1  # seconds that the beginning of a console line waits for its end


def say(text: str) -> None:
    """Write a line on standard error; HostError if nobody reads it."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        raise HostError("standard error was closed early; the guest was stopped") from None


class Output:
    """Takes console bytes and records; a base, and what all have: the summary."""

    def __init__(self) -> None:
        self.summary = Summary()
        self.flush: Callable[[], None] = _nothing
        """Has the recorder give what it has: the records up to now."""

    def console(self, data: bytes) -> None:
        """Take what the guest says."""
        write_output(data)

    def record(self, record: Record) -> None:
        """Take a record."""
        self.summary.add(record)

    def finish(self, dropped: int) -> None:
        """All is there."""
        for text in summary_lines(self.summary, dropped):
            say(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class Live(Output):
    """Records as lines on standard error, the console on standard output.

    Where both are the same terminal, file or pipe, the console comes by whole lines, each after
    the records that made it and behind a bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self._together = _same_place()
        self._partial = b""
        self._since = 0.0
        self._begun = False

    def console(self, data: bytes) -> None:
        """Take what the guest says."""
        if not self._together:
            write_output(data)
            return
        self._partial += data
        self._since = time.monotonic()
        if b"\n" in data:
            self.flush()
            *whole, self._partial = self._partial.split(b"\n")
            for text in whole:
                self._say_console(text)

    def record(self, record: Record) -> None:
        """Show a record; entries that signals ended are only counted."""
        super().record(record)
        if record.kind == INTERRUPTED:
            return
        if not self._begun:
            say(HEADING)
            self._begun = True
        say(line(record, self.summary.first or 0))
        if record.level == "caller" or time.monotonic() - self._since > _PATIENCE:
            self._end_line()

    def finish(self, dropped: int) -> None:
        """Show what is left of the console, and the summary."""
        self._end_line()
        super().finish(dropped)

    def _end_line(self) -> None:
        text, self._partial = self._partial, b""
        if text:
            self._say_console(text)

    def _say_console(self, text: bytes) -> None:
        # Bytes as they are: they are the guest's, and may be no text.
        write_output(b"  console | " + text + b"\n")


class Lines(Output):
    """Records into a text or JSON lines file, as they come."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._json = path, path.suffix == ".jsonl"
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from None
        self._write(jsonl.first_line() if self._json else HEADING)

    def _write(self, text: str) -> None:
        try:
            self._file.write(text + "\n")
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> HostError:
        return HostError(
            f"writing the trace {self._path} failed: {error.strerror}", error.errno or 0
        )

    def record(self, record: Record) -> None:
        """Write a record."""
        super().record(record)
        self._write(jsonl.as_line(record) if self._json else line(record, self.summary.first or 0))

    def finish(self, dropped: int) -> None:
        """Write the end, too."""
        if self._json:
            self._write(jsonl.end_line(self.summary.records, dropped))
        else:
            for text in ("", *summary_lines(self.summary, dropped)):
                self._write(text)
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None
        super().finish(dropped)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            if error is None:
                raise self._failed(failure) from None


class Kept(Output):
    """Records kept for a form that needs all of them: Perfetto's, or a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._records: list[Record] = []
        exports.save((), path)  # find out now whether it can be written

    def record(self, record: Record) -> None:
        """Keep a record."""
        super().record(record)
        self._records.append(record)

    def finish(self, dropped: int) -> None:
        """Write the file."""
        try:
            exports.save(self._records, self._path, dropped)
        except ConfigError as error:  # it could be opened before the run
            raise HostError(str(error)) from None
        super().finish(dropped)


def _same_place() -> bool:
    try:
        one, two = os.fstat(1), os.fstat(2)
    except OSError:
        return False
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)


def _nothing() -> None:
    pass
