"""Where each nanosecond of an exit goes: differences between its levels, one below the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import Case

__all__ = ["PARTS", "Waterfall", "table", "waterfalls"]

PARTS: Final[Mapping[str, str]] = {
    "guest loop": "g",
    "guest to KVM": "k",
    "KVM to user space and back": "u",
    "guest to user space and back": "s",
    "C loop": "c",
    "Python dispatch": "p",
    "device": "d",
}
"""The parts of an exit that a Python device serves, in order, and the letter of each in a bar."""

_BAR: Final = 40


@dataclass(frozen=True, slots=True)
class Waterfall:
    """An operation in a mode; `parts` are ns by the names of `PARTS`, as many as were measured.

    They add up to the median of the slowest level. A part is a difference of medians, so noise can
    make a small one negative.
    """

    operation: str
    mode: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All parts together, in ns."""
        return sum(self.parts.values())

    def bar(self) -> str:
        """The parts as letters, in proportion."""
        whole = sum(max(0.0, part) for part in self.parts.values())
        letters, done = "", 0.0
        for name, part in self.parts.items():
            done += max(0.0, part)
            letters += PARTS[name] * (round(_BAR * done / whole) - len(letters))
        return letters


def waterfalls(measurements: Sequence[Measurement]) -> list[Waterfall]:
    """One for each operation and mode that was measured in C and in Python."""
    found = {one.case: one for one in measurements if one.batches}
    made = []
    for case, in_c in found.items():
        python = found.get(Case(case.operation, "python", case.mode))
        if case.level == "c" and python is not None:
            kernel = found.get(Case(case.operation, "kernel", case.mode))
            made.append(Waterfall(case.operation, case.mode, _parts(kernel, in_c, python)))
    return made


def _parts(kernel: Measurement | None, in_c: Measurement, python: Measurement) -> dict[str, float]:
    loop = in_c.overhead("loop") or 0.0
    outside = in_c.overhead("outside") or 0.0
    device = python.overhead("device") or 0.0
    if kernel is None:
        way = {"guest to user space and back": in_c.median - outside - loop}
    else:
        way = {
            "guest to KVM": kernel.median - loop,
            "KVM to user space and back": in_c.median - outside - kernel.median,
        }
    return {
        "guest loop": loop,
        **way,
        "C loop": outside,
        "Python dispatch": python.median - in_c.median - device,
        "device": device,
    }


def table(falls: Sequence[Waterfall]) -> Any:
    """A rich table: a row for each, the parts in ns, and a bar of their letters."""
    from rich.table import Table

    names = [name for name in PARTS if any(name in fall.parts for fall in falls)]
    made = Table(
        title="Where it goes: ns of an exit that a Python device serves",
        caption="differences of medians, without an interval; "
        + "guest to KVM contains a 64th of an exit to user space; " * ("guest to KVM" in names)
        + ", ".join(f"{PARTS[name]} {name}" for name in names),
    )
    for column in ("operation", "mode"):
        made.add_column(column, no_wrap=True)
    for name in (*names, "total"):
        made.add_column(name, justify="right")
    made.add_column("", no_wrap=True)
    for fall in falls:
        numbers = (f"{fall.parts[name]:,.0f}" if name in fall.parts else "-" for name in names)
        made.add_row(fall.operation, fall.mode, *numbers, f"{fall.total:,.0f}", fall.bar())
    return made
