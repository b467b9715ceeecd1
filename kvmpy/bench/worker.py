"""One process, a few batches of different cases: `python -m kvmpy.bench.worker JOBS`.

No case has two batches in one process, so that what one process is unlucky in (where its memory
lies, what is in the caches) shows as a difference between batches, and not as a fact.

JOBS is a JSON list. Each result is a frame on standard output: the length of a JSON text and that
of an array file, 8 bytes each, and then both. The JSON is {} for a batch, {"status", "reason"}
for a case that has no number here, and {"error"} for one that failed.
"""

import io
import json
import os
import resource
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from kvmpy.bench.catalogue import OPERATIONS
from kvmpy.bench.model import FAILED, Batch, Case, Conditions, Unmeasured
from kvmpy.bench.reference import Reference
from kvmpy.errors import KvmpyError

__all__ = ["disturbances", "frames", "main", "pack", "run_job", "unpack"]

_HEAD: Final = struct.Struct("<QQ")


def run_job(job: dict[str, Any], reference: Reference) -> Batch:
    """Take the batch that the job describes, in this process, and what disturbed it."""
    case = Case(job["operation"], job["level"], job["mode"])
    conditions = Conditions(job["count"], job["warmup"], job["deadline"], job.get("helper_cpu"))
    reading, before = reference.read(), disturbances()
    batch = OPERATIONS[case.operation].measure(case, conditions)
    after = disturbances()
    batch.interference = {name: after[name] - before[name] for name in after}
    batch.reference = (reading, reference.read())
    return batch


def disturbances() -> dict[str, int]:
    """What disturbs a measurement, counted from the process's, or the machine's, start."""
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
        "reference": batch.reference,
    }
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(file, samples=batch.samples, host=batch.host, guest=batch.guest, facts=text)
    return file.getvalue()


def unpack(case: Case, data: bytes) -> Batch:
    """What `pack` packed."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        facts["reference"] = tuple(facts["reference"])
        return Batch(case, arrays["samples"], arrays["host"], arrays["guest"], **facts)


def frames(data: bytes) -> Iterator[tuple[dict[str, str], bytes]]:
    """The frames of a worker's output, as far as it came: the JSON, and the array file."""
    at = 0
    while at + _HEAD.size <= len(data):
        text, array = _HEAD.unpack_from(data, at)
        start, at = at + _HEAD.size, at + _HEAD.size + text + array
        if at <= len(data):
            yield json.loads(data[start : start + text]), data[start + text : at]


def main(arguments: list[str]) -> int:
    """Do the jobs in order, and write a frame for each as soon as it is done."""
    jobs = json.loads(arguments[0])
    if jobs[0].get("cpu") is not None:
        os.sched_setaffinity(0, {jobs[0]["cpu"]})
    reference = Reference()
    for job in jobs:
        data, facts = b"", {}
        try:
            data = pack(run_job(job, reference))
        except Unmeasured as error:
            facts = {"status": error.status, "reason": error.reason}
        except KvmpyError as error:
            facts = {"status": FAILED, "reason": str(error)}
        text = json.dumps(facts).encode()
        sys.stdout.buffer.write(_HEAD.pack(len(text), len(data)) + text + data)
        sys.stdout.buffer.flush()
    reference.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
