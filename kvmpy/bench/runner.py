"""Measuring a plan of cases: batches in random order, those of a case in processes of their own."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import Batch, Case, Unmeasured
from kvmpy.bench.worker import frames, unpack
from kvmpy.errors import ConfigError, HostError

__all__ = ["groups", "measure_cases", "pinning"]

WARMUP: Final = 200
DEADLINE: Final = 20.0
GROUP: Final = 8  # batches to a process, since starting one takes longer than most batches
_STARTING: Final = 30.0  # seconds that a process may take beside its batches, on a busy machine


def pinning() -> int | None:
    """The CPU to pin batches to: the last of those there are, None if there is but one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1] if len(allowed) > 1 else None


def groups(cases: Sequence[Case], batches: int, seed: int, size: int = GROUP) -> list[list[Case]]:
    """Each case so many times, in random order, cut into groups that hold no case twice."""
    chance = random.Random(seed)
    rounds: list[list[Case]] = []
    for _ in range(batches):  # a case comes once in each round, and groups end with the round
        order = list(cases)
        chance.shuffle(order)
        rounds += [order[at : at + size] for at in range(0, len(order), size)]
    chance.shuffle(rounds)
    return rounds


def measure_cases(
    cases: Sequence[Case],
    samples: int,
    batches: int,
    *,
    seed: int = 0,
    tsc_hz: float | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Measurement]:
    """Measure each case in so many batches of so many samples; on Ctrl-C, what there is.

    `progress` is called with the number of batches done and that of all. Raises HostError
    where measuring itself fails.
    """
    if samples < 1 or batches < 1:
        raise ConfigError(f"{samples} samples in {batches} batches: give at least 1 of each")
    cases = list(dict.fromkeys(cases))
    found: dict[Case, list[Batch]] = {case: [] for case in cases}
    absent: dict[Case, Unmeasured] = {}
    total, done, cpu = len(cases) * batches, 0, pinning()
    try:
        for group in groups(cases, batches, seed):
            progress(done, total)
            done += len(group)
            for case, batch in _measured([one for one in group if one not in absent], samples, cpu):
                if isinstance(batch, Batch):
                    found[case].append(batch)
                else:
                    absent[case] = batch
        progress(total, total)
    except KeyboardInterrupt:
        pass
    measured = []
    for case in cases:
        if case in absent:
            why = absent[case]
            measured.append(Measurement(case, (), why.status, why.reason))
        elif found[case]:
            measured.append(Measurement(case, found[case], tsc_hz=tsc_hz))
    return measured


def _measured(
    group: Sequence[Case], samples: int, cpu: int | None
) -> list[tuple[Case, Batch | Unmeasured]]:
    """A batch of each case, in one process; in another one those after a case that ended it."""
    results: list[tuple[Case, Batch | Unmeasured]] = []
    while len(results) < len(group):
        left = group[len(results) :]
        output, why = _process(left, samples, cpu)
        for case, (facts, data) in zip(left, frames(output), strict=False):
            if "error" in facts:
                raise HostError(f"measuring {case} failed: {facts['error']}")
            absent = Unmeasured(facts["status"], facts["reason"]) if facts else None
            results.append((case, absent or unpack(case, data)))
        if len(results) < len(group):
            case = group[len(results)]
            if "did not end" not in why:
                raise HostError(f"measuring {case} failed: {why or 'its process said nothing'}")
            results.append((case, Unmeasured("hangs here", why)))
    return results


def _process(group: Sequence[Case], samples: int, cpu: int | None) -> tuple[bytes, str]:
    """What a worker wrote, and what became of it unless it did its work."""
    jobs = [
        {
            "operation": case.operation,
            "level": case.level,
            "mode": case.mode,
            "count": samples,
            "warmup": WARMUP,
            "deadline": DEADLINE,
            "cpu": cpu,
        }
        for case in group
    ]
    command = [sys.executable, "-m", "kvmpy.bench.worker", json.dumps(jobs)]
    limit = DEADLINE * len(jobs) + _STARTING
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
