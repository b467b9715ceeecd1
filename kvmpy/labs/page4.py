"""Exercises of docs/4-paging.md."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Final

from kvmpy.labs.checks import ends, memory
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.machine import Machine
from kvmpy.views.pages import page_walk, reader
from kvmpy.x86.paging import PAGE_2M, PAGE_4K

__all__ = ["EXERCISES"]

_PAGE: Final = "4-paging.md"
_ADDRESS, _NUMBER = 0x8000, 0x8008
_FRAME: Final = 0x300000
_WALKED_TABLES: Final = (0x200000, 0x400000)  # where the tables of exercise 4.3 are
_NOWHERE: Final = (1 << 64) - 1
_PRESENT, _WRITABLE, _DIRTY, _LARGE = 1, 2, 1 << 6, 1 << 7


# 4.1 ------------------------------------------------------------------------------------------


def _own_page(random: Random) -> Sequence[Case]:
    def case() -> Case:
        indices = (random.randrange(1, 255), *(random.randrange(1, 511) for _ in range(3)))
        pml4, pdpt, pd, pt = indices
        linear = pml4 << 39 | pdpt << 30 | pd << 21 | pt << 12
        number = random.getrandbits(64)

        def prepare(machine: Machine) -> None:
            machine.memory.write_u64(_ADDRESS, linear)
            machine.memory.write_u64(_NUMBER, number)

        return Case(f"with {linear:#x} at {_ADDRESS:#x}", prepare=prepare,
                    expect={"linear": linear, "number": number})  # fmt: skip

    return [case() for _ in range(3)]


def _leads_to_the_frame(run: Run) -> Finding:
    linear = run.case.expect["linear"]
    walk = run.machine.view.walk(linear, "write", 0)
    if walk.physical is None:
        return Finding(False, f"the walk of {linear:#x} ends nowhere: {walk.why}")
    if walk.physical != _FRAME:
        return Finding(False, f"{linear:#x} leads to {walk.physical:#x}, not to {_FRAME:#x}")
    if walk.page_size != PAGE_4K:
        return Finding(
            False, f"{linear:#x} leads to a page of {walk.page_size:#x} bytes, not 4 KiB"
        )
    return Finding(True, f"{linear:#x} leads to {_FRAME:#x} by a page of 4 KiB")


def _has_the_rights(run: Run) -> Finding:
    walk = run.machine.view.walk(run.case.expect["linear"], "write", 0)
    if walk.physical is None:
        return Finding(False, "without a page there are no rights to look at")
    wrong = []
    if not walk.writable:
        wrong.append("it may not be written (bit 1, at every level)")
    if walk.user:
        wrong.append("ring 3 may use it (bit 2, clear at one level at least)")
    if walk.executable:
        wrong.append("it may be executed (bit 63, set at one level at least)")
    if wrong:
        return Finding(False, f"the page's rights are wrong: {'; '.join(wrong)}")
    return Finding(True, "it may be written, not executed, and is the supervisor's")


def _was_written_there(run: Run) -> Finding:
    walk = run.machine.view.walk(run.case.expect["linear"])
    leaf = walk.entries[-1].value or 0 if walk.entries else 0
    if walk.physical is None or not leaf & _DIRTY:
        text = "the page's D bit (bit 6) is clear: nothing was written by way of that address"
        return Finding(False, text, '"What the processor writes" in docs/4-paging.md')
    return Finding(True, "the processor has set the page's D bit: it was written by that address")


# 4.2 ------------------------------------------------------------------------------------------


def _guard(random: Random) -> Sequence[Case]:
    def case(page: int) -> Case:
        return Case(
            f"with {page:#x} at {_ADDRESS:#x}",
            prepare=lambda machine: machine.memory.write_u64(_ADDRESS, page),
            expect={"page": page},
        )

    inner = [PAGE_2M + PAGE_4K * random.randrange(*bounds) for bounds in ((1, 256), (256, 511))]
    return [case(page) for page in (*inner, PAGE_2M)]


def _page_is_gone(run: Run) -> Finding:
    page = run.case.expect["page"]
    walk = run.machine.view.walk(page)
    if walk.physical is not None:
        return Finding(False, f"{page:#x} still leads to {walk.physical:#x}")
    if walk.end != "not present":
        return Finding(False, f"the walk of {page:#x} ends by a mistake: {walk.why}")
    return Finding(True, f"{page:#x} is not present")


def _rest_is_as_before(run: Run) -> Finding:
    page = run.case.expect["page"]
    mapped = [one for one in run.machine.view.map().ranges if one.physical is not None]
    pieces = [(0, page - 1), (page + PAGE_4K, (4 << 30) - 1)]
    for one in mapped:
        if one.physical != one.start:
            return Finding(False, f"{one.start:#x} leads to {one.physical:#x}: before, every "
                                  "address led to itself")  # fmt: skip
        if one.user or not (one.writable and one.executable):
            return Finding(False, f"the rights of {one.start:#x} to {one.last:#x} have changed")
    for start, last in pieces:
        at = start
        for one in mapped:
            if one.start <= at <= one.last:
                at = one.last + 1
        if at <= last:
            return Finding(False, f"{at:#x} leads nowhere any more, and it should be as before")
    small = {size for one in mapped for size in one.page_sizes if one.start >= 2 * PAGE_2M}
    if PAGE_4K in small:
        return Finding(False, "above 4 MiB there are pages of 4 KiB now; only one large page "
                              "had to be split")  # fmt: skip
    return Finding(True, "all other addresses lead to themselves, as before")


# 4.3 ------------------------------------------------------------------------------------------


def _walks(random: Random) -> Sequence[Case]:
    ends = ["4 KiB", "2 MiB", "1 GiB", "PML4", "PDPT", "PD", "PT"]
    random.shuffle(ends)
    return [_walk_case(random, end) for end in ends]


def _walk_case(random: Random, end: str) -> Case:
    """Tables at random pages, with random entries beside those of the way, which ends so."""
    pages = random.sample(range(*_WALKED_TABLES, PAGE_4K), 4)
    linear = random.getrandbits(47)
    writes: list[tuple[int, int]] = []
    depth = {"PML4": 0, "PDPT": 1, "1 GiB": 1, "PD": 2, "2 MiB": 2, "PT": 3, "4 KiB": 3}[end]
    for level in range(depth + 1):
        shift = 39 - 9 * level
        index = linear >> shift & 511
        last = level == depth
        if last and "i" in end:
            frame = random.getrandbits(40 - shift) << shift
            value = frame | _PRESENT | (_LARGE if shift > 12 else 0)
        elif last:
            value = random.getrandbits(40) << 12 & ~_PRESENT
        else:
            value = pages[level + 1] | _PRESENT
        value |= random.choice((0, _WRITABLE)) | random.choice((0, 1 << 63)) * (value & _PRESENT)
        writes.append((pages[level] + 8 * index, value))
        other = random.choice([n for n in range(512) if n != index])
        writes.append((pages[level] + 8 * other, random.getrandbits(40) << 12 | _PRESENT))

    def prepare(machine: Machine) -> int:
        for address, value in writes:
            machine.memory.write_u64(address, value)
        machine.memory.write_u64(_ADDRESS, linear)
        machine.memory.write_u64(_NUMBER, pages[0])
        special = replace(machine.cpus[0].get_sregs(), cr3=pages[0])
        walk = page_walk(reader(machine.memory.read), special, linear, cpl=0)
        return _NOWHERE if walk.physical is None else walk.physical

    what = f"that ends in a page of {end}" if "i" in end else f"whose {end} entry is not present"
    return Case(f"with a walk of {linear:#x} {what}", prepare=prepare)


def _says_where(run: Run) -> Finding:
    found, wanted = run.result.registers.rax, run.kept
    if found == wanted:
        return Finding(True, "RAX is what the walk comes to")
    words = "all ones, for it leads nowhere" if wanted == _NOWHERE else f"{wanted:#x}"
    return Finding(False, f"RAX is {found:#x}; the walk comes to {words}")


EXERCISES: Final = (
    Exercise(
        number="4.1",
        title="A page where you want it",
        page=_PAGE,
        text="""\
At 0x8000 there is a linear address, at 0x8008 a number of 64 bits; both are others each time.
Make that linear address lead to the physical page 0x300000, by a page of 4 KiB that ring 0 may
write and nobody may execute. Then write the number there, by way of the linear address, and
HLT.""",
        checks=(
            ends("halt"),
            _leads_to_the_frame,
            _has_the_rights,
            _was_written_there,
            memory(_FRAME, lambda run: run.case.expect["number"].to_bytes(8, "little")),
        ),
        look='"Tables of your own" in docs/4-paging.md; SDM Vol.3 4.5',
        cases=_own_page,
    ),
    Exercise(
        number="4.2",
        title="A guard page",
        page=_PAGE,
        text="""\
kvmpy maps the first 4 GiB by pages of 2 MiB. At 0x8000 there is the address of a page of 4 KiB,
between 2 MiB and 4 MiB. Take that one page away, so that an access to it is a #PF; all other
addresses go on leading where they led. Change kvmpy's tables: CR3 says where they are. HLT
then.""",
        checks=(ends("halt"), _page_is_gone, _rest_is_as_before),
        look='"Large pages" in docs/4-paging.md; SDM Vol.3 4.5, tables 4-18 to 4-20',
        cases=_guard,
    ),
    Exercise(
        number="4.3",
        title="Be the walker",
        page=_PAGE,
        text="""\
Walk page tables yourself. At 0x8000 there is a linear address, at 0x8008 what CR3 would be:
four levels of tables that are not in use, with pages of 4 KiB, 2 MiB or 1 GiB. Leave in RAX the
physical address that the linear one leads to, or all ones where an entry is not present, and
HLT.""",
        checks=(ends("halt"), _says_where),
        look='"The walk" in docs/4-paging.md; SDM Vol.3 4.5, figures 4-8 to 4-10',
        cases=_walks,
    ),
)
