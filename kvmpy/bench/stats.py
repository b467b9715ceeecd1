"""Statistics of latencies: quantiles, and intervals that respect how samples were taken."""

from collections.abc import Sequence

import numpy as np

from kvmpy.bench.model import Floats

__all__ = ["QUANTILES", "block_medians", "bootstrap_median", "mad", "relative_spread"]

QUANTILES = (0.5, 0.9, 0.99, 0.999)
_BLOCKS = 20
_RESAMPLES = 2000


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
