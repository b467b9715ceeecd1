"""Interleaved measurement, and what it comes to.

The subject is measured beside its floor, round by round and in turn, so that whatever disturbs
the machine disturbs both. A round gives one figure (a ratio or a difference of that round's
two values); the median of the rounds is the result, and their least and greatest its spread.
"""

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import TypeAlias

__all__ = ["Prepared", "Row", "Spread", "Turn", "compare", "interleave"]

Turn: TypeAlias = Callable[[], float]
"""Takes one measurement."""

Prepared: TypeAlias = AbstractContextManager[Turn]
"""What a round needs: it makes machines and the like, and closes them."""


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True)
class Row:
    """One result. `subject` and `floor` are in `unit`, and `figure` is compared with `bound`.

    `kind` says what the figure is: "ratio" (subject over floor), "difference" (subject less
    floor, in `unit`), "value" (the subject itself) or "count". A row with a `note` and without
    a figure was not measured; one without a bound is there to be compared with.
    """

    name: str
    kind: str
    unit: str
    figure: Spread | None
    bound: float | None = None
    subject: Spread | None = None
    floor: Spread | None = None
    rounds: int = 0
    note: str = ""
    samples: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "met", "not met", "-" where there is no bound, or "not measured"."""
        if self.figure is None:
            return "not measured"
        if self.bound is None:
            return "-"
        return "met" if self.figure.median <= self.bound else "not met"


class collector_off(AbstractContextManager[None]):
    """Collect garbage, then keep the collector from running inside, as `timeit` does."""

    def __enter__(self) -> None:
        gc.collect()
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        if self._was_on:
            gc.enable()


def interleave(
    rounds: int, turns: int, subjects: Mapping[str, Callable[[], Prepared]]
) -> dict[str, list[float]]:
    """Each subject's values, one per round: the median of `turns` short turns.

    A round prepares all subjects anew, and then they take turns, each time starting with
    another one. A round's median keeps out what disturbs a single turn, such as another
    process that had the CPU.
    """
    names = list(subjects)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in names}
        with ExitStack() as stack:
            ready = {name: stack.enter_context(subjects[name]()) for name in names}
            stack.enter_context(collector_off())
            for turn in range(turns):
                first = (round_ + turn) % len(names)
                for name in names[first:] + names[:first]:
                    taken[name].append(ready[name]())
        for name in names:
            samples[name].append(median(taken[name]))
    return samples


_FIGURES: dict[str, Callable[[float, float], float]] = {
    "ratio": lambda subject, floor: subject / floor,
    "difference": lambda subject, floor: subject - floor,
    "value": lambda subject, floor: subject,
}


def compare(
    name: str,
    kind: str,
    unit: str,
    bound: float | None,
    *samples: list[float],
) -> Row:
    """The row for the subject's samples and, if they follow, the floor's, pair by pair."""
    subject, floor = samples[0], samples[1] if len(samples) > 1 else None
    pairs = zip(subject, subject if floor is None else floor, strict=True)
    return Row(
        name,
        kind,
        unit,
        Spread.of(_FIGURES[kind](*pair) for pair in pairs),
        bound,
        Spread.of(subject),
        None if floor is None else Spread.of(floor),
        len(subject),
        samples={"subject": subject} | ({} if floor is None else {"floor": floor}),
    )
