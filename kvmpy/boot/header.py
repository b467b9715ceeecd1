"""The comment at the head of an assembly guest, in which the guest says how to run it.

    # hello_long - prints a line from 64-bit long mode
    #
    # Any other text explains the guest to its reader.
    # mode: long
    # output: "Hello from long mode\\n"

The header is the run of lines that start with `#` at the top of the source. Its first line
gives the name and the title. The keys are written in lower case:

    mode    real, protected16, protected or long (the default)
    ring    0 or 3
    load    the load address, such as 0x7c00
    memory  how much memory the guest needs, such as 1M
    input   what to feed its serial port: a Python string or bytes literal
    output  what it prints, likewise
    exit    its exit status, 0 to 255 (0 is the default)

`input` and `output` may be repeated; the pieces are joined. A string literal stands for its
Latin-1 bytes if it has them ("\\xff" is one byte), and for its UTF-8 bytes otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvmpy.errors import ConfigError, ImageError
from kvmpy.modes import MODES
from kvmpy.sizes import parse_address, parse_size

__all__ = ["GuestHeader", "parse_header"]


@dataclass(frozen=True, slots=True)
class GuestHeader:
    """What a guest's source says of itself; None where it says nothing.

    `load` is a guest-physical address and `memory` a size in bytes; `input` and `output` are
    the bytes that go to and come from the console; `exit_status` is that of `kvmpy run`.
    """

    title: str = ""
    mode: str = "long"
    ring: int | None = None
    load: int | None = None
    memory: int | None = None
    input: bytes = b""
    output: bytes | None = None
    exit_status: int = 0


def parse_header(source: str, name: str) -> GuestHeader:
    """Return the header of `source`; `name` is the file's name, for messages.

    Raises ImageError, naming file and line, for a value that its key cannot have, for a key
    given twice, and for a lower-case word before a colon that is almost one of the keys.
    """
    values: dict[str, object] = {}
    # Split at line feeds alone, so that the numbers are those of an editor.
    for number, line in enumerate(source.split("\n"), start=1):
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if number == 1:
            values["title"] = text.partition(" - ")[2].strip() or text
            continue
        key, colon, value = text.partition(":")
        if not colon or not key.isidentifier():
            continue
        try:
            _take(values, key, value.strip())
        except ConfigError as error:
            raise ImageError(f"{name}: line {number}: {error}") from None
    return GuestHeader(**values)  # type: ignore[arg-type]  # _KEYS gives each field its type


def _take(values: dict[str, object], key: str, text: str) -> None:
    """Put the value that `text` writes for `key` into `values`."""
    if key not in _KEYS:
        _refuse_near_miss(key)
        return
    field, parse = _KEYS[key]
    value = parse(text)
    before = values.get(field)
    if isinstance(before, bytes) and isinstance(value, bytes):
        value = before + value
    elif before is not None:
        raise ConfigError(f"{key} is given twice: keep one of them")
    values[field] = value


def _refuse_near_miss(word: str) -> None:
    # Prose starts with a capital; a lower-case word this close to a key is a slip of the pen,
    # and ignoring it would run the guest in another way than its author meant.
    if not word.islower():
        return
    from difflib import get_close_matches

    near = get_close_matches(word, _KEYS, n=1, cutoff=0.75)
    if near:
        raise ConfigError(f"unknown key {word!r}: did you mean {near[0]!r}?")


def _mode(text: str) -> str:
    if text not in MODES:
        raise ConfigError(f"mode {text!r} is unknown: use one of {', '.join(MODES)}")
    return text


def _ring(text: str) -> int:
    if text not in ("0", "3"):
        raise ConfigError(f"ring {text!r} is not one that kvmpy starts in: use 0 or 3")
    return int(text)


def _status(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= 255):
        raise ConfigError(f"exit {text!r} is not a status: use 0 to 255")
    return int(text)


def _literal(text: str) -> bytes:
    from ast import literal_eval

    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{text!r} is not a string: write it as in Python, in quotes")
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode("utf-8", "replace")  # a lone surrogate has no bytes of its own


_KEYS: dict[str, tuple[str, Callable[[str], object]]] = {
    "mode": ("mode", _mode),
    "ring": ("ring", _ring),
    "load": ("load", parse_address),
    "memory": ("memory", parse_size),
    "input": ("input", _literal),
    "output": ("output", _literal),
    "exit": ("exit_status", _status),
}
