"""Expressions over numbers, characters, symbols and the current address.

A value carries a weight beside its number: 1 for an address inside the program (a label),
0 for a plain number. Sums add weights, so that `end - start` is plain and `start + 4` is
an address; this decides whether `[rip + x]` is relative and whether an operand needs
`offset`.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from kvmpy.errors import AssemblyError

__all__ = [
    "Binary",
    "Expression",
    "Here",
    "Number",
    "Register",
    "Scope",
    "Symbol",
    "Unary",
    "Value",
    "evaluate",
    "symbols_of",
]


class Value(NamedTuple):
    """A number and how many addresses of this program are summed up in it."""

    number: int
    weight: int = 0


class Scope(Protocol):
    """What an expression is evaluated in."""

    @property
    def here(self) -> int:
        """The address of the statement that the expression stands in."""

    def lookup(self, name: str) -> Value:
        """The value of a symbol; raises AssemblyError where it has none."""


@dataclass(frozen=True, slots=True)
class Number:
    """A literal."""

    value: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A label or a constant by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Here:
    """The address of the current statement, written `.` or `$`."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register's name, which only operands may hold."""

    name: str


@dataclass(frozen=True, slots=True)
class Unary:
    """`-x`, `+x` or `~x`."""

    operation: str
    operand: "Expression"


@dataclass(frozen=True, slots=True)
class Binary:
    """Two operands of `+ - * / % << >> & | ^`."""

    operation: str
    left: "Expression"
    right: "Expression"


Expression: TypeAlias = Number | Symbol | Here | Register | Unary | Binary


def _divide(left: int, right: int) -> int:
    """Division that rounds towards zero, as in C and GNU as."""
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


def _remainder(left: int, right: int) -> int:
    return left - right * _divide(left, right)


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divide,
    "%": _remainder,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
}
_MAX_SHIFT = 64
_LIMIT = 1 << 64


def evaluate(expression: Expression, scope: Scope) -> Value:
    """The value of an expression.

    Raises AssemblyError (without a line, which the caller knows) for a register, a division
    by zero, a shift outside 0 to 64 and a result outside of -2**64 to 2**64.
    """
    match expression:
        case Number(value):
            return Value(value)
        case Symbol(name):
            return scope.lookup(name)
        case Here():
            return Value(scope.here, 1)
        case Register(name):
            raise AssemblyError(f"the register {name} cannot stand in an expression")
        case Unary("-", operand):
            number, weight = evaluate(operand, scope)
            return Value(-number, -weight)
        case Unary("~", operand):
            return Value(~evaluate(operand, scope).number)
        case Unary(_, operand):
            return evaluate(operand, scope)
        case Binary(operation, left, right):
            return _combine(operation, evaluate(left, scope), evaluate(right, scope))


def _combine(operation: str, left: Value, right: Value) -> Value:
    """Apply a binary operation; all but sums make a plain number of an address."""
    if operation in "/%" and right.number == 0:
        raise AssemblyError("division by zero")
    if operation in ("<<", ">>") and not 0 <= right.number <= _MAX_SHIFT:
        raise AssemblyError(f"a shift by {right.number} is outside of 0 to {_MAX_SHIFT}")
    number = _OPERATIONS[operation](left.number, right.number)
    if not -_LIMIT < number < _LIMIT:
        raise AssemblyError("a value does not fit 64 bits")
    if operation == "+":
        return Value(number, left.weight + right.weight)
    if operation == "-":
        return Value(number, left.weight - right.weight)
    return Value(number)


def symbols_of(expression: Expression) -> list[str]:
    """The names of the symbols in an expression, from left to right."""
    match expression:
        case Symbol(name):
            return [name]
        case Unary(_, operand):
            return symbols_of(operand)
        case Binary(_, left, right):
            return symbols_of(left) + symbols_of(right)
    return []
