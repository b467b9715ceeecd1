"""The entry states of all modes on real KVM, and what a guest in ring 3 can and cannot do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmpy import KVM
from kvmpy.modes import DEFAULT_LOAD, EXCEPTION_PORT, MODES, Layout, build, entry_state
from kvmpy.x86.exceptions import GuestException, decode_exception

pytestmark = pytest.mark.usefixtures("kvm_host")

MIB = 1 << 20
STARTS = [(mode, 0) for mode in MODES] + [("protected", 3), ("long", 3)]
PUTS_A = bytes.fromhex("b041 e6e9")  # mov al, 'A'; out 0xe9, al


@contextmanager
def started(mode: str, ring: int, code: bytes) -> Iterator[tuple[Layout, Any, Any]]:
    """A layout, its memory and a vCPU that is ready to run `code`."""
    layout = build(mode, ring, MIB)
    with KVM() as kvm, kvm.create_vm() as vm:
        memory = vm.add_memory(0, MIB)
        memory.write(layout.base, layout.data)
        memory.write(DEFAULT_LOAD[mode], code)
        vcpu = vm.create_vcpu()
        registers, special = entry_state(layout, DEFAULT_LOAD[mode], vcpu.get_sregs())
        vcpu.set_sregs(special)
        vcpu.set_regs(registers)
        yield layout, memory, vcpu


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_kvm_takes_the_state_and_runs(mode: str, ring: int) -> None:
    with started(mode, ring, PUTS_A + b"\xf4") as (layout, memory, vcpu):
        found = vcpu.get_sregs()
        _, written = entry_state(layout, DEFAULT_LOAD[mode], found)
        assert found.ldt.unusable == 1
        found.ldt = written.ldt  # what else an unusable register holds differs between backends
        assert found == written
        shown = vcpu.run(timeout=5)
        assert (shown.port, shown.data) == (0xE9, b"A")
        if not ring:
            assert type(vcpu.run(timeout=5)).__name__ == "Halt"
            kvmpys = memory.read(layout.base, MIB - layout.base)
            assert kvmpys == layout.data, "something wrote to kvmpy's area"


def exception_of(mode: str, code: bytes) -> GuestException:
    with started(mode, 3, code) as (layout, memory, vcpu):
        exit_ = vcpu.run(timeout=5)
        assert getattr(exit_, "port", None) == EXCEPTION_PORT, exit_
        registers, special = vcpu.get_regs(), vcpu.get_sregs()
        vector = layout.vector_at(registers.rip)
        assert vector is not None
        stack = memory.read(registers.rsp, 48)
        return decode_exception(vector, stack, special.cr2, 64 if mode == "long" else 32)


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize(
    ("code", "name", "error_code"),
    [("0f0b", "#UD", None), ("f4", "#GP", 0), ("31c9 f7f1", "#DE", None)],
    ids=["ud2", "hlt", "div"],
)
def test_exceptions_in_ring_3_are_reported(
    mode: str, code: str, name: str, error_code: int | None
) -> None:
    instructions = bytes.fromhex(code)
    found = exception_of(mode, instructions)
    assert (found.name, found.error_code) == (name, error_code)
    assert found.rip == DEFAULT_LOAD[mode] + len(instructions) - (1 if name == "#GP" else 2)
    assert found.cs & 3 == 3
    assert found.rsp == build(mode, 3, MIB).stack


def test_ring_3_cannot_write_to_kvmpys_area() -> None:
    target = build("long", 3, MIB).base
    store = b"\xc6\x04\x25" + target.to_bytes(4, "little") + b"\x00"  # mov byte [target], 0
    found = exception_of("long", store)
    assert (found.name, found.error_code, found.address) == ("#PF", 7, target)


def test_int3_is_open_to_ring_3() -> None:
    found = exception_of("long", b"\xcc")
    assert (found.name, found.rip) == ("#BP", DEFAULT_LOAD["long"] + 1)
