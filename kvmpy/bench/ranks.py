"""A rank test of two sets of batches, and its correction for many comparisons.

Samples that follow each other resemble each other, and those of one process still more, so the
unit is the batch: each has the mean rank of its blocks among all blocks of both sides, and the
test is the exact permutation test of which batches are whose (R. A. Fisher 1935; for clustered
data, B. Rosner et al., Biometrics 59, 2003). It assumes nothing of how latencies are distributed.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb
from typing import Final

import numpy as np

from kvmpy.bench.model import Floats

__all__ = ["batches_needed", "effective_size", "holm", "rank_test"]

_EXACT: Final = 200_000  # arrangements that are all looked at; of more, so many at random
_SEED: Final = 1


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[which], dtype=np.float64)


@lru_cache(maxsize=8)
def _arrangements(total: int, chosen: int) -> tuple[Floats, bool]:
    """Ways to choose which batches are the first side's, a row of ones and zeros for each.

    And whether they are all there are. Of sides of one size each is there but once, since to
    exchange the sides changes nothing.
    """
    complete = comb(total, chosen) <= _EXACT
    if complete:
        rows = np.array(list(combinations(range(total), chosen)))
        if 2 * chosen == total:
            rows = rows[: len(rows) // 2]
    else:
        random = np.random.default_rng(_SEED)
        rows = np.argsort(random.random((_EXACT, total)), axis=1)[:, :chosen]
    mask = np.zeros((len(rows), total))
    np.put_along_axis(mask, rows, 1.0, axis=1)
    return mask, complete


def rank_test(first: Sequence[Floats], second: Sequence[Floats]) -> float:
    """How likely two sides that do not differ are to look as different as these, either way.

    Each side is a list of batches, a batch a list of block medians.
    """
    batches = [*first, *second]
    ends = np.cumsum([0, *map(len, batches)])
    ranks = _ranks(np.concatenate(batches))
    means = np.array([ranks[a:b].mean() for a, b in pairwise(ends)])
    # So that an arrangement counts as far out as its mirror image, whatever the sides' sizes.
    means -= means.mean()
    rows, complete = _arrangements(len(batches), len(first))
    sums = np.abs(rows @ means)
    seen = abs(means[: len(first)].sum())
    found = int((sums >= seen * (1 - 1e-9)).sum())
    return found / len(rows) if complete else (found + 1) / (len(rows) + 1)


def holm(chances: Sequence[float]) -> list[float]:
    """The chances, corrected so that any of them is below a level by accident at that level.

    S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    corrected, largest = [0.0] * len(chances), 0.0
    for done, at in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = max(largest, min(1.0, chances[at] * (len(chances) - done)))
        corrected[at] = largest
    return corrected


def batches_needed(comparisons: int, level: float) -> int:
    """The least number of batches of each side with which a difference can be found at all."""
    return next(n for n in range(2, 100) if 2 / comb(2 * n, n) * comparisons <= level)


def effective_size(batches: Sequence[Floats], samples: int) -> float:
    """How many independent samples would say as much about the median as these batches do.

    The variance between batches is compared with that within them (analysis of variance): it is
    `samples` where batches differ no more than chance has it, and the number of batches at least.
    """
    if len(batches) < 2 or min(map(len, batches)) < 2:
        return float(len(batches))
    within = float(np.mean([np.var(batch, ddof=1) / len(batch) for batch in batches]))
    between = float(np.var([np.mean(batch) for batch in batches], ddof=1))
    if not between:
        return float(samples)
    return min(float(samples), max(len(batches), samples * within / between))
