"""Measuring a plan of cases: batches in fresh processes, in random order."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import Batch, Case, Unmeasured
from kvmpy.bench.worker import unpack
from kvmpy.errors import ConfigError, HostError

__all__ = ["measure_cases", "pinning"]

WARMUP = 200
DEADLINE = 20.0
_STARTING = 30.0  # seconds that a process may take beside its batch, on a busy machine


def pinning() -> int | None:
    """The CPU to pin batches to: the last of those there are, None if there is but one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1] if len(allowed) > 1 else None


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

    `progress` is called with the number of batches done and that of all.
    """
    if samples < 1 or batches < 1:
        raise ConfigError(f"{samples} samples in {batches} batches: give at least 1 of each")
    found: dict[Case, list[Batch]] = {case: [] for case in cases}
    absent: dict[Case, Unmeasured] = {}
    order = [case for case in cases for _ in range(batches)]
    random.Random(seed).shuffle(order)
    cpu = pinning()
    try:
        for done, case in enumerate(order):
            progress(done, len(order))
            if case not in absent:
                try:
                    found[case].append(_batch(case, samples, cpu))
                except Unmeasured as error:
                    absent[case] = error
        progress(len(order), len(order))
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


def _batch(case: Case, samples: int, cpu: int | None) -> Batch:
    """One batch, in a process of its own."""
    job = {
        "operation": case.operation,
        "level": case.level,
        "mode": case.mode,
        "count": samples,
        "warmup": WARMUP,
        "deadline": DEADLINE,
        "cpu": cpu,
    }
    command = [sys.executable, "-m", "kvmpy.bench.worker", json.dumps(job)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE + _STARTING,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"its process did not end in {DEADLINE + _STARTING:g} s"
        raise Unmeasured("hangs here", reason) from None
    if done.returncode == 3:
        facts = json.loads(done.stdout)
        raise Unmeasured(facts["status"], facts["reason"])
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
        raise HostError(f"measuring {case} failed: {last[0]}")
    return unpack(case, done.stdout)
