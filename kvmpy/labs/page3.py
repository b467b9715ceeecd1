"""Exercises of docs/3-modes.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import console, ends, register, starts_in
from kvmpy.labs.model import Case, Check, Exercise, Finding, Run
from kvmpy.x86.flags import CR0, EFER

__all__ = ["EXERCISES"]

_PAGE: Final = "3-modes.md"
_NUMBER: Final = 0x8000


def _writes_in(letter: bytes, mode: str, look: str = "") -> Check:
    """That letter was written in that mode (a name of `kvmpy.views.cpumode`)."""

    def check(run: Run) -> Finding:
        modes = [one.mode.name for one in run.moments if letter in one.data]
        if not modes:
            return Finding(False, f"it never writes {letter.decode()!r}", look)
        wrong = [one for one in modes if one != mode]
        if wrong:
            return Finding(
                False, f"it writes {letter.decode()!r} in {wrong[0]}, not in {mode}", look
            )
        return Finding(True, f"it writes {letter.decode()!r} in {mode}")

    return check


def _own_tables(run: Run) -> Finding:
    """The page tables map the page with the number one to one."""
    root = run.machine.cpus[0].get_sregs().cr3 & ~0xFFF
    walk = run.machine.view.walk(_NUMBER)
    if walk.physical != _NUMBER:
        found = "nothing" if walk.physical is None else f"{walk.physical:#x}"
        return Finding(False, f"with CR3 = {root:#x}, the page tables map {_NUMBER:#x} to {found}, "
                              "not one to one")  # fmt: skip
    return Finding(True, f"its page tables, at {root:#x}, map {_NUMBER:#x} one to one")


def _left_long_mode(run: Run) -> Finding:
    special = run.machine.cpus[0].get_sregs()
    bits = {
        "EFER.LMA": special.efer & EFER.LMA,
        "EFER.LME": special.efer & EFER.LME,
        "CR0.PG": special.cr0 & CR0.PG,
    }
    left = [name for name, bit in bits.items() if bit]
    if left:
        return Finding(False, f"still set at the end: {', '.join(left)}")
    return Finding(True, "at the end paging and long mode are off")


def _wide_numbers(random: Random) -> Sequence[Case]:
    def case() -> Case:
        number = random.randrange(1 << 63, 1 << 64)
        return Case(
            f"with {number:#x} at {_NUMBER:#x}",
            prepare=lambda machine: machine.memory.write_u64(_NUMBER, number),
            expect={"number": number},
        )

    return [case(), case()]


EXERCISES: Final = (
    Exercise(
        number="3.1",
        title="To protected mode",
        page=_PAGE,
        text="""\
Start in real mode. Write the letter R to port 0xe9 while you are there. Go to 32-bit protected mode
with a GDT of your own, and write P there, to the same port. End with HLT.""",
        checks=(
            starts_in("real"),
            ends("halt"),
            _writes_in(b"R", "real mode"),
            _writes_in(b"P", "protected mode, 32-bit code"),
            console(b"RP"),
        ),
        look='"Real to protected" in docs/3-modes.md; SDM Vol.3 10.9.1',
        mode="real",
    ),
    Exercise(
        number="3.2",
        title="To 64-bit mode, with your own page tables",
        page=_PAGE,
        text="""\
Start in protected mode. Build page tables that map the first 2 MiB one to one, go to 64-bit mode
and write L to port 0xe9 there. Then load the 64-bit number at address 0x8000 into R15, which no
other mode has, and HLT.""",
        checks=(
            starts_in("protected"),
            ends("halt"),
            _writes_in(b"L", "64-bit mode"),
            _own_tables,
            register("r15", lambda run: int(run.case.expect["number"])),
        ),
        look='"Protected to long" in docs/3-modes.md; SDM Vol.3 10.8.5 and 4.5',
        cases=_wide_numbers,
        mode="protected",
    ),
    Exercise(
        number="3.3",
        title="And back",
        page=_PAGE,
        text="""\
Start in long mode, where kvmpy's page tables map the first 4 GiB one to one. Write 6 to port 0xe9
in 64-bit mode, 4 in compatibility mode with 32-bit code, and 3 in protected mode, with paging and
EFER.LME off. End with HLT. In what order must CS, CR0.PG and EFER.LME change, and why?""",
        checks=(
            starts_in("long"),
            ends("halt"),
            _writes_in(b"6", "64-bit mode"),
            _writes_in(b"4", "compatibility mode, 32-bit code"),
            _writes_in(b"3", "protected mode, 32-bit code"),
            console(b"643"),
            _left_long_mode,
        ),
        look='"The order matters" in docs/3-modes.md; SDM Vol.3 10.8.5.4',
    ),
)
