"""Where the time went: each record with what came after it, and their sums.

Entering and leaving KVM_RUN is all that the recorder sees. The time inside is the guest's and
KVM's together: nobody outside of the kernel can tell them apart. The time from an exit to the
next entry is whose who served it, the way there and back included.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from kvmpy.trace.record import INTERRUPTED, Record

__all__ = ["PLACES", "Followed", "Summary", "followed", "place_of"]

IN_KVM_RUN: Final = "in KVM_RUN"
PLACES: Final = (IN_KVM_RUN, "C loop", "Python device", "signals", "caller, or tracing")
"""Where time is spent. The last is the time between runs, and that of giving records to a sink."""

_PLACE: Final = {"C": "C loop", "Python": "Python device", "nobody": "Python device"}


def place_of(record: Record) -> str:
    """Where the time from this exit to the next entry is spent."""
    if record.kind == INTERRUPTED:
        return "signals"
    return _PLACE.get(record.level, "caller, or tracing")


class Followed:
    """Finds out of records, in order, how long it took from each to the next entry.

    None where nothing tells: of the last one, before a gap, and before a record that `starts`.
    """

    def __init__(self) -> None:
        self._last: dict[int, Record] = {}

    def push(self, record: Record) -> tuple[Record, int | None] | None:
        """Take one; the one before it on the same vCPU, with its time."""
        before = self._last.get(record.cpu)
        self._last[record.cpu] = record
        if before is None:
            return None
        if record.starts or record.number != before.number + 1:
            return before, None
        return before, record.entered - before.left

    def rest(self) -> list[tuple[Record, int | None]]:
        """The last one of each vCPU."""
        last = sorted(self._last.values(), key=lambda one: one.left)
        self._last = {}
        return [(record, None) for record in last]


def followed(records: Iterable[Record]) -> Iterator[tuple[Record, int | None]]:
    """All of them, each with its time to the next entry."""
    following = Followed()
    for record in records:
        before = following.push(record)
        if before is not None:
            yield before
    yield from following.rest()


class Summary:
    """Counts and times of records that are added in order."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.kinds: Counter[str] = Counter()
        self.accesses: Counter[tuple[str, int, str]] = Counter()
        """By kind, address and what is there, such as "serial THR"."""
        self.inside: Counter[str] = Counter()
        """Nanoseconds in KVM_RUN up to exits of a kind."""
        self.outside: Counter[tuple[str, int, str]] = Counter()
        """Nanoseconds from accesses to the next entry, by kind, address and device."""
        self.times: Counter[str] = Counter()
        """Nanoseconds by place, see `PLACES`."""
        self.records = 0
        self.first: int | None = None
        self.last = 0
        self._following = Followed()
        for record in records:
            self.add(record)

    @property
    def span(self) -> int:
        """Nanoseconds from the first entry to the last exit."""
        return 0 if self.first is None else self.last - self.first

    @property
    def interrupted(self) -> int:
        """How many entries a signal ended."""
        return self.kinds[INTERRUPTED]

    @property
    def exits(self) -> int:
        """How many exits of the guest's there were."""
        return self.records - self.interrupted

    def add(self, record: Record) -> None:
        """Take the next one."""
        self.first = record.entered if self.first is None else min(self.first, record.entered)
        self.last = max(self.last, record.left)
        self.records += 1
        self.kinds[record.kind] += 1
        self.inside[record.kind] += record.inside
        self.times[IN_KVM_RUN] += record.inside
        if record.address is not None:
            self.accesses[record.kind, record.address, _name(record)] += 1
        before = self._following.push(record)
        if before is None:
            return
        one, outside = before
        if outside is None:
            self.times[PLACES[-1]] += max(0, record.entered - one.left) if record.starts else 0
            return
        self.times[place_of(one)] += outside
        if one.address is not None:
            self.outside[one.kind, one.address, _name(one)] += outside


def _name(record: Record) -> str:
    return record.text.partition(" <- ")[0].partition(" -> ")[0]
