"""What every figure depends on: the backend, the machine under it, and the versions."""

import datetime
import os
import platform
import sys
from pathlib import Path

from kvmpy.kvm import backend, nested

__all__ = ["describe", "title"]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown processor"
    return text.partition("model name")[2].partition("\n")[0].strip("\t :") or "unknown processor"


def describe() -> dict[str, str | bool | int | float]:
    """Return the host's description, for the title and for the JSON file."""
    return {
        "backend": backend(),
        "nested": nested(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def title(host: dict[str, str | bool | int | float]) -> str:
    """Return the line above the table."""
    return (
        f"{host['backend']}, {'nested' if host['nested'] else 'not nested'}, {host['processor']}, "
        f"{host['cpus']} CPUs, Linux {host['kernel']}, Python {host['python']}, "
        f"load {host['load']}, {host['date']}"
    )
