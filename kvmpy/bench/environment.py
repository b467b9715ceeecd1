"""Where the numbers come from: without it they mean nothing."""

import os
import platform
from datetime import UTC, datetime
from glob import glob
from typing import Any, Final

import numpy as np

from kvmpy import __version__
from kvmpy.errors import KvmpyError
from kvmpy.kvm import KVM, backend, nested

__all__ = ["environment"]

_CPU_FLAGS: Final = ("constant_tsc", "nonstop_tsc", "tsc_known_freq", "tsc_reliable", "rdtscp")


def environment() -> dict[str, Any]:
    """The facts that a latency depends on, as JSON; null where the host does not tell."""
    cpu = _cpu()
    return {
        "backend": backend(),
        "nested": nested(),
        "module_parameters": _parameters(),
        "cpu": cpu.get("model name"),
        # Clouds name a processor without its model: "Intel(R) Xeon(R) Processor".
        "cpu_signature": {
            name: cpu.get(field)
            for name, field in (("family", "cpu family"), ("model", "model"), ("stepping",) * 2)
        },
        "microcode": cpu.get("microcode"),
        "cpus": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "mitigations": {
            os.path.basename(path): _read(path)
            for path in sorted(glob("/sys/devices/system/cpu/vulnerabilities/*"))
        },
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "smt": _read("/sys/devices/system/cpu/smt/active"),
        "isolated_cpus": _read("/sys/devices/system/cpu/isolated"),
        "nohz_full_cpus": _read("/sys/devices/system/cpu/nohz_full"),
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "tsc_hz": _tsc_hz(),
        "tsc_flags": [flag for flag in _CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "load": list(os.getloadavg()),
        "versions": {
            "kvmpy": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def _cpu() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    lines = (_read("/proc/cpuinfo") or "").partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _parameters() -> dict[str, str | None]:
    """Each parameter of KVM's modules: ept or npt, halt_poll_ns, AVIC or APICv ..."""
    return {
        "/".join(path.split("/")[3::2]): _read(path)
        for path in sorted(glob("/sys/module/kvm*/parameters/*"))
    }


def _tsc_hz() -> float | None:
    """The TSC's frequency as KVM tells it, in Hz."""
    try:
        with KVM() as kvm, kvm.create_vm() as vm:
            return vm.create_vcpu().get_tsc_khz() * 1000.0
    except KvmpyError:
        return None
