"""Plots for a paper: an ECDF of each operation, and waterfalls, by matplotlib."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.waterfall import PARTS, Waterfall, waterfalls
from kvmpy.errors import ConfigError

__all__ = ["check_suffix", "plot"]

_COLUMNS: Final = 3
_PANEL: Final = (3.4, 2.5)  # inches, a column of a paper
_STEPS: Final = 400  # points of a curve: a file of every sample would be large and look the same
_STYLE: Final = {"kernel": ":", "c": "-", "python": "--", "-": "-"}
_FONT: Final[Any] = {
    "font.size": 7,
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

    Raises ConfigError where the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_operation: dict[str, list[Measurement]] = {}
    for one in measurements:
        if one.batches:
            by_operation.setdefault(one.case.operation, []).append(one)
    falls = waterfalls(measurements)
    if not by_operation:
        raise ConfigError(f"nothing was measured: there is nothing to plot into {path}")
    columns = min(_COLUMNS, len(by_operation))
    rows = ceil(len(by_operation) / columns)
    below = 0.8 + 0.22 * len(falls) if falls else 0.0
    with mpl.rc_context(_FONT):
        width, height = _PANEL[0] * max(columns, 2), _PANEL[1] * rows + below + 0.6
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            rows + bool(falls),
            columns,
            height_ratios=[_PANEL[1]] * rows + [below] * bool(falls),
        )
        for at, (operation, found) in enumerate(by_operation.items()):
            _ecdf(figure.add_subplot(grid[at // columns, at % columns]), operation, found)
        if falls:
            _stacked(figure.add_subplot(grid[rows, :]), falls)
        figure.suptitle(_title(environment))
        try:
            figure.savefig(path, dpi=200)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _title(environment: dict[str, Any]) -> str:
    nested = ", nested" if environment["nested"] else ""
    return f"Latencies under {environment['backend']}{nested}: {environment['cpu']}"


def _ecdf(axes: Any, operation: str, measurements: Sequence[Measurement]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    shares = np.linspace(0, 1, _STEPS)
    modes = list(dict.fromkeys(one.case.mode for one in measurements))
    for one in measurements:
        label = ", ".join(word for word in (one.case.level, one.case.mode) if word != "-")
        colour = f"C{modes.index(one.case.mode)}"
        style = _STYLE[one.case.level]
        axes.plot(np.quantile(one.samples, shares), shares, style, color=colour, label=label, lw=1)
    axes.set_xscale("log")
    # The last thousandth would squeeze all the rest together.
    ends = [(one.quantile(0), one.quantile(0.999)) for one in measurements]
    axes.set_xlim(min(low for low, _ in ends) * 0.9, max(high for _, high in ends) * 1.1)
    axes.set_ylim(0, 1)
    axes.set(title=operation, xlabel="ns", ylabel="share of samples")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    if any(one.case.level != "-" or one.case.mode != "-" for one in measurements):
        axes.legend(fontsize=5, loc="lower right")


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
    axes.set(xlabel="ns", title="Where it goes: an exit that a Python device serves")
    axes.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(axis="x", alpha=0.3)
