"""Types of options that several verbs have."""

from collections.abc import Callable
from typing import Any

import click

from kvmpy.errors import ConfigError
from kvmpy.sizes import parse_address, parse_size

__all__ = ["ADDRESS", "SIZE"]


class _Parsed(click.ParamType[int]):
    """A number that one of kvmpy's own parsers reads."""

    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text, or fail with what is wrong with it."""
        try:
            return self.parse(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


ADDRESS = _Parsed("address", parse_address)
SIZE = _Parsed("size", parse_size)
