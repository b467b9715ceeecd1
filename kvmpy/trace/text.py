"""Records as lines for people."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from kvmpy.trace.record import Record
from kvmpy.trace.split import PLACES, Summary
from kvmpy.views.show import Grid

__all__ = ["HEADING", "duration", "grids", "line", "lines", "serving", "summary_lines"]

HEADING: Final = (
    f"{'seconds':>12} cpu  {'exit':<11} {'at':<10} {'what':<30} {'rip':<10} {'by':<7} in KVM_RUN"
)
_MOST: Final = 12  # accesses in a summary
_SHOWN: Final = 16  # records at each end of a table
_COLUMNS: Final = ("seconds", "cpu", "exit", "at", "what", "rip", "by", "in KVM_RUN")


def duration(ns: int) -> str:
    """Nanoseconds with the unit that suits them."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns} ns"


def serving(ns: int) -> str:
    """What it took to serve exits; "-" for nothing: no entry came after them, and nobody knows."""
    return duration(ns) if ns else "-"


def _cells(record: Record, start: int) -> tuple[str, ...]:
    at = "" if record.address is None else f"{record.address:#x}"
    rip = "" if record.rip is None else f"{record.rip:#x}"
    seconds = f"{(record.left - start) / 10**9:.6f}"
    spent = duration(record.inside)
    return seconds, str(record.cpu), record.kind, at, record.text, rip, record.level, spent


def line(record: Record, start: int) -> str:
    """One record; times count from `start`, in nanoseconds."""
    seconds, cpu, kind, at, text, rip, level, spent = _cells(record, start)
    return f"{seconds:>12} {cpu:>3}  {kind:<11} {at:<10} {text:<30} {rip:<10} {level:<7} {spent}"


def lines(records: Iterable[Record], dropped: int = 0) -> Iterator[str]:
    """A heading, all records and a summary."""
    summary = Summary()
    yield HEADING
    for record in records:
        summary.add(record)
        yield line(record, summary.first or 0)
    yield ""
    yield from summary_lines(summary, dropped)


def grids(records: Sequence[Record], dropped: int = 0) -> tuple[Grid, ...]:
    """The first and the last records, as a notebook shows them, and a summary of all."""
    summary = Summary()
    for record in records:
        summary.add(record)
    start = summary.first or 0
    left_out = max(0, len(records) - 2 * _SHOWN)
    if left_out:
        first = [_cells(record, start) for record in records[:_SHOWN]]
        last = [_cells(record, start) for record in records[-_SHOWN:]]
        rows = [*first, ("...", "", f"{left_out:,} more", *[""] * 5), *last]
    else:
        rows = [_cells(record, start) for record in records]
    total, *rest = summary_lines(summary, dropped)
    return Grid(total, _COLUMNS, rows), Grid("", ("",), [(words,) for words in rest])


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
        after = serving(summary.outside[key])
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
