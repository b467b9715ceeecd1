"""A file that is there as a whole or not at all: written beside its place, then moved there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvmpy.errors import HostError

__all__ = ["check_new_file", "new_file"]

_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_MODE = 0o666  # less the umask


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor to write to; `path` is what was written once the block has ended well.

    The bytes are on the disk by then (fsync). If the block raises, or the process dies, what was at
    `path` before is still there. Until its end the file has no name, where the file system can do
    that (O_TMPFILE), so that nothing is left lying about; elsewhere only a crash leaves it.
    Raises HostError for what the host refuses.
    """
    target, folder = _place(path)
    temporary = f".{target.name[:200]}.{os.urandom(8).hex()}.tmp"
    named = False
    try:
        fd, named = _open(folder, target.parent, temporary)
        try:
            yield fd
            os.fsync(fd)
            if not named:
                # With a descriptor of a folder Python calls linkat(2), which follows the link.
                os.link(f"/proc/self/fd/{fd}", temporary, dst_dir_fd=folder)
                named = True
            os.rename(temporary, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            named = False
            os.fsync(folder)
        finally:
            os.close(fd)
    except OSError as error:
        if isinstance(error, HostError) and not error.errno:
            raise
        raise _failed(path, error) from None
    finally:
        if named:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
        os.close(folder)


def check_new_file(path: Path) -> None:
    """Raise HostError, as `new_file` does, for a place that no file can be written to."""
    target, folder = _place(path)
    temporary = f".{target.name[:200]}.{os.urandom(8).hex()}.tmp"
    try:
        fd, named = _open(folder, target.parent, temporary)
        os.close(fd)
        if named:
            os.unlink(temporary, dir_fd=folder)
    except OSError as error:
        raise _failed(path, error) from None
    finally:
        os.close(folder)


def _place(path: Path) -> tuple[Path, int]:
    """The file that is meant, and a descriptor of its folder."""
    try:
        target = Path(os.path.realpath(path))  # what a symbolic link leads to, not the link itself
        if target.exists() and not target.is_file():
            raise HostError(f"{path}: cannot save there: it is no regular file")
        return target, os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except HostError:
        raise
    except (OSError, ValueError) as error:
        raise _failed(path, error) from None


def _open(folder: int, parent: Path, temporary: str) -> tuple[int, bool]:
    """A new file, and whether it has a name."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(parent, flags | os.O_TMPFILE, _MODE), False
    except OSError as error:
        if error.errno not in _NO_UNNAMED:
            raise
    return os.open(temporary, flags | os.O_CREAT | os.O_EXCL, _MODE, dir_fd=folder), True


def _failed(path: Path, error: OSError | ValueError) -> HostError:
    code = getattr(error, "errno", None) or 0
    return HostError(f"{path}: cannot save there: {os.strerror(code) if code else error}", code)
