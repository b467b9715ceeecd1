"""Results as documents: JSON of a documented version, and CSV.

The JSON is described by schema.json beside this file (JSON Schema, draft 2020-12).
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import Case
from kvmpy.bench.stats import block_medians
from kvmpy.errors import ConfigError

__all__ = ["SCHEMA", "VERSION", "check_writable", "document", "load", "save", "to_csv"]

NAME: Final = "kvmpy-bench"
VERSION: Final = 1
SCHEMA: Final = Path(__file__).with_name("schema.json")
_CASE: Final = ("operation", "level", "mode", "status", "reason")
_HOST: Final = ("backend", "nested", "cpu", "kernel", "kvmpy", "date")
_COLUMNS: Final = {
    "count": "count",
    "per_sample": "per_sample",
    **{f"{name}_ns": name for name in ("min", "p50", "low", "high", "p90", "p99", "p99.9", "max")},
    "mad_ns": "mad",
    "tsc_cycles": "cycles",
    "spread": "spread",
    "disturbed": "disturbed",
    **{f"{name}_ns": name for name in ("clock", "loop", "guest", "tsc")},
}
"""The columns of a CSV, with their units, and what of the summary is in them."""


def document(
    measurements: Sequence[Measurement],
    environment: dict[str, Any],
    command: Sequence[str],
    *,
    raw: bool = False,
    missing: Sequence[Case] = (),
) -> dict[str, Any]:
    """The JSON document of a run; with `raw`, every sample and clock reading is in it.

    `missing` are the cases that an interrupted run has no batch of.
    """
    return {
        "schema": NAME,
        "version": VERSION,
        "command": list(command),
        "environment": environment,
        "complete": not missing and all(one.complete for one in measurements),
        "missing": [str(case) for case in missing],
        "measurements": [_measurement(one, raw) for one in measurements],
    }


def _measurement(one: Measurement, raw: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "operation": one.case.operation,
        "level": one.case.level,
        "mode": one.case.mode,
        "status": one.status,
        "reason": one.reason,
        "flags": one.flags,
        "summary": one.summary(),
        "wanted_batches": one.wanted,
        "batches": [],
    }
    for batch in one.all_batches:
        row: dict[str, Any] = {
            "count": len(batch.samples),
            "median": float(np.median(batch.samples)),
            "blocks": block_medians(batch.samples).tolist(),
            "overhead": dict(batch.overhead),
            "proof": dict(batch.proof),
            "interference": dict(batch.interference),
            "reference": list(batch.reference),
            "disturbed": batch.disturbed,
        }
        if raw:
            row["samples"] = batch.samples.tolist()
            row["host"] = batch.host.tolist()
            row["guest"] = batch.guest.tolist()
        facts["batches"].append(row)
    return facts


def check_writable(path: Path) -> None:
    """Raise ConfigError, before measuring, for what `save` could not write after it."""
    try:
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a directory")
        if path.exists() and not path.is_file():
            if not os.access(path, os.W_OK):
                raise ConfigError(f"cannot write {path}: permission denied")
            return
        # Nothing else tells: a file system may have no room for files of anybody's.
        tempfile.NamedTemporaryFile("w", dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all; ConfigError where it cannot be written."""
    name = None
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)  # a device or a pipe: there is nothing to replace
            return
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            name = file.name
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        if name is not None and os.path.exists(name):
            os.unlink(name)
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def load(path: Path) -> dict[str, Any]:
    """Read a document; ConfigError for what is none, is cut short, or of another version."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not JSON, or cut short") from None
    if not isinstance(data, dict) or data.get("schema") != NAME:
        raise ConfigError(f"{path}: not a result of kvmpy bench")
    if data.get("version") != VERSION:
        raise ConfigError(f"{path}: of version {data.get('version')}; this is {VERSION}")
    kinds = {"measurements": list, "environment": dict}
    if not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
        raise ConfigError(f"{path}: has no measurements, or no environment")
    for number, one in enumerate(data["measurements"]):
        if not _is_measurement(one):
            raise ConfigError(f"{path}: measurement {number} is not as schema.json describes it")
    if not {"backend", "nested"} <= set(data["environment"]):
        raise ConfigError(f"{path}: its environment names no backend")
    return data


def _is_measurement(one: Any) -> bool:
    """Whether it has what is read again, and that is what it should be."""
    try:
        return all(isinstance(one[name], str) for name in ("operation", "level", "mode")) and all(
            batch["count"] >= 1
            and batch["median"] > 0
            and batch["blocks"]
            and all(value > 0 for value in (*batch["blocks"], *batch["reference"]))
            and isinstance(batch["disturbed"], bool)
            for batch in one["batches"]
        )
    except (KeyError, TypeError):
        return False


def to_csv(measurements: Sequence[Measurement], environment: dict[str, Any]) -> str:
    """One line for each case, and in each where it was measured and what to beware of.

    A quantile with too few samples beyond it is left out (see `measurement.ENOUGH_BEYOND`).
    """
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow((*_CASE, *_HOST, *_COLUMNS, "flags"))
    host = {**environment, "kvmpy": environment["versions"]["kvmpy"]}
    for one in measurements:
        summary = one.summary()
        if summary:
            summary["low"], summary["high"] = summary["interval"]
        for name in one.unsure():
            summary.pop(name, None)
        case = one.case
        writer.writerow(
            (
                *(case.operation, case.level, case.mode, one.status, one.reason),
                *(host[name] for name in _HOST),
                *(summary.get(name, "") for name in _COLUMNS.values()),
                "; ".join(one.flags),
            )
        )
    return file.getvalue()
