"""Why a guest stopped, in gdb's terms, and the packets that say so (GDB manual, E.3)."""

from typing import Final, NamedTuple

from kvmpy.result import OUTCOMES, Result
from kvmpy.x86.exceptions import GuestException

__all__ = [
    "SIGABRT",
    "SIGINT",
    "SIGKILL",
    "SIGTRAP",
    "Action",
    "Ended",
    "Failed",
    "Stop",
    "crash",
    "exception",
]

# gdb's own numbers (include/gdb/signals.def), not the host's.
SIGINT, SIGILL, SIGTRAP, SIGABRT, SIGFPE, SIGKILL, SIGBUS, SIGSEGV = 2, 4, 5, 6, 8, 9, 10, 11

_BY_VECTOR: Final = {
    0: SIGFPE, 1: SIGTRAP, 3: SIGTRAP, 6: SIGILL, 7: SIGFPE, 16: SIGFPE, 17: SIGBUS, 19: SIGFPE,
}  # fmt: skip
_BY_OUTCOME: Final = {
    "shutdown": SIGSEGV,
    "internal-error": SIGILL,
    "fail-entry": SIGABRT,
    "unclaimed": SIGBUS,
}


class Action(NamedTuple):
    """How a vCPU goes on: `kind` is "c" (on), "s" (one instruction) or "r" (while its program
    counter is in [start, end)).
    """

    kind: str
    start: int = 0
    end: int = 0


class Stop(NamedTuple):
    """A vCPU that stopped: `reason` is "swbreak", "hwbreak", "watch", "rwatch", "awatch", "step" or
    empty; `address` is what is watched; `text` are words for the user.
    """

    cpu: int
    signal: int
    reason: str = ""
    address: int = 0
    text: str = ""


class Ended(NamedTuple):
    """The guest's end."""

    cpu: int
    result: Result


class Failed(NamedTuple):
    """A run that ended with an exception of Python's, such as a device's."""

    cpu: int
    error: BaseException


def exception(cpu: int, raised: GuestException) -> Stop:
    """The stop of a vCPU whose ring-3 code raised an exception that kvmpy's stubs reported."""
    return Stop(cpu, _BY_VECTOR.get(raised.vector, SIGSEGV), text=str(raised))


def crash(cpu: int, result: Result) -> Stop:
    """The stop of a vCPU whose guest died of its own fault, or ran into what nobody serves."""
    text = f"{result.outcome}: {OUTCOMES.get(result.outcome, result.outcome)}"
    detail = f" ({result.detail})" if result.detail else ""
    return Stop(cpu, _BY_OUTCOME.get(result.outcome, SIGTRAP), text=text + detail)
