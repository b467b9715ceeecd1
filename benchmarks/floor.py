"""Builds the C side once, and hands it the guests that kvmpy would make."""

import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvmpy import KVM, modes
from kvmpy.errors import KvmpyError
from kvmpy.vm import IDENTITY_MAP_ADDRESS, TSS_ADDRESS

__all__ = ["FloorError", "FloorMachine", "Guest", "load"]

HERE = Path(__file__).parent
BUILD = HERE / "_build"
CSRC = HERE.parent / "csrc"
SOURCES = (HERE / "floor.c", HERE / "snapfloor.c", HERE / "noop.c")
FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]


class FloorError(KvmpyError):
    """The C side cannot be built, or its KVM calls fail."""


def is_built(name: str) -> bool:
    """Whether there is a module of that name that this Python can load, and not another one."""
    return any((BUILD / f"{name}{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def load() -> Any:
    """The compiled module, with `ffi` and `lib`; built where the sources have changed."""
    header = HERE / "floor.h"
    return compiled("floor", header, '#include "floor.h"', SOURCES, sorted(CSRC.glob("*.[ch]")))


def compiled(
    what: str, header: Path, text: str, sources: Sequence[Path], more: Iterable[Path] = ()
) -> Any:
    """A module of C that is only measured against; `more` are what its sources include."""
    read = [path.read_bytes() for path in (*sources, header, *more)]
    name = f"{what}_{hashlib.sha256(b''.join(read)).hexdigest()[:12]}"
    if not is_built(name):
        _build(name, header, text, sources)
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _build(name: str, header: Path, text: str, sources: Sequence[Path]) -> None:
    from cffi import FFI, VerificationError

    builder = FFI()
    builder.cdef(header.read_text())
    builder.set_source(
        name,
        text,
        sources=[str(path) for path in sources],
        include_dirs=[str(HERE), str(CSRC)],
        extra_compile_args=FLAGS,
    )
    BUILD.mkdir(exist_ok=True)
    try:
        builder.compile(tmpdir=str(BUILD))
    except (VerificationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FloorError(
            f"cannot build the C floor: {reason}; it needs gcc, Python's headers and setuptools"
        ) from None


class Guest:
    """What C needs in order to run the guest that kvmpy would: long mode, ring 0.

    `valid` are the KVM_SYNC_X86_* sets that each exit brings along, where the host can do that.
    """

    def __init__(self, image: bytes, memory: int, *, valid: int) -> None:
        self.module = load()
        layout = modes.build("long", 0, memory)
        address = modes.DEFAULT_LOAD["long"]
        with KVM() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as cpu:
            registers, special = modes.entry_state(layout, address, cpu.get_sregs())
            entries = kvm.get_supported_cpuid()
            can_sync = cpu.can_sync
        cpuid = len(entries).to_bytes(8, "little") + b"".join(entry.pack() for entry in entries)
        ffi = self.module.ffi
        blobs = {
            "area": layout.data,
            "image": image,
            "cpuid": cpuid,
            "sregs": special.pack(),
            "regs": registers.pack(),
        }
        self._kept = {name: ffi.from_buffer("uint8_t[]", data) for name, data in blobs.items()}
        numbers = {
            "memory": memory,
            "area_address": layout.base,
            "area_size": len(layout.data),
            "image_address": address,
            "image_size": len(image),
            "identity_map_address": IDENTITY_MAP_ADDRESS,
            "tss_address": TSS_ADDRESS,
            "sync": can_sync,
            "valid": can_sync & valid,
        }
        self.c = ffi.new("struct floor_guest *", self._kept | numbers)

    def life(self) -> None:
        """Make the machine in C, run it to its first exit, and close it."""
        check(self.module.lib.floor_life(self.c), "a life in C")

    def open(self) -> "FloorMachine":
        """Make the machine in C and leave it open."""
        return FloorMachine(self)


class FloorMachine:
    """A machine that C made and runs; a context manager."""

    def __init__(self, guest: Guest) -> None:
        self._lib = guest.module.lib
        self._machine = guest.module.ffi.new("struct floor_machine *")
        check(self._lib.floor_open(self._machine, guest.c), "making a machine in C")

    def run(self, exits: int) -> None:
        """Run for that many port exits; without the GIL."""
        check(self._lib.floor_run(self._machine, exits), "running a machine in C")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lib.floor_close(self._machine)


def check(result: int, what: str) -> None:
    """Turn -errno into an exception."""
    if result < 0:
        raise FloorError(f"{what} failed: {os.strerror(-result)}")
