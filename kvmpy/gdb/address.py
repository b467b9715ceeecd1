"""Where gdb is waited for: a port on loopback, a host's port, or a Unix socket."""

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import Final, NamedTuple

from kvmpy.errors import ConfigError, HostError

__all__ = ["Address", "listen", "parse_address"]

_LOOPBACK: Final = "127.0.0.1"


class Address(NamedTuple):
    """A TCP host and port, or the `path` of a Unix socket."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """What gdb's `target remote` takes."""
        if self.path:
            return self.path
        return f":{self.port}" if self.host == _LOOPBACK else str(self)

    def unlink(self) -> None:
        """Remove the Unix socket, if it is still there."""
        with suppress(OSError):
            os.unlink(self.path)


def parse_address(text: str | int) -> Address:
    """Read PORT (on loopback), HOST:PORT or unix:PATH; port 0 is one that is free.

    Raises ConfigError for anything else.
    """
    text = str(text)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise ConfigError(f"gdb address {text!r}: unix: takes the path of a socket")
        return Address("", 0, path)
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 0xFFFF:
        raise ConfigError(f"gdb address {text!r}: use PORT, HOST:PORT or unix:PATH")
    host = host.removeprefix("[").removesuffix("]")
    return Address(host or _LOOPBACK, int(port))


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and where it is.

    Without a host, which is loopback, nobody else can reach it. Raises HostError where the address
    is taken or refused, and ConfigError for a host without a name of that kind.
    """
    try:
        if address.path:
            return _listen_unix(address), address
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(where)
            made.listen(1)
        except BaseException:
            made.close()
            raise
        return made, Address(*made.getsockname()[:2])
    except socket.gaierror as error:
        raise ConfigError(f"gdb address {address}: {error.strerror}") from None
    except (OSError, ValueError) as error:  # ValueError: a host name that IDNA refuses
        code = getattr(error, "errno", 0) or 0
        why = getattr(error, "strerror", None) or str(error)
        taken = " (port 0 takes one that is free)" if code == errno.EADDRINUSE else ""
        raise HostError(f"cannot wait for gdb on {address}: {why}{taken}", code) from None


def _listen_unix(address: Address) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(address.path)
        before = os.umask(0o177)  # gdb may do anything to the guest: the owner's only
        try:
            made.bind(address.path)
        finally:
            os.umask(before)
        made.listen(1)
    except BaseException:
        made.close()
        raise
    return made


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass
