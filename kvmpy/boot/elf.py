"""Static ELF64 executables for x86-64 (System V gABI chapters 4 and 5, x86-64 psABI).

Segments go to their physical addresses (p_paddr), as a boot loader puts them; kvmpy's long
mode maps memory one to one, so that an entry given as a virtual address is turned into the
physical one of its segment. Where every p_paddr is zero, as some linkers leave them, p_vaddr
is taken instead. Symbols keep the values that the file gives them.

An absolute symbol `kvmpy_ring` with the value 0 or 3 says in which ring the guest starts.

Nothing in the file is trusted: whatever it says, time and memory stay bounded.
"""

from io import BytesIO
from struct import Struct
from typing import Any, NamedTuple

from kvmpy.boot.segments import Image, LoadSegment
from kvmpy.errors import ImageError
from kvmpy.sizes import MAXIMUM_ADDRESS

__all__ = ["load_elf"]

_PROGRAM_HEADER_SIZE = 56
_SECTION_HEADER_SIZE = 64
# Linux refuses program headers of more than 64 KiB as well; symbols are a help, no more.
_MOST_PROGRAM_HEADERS = 1024
_MOST_SECTIONS = 4096
_MOST_SYMBOLS = 1 << 18
_LONGEST_NAME = 512

_RING_SYMBOL = "kvmpy_ring"
_NAMED_TYPES = (0, 1, 2)  # STT_NOTYPE, STT_OBJECT, STT_FUNC
_UNDEFINED = 0
_ABSOLUTE = 0xFFF1
# pyelftools takes tens of microseconds for each symbol; a kernel has more than a hundred thousand.
_SYMBOL = Struct("<IBBHQQ")  # st_name, st_info, st_other, st_shndx, st_value, st_size

# Tags of the dynamic section that leave work for a dynamic linker: DT_NEEDED, DT_PLTRELSZ,
# DT_RELA, DT_REL, DT_JMPREL, DT_RELR.
_DYNAMIC_WORK = frozenset({1, 2, 7, 17, 23, 36})
_DYNAMIC = Struct("<QQ")
_MOST_DYNAMIC = 4096 * _DYNAMIC.size

_WRONG_TYPES = {
    "ET_REL": "is an object file: link it into a static executable first",
    "ET_CORE": "is a core dump: give the program itself",
    "ET_NONE": "is of no ELF type: link it into a static executable",
}


class _Symbols(NamedTuple):
    names: dict[str, int]
    ring: int | None


def load_elf(data: bytes, name: str, *, ring: int | None = None, entry: int | None = None) -> Image:
    """Return the image of the ELF file whose bytes are `data`; `name` is for messages.

    `ring` and `entry` win over what the file says. Raises ImageError if it is damaged, of
    another machine or width, needs a dynamic linker, or has nothing to load.
    """
    try:
        return _load(data, name, ring, entry)
    except ImageError:
        raise
    except Exception as error:
        # pyelftools raises whatever it stumbles over in a malformed file.
        raise ImageError(
            f"{name}: is a damaged ELF file ({type(error).__name__}): build it again"
        ) from error


def _load(data: bytes, name: str, ring: int | None, entry: int | None) -> Image:
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(BytesIO(data))
    _check_kind(elf, name)
    headers = _program_headers(elf, data, name)
    loads = [header for header in headers if header["p_type"] == "PT_LOAD" and header["p_memsz"]]
    if not loads:
        raise ImageError(f"{name}: has no PT_LOAD segment: link it into a static executable")
    _check_static(headers, data, name)
    field = "p_paddr" if any(header["p_paddr"] for header in loads) else "p_vaddr"
    symbols = _symbols(elf, data, name)
    return Image(
        kind="elf",
        name=name,
        segments=_segments(loads, field, data, name),
        entry=_entry(elf["e_entry"], loads, field) if entry is None else entry,
        mode="long",
        ring=symbols.ring if ring is None else ring,
        why="it begins with 7f 'ELF'",
        symbols=symbols.names,
    )


def _check_kind(elf: Any, name: str) -> None:
    if elf.elfclass != 64:
        raise ImageError(f"{name}: is a {elf.elfclass}-bit ELF file: build it with -m64")
    machine, kind = elf["e_machine"], elf["e_type"]
    if machine != "EM_X86_64" or not elf.little_endian:
        raise ImageError(f"{name}: is for {machine}, not for x86-64: build it for x86-64")
    if kind not in ("ET_EXEC", "ET_DYN"):
        raise ImageError(f"{name}: {_WRONG_TYPES.get(kind, _WRONG_TYPES['ET_NONE'])}")


def _table(elf: Any, kind: str, size: int, data: bytes, name: str) -> range:
    """The offsets of the entries of the program ("ph") or section ("sh") header table."""
    count, offset = elf[f"e_{kind}num"], elf[f"e_{kind}off"]
    if count and elf[f"e_{kind}entsize"] != size:
        raise ImageError(f"{name}: has header entries of a wrong size: build it again")
    if offset + count * size > len(data):
        raise ImageError(f"{name}: is truncated: its header table lies past its end; copy it again")
    return range(offset, offset + count * size, size)


def _program_headers(elf: Any, data: bytes, name: str) -> list[Any]:
    from elftools.common.utils import struct_parse

    offsets = _table(elf, "ph", _PROGRAM_HEADER_SIZE, data, name)
    if len(offsets) > _MOST_PROGRAM_HEADERS:
        raise ImageError(f"{name}: has {len(offsets)} program headers: build it with fewer")
    headers = [struct_parse(elf.structs.Elf_Phdr, elf.stream, offset) for offset in offsets]
    for header in headers:
        if header["p_offset"] + header["p_filesz"] > len(data):
            raise ImageError(f"{name}: is truncated: a segment lies past its end; copy it again")
    return headers


def _check_static(headers: list[Any], data: bytes, name: str) -> None:
    for header in headers:
        kind, start = header["p_type"], header["p_offset"]
        table = data[start : start + min(header["p_filesz"], _MOST_DYNAMIC)]
        if kind == "PT_INTERP" or (kind == "PT_DYNAMIC" and _needs_linker(table)):
            raise ImageError(f"{name}: needs a dynamic linker: build it with -static -no-pie")


def _needs_linker(table: bytes) -> bool:
    whole = len(table) - len(table) % _DYNAMIC.size
    for tag, _ in _DYNAMIC.iter_unpack(table[:whole]):
        if tag == 0:  # DT_NULL ends the table
            return False
        if tag in _DYNAMIC_WORK:
            return True
    return False


def _segments(loads: list[Any], field: str, data: bytes, name: str) -> tuple[LoadSegment, ...]:
    # Segments that share the file's bytes could make a small file ask for any amount of memory.
    if sum(header["p_filesz"] for header in loads) > len(data):
        raise ImageError(f"{name}: its segments hold more bytes than the file: build it again")
    segments: list[LoadSegment] = []
    for header in sorted(loads, key=lambda header: int(header[field])):
        address, size, stored = header[field], header["p_memsz"], header["p_filesz"]
        what = f"{name}: the segment at {address:#x} of {size} bytes"
        if stored > size:
            raise ImageError(f"{what} has {stored} bytes in the file: build it again")
        if address + size > MAXIMUM_ADDRESS + 1:
            raise ImageError(f"{what} ends past the 52 bits of an address: link it lower")
        if segments and address < segments[-1].end:
            raise ImageError(f"{what} overlaps the one at {segments[-1].address:#x}: link it anew")
        start = header["p_offset"]
        segments.append(LoadSegment(address, data[start : start + stored], size))
    return tuple(segments)


def _entry(entry: int, loads: list[Any], field: str) -> int:
    """The physical address of the virtual address `entry`, or itself if it is in no segment."""
    for header in loads:
        start = header["p_vaddr"]
        if start <= entry < start + header["p_memsz"]:
            return int(header[field] + entry - start)
    return entry


def _symbols(elf: Any, data: bytes, name: str) -> _Symbols:
    from elftools.common.utils import struct_parse

    offsets = _table(elf, "sh", _SECTION_HEADER_SIZE, data, name)[:_MOST_SECTIONS]
    sections = [struct_parse(elf.structs.Elf_Shdr, elf.stream, offset) for offset in offsets]
    for section in sections:
        if section["sh_type"] == "SHT_SYMTAB" and section["sh_link"] < len(sections):
            table = _contents(section, data, name)
            return _read_symbols(table, _contents(sections[section["sh_link"]], data, name), name)
    return _Symbols({}, None)


def _contents(section: Any, data: bytes, name: str) -> bytes:
    start, size = section["sh_offset"], section["sh_size"]
    if start + size > len(data):
        raise ImageError(f"{name}: is truncated: its symbols lie past its end; copy it again")
    return data[start : start + size]


def _read_symbols(table: bytes, strings: bytes, name: str) -> _Symbols:
    names: dict[str, int] = {}
    ring = None
    count = min(len(table) // _SYMBOL.size, _MOST_SYMBOLS)
    for start, info, _, section, value, _ in _SYMBOL.iter_unpack(table[: count * _SYMBOL.size]):
        end = strings.find(b"\0", start, start + _LONGEST_NAME)
        if section == _UNDEFINED or info & 0xF not in _NAMED_TYPES or end <= start:
            continue
        symbol = strings[start:end].decode("utf-8", "replace")
        if symbol == _RING_SYMBOL and section == _ABSOLUTE:
            if value not in (0, 3):
                raise ImageError(f"{name}: its symbol {_RING_SYMBOL} is {value}: make it 0 or 3")
            ring = value
        elif info >> 4 or symbol not in names:  # a global symbol wins over a local one
            names[symbol] = value
    return _Symbols(names, ring)
