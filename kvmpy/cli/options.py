"""Types of options that several verbs have."""

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import click

from kvmpy.errors import ConfigError
from kvmpy.sizes import parse_address, parse_size

__all__ = ["ADDRESS", "SIZE", "Number", "VerbsOfGuest"]


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


class Number(click.FloatRange):
    """A number within bounds; click's own type lets "nan" pass, which no comparison finds large."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse the text, or fail with what is wrong with it."""
        number = float(super().convert(value, param, ctx))
        if isnan(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


ADDRESS = _Parsed("address", parse_address)
SIZE = _Parsed("size", parse_size)


class VerbsOfGuest(click.Group):
    """Its commands win over a guest of that name; anything else is a guest for `default`."""

    def __init__(self, *args: Any, default: str, usage: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.default, self.usage = default, usage

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default before a guest."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that there are for a guest, and the commands."""
        self.commands[self.default].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each way to use it."""
        for line in self.usage:
            formatter.write_usage(ctx.command_path, line)
