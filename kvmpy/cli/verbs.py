"""The verbs of the command, each imported when it is asked for: starting up stays cheap."""

import importlib
from collections.abc import Mapping
from typing import Final

import click

from kvmpy import __version__

__all__ = ["cli"]

VERBS: Final[Mapping[str, tuple[str, str]]] = {
    "run": ("kvmpy.cli.run", "Run a guest; its console is standard output."),
    "step": ("kvmpy.cli.step", "Run a guest one instruction at a time, and say what each did."),
    "explain": ("kvmpy.cli.explain", "Say what a file is taken for, and how it would start."),
    "snapshot": ("kvmpy.cli.snapshot", "Run a guest to a place and save it; info, diff."),
    "resume": ("kvmpy.cli.resume", "Go on with a guest that was saved."),
    "trace": ("kvmpy.cli.trace", "Run a guest and show each exit as it happens; diff."),
    "stat": ("kvmpy.cli.stat", "Run a guest and count: exits, time, KVM's own statistics."),
    "guests": ("kvmpy.cli.guests", "List the guests that come with kvmpy."),
    "lab": ("kvmpy.cli.lab", "List the exercises of the pages in docs/, and check your guest."),
    "bench": ("kvmpy.cli.bench", "Measure what exits cost, with percentiles."),
    "asm": ("kvmpy.cli.asm", "Assemble a source: addresses and bytes beside the text."),
    "info": ("kvmpy.cli.info", "Say what this host's KVM is and what it can do."),
}


class Verbs(click.Group):
    """The group of all verbs; help comes from the table, without importing a verb."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the table's order."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; None for a word that is none."""
        if cmd_name not in VERBS:
            return None
        command = getattr(importlib.import_module(VERBS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which are the verbs."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb {args[0]!r}: use one of {', '.join(VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs into the help text."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmpy")
def cli() -> None:
    """A minimal x86-64 hypervisor that drives /dev/kvm directly from Python."""
