"""Tokens of operands and directive arguments, and the text inside of quotes."""

import re
from typing import NamedTuple

from kvmpy.asm.source import NAME
from kvmpy.errors import AssemblyError

__all__ = ["MAX_TOKENS", "Token", "tokenize", "unquote"]

MAX_TOKENS = 10_000
"""The longest statement, in tokens."""

_TOKEN = re.compile(
    rf"""
    (?P<space>\s+)
    | (?P<local>\d+[bf](?![\w.$]))
    | (?P<number>\d\w*)
    | (?P<string>"(?:\\.|[^"\\])*")
    | (?P<character>'(?:\\[0-9A-Za-z]+|\\.|[^'\\])')
    | (?P<decoration>\{{[a-z0-9-]+\}})
    | (?P<name>{NAME})
    | (?P<operator><<|>>|[-+*/%&|^~()\[\],:])
    """,
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
_ESCAPES = {"b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "\\": 92, '"': 34, "'": 39}
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]+)|(.))|([^\\]+)", re.DOTALL)


class Token(NamedTuple):
    """A token: `kind` is local, number, string, character, decoration, name or operator."""

    kind: str
    text: str


def tokenize(text: str) -> list[Token]:
    """Cut text into tokens; raises AssemblyError for a character that starts none."""
    tokens = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise AssemblyError(f"{text[position]!r} means nothing here")
        position = match.end()
        kind = str(match.lastgroup)
        if kind != "space":
            tokens.append(Token(kind, match.group()))
    if len(tokens) > MAX_TOKENS:
        raise AssemblyError(f"a statement of more than {MAX_TOKENS} tokens: split it")
    return tokens


def unquote(literal: str) -> bytes:
    r"""The bytes of a quoted string or character, UTF-8 for what is not ASCII.

    Knows \b \f \n \r \t \\ \" \', octal \0 to \377 and \x with one or two digits. Three
    digits or more after \x are refused: GNU as would take them all and keep the last two.
    """
    data = bytearray()
    for octal, hexadecimal, letter, plain in _ESCAPE.findall(literal[1:-1]):
        if plain:
            data += plain.encode("utf-8", "surrogatepass")
        elif octal:
            value = int(octal, 8)
            if value > 255:
                raise AssemblyError(f"\\{octal} is more than a byte: \\377 is the largest")
            data.append(value)
        elif hexadecimal:
            if len(hexadecimal) > 2:
                raise AssemblyError(
                    f"\\x{hexadecimal} is ambiguous: give the byte in octal or split the string"
                )
            data.append(int(hexadecimal, 16))
        elif letter in _ESCAPES:
            data.append(_ESCAPES[letter])
        else:
            raise AssemblyError(f"\\{letter} is no escape sequence known here")
    return bytes(data)
