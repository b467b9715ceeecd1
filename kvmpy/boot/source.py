"""Assembly sources: the header says how to run them, Keystone or a golden file gives the bytes."""

from pathlib import Path

from kvmpy.boot.files import read_file, shown
from kvmpy.boot.guests import GoldenBytes, golden_bytes
from kvmpy.boot.header import GuestHeader, parse_header
from kvmpy.boot.segments import Image, LoadSegment
from kvmpy.errors import AssemblyError, ImageError
from kvmpy.modes import DEFAULT_LOAD

__all__ = ["SUFFIXES", "assemble_text", "load_source", "read_source"]

SUFFIXES = (".S", ".s", ".asm")

# Far more than anybody writes by hand; a larger "source" is another kind of file.
_MAXIMUM_SOURCE = 16 << 20


def read_source(path: Path) -> tuple[bytes, str, GuestHeader]:
    """Return the source file `path` as bytes and as text, and its header.

    Raises ImageError if it cannot be read, is not UTF-8, or has a malformed header.
    """
    raw = read_file(path, _MAXIMUM_SOURCE)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ImageError(
            f"{shown(path)}: line {line}: is not UTF-8 text: save it as such"
        ) from None
    return raw, text, parse_header(text, shown(path))


def assemble_text(text: str, name: str, mode: str, load: int) -> GoldenBytes:
    """Assemble the source `text` of the file `name` for `mode`, to lie at address `load`.

    Raises AssemblyError with the file's name before the line, or ImageError if nothing comes
    of it.
    """
    from kvmpy.asm import assemble

    try:
        program = assemble(text, mode=mode, at=load)
    except AssemblyError as error:
        error.args = (f"{name}: {error}",)
        raise
    if not program:
        raise ImageError(f"{name}: assembles to no bytes: there is nothing to run in it")
    return GoldenBytes(bytes(program), program.origin, dict(program.symbols))


def load_source(
    path: Path, *, mode: str, ring: int | None, load: int | None, entry: int | None
) -> Image:
    """Return the image of the assembly source `path`.

    `mode` is "auto" or a mode's name; it, `ring` and `load` win over what the header says.
    The entry is the first byte, unless `entry` says otherwise.
    """
    raw, text, header = read_source(path)
    name = shown(path)
    chosen = header.mode if mode == "auto" else mode
    at = next(a for a in (load, header.load, DEFAULT_LOAD[chosen]) if a is not None)
    program = golden_bytes(path, raw) if chosen == header.mode else None
    if program is None or program.origin != at:
        program = assemble_text(text, name, chosen, at)
        why = f"its name ends in {path.suffix}, so it was assembled"
    else:
        why = "an assembly source with golden bytes"
    return Image(
        kind="assembly",
        name=name,
        segments=(LoadSegment(program.origin, program.data, len(program.data)),),
        entry=program.origin if entry is None else entry,
        mode=chosen,
        ring=header.ring if ring is None else ring,
        why=why,
        symbols=program.symbols,
        header=header,
    )
