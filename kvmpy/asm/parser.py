"""Tokens to expressions.

Two precedence tables are in use where assembly is written: that of C (and NASM) and that
of GNU as. An expression that they read differently is refused: parentheses settle it.
"""

import re
from collections.abc import Mapping

from kvmpy.asm.expressions import (
    Binary,
    Expression,
    Here,
    Number,
    Register,
    Symbol,
    Unary,
)
from kvmpy.asm.registers import REGISTERS
from kvmpy.asm.tokens import Token, tokenize, unquote
from kvmpy.errors import AssemblyError

__all__ = ["LocalLabels", "local_name", "parse_expression", "parse_tokens", "split_commas"]

LocalLabels = Mapping[int, int]
"""How often each numeric label has been defined above the statement at hand."""

_C_LEVELS = {"|": 1, "^": 2, "&": 3, "<<": 4, ">>": 4, "+": 5, "-": 5, "*": 6, "/": 6, "%": 6}
_GNU_LEVELS = {"+": 1, "-": 1, "|": 2, "^": 2, "&": 2, "<<": 3, ">>": 3, "*": 3, "/": 3, "%": 3}
_MAX_TERMS = 200
_MAX_DEPTH = 32
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+|0|[1-9][0-9]*", re.ASCII)


def local_name(number: int, occurrence: int) -> str:
    """The name of one definition of a numeric label; no source can spell it."""
    return f"{number}:{occurrence}"


def parse_expression(text: str, labels: LocalLabels) -> Expression:
    """Parse the text of one expression; raises AssemblyError for anything else."""
    return parse_tokens(tokenize(text), labels)


def parse_tokens(tokens: list[Token], labels: LocalLabels) -> Expression:
    """Parse tokens that are one whole expression."""
    if not tokens:
        raise AssemblyError("an expression is missing")
    if len(tokens) > _MAX_TERMS:
        raise AssemblyError(f"an expression of more than {_MAX_TERMS} tokens: split it")
    readings = [_Parser(tokens, labels, levels).whole() for levels in (_C_LEVELS, _GNU_LEVELS)]
    if readings[0] != readings[1]:
        raise AssemblyError("operators that C and GNU as bind differently: use parentheses")
    return readings[0]


def split_commas(tokens: list[Token], blanks: bool = False) -> list[list[Token]]:
    """Cut tokens at the commas outside of brackets; no tokens give no parts.

    An empty part is an error, but for those that `blanks` lets through.
    """
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.text in "([") - (token.text in ")]") if token.kind == "operator" else 0
        if token == Token("operator", ",") and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    if parts == [[]]:
        return []
    if not blanks and any(not part for part in parts):
        raise AssemblyError("an operand is missing beside a comma")
    return parts


class _Parser:
    """Precedence climbing over a list of tokens."""

    def __init__(self, tokens: list[Token], labels: LocalLabels, levels: dict[str, int]) -> None:
        self._tokens = tokens
        self._labels = labels
        self._levels = levels
        self._next = 0
        self._depth = 0

    def whole(self) -> Expression:
        """The expression, which must take up every token."""
        expression = self._binary(0)
        if self._next < len(self._tokens):
            raise AssemblyError(f"{self._tokens[self._next].text!r} is one too many")
        return expression

    def _take(self) -> Token:
        if self._next == len(self._tokens):
            raise AssemblyError("an expression ends too early")
        self._next += 1
        return self._tokens[self._next - 1]

    def _peek(self) -> str:
        if self._next == len(self._tokens) or self._tokens[self._next].kind != "operator":
            return ""
        return self._tokens[self._next].text

    def _binary(self, floor: int) -> Expression:
        left = self._primary()
        while self._levels.get(self._peek(), 0) > floor:
            operation = self._take().text
            left = Binary(operation, left, self._binary(self._levels[operation]))
        return left

    def _primary(self) -> Expression:
        kind, text = self._take()
        if kind == "number":
            return _number(text)
        if kind == "character":
            return _character(text)
        if kind == "local":
            return self._local(int(text[:-1]), text[-1])
        if kind == "name":
            return self._name(text)
        if kind == "operator" and text in "+-~(":
            return self._nested(text)
        raise AssemblyError(f"{text} cannot stand in an expression")

    def _nested(self, text: str) -> Expression:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise AssemblyError(f"an expression nested more than {_MAX_DEPTH} deep: split it")
        if text == "(":
            inner = self._binary(0)
            if self._take().text != ")":
                raise AssemblyError("a ) is missing")
        else:
            inner = Unary(text, self._primary())
        self._depth -= 1
        return inner

    def _local(self, number: int, direction: str) -> Expression:
        occurrence = self._labels.get(number, 0) + (direction == "f")
        if occurrence == 0:
            raise AssemblyError(f"there is no label {number}: above here")
        return Symbol(local_name(number, occurrence))

    def _name(self, text: str) -> Expression:
        lower = text.lower()
        if text in (".", "$"):
            return Here()
        if lower == "st" and self._peek() == "(":
            digits = "".join(self._take().text for _ in range(3))
            lower += digits
        return Register(lower) if lower in REGISTERS else Symbol(text)


def _number(text: str) -> Number:
    """A number in decimal, 0x, 0o or 0b; anything else would be read in several ways."""
    if not _NUMBER.fullmatch(text):
        raise AssemblyError(f"{text} is no number: write 10, 0x10, 0o10 or 0b10")
    if len(text) > 66 or int(text, 0) >= 1 << 64:
        raise AssemblyError(f"the number {text[:20]} does not fit 64 bits")
    return Number(int(text, 0))


def _character(text: str) -> Number:
    data = unquote(text)
    if len(data) != 1:
        raise AssemblyError(f"{text} is not one byte: .ascii makes bytes of a string")
    return Number(data[0])
