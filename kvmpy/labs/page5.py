"""Exercises of docs/5-interrupts.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import console, ends, exits, value
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.labs.payload import keeps_registers, place, random_registers, registers_stored
from kvmpy.machine import Machine
from kvmpy.x86.paging import PAGE_4K

__all__ = ["EXERCISES"]

_PAGE: Final = "5-interrupts.md"
_CODE: Final = 0x9000
_RESULTS: Final = 0xA000
_SUM: Final = _RESULTS
_FIRST_PAGE: Final = 1 << 40
_PAGES: Final = 64
_VECTOR_AT: Final = 0x8000
_ASK, _DATA = 0x10, 0x11
_TIMEOUT: Final = 1.0  # seconds: a guest that waits for what does not come is told so soon


# 5.1 ------------------------------------------------------------------------------------------


def _undefined(random: Random) -> Sequence[Case]:
    def case(count: int) -> Case:
        registers = random_registers(random, "rax")
        failing = "\n".join(["ud2"] * count)
        source = registers_stored(registers, failing, _RESULTS) + "\nret"
        return Case(
            f"with {count} UD2 in the code at {_CODE:#x}",
            prepare=lambda machine: place(machine, _CODE, source),
            expect={"count": count, "registers": registers},
            timeout=_TIMEOUT,
        )

    return [case(1), *(case(random.randrange(2, 100)) for _ in range(2))]


# 5.2 ------------------------------------------------------------------------------------------


def _touches(random: Random) -> Sequence[Case]:
    def case(count: int) -> Case:
        pages = [_FIRST_PAGE + PAGE_4K * page for page in random.sample(range(_PAGES), count)]
        cells = {page + 8 * random.randrange(512): random.getrandbits(64) for page in pages}
        lines = [f"mov rax, {at:#x}; mov rbx, {number:#x}; mov [rax], rbx"
                 for at, number in cells.items()]  # fmt: skip
        lines.append("xor ebx, ebx")
        lines += [f"mov rax, {at:#x}; add rbx, [rax]" for at in sorted(cells)]
        lines.append(f"mov [{_SUM:#x}], rbx; ret")
        source = "\n".join(lines)
        total = sum(cells.values()) & (1 << 64) - 1
        return Case(
            f"with code that uses {count} pages",
            prepare=lambda machine: place(machine, _CODE, source),
            expect={"pages": pages, "sum": total},
            timeout=_TIMEOUT,
        )

    return [case(1), case(random.randrange(8, 32)), case(_PAGES)]


def _each_has_a_page(run: Run) -> Finding:
    pages = run.case.expect["pages"]
    walks = [run.machine.view.walk(page, "write", 0) for page in pages]
    for walk in walks:
        if walk.physical is None:
            return Finding(False, f"{walk.linear:#x} was used and leads nowhere: {walk.why}")
        if not walk.in_ram:
            return Finding(False, f"{walk.linear:#x} leads to {walk.physical:#x}, where no RAM is")
    if len({walk.physical for walk in walks}) < len(walks):
        return Finding(False, "two of the pages that were used lead to the same RAM")
    return Finding(True, f"each of the {len(pages)} pages that were used has RAM of its own")


def _no_other_has(run: Run) -> Finding:
    used = set(run.case.expect["pages"])
    for number in range(_PAGES):
        page = _FIRST_PAGE + PAGE_4K * number
        walk = run.machine.view.walk(page)
        if page not in used and walk.physical is not None:
            return Finding(False, f"{page:#x} has a page, and nothing has touched it")
    return Finding(True, "no page was given to what nobody touched")


def _sums_up(run: Run) -> Finding:
    found, wanted = run.machine.memory.read_u64(_SUM), run.case.expect["sum"]
    if found == wanted:
        return Finding(True, "what was written to the pages was read back")
    return Finding(False, "what the code read back from the pages is not what it wrote, or it did "
                          "not come to its end")  # fmt: skip


# 5.3 ------------------------------------------------------------------------------------------


class _Sender:
    """A device that has one byte after each interrupt, which the guest has to ask for."""

    def __init__(self, machine: Machine, text: bytes, vector: int) -> None:
        self.machine, self.left, self.vector = machine, list(text), vector
        self.waiting: int | None = None
        self.not_ready = self.unasked = self.lost = 0

    def ask(self, offset: int, size: int, given: int | None) -> int | None:
        if given is None:
            return 0xFF
        cpu = self.machine.cpus[0]
        if not cpu.ready_for_interrupt:
            self.not_ready += 1
        elif self.waiting is not None:
            self.lost += 1
        elif self.left:
            self.waiting = self.left.pop(0)
            cpu.interrupt(self.vector)
        return None

    def data(self, offset: int, size: int, given: int | None) -> int | None:
        if given is not None:
            return None
        if self.waiting is None:
            self.unasked += 1
            return 0xFF
        byte, self.waiting = self.waiting, None
        return byte


def _texts(random: Random) -> Sequence[Case]:
    def case(text: bytes) -> Case:
        vector = random.randrange(32, 256)

        def prepare(machine: Machine) -> _Sender:
            machine.memory.write_u32(_VECTOR_AT, vector)
            sender = _Sender(machine, text + b"\0", vector)
            machine.on_port(_ASK)(sender.ask)
            machine.on_port(_DATA)(sender.data)
            return sender

        return Case(f"with the vector {vector}", prepare=prepare, expect={"text": text},
                    timeout=_TIMEOUT)  # fmt: skip

    letters = "abcdefghijklmnopqrstuvwxyz"
    made = ["".join(random.choices(letters, k=random.randrange(3, 12))) for _ in range(2)]
    return [case(b""), *(case(f"{word}\n".encode()) for word in made)]


def _device_was_served(run: Run) -> Finding:
    sender: _Sender = run.kept
    if sender.not_ready:
        why = "RFLAGS.IF was clear, or an STI only just before"
        asked = f"{sender.not_ready} times the guest asked and could not take an interrupt"
        return Finding(False, f"{asked}: {why}")
    if sender.unasked:
        return Finding(False, f"port {_DATA:#x} was read {sender.unasked} times when no byte was "
                              "there: read it once for each interrupt")  # fmt: skip
    if sender.lost:
        return Finding(False, "the guest asked again before it had fetched the byte")
    if sender.left or sender.waiting is not None:
        return Finding(False, "the device has bytes left: the guest did not ask for all of them")
    return Finding(True, "each byte was asked for, announced by an interrupt, and fetched once")


EXERCISES: Final = (
    Exercise(
        number="5.1",
        title="Count what is undefined",
        page=_PAGE,
        text="""\
At 0x9000 there is code that raises #UD by UD2, a number of times that is another one each time,
and then returns. Call it. Your handler counts, and goes on after the UD2, which has two bytes;
the code finds all its registers as they were. End by writing the count to port 0xf4, as a byte.""",
        checks=(
            value(lambda run: int(run.case.expect["count"])),
            keeps_registers(_RESULTS, "the handler", '"A handler" in docs/5-interrupts.md'),
            exits("", 1),
        ),
        look='"Gates" and "The frame" in docs/5-interrupts.md; SDM Vol.3 6.14',
        cases=_undefined,
    ),
    Exercise(
        number="5.2",
        title="Pages on demand",
        page=_PAGE,
        text="""\
At 0x9000 there is code that reads and writes some of the 64 pages from 0x10000000000 (1 TiB)
on, and then returns. Call it, and HLT. Nothing is mapped there at the start: your #PF handler
gives each page its own RAM when it is first touched, and nothing to the others. CR2 says which
page.""",
        checks=(ends("halt"), _sums_up, _each_has_a_page, _no_other_has),
        look='"Error codes" in docs/5-interrupts.md, and docs/4-paging.md; SDM Vol.3 4.7',
        cases=_touches,
    ),
    Exercise(
        number="5.3",
        title="A device that interrupts",
        page=_PAGE,
        text="""\
A device sends you a text. Write any byte to port 0x10 to ask for a letter: an interrupt comes,
and its handler reads the letter from port 0x11, once. The vector is the 32-bit number at
0x8000, another one each time. Print the letters to port 0xe9; the byte 0 ends the text and is
not printed: HLT then. An interrupt is sent only when the processor can take it.""",
        checks=(
            ends("halt"),
            _device_was_served,
            console(lambda run: bytes(run.case.expect["text"])),
        ),
        look='"Interrupts from outside" in docs/5-interrupts.md; SDM Vol.3 6.8.1',
        cases=_texts,
    ),
)
