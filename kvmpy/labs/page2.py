"""Exercises of docs/2-kvm-run.md."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Final

from kvmpy.labs.checks import console, ends, exits, memory, wrote
from kvmpy.labs.model import Case, Exercise
from kvmpy.machine import Machine

__all__ = ["EXERCISES"]

_PAGE: Final = "2-kvm-run.md"
_ASK, _TELL = 0x60, 0x61
_NUMBER, _RESULT = 0x8000, 0x8008
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _questions(random: Random) -> Sequence[Case]:
    def case(numbers: list[int]) -> Case:
        def prepare(machine: Machine) -> None:
            left = [*numbers, 0]

            @machine.on_port(_ASK)
            def ask(offset: int, size: int, value: int | None) -> int | None:
                if value is not None:
                    return None
                return (left.pop(0) if left else 0) & ((1 << 8 * size) - 1)

            @machine.on_port(_TELL)
            def tell(offset: int, size: int, value: int | None) -> int | None:
                return 0 if value is None else None

        squares = [number * number & 0xFFFF_FFFF for number in numbers]
        return Case(f"asked {numbers}", prepare=prepare, expect={"squares": squares})

    some = [random.randrange(1, 60_000) for _ in range(random.randrange(4, 9))]
    return [case([3]), case(some), case([])]


def _sums(random: Random) -> Sequence[Case]:
    def case(number: int) -> Case:
        return Case(
            f"with {number} at {_NUMBER:#x}",
            prepare=lambda machine: machine.memory.write_u64(_NUMBER, number),
            expect={"sum": (number * (number + 1) // 2).to_bytes(8, "little")},
        )

    return [case(1), case(0), case(random.randrange(100, 2000))]


def _vendors(random: Random) -> Sequence[Case]:
    def case(vendor: bytes) -> Case:
        def prepare(machine: Machine) -> None:
            parts = [int.from_bytes(vendor[at : at + 4], "little") for at in (0, 4, 8)]
            leaf = {"ebx": parts[0], "edx": parts[1], "ecx": parts[2]}
            cpu = machine.cpus[0]
            cpu.set_cpuid2(
                replace(one, **leaf) if one.function == 0 else one for one in cpu.get_cpuid2()
            )

        return Case(
            f"with the vendor {vendor.decode()!r}", prepare=prepare, expect={"vendor": vendor}
        )

    return [case("".join(random.sample(_LETTERS, k=12)).encode()) for _ in range(2)]


EXERCISES: Final = (
    Exercise(
        number="2.1",
        title="Ask and be answered",
        page=_PAGE,
        text="""\
Read 32-bit numbers from port 0x60. Write the square of each, its lower 32 bits, to port 0x61
before you ask for the next one. A zero ends it: answer it with HLT, not with a square. Which of
your instructions is not finished when KVM_RUN returns?""",
        checks=(
            ends("halt"),
            wrote("port-out", _TELL, lambda run: list(run.case.expect["squares"])),
            exits("port-in", lambda run: len(run.case.expect["squares"]) + 1),
        ),
        look='"The loop" in docs/2-kvm-run.md; SDM Vol.2, IN, OUT and IMUL',
        cases=_questions,
    ),
    Exercise(
        number="2.2",
        title="Work that nobody sees",
        page=_PAGE,
        text="""\
The 64-bit number at address 0x8000 is n. Add up 1 + 2 + ... + n in a loop, store the sum as 64 bits
at 0x8008, and end with HLT, which is to be the only exit. Nothing may be printed: who looks into
the guest's memory afterwards, and why can it do so without asking the guest?""",
        checks=(
            ends("halt"),
            memory(_RESULT, lambda run: bytes(run.case.expect["sum"])),
            exits("", 1),
        ),
        look='"What the processor does in between" in docs/2-kvm-run.md',
        cases=_sums,
    ),
    Exercise(
        number="2.3",
        title="An exit that you never see",
        page=_PAGE,
        text="""\
CPUID always leaves a guest on Intel, and wherever KVM asks for it on AMD. Print the processor's
vendor, the 12 letters that CPUID gives for EAX = 0, in the order EBX, EDX, ECX, to port 0xe9, and
then HLT: 13 exits. This machine's processor has another name each time. Who answered the CPUID?""",
        checks=(
            ends("halt"),
            console(lambda run: bytes(run.case.expect["vendor"])),
            exits("", 13),
        ),
        look='"Two kinds of exit" in docs/2-kvm-run.md; SDM Vol.3 26.1.2; SDM Vol.2, CPUID',
        cases=_vendors,
    ),
)
