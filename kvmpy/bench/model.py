"""The words of the instrument: what is measured, and what one measurement is made of.

A *case* is an operation at a level from a mode. It is measured in *batches*, no two of them in
one process; a batch is an array of *samples*, nanoseconds per operation, with everything that is
needed to judge them. numpy is imported here and in the rooms beside it, never by `kvmpy` itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvmpy.errors import KvmpyError

__all__ = [
    "LEVELS",
    "MODES",
    "Batch",
    "Case",
    "Conditions",
    "Floats",
    "Operation",
    "Ticks",
    "Unmeasured",
]

LEVELS: Final = ("kernel", "c", "python")
"""Who answers an exit: KVM itself, the C loop, or a device in Python."""

MODES: Final = ("real", "protected", "long", "ring3")
"""What the guest runs in: real, 32-bit protected, long mode ring 0, long mode ring 3."""

Floats: TypeAlias = NDArray[np.float64]
Ticks: TypeAlias = NDArray[np.uint64]


FAILED: Final = "failed here"


class Unmeasured(KvmpyError):
    """A case that has no number here, and why.

    `status` is "does not exit here", "not available here" or "hangs here", or `FAILED` where
    measuring it went wrong.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """An operation, the level that answers it ("-" where there is none), the guest's mode ("-")."""

    operation: str
    level: str = "-"
    mode: str = "-"

    def __str__(self) -> str:
        return "/".join(part for part in (self.operation, self.level, self.mode) if part != "-")


@dataclass(frozen=True, slots=True)
class Conditions:
    """How a batch is to be taken: `count` samples after `warmup` more that are thrown away.

    `deadline` is in seconds, for the whole batch. `helper_cpu` is where a second thread runs, for
    the operations that take two; None where there is no CPU for one.
    """

    count: int
    warmup: int = 200
    deadline: float = 20.0
    helper_cpu: int | None = None


@dataclass(slots=True)
class Batch:
    """One batch. `samples` are ns per operation, in the order in which they were taken.

    `host` are the raw CLOCK_MONOTONIC ns at which the C loop entered and left KVM_RUN, one row
    an entry; several operations may lie between two of them. `guest` are the guest's own readings
    of its TSC before and after the operation, fenced, from a loop of their own. `overhead` are
    the costs, in ns, of measuring, from the same batch and never subtracted: "clock" (two
    readings of the host's clock), "loop" (the guest's loop without the operation), "tsc" (two
    of the guest's readings with nothing between); and parts of a sample: "outside" (from the exit
    of the guest to its next entry) and "device" (calling the Python device). `proof` says that it
    happened as often as claimed: "claimed", "counted" (by the C loop) and KVM's own statistics
    where they count it. `interference` and `reference` are filled in by the process that runs the
    batch: the latter is what the same few exits took, in ns, before it and after it. `disturbed` is
    filled in when all batches are there (see `kvmpy.bench.reference`).
    """

    case: Case
    samples: Floats
    host: Ticks = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    guest: Ticks = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    overhead: Mapping[str, float] = field(default_factory=dict)
    proof: Mapping[str, int] = field(default_factory=dict)
    interference: Mapping[str, int] = field(default_factory=dict)
    reference: tuple[float, ...] = ()
    disturbed: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table of operations.

    `measure(case, conditions)` takes one batch in this process, or raises Unmeasured. `about` is
    one line; `includes` says what the number includes.
    """

    name: str
    group: str
    about: str
    includes: str
    measure: Callable[[Case, Conditions], Batch]
    levels: tuple[str, ...] = ("-",)
    modes: tuple[str, ...] = ("-",)
