"""`python -m kvmpy.boot.golden [--check]`: write or check the shipped guests' golden bytes."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvmpy.boot.files import shown
from kvmpy.boot.guests import guests_directory
from kvmpy.boot.source import assemble_text, read_source
from kvmpy.errors import ImageError, KvmpyError
from kvmpy.modes import DEFAULT_LOAD

__all__ = ["main", "make_golden"]

_INDEX = "index.json"


def make_golden(directory: Path) -> dict[str, bytes]:
    """Assemble each .S guest in `directory`; return the golden files by name, as bytes.

    Raises ImageError or AssemblyError, naming the source, if one cannot be assembled.
    """
    index: dict[str, Any] = {}
    files = {}
    for path in sorted(directory.glob("*.S")):
        raw, text, header = read_source(path)
        load = DEFAULT_LOAD[header.mode] if header.load is None else header.load
        program = assemble_text(text, shown(path), header.mode, load)
        files[f"{path.stem}.bin"] = program.data
        index[path.stem] = {
            "sha256": sha256(raw).hexdigest(),
            "origin": program.origin,
            "symbols": program.symbols,
        }
    if not files:
        raise ImageError(f"{shown(directory)}: no .S guest is here: name the guests' directory")
    files[_INDEX] = (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()
    return files


def stale_files(golden: Path, files: dict[str, bytes]) -> list[str]:
    """Return the names in the directory `golden` that differ from `files`, missing ones too."""
    there = {path.name: path for path in golden.iterdir()} if golden.is_dir() else {}
    return sorted(
        name
        for name in there.keys() | files.keys()
        if name not in there or there[name].read_bytes() != files.get(name)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the golden files, or with --check name those that are stale; return the status.

    Status 0 says that all is well, 1 that --check found stale files, 2 that a guest cannot be
    assembled.
    """
    parser = ArgumentParser(prog="python -m kvmpy.boot.golden", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name stale files")
    parser.add_argument("--guests", type=Path, metavar="DIRECTORY", help="not the shipped ones")
    options = parser.parse_args(arguments)
    try:
        directory = options.guests or guests_directory()
        files = make_golden(directory)
        golden = directory / "golden"
        stale = stale_files(golden, files)
        if not options.check:
            _write(golden, files, stale)
    except (KvmpyError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for name in stale:
        print(f"{shown(golden / name)}: {'is stale' if options.check else 'written'}")
    return 1 if options.check and stale else 0


def _write(golden: Path, files: dict[str, bytes], stale: list[str]) -> None:
    golden.mkdir(exist_ok=True)
    for name in stale:
        if name in files:
            (golden / name).write_bytes(files[name])
        else:
            (golden / name).unlink()


if __name__ == "__main__":
    sys.exit(main())
