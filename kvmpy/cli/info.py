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
_OTHER = "stop what else uses the CPU's virtualization, such as VirtualBox or VMware"
_HINTS: Final[Mapping[int | None, tuple[str, ...]]] = {
    errno.ENOENT: (_MODULE, _CONTAINER, _NESTED),
    errno.ENODEV: (_MODULE, _NESTED),
    errno.ENXIO: (_MODULE, _NESTED),
    errno.EACCES: (_GROUP, _CONTAINER),
    errno.EPERM: (_CONTAINER, _GROUP),
    errno.EBUSY: (_OTHER,),
}
_ALL_HINTS: Final = (_MODULE, _GROUP, _CONTAINER, _NESTED)

# For guests that expect another hypervisor, or enclaves: other guests do not miss them.
_NOT_MISSED: Final = ("HYPERV", "SYS_HYPERV", "XEN", "SGX")
_STYLES: Final = {"yes": "green", "no": "red", "hangs": "red", "unknown": "yellow"}
_UNLIMITED: Final = 10_000  # columns, where no terminal says how many there are


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.option("--no-probe", is_flag=True, help="Run no probe guests.")
def info(*, as_json: bool, no_probe: bool) -> int:
    """Say what this host's KVM is and what it can do.

    What works is found by probe guests of a few bytes each. Without a usable /dev/kvm it says
    what to do about that, and the exit status is 125.
    """
    found = facts(probes=not no_probe)
    click.echo(json.dumps(found, indent=2) if as_json else _page(found))
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
            kvm.create_vm().close()  # it fails where another hypervisor has the CPU
        if probes:
            found["probes"] = {
                one.name: {"answer": one.answer, "detail": one.detail} for one in probe_all()
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


def _page(found: Mapping[str, Any]) -> str:
    """The facts for a reader; in colour on a terminal, and as wide as need be elsewhere."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout,
        force_terminal=terminal,
        width=None if terminal else _UNLIMITED,
        highlight=False,
        markup=False,
    )
    with console.capture() as capture:
        console.print(_table((), _host_rows(found)))
        if found["capabilities"] is not None:
            _print_capabilities(console, found["capabilities"])
        if found["probes"] is not None:
            console.print()
            rows = ((name, one["answer"], one["detail"]) for name, one in found["probes"].items())
            console.print(_table(("Probe", "Answer", "What was tried, and what came of it"), rows))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _host_rows(found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    where = "nested: this host is a guest itself" if found["nested"] else "not nested"
    yield "Backend", f"{found['backend']}, {where}"
    if found["api_version"] is not None:
        yield "KVM API", f"version {found['api_version']}"
    if found["vcpus"] is not None:
        limits = found["vcpus"]
        yield (
            "vCPUs per VM",
            f"{limits['recommended']} recommended, {limits['maximum']} at most, "
            f"with ids below {limits['maximum_id']}",
        )
    for name, title in (("cpu", "CPU"), ("kernel", "Linux"), ("python", "Python")):
        yield title, found["versions"][name]
    yield "kvmpy", found["versions"]["kvmpy"]


def _print_capabilities(console: Any, capabilities: Mapping[str, int]) -> None:
    present = {name: value for name, value in capabilities.items() if value}
    rows = ((name, str(value), ALLOWS.get(name, "")) for name, value in present.items())
    console.print()
    console.print(_table(("Capability", "Value", "What it allows"), rows))
    absent = [
        name for name in ALLOWS if not capabilities.get(name) and not name.startswith(_NOT_MISSED)
    ]
    console.print()
    console.print("Absent: " + (", ".join(absent) or "none that matters"), soft_wrap=True)


def _table(titles: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Any:
    """Columns without lines; a title row where there are titles."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    table.show_header = bool(titles)
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table
