"""KVMPY_AGAIN: an access like the one before is served without looking anything up anew."""

import pytest

from kvmpy import Machine
from kvmpy.abi import lib

pytestmark = pytest.mark.usefixtures("kvm_host")

OUT_LOOP = bytes.fromhex("ba 42 00 00 00  b9 06 00 00 00  ee e2 fd f4")
"""mov edx, 0x42; mov ecx, 6; again: out dx, al; loop again; hlt"""

TURNS = bytes.fromhex("ba 42 00 00 00  b9 03 00 00 00  ee ec 66 ef ff c2 ee ff ca ee e2 f4 f4")
"""mov edx, 0x42; mov ecx, 3; again: out dx, al; in al, dx; out dx, ax; inc edx; out dx, al;
dec edx; out dx, al; loop again; hlt"""

STORES = bytes.fromhex("bb 00 00 00 d0  b9 04 00 00 00  89 0b 83 c3 08 e2 f9 f4")
"""mov ebx, 0xd0000000; mov ecx, 4; again: mov [rbx], ecx; add ebx, 8; loop again; hlt"""


def test_c_says_again_only_of_the_same_kind_of_access() -> None:
    codes: list[int] = []
    with Machine("1M", devices=False) as machine:
        machine.on_port(0x42, 2)(lambda offset, size, value: 0 if value is None else None)
        machine.load(OUT_LOOP)
        loop = machine.cpus[0].begin(max_exits=4)
        try:
            codes += [lib.kvmpy_run(loop) for _ in range(3)]
            loop.handed = 0
            codes += [lib.kvmpy_run(loop) for _ in range(2)]
        finally:
            lib.kvmpy_end(loop)
    full = lib.KVMPY_PORT | lib.KVMPY_WRITE | 0x42
    again = lib.KVMPY_AGAIN
    assert codes == [full, again, again, full, lib.KVMPY_MAX_EXITS]


def test_each_access_reaches_its_own_place_and_size() -> None:
    seen: list[tuple[int, int, bool]] = []
    with Machine("1M", devices=False) as machine:

        @machine.on_port(0x42, 2)
        def watch(offset: int, size: int, value: int | None) -> int | None:
            seen.append((offset, size, value is None))
            return 0x5A if value is None else None

        machine.load(TURNS)
        assert machine.run(timeout=10).outcome == "halt"
    once = [(0, 1, False), (0, 1, True), (0, 2, False), (1, 1, False), (0, 1, False)]
    assert seen == 3 * once


def test_mmio_again_has_an_offset_of_its_own() -> None:
    seen: list[tuple[int, int | None]] = []
    with Machine("1M", devices=False) as machine:
        machine.on_mmio(0xD0000000)(lambda offset, size, value: seen.append((offset, value)))
        machine.load(STORES)
        assert machine.run(timeout=10).outcome == "halt"
    assert seen == [(0, 4), (8, 3), (16, 2), (24, 1)]


def test_a_device_that_is_replaced_gets_no_more_accesses() -> None:
    first: list[int] = []
    second: list[int] = []
    with Machine("1M", devices=False) as machine:

        class Leaving:
            name = "leaving"

            def read(self, offset: int, size: int) -> int:
                return 0

            def write(self, offset: int, size: int, value: int) -> None:
                first.append(value)
                if len(first) == 3:
                    machine.detach(claim)
                    machine.on_port(0x42)(lambda offset, size, value: second.append(value or 0))

        claim = machine.attach_port(0x42, 1, Leaving())
        machine.load(OUT_LOOP)
        assert machine.run(timeout=10).outcome == "halt"
    assert (len(first), len(second)) == (3, 3)


def test_a_device_may_finish_its_exit_in_between() -> None:
    seen: list[int] = []
    with Machine("1M", devices=False) as machine:

        @machine.on_port(0x42)
        def nosy(offset: int, size: int, value: int | None) -> None:
            registers = machine.cpus[0].get_regs()
            seen.append(registers.rcx)
            machine.cpus[0].finish()
            registers = machine.cpus[0].get_regs()
            registers.rbx += 1
            machine.cpus[0].set_regs(registers)

        machine.load(OUT_LOOP)
        result = machine.run(timeout=10)
    assert (result.outcome, seen, result.registers.rbx) == ("halt", [6, 5, 4, 3, 2, 1], 6)


def test_a_second_run_starts_afresh() -> None:
    seen: list[int] = []
    with Machine("1M", devices=False) as machine:
        machine.on_port(0x42)(lambda offset, size, value: seen.append(offset))
        machine.load(OUT_LOOP)
        for _ in range(3):
            assert machine.run(timeout=10, max_exits=2).outcome == "max-exits"
        assert machine.run(timeout=10).outcome == "halt"
    assert len(seen) == 6
