"""Where two traces part: the first exit of a vCPU's that is another one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Final, NamedTuple

from kvmpy.trace.record import INTERRUPTED, Record

__all__ = ["Parting", "parting"]

_CONTEXT: Final = 5
_COMPARED: Final = ("kind", "address", "size", "elements", "value", "digest", "rip")


class Parting(NamedTuple):
    """The first difference of a vCPU's exits; a side that has ended has None and nothing after."""

    cpu: int
    exit: int
    """How many exits of the vCPU came before it, signals not counted."""
    before: tuple[Record, ...]
    """What came just before it, the same in both."""
    one: tuple[Record, ...]
    other: tuple[Record, ...]
    differing: tuple[str, ...]
    """The fields that differ; none where a side has ended."""


def parting(
    one: Callable[[], Iterable[Record]], other: Callable[[], Iterable[Record]]
) -> Parting | None:
    """Compare two traces, each opened as often as it has vCPUs; None if they are the same.

    Compared are kind, address, size, number of elements, value, the digest of string instructions
    and, where both know it, RIP; neither times nor who served the exit, nor what signals did.
    vCPUs are compared one by one, as two runs interleave them differently.
    """
    cpus = {record.cpu for record in one()} | {record.cpu for record in other()}
    found = (_first(cpu, _exits(one(), cpu), _exits(other(), cpu)) for cpu in sorted(cpus))
    return min((one for one in found if one is not None), key=_when, default=None)


def _when(found: Parting) -> int:
    return min(record.left for record in (*found.one, *found.other))


def _exits(records: Iterable[Record], cpu: int) -> Iterator[Record]:
    return (one for one in records if one.cpu == cpu and one.kind != INTERRUPTED)


def _first(cpu: int, one: Iterator[Record], other: Iterator[Record]) -> Parting | None:
    before: deque[Record] = deque(maxlen=_CONTEXT)
    for number, (here, there) in enumerate(zip_longest(one, other)):
        differing = _differing(here, there)
        if differing is not None:
            after = (_after(here, one), _after(there, other))
            return Parting(cpu, number, tuple(before), *after, differing)
        before.append(here)
    return None


def _differing(here: Record | None, there: Record | None) -> tuple[str, ...] | None:
    if here is None or there is None:
        return ()
    names = [name for name in _COMPARED if getattr(here, name) != getattr(there, name)]
    if None in (here.rip, there.rip) and "rip" in names:
        names.remove("rip")
    return tuple(names) or None


def _after(first: Record | None, rest: Iterator[Record]) -> tuple[Record, ...]:
    if first is None:
        return ()
    return (first, *(record for record, _ in zip(rest, range(2), strict=False)))
