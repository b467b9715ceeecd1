"""The table of a comparison, in the terminal."""

from collections.abc import Sequence
from typing import Any

from kvmpy.bench.compare import Comparison
from kvmpy.bench.told import changes

__all__ = ["table"]


def table(comparisons: Sequence[Comparison], first: dict[str, Any], second: dict[str, Any]) -> Any:
    """A rich table of them; `first` and `second` are the two results."""
    from rich.table import Table

    one, other = (document["environment"]["backend"] for document in (first, second))
    unlike = one != other
    backends = f"{one} against {other}" if unlike else one
    differing = [
        f"{name}: {before} -> {after}" for name, (before, after) in changes(first, second).items()
    ]
    made = Table(
        title="\n".join([f"Second result against the first, under {backends}", *differing]),
        caption="ratio of medians, each batch by its reference, and its 95% interval; raw: of "
        "medians in ns; chance: rank test of batches, corrected for "
        f"{len(comparisons)} comparisons; effective: what samples are worth",
    )
    for name in ("operation", "level", "mode"):
        made.add_column(name, no_wrap=True)
    for name in ("ratio", "interval", "raw", "chance", "effective", "samples"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("verdict")
    for row in comparisons:
        low, high = row.interval
        made.add_row(
            row.case.operation,
            row.case.level,
            row.case.mode,
            f"{row.ratio:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{row.raw_ratio:.3f}",
            f"{row.chance:.2g}",
            " / ".join(f"{size:,.0f}" for size in row.effective),
            " / ".join(f"{count:,}" for count in row.samples),
            row.verdict + (f" ({backends})" if unlike else ""),
        )
    return made
