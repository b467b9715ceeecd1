"""Memory that C has addresses of, while it is taken away: by another thread, a child, or a caller."""

from typing import Any
import pytest

from kvmpy import ConfigError, Machine, runs
from kvmpy.memory import Memory

pytestmark = pytest.mark.usefixtures("kvm_host")

FAR = 1 << 30
SIZE = 32 << 20
HALT = b"\xf4"


def machine_with_more(code: bytes = HALT, **options: Any) -> Machine:
    """With a second region of RAM, at FAR."""
    machine = Machine("1M", **options)
    machine.load(code)
    machine.vm.add_memory(FAR, SIZE)
    return machine


def far(machine: Machine) -> Memory:
    return next(region for region in machine.memory if region.address == FAR)


def replace_far(machine: Machine) -> None:
    """RAM of the same shape, which lies elsewhere in this process."""
    old = far(machine)
    made = Memory(FAR, SIZE, slot=old.slot)  # before the other goes, so not in its place
    machine.vm.remove_memory(old)
    machine.vm.adopt_memory(made)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_over_inputs_goes_on_with_ram_that_was_replaced(batch: int) -> None:
    with machine_with_more() as machine:
        machine.memory.write(FAR, b"before")
        snapshot, found = machine.snapshot(), []
        made = runs(
            snapshot, [b"1", b"2", b"3", b"4"], FAR, machine=machine, collect=(FAR, 6),
            touched=True, batch=batch,
        )  # fmt: skip
        for one in made:
            found.append((one.collected, one.touched))
            if len(found) == 2:
                replace_far(machine)
                machine.reset_to(snapshot)
        assert found == [(digit + b"efore", frozenset({FAR})) for digit in (b"1", b"2", b"3", b"4")]


def test_a_loop_over_inputs_whose_function_takes_ram_away() -> None:
    with machine_with_more() as machine:
        snapshot = machine.snapshot()

        def write(machine: Machine, given: bytes) -> None:
            machine.vm.remove_memory(far(machine))

        with pytest.raises(ConfigError, match="other RAM"):
            list(runs(snapshot, [b""], write, machine=machine, collect=(FAR, 6)))
