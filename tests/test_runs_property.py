"""Whatever guests do with their inputs, a loop says of each what a new machine would."""

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reset import INPUT, SUMMING, given_input
from test_snapshot import DATA, MMIO, PORT, attach, code, machine_of

from kvmpy import Machine, Outcome, runs
from kvmpy.devices import Counter, EndRun

pytestmark = pytest.mark.usefixtures("kvm_host")

LOAD = f"mov esi, {INPUT}\nmovzx ebp, byte ptr [rsi]\nmovzx ebx, byte ptr [rsi + 1]"
ENDING, COUNTED = 0x70, 0x74
PIECES = (
    "add rax, rbp",
    "imul rax, rbx",
    f"mov edi, {DATA}\nadd [rdi], rax\nmov rcx, [rdi]",
    f"mov edi, {DATA}\nlea rdi, [rdi + rbp*8]\ninc qword ptr [rdi]\nadd rax, [rdi]",
    "push rax",
    f"out {PORT}, al",
    f"in eax, {PORT}\nadd rbx, rax",
    f"mov edi, {MMIO:#x}\nmov [rdi + rbp], al",
    f"mov edi, {MMIO:#x}\nadd rax, [rdi]",
    f"out {COUNTED}, al\nin eax, {COUNTED}",
    "out 0xe9, al",
    "inc byte ptr [rsi + 300]\nadd al, [rsi + 300]",
    "cmp bpl, 7\njb {0}\nhlt\n{0}:",
    "cmp bpl, 6\njne {0}\nud2\n{0}:",
    "cmp bpl, 5\njne {0}\nmov edi, 0x7fffffff\nmov [rdi], eax\n{0}:",
    "cmp bpl, 4\njne {0}\nout 0xf4, al\n{0}:",
    f"cmp bpl, 3\njne {{0}}\nout {ENDING}, eax\n{{0}}:",
    "cmp bpl, 2\njne {0}\nint3\n{0}:",
)
LAST = "out 0xf4, al\nhlt"


def attach_all(machine: Machine) -> None:
    attach(machine)
    machine.attach_port(ENDING, 4, EndRun())


def attach_counter(machine: Machine) -> None:
    """A device that C serves and that has a state."""
    attach_all(machine)
    machine.attach_port(COUNTED, 4, Counter())


def seen(one: Outcome[bytes]) -> tuple[Any, ...]:
    return one.outcome, one.value, one.exception, one.registers, one.collected


@settings(max_examples=15)
@pytest.mark.parametrize("ring", [0, 3])
@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=10),
    inputs=st.lists(
        st.binary(min_size=2, max_size=2).map(lambda two: bytes([two[0] % 8, two[1]])),
        min_size=1,
        max_size=12,
    ),
    batch=st.sampled_from([1, 2, 5, 64]),
    counted=st.booleans(),
    logged=st.booleans(),
)
def test_each_run_is_as_on_a_new_machine(
    ring: int, pieces: list[str], inputs: list[bytes], batch: int, counted: bool, logged: bool
) -> None:
    text = [piece.format(f"label{number}") for number, piece in enumerate(pieces)]
    body = code("\n".join((LOAD, *text, LAST)))
    attaching = attach_counter if counted else attach_all
    collect = (DATA, 4096)
    with machine_of(body, ring) as machine:
        machine.attach_port(ENDING, 4, EndRun())
        if counted:
            machine.attach_port(COUNTED, 4, Counter())
        snapshot = machine.snapshot()
    options: dict[str, Any] = {"timeout": 10, "max_exits": 50, "collect": collect}
    alone = []
    for one in inputs:
        (made,) = runs(snapshot, [one], INPUT, attach=attaching, **options)
        alone.append(seen(made))
    with Machine.from_snapshot(snapshot, attaching) as machine:
        if logged:
            machine.vm.set_log_dirty(next(iter(machine.memory)), True)
        for _ in range(2):
            made_all = runs(snapshot, inputs, INPUT, machine=machine, batch=batch, **options)
            assert [seen(one) for one in made_all] == alone


def test_stops_from_another_thread_end_one_run_each() -> None:
    with machine_of(code(SUMMING), 3) as machine:
        snapshot = machine.snapshot()
        over, stops = threading.Event(), 0

        def stop() -> None:
            nonlocal stops
            while not over.wait(0.0003):
                machine.stop()
                stops += 1

        inputs = [given_input(*range(number % 7 + 1)) for number in range(3000)]
        thread = threading.Thread(target=stop)
        thread.start()
        try:
            made = list(runs(snapshot, inputs, INPUT, timeout=10, machine=machine, batch=8))
        finally:
            over.set()
            thread.join()
        found = {"stopped": 0, "debug-exit": 0}
        for one in made:
            found[one.outcome] += 1
            if one.outcome == "debug-exit":
                assert one.value == sum(one.input[1:])
        assert 0 < found["stopped"] <= stops
        assert found["debug-exit"] > 100
