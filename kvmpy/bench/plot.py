"""Plots for a paper: an ECDF of each operation, and waterfalls, by matplotlib."""

from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import MODES
from kvmpy.bench.waterfall import PARTS, Waterfall, waterfalls
from kvmpy.errors import ConfigError

__all__ = ["check_suffix", "figure", "plot", "ticks"]

_COLUMNS: Final = 3
_PAGE: Final = 12  # panels on a page
_PANEL: Final = (3.4, 2.5)  # inches, a column of a paper
_STEPS: Final = 1000  # points of a curve: a file of every sample would be large and look the same
_LAST: Final = 0.999  # the last thousandth would squeeze all the rest together
_TICKS: Final = (3, 5)  # as many as there should be, and may be
_WIDE: Final = 4  # times: of fewer, equal steps look nearly equal on a log scale
_LETTER: Final = 0.036  # of a panel's width, with room beside it
_LEGEND: Final = 1.3  # inches beside the panels, where it hides no curve
_STYLE: Final = {"kernel": ":", "c": "-", "python": "--", "-": "-"}
_COLOUR: Final = {**{mode: f"C{at}" for at, mode in enumerate(MODES)}, "-": "black"}
_Panels: TypeAlias = Sequence[tuple[str, list[Measurement]]]
_FONT: Final[Any] = {
    "font.size": 8,
    "legend.fontsize": 7,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "axes.axisbelow": True,
}


def check_suffix(path: Path) -> None:
    """Raise ConfigError unless matplotlib is there and can write a file of that name."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        message = "--plot needs matplotlib: pip install 'kvmpy[bench]'"
        raise ConfigError(message) from None
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise ConfigError(f"cannot plot into {path}: end its name in one of .{', .'.join(known)}")


def plot(measurements: Sequence[Measurement], environment: dict[str, Any], path: Path) -> None:
    """Draw all that was measured; the suffix of `path` chooses the format.

    It is one picture, but for a PDF of more than 12 operations, which has pages. Raises ConfigError
    where the file cannot be written.
    """
    import matplotlib as mpl

    by_operation: dict[str, list[Measurement]] = {}
    for one in measurements:
        if one.batches:
            by_operation.setdefault(one.case.operation, []).append(one)
    falls = waterfalls(measurements)
    if not by_operation:
        raise ConfigError(f"nothing was measured: there is nothing to plot into {path}")
    title, panels = _title(environment), list(by_operation.items())
    try:
        with mpl.rc_context(_FONT):
            if path.suffix.lower() == ".pdf" and len(panels) > _PAGE:
                _save_pages(path, title, panels, falls)
            else:
                figure(title, panels, falls).savefig(path, dpi=200)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _save_pages(path: Path, title: str, panels: _Panels, falls: Sequence[Waterfall]) -> None:
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(path) as pages:
        for at in range(0, len(panels), _PAGE):
            pages.savefig(figure(title, panels[at : at + _PAGE], ()))
        if falls:
            pages.savefig(figure(title, (), falls))


def figure(title: str, panels: _Panels, falls: Sequence[Waterfall]) -> Any:
    """A figure of a panel for each operation, and all waterfalls below them.

    A level has its style of line and a mode its colour, which are the same in all panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(_COLUMNS, len(panels)))
    rows = ceil(len(panels) / columns)
    below = 1.4 + 0.22 * len(falls) if falls else 0.0
    named = any(_label(one) for _, found in panels for one in found)
    width = _PANEL[0] * max(columns, 2) + _LEGEND * named
    height = _PANEL[1] * rows + below + 0.6
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    heights = [_PANEL[1]] * rows + [below] * bool(falls)
    grid = made.add_gridspec(len(heights), columns, height_ratios=heights)
    for at, (operation, found) in enumerate(panels):
        _ecdf(made.add_subplot(grid[at // columns, at % columns]), operation, found)
    _explain(made)
    if falls:
        _stacked(made.add_subplot(grid[rows, :]), falls)
    made.suptitle(title)
    return made


def _title(environment: dict[str, Any]) -> str:
    nested = ", nested" if environment["nested"] else ""
    versions = environment["versions"]
    return (
        f"Latencies under {environment['backend']}{nested}: {environment['cpu']}\n"
        f"Linux {environment['kernel']}, kvmpy {versions['kvmpy']}, {environment['date']}"
    )


def _label(one: Measurement) -> str:
    return ", ".join(word for word in (one.case.level, one.case.mode) if word != "-")


def _explain(made: Any) -> None:
    """One legend for all panels, beside them: in a panel it would hide curves."""
    found: dict[str, Any] = {}
    for axes in made.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, line)
    if found:
        made.legend(found.values(), found.keys(), loc="outside right upper")


def _ecdf(axes: Any, operation: str, measurements: Sequence[Measurement]) -> None:
    from matplotlib.ticker import NullLocator

    for one in measurements:
        colour, style = _COLOUR[one.case.mode], _STYLE[one.case.level]
        values = np.sort(one.samples)
        at = np.unique(np.linspace(0, len(values) - 1, min(_STEPS, len(values))).astype(int))
        shares = (at + 1) / len(values)
        options = {"color": colour, "label": _label(one), "lw": 1, "drawstyle": "steps-post"}
        axes.plot([values[0], *values[at]], [0, *shares], style, **options)
    axes.set_xscale("log")
    ends = [(one.quantile(0), one.quantile(_LAST)) for one in measurements]
    low, high = min(low for low, _ in ends) * 0.9, max(high for _, high in ends) * 1.1
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1)
    axes.set(
        title=operation,
        xlabel=f"latency [ns], log scale\nbeyond p{100 * _LAST:g} not shown",
        ylabel="share of samples",
    )
    axes.set_xticks(ticks(low, high))
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between them, such that their labels do not touch on a log scale.

    Decades where there are enough of them, else 1, 2 and 5 of each, else all digits, or equal steps
    where `high` is less than four times `low`: more would crowd on the right. Those are left out
    that lie too near to the one before.
    """
    first, last = floor(log10(low)), ceil(log10(high))
    decades = range(first, last + 1)
    choices: list[Sequence[int]] = [(1,), (1, 2, 5)]
    if high >= _WIDE * low:
        choices.append(range(1, 10))
    for digits in choices:
        found = [one * 10.0**ten for ten in decades for one in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) >= _TICKS[0]:
            return _apart(found, low, high)
    wide = (high - low) / (_TICKS[1] - 1)
    size = 10.0 ** floor(log10(wide))
    step = next(one * size for one in (1, 2, 5, 10) if one * size >= wide)
    found = [step * at for at in range(ceil(low / step), floor(high / step) + 1)]
    return _apart(found, low, high)


def _apart(values: Sequence[float], low: float, high: float) -> list[float]:
    """Those that have room for their labels."""
    longest = len(_plain(high, None))
    least = (log10(high) - log10(low)) * max(1 / _TICKS[1], _LETTER * longest)
    kept: list[float] = []
    for value in values:
        if not kept or log10(value) - log10(kept[-1]) >= least:
            kept.append(value)
    return kept


def _plain(value: float, _: object) -> str:
    return f"{value:,.0f}"


def _stacked(axes: Any, falls: Sequence[Waterfall]) -> None:
    names = [f"{fall.operation}, {fall.mode}" for fall in falls]
    left = np.zeros(len(falls))
    for at, part in enumerate(PARTS):
        widths = np.array([max(0.0, fall.parts.get(part, 0.0)) for fall in falls])
        if widths.any():
            axes.barh(names, widths, left=left, label=part, color=f"C{at}", height=0.7)
            left += widths
    axes.invert_yaxis()
    axes.set(
        xlabel="ns, differences of medians",
        title="Where it goes: an exit that a Python device serves",
    )
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside lower center", ncols=4)
    axes.grid(axis="x", alpha=0.3)
