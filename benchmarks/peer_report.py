"""What came of the work, as a table on a terminal, as Markdown, and as plain data."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.host import title
from benchmarks.stats import Spread

__all__ = ["Figure", "Result", "as_json", "markdown", "print_table"]

COLUMNS = ("work", "with", "runs on", "median", "least to greatest", "ratio")
FOOTNOTES = (
    "Ratio: to the first row of the same work, round by round; the median of the rounds. Where a "
    "row runs on an emulator, it compares two ways to have the work done, not two KVMs.",
    "A write includes the guest's loop around it (inc, the write, dec, jnz). kvmpy has KVM bring "
    "the general registers along with each exit, where that is possible; bare C and fcntl.ioctl "
    "do without.",
)
PVM_NOTE = "Figures taken under kvm_pvm say nothing of VT-x or SVM."


@dataclass(frozen=True)
class Figure:
    """One peer's figure: the spread of its rounds, and of their ratios to the first peer's."""

    name: str
    runs_on: str
    note: str = ""
    missing: str = ""
    value: Spread | None = None
    ratio: Spread | None = None
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Result:
    """One piece of work, with a figure for each peer."""

    key: str
    name: str
    unit: str
    figures: tuple[Figure, ...]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rows(results: list[Result]) -> Iterator[tuple[str, ...]]:
    """The cells of each row, under COLUMNS; the work is named in its first row."""
    for result in results:
        for number, figure in enumerate(result.figures):
            name = f"{figure.name} ({figure.note})" if figure.note else figure.name
            work = "" if number else f"{result.name}, {result.unit}"
            if figure.value is None:
                yield work, name, figure.runs_on, "-", "-", figure.missing
                continue
            value, ratio = figure.value, figure.ratio
            yield (
                work,
                name,
                figure.runs_on,
                _number(value.median),
                f"{_number(value.least)} to {_number(value.greatest)}",
                "-" if ratio is None else f"{_number(ratio.median)}",
            )


def _lines(host: dict[str, Any], command: str, caution: str) -> list[str]:
    """What there is to say below a table."""
    lines = [f"{title(host)}; made by `{command}`", *FOOTNOTES]
    if host["backend"] == "kvm_pvm":
        lines.append(PVM_NOTE)
    return [*lines, caution] if caution else lines


def print_table(host: dict[str, Any], results: list[Result], command: str, caution: str) -> None:
    """Print the table, in colours where standard output is a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kvmpy and its peers", title_justify="left")
    for column in COLUMNS:
        right = column in COLUMNS[3:5]
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    first = True
    for row in _rows(results):
        if row[0] and not first:
            table.add_section()
        table.add_row(*row, style="dim" if row[3] == "-" else None)
        first = False
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    for line in _lines(host, command, caution):
        console.print(line, markup=False, highlight=False)


def markdown(host: dict[str, Any], results: list[Result], command: str, caution: str) -> str:
    """The same as a Markdown table, with the host, the date and the command below it."""
    lines = [COLUMNS, ("---", "---", "---", "--:", "--:", "---"), *_rows(results)]
    table = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines
    )
    return table + "\n\n" + "\n".join(_lines(host, command, caution)) + "\n"


def as_json(host: dict[str, Any], results: list[Result], command: str) -> dict[str, Any]:
    """The same as plain data, with every round's value."""
    return {"host": host, "command": command, "works": [asdict(result) for result in results]}
