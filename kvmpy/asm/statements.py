"""Statements as data, and the parser that makes them of text."""

import re
from dataclasses import dataclass
from typing import TypeAlias

from kvmpy.asm.directives import (
    DATA_SIZES,
    IGNORED,
    REFUSED,
    SECTIONS,
    STRINGS,
    Align,
    Data,
    Literal,
    Origin,
    Space,
)
from kvmpy.asm.expressions import Expression
from kvmpy.asm.instructions import Instruction, parse_instruction
from kvmpy.asm.parser import LocalLabels, local_name, parse_expression, parse_tokens, split_commas
from kvmpy.asm.registers import is_reserved
from kvmpy.asm.source import NAME, SourceStatement
from kvmpy.asm.tokens import tokenize, unquote
from kvmpy.errors import AssemblyError

__all__ = ["Assignment", "Label", "Statement", "StatementParser", "parse_assignment"]


@dataclass(frozen=True, slots=True)
class Label:
    """A symbol that is the current address."""

    name: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """`name = expression`; with `once`, a second one is an error (.equiv)."""

    name: str
    value: Expression
    once: bool = False


Body: TypeAlias = Label | Assignment | Data | Literal | Space | Origin | Align | Instruction | None


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement in its section; `source` says where it stands."""

    source: SourceStatement
    section: int
    body: Body


_ASSIGNMENT = re.compile(rf"({NAME})\s*=(?!=)(.*)", re.ASCII | re.DOTALL)
_DIRECTIVE = re.compile(r"(\.[A-Za-z]\w*)(?:\s+(.*))?$", re.ASCII | re.DOTALL)
_SETTERS = {".equ", ".set", ".equiv"}
_ALIGNMENTS = {".align", ".balign", ".p2align"}
_PADDING = {".space": 2, ".skip": 2, ".zero": 1, ".fill": 3, ".org": 2} | dict.fromkeys(
    _ALIGNMENTS, 3
)
"""Directives that fill up, and how many numbers they take."""

_CODE_BITS = {".code16": 16, ".code32": 32, ".code64": 64}


def parse_assignment(text: str, labels: LocalLabels) -> Assignment | None:
    """`name = value`, `.set name, value` and its like; None for any other statement."""
    match = _ASSIGNMENT.match(text)
    if match:
        return Assignment(_symbol(match.group(1)), parse_expression(match.group(2), labels))
    match = _DIRECTIVE.match(text)
    if match is None or match.group(1).lower() not in _SETTERS:
        return None
    name, comma, value = (match.group(2) or "").partition(",")
    if not comma:
        raise AssemblyError(f"write {match.group(1)} name, value")
    once = match.group(1).lower() == ".equiv"
    return Assignment(_symbol(name.strip()), parse_expression(value, labels), once)


def _symbol(name: str) -> str:
    """A name that may be defined; raises AssemblyError."""
    if name in (".", "$"):
        raise AssemblyError("the current address cannot be set: use .org or .space")
    if not re.fullmatch(NAME, name, re.ASCII):
        raise AssemblyError(f"{name!r} is no name for a symbol")
    if is_reserved(name):
        raise AssemblyError(f"{name} means a register or a size, so it cannot be a symbol")
    return name


class StatementParser:
    """Parses statements in source order; keeps the mode, the section and local labels."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._section = 0
        self._labels: dict[int, int] = {}

    def parse(self, source: SourceStatement) -> Statement:
        """One statement; raises AssemblyError with its line and text."""
        try:
            section = self._section
            body = self._body(source.text)
        except AssemblyError as error:
            raise AssemblyError(str(error), source.line, source.shown or source.text) from None
        return Statement(source, section if body is not None else self._section, body)

    def _body(self, text: str) -> Body:
        if not text:
            return None
        if text.endswith(":"):
            return self._label(text[:-1])
        assignment = parse_assignment(text, self._labels)
        if assignment is not None:
            return assignment
        if text.startswith("."):
            match = _DIRECTIVE.match(text)
            if match is None:
                raise AssemblyError("no directive has such a name")
            return self._directive(match.group(1).lower(), match.group(2) or "")
        return parse_instruction(text, self._bits, self._labels)

    def _label(self, name: str) -> Label:
        if not name.isdecimal():
            return Label(_symbol(name))
        if len(name) > 9:
            raise AssemblyError("a numeric label has nine digits at most")
        number = int(name)
        self._labels[number] = self._labels.get(number, 0) + 1
        return Label(local_name(number, self._labels[number]))

    def _directive(self, name: str, arguments: str) -> Body:
        if name in _CODE_BITS or name in IGNORED or name in SECTIONS or name == ".section":
            self._switch(name, arguments)
            return None
        if name in REFUSED:
            raise AssemblyError(f"{name} is refused: {REFUSED[name]}")
        if name in STRINGS:
            return self._string(name, arguments)
        if name not in DATA_SIZES and name not in _PADDING:
            raise AssemblyError(f"the directive {name} is unknown")
        parts = [
            parse_tokens(part, self._labels) if part else None
            for part in split_commas(tokenize(arguments), blanks=name in _ALIGNMENTS)
        ]
        numbers = tuple(part for part in parts if part is not None)
        if not numbers or parts[0] is None:
            raise AssemblyError(f"{name} needs a number")
        if name in DATA_SIZES:
            return Data(DATA_SIZES[name], numbers)
        if len(parts) > _PADDING[name]:
            raise AssemblyError(f"{name} takes {_PADDING[name]} numbers at most")
        return _padding(name, parts[0], [*parts[1:], None, None], self._section == 0)

    def _switch(self, name: str, arguments: str) -> None:
        """Directives that make nothing: mode, section, and those without a meaning here."""
        if name in _CODE_BITS:
            self._bits = _CODE_BITS[name]
        elif name == ".intel_syntax":
            if arguments.strip() not in ("", "noprefix"):
                raise AssemblyError("registers have no prefix here: .intel_syntax noprefix")
            return
        elif name == ".section":
            name, _, arguments = arguments.partition(",")
            name, arguments = name.strip().strip('"'), ""
        if name in SECTIONS:
            self._section = SECTIONS[name]
        elif name not in IGNORED and name not in _CODE_BITS:
            known = ", ".join(SECTIONS)
            raise AssemblyError(f"the section {name} is none of {known}")
        if arguments.strip() and name not in IGNORED:
            raise AssemblyError(f"{name} takes no argument")

    def _string(self, name: str, arguments: str) -> Literal:
        data = b""
        tokens = tokenize(arguments)
        parts = split_commas(tokens)
        if not parts:
            raise AssemblyError(f"{name} needs a string in double quotes")
        for part in parts:
            if len(part) != 1 or part[0].kind != "string":
                raise AssemblyError(f"{name} takes strings in double quotes, with commas between")
            data += unquote(part[0].text) + STRINGS[name]
        return Literal(data)


def _padding(
    name: str, first: Expression, rest: list[Expression | None], code: bool
) -> Space | Origin | Align:
    """Directives that fill up; `code` says whether alignment is filled with nops."""
    second, third = rest[:2]
    if name in (".space", ".skip", ".zero"):
        return Space(first, 1, second)
    if name == ".fill":
        return Space(first, 1 if second is None else second, third)
    if name == ".org":
        return Origin(first, second)
    return Align(first, name == ".p2align", second, third, code)
