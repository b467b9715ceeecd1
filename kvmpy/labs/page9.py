"""Exercises of docs/9-triple-fault.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import console, ends, memory, value
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.labs.payload import place
from kvmpy.machine import Machine
from kvmpy.snapshot import Snapshot
from kvmpy.x86.paging import PAGE_2M

__all__ = ["EXERCISES"]

_PAGE: Final = "9-triple-fault.md"
_ADDRESS: Final = 0x8000
_CODE: Final = 0x9000
_NOTE: Final = 0xA000
_TIMEOUT: Final = 1.0
_NP, _PF = 11, 14
_WRITE: Final = 2


def _far_away(random: Random) -> int:
    """A canonical address in the lower half, far from all that kvmpy maps."""
    return random.randrange(1 << 41, 1 << 46) & ~0xF


# 9.1 ------------------------------------------------------------------------------------------


def _orders(random: Random) -> Sequence[Case]:
    def case(address: int) -> Case:
        def prepare(machine: Machine) -> Snapshot:
            machine.memory.write_u64(_ADDRESS, address)
            return machine.snapshot()  # where a shutdown leaves no state, it is replayed from here

        return Case(f"with {address:#x} at {_ADDRESS:#x}", prepare=prepare,
                    expect={"address": address}, timeout=_TIMEOUT)  # fmt: skip

    return [case(_far_away(random)) for _ in range(2)]


def _begins_with_the_write(run: Run) -> Finding:
    found = run.machine.autopsy(run.result, start=run.kept)
    if not found.faults:
        return Finding(False, "there was no exception that could be found")
    first, address = found.faults[0], run.case.expect["address"]
    if first.vector != _PF or not (first.error_code or 0) & _WRITE:
        what = f"it begins with {first.name or 'no exception'} ({first.why})"
        return Finding(False, f"{what}; a #PF by a write was ordered")
    if first.address != address:
        at = "nowhere" if first.address is None else f"{first.address:#x}"
        return Finding(False, f"the write goes to {at}, not to {address:#x}")
    return Finding(True, f"it begins with a #PF, by a write to {address:#x}")


def _gate_is_not_present(run: Run) -> Finding:
    found = run.machine.autopsy(run.result, start=run.kept)
    if len(found.faults) < 2:
        return Finding(False, "there is no second exception: the first one was delivered")
    second = found.faults[1]
    if second.vector != _NP:
        return Finding(False, f"the second exception is {second.name} ({second.why}); a #NP by the "
                              "gate of #PF was ordered")  # fmt: skip
    return Finding(True, "then #NP: the gate of #PF is complete, but not present")


# 9.2 ------------------------------------------------------------------------------------------


def _stacks(random: Random) -> Sequence[Case]:
    def case(broken: bool) -> Case:
        address = _far_away(random)
        register, what = ("rsp", "rax") if broken else ("rax", "[rax]")
        source = f"mov {register}, {address:#x}; push {what}"
        rsp = address if broken else 0
        about = f"sets RSP to {address:#x} and pushes" if broken else f"reads from {address:#x}"
        return Case(
            f"with code that {about}",
            prepare=lambda machine: place(machine, _CODE, f"{source}; hlt"),
            expect={"vector": 8 if broken else _PF, "rsp": rsp},
            timeout=_TIMEOUT,
        )

    return [case(True), case(False), case(True)]


def _noted_the_stack(run: Run) -> Finding:
    wanted = run.case.expect["rsp"]
    if not wanted:
        return Finding(True, "there was no double fault to note a stack of")
    return memory(_NOTE, wanted.to_bytes(8, "little"))(run)


# 9.3 ------------------------------------------------------------------------------------------


def _one_fault(random: Random) -> Sequence[Case]:
    number = random.getrandbits(32)
    source = f"mov eax, {number:#x}; mov [{_NOTE:#x}], rax; ud2; hlt"
    return [
        Case(
            prepare=lambda machine: _with_code(machine, source),
            expect={"number": number},
            timeout=_TIMEOUT,
        )
    ]


def _with_code(machine: Machine, source: str) -> int:
    place(machine, _CODE, source)
    return machine.cpus[0].get_sregs().cr3


def _maps_no_more(run: Run) -> Finding:
    view = run.machine.view
    if run.machine.cpus[0].get_sregs().cr3 == run.kept:
        return Finding(False, "CR3 is still that of kvmpy's tables")
    total = sum(one.size for one in view.map().ranges if one.physical is not None)
    if total > PAGE_2M:
        return Finding(False, f"the new tables map {total:#x} bytes; 2 MiB are enough")
    return Finding(True, "the tables are its own, and map no more than 2 MiB")


EXERCISES: Final = (
    Exercise(
        number="9.1",
        title="A triple fault to order",
        page=_PAGE,
        text="""\
Write a guest that dies of a triple fault, and of this one: it begins with a #PF, by a write to
the address that stands at 0x8000 (64 bits, another one each time). The IDT has a gate for #PF,
complete but for its P bit, so that the next exception is #NP. Nobody handles that one either.""",
        checks=(ends("shutdown"), _begins_with_the_write, _gate_is_not_present),
        look='"How it comes about" in docs/9-triple-fault.md; SDM Vol.3 6.14.1, 6.15',
        cases=_orders,
    ),
    Exercise(
        number="9.2",
        title="Live through a double fault",
        page=_PAGE,
        text="""\
The code at 0x9000, another one each time, raises a #PF; sometimes its stack is broken as well.
Jump to it. End by writing to port 0xf4 the number of the exception that you got: 14, or 8 where
#PF could not be delivered. In that case write the RSP that was broken to 0xa000 before (64
bits).""",
        checks=(value(lambda run: int(run.case.expect["vector"])), _noted_the_stack),
        look='"A stack for #DF" in docs/9-triple-fault.md; SDM Vol.3 6.14.5, 8.7',
        cases=_stacks,
    ),
    Exercise(
        number="9.3",
        title="Mend it",
        page=_PAGE,
        text="""\
Mend `tables`, the guest of this page. It has page tables of its own, which map no more than 2
MiB: leave it at that. In place of its UD2, have it jump to 0x9000: the code there writes a
number to memory and raises #UD. The handler prints "mended" and a newline to port 0xe9, and
halts.""",
        checks=(
            ends("halt"),
            console(b"mended\n"),
            _maps_no_more,
            memory(_NOTE, lambda run: int(run.case.expect["number"]).to_bytes(8, "little")),
        ),
        look='"Four mistakes" in docs/9-triple-fault.md; SDM Vol.3 6.12.1',
        cases=_one_fault,
    ),
)
