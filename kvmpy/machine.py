"""A machine: a VM with memory, buses, devices and vCPUs, ready to load a guest and run it."""

import os
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kvmpy import modes
from kvmpy.attaching import Attaching
from kvmpy.boot.image import load_image
from kvmpy.boot.placing import check_entry, place_image
from kvmpy.boot.segments import Image
from kvmpy.bus import AccessFunction, Device, FunctionDevice
from kvmpy.console import Console
from kvmpy.debugging import Debugging
from kvmpy.devices import standard
from kvmpy.dispatch import NO_ROUTES, Dispatch
from kvmpy.errors import ConfigError
from kvmpy.kvm import KVM, packed_cpuid
from kvmpy.memory import PAGE_SIZE, AddressSpace
from kvmpy.sizes import check_count, parse_size
from kvmpy.snapshot import Config, Plan, Snapshot
from kvmpy.spawning import Spawning
from kvmpy.viewing import Viewing
from kvmpy.views.symbols import places

__all__ = ["EXTRA_RAM", "LOW_RAM_LIMIT", "Machine", "memory_size"]

LOW_RAM_LIMIT: Final = 3 << 30
EXTRA_RAM: Final = 4 << 30
LARGEST_MEMORY: Final = 256 << 30
_FIX_HYPERCALL_INSN: Final = 1 << 5  # KVM_X86_QUIRK_FIX_HYPERCALL_INSN

_F = TypeVar("_F", bound=AccessFunction)
_Bytes = bytes | bytearray | memoryview


class Machine(Spawning, Attaching, Viewing, Debugging):
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
        _origin: Snapshot | None = None,
    ) -> None:
        size = memory_size(memory)
        low = min(size, LOW_RAM_LIMIT)
        check_count("cpus", cpus)
        if irqchip not in (None, "split", "full"):
            raise ConfigError(f"irqchip={irqchip!r}: use None, 'split' or 'full'")
        config = Config(mode, ring, size, irqchip, strict, posted_console, devices)
        self._set_up(config, output, input)
        self._dispatch = self._standard()
        self.kvm = KVM()
        try:
            self.vm = self.kvm.create_vm()
            try:
                self._build(irqchip)
                if _origin is None:
                    self._add_ram(low, size - low, huge)
                else:
                    self._share_ram(_origin)
                for number in range(cpus):
                    self._add_cpu(None if _origin is None else _origin.cpus[number]["CPUID2"])
            except BaseException:
                self.vm.close()
                raise
        except BaseException:
            self.kvm.close()
            raise

    def _set_up(
        self,
        config: Config,
        output: Callable[[bytes], object] | None,
        input: Callable[[], bytes] | None,
    ) -> None:
        """All that comes before the VM, but for the devices."""
        low = min(config.memory, LOW_RAM_LIMIT)
        self.config = config
        self.layout = modes.build(config.mode, config.ring, low, config.memory - low)
        """What kvmpy puts at the top of low RAM."""
        self._console, self._input = Console(output), input
        self.entry: int | None = None
        """Where the guest starts; the first `load` sets it."""
        self.symbols: dict[str, int] = {}
        """The addresses of places in what was loaded, by the names that its source gives them."""
        super().__init__(strict=config.strict, posted=config.posted_console)

    def _standard(self) -> Dispatch:
        """The buses, with what every machine has."""
        made = Dispatch(self._on_unclaimed, self._on_end)
        attach, write = partial(made.attach, made.ports), self._console.write
        self._devices: dict[str, Device] = {}
        if self.config.devices:
            self._devices = standard.attach(attach, write, self._input, self._finish_run)
        if self.layout.stubs is not None:
            reporter = FunctionDevice(self._report_exception)
            attach(modes.EXCEPTION_PORT, 1, reporter, "exception reporter")
        made.standard = frozenset(made.ports)
        return made

    @property
    def devices(self) -> dict[str, Device]:
        """The standard devices by name: "serial", "post" and so on."""
        self.dispatch  # noqa: B018 - made from a snapshot, a machine has them when it needs them
        return self._devices

    @classmethod
    def from_image(
        cls, guest: Image | str | os.PathLike[str], memory: str | int | None = None, **options: Any
    ) -> Self:
        """A machine with `guest` loaded, in the mode and ring that it asks for.

        `guest` is an `Image`, a file, or the name of a guest that comes with kvmpy; `memory` is
        by default what it asks for, or 16M. The other options are those of `Machine`.
        """
        image = guest if isinstance(guest, Image) else load_image(guest)
        wanted = image.header.memory if image.header else None
        machine = cls(memory or wanted or "16M", image.mode, image.ring or 0, **options)
        try:
            machine.load_image(image)
        except BaseException:
            machine.close()
            raise
        return machine

    @classmethod
    def _made_from(cls, snapshot: Snapshot, options: dict[str, Any]) -> Self:
        config = snapshot.config
        return cls(
            config.memory,
            config.mode,
            config.ring,
            cpus=len(snapshot.cpus),
            irqchip=config.irqchip,
            strict=config.strict,
            posted_console=config.posted_console,
            devices=config.devices,
            _origin=snapshot,
            **options,
        )

    @classmethod
    def _spawned(cls, snapshot: Snapshot, options: dict[str, Any]) -> Self | None:
        if cls.__init__ is not Machine.__init__:  # it may have more to do
            return None
        plan = Plan.of(snapshot, _FIX_HYPERCALL_INSN)
        if plan is None:
            return None
        machine = cls.__new__(cls)
        machine._set_up(snapshot.config, options.get("output"), options.get("input"))
        machine.kvm, machine.vm = plan.make()
        for cpu in machine.cpus:
            cpu.loop.routes = NO_ROUTES
            cpu.finisher = partial(machine._finish_exit, cpu)
        return machine

    def _build(self, irqchip: str | None) -> None:
        if self.vm.check_extension("DISABLE_QUIRKS2") & _FIX_HYPERCALL_INSN:
            # A guest's memory is the guest's: KVM does not patch VMCALL and VMMCALL in it.
            self.vm.enable_cap("DISABLE_QUIRKS2", _FIX_HYPERCALL_INSN)
        if irqchip == "full":
            self.vm.create_irqchip()
        elif irqchip == "split":
            self.vm.create_split_irqchip()
        if self._posted:
            self.kvm.require("COALESCED_PIO")
            for port in standard.CONSOLE_PORTS:
                self.vm.register_coalesced(port, 1, port=True)

    def _add_ram(self, low: int, extra: int, huge: bool) -> None:
        ram = self.vm.add_memory(0, low, huge=huge)
        if extra:
            self.vm.add_memory(EXTRA_RAM, extra, huge=huge)
        if self.layout.data:
            ram.write(self.layout.base, self.layout.data)

    def _share_ram(self, origin: Snapshot) -> None:
        for slot, image in enumerate(origin.images):
            self.vm.adopt_memory(image.map(slot))

    def _add_cpu(self, cpuid: bytes | None) -> None:
        cpu = self.vm.create_vcpu()
        self.dispatch.lead(cpu.loop)
        cpu.finisher = partial(self._finish_exit, cpu)
        cpu.set_cpuid2(cpuid or packed_cpuid(self.kvm, cpu.index))
        if self._posted:
            cpu.watch_ring()

    # Memory and image -----------------------------------------------------------------------

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
        size = memoryview(data).nbytes
        self.layout.check_load(address, size)
        self.memory.write(address, data)
        self.symbols |= places(getattr(data, "symbols", {}), address, size)
        if entry is not None or self.entry is None:
            self.set_entry(address if entry is None else entry)

    def load_image(self, image: Image) -> None:
        """Copy every segment of an image into RAM and start where it says (see `boot`)."""
        if not isinstance(image, Image):
            raise ConfigError(
                f"{image!r:.80} is no Image: kvmpy.load_image makes one of a guest's name or file"
            )
        place_image(image, self.layout, self.memory)
        for segment in image.segments:
            self.symbols |= places(image.symbols, segment.address, segment.memory_size)
        self.set_entry(image.entry)

    def set_entry(self, entry: int) -> None:
        """Have every vCPU start at address `entry`, in the state of the machine's mode.

        Raises AddressError for an address outside of RAM.
        """
        check_entry(entry, self.memory)
        for cpu in self.cpus:
            registers, special = modes.entry_state(self.layout, entry, cpu.get_sregs())
            cpu.set_sregs(special)
            cpu.set_regs(registers)
        self.entry = entry

    # Closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close everything; again: nothing.

        Raises BufferError, with nothing closed, while a view of the RAM is alive.
        """
        self.vm.close()
        self._closed()

    def _closed(self) -> None:
        if self._dispatch is not None:
            self._dispatch.release()
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


def memory_size(memory: str | int) -> int:
    """The bytes of RAM that are meant; ConfigError where a machine cannot have so many."""
    size = parse_size(memory)
    if size % PAGE_SIZE:
        raise ConfigError(f"a memory of {size} bytes: give a multiple of 4096")
    if size > LARGEST_MEMORY:
        raise ConfigError(f"a memory of {size} bytes: a machine has at most 256G")
    return size
