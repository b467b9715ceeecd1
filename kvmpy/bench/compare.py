"""Two results, compared: what got faster, what slower, and where no difference is seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvmpy.bench.model import Case, Floats
from kvmpy.bench.ranks import batches_needed, effective_size, holm, rank_test
from kvmpy.bench.reference import baseline
from kvmpy.errors import ConfigError

__all__ = ["LEVEL", "TOO_FEW", "Comparison", "compare", "reference_change", "refuse_unlike"]

LEVEL: Final = 0.01
"""How likely any comparison of a run may be to find a difference where there is none."""

TOO_FEW: Final = "too few batches"
"""How the verdict begins where no difference, however large, could have been found."""

_RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Comparison:
    """A case in both results. `ratio` is the second's median to the first's, with a 95% interval.

    Each batch counts in units of what the reference took around it (see `kvmpy.bench.reference`);
    `raw_ratio` is that of the medians in ns.

    `chance` is the rank test's, corrected for the number of comparisons. `effective` are the two
    sides' numbers of samples, taken for as many as they are worth (`ranks.effective_size`).
    """

    case: Case
    ratio: float
    raw_ratio: float
    interval: tuple[float, float]
    chance: float
    effective: tuple[float, float]
    samples: tuple[int, int]
    verdict: str


@dataclass(frozen=True, slots=True)
class _Side:
    blocks: list[Floats]
    medians: Floats
    raw: Floats
    samples: int


def refuse_unlike(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Raise ConfigError for results of unlike backends, or of a nested host and one that is not."""
    for name, what in (("backend", "backends"), ("nested", "nesting")):
        one, other = (str(document["environment"].get(name)) for document in (first, second))
        if one != other:
            raise ConfigError(
                f"results of unlike {what} ({one} and {other}) are not comparable; "
                "--across-backends compares them all the same, and says so"
            )


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Comparison]:
    """Compare each case that both documents have measured, in the first one's order.

    Raises ConfigError where there is none.
    """
    before, after = _sides(first), _sides(second)
    cases = [case for case in before if case in after]
    if not cases:
        raise ConfigError("the two results have no measured case in common")
    chances = holm([rank_test(before[case].blocks, after[case].blocks) for case in cases])
    needed = batches_needed(len(cases), LEVEL)
    return [
        _comparison(case, before[case], after[case], chance, needed)
        for case, chance in zip(cases, chances, strict=True)
    ]


def _sides(document: dict[str, Any]) -> dict[Case, _Side]:
    return {
        Case(one["operation"], one["level"], one["mode"]): _side(one["batches"])
        for one in document["measurements"]
        if one["batches"]
    }


def _side(batches: Sequence[dict[str, Any]]) -> _Side:
    """All batches, each by what its reference took: what slowed down both takes itself off."""
    units = [float(np.mean(batch["reference"] or 1.0)) for batch in batches]
    return _Side(
        [np.array(b["blocks"], np.float64) / unit for b, unit in zip(batches, units, strict=True)],
        np.array([b["median"] / unit for b, unit in zip(batches, units, strict=True)]),
        np.array([b["median"] for b in batches], np.float64),
        sum(batch["count"] for batch in batches),
    )


def _comparison(case: Case, before: _Side, after: _Side, chance: float, needed: int) -> Comparison:
    ratio = float(np.median(after.medians) / np.median(before.medians))
    if chance <= LEVEL:
        verdict = "slower" if ratio > 1 else "faster"
    elif min(len(before.blocks), len(after.blocks)) < needed:
        verdict = f"{TOO_FEW}: {needed} of each could tell"
    else:
        verdict = "no difference seen"
    return Comparison(
        case,
        ratio,
        float(np.median(after.raw) / np.median(before.raw)),
        _interval(before.medians, after.medians),
        chance,
        (_effective(before), _effective(after)),
        (before.samples, after.samples),
        verdict,
    )


def _effective(side: _Side) -> float:
    return effective_size(side.blocks, side.samples)


def _interval(before: Floats, after: Floats) -> tuple[float, float]:
    """A bootstrap interval of the ratio, batches drawn with replacement.

    Each side's medians are drawn apart by sqrt(n / (n - 1)), as in `stats.median_interval`.
    """
    random = np.random.default_rng(1)
    drawn = []
    for side in (before, after):
        count, middle = len(side), np.median(side)
        medians = np.median(side[random.integers(count, size=(_RESAMPLES, count))], axis=1)
        apart = (medians / middle) ** np.sqrt(count / max(1, count - 1))  # stays positive
        drawn.append(middle * apart)
    low, high = np.quantile(drawn[1] / drawn[0], (0.025, 0.975))
    return float(low), float(high)


def reference_change(first: dict[str, Any], second: dict[str, Any]) -> float:
    """How many times as long the reference took in the second result (see `reference`)."""
    before, after = (
        baseline(
            reading
            for one in document["measurements"]
            for batch in one["batches"]
            for reading in batch["reference"]
        )
        for document in (first, second)
    )
    return after / before if before and after else 1.0
