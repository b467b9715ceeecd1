"""The timeline of a page: for each vCPU where the time went, from left to right, as SVG."""

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from typing import Final

from kvmpy.trace.record import INTERRUPTED, Record
from kvmpy.trace.split import IN_KVM_RUN, PLACES, Summary, followed, place_of
from kvmpy.trace.text import duration

__all__ = ["COLOURS", "svg"]

COLOURS: Final = dict(
    zip(PLACES, ("#4477aa", "#228833", "#ee6677", "#aa3377", "#bbbbbb"), strict=True)
)
"""Colour-blind safe (Paul Tol's "bright" scheme)."""

_BINS: Final = 480
_WIDTH: Final = 960
_HEIGHT: Final = 60
_LEFT: Final = 60
_STEP: Final = _HEIGHT + 30


class _Row:
    """One vCPU: nanoseconds by bin and place, exits by bin."""

    def __init__(self, start: int, width: float) -> None:
        self._start, self._width = start, width
        self.times: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(_BINS)]
        self.exits = [0] * _BINS

    def bin(self, moment: int) -> int:
        return min(_BINS - 1, max(0, int((moment - self._start) / self._width)))

    def spend(self, place: str, begin: int, end: int) -> None:
        """Put a stretch of time into the bins that it is in."""
        for at in range(self.bin(begin), self.bin(end) + 1):
            low = max(begin, self._start + at * self._width)
            high = min(end, self._start + (at + 1) * self._width)
            self.times[at][place] += max(0.0, high - low)


def svg(records: Iterable[Record], summary: Summary) -> str:
    """The picture of all records; `summary` is theirs."""
    start, width = summary.first or 0, max(1.0, summary.span / _BINS)
    rows: dict[int, _Row] = {}
    for record, outside in followed(records):
        row = rows.get(record.cpu)
        if row is None:
            row = rows[record.cpu] = _Row(start, width)
        row.spend(IN_KVM_RUN, record.entered, record.left)
        row.exits[row.bin(record.left)] += record.kind != INTERRUPTED
        if outside is not None:
            row.spend(place_of(record), record.left, record.left + outside)
    parts = [
        f'<svg viewBox="0 0 {_LEFT + _WIDTH} {_STEP * len(rows) + 20}" role="img" '
        'aria-label="timeline" shape-rendering="crispEdges" xmlns="http://www.w3.org/2000/svg">'
    ]
    for index, (cpu, row) in enumerate(sorted(rows.items())):
        top = index * _STEP + 5
        parts.append(f'<text x="0" y="{top + _HEIGHT / 2}">vCPU {cpu}</text>')
        for at in range(_BINS):
            parts += _bin(row, at, top, width)
    bottom = _STEP * len(rows) + 15
    parts.append(f'<text x="{_LEFT}" y="{bottom}">0</text>')
    parts.append(
        f'<text x="{_LEFT + _WIDTH}" y="{bottom}" text-anchor="end">'
        f"{escape(duration(summary.span))}</text></svg>"
    )
    return "\n".join(parts)


def _bin(row: _Row, at: int, top: float, width: float) -> list[str]:
    """One column: the places' shares on top of each other, the exits as a bar below."""
    each = _WIDTH / _BINS
    x, y, parts = _LEFT + at * each, top, []
    times = row.times[at]
    for place in PLACES:
        height = times[place] / width * _HEIGHT
        if height < 0.05:
            continue
        parts.append(
            f'<rect x="{x:g}" y="{y:.2f}" width="{each:g}" height="{height:.2f}" '
            f'fill="{COLOURS[place]}"/>'
        )
        y += height
    exits = row.exits[at]
    if exits:
        tall = 15 * exits / max(row.exits)
        shown = ", ".join(f"{name} {duration(int(ns))}" for name, ns in times.items() if ns >= 1)
        parts.append(
            f'<rect x="{x:g}" y="{top + _HEIGHT + 2:g}" width="{each:g}" height="{tall:.2f}" '
            f'class="exits"><title>{exits} exits; {escape(shown)}</title></rect>'
        )
    return parts
