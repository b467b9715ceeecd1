"""What an autopsy found, as a value that shows itself."""

from dataclasses import dataclass, field
from typing import Any

from kvmpy.autopsy.causes import CAUSES
from kvmpy.autopsy.fault import Fault
from kvmpy.views.show import Grid, Shown

__all__ = ["Autopsy"]

_ORDER = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")


@dataclass(frozen=True, slots=True)
class Autopsy(Shown):
    """Why a guest died.

    `cause` is a key of `kvmpy.autopsy.CAUSES`. `vector` and `error_code` are those of the first
    exception, None where there was none; `rip` and `instruction` are where it was raised. `faults`
    are that exception and those that its delivery led to, in order. `last` are lines on what came
    before: exits, instructions. `replayed` says that a copy of the guest was run to find out, and
    `certain` is False where another explanation fits the state as well. `notes` are further
    lines, `failure` says why the autopsy itself failed, empty where it did not.
    """

    cause: str
    outcome: str
    rip: int
    instruction: str
    faults: tuple[Fault, ...] = ()
    last: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    replayed: bool = False
    certain: bool = True
    failure: str = field(default="")

    @property
    def vector(self) -> int | None:
        """The first exception's vector."""
        return self.faults[0].vector if self.faults else None

    @property
    def error_code(self) -> int | None:
        """The first exception's error code."""
        return self.faults[0].error_code if self.faults else None

    @property
    def summary(self) -> str:
        """The cause in a few words."""
        return CAUSES[self.cause].summary

    @property
    def advice(self) -> str:
        """What to do about it, in a sentence."""
        return CAUSES[self.cause].advice

    @property
    def references(self) -> str:
        """The sections of the manuals that say so."""
        return CAUSES[self.cause].references

    @property
    def explanation(self) -> tuple[str, ...]:
        """What happened, a line for each step."""
        lines = [f"before: {line}" for line in self.last]
        lines.append(f"at {self.rip:#x}: {self.instruction}")
        for order, fault in zip(_ORDER, self.faults, strict=False):
            name = fault.name or "stop"
            lines.append(f"{order}: {name}: {fault.why}")
        chained = len(self.faults) > 1 and self.faults[-1].vector is not None
        if chained and self.outcome == "shutdown":
            lines.append("then: shutdown: nothing handles a fault on the way to #DF's handler")
        return (*lines, *(f"note: {note}" for note in self.notes))

    def grids(self) -> tuple[Grid, ...]:
        """The explanation as a table, and the advice below it."""
        sure = "" if self.certain or self.cause == "unknown" else " (likely)"
        title = f"autopsy: {self.cause}{sure}: {self.summary}"
        if self.failure:
            return (Grid(title, notes=(self.failure,)),)
        table = [line.split(": ", 1) for line in self.explanation]
        notes = (f"fix: {self.advice}", f"see: {self.references}")
        return (Grid(title, ("", ""), table, notes),)

    def as_dict(self) -> dict[str, Any]:
        """All of it as values for JSON."""
        return {
            "cause": self.cause,
            "summary": self.summary,
            "vector": self.vector,
            "error_code": self.error_code,
            "rip": self.rip,
            "instruction": self.instruction,
            "faults": [
                {"name": f.name, "cause": f.cause, "why": f.why, "vector": f.vector,
                 "error_code": f.error_code, "address": f.address}
                for f in self.faults
            ],
            "explanation": list(self.explanation),
            "advice": self.advice,
            "references": self.references,
            "replayed": self.replayed,
            "certain": self.certain,
            "failure": self.failure,
        }  # fmt: skip
