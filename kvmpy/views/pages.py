"""A page walk: what every level of a guest's page tables says about a linear address.

Sources: SDM Vol.3 4.1.1 (paging modes), 4.3 to 4.5 (formats), 4.6 (rights), 4.7 (error codes).
Reserved bits follow Intel's tables. Protection keys are not looked at, for PKRU is in no struct
that comes with the special registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from kvmpy.errors import AddressError
from kvmpy.views.formats import NO_PAGING, Format, format_of, is_canonical, paging_mode
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.paging import PageFlags
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Access", "End", "Entry", "PageWalk", "Read", "cpl_of", "page_walk", "reader"]

Read: TypeAlias = Callable[[int, int], bytes | None]
"""`read(address, length)`: bytes at a guest-physical address, None where RAM does not have all."""

Access: TypeAlias = Literal["read", "write", "fetch"]
End: TypeAlias = Literal[
    "page", "no paging", "not present", "reserved bit", "outside RAM", "not canonical"
]
"""How a walk ends: at a page (or without paging), or why at none."""

_PRESENT, _WRITE, _USER, _LARGE = 1, 2, 4, 1 << 7
_NX: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Entry:
    """One level of a walk: the table's name, where the entry is, and what it says.

    `address` is guest-physical, `value` None where there is no RAM. `large` says that the entry
    maps a page although tables could follow, and `problem`, in words, why the walk ends here.
    """

    name: str
    index: int
    address: int
    value: int | None
    large: bool = False
    problem: str = ""

    @property
    def flags(self) -> PageFlags:
        """The flag bits of the entry, without the address."""
        return PageFlags((self.value or 0) & (0x1FF | _NX))


@dataclass(frozen=True, slots=True)
class PageWalk(Shown):
    """What a walk found for `access` to `linear` at ring `cpl`.

    `mode` is "no paging", "2-level", "PAE", "4-level" or "5-level"; `end` says how the walk ended.
    `physical` is None unless it came to a page of `page_size` bytes, which RAM has where `in_ram`.
    `writable`, `user` and `executable` are the bits of all levels together. `allowed` is the
    processor's verdict, `why` says it in a sentence, and `error_code` is that of the #PF, None
    where there is none.
    """

    linear: int
    mode: str
    access: Access
    cpl: int
    entries: tuple[Entry, ...]
    end: End
    physical: int | None
    page_size: int
    in_ram: bool
    writable: bool
    user: bool
    executable: bool
    allowed: bool
    why: str
    error_code: int | None

    def grids(self) -> tuple[Grid, ...]:
        """A row for each level, and the verdict."""
        rows = [
            (
                one.name,
                str(one.index),
                f"{one.address:#x}",
                "-" if one.value is None else f"{one.value:#x}",
                flag_words(one),
                one.problem,
            )
            for one in self.entries
        ]
        bad = frozenset(at for at, one in enumerate(self.entries) if one.problem)
        columns = ("table", "index", "entry at", "value", "flags", "problem")
        where = "nowhere" if self.physical is None else f"physical {self.physical:#x}"
        notes = [f"{self.linear:#x} leads {'to ' * (self.physical is not None)}{where}"]
        if self.page_size:
            rights = [
                "writable" if self.writable else "read-only",
                "user" if self.user else "supervisor",
                "executable" if self.executable else "no-execute",
            ]
            notes[0] += f", in a page of {size_words(self.page_size)}: {', '.join(rights)}"
        if self.physical is not None and not self.in_ram:
            notes[0] += "; no RAM is there"
        code = "" if self.error_code is None else f", error code {self.error_code:#x}"
        notes.append(f"{self.access} at ring {self.cpl}: {self.why}{code}")
        return (Grid(f"walk of {self.linear:#x}, {self.mode}", columns, rows, tuple(notes), bad),)


def reader(source: Callable[[int, int], bytes]) -> Read:
    """A `Read` of what raises AddressError instead, such as `machine.memory.read`."""

    def read(address: int, length: int) -> bytes | None:
        try:
            return source(address, length)
        except AddressError:
            return None

    return read


def cpl_of(special: SpecialRegisters) -> int:
    """The current privilege level: SS.DPL, which KVM keeps so in every mode."""
    return special.ss.dpl if special.cr0 & CR0.PE else 0


def page_walk(
    read: Read,
    special: SpecialRegisters,
    linear: int,
    access: Access = "read",
    *,
    cpl: int | None = None,
    ac: bool = False,
    physical_bits: int = 52,
    gigabyte_pages: bool = True,
) -> PageWalk:
    """Walk the page tables that CR3 leads to, for `access` to the address `linear`.

    `cpl` is by default that of `special`; `ac` is RFLAGS.AC, which lifts SMAP. Bits from
    `physical_bits` on (MAXPHYADDR) are reserved, and without `gigabyte_pages` (CPUID 0x80000001,
    EDX bit 26) so is the bit that makes such a page. Outside of long mode, only the low 32 bits of
    `linear` count. Raises AddressError for one that is no 64-bit number.
    """
    if not 0 <= linear < 1 << 64:
        raise AddressError(f"linear address {linear:#x} is no 64-bit number")
    cpl = cpl_of(special) if cpl is None else cpl
    mode = paging_mode(special)
    if mode == NO_PAGING:
        linear &= 0xFFFF_FFFF
        found = read(linear, 1) is not None
        why = "paging is off (CR0.PG = 0): linear addresses are physical ones"
        return PageWalk(linear, mode, access, cpl, (), NO_PAGING, linear, 0, found,
                        True, True, True, True, why, None)  # fmt: skip
    form = format_of(mode, gigabyte_pages)
    if form.canonical_bits is None:
        linear &= 0xFFFF_FFFF
    elif not is_canonical(linear, form.canonical_bits):
        why = (
            f"bits 63 to {form.canonical_bits - 1} are not all equal: #GP, or #SS for the stack, "
            "before any table is looked at"
        )
        return PageWalk(linear, mode, access, cpl, (), "not canonical", None, 0, False,
                        False, False, False, False, why, None)  # fmt: skip
    return _Walker(read, special, form, physical_bits).walk(mode, linear, access, cpl, ac)


class _Rights(NamedTuple):
    writable: bool
    user: bool
    executable: bool


class _Walker:
    def __init__(self, read: Read, special: SpecialRegisters, form: Format, bits: int) -> None:
        self.read, self.special, self.form, self.bits = read, special, form, bits
        self.nxe = bool(special.efer & EFER.NXE) and form.entry_size == 8

    def walk(self, mode: str, linear: int, access: Access, cpl: int, ac: bool) -> PageWalk:
        rights, no_execute = _WRITE | _USER, 0
        entries: list[Entry] = []
        table = self.special.cr3 & self.form.root_mask
        end: End = "page"
        physical, size = None, 0
        for level in self.form.levels:
            index = linear >> level.shift & level.count - 1
            address = table + index * self.form.entry_size
            data = self.read(address, self.form.entry_size)
            if data is None:
                entries.append(Entry(level.name, index, address, None, False, "outside RAM"))
                end = "outside RAM"
                break
            value = int.from_bytes(data, "little")
            if not value & _PRESENT:
                entries.append(Entry(level.name, index, address, value, False, "not present"))
                end = "not present"
                break
            large = level.is_large(value, self.special)
            reserved = value & level.reserved(large, self.bits, self.nxe)
            if reserved:
                text = f"reserved bit {_bits(reserved)} set"
                entries.append(Entry(level.name, index, address, value, large, text))
                end = "reserved bit"
                break
            entries.append(Entry(level.name, index, address, value, large))
            if level.has_rights:
                rights &= value
                no_execute |= value & _NX if self.nxe else 0
            if large or level.last:
                size = 1 << level.shift
                physical = level.page(value, large) | linear & size - 1
                break
            table = value & self.form.table_mask
        writable, user = bool(rights & _WRITE), bool(rights & _USER)
        if physical is None:
            why, code = self._no_page(entries[-1], end, access, cpl)
            return PageWalk(linear, mode, access, cpl, tuple(entries), end, None, 0, False,
                            False, False, False, False, why, code)  # fmt: skip
        refusal = self.refusal(access, cpl, ac, _Rights(writable, user, not no_execute))
        code = None if not refusal else 1 | self._code(access, cpl)
        return PageWalk(
            linear, mode, access, cpl, tuple(entries), end, physical, size,
            self.read(physical, 1) is not None, writable, user, not no_execute,
            not refusal, refusal or f"ring {cpl} may {access} here", code,
        )  # fmt: skip

    def _no_page(self, entry: Entry, end: End, access: Access, cpl: int) -> tuple[str, int | None]:
        where = f"the {entry.name} entry at {entry.address:#x}"
        if end == "outside RAM":
            return f"{where} is outside of RAM: its table's address is wrong", None
        code = self._code(access, cpl)
        if end == "not present":
            return f"{where} is not present (bit 0 is clear): #PF", code
        return f"{where} has {entry.problem}: #PF", code | 9

    def _code(self, access: Access, cpl: int) -> int:
        """W, U and I of a page fault's error code (SDM Vol.3 4.7)."""
        told = self.nxe or self.special.cr4 & CR4.SMEP
        fetch = 16 if access == "fetch" and told else 0
        return (access == "write") << 1 | (cpl == 3) << 2 | fetch

    def refusal(self, access: Access, cpl: int, ac: bool, rights: _Rights) -> str:
        """Why the access is a page fault; empty where it is none (SDM Vol.3 4.6.1)."""
        writable, user, executable = rights
        special = self.special
        if access == "fetch" and not executable:
            return "the page is no-execute (NX at some level): #PF"
        if cpl == 3:
            if not user:
                return "ring 3 may not use a supervisor page (U/S clear at some level): #PF"
            if access == "write" and not writable:
                return "the page is read-only (R/W clear at some level): #PF"
            return ""
        if user and access == "fetch" and special.cr4 & CR4.SMEP:
            return f"ring {cpl} may not execute a user page (CR4.SMEP): #PF"
        if user and access != "fetch" and special.cr4 & CR4.SMAP and not ac:
            return f"ring {cpl} may not {access} a user page (CR4.SMAP, RFLAGS.AC clear): #PF"
        if access == "write" and not writable and special.cr0 & CR0.WP:
            return "the page is read-only, also for the supervisor (CR0.WP): #PF"
        return ""


def _bits(value: int) -> str:
    return ", ".join(str(bit) for bit in range(64) if value >> bit & 1)


_LETTERS: Final = (
    (1 << 0, "P"),
    (_WRITE, "W"),
    (_USER, "U"),
    (1 << 3, "PWT"),
    (1 << 4, "PCD"),
    (1 << 5, "A"),
    (1 << 6, "D"),
    (1 << 8, "G"),
    (_NX, "NX"),
)


def flag_words(entry: Entry) -> str:
    """The flags of an entry by their letters (SDM Vol.3 tables 4-15 to 4-20)."""
    value = entry.value or 0
    if not value & _PRESENT:
        return "not present" if entry.value is not None else ""
    words = [word for bit, word in _LETTERS if value & bit]
    return " ".join(words + ["PS"] * entry.large)


def size_words(size: int) -> str:
    """A page's or range's size in the largest unit that it is a multiple of."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and not size & (1 << shift) - 1:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"
