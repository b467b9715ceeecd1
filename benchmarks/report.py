"""The table and the JSON file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.host import title
from benchmarks.stats import Row, Spread

__all__ = ["as_json", "print_table", "write_json"]

_COLUMNS = ("what", "kvmpy", "floor", "figure", "spread", "bound", "verdict")
_STYLES = {"met": "green", "not met": "bold red"}


def _number(value: float, row: Row) -> str:
    if row.kind == "ratio":
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def _figure(value: float, row: Row) -> str:
    if row.kind == "ratio":
        return f"{value:.3f} x"
    sign = "+" if row.kind == "difference" and value >= 0 else ""
    return f"{sign}{_number(value, row)} {row.unit}".rstrip()


def _value(spread: Spread | None, unit: str) -> str:
    return "" if spread is None else f"{spread.median:,.1f} {unit}".rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    bound = "" if row.bound is None else f"<= {_figure(row.bound, row).removeprefix('+')}"
    if row.figure is None:
        return (row.name, "", "", "", "", bound, row.verdict)
    spread = f"{_number(row.figure.least, row)} .. {_number(row.figure.greatest, row)}"
    return (
        row.name,
        _value(row.subject, row.unit),
        _value(row.floor, row.unit),
        _figure(row.figure.median, row),
        spread,
        bound,
        row.verdict,
    )


def print_table(host: dict[str, Any], rows: list[Row]) -> None:
    """Print the rows, and what there is to say about them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(host), title_justify="left", caption_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("what", "verdict") else "right")
    for row in rows:
        *cells, verdict = _cells(row)
        style = _STYLES.get(verdict, "")
        table.add_row(*cells, f"[{style}]{verdict}[/]" if style else verdict)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.name}: {row.note}", markup=False, highlight=False)


def as_json(host: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The same as plain data, with every sample."""
    return {"host": host, "rows": [asdict(row) | {"verdict": row.verdict} for row in rows]}


def write_json(path: Path, host: dict[str, Any], rows: list[Row]) -> None:
    """Write it to a file."""
    path.write_text(json.dumps(as_json(host, rows), indent=1) + "\n")
