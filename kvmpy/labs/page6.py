"""Exercises of docs/6-ring3.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import console, memory, value
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.labs.payload import keeps_registers, place, random_registers, registers_stored, stored
from kvmpy.machine import Machine

__all__ = ["EXERCISES"]

_PAGE: Final = "6-ring3.md"
_PROGRAM, _STACK = 0x200000, 0x400000
_RESULTS: Final = 0x3F0000  # where programs leave what the checks look at
_SELECTOR: Final = _RESULTS + 0x800
_KERNEL: Final = 0x8000  # memory that programs must not reach
_SECRET: Final = b"the kernel's own"
_REFUSED: Final = (1 << 64) - 1
_TIMEOUT: Final = 1.0
_INT3: Final = 3


def _program(machine: Machine, source: str) -> None:
    machine.memory.write(_KERNEL, _SECRET)
    place(machine, _PROGRAM, source)


def _letter(letter: str) -> str:
    return f"mov edi, {ord(letter)}; mov eax, 1; int3"


# 6.1 ------------------------------------------------------------------------------------------


def _programs(random: Random) -> Sequence[Case]:
    def case(text: str, code: int) -> Case:
        registers = random_registers(random)
        registers["rdi"] = ord(text[-1])
        ring = f"mov eax, cs; mov [{_SELECTOR:#x}], eax"
        call = "mov eax, 1; int3"
        source = "\n".join([
            ring, *map(_letter, text[:-1]), registers_stored(registers, call, _RESULTS),
            f"mov edi, {code}; mov eax, 2; int3; ud2",
        ])  # fmt: skip
        return Case(
            f"with a program that prints {text!r} and ends with {code}",
            prepare=lambda machine: _program(machine, source),
            expect={"text": text.encode(), "code": code, "registers": registers},
            timeout=_TIMEOUT,
        )

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(random.choices(letters, k=random.randrange(2, 9))) for _ in range(3)]
    return [case(word, random.randrange(1, 128)) for word in words]


def _ran_in_ring3(run: Run) -> Finding:
    selector = run.machine.memory.read_u32(_SELECTOR)
    if not selector:
        return Finding(False, f"the program at {_PROGRAM:#x} did not run, or could not store")
    if selector & 3 != 3:
        return Finding(False, f"the program ran in ring {selector & 3}, by CS = {selector:#x}")
    return Finding(True, "the program ran in ring 3")


def _gate_is_for_ring3(run: Run) -> Finding:
    """Not every KVM looks at the gate's DPL when INT3 comes from ring 3; processors do."""
    gates = run.machine.view.idt().entries
    if len(gates) <= _INT3:
        return Finding(False, "the IDT has no gate for vector 3")
    gate = gates[_INT3]
    if gate.problem:
        return Finding(False, f"the gate of vector 3: {gate.problem}")
    if gate.dpl != 3:
        return Finding(False, f"INT3 in ring 3 is a #GP: the gate of vector 3 has DPL {gate.dpl}")
    return Finding(True, "the gate of vector 3 may be used from ring 3")


# 6.2 ------------------------------------------------------------------------------------------

_MISDEEDS: Final = (
    ("HLT", "hlt", 13),
    ("a read of the kernel's memory", f"mov rax, [{_KERNEL:#x}]", 14),
    ("a write to the kernel's memory", f"mov qword ptr [{_KERNEL:#x}], 0", 14),
    ("UD2", "ud2", 6),
    ("a division by zero", "xor ecx, ecx; div ecx", 0),
    ("a jump to where nothing is mapped", "mov rax, 0x700000000000; jmp rax", 14),
    ("MOV to CR3", "xor eax, eax; mov cr3, rax", 13),
)


def _misdeeds(random: Random) -> Sequence[Case]:
    def case(what: str, source: str, vector: int) -> Case:
        return Case(
            f"with a program that prints 'p' and does {what}",
            prepare=lambda machine: _program(machine, f"{_letter('p')}\n{source}\n{_letter('x')}"),
            expect={"vector": vector},
            timeout=_TIMEOUT,
        )

    return [case(*one) for one in random.sample(_MISDEEDS, len(_MISDEEDS))]


# 6.3 ------------------------------------------------------------------------------------------


def _strings(random: Random) -> Sequence[Case]:
    good = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randrange(3, 9)))
    at = _RESULTS + 0x1000 + random.randrange(0x1000)
    end = _STACK - len(good)
    user = _STACK - _PROGRAM
    asked = [
        (at, len(good), True, "a text of its own"),
        (end, len(good), True, "the last bytes that it has"),
        (at, 0, True, "no bytes"),
        (_KERNEL, len(_SECRET), False, "the kernel's memory"),
        (end, len(good) + 1, False, "a byte beyond its memory"),
        (_PROGRAM - 1, 2, False, "a byte before its memory"),
        (at, (1 << 64) - at + _KERNEL, False, "a length that wraps round"),
        ((1 << 64) - 8, 16, False, "an address that wraps round"),
        (at, user, False, "more than there is"),
    ]

    def case(where: int, length: int, fine: bool, what: str) -> Case:
        source = "\n".join([
            f"mov rsi, {where:#x}; mov rcx, {length:#x}; mov eax, 3; int3",
            f"mov [{_RESULTS:#x}], rax; mov byte ptr [{_RESULTS + 8:#x}], 1",
            "mov edi, 1; mov eax, 2; int3; ud2",
        ])  # fmt: skip

        def prepare(machine: Machine) -> None:
            _program(machine, source)
            for place_ in (at, end):
                machine.memory.write(place_, good.encode())

        wanted = (good.encode()[:length], length) if fine else (b"", _REFUSED)
        return Case(f"with a program that has {what} printed", prepare=prepare,
                    expect={"text": wanted[0], "rax": wanted[1]}, timeout=_TIMEOUT)  # fmt: skip

    return [case(*one) for one in asked]


def _answered(run: Run) -> Finding:
    (found,), wanted = stored(run, _RESULTS, 1), run.case.expect["rax"]
    if not run.machine.memory.read(_RESULTS + 8, 1)[0]:
        return Finding(False, "the program did not go on after its call")
    if found == wanted:
        return Finding(True, "the program gets the length, or -1 for a text that is not its own")
    said = "-1" if wanted == _REFUSED else f"{wanted:#x}"
    return Finding(False, f"the call gives the program {found:#x}, not {said}")


EXERCISES: Final = (
    Exercise(
        number="6.1",
        title="A kernel with two calls",
        page=_PAGE,
        text="""\
At 0x200000 there is a program, another one each time. Run it in ring 3, with 2 MiB to 4 MiB
mapped one to one for it to use, and its stack pointer at 0x400000. It calls the kernel by INT3:
EAX = 1 prints the byte in DIL to port 0xe9, EAX = 2 ends the program and writes the byte in DIL
to port 0xf4. A call leaves all registers as they are, but for RAX.""",
        checks=(
            _ran_in_ring3,
            _gate_is_for_ring3,
            console(lambda run: bytes(run.case.expect["text"])),
            value(lambda run: int(run.case.expect["code"])),
            keeps_registers(_RESULTS, "a call", '"The way back" in docs/6-ring3.md'),
        ),
        look='"Into ring 3" and "The way back" in docs/6-ring3.md; SDM Vol.3 6.14',
        cases=_programs,
    ),
    Exercise(
        number="6.2",
        title="A kernel that survives its program",
        page=_PAGE,
        text="""\
As 6.1, but the program does what it may not: an instruction for ring 0, memory that is not its
own, a division by zero, no instruction at all. End it by writing the number of the exception to
port 0xf4: 14 for a #PF. Nothing of the kernel's memory, all that is below 2 MiB, can be read or
written by it.""",
        checks=(
            value(lambda run: int(run.case.expect["vector"])),
            console(b"p"),
            memory(_KERNEL, _SECRET),
        ),
        look='"Faults in ring 3" in docs/6-ring3.md; SDM Vol.3 6.3, 6.14.2',
        cases=_misdeeds,
    ),
    Exercise(
        number="6.3",
        title="Do not trust a pointer",
        page=_PAGE,
        text="""\
As 6.1, with a third call: EAX = 3 prints RCX bytes from the address in RSI on, and gives RCX in
RAX. The kernel may read all memory and the program may not: so a text that is not wholly
between 2 MiB and 4 MiB is refused. Nothing of it is printed, and RAX is -1. No bytes at all are
a good text.""",
        checks=(_answered, console(lambda run: bytes(run.case.expect["text"]))),
        look='"Whose pointer" in docs/6-ring3.md; SDM Vol.3 5.10',
        cases=_strings,
    ),
)
