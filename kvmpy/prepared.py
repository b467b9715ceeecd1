"""What a loop of runs works with: a machine at its snapshot, and where inputs go."""

from collections.abc import Callable
from operator import index
from typing import Any, Final, TypeAlias

from kvmpy.abi import ffi
from kvmpy.errors import AddressError, ConfigError
from kvmpy.exits import OFFSET_REASON
from kvmpy.machine import Machine
from kvmpy.memory import Memory
from kvmpy.snapshot.reset import DIRTY_LOG
from kvmpy.snapshot.touched import Touched
from kvmpy.x86.registers import Registers

__all__ = ["Prepared", "WriteTo", "check_collect"]

WriteTo: TypeAlias = int | Callable[[Machine, Any], object] | None
"""Where an input goes: a guest-physical address, or a function of the machine and the input."""

_RUN_SIZE: Final = ffi.sizeof("struct kvmpy_run")
_RUN_REGS: Final = _RUN_SIZE - Registers.SIZE  # struct kvm_regs is the last of it


def check_collect(collect: tuple[int, int] | None) -> None:
    """Raise ConfigError unless it is None, or an address and a size above 0."""
    if collect is not None:
        try:
            _, size = map(index, collect)
        except (TypeError, ValueError):
            size = 0
        if size < 1:
            raise ConfigError(f"collect={collect!r:.80}: give (address, size), a size above 0")


class Prepared:
    """A machine at the snapshot, where its inputs go, and what C works with (csrc/reset.h)."""

    def __init__(
        self,
        machine: Machine,
        write_to: WriteTo,
        collect: tuple[int, int] | None,
        batch: int,
        touched: bool,
        *,
        resetter: Any,
        console: bool,
    ) -> None:
        self.machine, self.console = machine, console
        self.write = write_to if callable(write_to) else None
        self.native = made = ffi.new("struct kvmpy_batch *")
        made.loop = machine.cpus[0].loop
        self.touched: Touched | None = None
        self._runs_touched = batch if touched else 0
        self.room, self.address = 0, write_to
        if isinstance(write_to, int):
            if resetter.method != DIRTY_LOG:  # C has no place to note what it writes
                self.write = lambda machine, data: machine.memory.write(write_to, data)
        elif self.write is None and write_to is not None:
            raise ConfigError(f"write_to={write_to!r}: give an address, or a function")
        self.collected, self.size = bytearray(), 0
        self._collect = collect
        if collect is not None:
            self._region(*collect)  # refused before there is room for it
            self.size = collect[1]
            self.collected = bytearray(batch * self.size)
            made.collect_size = self.size
            made.collected = self._room = ffi.from_buffer(self.collected, require_writable=True)
        self.use(resetter)
        self.runs = made.runs = ffi.new("struct kvmpy_run[]", batch)
        self.ends = made.ends = ffi.new("uint64_t[]", batch)
        self.registers = memoryview(ffi.buffer(self.runs))

    def use(self, resetter: Any) -> None:
        """Go back with that. The machine's RAM may lie elsewhere than with the one before."""
        made, memory = self.native, self.machine.memory
        self.resetter = resetter
        made.reset = resetter.native
        if isinstance(self.address, int):
            region = self._region(self.address, 1)
            logged = [one for one in memory if not one.readonly]
            made.region, made.offset = logged.index(region), self.address - region.address
            self.room = region.end - self.address
        if self._collect is not None:
            address, size = self._collect
            region = self._region(address, size)
            start = region.host_address + address - region.address
            made.collect = ffi.cast("uint8_t *", start)
        if self._runs_touched:
            self.touched = Touched(memory, self._runs_touched)
            self.touched.use(resetter, made)

    def _region(self, address: int, size: int) -> Memory:
        for region in self.machine.memory:
            if region.address <= address and address + size <= region.end and not region.readonly:
                return region
        raise AddressError(f"{size} bytes at {address:#x} are not in writable RAM")

    def take(self, chunk: list[Any]) -> tuple[int, Any]:
        """Give C the inputs up to the first that is no good, which raises when it is the first.

        How many it has, and what has to be kept alive until it is done.
        """
        if not self.room:
            return len(chunk), None
        try:
            data = self._place(chunk)
        except (TypeError, ValueError):
            for good, one in enumerate(chunk):
                try:
                    self._place([one])
                except (TypeError, ValueError):
                    if not good:
                        raise
                    return good, self._place(chunk[:good])
            raise
        return len(chunk), data

    def _place(self, chunk: list[Any]) -> Any:
        end = 0
        for at, one in enumerate(chunk):
            size = len(one) if type(one) is bytes else _size(one)
            if size > self.room:
                raise AddressError(
                    f"an input of {size} bytes at {self.address:#x} does not fit into the RAM there"
                )
            end += size
            self.ends[at] = end
        self.native.data = data = ffi.from_buffer(chunk[0] if len(chunk) == 1 else b"".join(chunk))
        return data

    def finish(self, at: int) -> None:
        """Note what C notes of a run that it ends itself."""
        vcpu = self.machine.cpus[0]
        self.runs[at].reason = vcpu.run_page[OFFSET_REASON]
        self.runs[at].value = vcpu.loop.value
        if self.touched is not None:
            self.touched.find(at)
        start = at * _RUN_SIZE + _RUN_REGS
        self.registers[start : start + Registers.SIZE] = vcpu.get_packed_regs()
        if self.size:
            there = ffi.buffer(self.native.collect, self.size)
            self.collected[at * self.size : (at + 1) * self.size] = there[:]

    def packed(self, at: int) -> bytes:
        """The general registers after that run."""
        start = at * _RUN_SIZE + _RUN_REGS
        return bytes(self.registers[start : start + Registers.SIZE])


def _size(given: Any) -> int:
    try:
        return memoryview(given).nbytes
    except TypeError:
        raise ConfigError(f"an input for an address is bytes, not {given!r}") from None
