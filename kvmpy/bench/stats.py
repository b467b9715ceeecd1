"""Statistics of latencies: quantiles, and intervals that respect how samples were taken."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from kvmpy.bench.model import Floats

__all__ = [
    "QUANTILES",
    "block_medians",
    "bootstrap_median",
    "mad",
    "median_interval",
    "relative_spread",
]

QUANTILES = (0.5, 0.9, 0.99, 0.999)
_BLOCKS = 20
_RESAMPLES = 2000
_SURELY_WITHIN = 4  # batches, of which the median is within what they have: it costs no coverage
_FEW = 10  # of fewer batches the bootstrap knows too little: it covers 84 to 94% instead of 95%


def mad(samples: Floats) -> float:
    """The median absolute deviation from the median, unscaled."""
    return float(np.median(np.abs(samples - np.median(samples))))


def relative_spread(medians: Sequence[float]) -> float:
    """How far apart the batches' medians lie: all but the outer tenths, to the middle one."""
    if not medians:
        return 0.0
    low, middle, high = np.quantile(medians, (0.1, 0.5, 0.9))
    return float((high - low) / middle)


def block_medians(samples: Floats) -> Floats:
    """The medians of up to 20 blocks of consecutive samples: what a batch is compared by."""
    blocks = np.array_split(samples, min(_BLOCKS, len(samples)))
    return np.array([np.median(block) for block in blocks])


def median_interval(batches: Sequence[Floats], confidence: float = 0.95) -> tuple[float, float]:
    """An interval of the median, at least as wide as the number of batches calls for.

    It is `bootstrap_median`'s, widened by sqrt(n / (n - 1)), since resampled batches differ by so
    much less than new ones would. With fewer than 10 batches it also holds Student's interval of
    the mean of the batches' medians. That of one batch is within it only: what other processes
    would give it cannot know. That of 4 and more is within the range of the samples.
    """
    low, high = bootstrap_median(batches, confidence)
    count = len(batches)
    if count < 2:
        return low, high
    middle, wider = float(np.median(np.concatenate(batches))), sqrt(count / (count - 1))
    low, high = middle - (middle - low) * wider, middle + (high - middle) * wider
    if count < _FEW:
        medians = [float(np.median(batch)) for batch in batches]
        mean = float(np.mean(medians))
        half = _student(count - 1, (1 + confidence) / 2) * float(np.std(medians, ddof=1))
        half /= sqrt(count)
        low, high = min(low, mean - half), max(high, mean + half)
    if count >= _SURELY_WITHIN:
        return max(low, min(map(np.min, batches))), min(high, max(map(np.max, batches)))
    return max(low, 0.0), high  # no latency is negative


def _student(freedom: int, p: float) -> float:
    """The quantile `p` of Student's distribution, whose density is that of
    sqrt(freedom) * tan(angle), the angle's being cos(angle) ** (freedom - 1)."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    heights = np.abs(np.cos(angles)) ** (freedom - 1)
    share = np.cumsum(heights[1:] + heights[:-1])
    return sqrt(freedom) * float(np.tan(np.interp(p, share / share[-1], angles[1:])))


def bootstrap_median(
    batches: Sequence[Floats], confidence: float = 0.95, seed: int = 1
) -> tuple[float, float]:
    """A bootstrap interval of the median, in two stages: batches, then blocks of each.

    Samples that follow each other are alike, and so are those of one process; to resample them
    one by one would promise far too much. Consecutive samples are cut into 20 blocks a batch,
    each stands in by its median, and batches and blocks are drawn with replacement.
    """
    blocks = np.array(
        [block_medians(batch) for batch in batches]
        if min(len(batch) for batch in batches) >= _BLOCKS
        else [[np.median(batch)] for batch in batches]
    )
    count, width = blocks.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(count, size=(_RESAMPLES, count, 1))
    within = random.integers(width, size=(_RESAMPLES, count, width))
    medians = np.median(blocks[chosen, within].reshape(_RESAMPLES, -1), axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)
