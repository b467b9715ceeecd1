"""Exit latencies that can be published: `kvmpy bench`, from Python.

    import kvmpy.bench
    one = kvmpy.bench.measure("pio-out", level="c", samples=20_000)
    print(one, one.quantile(0.99), one.interval())

It needs numpy (the extra `bench`). benchmarks/README.md says what each number includes.
"""

from kvmpy.bench.catalogue import OPERATIONS, cases
from kvmpy.bench.environment import environment
from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.bench.runner import measure_cases, refuse_bad_numbers
from kvmpy.errors import ConfigError

__all__ = [
    "OPERATIONS",
    "Batch",
    "Case",
    "Conditions",
    "Measurement",
    "Operation",
    "Unmeasured",
    "cases",
    "environment",
    "measure",
    "measure_cases",
]


def measure(
    operation: str,
    level: str | None = None,
    mode: str | None = None,
    samples: int = 2000,
    batches: int = 5,
) -> Measurement:
    """Measure one case: `samples` in all, in `batches` processes of their own.

    What cannot be measured here comes back with a `status` and a `reason`, and no batches. What is
    measured many at a time, or waits between samples, has fewer: see "How it is taken" in
    benchmarks/README.md.

    Without `level` it is "c", and without `mode` "long", or else the first that the operation
    has. Raises ConfigError for a name, level or mode that is none, or that the operation lacks,
    and for numbers that are none.
    """
    found = cases([operation], [level] if level else (), [mode] if mode else ())
    case = min(found, key=lambda one: (one.level != "c", one.mode != "long"))
    refuse_bad_numbers(samples, batches)
    if samples < batches:
        raise ConfigError(f"{samples} samples in {batches} batches: give at least one for each")
    tsc_hz = environment()["tsc_hz"]
    return measure_cases([case], -(-samples // batches), batches, tsc_hz=tsc_hz)[0]
