"""One case, measured: its batches, their statistics, and how they look."""

from collections.abc import Sequence
from functools import cached_property
from html import escape
from typing import Any, Final

import numpy as np

from kvmpy.bench.model import Batch, Case, Floats
from kvmpy.bench.reference import quiet_ones
from kvmpy.bench.stats import QUANTILES, mad, median_interval, relative_spread
from kvmpy.errors import ConfigError

__all__ = ["ENOUGH_BEYOND", "Measurement"]

DISAGREEMENT: Final = 0.10
FEW_SAMPLES: Final = 1000
ENOUGH_BEYOND: Final = 10
"""As many samples are to lie beyond a quantile for it to be given without a question mark."""

# The units in a summary; what is not here is in ns.
_UNITS: Final = {
    "count": "samples",
    "per_sample": "operations",
    "cycles": "TSC cycles",
    "spread": "of the median",
    "disturbed": "batches",
}


class Measurement:
    """A case and its batches; or the `status` and the `reason` why there are none."""

    def __init__(
        self,
        case: Case,
        batches: Sequence[Batch] = (),
        status: str = "measured",
        reason: str = "",
        *,
        tsc_hz: float | None = None,
        wanted: int | None = None,
        backend: str = "",
    ) -> None:
        self.case, self.status, self.reason = case, status, reason
        self.all_batches = list(batches)
        """Those that were disturbed among them."""
        self.batches = quiet_ones(self.all_batches, (one.disturbed for one in self.all_batches))
        """Those that the statistics are of: the quiet ones (see `reference.quiet_ones`)."""
        self.tsc_hz = tsc_hz
        self.backend = backend
        """The KVM that it was measured under, and whether nested; "" where none is known."""
        self.wanted = len(self.all_batches) if wanted is None else wanted
        """How many batches were asked for: there are fewer where the run was interrupted."""

    @cached_property
    def samples(self) -> Floats:
        """The samples, in ns, batch after batch."""
        if not self.batches:
            return np.zeros(0)
        return np.concatenate([batch.samples for batch in self.batches])

    @property
    def per_sample(self) -> int:
        """How many operations a sample is the mean of; percentiles are then those of means."""
        proof: dict[str, int] = dict(self.batches[0].proof) if self.batches else {}
        return proof.get("elements", proof.get("per_sample", 1))

    def beyond(self, p: float) -> int:
        """How many samples lie beyond the quantile `p`: of fewer than 10 it says little."""
        return round(len(self.samples) * (1 - p))

    def unsure(self) -> list[str]:
        """The names of those quantiles of the summary that have too few samples beyond them."""
        return [f"p{100 * p:g}" for p in QUANTILES if self.beyond(p) < ENOUGH_BEYOND]

    @property
    def disturbed(self) -> int:
        """How many batches were disturbed."""
        return sum(batch.disturbed for batch in self.all_batches)

    def quantile(self, p: float) -> float:
        """The quantile `p` (0 to 1) of all samples, in ns.

        Raises ConfigError where there are none, and for another `p`: it is no percentage.
        """
        self._need_samples()
        if not (isinstance(p, float | int | np.number) and 0 <= p <= 1):
            raise ConfigError(f"no quantile {p!r}: give 0 to 1, as 0.99 for p99")
        return float(np.quantile(self.samples, p))

    @property
    def median(self) -> float:
        """The median of all samples, in ns."""
        return self.quantile(0.5)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """An interval of the median, in ns (see `stats.median_interval`).

        Raises ConfigError where there are no samples, and for a `confidence` that is no share.
        """
        self._need_samples()
        if not (isinstance(confidence, float | int | np.number) and 0 < confidence < 1):
            raise ConfigError(
                f"no interval of {confidence!r}: give a share between 0 and 1, as 0.95 for 95%"
            )
        return median_interval([batch.samples for batch in self.batches], confidence)

    def _need_samples(self) -> None:
        if not self.batches:
            raise ConfigError(f"there are no samples of {self.case}: {self.status}: {self.reason}")

    @property
    def spread(self) -> float:
        """How far apart the batches' medians lie (see `stats.relative_spread`)."""
        return relative_spread([float(np.median(batch.samples)) for batch in self.batches])

    @property
    def guest_median(self) -> float | None:
        """The median by the guest's own TSC, fenced, in ns; None where there is none."""
        stamps = [batch.guest for batch in self.batches if len(batch.guest)]
        if not stamps or not self.tsc_hz:
            return None
        ticks = np.diff(np.concatenate(stamps).astype(np.int64), axis=1)
        return float(np.median(ticks)) * 1e9 / self.tsc_hz

    def overhead(self, name: str) -> float | None:
        """The median over the batches of one of `Batch.overhead`, in ns; None where none is."""
        values = [batch.overhead[name] for batch in self.batches if name in batch.overhead]
        return float(np.median(values)) if values else None

    def interference(self) -> dict[str, int]:
        """What disturbed the batches, added up."""
        names = {name for batch in self.batches for name in batch.interference}
        return {
            name: sum(batch.interference.get(name, 0) for batch in self.batches)
            for name in sorted(names)
        }

    @property
    def complete(self) -> bool:
        """Whether there are all batches that were asked for, or there can be none."""
        return not self.all_batches or len(self.all_batches) >= self.wanted

    @property
    def flags(self) -> list[str]:
        """What to beware of, in words."""
        words = []
        if not self.complete:
            words.append(f"interrupted: {len(self.all_batches)} of {self.wanted} batches")
        if len(self.batches) == 1:
            words.append("one batch: the interval is within it only")
        if len(self.batches) > 1 and self.spread > DISAGREEMENT:
            words.append(f"runs disagree by {self.spread:.0%}")
        if self.batches and len(self.samples) < FEW_SAMPLES:
            words.append("few samples")
        if self.per_sample > 1:
            words.append(f"percentiles of means of {self.per_sample}")
        if self.disturbed:
            aside = ", and set aside" if len(self.batches) < len(self.all_batches) else ""
            words.append(f"{self.disturbed} of {len(self.all_batches)} batches disturbed{aside}")
        stolen = self.interference().get("steal_ticks", 0)
        if stolen:
            words.append(f"{stolen} ticks stolen by the host")
        return words

    def summary(self) -> dict[str, Any]:
        """The statistics by name; times in ns, and the median in TSC cycles as well."""
        if not self.batches:
            return {}
        low, high = self.interval()
        quantiles = {f"p{100 * p:g}": self.quantile(p) for p in QUANTILES}
        cycles = None if self.tsc_hz is None else quantiles["p50"] * self.tsc_hz / 1e9
        return {
            "count": len(self.samples),
            "per_sample": self.per_sample,
            "min": float(self.samples.min()),
            **quantiles,
            "max": float(self.samples.max()),
            "mad": mad(self.samples),
            "interval": [low, high],
            "cycles": cycles,
            "spread": self.spread,
            "disturbed": self.disturbed,
            "clock": self.overhead("clock"),
            "loop": self.overhead("loop"),
            "guest": self.guest_median,
            "tsc": self.overhead("tsc"),
        }

    def __str__(self) -> str:
        if not self.batches:
            return f"{self.case}: {self.status}: {self.reason}"
        low, high = self.interval()
        last = f"p99 {self.quantile(0.99):,.0f} ns, " if self.beyond(0.99) >= ENOUGH_BEYOND else ""
        return (
            f"{self.case}: median {self.median:,.0f} ns [{low:,.0f}, {high:,.0f}], "
            f"{last}{len(self.samples)} samples"
        )

    def __repr__(self) -> str:
        flags = "".join(f"; {flag}" for flag in self.flags)
        return f"<Measurement {self}{self._under}{flags}>"

    @property
    def _under(self) -> str:
        return f", under {self.backend}" if self.backend else ""

    def __rich__(self) -> str:
        return str(self).replace("[", r"\[")

    def _repr_html_(self) -> str:
        unsure = self.unsure()
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(_shown(value))}{'?' * (name in unsure)}</td>"
            f"<td>{_UNITS.get(name, 'ns')}</td></tr>"
            for name, value in self.summary().items()
            if value is not None
        )
        words = "; ".join((f"{self}{self._under}", *self.flags))
        return f"<table><caption>{escape(words)}</caption>{rows}</table>"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, list):
        return " to ".join(_shown(item) for item in value)
    return str(value)
