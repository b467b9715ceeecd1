"""One process, one batch: `python -m kvmpy.bench.worker JOB`, the result on standard output.

A batch has a process of its own so that what one process is unlucky in (where its memory lies,
what is in the caches) shows as a difference between batches, and not as a fact.
"""

import io
import json
import os
import resource
import sys
from typing import Any

import numpy as np

from kvmpy.bench.catalogue import OPERATIONS
from kvmpy.bench.model import Batch, Case, Conditions, Unmeasured

__all__ = ["main", "pack", "run_job", "unpack"]


def run_job(job: dict[str, Any]) -> Batch:
    """Take the batch that the job describes, in this process, and what disturbed it."""
    if job.get("cpu") is not None:
        os.sched_setaffinity(0, {job["cpu"]})
    case = Case(job["operation"], job["level"], job["mode"])
    conditions = Conditions(job["count"], job["warmup"], job["deadline"])
    before = _disturbances()
    batch = OPERATIONS[case.operation].measure(case, conditions)
    after = _disturbances()
    batch.interference = {name: after[name] - before[name] for name in after}
    return batch


def _disturbances() -> dict[str, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "involuntary_switches": usage.ru_nivcsw,
        "page_faults": usage.ru_minflt + usage.ru_majflt,
        "steal_ticks": _steal(),
    }


def _steal() -> int:
    """Clock ticks that the host took from all CPUs (proc(5), /proc/stat)."""
    try:
        with open("/proc/stat") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


def pack(batch: Batch) -> bytes:
    """A batch as bytes: arrays in numpy's own format, the rest as JSON among them."""
    facts = {
        "overhead": dict(batch.overhead),
        "proof": dict(batch.proof),
        "interference": dict(batch.interference),
    }
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(file, samples=batch.samples, host=batch.host, facts=text)
    return file.getvalue()


def unpack(case: Case, data: bytes) -> Batch:
    """What `pack` packed."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        return Batch(case, arrays["samples"], arrays["host"], **facts)


def main(arguments: list[str]) -> int:
    """Run the job; a case that has no number here is status 3, and says why as JSON."""
    try:
        batch = run_job(json.loads(arguments[0]))
    except Unmeasured as error:
        sys.stdout.write(json.dumps({"status": error.status, "reason": error.reason}))
        return 3
    sys.stdout.buffer.write(pack(batch))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
