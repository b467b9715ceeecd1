"""Lists of system calls, timed, and the thread that makes them on another CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvmpy.abi import ffi, host_error, lib
from kvmpy.bench.model import Conditions, Ticks, Unmeasured
from kvmpy.calls import Call, native

__all__ = ["Raiser", "raiser", "timed"]


def timed(calls: Sequence[Call], rounds: int, first: int = 0, last: int | None = None) -> Ticks:
    """Make the calls so often; the clock before `first` and after `last` (or it), each time.

    Raises HostError, which names the call, for one that does not end as it should.
    """
    pairs, failed = np.zeros((rounds, 2), np.uint64), ffi.new("uint32_t *")
    end = first if last is None else last
    with ffi.from_buffer("uint64_t[]", pairs, require_writable=True) as room:
        code = lib.kvmpy_time_calls(native(calls), len(calls), first, end, rounds, room, failed)
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
    made, list_ = ffi.new("struct kvmpy_raiser *"), native(calls)
    made.calls, made.count, made.cpu, made.delay_ns = list_, len(calls), cpu, delay_ns
    code = lib.kvmpy_raiser_start(made)
    if code:
        raise host_error(-code, f"starting a thread on CPU {cpu}")
    try:
        yield Raiser(made, calls)
    finally:
        lib.kvmpy_raiser_end(made)
