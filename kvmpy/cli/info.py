"""`kvmpy info`: what this host's KVM is, what it offers, and what really works."""

import errno
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import click

import kvmpy
from kvmpy.capabilities import ALLOWS
from kvmpy.cli import HOST_FAILED, complain
from kvmpy.errors import HostError
from kvmpy.kvm import KVM, backend, nested
from kvmpy.probe import probe_all

__all__ = ["facts", "info"]

DEVICE: Final = "/dev/kvm"

_MODULE = (
    "load KVM: sudo modprobe kvm_intel (or kvm_amd), with VT-x (or SVM) enabled in the firmware"
)
_GROUP = "join the kvm group: sudo usermod -aG kvm $USER, then log in again"
_CONTAINER = "in a container: start it with --device /dev/kvm"
_NESTED = (
    "in a virtual machine: have its host offer nested virtualization (kvm_intel or kvm_amd "
    "loaded with nested=1, and a virtual CPU with vmx or svm, such as QEMU's -cpu host)"
)
_HINTS: Final[Mapping[int | None, tuple[str, ...]]] = {
    errno.ENOENT: (_MODULE, _CONTAINER, _NESTED),
    errno.ENODEV: (_MODULE, _NESTED),
    errno.ENXIO: (_MODULE, _NESTED),
    errno.EACCES: (_GROUP, _CONTAINER),
    errno.EPERM: (_CONTAINER, _GROUP),
}
_ALL_HINTS: Final = (_MODULE, _GROUP, _CONTAINER, _NESTED)

# These make a guest believe in another hypervisor or another CPU's enclaves: nobody misses them.
_NOT_MISSED: Final = ("HYPERV", "SYS_HYPERV", "XEN", "SGX")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.option("--no-probe", is_flag=True, help="Run no probe guests.")
def info(*, as_json: bool, no_probe: bool) -> int:
    """Say what this host's KVM is and what it can do.

    What works is found by probe guests of a few bytes each. Without a usable /dev/kvm it says
    what to do about that, and the exit status is 125.
    """
    found = facts(probes=not no_probe)
    click.echo(json.dumps(found, indent=2) if as_json else _page(found), nl=as_json)
    if found["available"]:
        return 0
    complain(found["reason"])
    for hint in found["hints"]:
        click.echo(f"  - {hint}", err=True)
    return HOST_FAILED


def facts(*, probes: bool = True) -> dict[str, Any]:
    """Everything that `kvmpy info` tells; the keys are the same on every host.

    `available` says whether KVM can be used; where it cannot, `reason` says why, `hints` what to
    do about it, and what only KVM knows is None. `capabilities` has every KVM_CAP name with
    KVM_CHECK_EXTENSION's value, 0 for absent. `probes` has the answer and detail of each probe,
    None where they were not run.
    """
    found: dict[str, Any] = {
        "available": False,
        "reason": None,
        "hints": [],
        "device": DEVICE,
        "backend": backend(),
        "nested": nested(),
        "api_version": None,
        "vcpus": None,
        "capabilities": None,
        "probes": None,
        "versions": _versions(),
    }
    try:
        with KVM(DEVICE) as kvm:
            capabilities = kvm.capabilities()
            found |= {"api_version": kvm.api_version, "capabilities": capabilities}
        found["vcpus"] = _vcpus(capabilities)
        if probes:
            findings = {one.name: one for one in probe_all()}
            found["probes"] = {
                name: {"answer": one.answer, "detail": one.detail} for name, one in findings.items()
            }
        found["available"] = True
    except HostError as error:
        found["reason"] = str(error)
        found["hints"] = list(_HINTS.get(error.errno, _ALL_HINTS))
    return found


def _vcpus(capabilities: Mapping[str, int]) -> dict[str, int]:
    """The limits of a VM's vCPUs, with what to assume where one is absent (KVM API, 4.7)."""
    recommended = capabilities["NR_VCPUS"] or 4
    maximum = capabilities["MAX_VCPUS"] or recommended
    return {
        "recommended": recommended,
        "maximum": maximum,
        "maximum_id": capabilities["MAX_VCPU_ID"] or maximum,
    }


def _versions() -> dict[str, str]:
    return {
        "kvmpy": kvmpy.__version__,
        "python": platform.python_version(),
        "kernel": os.uname().release,
        "cpu": _cpu_model(),
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    line = text.partition("model name")[2].partition("\n")[0]
    return line.partition(":")[2].strip() or "unknown"
