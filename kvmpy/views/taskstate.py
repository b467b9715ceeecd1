"""The TSS from guest memory: stacks, the IST, the I/O permission bitmap.

Sources: SDM Vol.3 8.2.1 (32-bit), 8.6 (16-bit), 8.7 (64-bit); Vol.1 19.5.2 (the bitmap).
"""

from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Read
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.flags import CR0, EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = ["TssView", "tss_view"]

_PORTS: Final = 1 << 16
_64: Final = (
    Struct("<4x3Q8x7Q10xH"),
    (*(f"rsp{n}" for n in range(3)), *(f"ist{n}" for n in range(1, 8)), "iomap"),
)
_32: Final = (
    Struct("<H2x" + "IH2x" * 3 + "11I" + "H2x" * 7 + "HH"),
    (
        *("link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2"),
        *("cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"),
        *("es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap", "iomap"),
    ),
)
_16: Final = (
    Struct("<22H"),
    (
        *("link", "sp0", "ss0", "sp1", "ss1", "sp2", "ss2", "ip", "flags"),
        *("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "es", "cs", "ss", "ds", "ldt"),
    ),
)


@dataclass(frozen=True, slots=True)
class TssView(Shown):
    """The task state segment that TR leads to.

    `bits` is 64, 32, 16, or 0 where there is none; `fields` are its fields by name. `ports` are the
    ranges [first, last] that the I/O bitmap opens to rings above IOPL. `problems` are sentences.
    """

    selector: int
    base: int
    limit: int
    bits: int
    fields: dict[str, int] = field(default_factory=dict)
    ports: tuple[tuple[int, int], ...] = ()
    problems: tuple[str, ...] = ()

    def grids(self) -> tuple[Grid, ...]:
        """The fields that are not zero, the open ports and the problems."""
        rows = [(name, f"{value:#x}") for name, value in self.fields.items() if value]
        notes = list(self.problems)
        if self.fields:
            shown = ", ".join(f"{a:#x}" if a == b else f"{a:#x}-{b:#x}" for a, b in self.ports[:16])
            more = f" and {len(self.ports) - 16} more ranges" if len(self.ports) > 16 else ""
            notes.append(f"ports open to rings above IOPL: {shown or 'none'}{more}")
        kind = f"{self.bits}-bit TSS" if self.bits else "no TSS"
        title = f"{kind}: TR {self.selector:#06x}, base {self.base:#x}, limit {self.limit:#x}"
        return (Grid(title, ("field", "value"), rows, tuple(notes)),)


def tss_view(read: Read, special: SpecialRegisters) -> TssView:
    """The TSS that TR's hidden part leads to, whether or not the guest has ever loaded TR."""
    tr = special.tr
    if not special.cr0 & CR0.PE:
        return TssView(tr.selector, tr.base, tr.limit, 0, problems=("real mode has no TSS",))
    if tr.unusable or not tr.present:
        return TssView(tr.selector, tr.base, tr.limit, 0, problems=("TR holds no TSS",))
    long_mode = bool(special.efer & EFER.LMA)
    bits = 64 if long_mode else 32 if tr.type & 8 else 16
    layout, names = _64 if long_mode else _32 if bits == 32 else _16
    problems = []
    if tr.limit < layout.size - 1:
        problems.append(f"the limit {tr.limit:#x} is less than {layout.size - 1:#x}: no whole TSS")
    data = read_linear(read, special, tr.base, layout.size)
    if len(data) < layout.size:
        problems.append(f"no RAM at {tr.base + len(data):#x}, {len(data)} bytes into it")
        return TssView(tr.selector, tr.base, tr.limit, bits, problems=tuple(problems))
    fields = dict(zip(names, layout.unpack(data), strict=True))
    if long_mode:
        width = canonical_bits(special)
        problems += [
            f"{name} {value:#x} is not canonical"
            for name, value in fields.items()
            if name != "iomap" and not is_canonical(value, width)
        ]
    ports: tuple[tuple[int, int], ...] = ()
    if "iomap" in fields:
        ports = _open_ports(read, special, fields["iomap"])
    return TssView(tr.selector, tr.base, tr.limit, bits, fields, ports, tuple(problems))


def _open_ports(read: Read, special: SpecialRegisters, start: int) -> tuple[tuple[int, int], ...]:
    """The ranges of ports whose bits are clear, within the limit.

    The processor reads two bytes for each port, so those in the last byte are closed.
    """
    tr = special.tr
    size = min(tr.limit - start, _PORTS // 8)
    if size <= 0:
        return ()
    data = read_linear(read, special, tr.base + start, size)
    if not any(data) and data:
        return ((0, 8 * len(data) - 1),)
    found: list[tuple[int, int]] = []
    value, port, end = int.from_bytes(data, "little"), 0, 8 * len(data)
    mask = (1 << end) - 1
    clear = ~value & mask
    while clear:
        first = (clear & -clear).bit_length() - 1
        after = ~clear >> first  # bits from `first` on that are set in `value`
        count = min((after & -after).bit_length() - 1, end - port - first)
        found.append((port + first, port + first + count - 1))
        clear >>= first + count
        port += first + count
    return tuple(found)
