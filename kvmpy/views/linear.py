"""Reading at linear addresses, through the page tables."""

from kvmpy.views.pages import Read, page_walk
from kvmpy.x86.flags import EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = ["linear_reader", "read_linear"]

_PAGE = 4096


def read_linear(read: Read, special: SpecialRegisters, linear: int, length: int) -> bytes:
    """Up to `length` bytes at a linear address: as many as are mapped to RAM without a gap.

    Rights are not looked at. The address wraps at 4 GiB outside of long mode, else at 2**64.
    """
    wrap = (1 << 64 if special.efer & EFER.LMA else 1 << 32) - 1
    found = bytearray()
    while len(found) < length:
        at = linear + len(found) & wrap
        step = min(length - len(found), _PAGE - at % _PAGE)
        physical = page_walk(read, special, at).physical
        if physical is None:
            break
        data = read(physical, step)
        if data is None:
            break  # RAM ends at a page's border
        found += data
    return bytes(found)


def linear_reader(read: Read, special: SpecialRegisters) -> Read:
    """A `Read` of linear addresses; None where not all bytes are mapped to RAM."""

    def read_all(address: int, length: int) -> bytes | None:
        data = read_linear(read, special, address & (1 << 64) - 1, length)
        return data if len(data) == length else None

    return read_all
