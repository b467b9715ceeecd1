"""Guest memory by linear address, as gdb asks for it: RAM, and never anything of the host's."""

from collections.abc import Iterator

from kvmpy.errors import AddressError
from kvmpy.memory import PAGE_SIZE, AddressSpace
from kvmpy.views.pages import Read, page_walk, reader
from kvmpy.x86.flags import EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = ["GuestMemory"]


class GuestMemory:
    """RAM through a vCPU's page tables, whatever they permit; or by physical address."""

    def __init__(self, ram: AddressSpace) -> None:
        self.ram = ram
        self.physical = False
        """Whether addresses are guest-physical ones."""
        self.written = False
        """Whether `write` was used: page tables may have changed, which KVM may not notice."""
        self.read_ram: Read = reader(ram.read)

    def locate(self, special: SpecialRegisters, address: int) -> int | None:
        """The physical address of a byte of RAM; None where there is none."""
        if self.physical:
            found: int | None = address
        else:
            found = page_walk(self.read_ram, special, address).physical
        if found is None or self.read_ram(found, 1) is None:
            return None
        return found

    def _pieces(
        self, special: SpecialRegisters, start: int, size: int
    ) -> Iterator[tuple[int, int]]:
        wrap = (1 << 64 if special.efer & EFER.LMA or self.physical else 1 << 32) - 1
        done = 0
        while done < size:
            at = start + done & wrap
            step = min(size - done, PAGE_SIZE - at % PAGE_SIZE)
            found = self.locate(special, at)
            if found is None:
                return
            yield found, step
            done += step

    def read(self, special: SpecialRegisters, address: int, size: int) -> bytes:
        """As many of `size` bytes as there are without a gap."""
        return b"".join(
            self.ram.read(at, step) for at, step in self._pieces(special, address, size)
        )

    def write(self, special: SpecialRegisters, address: int, data: bytes) -> None:
        """Write all of `data`, or raise AddressError with nothing written."""
        pieces = list(self._pieces(special, address, len(data)))
        if sum(step for _, step in pieces) < len(data):
            raise AddressError(f"{len(data)} bytes at {address:#x} are not all mapped to RAM")
        for at, step in pieces:
            self.ram.write(at, data[:step])
            data = data[step:]
        self.written = True
