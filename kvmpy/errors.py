"""The exceptions of kvmpy: one base, one class for each kind of thing that can be wrong.

Each message is one line that names the thing at fault and says what to do about it.
"""

__all__ = [
    "AddressError",
    "AssemblyError",
    "ClosedError",
    "ConfigError",
    "DeviceError",
    "HostError",
    "ImageError",
    "KVMUnavailableError",
    "KvmpyError",
    "OverlapError",
    "PendingExitError",
    "SnapshotError",
    "UnsupportedError",
]


class KvmpyError(Exception):
    """The base of every exception that kvmpy raises on its own account."""


class ConfigError(KvmpyError, ValueError):
    """An option, a size, a mode or a register value that kvmpy cannot use."""


class AddressError(KvmpyError, ValueError):
    """A guest address, port or range that lies outside of what it must lie in."""


class OverlapError(AddressError):
    """Two claims on the same addresses or ports; the message names both owners."""


class ImageError(KvmpyError, ValueError):
    """A guest image that is missing, malformed, or does not fit the machine."""


class SnapshotError(KvmpyError, ValueError):
    """A snapshot's file that is missing, cut off, altered, or in another format."""


class AssemblyError(KvmpyError, ValueError):
    """Assembly source that cannot be assembled.

    `line` is the number of the line at fault, counted from 1 (None where it cannot be
    known), and `text` is that line.
    """

    def __init__(self, message: str, line: int | None = None, text: str | None = None) -> None:
        where = "" if line is None else f"line {line}: "
        what = "" if text is None else f": {text.strip()}"
        super().__init__(f"{where}{message}{what}")
        self.line = line
        self.text = text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_assembly_error, (self.args[0], self.line, self.text))


def _rebuild_assembly_error(message: str, line: int | None, text: str | None) -> AssemblyError:
    error = AssemblyError(message)
    error.line, error.text = line, text
    return error


class HostError(KvmpyError, OSError):
    """The host refused something: an ioctl, a mapping, a descriptor. `errno` says why."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.errno = code


class KVMUnavailableError(HostError):
    """/dev/kvm is missing, forbidden, or not the API that kvmpy speaks."""


class UnsupportedError(HostError):
    """The host's KVM lacks a capability that the call needs; the message names it."""


class ClosedError(KvmpyError, ValueError):
    """A KVM, VM, vCPU, memory or machine was used after it was closed."""


class PendingExitError(KvmpyError, RuntimeError):
    """CPU state cannot be written now, because an exit waits to be answered first."""


class DeviceError(KvmpyError, ValueError):
    """A device answered a read with something that is not a value of the access's width."""
