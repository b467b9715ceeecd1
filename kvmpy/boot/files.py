"""Reading a file that may be anything: too large, a directory, a pipe, not there."""

import os
import stat
from pathlib import Path
from typing import Final

from kvmpy.errors import ImageError

__all__ = ["MAXIMUM_IMAGE", "read_file", "shown", "starts_with"]

# Larger than any guest that kvmpy is for, and small enough to be read at once.
MAXIMUM_IMAGE = 1 << 30
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def shown(name: str | os.PathLike[str]) -> str:
    """`name` for a message of one line: as it is if it can be printed, and quoted if not."""
    text = os.fspath(name)
    return text if text.isprintable() and text else repr(text)


def starts_with(path: str | os.PathLike[str], mark: bytes) -> bool:
    """Whether it is a regular file that begins with `mark`, however large; never raises."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(os.open(path, _FLAGS), "rb") as file:
            return file.read(len(mark)) == mark
    except (OSError, ValueError):
        return False  # `read_file` says why


def read_file(path: str | os.PathLike[str], limit: int = MAXIMUM_IMAGE) -> bytes:
    """Return the contents of the regular file `path`, at least one and at most `limit` bytes.

    Raises ImageError, naming the file, if it is missing, unreadable, empty or too large (found
    out without reading it), or anything but a regular file: opening a pipe or a terminal would
    wait, and opening a device can act on it.
    """
    name = shown(path)
    try:
        _check(Path(path).stat(), name, limit)
        # The file may be replaced in between: do not wait for a pipe, and check it again.
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise ImageError(_reason(error, name)) from None
    try:
        with open(descriptor, "rb") as file:
            _check(os.fstat(descriptor), name, limit)
            data = file.read(limit + 1)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ImageError(f"{name}: grew to more than {limit} bytes while it was read")
    if not data:
        raise ImageError(f"{name}: is empty: there is nothing to run in it")
    return data


def _check(status: os.stat_result, name: str, limit: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: is a directory: name a guest file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: is not a regular file: copy the guest into one")
    if status.st_size > limit:
        raise ImageError(
            f"{name}: is {status.st_size} bytes, more than the {limit} that kvmpy loads: "
            "is it a disk image? give a guest's program"
        )


def _reason(error: OSError | ValueError, name: str) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"{name}: no such file: check the path"
    if isinstance(error, PermissionError):
        return f"{name}: permission denied: make the file readable for you"
    if isinstance(error, OSError):
        return f"{name}: cannot be opened: {error.strerror}"
    return f"{name}: is not a file name: {error}"
