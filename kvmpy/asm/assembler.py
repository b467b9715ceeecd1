"""`assemble` itself: the parts in order, from text to a Program."""

import math

from kvmpy.asm.deadline import Deadline
from kvmpy.asm.expand import expand
from kvmpy.asm.layout import Layout
from kvmpy.asm.program import ListingLine, Program
from kvmpy.asm.source import split_statements
from kvmpy.asm.statements import Statement, StatementParser
from kvmpy.errors import AssemblyError, ConfigError

__all__ = ["MODES", "assemble_source"]

MODES = {"real": 16, "protected16": 16, "protected": 32, "long": 64}
"""The modes that a program can start in, and the bits of their code."""

_MAX_SOURCE = 16 << 20
"""The longest source, in characters."""


def assemble_source(source: str, mode: str, at: int, timeout: float) -> Program:
    """What `kvmpy.asm.assemble` documents."""
    if not isinstance(source, str):
        raise ConfigError(f"a source is text, not {type(source).__name__}: decode it first")
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}: it must be one of {', '.join(MODES)}")
    if not isinstance(at, int):
        raise ConfigError(f"the address {at!r:.80}: give an int")
    if not 0 <= at < 1 << 64:
        raise ConfigError(f"the address {at:#x} is outside of 0 to 2**64 - 1")
    if not isinstance(timeout, int | float) or not (timeout > 0 and math.isfinite(timeout)):
        raise ConfigError(f"a timeout of {timeout} s: it must be more than 0 and finite")
    if len(source) > _MAX_SOURCE:
        raise AssemblyError(f"a source of more than {_MAX_SOURCE:#x} characters is refused")
    deadline = Deadline(timeout)
    statements = _parse(source.replace("\r\n", "\n"), MODES[mode], deadline)
    layout = Layout(statements, at, deadline)
    layout.settle()
    order = sorted(range(len(statements)), key=lambda index: statements[index].section)
    data = b"".join(layout.chunks[index] for index in order)
    if at + len(data) > 1 << 64:
        raise AssemblyError(f"{len(data):#x} bytes at {at:#x} go beyond the end of memory")
    symbols = {
        name: value.number
        for name, value in layout.values.items()
        if ":" not in name and not name.startswith(".L")
    }
    return Program(data, at, symbols, _listing(statements, layout))


def _parse(source: str, bits: int, deadline: Deadline) -> list[Statement]:
    parser = StatementParser(bits)
    statements = []
    for statement in expand(split_statements(source)):
        deadline.left()
        statements.append(parser.parse(statement))
    return statements


def _listing(statements: list[Statement], layout: Layout) -> tuple[ListingLine, ...]:
    """The statements in source order; what a label's line shows is with its statement."""
    return tuple(
        ListingLine(
            statement.source.line,
            layout.addresses[index],
            layout.chunks[index],
            statement.source.shown,
        )
        for index, statement in enumerate(statements)
        if statement.source.shown or layout.chunks[index] or not statement.source.text
    )
