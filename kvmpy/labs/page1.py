"""Exercises of docs/1-first-exit.md."""

import re
from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.errors import AddressError
from kvmpy.labs.checks import console, ends, exits, starts_in, value
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.machine import Machine

__all__ = ["EXERCISES"]

_PAGE: Final = "1-first-exit.md"
_NUMBER: Final = 0x8000
_TEXT: Final = 0x9000
_REP_OUTSB: Final = re.compile(b"\xf3(\x67)?\x6e")
_WORDS: Final = (b"kernel", b"guest", b"exit", b"port", b"root", b"vector", b"gate", b"page")


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


def _texts(random: Random) -> Sequence[Case]:
    def case(count: int) -> Case:
        text = b" ".join(random.choice(_WORDS) for _ in range(count)) + b"\n"

        def prepare(machine: Machine) -> None:
            machine.memory.write_u32(_NUMBER, len(text))
            machine.memory.write(_TEXT, text)

        return Case(f"with a text of {len(text)} bytes", prepare=prepare, expect={"text": text})

    return [case(1), case(random.randrange(3, 8)), case(random.randrange(8, 20))]


def _by_rep_outs(run: Run) -> Finding:
    """Each port write comes from REP OUTSB: RIP is at it or behind it, as the host has it."""
    for one in run.records:
        if one.kind != "port-out" or one.rip is None:
            continue
        try:
            code = run.machine.memory.read(max(0, one.rip - 3), 6)
        except AddressError:
            code = b""
        if not _REP_OUTSB.search(code):
            seen = f"the byte {chr(one.value or 0)!r} is written by another instruction"
            return Finding(False, f"{seen} than REP OUTSB, near rip {one.rip:#x}")
    return Finding(True, "REP OUTSB does all the writing")


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
        look='"What ends a run" in docs/1-first-exit.md; SDM Vol.1 7.3.8.2 on loops',
        cases=_numbers,
    ),
    Exercise(
        number="1.3",
        title="One instruction, many bytes",
        page=_PAGE,
        text="""\
The text to print lies at address 0x9000, and its length, as 32 bits, at 0x8000. Start in long mode.
Print the text to port 0xe9 with one instruction that does all the writing; then HLT. Before you
check it, guess how many exits `kvmpy stat` will count. Why may a hypervisor take the bytes of a
string instruction in one exit, and not those of a loop of OUTs?""",
        checks=(
            starts_in("long"),
            ends("halt"),
            console(lambda run: bytes(run.case.expect["text"])),
            _by_rep_outs,
        ),
        look="guests/string_io.S; SDM Vol.2, OUTS and REP; KVM API 5, KVM_EXIT_IO",
        cases=_texts,
    ),
)
