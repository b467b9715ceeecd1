"""What the stub asks of the guest, in terms of packets: registers, memory, breakpoints, words."""

from typing import Protocol

from kvmpy.gdb.control import Control
from kvmpy.gdb.description import REGISTERS
from kvmpy.gdb.monitor import Monitor
from kvmpy.views.cpumode import cpu_mode
from kvmpy.views.pages import cpl_of

__all__ = ["GuestTarget", "Target"]


class Target(Protocol):
    """A stopped guest. Each method may raise a KvmpyError, which gdb gets as an error."""

    physical: bool
    """Whether memory is read and written by guest-physical address."""

    @property
    def count(self) -> int:
        """How many vCPUs there are."""

    def describe(self, cpu: int) -> str:
        """A few words about a vCPU."""

    def read_register(self, cpu: int, number: int) -> bytes:
        """One register, lowest byte first."""

    def write_registers(self, cpu: int, values: dict[int, bytes]) -> None:
        """Change registers, all at once."""

    def read_memory(self, cpu: int, address: int, size: int) -> bytes:
        """As many of `size` bytes as can be read."""

    def write_memory(self, cpu: int, address: int, data: bytes) -> None:
        """Write all of `data`, or nothing."""

    def insert(self, cpu: int, kind: int, address: int, size: int) -> None:
        """Take in a breakpoint of type `kind`, as the packet Z counts them."""

    def remove(self, kind: int, address: int) -> None:
        """Take it out."""

    def monitor(self, cpu: int, command: str) -> str:
        """Carry out a `monitor` command; what it prints."""


class GuestTarget:
    """The guest that a `Control` runs."""

    def __init__(self, control: Control, monitor: Monitor) -> None:
        self._control, self._monitor = control, monitor

    @property
    def physical(self) -> bool:
        """Whether memory is read and written by guest-physical address."""
        return self._control.memory.physical

    @physical.setter
    def physical(self, on: bool) -> None:
        self._control.memory.physical = on

    @property
    def count(self) -> int:
        """How many vCPUs there are."""
        return self._control.count

    def describe(self, cpu: int) -> str:
        """Mode and ring."""
        file = self._control.registers(cpu)
        words = cpu_mode(file.special, file.general.rflags).name
        words += f", ring {cpl_of(file.special)}"
        return words + (", halted" if cpu in self._control.ended else "")

    def read_register(self, cpu: int, number: int) -> bytes:
        """One register, lowest byte first."""
        return self._control.registers(cpu).get(number)

    def write_registers(self, cpu: int, values: dict[int, bytes]) -> None:
        """Change registers; those that are as they are already are left alone."""
        file = self._control.registers(cpu)
        try:
            # Control registers and selectors first: they decide what RIP and the bases mean.
            order = {"control": 0, "selector": 1}
            for number in sorted(values, key=lambda one: order.get(REGISTERS[one].group, 2)):
                file.set(number, values[number])
            file.flush()
        except BaseException:
            self._control.reread(cpu)
            raise

    def read_memory(self, cpu: int, address: int, size: int) -> bytes:
        """As many of `size` bytes as are mapped to RAM."""
        return self._control.memory.read(self._control.registers(cpu).special, address, size)

    def write_memory(self, cpu: int, address: int, data: bytes) -> None:
        """Write all of `data`; AddressError, with nothing written, where it is not all RAM."""
        self._control.memory.write(self._control.registers(cpu).special, address, data)

    def insert(self, cpu: int, kind: int, address: int, size: int) -> None:
        """Take in a breakpoint (see `Breakpoints.insert`)."""
        special = self._control.registers(cpu).special
        self._control.points.insert(kind, address, size, special)

    def remove(self, kind: int, address: int) -> None:
        """Take it out."""
        self._control.points.remove(kind, address)

    def monitor(self, cpu: int, command: str) -> str:
        """Carry out a `monitor` command; what it prints."""
        return self._monitor.run(cpu, command)
