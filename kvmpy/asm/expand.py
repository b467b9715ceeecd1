"""Repeats and macros: source statements to more source statements, before any is parsed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpy.asm.expressions import Value, evaluate
from kvmpy.asm.parser import parse_expression
from kvmpy.asm.source import NAME, SourceStatement
from kvmpy.asm.statements import parse_assignment
from kvmpy.errors import AssemblyError

__all__ = ["MAX_STATEMENTS", "expand"]

MAX_STATEMENTS = 100_000
"""The most statements that a source may come to, repeats and macros included."""

_MAX_DEPTH = 20
_WORD = re.compile(r"(\.?[A-Za-z_]\w*)(?:\s+(.*))?$", re.ASCII | re.DOTALL)
_HEAD = re.compile(rf"({NAME})(?:[\s,]\s*(.*))?$", re.ASCII | re.DOTALL)
_PARAMETER = re.compile(r"\\(?:([A-Za-z_]\w*)|(@)|\(\))", re.ASCII)
_ENDS = {".rept": ".endr", ".macro": ".endm"}


@dataclass(frozen=True, slots=True)
class _Macro:
    """Parameters with their defaults (None: it must be given) and a body."""

    parameters: dict[str, str | None]
    body: list[SourceStatement]


class _Constants:
    """The constants that are known while repeats are counted: those without labels."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}

    @property
    def here(self) -> int:
        """Addresses are not known yet."""
        raise AssemblyError("the current address is not known yet where repeats are counted")

    def lookup(self, name: str) -> Value:
        """The value of a constant that has been set further up."""
        if name not in self.values:
            raise AssemblyError(f"{name} is not known yet: a count needs constants set above it")
        return self.values[name]

    def note(self, text: str) -> None:
        """Remember a constant; one that cannot be worked out yet is forgotten."""
        try:
            assignment = parse_assignment(text, {})
            if assignment is not None:
                self.values.pop(assignment.name, None)
                self.values[assignment.name] = evaluate(assignment.value, self)
        except AssemblyError:
            return


def expand(statements: list[SourceStatement]) -> list[SourceStatement]:
    """Carry out .rept and .macro; raises AssemblyError with line and text."""
    return list(_Expander().run(statements, 0))


class _Expander:
    def __init__(self) -> None:
        self._constants = _Constants()
        self._macros: dict[str, _Macro] = {}
        self._calls = 0
        self._made = 0

    def run(self, statements: list[SourceStatement], depth: int) -> Iterator[SourceStatement]:
        """The statements with every repeat and macro in them carried out."""
        position = 0
        while position < len(statements):
            statement = statements[position]
            position += 1
            name, arguments = _word(statement)
            try:
                if depth > _MAX_DEPTH:
                    raise AssemblyError(f"macros and repeats more than {_MAX_DEPTH} deep")
                if name in _ENDS:
                    end = _find_end(statements, position, name)
                    body, ending = statements[position:end], statements[end]
                    position = end + 1
                    made = [*self._block(name, arguments, body), [ending._replace(text="")]]
                elif name in self._macros:
                    made = [self._call(name, arguments, statement)]
                else:
                    self._count()
                    self._constants.note(statement.text)
                    yield statement
                    continue
                yield statement._replace(text="")
            except AssemblyError as error:
                if error.line is not None:
                    raise
                raise AssemblyError(str(error), statement.line, statement.shown) from None
            for each in made:
                yield from self.run(each, depth + 1)

    def _count(self) -> None:
        self._made += 1
        if self._made > MAX_STATEMENTS:
            raise AssemblyError(f"the source comes to more than {MAX_STATEMENTS} statements")

    def _block(
        self, name: str, arguments: str, body: list[SourceStatement]
    ) -> list[list[SourceStatement]]:
        """The repetitions of a .rept; a .macro, and no repetition, only show in the listing."""
        silent = [statement._replace(text="") for statement in body]
        if name == ".macro":
            self._define(arguments, body)
            return [silent]
        count = evaluate(parse_expression(arguments, {}), self._constants).number
        if not 0 <= count <= MAX_STATEMENTS:
            raise AssemblyError(f"{count} repeats: 0 to {MAX_STATEMENTS} are possible")
        return [body] * count or [silent]

    def _define(self, arguments: str, body: list[SourceStatement]) -> None:
        match = _HEAD.match(arguments)
        if match is None:
            raise AssemblyError("write .macro name first, second=default")
        name = match.group(1).lower()
        if name in self._macros:
            raise AssemblyError(f"the macro {name} is defined twice")
        parameters: dict[str, str | None] = {}
        for part in _arguments(match.group(2) or ""):
            parameter, equals, default = part.partition("=")
            if not re.fullmatch(r"[A-Za-z_]\w*", parameter.strip(), re.ASCII):
                raise AssemblyError(f"{part} is no name for a parameter of a macro")
            parameters[parameter.strip()] = default.strip() if equals else None
        self._macros[name] = _Macro(parameters, body)

    def _call(self, name: str, arguments: str, call: SourceStatement) -> list[SourceStatement]:
        """The body of a macro with the arguments put in; errors point at the call."""
        macro = self._macros[name]
        given = _arguments(arguments)
        if len(given) > len(macro.parameters):
            raise AssemblyError(f"the macro {name} takes {len(macro.parameters)} arguments")
        values = dict(zip(macro.parameters, given, strict=False))
        for parameter, default in macro.parameters.items():
            if not values.get(parameter):
                if default is None:
                    raise AssemblyError(f"the macro {name} needs its argument {parameter}")
                values[parameter] = default
        self._calls += 1
        number = str(self._calls)

        def put(match: re.Match[str]) -> str:
            if match.group(1):
                return values.get(match.group(1), match.group())
            return number if match.group(2) else ""

        def fill(statement: SourceStatement) -> SourceStatement:
            text = _PARAMETER.sub(put, statement.text)
            return SourceStatement(call.line, text, text)

        return [fill(statement) for statement in macro.body]


def _word(statement: SourceStatement) -> tuple[str, str]:
    """The first word of a statement in lower case, and the rest."""
    match = _WORD.match(statement.text)
    return (match.group(1).lower(), match.group(2) or "") if match else ("", "")


def _find_end(statements: list[SourceStatement], position: int, name: str) -> int:
    """The index of the .endr or .endm that belongs to a .rept or .macro."""
    depth = 1
    for index in range(position, len(statements)):
        word, _ = _word(statements[index])
        depth += (word == name) - (word == _ENDS[name])
        if depth == 0:
            return index
    raise AssemblyError(f"{name} has no {_ENDS[name]}")


def _arguments(text: str) -> list[str]:
    """Split at the commas outside of quotes and brackets."""
    parts = re.findall(
        r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])'|\([^()]*\)|\[[^]]*\]|[^,])+""", text
    )
    return [part.strip() for part in parts if part.strip()]
