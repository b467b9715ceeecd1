"""GDT and LDT from guest memory: each entry decoded, and what is wrong with it.

Sources: SDM Vol.3 3.4.5 (segment descriptors), 3.5 and table 3-2 (system descriptors), 3.5.1
(tables), 8.2.3 (16-byte descriptors of long mode).
"""

from dataclasses import dataclass
from typing import Final

from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Read
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.flags import CR0, EFER
from kvmpy.x86.segments import DescriptorTable, Segment
from kvmpy.x86.state import SpecialRegisters

__all__ = [
    "Descriptor",
    "DescriptorView",
    "decode_descriptor",
    "gdt_view",
    "ldt_view",
    "look_up",
    "segment_kind",
]

_SYSTEM32: Final = {
    1: "16-bit TSS (available)",
    2: "LDT",
    3: "16-bit TSS (busy)",
    4: "16-bit call gate",
    5: "task gate",
    6: "16-bit interrupt gate",
    7: "16-bit trap gate",
    9: "32-bit TSS (available)",
    11: "32-bit TSS (busy)",
    12: "32-bit call gate",
    14: "32-bit interrupt gate",
    15: "32-bit trap gate",
}
_SYSTEM64: Final = {
    2: "LDT",
    9: "64-bit TSS (available)",
    11: "64-bit TSS (busy)",
    12: "64-bit call gate",
    14: "64-bit interrupt gate",
    15: "64-bit trap gate",
}
_GATES: Final = frozenset({4, 5, 6, 7, 12, 14, 15})
_ONLY_IN_IDT: Final = frozenset({6, 7, 14, 15})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One entry of a GDT or LDT.

    `kind` says in words what it is, `segment` what loading it would give (None for gates, null and
    cut-off entries), and `problem` what is wrong with it, empty where nothing is. `target` is
    the selector and offset of a call gate. `raw` has 8 bytes, 16 for system descriptors of long
    mode, fewer where the table is cut off.
    """

    selector: int
    raw: bytes
    kind: str
    segment: Segment | None = None
    target: tuple[int, int] | None = None
    problem: str = ""

    def row(self, before: int = 0) -> tuple[str, ...]:
        """What a table shows of it, and of so many equal ones before it."""
        place = f"{self.selector:#06x}"
        if before:
            place = f"{self.selector - 8 * before:#06x} to {place}"
        base = limit = dpl = ""
        if self.segment is not None:
            base, limit = f"{self.segment.base:#x}", f"{self.segment.limit:#x}"
            dpl = str(self.segment.dpl)
        elif self.target is not None:
            base = f"to {self.target[0]:#x}:{self.target[1]:#x}"
            dpl = str(self.raw[5] >> 5 & 3)
        return place, base, limit, self.kind, dpl, self.problem


@dataclass(frozen=True, slots=True)
class DescriptorView(Shown):
    """A GDT or LDT: where it is, its entries, and what is wrong with the table as a whole."""

    name: str
    base: int
    limit: int
    entries: tuple[Descriptor, ...]
    problem: str = ""

    def grids(self) -> tuple[Grid, ...]:
        """A row for each entry; one for a run of null ones."""
        rows: list[tuple[str, ...]] = []
        bad: set[int] = set()
        nulls = 0
        for at, one in enumerate(self.entries):
            after = self.entries[at + 1 : at + 2]
            if one.kind == "null" and after and after[0].kind == "null":
                nulls += 1
                continue
            if one.problem:
                bad.add(len(rows))
            rows.append(one.row(nulls))
            nulls = 0
        columns = ("selector", "base", "limit", "what it is", "dpl", "problem")
        title = f"{self.name} at {self.base:#x}, limit {self.limit:#x}"
        notes = (self.problem,) if self.problem else ()
        return (Grid(title, columns, rows, notes, frozenset(bad)),)


def segment_kind(segment: Segment, long_mode: bool) -> str:
    """A descriptor's or hidden part's type in words (SDM Vol.3 tables 3-1 and 3-2)."""
    if not segment.s:
        table = _SYSTEM64 if long_mode else _SYSTEM32
        return table.get(segment.type, f"reserved system type {segment.type}")
    if segment.type & 8:
        bits = "64" if segment.l and long_mode else "32" if segment.db else "16"
        readable = "execute/read" if segment.type & 2 else "execute-only"
        return f"{bits}-bit code, {readable}" + (", conforming" if segment.type & 4 else "")
    writable = "read/write" if segment.type & 2 else "read-only"
    return f"data, {writable}" + (", expand-down" if segment.type & 4 else "")


def decode_descriptor(
    selector: int, raw: bytes, *, long_mode: bool = False, linear_bits: int = 48
) -> Descriptor:
    """Decode the bytes at a selector's place: 16 of them, or fewer where the table ends.

    In long mode a system descriptor takes 16 bytes, anything else 8.
    """
    if len(raw) < 8:
        return Descriptor(selector, raw, "cut off", problem=f"only {len(raw)} of 8 bytes are there")
    wide = long_mode and not raw[5] & 0x10 and bool(any(raw[:8]))
    if not any(raw[:8]):
        return Descriptor(selector, raw[:8], "null")
    if wide and raw[5] & 0xF in _SYSTEM64 and len(raw) < 16:
        kind = _SYSTEM64[raw[5] & 0xF]
        problem = f"only {len(raw)} of the 16 bytes of a system descriptor are there"
        return Descriptor(selector, raw, kind, problem=problem)
    raw = raw[:16] if wide and raw[5] & 0xF in _SYSTEM64 else raw[:8]
    segment = Segment.from_descriptor(selector, raw)
    kind = segment_kind(segment, long_mode)
    problem = _problem(raw, segment, long_mode, linear_bits)
    if not segment.s and segment.type in _GATES:
        offset = int.from_bytes(raw[0:2] + raw[6:8] + raw[8:12], "little")
        target = (int.from_bytes(raw[2:4], "little"), offset)
        return Descriptor(selector, raw, kind, None, target, problem)
    return Descriptor(selector, raw, kind, segment, None, problem)


def _problem(raw: bytes, segment: Segment, long_mode: bool, linear_bits: int) -> str:
    if not segment.s:
        if segment.type not in (_SYSTEM64 if long_mode else _SYSTEM32):
            return "the type is reserved: loading it is a #GP"
        if segment.type in _ONLY_IN_IDT:
            return "such a gate belongs into the IDT"
        if len(raw) == 16 and raw[13] & 0x1F:
            return "the type bits of the upper half must be 0"
        based = len(raw) == 16 and segment.type not in _GATES
        if based and not is_canonical(segment.base, linear_bits):
            return f"the base {segment.base:#x} is not canonical"
    elif segment.type & 8 and segment.l and segment.db and long_mode:
        return "L and D are both set, which is reserved"
    if not segment.present:
        return "not present: loading it is a #NP"
    return ""


def look_up(read: Read, special: SpecialRegisters, selector: int) -> Descriptor:
    """The descriptor that `selector` means, in the GDT or (bit 2 set) the LDT."""
    name, table, problem = _table(special, bool(selector & 4))
    start = selector & ~7
    if problem:
        return Descriptor(selector, b"", "none", problem=problem)
    room = table.limit + 1 - start
    if room < 8:
        text = f"beyond the {name}'s limit {table.limit:#x}"
        return Descriptor(selector, b"", "none", problem=text)
    raw = read_linear(read, special, table.base + start, min(16, room))
    return decode_descriptor(
        selector,
        raw,
        long_mode=bool(special.efer & EFER.LMA),
        linear_bits=canonical_bits(special),
    )


def _table(special: SpecialRegisters, local: bool) -> tuple[str, DescriptorTable, str]:
    if not local:
        return "GDT", special.gdt, ""
    ldt = special.ldt
    usable = ldt.present and not ldt.unusable
    return "LDT", DescriptorTable(ldt.base, ldt.limit), "" if usable else "LDTR holds no LDT"


def gdt_view(read: Read, special: SpecialRegisters) -> DescriptorView:
    """The GDT that GDTR leads to."""
    note = "" if special.cr0 & CR0.PE else "real mode: the processor does not look at it"
    return _view(read, special, False, note)


def ldt_view(read: Read, special: SpecialRegisters) -> DescriptorView:
    """The LDT that LDTR leads to; without entries where it holds none."""
    return _view(read, special, True, "")


def _view(read: Read, special: SpecialRegisters, local: bool, note: str) -> DescriptorView:
    name, table, problem = _table(special, local)
    if problem:
        return DescriptorView(name, table.base, table.limit, (), problem)
    size = min(table.limit, 0xFFFF) + 1  # an LDT's may be larger; selectors reach no further
    data = read_linear(read, special, table.base, size)
    long_mode, bits = bool(special.efer & EFER.LMA), canonical_bits(special)
    found: list[Descriptor] = []
    at = 0
    while at < len(data):
        one = decode_descriptor(
            at | local << 2, data[at : at + 16], long_mode=long_mode, linear_bits=bits
        )
        found.append(one)
        at += max(8, len(one.raw))
    problems = [note] if note else []
    if len(data) < size:
        end = table.base + len(data)
        problems.append(f"no RAM from {end:#x} on: {len(data)} of {size} bytes are there")
    return DescriptorView(name, table.base, table.limit, tuple(found), "; ".join(problems))
