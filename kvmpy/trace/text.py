"""Records as lines for people."""

from collections.abc import Iterable, Iterator
from typing import Final

from kvmpy.trace.record import Record
from kvmpy.trace.split import PLACES, Summary

__all__ = ["HEADING", "duration", "line", "lines", "summary_lines"]

HEADING: Final = (
    f"{'seconds':>12} cpu  {'exit':<11} {'at':<10} {'what':<30} {'rip':<10} {'by':<7} in KVM_RUN"
)
_MOST: Final = 12  # accesses in a summary


def duration(ns: int) -> str:
    """Nanoseconds with the unit that suits them."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns} ns"


def line(record: Record, start: int) -> str:
    """One record; times count from `start`, in nanoseconds."""
    at = "" if record.address is None else f"{record.address:#x}"
    rip = "" if record.rip is None else f"{record.rip:#x}"
    seconds = (record.left - start) / 10**9
    return (
        f"{seconds:12.6f} {record.cpu:>3}  {record.kind:<11} {at:<10} {record.text:<30} "
        f"{rip:<10} {record.level:<7} {duration(record.inside)}"
    )


def lines(records: Iterable[Record], dropped: int = 0) -> Iterator[str]:
    """A heading, all records and a summary."""
    summary = Summary()
    yield HEADING
    for record in records:
        summary.add(record)
        yield line(record, summary.first or 0)
    yield ""
    yield from summary_lines(summary, dropped)


def summary_lines(summary: Summary, dropped: int = 0) -> list[str]:
    """Counts by kind and by address, and the split of the time."""
    found = [
        f"{summary.exits} exits in {duration(summary.span)}"
        + (f", {summary.interrupted} entries ended by signals" if summary.interrupted else "")
        + (f", {dropped} records dropped" if dropped else "")
    ]
    for kind, count in summary.kinds.most_common():
        found.append(f"  {kind:<16} {count:>9}  {duration(summary.inside[kind]):>10} in KVM_RUN")
    if summary.accesses:
        found.append("by address:")
    for key, count in summary.accesses.most_common(_MOST):
        kind, address, name = key
        after = duration(summary.outside[key])
        found.append(f"  {kind:<11} {address:<#12x} {count:>9}  {after:>10} to serve  {name}")
    if len(summary.accesses) > _MOST:
        found.append(f"  and {len(summary.accesses) - _MOST} more")
    found.append("time:")
    whole = sum(summary.times.values()) or 1
    for place in PLACES:
        spent = summary.times[place]
        if spent or place == PLACES[0]:
            note = "  (guest and KVM)" if place == PLACES[0] else ""
            found.append(f"  {place:<21} {duration(spent):>10}  {100 * spent / whole:5.1f} %{note}")
    return found
