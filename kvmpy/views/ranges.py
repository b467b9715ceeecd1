"""The whole map that a guest's page tables make, merged into ranges.

Each table is looked at once for each level that it serves at, however often it is referred to, so
that maps of many GiB with large pages take milliseconds, and tables that refer to themselves end.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

from kvmpy.views.formats import NO_PAGING, Format, format_of, paging_mode
from kvmpy.views.pages import Read, size_words
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.flags import EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = ["MapView", "Range", "page_map"]

_PRESENT, _WRITE, _USER = 1, 2, 4
_NX: Final = 1 << 63
_EXECUTE: Final = 1  # of a run's rights, beside _WRITE and _USER
_ALL: Final = _WRITE | _USER | _EXECUTE
_ACCESSED_DIRTY: Final = 0x60
_KEPT: Final = 64
MOST_RANGES: Final = 1 << 14
"""Ranges that are listed at most: far more than any sane map has."""


@dataclass(frozen=True, slots=True)
class Range:
    """Linear addresses from `start` to `last` that lead to `physical` on, with equal rights.

    `page_sizes` are those of the pages, smallest first. A `problem` in words says why the addresses
    lead nowhere although an entry is present; `physical` is None then.
    """

    start: int
    last: int
    physical: int | None
    writable: bool
    user: bool
    executable: bool
    page_sizes: tuple[int, ...]
    problem: str = ""

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.last - self.start + 1


@dataclass(frozen=True, slots=True)
class MapView(Shown):
    """All that is mapped, in the order of linear addresses.

    `complete` is False where there is more than kvmpy is willing to list.
    """

    mode: str
    root: int
    ranges: tuple[Range, ...]
    complete: bool = True

    def grids(self) -> tuple[Grid, ...]:
        """A row for each range."""
        rows = [
            (
                f"{one.start:#x}",
                f"{one.last:#x}",
                "-" if one.physical is None else f"{one.physical:#x}",
                size_words(one.size),
                _rights(one) if one.physical is not None else "",
                ", ".join(map(size_words, one.page_sizes)),
                one.problem,
            )
            for one in self.ranges
        ]
        bad = frozenset(at for at, one in enumerate(self.ranges) if one.problem)
        columns = ("from", "to", "physical", "size", "rights", "pages", "problem")
        total = sum(one.size for one in self.ranges if one.physical is not None)
        notes = [f"{size_words(total)} in {len(rows)} ranges"]
        if not self.complete:
            notes.append("there is more: the tables make more ranges than are worth a list")
        if self.mode == NO_PAGING:
            title = "paging is off: linear addresses are physical ones"
        else:
            title = f"{self.mode} page tables, root at {self.root:#x}"
        return (Grid(title, columns, rows, tuple(notes), bad),)


def _rights(one: Range) -> str:
    user = "user" if one.user else "supervisor"
    return f"{user} r{'w' if one.writable else '-'}{'x' if one.executable else '-'}"


class _Run(NamedTuple):
    start: int
    size: int
    physical: int
    rights: int
    pages: int  # sizes, or-ed: they are powers of two
    problem: str = ""


def page_map(
    read: Read,
    special: SpecialRegisters,
    *,
    physical_bits: int = 52,
    gigabyte_pages: bool = True,
) -> MapView:
    """The map that CR3 leads to (see `pages.page_walk` for what counts as reserved).

    Rights are the bits of all levels together; what SMEP, SMAP and CR0.WP make of them depends on
    who asks, and `page_walk` says it.
    """
    mode = paging_mode(special)
    if mode == NO_PAGING:
        all_of_it = Range(0, 0xFFFF_FFFF, 0, True, True, True, ())
        return MapView(mode, 0, (all_of_it,))
    form = format_of(mode, gigabyte_pages)
    root = special.cr3 & form.root_mask
    mapper = _Mapper(read, special, form, physical_bits)
    runs = list(islice(mapper.runs(root, 0), MOST_RANGES + 1))
    ranges = [_range(run, form) for run in _split(runs[:MOST_RANGES], form)]
    return MapView(mode, root, tuple(ranges), len(runs) <= MOST_RANGES)


def _split(runs: list[_Run], form: Format) -> list[_Run]:
    """Runs that span the hole of addresses that are not canonical, cut there."""
    if form.canonical_bits is None:
        return runs
    half, found = 1 << form.canonical_bits - 1, []
    for run in runs:
        room = half - run.start
        if 0 < room < run.size:
            found.append(run._replace(size=room))
            onward = run.physical + room if not run.problem else run.physical
            run = run._replace(start=half, size=run.size - room, physical=onward)  # noqa: PLW2901
        found.append(run)
    return found


def _range(run: _Run, form: Format) -> Range:
    start, bits = run.start, form.canonical_bits
    if bits is not None and start >> bits - 1:
        start |= (1 << 64) - (1 << bits)
    sizes = tuple(1 << bit for bit in range(12, 64) if run.pages >> bit & 1)
    physical = None if run.problem else run.physical
    writable, user, execute = (bool(run.rights & bit) for bit in (_WRITE, _USER, _EXECUTE))
    last = start + run.size - 1
    return Range(start, last, physical, writable, user, execute, sizes, run.problem)


class _Mapper:
    """Makes runs table by table, and only as many as are asked for."""

    def __init__(self, read: Read, special: SpecialRegisters, form: Format, bits: int) -> None:
        self.read, self.special, self.form, self.bits = read, special, form, bits
        self.nxe = bool(special.efer & EFER.NXE)
        self.seen: dict[tuple[int, int], list[_Run]] = {}

    def runs(self, address: int, depth: int) -> Iterator[_Run]:
        """The runs of the table at `address`, counted from its first linear address."""
        key = (address, depth)
        if key in self.seen:
            yield from self.seen[key]
            return
        found: list[_Run] = []
        for run in _merged(self._pieces(address, depth)):
            if len(found) <= _KEPT:
                found.append(run)
            yield run
        if len(found) <= _KEPT:
            # So what is walked again yields many runs each time, and the limit comes soon.
            self.seen[key] = found

    def _pieces(self, address: int, depth: int) -> Iterator[_Run]:
        level, size = self.form.levels[depth], self.form.entry_size
        data = self.read(address, level.count * size)
        span = 1 << level.shift
        if data is None:
            yield _Run(0, span * level.count, 0, 0, 0, f"the table {address:#x} is outside RAM")
            return
        entries = struct.unpack(f"<{level.count}{'Q' if size == 8 else 'I'}", data)
        index = 0
        while index < level.count:
            value = entries[index]
            start = index << level.shift
            index += 1
            if not value & _PRESENT:
                continue
            large = level.is_large(value, self.special)
            reserved = level.reserved(large, self.bits, self.nxe)
            if value & reserved:
                text = f"reserved bits {value & reserved:#x} in the {level.name} entry"
                yield _Run(start, span, 0, 0, 0, text)
            elif large or level.last:
                first, expected = index - 1, (value & ~_ACCESSED_DIRTY) + span
                if level.wide or level.last:  # a 4 MiB page's address is not in one piece
                    while index < level.count:
                        value_there = entries[index]
                        if value_there & ~_ACCESSED_DIRTY != expected or value_there & reserved:
                            break
                        index, expected = index + 1, expected + span
                rights, length = self._rights_of(value), (index - first) * span
                yield _Run(start, length, level.page(value, large), rights, span)
            else:
                rights = self._rights_of(value) if level.has_rights else _ALL
                for run in self.runs(value & self.form.table_mask, depth + 1):
                    allowed = run.rights & rights
                    yield run._replace(start=start + run.start, rights=allowed)

    def _rights_of(self, value: int) -> int:
        return value & (_WRITE | _USER) | (0 if self.nxe and value & _NX else _EXECUTE)


def _merged(runs: Iterator[_Run]) -> Iterator[_Run]:
    """The same with neighbours that continue each other as one."""
    last: _Run | None = None
    for run in runs:
        if last is not None:
            follows = last.start + last.size == run.start and last.problem == run.problem
            straight = run.problem or last.physical + last.size == run.physical
            if follows and straight and last.rights == run.rights:
                last = last._replace(size=last.size + run.size, pages=last.pages | run.pages)
                continue
            yield last
        last = run
    if last is not None:
        yield last
