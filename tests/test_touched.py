"""The pages that each run of a loop over inputs has changed."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_snapshot import DATA, MEMORY, code

from kvmpy import Machine, runs
from kvmpy.devices import EndRun
from kvmpy.memory import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("kvm_host")
INPUT, PORT = 0x30000, 0x70


def machine_of(text: str) -> Machine:
    machine = Machine(MEMORY, "long")
    machine.attach_port(PORT, 4, EndRun())
    machine.load(code(text), 0x1000)
    return machine


# An input is a list of bytes, each the number of a page to write to; 0xff ends it.
WRITING = f"""
mov esi, {INPUT}
again:
movzx eax, byte ptr [rsi]
inc rsi
cmp al, 0xff
je done
mov edx, eax
shl edx, 12
mov byte ptr [rdx + {DATA}], 1
cmp al, 7
je halt
cmp al, 6
je debug
jmp again
halt:
hlt
debug:
out 0xf4, al
done:
mov eax, [{INPUT}]
out {PORT}, eax
"""
pages = st.lists(st.integers(0, 7), max_size=6)


def expected(inputs: list[list[int]]) -> list[tuple[str, frozenset[int]]]:
    found = []
    for numbers in inputs:
        ends = [at for at, number in enumerate(numbers) if number in (6, 7)]
        done = numbers[: ends[0] + 1] if ends else numbers
        last = done[-1] if ends else None
        outcome = {6: "debug-exit", 7: "halt", None: "ended"}[last]
        found.append((outcome, frozenset({INPUT, *(DATA + PAGE_SIZE * one for one in done)})))
    return found


@settings(max_examples=15)
@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@given(inputs=st.lists(pages, min_size=1, max_size=9))
def test_each_outcome_has_its_pages(inputs: list[list[int]], batch: int, logged: bool) -> None:
    with machine_of(WRITING) as machine:
        if not logged:  # the log is somebody else's
            machine.vm.set_log_dirty(next(iter(machine.memory)), True)
        snapshot = machine.snapshot()
        given_ = [bytes(numbers) + b"\xff" for numbers in inputs]
        how: Any = {"timeout": 10, "batch": batch, "machine": machine}
        made = list(runs(snapshot, given_, INPUT, touched=True, **how))
        assert machine.resetter.method == ("dirty-log" if logged else "copy-on-write")
        assert [(one.outcome, one.touched) for one in made] == expected(inputs)
        for one in made:
            if one.outcome == "ended":
                assert one.value == int.from_bytes(one.input[:4].ljust(4, b"\0"), "little")
        again = list(runs(snapshot, given_, INPUT, **how))
        assert [one.outcome for one in again] == [one.outcome for one in made]
        assert not any(one.touched for one in again)


def test_pages_of_a_run_that_python_has_written_the_input_of() -> None:
    with machine_of(WRITING) as machine:
        snapshot = machine.snapshot()

        def write(machine: Machine, number: int) -> None:
            machine.memory.write(INPUT, bytes([number, 0xFF]))

        for one in runs(snapshot, range(6), write, timeout=10, touched=True, machine=machine):
            assert one.touched == {INPUT, DATA + PAGE_SIZE * one.input}
            assert (one.outcome, one.value) == ("ended", 0xFF00 | one.input)


def test_what_is_written_as_it_was_is_not_touched() -> None:
    text = f"mov eax, [{DATA}]\nmov dword ptr [{DATA}], 5\nmov [{DATA}], eax\nout {PORT}, al"
    with machine_of(text) as machine:
        snapshot = machine.snapshot()
        (one,) = runs(snapshot, [b""], INPUT, timeout=10, touched=True, machine=machine)
        assert one.touched == frozenset()


def test_batches_are_reset_where_somebody_else_has_the_dirty_log() -> None:
    with machine_of(f"inc dword ptr [{DATA}]\nmov eax, [{DATA}]\nout {PORT}, eax") as machine:
        machine.vm.set_log_dirty(next(iter(machine.memory)), True)
        snapshot = machine.snapshot()
        made = runs(snapshot, [b"x"] * 6, INPUT, timeout=10, batch=3, machine=machine)
        assert [one.value for one in made] == [1] * 6
