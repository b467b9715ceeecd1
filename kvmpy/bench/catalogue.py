"""The table of all operations."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from kvmpy.bench import around, exits, hostside, inward, kernel, seen, touch
from kvmpy.bench.model import LEVELS, MODES, Case, Operation
from kvmpy.errors import ConfigError

__all__ = ["OPERATIONS", "cases", "left_out"]

OPERATIONS: Final[dict[str, Operation]] = {
    row.name: row
    for room in (exits, seen, kernel, touch, around, inward, hostside)
    for row in room.ROWS
}


def cases(
    names: Iterable[str] = (), levels: Iterable[str] = (), modes: Iterable[str] = ()
) -> list[Case]:
    """Each case of those operations, levels and modes; nothing given means all.

    Raises ConfigError for a name that is none, with the nearest one, and where nothing is left.
    """
    names, levels, modes = list(names), list(levels), list(modes)
    for name in names:
        if not isinstance(name, str) or name not in OPERATIONS:
            near = get_close_matches(str(name), OPERATIONS, n=1)
            meant = f": did you mean {near[0]!r}?" if near else "; `kvmpy bench --list` lists them"
            raise ConfigError(f"no operation {name!r}{meant}")
    for what, given, known in (("level", levels, LEVELS), ("mode", modes, MODES)):
        for word in given:
            if word not in known:
                raise ConfigError(f"no {what} {word!r}: use {', '.join(known)}")
    found = [
        Case(name, level, mode)
        for name, row in OPERATIONS.items()
        if not names or name in names
        for level in row.levels
        if not levels or level in levels
        for mode in row.modes
        if not modes or mode in modes
    ]
    if not found:
        raise ConfigError("no operation has such a level and mode: see `kvmpy bench --list`")
    return found


def left_out(names: Iterable[str], plan: Iterable[Case]) -> list[str]:
    """Those of the names of which the plan has no case, each with what it has instead."""
    planned = {case.operation for case in plan}
    return [
        f"{name} (levels {', '.join(OPERATIONS[name].levels)}; "
        f"modes {', '.join(OPERATIONS[name].modes)})"
        for name in dict.fromkeys(names)
        if name not in planned
    ]
