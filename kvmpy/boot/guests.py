"""The guests that kvmpy ships: where they are, and their golden bytes.

A golden file is what a guest's source assembles to, made by `python -m kvmpy.boot.golden` and
kept beside the sources: `golden/NAME.bin`, and for all of them `golden/index.json`:

    {NAME: {"sha256": of the source file, "origin": address, "symbols": {name: address}}}

An unchanged source is run from its golden bytes, without the assembler, which is slow to load.
"""

from pathlib import Path
from typing import NamedTuple

from kvmpy.boot.files import read_file, shown
from kvmpy.boot.header import parse_header
from kvmpy.errors import ImageError

__all__ = ["GoldenBytes", "GuestInfo", "find_guest", "golden_bytes", "list_guests", "nearest_guest"]

_PACKAGE = Path(__file__).parent.parent
# Installed, the guests are package data; in a checkout they lie beside the package.
_PLACES = (_PACKAGE / "guests", _PACKAGE.parent / "guests")


class GuestInfo(NamedTuple):
    """A shipped guest: its name, the title in its source's first line, and its source."""

    name: str
    title: str
    path: Path


class GoldenBytes(NamedTuple):
    """A guest's assembled bytes, the address of the first, and its symbols' addresses."""

    data: bytes
    origin: int
    symbols: dict[str, int]


def guests_directory() -> Path:
    """Return the directory of the shipped guests. Raises ImageError if there is none."""
    for place in _PLACES:
        if place.is_dir():
            return place
    raise ImageError(f"{shown(_PLACES[0])}: no shipped guests here: install kvmpy again")


def list_guests(directory: Path | None = None) -> list[GuestInfo]:
    """Return the shipped guests (or those in `directory`), in alphabetical order.

    Raises ImageError if a source cannot be read or its header is malformed.
    """
    guests = []
    for path in sorted((directory or guests_directory()).glob("*.S")):
        header = parse_header(read_file(path).decode("utf-8", "replace"), shown(path))
        guests.append(GuestInfo(path.stem, header.title, path))
    return guests


def find_guest(name: str) -> Path:
    """Return the source of the shipped guest `name`.

    Raises ImageError if there is none, naming the guest whose name is nearest.
    """
    for path in guests_directory().glob("*.S"):
        if path.stem == name:
            return path
    raise ImageError(f"{shown(name)}: no shipped guest has this name{nearest_guest(name)}")


def nearest_guest(name: str) -> str:
    """Return the end of a message that says which shipped guest may have been meant."""
    from difflib import get_close_matches

    names = [path.stem for place in _PLACES for path in place.glob("*.S")]
    near = get_close_matches(Path(name).stem, names, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"{meant} (`kvmpy guests` lists them)"


def golden_bytes(path: Path, source: bytes) -> GoldenBytes | None:
    """Return the golden bytes beside the source file `path`, if they are those of `source`.

    None says that the source must be assembled: it has no golden bytes, it was changed since
    they were made, or they are damaged.
    """
    directory = path.parent / "golden"
    try:
        index = (directory / "index.json").read_bytes()
    except (OSError, ValueError):
        return None
    # Only now: most sources of a user's own have no index beside them.
    import json
    from hashlib import sha256

    try:
        record = json.loads(index)[path.stem]
        if record["sha256"] != sha256(source).hexdigest():
            return None
        symbols = {str(name): int(address) for name, address in record["symbols"].items()}
        return GoldenBytes(
            read_file(directory / f"{path.stem}.bin"), int(record["origin"]), symbols
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
