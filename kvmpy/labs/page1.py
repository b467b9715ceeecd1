"""Exercises of docs/1-first-exit.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import console, ends, exits, value
from kvmpy.labs.model import Case, Exercise, Finding, Run

__all__ = ["EXERCISES"]

_PAGE: Final = "1-first-exit.md"
_NUMBER: Final = 0x8000


def _sent_in_one_exit_each(run: Run) -> Finding:
    """A line of n bytes costs n exits here: neither more nor, by a string instruction, fewer."""
    counts = run.result.exits
    if counts == {"port-out": 6, "halt": 1}:
        return Finding(True, "7 exits: 6 port writes, and the HLT")
    seen = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return Finding(False, f"its exits are {seen or 'none'}; a port-out for each of the 6 bytes, "
                          "and one halt, were expected")  # fmt: skip


def _numbers(random: Random) -> Sequence[Case]:
    def case(number: int) -> Case:
        return Case(
            f"with {number} at {_NUMBER:#x}",
            prepare=lambda machine: machine.memory.write_u32(_NUMBER, number),
            expect={"number": number},
        )

    return [case(0), case(1), *(case(random.randrange(2, 60)) for _ in range(3))]


def _dots(run: Run) -> bytes:
    return b"." * int(run.case.expect["number"])


EXERCISES: Final = (
    Exercise(
        number="1.1",
        title="A line of your own",
        page=_PAGE,
        text="""\
Write a guest that prints the five letters "first" and a newline to port 0xe9, one byte at a time,
and ends with HLT. It should leave the guest seven times, and no more.""",
        checks=(ends("halt"), console(b"first\n"), _sent_in_one_exit_each),
        look='"The guest" in docs/1-first-exit.md; SDM Vol.2, OUT and HLT',
    ),
    Exercise(
        number="1.2",
        title="As many exits as you are told",
        page=_PAGE,
        text="""\
The 32-bit number at address 0x8000 is put there before your guest starts, and is another one each
time. Write that many dots to port 0xe9, one exit for each; then end by writing the number to port
0xf4, the debug exit, as 32 bits. Zero is a number, too.""",
        checks=(
            console(_dots),
            exits("port-out", lambda run: int(run.case.expect["number"]) + 1),
            value(lambda run: int(run.case.expect["number"])),
        ),
        look='"What ends a run" in docs/1-first-exit.md; SDM Vol.1 7.3.8 on loops',
        cases=_numbers,
    ),
)
