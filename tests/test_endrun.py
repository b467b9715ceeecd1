"""A device that ends the run, served by the C loop."""

from threading import Thread
from time import sleep

import pytest

from kvmpy import Halt, Machine, assemble
from kvmpy.abi import lib
from kvmpy.devices import EndRun

pytestmark = pytest.mark.usefixtures("kvm_host")


@pytest.mark.parametrize("where", ["port", "mmio"])
def test_a_device_that_ends_the_run_does_so_in_c_and_where_exits_are_seen(where: str) -> None:
    address = 0xD0000000
    store = f"mov edi, {address}\nmov [rdi], eax" if where == "mmio" else "out 0x30, eax"
    text = f"mov eax, 1234\n{store}\ninc eax\n{store}\nhlt"
    with Machine("1M") as machine:
        if where == "mmio":
            machine.attach_mmio(address, 4, EndRun())
        else:
            machine.attach_port(0x30, 4, EndRun())
        machine.load(assemble(text, at=0x1000))
        for _ in range(2):
            for value in (1234, 1235):
                result = machine.run(timeout=10)
                assert (result.outcome, result.value) == ("ended", value)
            assert machine.run(timeout=10).outcome == "halt"
            machine.set_entry(0x1000)
        assert len(list(machine.exits(timeout=10))) == 1
        assert len(list(machine.exits(timeout=10))) == 1
        assert list(map(type, machine.exits(timeout=10))) == [Halt]


def test_the_rest_of_a_string_is_served_by_the_next_run() -> None:
    with Machine("1M") as machine:
        machine.attach_port(0x30, 1, EndRun())
        code = assemble("mov esi, 0x2000\nmov ecx, 3\nmov edx, 0x30\nrep outsb\nhlt", at=0x1000)
        machine.load(code)
        machine.memory.write(0x2000, b"\x05\x06\x07")
        assert [machine.run(timeout=10).value for _ in range(3)] == [5, 6, 7]
        assert machine.run(timeout=10).outcome == "halt"


def test_a_run_that_ended_is_finished_before_state_is_written() -> None:
    with Machine("1M") as machine:
        machine.attach_port(0x30, 1, EndRun())
        machine.load(assemble("out 0x30, al\nhlt", at=0x1000))
        assert machine.run(timeout=10).outcome == "ended"
        machine.set_entry(0x1000)
        assert machine.run(timeout=10).outcome == "ended"


def test_the_end_of_one_vcpus_run_ends_the_others() -> None:
    with Machine("1M", cpus=2) as machine:
        machine.attach_port(0x30, 1, EndRun())
        machine.load(assemble("again: cmp byte ptr [0x9000], 0\nje again\nout 0x30, al\nhlt"))
        results = []
        thread = Thread(target=lambda: results.append(machine.run(timeout=20, cpu=1)))
        thread.start()
        while not machine.cpus[1].loop.running:
            sleep(0.001)
        machine.cpus[0].finish()
        code = assemble("out 0x30, al\nhlt", at=0x4000)
        machine.memory.write(0x4000, code)
        registers = machine.cpus[0].get_regs()
        registers.rip = 0x4000
        machine.cpus[0].set_regs(registers)
        assert machine.run(timeout=10).outcome == "ended"
        thread.join()
        assert [one.outcome for one in results] == ["ended"]


def test_an_end_that_python_did_not_see_comes_again() -> None:
    """As when a signal's handler raises between C's return and Python's first line."""
    with Machine("1M") as machine:
        machine.attach_port(0x30, 1, EndRun())
        machine.load(assemble("mov al, 5\nout 0x30, al\nmov al, 6\nout 0x30, al", at=0x1000))
        loop = machine.cpus[0].begin(10)
        try:
            assert lib.kvmpy_run(loop) == lib.KVMPY_ENDED
        finally:
            lib.kvmpy_end(loop)
        lib.kvmpy_unread(loop)
        assert [machine.run(timeout=10).value for _ in range(2)] == [5, 6]


def test_an_end_in_the_midst_of_an_exit_that_is_finished_is_passed_over() -> None:
    """A write across a page's end is split: the other half comes when the first is finished."""
    text = "mov edi, 0xd0000ffc\nmov rax, -1\nmov [rdi], rax\nmov ebx, 3\nhlt"
    with Machine("1M") as machine:
        machine.attach_mmio(0xD0000FFC, 8, EndRun())
        machine.load(assemble(text, at=0x1000))
        first = machine.run(timeout=10)
        assert (first.outcome, first.value) == ("ended", 0xFFFFFFFF)
        machine.cpus[0].finish()
        assert not machine.cpus[0].loop.incomplete
        assert machine.cpus[0].exit_counts()["mmio-write"] == 2
        last = machine.run(timeout=10)
        assert (last.outcome, last.registers.rbx) == ("halt", 3)
