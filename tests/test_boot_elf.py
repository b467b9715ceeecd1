"""ELF files: well-formed ones, and each way to be unusable."""

import struct
from pathlib import Path

import pytest

from kvmpy.boot import elf as elf_module
from kvmpy.boot.elf import load_elf
from kvmpy.boot.image import load_image
from kvmpy.boot.segments import Image, LoadSegment
from kvmpy.errors import ConfigError, ImageError

LOAD, DYNAMIC, INTERP = 1, 2, 3
ABSOLUTE = 0xFFF1
CODE = b"\xf4" * 16


def segment(
    kind: int = LOAD,
    address: int = 0x100000,
    data: bytes = CODE,
    memory: int | None = None,
    physical: int | None = None,
    **fields: int,
) -> dict[str, object]:
    """A program header and its bytes; `fields` replace what would be right."""
    return {
        "type": kind,
        "virtual": address,
        "physical": address if physical is None else physical,
        "data": data,
        "filesz": len(data),
        "memsz": len(data) if memory is None else memory,
    } | fields


def build(
    *segments: dict[str, object],
    symbols: tuple[tuple[str, int, int, int], ...] = (),
    **fields: int,
) -> bytes:
    """An ELF file; `symbols` are (name, st_info, section, value); `fields` go to the header."""
    header = {
        "class": 2,
        "order": 1,
        "type": 2,
        "machine": 62,
        "entry": 0x100000,
        "phoff": 64,
        "phentsize": 56,
        "phnum": len(segments),
        "shentsize": 64,
        "shnum": 3 if symbols else 0,
    }
    body, table = b"", b""
    start = 64 + 56 * len(segments)
    for part in segments:
        offset = part.get("offset", start + len(body))
        sizes = (part["virtual"], part["physical"], part["filesz"], part["memsz"])
        table += struct.pack("<IIQQQQQQ", part["type"], 7, offset, *sizes, 1)
        body += part["data"]  # type: ignore[operator]
    strings, entries = b"\0", bytes(24)
    for name, info, section, value in symbols:
        entries += struct.pack("<IBBHQQ", len(strings), info, 0, section, value, 0)
        strings += name.encode() + b"\0"
    at = start + len(body)
    header["shoff"] = at + len(entries) + len(strings) if symbols else 0
    header |= fields
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, at, len(entries), 2, 1, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, at + len(entries), len(strings), 0, 0, 1, 0)
    identity = b"\x7fELF" + bytes([header["class"], header["order"], 1]) + bytes(9)
    head = identity + struct.pack(
        "<HHIQQQIHHHHHH",
        header["type"],
        header["machine"],
        1,
        header["entry"],
        header["phoff"],
        header["shoff"],
        0,
        64,
        header["phentsize"],
        header["phnum"],
        header["shentsize"],
        header["shnum"],
        0,
    )
    return head + table + body + (entries + strings + sections if symbols else b"")


def error_of(data: bytes) -> str:
    """The one line that load_elf refuses `data` with."""
    with pytest.raises(ImageError) as caught:
        load_elf(data, "g.elf")
    message = str(caught.value)
    assert message.startswith("g.elf: ") and "\n" not in message
    return message


def test_a_static_executable() -> None:
    data = build(
        segment(),
        segment(address=0x101000, data=b"data", memory=0x2000),
        segment(kind=0x6474E551, data=b"", address=0),  # PT_GNU_STACK is nothing to load
        segment(address=0, data=b"", memory=0),
        symbols=(
            ("main", 0x12, 1, 0x100004),
            ("table", 0x11, 2, 0x101000),
            ("label", 0x00, 1, 0x100008),
            ("both", 0x00, 1, 0x100009),
            ("both", 0x10, 1, 0x10000A),
            ("both", 0x00, 1, 0x10000B),
            ("start.c", 0x04, ABSOLUTE, 0),
            ("elsewhere", 0x10, 0, 0),
        ),
    )
    image = load_elf(data, "g.elf")
    assert image.segments == (
        LoadSegment(0x100000, CODE, 16),
        LoadSegment(0x101000, b"data", 0x2000),
    )
    assert (image.kind, image.entry, image.mode, image.ring) == ("elf", 0x100000, "long", None)
    assert image.symbols == {
        "main": 0x100004,
        "table": 0x101000,
        "label": 0x100008,
        "both": 0x10000A,
    }


@pytest.mark.parametrize("ring", [0, 3])
def test_the_ring_is_an_absolute_symbol(ring: int) -> None:
    image = load_elf(build(segment(), symbols=(("kvmpy_ring", 0x10, ABSOLUTE, ring),)), "g")
    assert image.ring == ring
    assert "kvmpy_ring" not in image.symbols  # it is no address


def test_a_ring_that_is_none() -> None:
    data = build(segment(), symbols=(("kvmpy_ring", 0x10, ABSOLUTE, 1),))
    assert "its symbol kvmpy_ring is 1: make it 0 or 3" in error_of(data)


def test_a_variable_called_like_the_ring_is_a_variable() -> None:
    image = load_elf(build(segment(), symbols=(("kvmpy_ring", 0x11, 1, 0x100008),)), "g")
    assert (image.ring, image.symbols) == (None, {"kvmpy_ring": 0x100008})


def test_options_win() -> None:
    data = build(segment(), symbols=(("kvmpy_ring", 0x10, ABSOLUTE, 3),))
    image = load_elf(data, "g", ring=0, entry=0x9)
    assert (image.ring, image.entry) == (0, 9)


def test_segments_go_to_their_physical_addresses_and_the_entry_with_them() -> None:
    high = 0xFFFFFFFF80000000
    data = build(segment(address=high, physical=0x200000), entry=high + 4)
    image = load_elf(data, "g")
    assert (image.segments[0].address, image.entry) == (0x200000, 0x200004)


def test_an_entry_that_is_physical_already_stays() -> None:
    data = build(segment(address=0xFFFFFFFF80000000, physical=0x200000), entry=0x200008)
    assert load_elf(data, "g").entry == 0x200008


def test_physical_addresses_left_at_zero_are_not_used() -> None:
    data = build(segment(physical=0), segment(address=0x200000, physical=0))
    assert [part.address for part in load_elf(data, "g").segments] == [0x100000, 0x200000]


def test_segments_come_in_the_order_of_their_addresses() -> None:
    data = build(segment(address=0x300000), segment(address=0x100000), segment(address=0x200000))
    addresses = [part.address for part in load_elf(data, "g").segments]
    assert addresses == [0x100000, 0x200000, 0x300000]


def test_an_entry_outside_of_the_segments_is_left_to_the_machine() -> None:
    assert load_elf(build(segment(), entry=0x999999), "g").entry == 0x999999


NEEDED, NULL = struct.pack("<QQ", 1, 1), bytes(16)


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("table", [b"", NULL + NEEDED, struct.pack("<QQ", 5, 0x100000)])
def test_a_dynamic_section_without_work_for_a_linker_is_harmless(kind: int, table: bytes) -> None:
    data = build(segment(), segment(kind=DYNAMIC, address=0x101000, data=table), type=kind)
    assert len(load_elf(data, "g").segments) == 1


@pytest.mark.parametrize("tag", [1, 2, 7, 17, 23, 36])
@pytest.mark.parametrize("kind", [2, 3])
def test_a_dynamic_section_with_work_for_a_linker(kind: int, tag: int) -> None:
    table = struct.pack("<QQ", 5, 1) + struct.pack("<QQ", tag, 1) + NULL
    data = build(segment(), segment(kind=DYNAMIC, data=table), type=kind)
    assert "needs a dynamic linker: build it with -static -no-pie" in error_of(data)


def test_an_interpreter() -> None:
    data = build(segment(), segment(kind=INTERP, data=b"/lib/ld.so\0"))
    assert "needs a dynamic linker" in error_of(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (build(segment(), **{"class": 1}), "32-bit ELF file: build it with -m64"),
        (build(segment(), machine=183), "is for EM_AARCH64, not for x86-64"),
        (build(segment(), machine=3), "is for EM_386, not for x86-64"),
        (build(segment(), type=1), "is an object file: link it"),
        (build(segment(), type=4), "is a core dump"),
        (build(segment(), type=0), "is of no ELF type"),
        (build(segment(), type=0xFE00), "is of no ELF type"),
        (build(), "has no PT_LOAD segment"),
        (build(segment(kind=4)), "has no PT_LOAD segment"),
        (build(segment(data=b"", memory=0)), "has no PT_LOAD segment"),
        (build(segment(), phnum=200), "is truncated: its header table"),
        (build(segment(), phoff=1 << 63), "is truncated: its header table"),
        (build(segment(), phentsize=0), "header entries of a wrong size"),
        (build(segment(), shnum=1, shentsize=0), "header entries of a wrong size"),
        (build(segment(), shnum=9, shoff=64), "is truncated: its header table"),
        (build(*[segment()] * 1025), "has 1025 program headers"),
        (build(segment(offset=1 << 40)), "is truncated: a segment"),
        (build(segment(filesz=1 << 62, memsz=1 << 62)), "is truncated: a segment"),
        (build(segment(memsz=15)), "at 0x100000 of 15 bytes has 16 bytes in the file"),
        (build(segment(memory=1 << 60)), "ends past the 52 bits"),
        (build(segment(address=(1 << 64) - 8)), "ends past the 52 bits"),
        (build(segment(), segment(address=0x10000F)), "at 0x10000f of 16 bytes overlaps"),
        (build(segment(address=8, memory=1 << 40), segment()), "overlaps the one at 0x8"),
        (build(*[segment(offset=0, data=b"", filesz=99, memsz=99)] * 9), "more bytes than the"),
    ],
)
def test_unusable_files_say_why(data: bytes, message: str) -> None:
    assert message in error_of(data)


def test_symbols_past_the_end() -> None:
    data = bytearray(build(segment(), symbols=(("a", 0x10, 1, 1),)))
    size_of_symbols = len(data) - 128 + 32
    data[size_of_symbols : size_of_symbols + 8] = struct.pack("<Q", 1 << 40)
    assert "is truncated: its symbols" in error_of(bytes(data))


def test_big_endian_is_refused() -> None:
    assert "x86-64" in error_of(build(segment(), order=2, machine=62 << 8))


@pytest.mark.parametrize("data", [b"\x7fELF", b"\x7fELF\x02", build(segment())[:63]])
def test_the_start_of_a_file_is_a_damaged_one(data: bytes) -> None:
    assert "is a damaged ELF file" in error_of(data)


def test_whatever_pyelftools_raises_is_an_image_error(monkeypatch) -> None:
    def stumble(*_: object) -> Image:
        raise RecursionError("deep")

    monkeypatch.setattr(elf_module, "_load", stumble)
    assert "is a damaged ELF file (RecursionError)" in error_of(build(segment()))


def test_load_image_takes_elf_files_and_refuses_what_they_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "g"
    path.write_bytes(build(segment()))
    assert load_image(path).kind == load_image(path, mode="long", ring=3).kind == "elf"
    with pytest.raises(ConfigError, match="starts in long mode, not in 'real'"):
        load_image(path, mode="real")
    with pytest.raises(ConfigError, match="says its own addresses"):
        load_image(path, load=0x1000)
