"""Unicorn from Python: the guest is emulated, and hooks written in Python serve its accesses."""

import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from benchmarks.peer import PeerError
from benchmarks.peer_guests import ADDRESS, MEMORY, MMIO
from kvmpy.asm import Program

__all__ = ["lives", "missing", "name", "runs"]

_PAGE = 4096


@cache
def missing() -> str:
    """Why there is no Unicorn here; empty where there is."""
    if importlib.util.find_spec("unicorn") is None:
        return "not installed: pip install unicorn"
    try:
        _module("unicorn")
    except ImportError as error:  # its library may be missing, or be for another machine
        return f"not available here: {error}"
    return ""


def name() -> str:
    """What executes the guest, with the version."""
    version = "" if missing() else f" {_module('unicorn').__version__}"
    return f"emulator (Unicorn{version})"


@cache
def _module(module: str) -> Any:
    return importlib.import_module(module)


class _Engine:
    """A guest in Unicorn; `total` is the sum of what its hooks have seen written."""

    def __init__(self, image: Program) -> None:
        unicorn = _module("unicorn")
        self.total = 0
        self._end = image.symbols["end"]
        self._error: type[Exception] = unicorn.UcError
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.uc.mem_map(0, MEMORY)
        self.uc.mem_write(ADDRESS, bytes(image))

    def start(self) -> None:
        """Run from the guest's start to its end, or to where a hook stops it."""
        try:
            self.uc.emu_start(ADDRESS, self._end)
        except self._error as error:
            raise PeerError(f"Unicorn: {error}") from None

    def on_port(self, callback: Callable[..., None]) -> None:
        """Call `callback(uc, port, size, value, data)` for OUT."""
        unicorn, x86 = _module("unicorn"), _module("unicorn.x86_const")
        self.uc.hook_add(unicorn.UC_HOOK_INSN, callback, None, 1, 0, x86.UC_X86_INS_OUT)


def _on_port(engine: _Engine) -> None:
    def out(uc: Any, port: int, size: int, value: int, data: object) -> None:
        engine.total += value

    engine.on_port(out)


def _on_mmio(engine: _Engine) -> None:
    def write(uc: Any, offset: int, size: int, value: int, data: object) -> None:
        engine.total += value

    engine.uc.mmio_map(MMIO, _PAGE, None, None, write, None)


def _on_memory(engine: _Engine) -> None:
    def write(  # noqa: PLR0917 - what Unicorn calls it with
        uc: Any, access: int, address: int, size: int, value: int, data: object
    ) -> None:
        engine.total += value

    engine.uc.mem_map(MMIO, _PAGE)
    hook = _module("unicorn").UC_HOOK_MEM_WRITE
    engine.uc.hook_add(hook, write, None, MMIO, MMIO + _PAGE - 1)


_HOOKS = {"port": _on_port, "mmio": _on_mmio, "memory": _on_memory}


@contextmanager
def runs(image: Program, hook: str) -> Iterator[Callable[[], int]]:
    """Each call runs the guest to its `end`, with the sum of what it wrote.

    `hook` says how a write reaches Python: "port" (UC_HOOK_INSN), "mmio" (mmio_map) or
    "memory" (UC_HOOK_MEM_WRITE on memory that is there, and is written as well).
    """
    engine = _Engine(image)
    _HOOKS[hook](engine)

    def run() -> int:
        engine.total = 0
        engine.start()
        return engine.total

    yield run


def _first_write(image: Program) -> int:
    """Make an emulator and run the guest to its first port write: the value."""
    engine, seen = _Engine(image), 0

    def out(uc: Any, port: int, size: int, value: int, data: object) -> None:
        nonlocal seen
        seen += value
        uc.emu_stop()

    engine.on_port(out)
    engine.start()
    return seen


@contextmanager
def lives(image: Program) -> Iterator[Callable[[], int]]:
    """Each call makes an emulator, runs the guest to its first port write, and closes it."""

    def live() -> int:
        seen = _first_write(image)
        # A hook and its engine refer to each other: only the collector closes the engine, and
        # as young as it is, the youngest generation is enough.
        gc.collect(0)
        return seen

    yield live
