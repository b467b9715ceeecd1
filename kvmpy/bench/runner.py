"""Measuring a plan of cases: batches in random order, those of a case in processes of their own."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import FAILED, Batch, Case, Unmeasured
from kvmpy.bench.reference import baseline, disturbed
from kvmpy.bench.worker import frames, unpack
from kvmpy.errors import ConfigError
from kvmpy.kvm import backend, nested

__all__ = ["MOST_SAMPLES", "groups", "measure_cases", "pinning", "refuse_bad_numbers"]

WARMUP: Final = 100
DEADLINE: Final = 20.0
MOST_SAMPLES: Final = 1_000_000
"""How many samples a batch may have: more would not fit into memory everywhere."""
_EACH: Final = 0.0005  # seconds more for each sample, or else a large batch seems to hang
GROUP: Final = 24  # batches to a process, since starting one takes longer than most batches
_AGAIN: Final = 3  # how often disturbed batches are taken again
_STARTING: Final = 30.0  # seconds that a process may take beside its batches, on a busy machine


def pinning() -> tuple[int | None, int | None]:
    """The CPU to pin batches to, and that of a second thread where one is needed.

    They are the last and the first of those there are; None if there is but one.
    """
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[-1], allowed[0]) if len(allowed) > 1 else (None, None)


def refuse_bad_numbers(samples: object, batches: object) -> None:
    """Raise ConfigError for numbers of samples or batches that are none."""
    for what, number in (("samples", samples), ("batches", batches)):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"{number!r} {what}: give a whole number, at least 1")


def groups(cases: Sequence[Case], batches: int, seed: int, size: int = GROUP) -> list[list[Case]]:
    """Each case so many times, in random order, cut into groups that hold no case twice.

    A case may be in `cases` more than once: then it comes so many times as often.
    """
    chance = random.Random(seed)
    rounds: list[list[Case]] = []
    left = Counter({case: batches * count for case, count in Counter(cases).items()})
    while left := +left:  # a case comes once in each round, and groups end with the round
        order = list(left)
        chance.shuffle(order)
        rounds += [order[at : at + size] for at in range(0, len(order), size)]
        left.subtract(order)
    chance.shuffle(rounds)
    return rounds


def measure_cases(
    cases: Sequence[Case],
    samples: int,
    batches: int,
    *,
    seed: int = 0,
    tsc_hz: float | None = None,
    seconds: float = 300.0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Measurement]:
    """Measure each case in so many batches of so many samples; on Ctrl-C, what there is.

    Then cases without a batch are left out, and others are not `complete`.

    A batch that was disturbed (see `reference`) is taken again, up to three times, but none
    after so many `seconds`. `progress` is called with the number of batches done and that of
    all. A case of which a batch fails has that status and the reason, and costs no other.
    """
    refuse_bad_numbers(samples, batches)
    if samples > MOST_SAMPLES:
        raise ConfigError(f"{samples:,} samples: a batch has at most {MOST_SAMPLES:,}")
    cases = list(dict.fromkeys(cases))
    taken = _Taken(cases, samples, batches, progress)
    until = monotonic() + seconds
    with suppress(KeyboardInterrupt):
        taken.take(groups(cases, batches, seed))
        for again in range(_AGAIN):
            lacking = taken.disturbed()
            if not lacking:
                break
            taken.take(groups(lacking, 1, seed + 1 + again), until)
    return taken.measurements(tsc_hz)


class _Taken:
    """The batches taken so far, and the cases that turned out to have none here."""

    def __init__(
        self,
        cases: Sequence[Case],
        samples: int,
        batches: int,
        progress: Callable[[int, int], object],
    ) -> None:
        self._samples, self._batches, self._progress = samples, batches, progress
        self._found: dict[Case, list[Batch]] = {case: [] for case in cases}
        self._absent: dict[Case, Unmeasured] = {}
        self._quiet = 0.0

    def take(self, planned: Sequence[Sequence[Case]], until: float | None = None) -> None:
        """Take those groups; with `until`, in place of disturbed batches, up to that time."""
        total, done = sum(map(len, planned)), 0
        for group in planned:
            self._progress(done, total)
            if until is not None and monotonic() > until:
                return
            done += len(group)
            left = [one for one in group if one not in self._absent]
            for case, batch in _measured(left, self._samples):
                if isinstance(batch, Unmeasured):
                    self._absent[case] = batch
                elif until is None:
                    self._found[case].append(batch)
                else:
                    self._replace(case, batch)
        self._progress(total, total)

    def _replace(self, case: Case, batch: Batch) -> None:
        if disturbed(batch, self._quiet):
            return
        for at, old in enumerate(self._found[case]):
            if disturbed(old, self._quiet):
                self._found[case][at] = batch
                return

    def disturbed(self) -> list[Case]:
        """Each case as often as it has disturbed batches."""
        self._quiet = baseline(
            reading
            for found in self._found.values()
            for batch in found
            for reading in batch.reference
        )
        return [
            case
            for case, found in self._found.items()
            for batch in found
            if disturbed(batch, self._quiet)
        ]

    def measurements(self, tsc_hz: float | None) -> list[Measurement]:
        """What there is, in the order of the cases."""
        self.disturbed()
        made = []
        under = backend() + ", nested" * nested()
        for case, found in self._found.items():
            if case in self._absent:
                why = self._absent[case]
                made.append(Measurement(case, (), why.status, why.reason, backend=under))
            elif found:
                for batch in found:
                    batch.disturbed = disturbed(batch, self._quiet)
                made.append(
                    Measurement(case, found, tsc_hz=tsc_hz, wanted=self._batches, backend=under)
                )
        return made


def _measured(group: Sequence[Case], samples: int) -> list[tuple[Case, Batch | Unmeasured]]:
    """A batch of each case, in one process; in another one those after a case that ended it."""
    results: list[tuple[Case, Batch | Unmeasured]] = []
    while len(results) < len(group):
        left = group[len(results) :]
        output, why = _process(left, samples)
        for case, (facts, data) in zip(left, frames(output), strict=False):
            absent = Unmeasured(facts["status"], facts["reason"]) if facts else None
            results.append((case, absent or unpack(case, data)))
        if len(results) < len(group):
            case = group[len(results)]
            status = "hangs here" if "did not end" in why else FAILED
            results.append((case, Unmeasured(status, why or "its process said nothing")))
    return results


def _process(group: Sequence[Case], samples: int) -> tuple[bytes, str]:
    """What a worker wrote, and what became of it unless it did its work."""
    cpu, helper_cpu = pinning()
    deadline = DEADLINE + samples * _EACH
    jobs = [
        {
            "operation": case.operation,
            "level": case.level,
            "mode": case.mode,
            "count": samples,
            "warmup": WARMUP,
            "deadline": deadline,
            "cpu": cpu,
            "helper_cpu": helper_cpu,
        }
        for case in group
    ]
    command = [sys.executable, "-m", "kvmpy.bench.worker", json.dumps(jobs)]
    limit = deadline * len(jobs) + _STARTING
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as expired:
        return expired.stdout or b"", f"its process did not end in {limit:g} s"
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
        return done.stdout, f"its process ended with status {done.returncode}: {last[0]}"
    return done.stdout, ""
