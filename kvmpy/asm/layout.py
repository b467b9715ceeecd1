"""Passes over the statements until every address and every size is settled."""

import contextlib
import time
from collections import Counter
from typing import TypeAlias

from kvmpy.asm import directives, encoding
from kvmpy.asm.branches import BRANCHES, is_short_only
from kvmpy.asm.client import Answer, WorkerDied, WorkerHung, encode
from kvmpy.asm.deadline import Deadline
from kvmpy.asm.directives import MAX_SIZE
from kvmpy.asm.expressions import Expression, Value, evaluate, symbols_of
from kvmpy.asm.instructions import Instruction
from kvmpy.asm.operands import expressions_of
from kvmpy.asm.statements import Assignment, Label, Statement
from kvmpy.errors import AssemblyError

__all__ = ["Layout"]

_MAX_PASSES = 60
_MAX_CACHED = 20_000
_GUESS = 4
"""The size of an instruction before its first encoding, in bytes."""

_Waiting: TypeAlias = dict[encoding.Query, list[tuple[int, encoding.Request]]]
"""What Keystone is to be asked, and the statements that wait for it."""

_cache: dict[encoding.Query, Answer] = {}
"""Answers of Keystone, which depend on nothing but the query. Shared by all threads."""


class Layout:
    """Addresses, bytes and symbols of a program; a Scope for its expressions."""

    def __init__(self, statements: list[Statement], origin: int, deadline: Deadline) -> None:
        self.origin = origin
        self._deadline = deadline
        self._statements = statements
        self._order = sorted(range(len(statements)), key=lambda index: statements[index].section)
        self.addresses = [origin] * len(statements)
        self.chunks = [b""] * len(statements)
        self._sizes = [
            _GUESS if isinstance(statement.body, Instruction) else 0 for statement in statements
        ]
        self._near: set[int] = set()
        self._failed: dict[int, AssemblyError] = {}
        self._missing: _Waiting = {}
        self._stale: _Waiting = {}
        self.values: dict[str, Value] = {}
        self._here = origin
        self._section_start = origin
        self._variables = _check_definitions(statements)

    @property
    def here(self) -> int:
        """The address of the statement at hand."""
        return self._here

    def lookup(self, name: str) -> Value:
        """The value of a symbol, in the first pass a guess where it is defined below."""
        if name in self.values:
            return self.values[name]
        if name in self._variables:
            raise AssemblyError(f"{name} is set several times, and used here before the first")
        return Value(self._here, 1)

    def settle(self) -> None:
        """Pass over the program until nothing changes any more; raises AssemblyError."""
        for _ in range(_MAX_PASSES):
            sizes, values = list(self._sizes), dict(self.values)
            self._pass()
            if self._missing:
                self._ask(self._missing)
            elif (sizes, values) == (self._sizes, self.values):
                if not self._stale:
                    self._raise_first()
                    return
                self._ask(self._stale)
        self._raise_first()
        self._raise_unsettled(sizes, values)

    def _raise_first(self) -> None:
        """Report the first problem by line that the last pass met."""
        if self._failed:
            index = min(self._failed)
            raise _located(self._failed[index], self._statements[index])

    def _raise_unsettled(self, sizes: list[int], values: dict[str, Value]) -> None:
        """Report the first statement that came out differently in the last two passes."""
        for index, statement in enumerate(self._statements):
            body = statement.body
            name = body.name if isinstance(body, Assignment) else ""
            if sizes[index] != self._sizes[index] or values.get(name) != self.values.get(name):
                circular = AssemblyError("the size or value depends on itself")
                raise _located(circular, statement)

    def _pass(self) -> None:
        """Give each statement its address, and its bytes where they can be known."""
        for name in self._variables:
            self.values.pop(name, None)
        self._failed.clear()
        self._missing.clear()
        self._stale.clear()
        self._here = self._section_start = self.origin
        section = 0
        for count, index in enumerate(self._order):
            statement = self._statements[index]
            if statement.section != section:
                section, self._section_start = statement.section, self._here
            if count % 256 == 0:
                self._left(index)
            self.addresses[index] = self._here
            try:
                chunk = self._chunk(index, statement)
            except AssemblyError as error:
                self._failed[index] = error
                chunk = None
            if chunk is not None:
                self.chunks[index] = chunk
                self._sizes[index] = len(chunk)
            self._here += self._sizes[index]
            if self._here - self.origin > MAX_SIZE:
                size = f"a program of more than {MAX_SIZE:#x} bytes is refused"
                raise _located(AssemblyError(size), statement)

    def _chunk(self, index: int, statement: Statement) -> bytes | None:
        """The bytes of one statement; None while Keystone has not been asked yet."""
        match statement.body:
            case None:
                return b""
            case Label(name):
                self.values[name] = Value(self._here, 1)
                return b""
            case Assignment(name, value):
                self.values[name] = evaluate(value, self)
                return b""
            case Instruction() as instruction:
                return self._instruction(index, instruction)
            case directive:
                self._check_origin(directive, statement)
                return directives.emit(directive, self, self._section_start)

    def _check_origin(self, directive: directives.Directive, statement: Statement) -> None:
        """An .org before all else is likely to mean the address of the whole program."""
        first = self._here == self.origin and statement.section == 0
        if isinstance(directive, directives.Origin) and first:
            number, weight = evaluate(directive.target, self)
            if weight == 0 and number > 0:
                raise AssemblyError(
                    ".org pads to an offset from the start, and nothing is before it: give the "
                    "address of the program as at=, or pad with .space"
                )

    def _instruction(self, index: int, instruction: Instruction) -> bytes | None:
        distance = "near" if index in self._near else ""
        code = encoding.encode_here(instruction, self, distance)
        if code is not None:
            # A branch that was long once stays long, so that the passes come to an end.
            mnemonic = instruction.mnemonic
            if mnemonic in BRANCHES and not is_short_only(mnemonic) and len(code) > 2:
                self._near.add(index)
            return code
        size = self._sizes[index] if self.chunks[index] else 0
        request = encoding.make_request(instruction, self, size)
        answer = _cache.get(request.query)
        if answer is None:
            # Numbers change from pass to pass, sizes hardly ever: while other things move,
            # an instruction that has been encoded before keeps its size and waits.
            waiting = self._stale if self.chunks[index] else self._missing
            waiting.setdefault(request.query, []).append((index, request))
            return None
        return encoding.finish(request, answer)

    def _ask(self, waiting: _Waiting) -> None:
        """Have Keystone encode what the last pass missed."""
        queries = list(waiting)
        first = [waiting[query][0][0] for query in queries]
        began = time.monotonic()
        try:
            answers, seconds = encode(queries, self._left(first[0]))
        except WorkerDied as error:
            what = "takes too long over" if isinstance(error, WorkerHung) else "crashes on"
            statement = self._statements[first[error.index]]
            raise _located(AssemblyError(f"Keystone {what} this"), statement) from None
        self._deadline.extend(time.monotonic() - began - seconds)
        if len(_cache) > _MAX_CACHED:
            _cache.clear()
        for query, answer in zip(queries, answers, strict=True):
            _cache[query] = answer
            for index, request in waiting[query]:
                with contextlib.suppress(AssemblyError):  # the next pass meets it again
                    self.chunks[index] = encoding.finish(request, answer)
                    self._sizes[index] = len(self.chunks[index])

    def _left(self, index: int) -> float:
        """The seconds that are left; raises AssemblyError when there are none."""
        try:
            return self._deadline.left()
        except AssemblyError as error:
            raise _located(error, self._statements[index]) from None


def _located(error: AssemblyError, statement: Statement) -> AssemblyError:
    """The same error with the statement's line and text."""
    source = statement.source
    return AssemblyError(str(error), source.line, source.shown or source.text)


def _check_definitions(statements: list[Statement]) -> set[str]:
    """Refuse double and missing definitions; return the symbols that are set repeatedly."""
    lines: dict[str, int] = {}
    fixed: set[str] = set()
    times: Counter[str] = Counter()
    for statement in statements:
        body = statement.body
        if isinstance(body, Label | Assignment):
            once = isinstance(body, Label) or body.once
            if body.name in fixed or (once and body.name in lines):
                double = AssemblyError(f"{body.name} is defined on line {lines[body.name]} as well")
                raise _located(double, statement)
            if once:
                fixed.add(body.name)
            lines.setdefault(body.name, statement.source.line)
            times[body.name] += 1
    for statement in statements:
        for expression in _expressions(statement):
            for name in symbols_of(expression):
                if name not in lines:
                    number, colon, _ = name.partition(":")
                    what = f"there is no label {number}: below here" if colon else ""
                    raise _located(AssemblyError(what or f"{name} is not defined"), statement)
    return {name for name, count in times.items() if count > 1}


def _expressions(statement: Statement) -> list[Expression]:
    """Every expression of a statement."""
    match statement.body:
        case None | Label():
            return []
        case Assignment(_, value):
            return [value]
        case Instruction(_, _, operands):
            return [each for operand in operands for each in expressions_of(operand)]
        case directive:
            return directives.expressions_of(directive)
