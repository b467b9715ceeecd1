"""A pool of machines that are made before they are needed."""

import os
from threading import Thread
from typing import Any

import pytest
from test_reset import INPUT, SUMMING, given_input
from test_snapshot import DATA, attach, code, machine_of

from kvmpy import ClosedError, ConfigError, Machine, Snapshot
from kvmpy.spares import Spares

pytestmark = pytest.mark.usefixtures("kvm_host")


@pytest.fixture
def summing() -> Snapshot:
    with machine_of(code(SUMMING), 0) as machine:
        return machine.snapshot()


def total(machine: Machine, *numbers: int) -> Any:
    machine.memory.write(INPUT, given_input(*numbers))
    return machine.run(timeout=10).value


@pytest.mark.parametrize("scope", ["all", "registers"])
def test_each_machine_is_at_the_snapshot_whoever_had_it_before(
    summing: Snapshot, scope: str
) -> None:
    with Spares(summing, 2, attach, scope=scope) as spares:
        for number in range(6):
            with spares.machine() as machine:
                assert machine.memory.read(DATA, 4) == bytes(4)
                assert total(machine, number, 1) == number + 1
            assert len(spares) == 2


def test_where_none_is_ready_one_is_made_and_the_one_too_many_is_closed(summing: Snapshot) -> None:
    with Spares(summing, 1, attach) as spares:
        one, other = spares.take(), spares.take()
        assert (len(spares), total(one, 1), total(other, 2)) == (0, 1, 2)
        spares.give(one)
        spares.give(other)
        assert len(spares) == 1
        assert sorted([one.vm.closed, other.vm.closed]) == [False, True]


def test_a_machine_that_cannot_be_reset_is_dropped(summing: Snapshot) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Spares(summing, 1, attach) as spares:
        machine = spares.take()
        machine.close()
        spares.give(machine)
        assert len(spares) == 0
        with spares.machine() as machine:
            assert total(machine, 3) == 3
    with pytest.raises(ClosedError):
        spares.take()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the snapshot's view


def test_only_what_was_taken_is_taken_back_and_once(summing: Snapshot) -> None:
    with Spares(summing, 2, attach) as spares, Spares(summing, 1, attach) as others:
        machine, foreign = spares.take(), others.take()
        spares.give(machine)
        for wrong in (machine, foreign, None, "machine"):
            with pytest.raises(ConfigError, match="not out of this pool"):
                spares.give(wrong)
        assert not foreign.vm.closed and len(spares) == 2
        one, other = spares.take(), spares.take()
        assert one is not other
        for back in (one, other):
            spares.give(back)
        others.give(foreign)


def test_one_that_is_out_when_it_is_closed_is_closed_when_it_comes_back(summing: Snapshot) -> None:
    spares = Spares(summing, 1, attach)
    machine = spares.take()
    spares.close()
    assert total(machine, 4) == 4
    spares.give(machine)
    assert machine.vm.closed and repr(spares) == "<0 of 1 machines ready>"


def test_threads_share_it(summing: Snapshot) -> None:
    found: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for step in range(20):
            with spares.machine() as machine:
                found.append((total(machine, number, step), number + step))

    with Spares(summing, 2, attach) as spares:
        threads = [Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 60 and all(one == other for one, other in found)


def test_bad_settings_are_refused(summing: Snapshot) -> None:
    with pytest.raises(ConfigError, match="size=0"):
        Spares(summing, 0)
    with pytest.raises(ConfigError, match="'some'"):
        Spares(summing, 1, attach, scope="some")
