"""Standard input and output as the guest's: unbuffered, and closed at any moment."""

import os
import select
from collections.abc import Callable
from pathlib import Path

from kvmpy.cli import output_failure
from kvmpy.errors import HostError, ImageError

__all__ = ["input_file", "read_input", "write_output"]

_CHUNK = 4096


def write_output(data: bytes) -> None:
    """Write all of `data` to standard output now; HostError if it cannot be written."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            select.select([], [1], [])  # a pipe that somebody made non-blocking, and full
        except OSError as error:
            code = error.errno or 0
            what = output_failure(error)
            raise HostError(f"standard output {what}; the guest was stopped", code) from None


def read_input(fd: int = 0) -> Callable[[], bytes]:
    """What is there to be read of a descriptor, without waiting; b"" at its end, for ever."""
    open_ = True

    def source() -> bytes:
        nonlocal open_
        if not open_:
            return b""
        try:
            if not select.select([fd], [], [], 0)[0]:
                return b""
            data = os.read(fd, _CHUNK)
        except (OSError, ValueError):
            data = b""  # closed before we came
        open_ = bool(data)
        return data

    return source


def input_file(path: Path) -> Callable[[], bytes]:
    """The same for a file. Raises ImageError where it cannot be read."""
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a directory: --input takes a file")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{path}: cannot read it for --input: {error.strerror}") from None
    return read_input(fd)
