"""Taking a guest for what it is: a boot sector, a flat binary, an ELF file or a source."""

import os
from pathlib import Path

from kvmpy.boot.elf import load_elf
from kvmpy.boot.files import MAXIMUM_IMAGE, read_file, shown, starts_with
from kvmpy.boot.guests import find_guest, nearest_guest
from kvmpy.boot.segments import Image, LoadSegment
from kvmpy.boot.source import SUFFIXES, load_source
from kvmpy.errors import ConfigError, ImageError
from kvmpy.modes import DEFAULT_LOAD, MODES
from kvmpy.sizes import MAXIMUM_ADDRESS
from kvmpy.snapshot.layout import MAGIC

__all__ = ["MAXIMUM_IMAGE", "Image", "LoadSegment", "load_image"]

# Where a BIOS puts the first sector of a disk, and the mark in its last two bytes by which it
# knows a sector to start (BIOS Boot Specification 1.01, section 6.5).
_BOOT_SECTOR_ADDRESS = 0x7C00
_BOOT_SECTOR_SIZE = 512
_BOOT_SECTOR_MARK = b"\x55\xaa"

_ELF_MAGIC = b"\x7fELF"
_C_SUFFIXES = (".c", ".h", ".cc", ".cpp")


def load_image(
    guest: str | os.PathLike[str],
    *,
    mode: str = "auto",
    ring: int | None = None,
    load: int | None = None,
    entry: int | None = None,
) -> Image:
    """Return the image of `guest`, a file or the name of a shipped guest.

    A name that ends in .S, .s or .asm is an assembly source; a file that begins with 7f 'ELF'
    an executable; one of exactly 512 bytes that ends in 55 AA a boot sector, for real mode at
    0x7c00; anything else a flat binary, for long mode unless `mode` says otherwise. A file
    wins over a shipped guest of the same name.

    `mode` is "auto", "real", "protected16", "protected" or "long"; `ring` is 0 or 3; `load` is
    the guest-physical address of the first byte, and `entry` that of the first instruction.

    Raises ImageError if the guest is missing, unreadable, empty, larger than 1 GiB, not a
    regular file, a snapshot or malformed; ConfigError for an option that it cannot have;
    AssemblyError for a source that does not assemble.
    """
    _check_options(mode, ring, load, entry)
    path = _locate(guest)
    if path.suffix in SUFFIXES:
        return load_source(path, mode=mode, ring=ring, load=load, entry=entry)
    name = shown(path)
    if path.suffix in _C_SUFFIXES:
        raise ImageError(f"{name}: is C source: build it first (see guests/c/Makefile)")
    if starts_with(path, MAGIC):
        raise ImageError(
            f"{name}: is a snapshot: `kvmpy resume {name}` goes on with it, or in Python "
            "Machine.from_snapshot(Snapshot.load(path))"
        )
    data = read_file(path)
    if data.startswith(_ELF_MAGIC):
        if mode not in ("auto", "long"):
            raise ConfigError(f"{name}: an x86-64 ELF file starts in long mode, not in {mode!r}")
        if load is not None:
            raise ConfigError(f"{name}: an ELF file says its own addresses: leave out the load one")
        return load_elf(data, name, ring=ring, entry=entry)
    return _binary(data, name, mode=mode, ring=ring, load=load, entry=entry)


def _check_options(mode: str, ring: int | None, load: int | None, entry: int | None) -> None:
    if mode != "auto" and mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}: use auto, {', '.join(MODES)}")
    if ring not in (None, 0, 3):
        raise ConfigError(f"ring {ring!r} is not one that kvmpy starts in: use 0 or 3")
    for what, address in (("load address", load), ("entry", entry)):
        if address is not None and not 0 <= address <= MAXIMUM_ADDRESS:
            raise ConfigError(f"{what} {address:#x} is not an address of 52 bits: give a lower one")


def _locate(guest: str | os.PathLike[str]) -> Path:
    """The file that `guest` means."""
    text = os.fspath(guest)
    if not text:
        raise ImageError("no guest was named: give a file, or a name that `kvmpy guests` lists")
    path = Path(text)
    try:
        if not path.is_dir():
            path.stat()
            return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError):
        return path  # it is there but out of reach: reading it says why
    try:
        return find_guest(text)
    except ImageError:
        if path.is_dir():
            return path  # reading it says that it is a directory
        raise ImageError(
            f"{shown(text)}: no such file, and no shipped guest has this name{nearest_guest(text)}"
        ) from None


def _binary(
    data: bytes, name: str, *, mode: str, ring: int | None, load: int | None, entry: int | None
) -> Image:
    """The image of a file that does not say what it is."""
    marked = len(data) == _BOOT_SECTOR_SIZE and data.endswith(_BOOT_SECTOR_MARK)
    if marked and mode in ("auto", "real"):
        kind, chosen, usual = "boot sector", "real", _BOOT_SECTOR_ADDRESS
        why = "it is 512 bytes and ends in 55 aa"
    else:
        kind, chosen = "flat", "long" if mode == "auto" else mode
        usual = DEFAULT_LOAD[chosen]
        why = "it is neither a source, nor an ELF file, nor a boot sector"
        if marked:
            why = f"mode {mode!r} was asked for, in which no boot sector starts"
    address = usual if load is None else load
    return Image(
        kind=kind,
        name=name,
        segments=(LoadSegment(address, data, len(data)),),
        entry=address if entry is None else entry,
        mode=chosen,
        ring=ring,
        why=why,
    )
