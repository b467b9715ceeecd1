"""Wrong arguments and closed machines: typed errors, in a line that says what to do."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmpy import ConfigError, Machine, Snapshot, runs
from kvmpy.spares import Spares

pytestmark = pytest.mark.usefixtures("kvm_host")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("1M") as made:
        made.load(b"\xf4")
        yield made


@pytest.fixture
def snapshot(machine: Machine) -> Snapshot:
    return machine.snapshot()


@pytest.mark.parametrize("given", ["a.snap", None, b"\1" * 1000, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda _, given: Machine.from_snapshot(given),
        lambda _, given: list(runs(given, [b""])),
        lambda machine, given: list(runs(given, [b""], machine=machine)),
        lambda _, given: Spares(given),
        lambda machine, given: machine.snapshot().diff(given),
        lambda machine, given: machine.restore(given),
        lambda machine, given: machine.reset_to(given),
    ],
)
def test_what_is_no_snapshot(machine: Machine, call: Callable[..., Any], given: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a Snapshot; Snapshot\.load\(path\) reads one"):
        call(machine, given)
