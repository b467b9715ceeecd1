"""How views show themselves: as plain text, in a terminal by rich, and in a notebook as HTML.

A view says what there is to see as grids, and this makes the three forms of them. What a guest
has a hand in (a symbol's name, a string) is harmless in each: no control character, markup or tag
gets through.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Grid", "Shown", "clean", "html"]

_STYLE = "text-align:left;font-family:monospace;white-space:pre;padding:0 1em 0 0"
_BAD = ";color:#b00020"


class Grid(NamedTuple):
    """A table with a title and notes below it; `bad` are the numbers of rows to point out."""

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: tuple[str, ...] = ()
    bad: frozenset[int] = frozenset()


def clean(text: str) -> str:
    """Text without characters that could do something to a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class Shown:
    """Something that shows itself as grids."""

    __slots__ = ()

    def grids(self) -> tuple[Grid, ...]:
        """What there is to see."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(_plain(grid) for grid in self.grids())

    def __rich__(self) -> "RenderableType":
        from rich.console import Group

        return Group(*(_rich(grid) for grid in self.grids()))

    def _repr_html_(self) -> str:
        return html(self.grids())


def html(grids: Iterable[Grid]) -> str:
    """Grids as a piece of HTML."""
    return "<div>" + "".join(_html(grid) for grid in grids) + "</div>"


def _plain(grid: Grid) -> str:
    rows = [[clean(cell) for cell in row] for row in grid.rows]
    lines = [clean(grid.title)] if grid.title else []
    if rows:
        table = [[clean(name) for name in grid.columns], *rows] if any(grid.columns) else rows
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    return "\n".join(lines + [f"  {clean(note)}" for note in grid.notes])


def _rich(grid: Grid) -> "RenderableType":
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Not the table's own title, which is folded to the table's width.
    parts: list[RenderableType] = [Text(clean(grid.title), style="bold")] if grid.title else []
    if grid.rows:
        table = Table(box=box.SIMPLE_HEAD, show_header=any(grid.columns))
        for name in grid.columns:
            table.add_column(Text(clean(name)))
        for number, row in enumerate(grid.rows):
            cells = [Text(clean(cell)) for cell in row]
            table.add_row(*cells, style="red" if number in grid.bad else None)
        parts.append(table)
    parts += [Text(f"  {clean(note)}") for note in grid.notes]
    return Group(*parts)


def _html(grid: Grid) -> str:
    def cells(tag: str, row: Sequence[str], bad: bool = False) -> str:
        style = _STYLE + _BAD * bad
        made = "".join(f'<{tag} style="{style}">{escape(clean(cell))}</{tag}>' for cell in row)
        return f"<tr>{made}</tr>"

    parts = [f"<p><b>{escape(clean(grid.title))}</b></p>"] if grid.title else []
    if grid.rows:
        head = f"<thead>{cells('th', grid.columns)}</thead>" if any(grid.columns) else ""
        body = "".join(cells("td", row, at in grid.bad) for at, row in enumerate(grid.rows))
        parts.append(f"<table>{head}<tbody>{body}</tbody></table>")
    parts += [f"<p>{escape(clean(note))}</p>" for note in grid.notes]
    return "".join(parts)
