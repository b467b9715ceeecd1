"""One vCPU's ring of records and its counts: memory that the C loop fills."""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.errors import ConfigError
from kvmpy.exits import exit_kind
from kvmpy.trace.record import FIELDS, RECORD_SIZE, Raw, unpack

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["WHEN_FULL", "Ring", "Tally"]

WHEN_FULL: Final = {"wrap": lib.KVMPY_WRAP, "stop": lib.KVMPY_STOP, "hand": lib.KVMPY_HAND}
_PER_PAGE: Final = mmap.PAGESIZE // RECORD_SIZE
_MOST: Final = 1 << 26
_WRITE, _VALUE = lib.KVMPY_RECORD_WRITE, lib.KVMPY_RECORD_VALUE
_READS: Final = (2, 6, 29)  # KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR
_TALLY: Final = struct.Struct("<4Q")
_CLOCK: Final = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
_ADDRESS: Final = (1 << 52) - 1


class Tally(NamedTuple):
    """All exits of one kind at one address (0 where the kind has no address)."""

    kind: str
    address: int
    exits: int
    inside_ns: int
    """In KVM_RUN, up to these exits."""
    outside_ns: int
    """From these exits to the next entries of the same run: C loop, Python, devices."""


class Ring:
    """Room for `capacity` records, a multiple of 64 (a page has so many); 0 keeps only counts.

    The ring's memory is mapped twice in a row, so that its records, oldest first, always lie in
    one piece. It lives for as long as something looks at it. Raises ConfigError for a bad size.
    """

    def __init__(self, records: int, when_full: str) -> None:
        known = isinstance(records, int) and when_full in WHEN_FULL
        if not known or not 0 <= records <= _MOST:
            raise ConfigError(
                f"records={records!r}, when_full={when_full!r}: give 0 to {_MOST} records, and "
                "wrap or stop"
            )
        self.capacity = -(-records // _PER_PAGE) * _PER_PAGE
        self.wraps = when_full == "wrap"
        self.recorder: Any = ffi.new("struct kvmpy_recorder *")
        """struct kvmpy_recorder (csrc/record.h)."""
        self.recorder.capacity, self.recorder.detached = self.capacity, 1
        self.recorder.when_full = WHEN_FULL[when_full]
        self._bytes = memoryview(b"")
        self._started = time.monotonic_ns(), int(lib.kvmpy_ticks())
        if self.capacity:
            self._map(self.capacity * RECORD_SIZE)
        else:
            self.recorder.ticks = _tsc_is_the_clock()

    def _map(self, size: int) -> None:
        file = os.memfd_create("kvmpy-trace")
        try:
            os.ftruncate(file, size)
            memory = mmap.mmap(-1, 2 * size)
            start = address_of(memory)
            code = lib.kvmpy_map_twice(ffi.cast("uint8_t *", start), size, file)
        except OSError as error:
            raise host_error(error.errno or 0, f"mapping a ring of {size} bytes") from error
        finally:
            os.close(file)
        if code < 0:
            raise host_error(-code, f"mapping a ring of {size} bytes", "ask for fewer records")
        self.recorder.records = ffi.cast("struct kvmpy_record *", start)
        self._bytes = memoryview(memory).toreadonly()

    def __len__(self) -> int:
        return min(int(self.recorder.written - self.recorder.taken), self.capacity)

    @property
    def dropped(self) -> int:
        """How many records are lost: overwritten, or without room."""
        written = int(self.recorder.written)
        lost = max(0, written - self.capacity) if self.wraps else 0
        return int(self.recorder.dropped) + lost

    @property
    def window(self) -> memoryview:
        """The bytes of all records that there are, oldest first; nothing is copied."""
        count, written = len(self), int(self.recorder.written)
        if not count:
            return self._bytes[:0]
        first = (written - count) % self.capacity * RECORD_SIZE
        return self._bytes[first : first + count * RECORD_SIZE]

    @property
    def view(self) -> "NDArray[np.void]":
        """The same as a numpy structured array that cannot be written to.

        It shows the ring itself: while the vCPU runs on, a ring that wraps is written anew under
        it. It stays good for as long as it is kept, whatever becomes of machine and trace.
        """
        import numpy as np

        return np.frombuffer(self.window, dtype=np.dtype(list(FIELDS)))

    def raw(self) -> Iterator[Raw]:
        """The records, oldest first."""
        window = self.window
        for at in range(0, len(window), RECORD_SIZE):
            yield unpack(window, at)

    def take(self, *, everything: bool) -> Iterator[Raw]:
        """What came since the last call, each making room for one more (when_full="hand").

        A read at the end that has no answer yet comes only if `everything` is wanted.
        """
        while self.recorder.taken < self.recorder.written:
            at = int(self.recorder.taken)
            one = unpack(self._bytes, at % self.capacity * RECORD_SIZE)
            open_ = one.reason in _READS and not one.flags & (_WRITE | _VALUE)
            if open_ and not everything and at + 1 == self.recorder.written:
                return
            self.recorder.taken = at + 1
            yield one

    def tallies(self) -> list[Tally]:
        """What was counted, by kind and address."""
        other = ffi.addressof(self.recorder, "other")
        table = bytes(ffi.buffer(self.recorder.tallies)) + bytes(ffi.buffer(other))
        per_tick = self._ns_per_tick()
        return [
            Tally(*_kind(key), count, int(inside * per_tick), int(outside * per_tick))
            for key, count, inside, outside in _TALLY.iter_unpack(table)
            if count
        ]

    def times(self) -> tuple[int, int]:
        """Nanoseconds in KVM_RUN, and from exits to the next entries of the same run."""
        per_tick = self._ns_per_tick()
        return int(self.recorder.inside * per_tick), int(self.recorder.outside * per_tick)

    def _ns_per_tick(self) -> float:
        if not self.recorder.ticks:
            return 1
        now, ticks = time.monotonic_ns(), int(lib.kvmpy_ticks())
        return (now - self._started[0]) / max(1, ticks - self._started[1])


def _kind(key: int) -> tuple[str, int]:
    """The name and the address of a tally; it has no key where it is that of all others."""
    if not key:
        return "other", 0
    reason = key >> lib.KVMPY_TALLY_SHIFT & lib.KVMPY_REASONS - 1
    return exit_kind(reason, bool(key & lib.KVMPY_TALLY_WRITE)), key & _ADDRESS


@cache
def _tsc_is_the_clock() -> bool:
    """Whether the kernel has judged this machine's TSC fit to be the clock: steady, and one."""
    try:
        return _CLOCK.read_text().strip() == "tsc"
    except OSError:
        return False
