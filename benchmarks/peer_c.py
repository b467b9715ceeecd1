"""Bare C: the machine of floor.c, in the loop of peer_loop.c."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.peer_guests import ADDRESS, MEMORY, State
from kvmpy.vm import IDENTITY_MAP_ADDRESS, TSS_ADDRESS

__all__ = ["lives", "runs"]

HERE = Path(__file__).parent
NO_LIMIT = (1 << 64) - 1


@cache
def _loop() -> Any:
    """The compiled module of peer_loop.c, built where that has changed."""
    text = '#include <stdint.h>\n#include "peer_loop.h"'
    return floor.compiled("peer_loop", HERE / "peer_loop.h", text, [HERE / "peer_loop.c"])


class _Guest:
    """What floor.c needs, kept alive for as long as this is."""

    def __init__(self, image: bytes, ring: int) -> None:
        state, self.floor, self.loop = State.of(image, ring), floor.load(), _loop()
        ffi = self.floor.ffi
        blobs = {
            "area": state.area,
            "image": state.image,
            "cpuid": state.cpuid,
            "sregs": state.sregs,
            "regs": state.regs,
        }
        self._kept = {name: ffi.from_buffer("uint8_t[]", data) for name, data in blobs.items()}
        numbers = {
            "memory": MEMORY,
            "area_address": state.area_address,
            "area_size": len(state.area),
            "image_address": ADDRESS,
            "image_size": len(state.image),
            "identity_map_address": IDENTITY_MAP_ADDRESS,
            "tss_address": TSS_ADDRESS,
            "sync": state.sync,
            "valid": 0,
        }
        self.struct = ffi.new("struct floor_guest *", self._kept | numbers)

    @contextmanager
    def machine(self, limit: int) -> Iterator[Callable[[], int]]:
        """A machine that C makes; each call runs it, and gives the sum of what it wrote."""
        machine, lib = self.floor.ffi.new("struct floor_machine *"), self.floor.lib
        floor.check(lib.floor_open(machine, self.struct), "making a machine in C")
        count = self.loop.ffi.new("struct peer_count *")
        loop = self.loop.lib.peer_loop

        def run() -> int:
            count.writes = count.sum = 0
            while (result := loop(machine.cpu, machine.run, limit, count)) == -errno.EINTR:
                pass  # Python's signal handlers have had their turn
            floor.check(result, "running a machine in C")
            return int(count.sum)

        try:
            yield run
        finally:
            lib.floor_close(machine)


@contextmanager
def runs(image: bytes, ring: int = 0, limit: int = NO_LIMIT) -> Iterator[Callable[[], int]]:
    """A machine that stays: each call runs it until HLT, or for `limit` writes."""
    with _Guest(image, ring).machine(limit) as run:
        yield run


@contextmanager
def lives(image: bytes) -> Iterator[Callable[[], int]]:
    """Each call makes a machine, runs it to its first write, and closes it."""
    guest = _Guest(image, 0)

    def live() -> int:
        with guest.machine(1) as run:
            return run()

    yield live
