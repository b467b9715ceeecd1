"""The table in the terminal."""

from collections.abc import Sequence
from typing import Any, Final

from kvmpy.bench.measurement import Measurement

__all__ = ["table"]

# Columns, and what of the summary is in them; the first two are put together.
_NUMBERS: Final = {
    "median": "",
    "interval": "",
    "p99": "p99",
    "p99.9": "p99.9",
    "cycles": "cycles",
    "clock": "clock",
    "loop": "loop",
    "in guest": "guest",
    "tsc": "tsc",
    "samples": "count",
}


def table(measurements: Sequence[Measurement], environment: dict[str, Any]) -> Any:
    """A rich table: median with its interval, p99, cycles, and what measuring costs."""
    from rich.table import Table

    nested = ", nested" if environment["nested"] else ""
    versions = environment["versions"]
    made = Table(
        title=f"Exit latencies under {environment['backend']}{nested}: {environment['cpu']}, "
        f"Linux {environment['kernel']}, kvmpy {versions['kvmpy']}, {environment['date']}",
        caption="ns; median with its 95% interval; ?: fewer than 10 samples lie beyond; cycles: "
        "the TSC's; clock and loop, where given, are part of the median, not taken off; "
        "in guest: by the guest's own TSC, where tsc is part of it",
    )
    for name in ("operation", "level", "mode"):
        made.add_column(name, no_wrap=True)
    for name in _NUMBERS:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("notes")
    for one in measurements:
        case = (one.case.operation, one.case.level, one.case.mode)
        summary = one.summary()
        if not summary:
            made.add_row(*case, *[""] * len(_NUMBERS), f"{one.status}: {one.reason}")
            continue
        low, high = summary["interval"]
        names = [name for name in _NUMBERS.values() if name]
        unsure = one.unsure()
        made.add_row(
            *case,
            _number(summary["p50"]),
            f"{_number(low)} .. {_number(high)}",
            *(_number(summary[name]) + "?" * (name in unsure) for name in names),
            "; ".join(one.flags),
        )
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
