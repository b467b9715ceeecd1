"""Lists of system calls that C makes and times, and the thread that makes them on another CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmpy.abi import IOCTLS, address_of, ffi, host_error, lib
from kvmpy.bench.model import Conditions, Ticks, Unmeasured

__all__ = ["Call", "Raiser", "close", "ioctl", "kick", "raiser", "run_for", "timed", "write"]


@dataclass(frozen=True, slots=True)
class Call:
    """One system call (struct kvmpy_call of csrc/calls.h); `what` names it in errors.

    `fd` is a descriptor, or with `of` the number of the call of this round that returned it.
    `argument` is a number or a buffer, `points_to` a buffer that it points to. `error` is the
    errno that it is to fail with. With `poke`, the number `value` is stored at that address just
    before.
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
    points_to: bytearray = field(default_factory=bytearray)


def ioctl(name: str, fd: int = -1, argument: int | bytearray = 0, **more: Any) -> Call:
    """The ioctl of that name."""
    request = IOCTLS[name].number
    kind: int = lib.KVMPY_CALL_IOCTL
    return Call(f"KVM_{name}", kind, fd, request=request, argument=argument, **more)


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


def _native(calls: Sequence[Call]) -> Any:
    """The list as C sees it; it is alive as long as the calls' buffers are, which are theirs."""
    made = ffi.new("struct kvmpy_call[]", len(calls))
    for one, call in zip(made, calls, strict=True):
        one.kind, one.fd, one.request = call.kind, call.fd, call.request
        setattr(one, "from", call.of)  # a word of Python's
        one.error, one.value = call.error, call.value
        one.poke = ffi.cast("uint64_t *", call.poke)
        argument = call.argument
        one.argument = argument if isinstance(argument, int) else address_of(argument)
    return made


def timed(calls: Sequence[Call], rounds: int, first: int = 0, last: int | None = None) -> Ticks:
    """Make the calls so often; the clock before `first` and after `last` (or it), each time.

    Raises HostError, which names the call, for one that does not end as it should.
    """
    pairs, failed = np.zeros((rounds, 2), np.uint64), ffi.new("uint32_t *")
    end = first if last is None else last
    with ffi.from_buffer("uint64_t[]", pairs, require_writable=True) as room:
        code = lib.kvmpy_time_calls(_native(calls), len(calls), first, end, rounds, room, failed)
    if code:
        raise host_error(-code, calls[failed[0]].what)
    return pairs


class Raiser:
    """A thread that makes calls on a CPU of its own, when asked; see `raiser`."""

    def __init__(self, native: Any, calls: Sequence[Call]) -> None:
        self._native, self._calls = native, calls
        self._pair = ffi.new("uint64_t[2]")

    def ask(self, loop: Any) -> tuple[int, int, int]:
        """Have it make its calls while this thread runs the vCPU of `loop`, already begun.

        Gives what kvmpy_run() returned, when the first call was begun, and when the guest was
        left, in ns. Raises HostError where a call failed.
        """
        code = lib.kvmpy_raise(self._native, loop, self._pair)
        if self._native.error:
            raise host_error(-self._native.error, ", ".join(call.what for call in self._calls))
        return int(code), int(self._pair[0]), int(self._pair[1])


@contextmanager
def raiser(calls: Sequence[Call], conditions: Conditions, delay_ns: int) -> Iterator[Raiser]:
    """A thread that makes `calls` so many ns after it is asked to, on another CPU than this one.

    Raises Unmeasured where there is but one CPU.
    """
    cpu = conditions.helper_cpu
    if cpu is None:
        raise Unmeasured("not available here", "it takes two CPUs, and there is one")
    made, list_ = ffi.new("struct kvmpy_raiser *"), _native(calls)
    made.calls, made.count, made.cpu, made.delay_ns = list_, len(calls), cpu, delay_ns
    code = lib.kvmpy_raiser_start(made)
    if code:
        raise host_error(-code, f"starting a thread on CPU {cpu}")
    try:
        yield Raiser(made, calls)
    finally:
        lib.kvmpy_raiser_end(made)
