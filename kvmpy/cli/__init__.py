"""The command line: one module per verb, imported when it is used."""

import sys
from collections.abc import Sequence

__all__ = ["INTERRUPTED", "main"]

BAD_INPUT = 2
HOST_FAILED = 125
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. Errors are one line on standard error."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    import click

    from kvmpy.cli.verbs import cli
    from kvmpy.errors import HostError, KvmpyError

    try:
        status = cli.main(arguments, prog_name="kvmpy", standalone_mode=False)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        complain(error.format_message())
        return BAD_INPUT
    except HostError as error:
        complain(str(error))
        return HOST_FAILED
    except KvmpyError as error:
        complain(str(error))
        return BAD_INPUT
    except BrokenPipeError:
        complain("standard output was closed early")
        return HOST_FAILED
    return status if isinstance(status, int) else 0


def complain(message: str) -> None:
    """Write one line on standard error, whatever state that is in."""
    try:
        sys.stderr.write("kvmpy: " + " ".join(message.split("\n")).strip() + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # closed: there is nobody to tell
