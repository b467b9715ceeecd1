"""Records as one page that needs nothing else: tables, the split of the time, a timeline."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

from kvmpy.kvm import backend
from kvmpy.trace.record import Record
from kvmpy.trace.split import PLACES, Summary
from kvmpy.trace.text import duration, serving
from kvmpy.trace.timeline import COLOURS, svg

__all__ = ["lines"]

_SHOWN: Final = 1000  # records in the table
_MOST: Final = 200_000  # records that a page is made of: more are sampled
_BLOCK: Final = 1000
_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
th, td { padding: .15em .8em .15em 0; text-align: left; font-variant-numeric: tabular-nums; }
td.n, th.n { text-align: right; }
th { border-bottom: 1px solid; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
.exits { fill: currentColor; opacity: .6; }
.bar { display: flex; height: 1.6em; margin: .5em 0; } .bar span { display: block; }
.key { display: inline-block; width: .9em; height: .9em; margin-right: .4em; }
.records { max-height: 40em; overflow: auto; font: 13px/1.35 ui-monospace, monospace; }
"""
_CANNOT: Final = """
The time in KVM_RUN is the guest's and KVM's together, the way in and out included: from outside
of the kernel nobody can tell them apart. The time to serve an exit includes the way between C and
Python. Where the host's KVM emulates, the instruction pointer of a port write may be before or
after the instruction. Times are CLOCK_MONOTONIC, read once before and once after KVM_RUN.
"""


def lines(records: Iterable[Record], dropped: int = 0) -> Iterator[str]:
    """The page. It goes through the records several times, so they are kept.

    Of more than 200,000 it takes blocks of 1,000 at equal distances, and says so: what lies between
    them is nobody's time, as between records of which some were dropped.
    """
    kept, total, step = _sampled(records)
    summary = Summary(kept)
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>kvmpy trace</title>'
    yield f"<style>{_STYLE}</style></head><body>"
    yield "<h1>kvmpy trace</h1>"
    lost = f", {dropped:,} records dropped" if dropped else ""
    yield (
        f"<p>{summary.exits:,} exits in {duration(summary.span)}; "
        f"{summary.interrupted:,} entries ended by signals{lost}; {escape(backend())}.</p>"
    )
    if step > 1:
        yield (
            f"<p>A sample: one block of {_BLOCK:,} records in {step:,}, since there are {total:,}. "
            "Numbers and times below are those of the sample.</p>"
        )
    yield "<h2>Where the time went</h2>"
    yield from _times(summary)
    yield "<h2>Timeline</h2>"
    yield "<p>Each column: shares of the time, colours as above; below it, the number of exits.</p>"
    yield svg(kept, summary)
    yield "<h2>Exits by kind</h2>"
    yield from _table(
        ("kind", "exits", "in KVM_RUN", "each"),
        (
            (
                kind,
                f"{count:,}",
                duration(inside := summary.inside[kind]),
                duration(inside // count),
            )
            for kind, count in summary.kinds.most_common()
        ),
        "tnnn",
    )
    yield "<h2>Exits by address</h2>"
    yield from _table(
        ("kind", "address", "device", "exits", "to serve", "each"),
        (
            (
                kind,
                f"{address:#x}",
                name,
                f"{count:,}",
                serving(after := summary.outside[kind, address, name]),
                serving(after // count),
            )
            for (kind, address, name), count in summary.accesses.most_common()
        ),
        "tttnnn",
    )
    yield f"<h2>Records</h2><p>The first {min(_SHOWN, len(kept)):,} of {total:,}.</p>"
    yield '<div class="records">'
    yield from _table(
        ("seconds", "cpu", "exit", "at", "what", "rip", "by", "in KVM_RUN"),
        (_row(record, summary.first or 0) for record in kept[:_SHOWN]),
        "nntttttn",
    )
    yield f"</div><h2>What this cannot tell</h2><p>{_CANNOT.strip()}</p></body></html>"


def _sampled(records: Iterable[Record]) -> tuple[Sequence[Record], int, int]:
    """Those to show, how many there are, and of how many blocks one is taken."""
    there = records if isinstance(records, Sequence) else list(records)
    step = -(-len(there) // _MOST)
    if step <= 1:
        return there, len(there), 1
    kept = [one for at, one in enumerate(there) if at // _BLOCK % step == 0]
    return kept, len(there), step


def _times(summary: Summary) -> Iterator[str]:
    whole = sum(summary.times.values()) or 1
    shares = {place: summary.times[place] / whole for place in PLACES}
    spans = "".join(
        f'<span style="width:{100 * share:.3f}%;background:{COLOURS[place]}"></span>'
        for place, share in shares.items()
    )
    yield f'<div class="bar">{spans}</div><table><tr><th>where<th class="n">time<th class="n">share'
    for place, share in shares.items():
        key = f'<span class="key" style="background:{COLOURS[place]}"></span>'
        spent = duration(summary.times[place])
        yield f'<tr><td>{key}{place}<td class="n">{spent}<td class="n">{100 * share:.1f} %'
    yield "</table>"


def _row(record: Record, start: int) -> tuple[str, ...]:
    return (
        f"{(record.left - start) / 1e9:.6f}",
        str(record.cpu),
        record.kind,
        "" if record.address is None else f"{record.address:#x}",
        record.text,
        "" if record.rip is None else f"{record.rip:#x}",
        record.level,
        duration(record.inside),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], columns: str) -> Iterator[str]:
    """A table; a column is "t" for text or "n" for numbers."""
    marks = ['<{} class="n">' if column == "n" else "<{}>" for column in columns]
    head = "".join(m.format("th") + escape(h) for m, h in zip(marks, heads, strict=True))
    yield f"<table><tr>{head}"
    for row in rows:
        yield "<tr>" + "".join(m.format("td") + escape(c) for m, c in zip(marks, row, strict=True))
    yield "</table>"
