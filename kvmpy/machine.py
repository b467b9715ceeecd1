"""A machine: a VM with memory, buses, devices and vCPUs, and what becomes of running it."""

import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kvmpy import modes
from kvmpy.abi import lib
from kvmpy.boot.segments import Image
from kvmpy.bus import AccessFunction, Claim, Device, FunctionDevice
from kvmpy.console import Console
from kvmpy.devices import standard
from kvmpy.dispatch import Dispatch
from kvmpy.errors import AddressError, ConfigError, OverlapError
from kvmpy.exits import (
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    Shutdown,
    decode,
    exit_kind,
)
from kvmpy.kvm import KVM
from kvmpy.memory import PAGE_SIZE, AddressSpace
from kvmpy.result import Result
from kvmpy.serve import serve, serve_one, serve_posted
from kvmpy.sizes import parse_size
from kvmpy.vcpu import VCPU
from kvmpy.x86.exceptions import GuestException, decode_exception

__all__ = ["Machine"]

LOW_RAM_LIMIT: Final = 3 << 30
EXTRA_RAM: Final = 4 << 30
LARGEST_MEMORY: Final = 256 << 30

_F = TypeVar("_F", bound=AccessFunction)
_Bytes = bytes | bytearray | memoryview
_OUTCOMES = {
    lib.KVMPY_STOPPED: "stopped",
    lib.KVMPY_DEADLINE: "timeout",
    lib.KVMPY_MAX_EXITS: "max-exits",
}
_supported_cpuid: dict[int, bytes] = {}


class Machine:
    """A virtual machine that is ready to load a guest and run it; a context manager.

    `memory` is its RAM ("16M", or bytes): up to 3 GiB from address 0 on, the rest from 4 GiB.
    `mode` is "real", "protected16", "protected" or "long", `ring` 0 or 3: what a guest starts
    in (see `kvmpy.modes`). `cpus` is the number of vCPUs, `irqchip` None, "split" or "full".
    `output` gets console bytes as the guest writes them, `input` is asked for bytes for the
    serial port. With `strict`, an access that no device claims ends the run. `posted_console`
    lets KVM collect the debug console's bytes, cheaper but up to 50 ms late. `huge` advises
    huge pages for the RAM. With `devices=False` nothing is attached.

    Raises ConfigError for an option that is out of range, KVMUnavailableError without KVM.
    """

    def __init__(
        self,
        memory: str | int = "16M",
        mode: str = "long",
        ring: int = 0,
        *,
        cpus: int = 1,
        irqchip: str | None = None,
        output: Callable[[bytes], object] | None = None,
        input: Callable[[], bytes] | None = None,
        strict: bool = False,
        posted_console: bool = False,
        huge: bool = False,
        devices: bool = True,
    ) -> None:
        size = _memory_size(memory)
        low = min(size, LOW_RAM_LIMIT)
        self.layout = modes.build(mode, ring, low, size - low)
        """What kvmpy puts at the top of low RAM."""
        if cpus < 1 or irqchip not in (None, "split", "full"):
            raise ConfigError(f"cpus={cpus}, irqchip={irqchip!r}: at least 1; None, split or full")
        self._console = Console(output)
        self._strict, self._posted = strict, posted_console
        self._end: tuple[str, str, Any] | None = None
        self.seconds = 0.0
        """How long the last run took."""
        self._loaded: list[tuple[int, int]] = []
        self.entry: int | None = None
        """Where the guest starts; the first `load` sets it."""
        self.dispatch = Dispatch(self._on_unclaimed)
        if devices:
            self.devices = standard.attach(self, self._console.write, input, self._finish_run)
            """The standard devices by name: "serial", "post" and so on."""
        if self.layout.stubs is not None:
            reporter = FunctionDevice(self._report_exception)
            self.attach_port(modes.EXCEPTION_PORT, 1, reporter, "exception reporter")
        self.kvm = KVM()
        try:
            self.vm = self.kvm.create_vm()
            try:
                self._build(low, size - low, cpus, irqchip, huge)
            except BaseException:
                self.vm.close()
                raise
        except BaseException:
            self.kvm.close()
            raise

    def _build(self, low: int, extra: int, cpus: int, irqchip: str | None, huge: bool) -> None:
        if irqchip == "full":
            self.vm.create_irqchip()
        elif irqchip == "split":
            self.vm.create_split_irqchip()
        ram = self.vm.add_memory(0, low, huge=huge)
        if extra:
            self.vm.add_memory(EXTRA_RAM, extra, huge=huge)
        if self.layout.data:
            ram.write(self.layout.base, self.layout.data)
        if self._posted:
            self.kvm.require("COALESCED_PIO")
            for port in standard.CONSOLE_PORTS:
                self.vm.register_coalesced(port, 1, port=True)
        for _ in range(cpus):
            self._add_cpu(self.vm.create_vcpu())

    def _add_cpu(self, cpu: VCPU) -> None:
        cpu.loop.routes = self.dispatch.routes
        cpu.finisher = lambda: self._finish_exit(cpu)
        cpu.set_cpuid2(_cpuid(self.kvm))
        if self._posted:
            cpu.watch_ring()

    # Memory and image -----------------------------------------------------------------------

    @property
    def cpus(self) -> list[VCPU]:
        """The vCPUs, in order."""
        return self.vm.vcpus

    @property
    def memory(self) -> AddressSpace:
        """All RAM, by guest-physical address; `memory.view` is zero-copy."""
        return self.vm.memory

    @property
    def console(self) -> bytes:
        """What the guest has written to the debug console and the serial port so far."""
        return self._console.data()

    def load(self, data: _Bytes, at: int | None = None, *, entry: int | None = None) -> None:
        """Copy an image into RAM at address `at`; the first load sets the entry.

        Without `at`, what `assemble` made knows its place; other bytes go to 0x7c00 in real
        mode and to 0x1000 elsewhere. With `entry` the guest starts there, otherwise the first
        load's first byte. Raises AddressError for an image that does not fit into RAM, or
        that would cover what kvmpy keeps at the top of it.
        """
        address: int = getattr(data, "origin", None) or 0 if at is None else at
        if at is None and not hasattr(data, "origin"):
            address = modes.DEFAULT_LOAD[self.layout.mode]
        end = address + len(data)
        if address < self.layout.low_ram and end > self.layout.base:
            raise self._does_not_fit(address, len(data))
        self.memory.write(address, data)
        if entry is not None or self.entry is None:
            self.set_entry(address if entry is None else entry)

    def load_image(self, image: Image) -> None:
        """Copy every segment of an image into RAM and start where it says (see `boot`)."""
        for segment in image.segments:
            if segment.address < self.layout.low_ram and segment.end > self.layout.base:
                raise self._does_not_fit(segment.address, segment.memory_size)
            self.load(segment.data, segment.address, entry=image.entry)
            zeros = segment.memory_size - len(segment.data)
            if zeros:
                self.memory.write(segment.address + len(segment.data), bytes(zeros))

    def set_entry(self, entry: int) -> None:
        """Have every vCPU start at address `entry`, in the state of the machine's mode.

        Raises AddressError for an address outside of RAM.
        """
        self.memory.read(entry, 1)
        for cpu in self.cpus:
            registers, special = modes.entry_state(self.layout, entry, cpu.get_sregs())
            cpu.set_sregs(special)
            cpu.set_regs(registers)
        self.entry = entry

    def _does_not_fit(self, address: int, size: int) -> AddressError:
        return AddressError(
            f"an image of {size} bytes at {address:#x} does not fit: the guest's RAM is "
            f"[0x0, {self.layout.base:#x}), and kvmpy keeps its tables above that; "
            "give the machine more memory or another address"
        )

    # Devices --------------------------------------------------------------------------------

    def attach_port(self, base: int, size: int, device: Device, name: str | None = None) -> Claim:
        """Let `device` answer `size` ports from `base` on; OverlapError names both owners."""
        return self.dispatch.attach(self.dispatch.ports, base, size, device, name)

    def attach_mmio(self, base: int, size: int, device: Device, name: str | None = None) -> Claim:
        """Let `device` answer `size` bytes of guest-physical addresses from `base` on."""
        ram = self.vm.memory.overlapping(base, size)
        if ram is not None:
            raise OverlapError(
                f"MMIO [{base:#x}, {base + size:#x}) of {name or device.name} overlaps the RAM at "
                f"[{ram.address:#x}, {ram.end:#x})"
            )
        return self.dispatch.attach(self.dispatch.mmio, base, size, device, name)

    def detach(self, claim: Claim) -> None:
        """Take back what `attach_port` or `attach_mmio` gave."""
        bus = self.dispatch.ports
        if bus.find(claim.base) is not claim:
            bus = self.dispatch.mmio
        self.dispatch.detach(bus, claim)

    def on_port(self, base: int, size: int = 1) -> Callable[[_F], _F]:
        """Make a device at `size` ports from `base` on of a function `f(offset, size, value)`.

        `value` is None for a read, and what the function returns is the answer.
        """

        def attach(function: _F) -> _F:
            self.attach_port(base, size, FunctionDevice(function))
            return function

        return attach

    def on_mmio(self, base: int, size: int = PAGE_SIZE) -> Callable[[_F], _F]:
        """The same for `size` bytes of guest-physical addresses from `base` on."""

        def attach(function: _F) -> _F:
            self.attach_mmio(base, size, FunctionDevice(function))
            return function

        return attach

    # Running --------------------------------------------------------------------------------

    def run(
        self, timeout: float | None = None, max_exits: int | None = None, cpu: int = 0
    ) -> Result:
        """Run a vCPU on this thread until the guest ends, or for `timeout` seconds, or exits.

        What the guest does to itself is the result's outcome. An exception of a device's is
        raised here, and so is KeyboardInterrupt; after either, the guest can be run on.
        """
        vcpu = self._ready(cpu)
        loop = vcpu.loop
        before = vcpu.exit_counts()
        loop.exits_left = _exit_limit(max_exits)
        started = time.perf_counter()
        try:
            with vcpu.entered(timeout):
                code = serve(lib.kvmpy_run, loop, self.dispatch, self._drain(vcpu))
        finally:
            self.seconds = seconds = time.perf_counter() - started
            self._drain(vcpu)()
        if code < 0:
            raise vcpu.run_error(-code)
        exit_ = decode(memoryview(vcpu.run_page)) if code == lib.KVMPY_EXIT else None
        return self._result(vcpu, _OUTCOMES.get(code, ""), exit_, seconds, before)

    def exits(
        self, timeout: float | None = None, max_exits: int | None = None, cpu: int = 0
    ) -> Iterator[Exit]:
        """Run a vCPU and see each of its exits, after the machine's devices have served it.

        The last one says how it ended; `Interrupted` for a timeout or `stop()`.
        """
        vcpu = self._ready(cpu)
        if self._posted:
            raise ConfigError("posted_console hides exits: make the machine without it to see them")
        left = _exit_limit(max_exits)
        deadline = None if timeout is None else time.monotonic() + timeout
        while left:
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            exit_ = vcpu.run(rest)
            serve_one(vcpu, self.dispatch, exit_)
            left -= 1
            yield exit_
            if self._end is not None or isinstance(exit_, _LAST):
                self._end = None
                lib.kvmpy_unkick(vcpu.loop)
                return

    def stop(self) -> None:
        """End the runs under way, from any thread, with the outcome "stopped".

        Where none is under way, it ends the next one: a stop is never lost.
        """
        for cpu in self.cpus:
            cpu.kick()

    def _ready(self, cpu: int) -> VCPU:
        self.vm.fd  # noqa: B018 - refuse a closed machine
        if not 0 <= cpu < len(self.cpus):
            raise ConfigError(f"there is no vCPU {cpu}: this machine has {len(self.cpus)}")
        if self.entry is None:
            raise ConfigError("nothing is loaded: load() a guest before running it")
        vcpu = self.cpus[cpu]
        vcpu.loop.exits_left = _exit_limit(None)
        return vcpu

    def _drain(self, vcpu: VCPU) -> Callable[[], None]:
        return (lambda: serve_posted(vcpu, self.dispatch)) if self._posted else _nothing

    def _finish_exit(self, vcpu: VCPU) -> None:
        code = serve(lib.kvmpy_finish, vcpu.loop, self.dispatch, _nothing)
        if code < 0:
            raise vcpu.run_error(-code)

    def _finish_run(self, outcome: str, detail: str = "", value: Any = None) -> None:
        """End the run under way with an outcome; devices call it."""
        if self._end is None:
            self._end = (outcome, detail, value)
        for cpu in self.cpus:
            if cpu.loop.running:
                cpu.kick()

    def _on_unclaimed(self, what: str) -> None:
        if self._strict:
            self._finish_run("unclaimed", what)

    def _report_exception(self, offset: int, size: int, value: int | None) -> int | None:
        """A reporting stub ran: decode the frame that the processor pushed for it."""
        if value is None:
            return 0xFF
        for cpu in self.cpus:
            registers = cpu.get_regs()
            vector = self.layout.vector_at(registers.rip)
            if vector is not None and cpu.loop.running:
                bits = 64 if self.layout.mode == "long" else 32
                frame = self.memory.read(registers.rsp, 6 * bits // 8)
                exception = decode_exception(vector, frame, cpu.get_sregs().cr2, bits)
                self._finish_run("exception", str(exception), exception)
        return None

    def _result(
        self, vcpu: VCPU, outcome: str, exit_: Exit | None, seconds: float, before: dict[str, int]
    ) -> Result:
        detail, value = "", None
        if outcome == "stopped" and self._end is not None:
            outcome, detail, value = self._end
        self._end = None
        if exit_ is not None:
            outcome, detail = _ending(exit_, vcpu)
        counts = {
            kind: count - before.get(kind, 0)
            for kind, count in vcpu.exit_counts().items()
            if count > before.get(kind, 0)
        }
        registers = vcpu.get_regs()
        if isinstance(value, GuestException):
            # Those of the code that raised it, not of the stub that reported it.
            registers.rip, registers.rsp = value.rip, value.rsp
            registers.rflags = value.rflags
        return Result(
            outcome=outcome,
            registers=registers,
            seconds=seconds,
            exits=counts,
            detail=detail,
            value=value if isinstance(value, int) else None,
            exception=value if isinstance(value, GuestException) else None,
            exit=exit_,
            unclaimed=tuple(self.unclaimed()),
        )

    def unclaimed(self) -> list[str]:
        """A line for each address at which accesses found no device, with their number."""
        return [line for one in self.dispatch.unclaimed.values() for line in one.lines()]

    # Closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close everything; again: nothing.

        Raises BufferError, with nothing closed, while a view of the RAM is alive.
        """
        self.vm.close()
        self._closed()

    def _closed(self) -> None:
        self.dispatch.release()
        self.kvm.close()

    def __enter__(self) -> Self:
        self.vm.fd  # noqa: B018 - refuse a closed machine
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.vm.__exit__(kind, error, traceback)
        self._closed()

    def __repr__(self) -> str:
        state = "closed" if self.vm.closed else f"{len(self.cpus)} vCPU(s)"
        return f"<Machine {self.layout.mode} mode, ring {self.layout.ring}, {state}>"


_LAST = (Halt, Shutdown, InternalError, FailEntry, Interrupted)


def _nothing() -> None:
    pass


def _ending(exit_: Exit, vcpu: VCPU) -> tuple[str, str]:
    """The outcome and the detail of an exit that ends a run."""
    match exit_:
        case Halt() | Shutdown():
            detail = ""
        case InternalError(instruction=code):
            detail = exit_.reason + (f": {code.hex(' ')}" if code else "")
        case FailEntry(hardware_reason=reason):
            detail = f"hardware reason {reason:#x}"
        case _:
            detail = str(exit_)
    return exit_kind(vcpu.run_page[8]), detail


def _memory_size(memory: str | int) -> int:
    size = parse_size(memory)
    if size % PAGE_SIZE:
        raise ConfigError(f"a memory of {size} bytes: give a multiple of 4096")
    if size > LARGEST_MEMORY:
        raise ConfigError(f"a memory of {size} bytes: a machine has at most 256G")
    return size


def _exit_limit(max_exits: int | None) -> int:
    if max_exits is None:
        return (1 << 64) - 1
    if not 0 < max_exits < 1 << 64:
        raise ConfigError(f"max_exits={max_exits}: give 1 or more, or None for no limit")
    return max_exits


def _cpuid(kvm: KVM) -> bytes:
    """What the host supports, packed; asked once per process, since it takes a while."""
    process = os.getpid()
    if process not in _supported_cpuid:
        _supported_cpuid.clear()
        entries = kvm.get_supported_cpuid()
        _supported_cpuid[process] = b"".join(entry.pack() for entry in entries)
    return _supported_cpuid[process]
