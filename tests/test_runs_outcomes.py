"""What outcomes of `runs` tell, and what `runs` refuses."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy import Machine, assemble, runs
from kvmpy import map as kvmpy_map

pytestmark = pytest.mark.usefixtures("kvm_host")

INPUT = 0x30000
# Raises #UD for an odd input, and a debug exit for an even one; with a stack of its own.
ODD = f"""
mov esp, 0x20000
mov edi, {INPUT}
mov al, [rdi]
stc
test al, 1
jnz odd
out 0xf4, al
odd:
stc
ud2
"""


@pytest.fixture
def odd() -> Iterator[Machine]:
    with Machine("1M", ring=3) as machine:
        machine.load(assemble(ODD, mode="long", at=0x1000))
        yield machine


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_exception_has_the_registers_of_who_raised_it(
    odd: Machine, batch: int, many: bool
) -> None:
    snapshot, inputs = odd.snapshot(), [b"\2", b"\1", b"\4", b"\3"]
    odd.memory.write(INPUT, b"\1")
    expected = odd.run(timeout=10).registers
    if many:
        found = list(
            kvmpy_map(snapshot, inputs, write_to=INPUT, timeout=10, batch=batch, workers=1)
        )
    else:
        found = list(runs(snapshot, inputs, INPUT, timeout=10, batch=batch))
    assert [one.outcome for one in found] == ["debug-exit", "exception"] * 2
    for one in found[1::2]:
        registers = one.registers
        assert one.exception is not None
        assert registers.rip == one.exception.rip == expected.rip == odd.symbols["odd"] + 1
        assert (registers.rsp, registers.rflags) == (0x20000, expected.rflags)
        assert registers.rflags & 1  # as STC has left it


def test_an_outcome_is_shown_in_a_line(odd: Machine) -> None:
    how: Any = {"timeout": 10, "collect": (INPUT, 2000), "touched": True}
    even, one = runs(odd.snapshot(), [b"\2" * 2000, b"\1" * 2000], INPUT, **how)
    start = "<Outcome debug-exit (value 2), input b'\\x02\\x02"
    assert repr(even).startswith(start) and str(even) == repr(even)
    end = f", rip {even.registers.rip:#x}, 2000 bytes collected, 1 page touched>"
    assert repr(even).endswith(end) and len(repr(even)) < 150
    assert f"({one.exception}), input b'" in repr(one)
    assert f", rip {odd.symbols['odd'] + 1:#x}, " in repr(one)
    broken = one._replace(outcome="error", detail="", packed=b"", error=ValueError("bad"))
    assert "rip" not in repr(broken) and "ValueError('bad')" in repr(broken)
