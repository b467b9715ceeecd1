"""Lists of system calls that C makes in one go (csrc/calls.h)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmpy.abi import IOCTLS, address_of, ffi, lib

__all__ = ["Call", "close", "ioctl", "kick", "native", "open_file", "run_for", "write"]


@dataclass(frozen=True, slots=True)
class Call:
    """One system call (struct kvmpy_call of csrc/calls.h); `what` names it in errors.

    `fd` is a descriptor, or with `of` the number of the call of this round that returned it.
    `argument` is a number or a buffer, `points_to` a buffer that it points to. `error` is the
    errno that it is to fail with. With `poke`, the number `value` is stored at that address just
    before. `opens` says that it returns a descriptor.
    """

    what: str
    kind: int
    fd: int = -1
    of: int = 0
    error: int = 0
    request: int = 0
    argument: int | bytearray = 0
    poke: int = 0
    value: int = 0
    opens: bool = False
    points_to: bytearray = field(default_factory=bytearray)


def ioctl(name: str, fd: int = -1, argument: int | bytearray = 0, **more: Any) -> Call:
    """The ioctl of that name."""
    request = IOCTLS[name].number
    kind: int = lib.KVMPY_CALL_IOCTL
    return Call(f"KVM_{name}", kind, fd, request=request, argument=argument, **more)


def open_file(path: str) -> Call:
    """Open a file to read and write it."""
    name = bytearray(os.fsencode(path) + b"\0")
    return Call(f"opening {path}", lib.KVMPY_CALL_OPEN, argument=name, opens=True)


def close(of: int) -> Call:
    """Close what the call of that number returned."""
    return Call("close", lib.KVMPY_CALL_CLOSE, of=of)


def write(fd: int, value: int) -> Call:
    """Write a number of 8 bytes, as an eventfd takes it."""
    return Call("write", lib.KVMPY_CALL_WRITE, fd, argument=value)


def kick(loop: Any) -> Call:
    """End the run of that vCPU."""
    return Call("a kick", lib.KVMPY_CALL_KICK, argument=int(ffi.cast("uintptr_t", loop)))


def run_for(loop: Any, seconds: float) -> Call:
    """Run that vCPU until it exits."""
    address = int(ffi.cast("uintptr_t", loop))
    return Call("KVM_RUN", lib.KVMPY_CALL_RUN, argument=address, value=int(seconds * 1e9))


def native(calls: Sequence[Call]) -> Any:
    """The list as C sees it; it is alive as long as the calls' buffers are, which are theirs."""
    made = ffi.new("struct kvmpy_call[]", len(calls))
    for one, call in zip(made, calls, strict=True):
        one.kind, one.fd, one.request = call.kind, call.fd, call.request
        setattr(one, "from", call.of)  # a word of Python's
        one.error, one.value = call.error, call.value
        one.opens = call.opens
        one.poke = ffi.cast("uint64_t *", call.poke)
        argument = call.argument
        one.argument = argument if isinstance(argument, int) else address_of(argument)
    return made
