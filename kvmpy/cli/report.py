"""`--report`: what happened in a run, as JSON."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.errors import ConfigError, HostError
from kvmpy.kvm import backend
from kvmpy.machine import Machine
from kvmpy.result import Result

if TYPE_CHECKING:
    from kvmpy.autopsy import Autopsy

__all__ = ["Report"]


def _writable(path: Path) -> bool:
    if path.exists():
        return os.access(path, os.W_OK)
    return path.parent.is_dir() and os.access(path.parent, os.W_OK)


class Report:
    """Writes the report, if a path was given; ConfigError at once if it cannot be written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.mode = ""
        self.autopsy: Autopsy | None = None
        """Goes into the report."""
        if path is not None and path.is_dir():
            raise ConfigError(f"cannot write the report {path}: it is a directory")
        if path is not None and not _writable(path):
            try:  # to learn why not
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC))
            except OSError as error:
                raise ConfigError(f"cannot write the report {path}: {error.strerror}") from None

    def _write(self, path: Path, text: str) -> None:
        try:
            path.write_text(text)
        except OSError as error:
            # The run took place: not the arguments are at fault, as they were looked at before.
            what = f"writing the report {path} failed: {error.strerror}"
            raise HostError(what, error.errno or 0) from None

    def finished(self, machine: Machine, result: Result, status: int) -> int:
        """Report a run that came to a result; the status again."""
        facts = {
            "detail": result.detail,
            "value": result.value,
            "unclaimed": list(result.unclaimed),
            "seconds": result.seconds,
            "exits": dict(result.exits),
            "registers": result.registers.as_dict(),
        }
        return self._finish(machine, result.outcome, status, facts)

    def failed(self, machine: Machine, outcome: str, status: int) -> int:
        """Report a run that an exception ended; the status again."""
        cpu = machine.cpus[0]
        facts = {
            "detail": "",
            "value": None,
            "unclaimed": machine.unclaimed(),
            "seconds": machine.seconds,
            "exits": cpu.exit_counts(),
            "registers": cpu.get_regs().as_dict(),
        }
        return self._finish(machine, outcome, status, facts)

    def _finish(self, machine: Machine, outcome: str, status: int, facts: dict[str, Any]) -> int:
        if self.path is not None:
            report = {
                "outcome": outcome,
                "exit_status": status,
                **facts,
                "mode": self.mode,
                "backend": backend(),
                "autopsy": None if self.autopsy is None else self.autopsy.as_dict(),
                # Bytes that are no UTF-8 become lone surrogates, and can be turned back:
                # console.encode("utf-8", "surrogateescape").
                "console": machine.console.decode("utf-8", "surrogateescape"),
            }
            self._write(self.path, json.dumps(report, indent=2) + "\n")
        return status
