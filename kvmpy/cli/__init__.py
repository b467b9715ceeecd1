"""The command line: one module per verb, imported when it is used."""

import errno
import os
import sys
from collections.abc import Sequence

__all__ = ["INTERRUPTED", "main"]

BAD_INPUT = 2
HOST_FAILED = 125
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
_CLOSED = (errno.EPIPE, errno.EBADF)
_CANNOT_WRITE = (*_CLOSED, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_LONGEST_LINE = 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. Errors are one line on standard error."""
    try:
        _fill_standard_descriptors()
        return _main(arguments)
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("KVMPY_DEBUG"):
            raise
        complain(f"{type(error).__name__}: {error} (KVMPY_DEBUG=1 shows where)")
        return HOST_FAILED


def _main(arguments: Sequence[str] | None) -> int:
    import click

    from kvmpy.cli.verbs import cli
    from kvmpy.errors import HostError, KvmpyError

    try:
        # Not cli.main(), which has its own ideas of what to print on Ctrl-C.
        with cli.make_context("kvmpy", list(sys.argv[1:] if arguments is None else arguments)) as c:
            status = cli.invoke(c)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return BAD_INPUT
    except click.ClickException as error:
        complain(error.format_message())
        return BAD_INPUT
    except HostError as error:
        complain(str(error))
        return HOST_FAILED
    except KvmpyError as error:
        complain(str(error))
        return BAD_INPUT
    except OSError as error:
        # What is written to other places says itself, as a HostError, where that failed.
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        _abandon_output()
        complain("standard output " + output_failure(error))
        return HOST_FAILED
    return status if isinstance(status, int) else 0


def _fill_standard_descriptors() -> None:
    """Give a standard stream that is closed a descriptor: or else /dev/kvm would get its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if fd == 0 else os.O_RDONLY)  # the lowest that is free


def output_failure(error: OSError) -> str:
    """What is wrong with standard output, after its name."""
    return "was closed early" if error.errno in _CLOSED else f"failed: {error.strerror}"


def _abandon_output() -> None:
    """Keep the interpreter from flushing to where nothing goes, and complaining, when it ends."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass


def complain(message: str) -> None:
    """Write one line on standard error, whatever state that is in."""
    line = " ".join(message.split("\n")).strip()
    try:
        # Whatever a file had in it must not reach a terminal as control characters.
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        sys.stderr.write(f"kvmpy: {shown[:_LONGEST_LINE]}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # closed: there is nobody to tell
