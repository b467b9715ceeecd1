"""Whole processes, from start to exit: QEMU with TCG and with KVM, and `kvmpy run`.

Each runs the same code, in real mode, to a debug-exit device that makes the exit status.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import kvmpy
from benchmarks.peer import PeerError
from benchmarks.peer_guests import BOOT_STATUS

__all__ = ["KVM_PROCESSORS", "kvmpy_runs", "missing", "name", "runs"]

PROGRAM = "qemu-system-x86_64"
DEADLINE = 60.0
KVM_PROCESSORS = ("host", "host,-arch-capabilities")
"""The second is for hosts that have MSR 0x10a and do not let QEMU write it: it aborts."""

_COMMON = ("-nodefaults", "-display", "none", "-no-reboot", "-m", "16")
_DEBUG_EXIT = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
_ROOT = Path(kvmpy.__file__).parent.parent


@cache
def missing() -> str:
    """Why there is no QEMU here; empty where there is."""
    if shutil.which(PROGRAM) is None:
        return f"not installed: {PROGRAM} (on Debian: apt install qemu-system-x86)"
    try:
        _version()
    except (PeerError, IndexError) as error:
        return f"not available here: {PROGRAM} --version: {error}"
    return ""


@cache
def _version() -> str:
    """The version, from a line such as "QEMU emulator version 7.2.22 (Debian ...)"."""
    return _process([PROGRAM, "--version"], 0).split()[3]


def name(accelerator: str, kvm: str) -> str:
    """What executes the guest: `kvm` under KVM, otherwise QEMU's own emulator."""
    if accelerator == "kvm":
        return kvm
    return f"emulator (QEMU{'' if missing() else ' ' + _version()}, TCG)"


def _process(command: list[str], status: int, environment: dict[str, str] | None = None) -> str:
    """Run a command that has to end with that status, in time; its standard output."""
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{command[0]} did not end within {DEADLINE:g} s") from None
    except OSError as error:
        raise PeerError(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode != status:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise PeerError(f"{os.path.basename(command[0])} ended with {done.returncode}: {lines[0]}")
    return done.stdout


@contextmanager
def _runs(*command: str, environment: dict[str, str] | None = None) -> Iterator[Callable[[], int]]:
    def run() -> int:
        _process(list(command), BOOT_STATUS, environment)
        return BOOT_STATUS

    yield run


def machine(image: Path, firmware: bool) -> tuple[str, ...]:
    """QEMU's options for a boot sector on a disk of a PC, or for code in the firmware's place."""
    if firmware:
        path = str(image).replace(",", ",,")  # a comma ends a part of this option
        return ("-M", "pc", "-drive", f"file={path},format=raw,if=ide")
    return ("-M", "microvm", "-bios", str(image))


@contextmanager
def runs(image: Path, accelerator: str, *, firmware: bool) -> Iterator[Callable[[], int]]:
    """Each call is a process of QEMU's, from its start to its exit.

    Under KVM the guest gets the first of KVM_PROCESSORS with which QEMU can run it.
    """
    command = (PROGRAM, *_COMMON, *machine(image, firmware), *_DEBUG_EXIT, "-accel", accelerator)
    if accelerator == "kvm":
        command = (*command, "-cpu", _processor(command))
    with _runs(*command) as run:
        yield run


@cache
def _processor(command: tuple[str, ...]) -> str:
    failures = []
    for processor in KVM_PROCESSORS:
        try:
            _process([*command, "-cpu", processor], BOOT_STATUS)
        except PeerError as error:
            failures.append(str(error))
        else:
            return processor
    raise PeerError("; ".join(dict.fromkeys(failures)))


@contextmanager
def kvmpy_runs(image: Path) -> Iterator[Callable[[], int]]:
    """Each call is a process of `kvmpy run` with the boot sector, from its start to its exit.

    Byte code is cached beside the image, also where the environment turns caching off.
    """
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(image.parent / "pycache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = (sys.executable, "-m", "kvmpy", "run", "--timeout", f"{DEADLINE:g}", str(image))
    with _runs(*command, environment=environment) as run:
        yield run
