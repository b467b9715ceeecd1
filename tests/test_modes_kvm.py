"""What guests find when they start in each mode, seen from inside, and exceptions in ring 3."""

from typing import Any

import pytest

from kvmpy import AddressError, ConfigError, InternalError, Machine, Result
from kvmpy.x86.exceptions import EXCEPTIONS

pytestmark = pytest.mark.usefixtures("kvm_host")

STARTS = [("real", 0), ("protected16", 0), ("protected", 0), ("protected", 3)]
STARTS += [("long", 0), ("long", 3)]
BITS = {"real": 16, "protected16": 16, "protected": 32, "long": 64}
DEBUG_EXIT = bytes.fromhex("e6f4")  # out 0xf4, al: all modes and rings can do that
BEYOND_4_GIB = (4 << 30) + 0x5000


def run(mode: str, ring: int, code: bytes, memory: Any = "1M", **registers: int) -> Result:
    """Run `code` from the state of the mode, but for the registers that are given."""
    with Machine(memory, mode=mode, ring=ring) as machine:
        machine.load(code)
        cpu = machine.cpus[0]
        state = cpu.get_regs()
        for name, value in registers.items():
            setattr(state, name, value)
        cpu.set_regs(state)
        return machine.run(timeout=10)


# How a guest starts -------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_a_guest_sees_the_registers_it_was_promised(mode: str, ring: int) -> None:
    result = run(mode, ring, DEBUG_EXIT)
    assert result.outcome == "debug-exit"
    left = result.registers.as_dict()
    assert left.pop("rip") in (0x7C00, 0x7C02, 0x1000, 0x1002)
    assert left.pop("rflags") & ~0x10200 == 2  # the IF and RF of ring 3 are the host's affair
    with Machine("1M", mode=mode, ring=ring) as machine:
        assert left.pop("rsp") == machine.layout.stack
        assert machine.layout.stack % 16 == 0
    assert set(left.values()) == {0}


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_operands_are_as_wide_as_the_mode_says(mode: str, ring: int) -> None:
    # 40 (with 48 a REX prefix): inc eax or inc ax, and in 64-bit code a REX prefix itself
    code = bytes.fromhex("b8ffff0000" if BITS[mode] > 16 else "b8ffff") + b"\x40"
    code += bytes.fromhex("fec0") + DEBUG_EXIT  # inc al
    rax = run(mode, ring, code).registers.rax
    assert rax == {16: 0x0001, 32: 0x10001, 64: 0xFF00}[BITS[mode]]


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_the_stack_works(mode: str, ring: int) -> None:
    # mov eax, cs; push eax; xor eax, eax; pop eax (or AX, or RAX); debug exit
    code = bytes.fromhex("8cc8 50 31c0 58") + DEBUG_EXIT
    result = run(mode, ring, code)
    assert result.outcome == "debug-exit"
    with Machine("1M", mode=mode, ring=ring) as machine:
        assert result.registers.rsp == machine.layout.stack
    selectors = {"real": 0, "protected16": 0x48, "protected": 0x18, "long": 0x08}
    user = {"protected": 0x23, "long": 0x33}
    if not ring:
        assert result.registers.rax == selectors[mode]
    elif result.registers.rax != user[mode]:
        pytest.skip("this KVM runs ring 3 with the host's own selectors")


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_all_of_the_guests_ram_is_the_guests(mode: str, ring: int) -> None:
    """It writes to the first byte of its RAM and to the last one below kvmpy's area."""
    last = 0xFFFF if BITS[mode] == 16 else 0
    with Machine("1M", mode=mode, ring=ring) as machine:
        last = last or machine.layout.base - 1
        wide = 2 if BITS[mode] == 16 else 4
        # mov edi, last; mov byte [edi], 0x5a; mov edi, 0; mov byte [edi], 0xa5
        to = b"\xbf"  # mov edi/di
        store = b"\xc6\x05" if wide == 2 else b"\xc6\x07"  # mov byte [di] / [edi] / [rdi]
        code = to + last.to_bytes(wide, "little") + store + b"\x5a"
        code += to + bytes(wide) + store + b"\xa5" + DEBUG_EXIT
        machine.load(code)
        assert machine.run(timeout=10).outcome == "debug-exit"
        assert (machine.memory.read_u8(last), machine.memory.read_u8(0)) == (0x5A, 0xA5)


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_kvmpys_area_survives_a_run(mode: str, ring: int) -> None:
    with Machine("1M", mode=mode, ring=ring) as machine:
        layout = machine.layout
        machine.load(DEBUG_EXIT)
        assert machine.run(timeout=10).outcome == "debug-exit"
        area = machine.memory.read(layout.base, layout.low_ram - layout.base)
        assert area == layout.data.ljust(len(area), b"\0")


@pytest.mark.parametrize("mode", ["real", "protected16", "protected"])
def test_code_beyond_the_mode_is_refused(mode: str) -> None:
    with Machine("16M", mode=mode) as machine:
        end = {"real": 1 << 20, "protected16": 1 << 16}.get(mode)
        if end is None:
            machine.load(DEBUG_EXIT, at=0x80_0000)
        else:
            with pytest.raises(ConfigError, match="address bits"):
                machine.set_entry(end)
            machine.load(DEBUG_EXIT, at=end - 0x10)
        assert machine.run(timeout=10).outcome == "debug-exit"


def test_real_mode_starts_anywhere_in_its_megabyte() -> None:
    for at in (0x500, 0x7C00, 0xFFF0, 0x1_0000, 0x1_2345, 0x9_0001):
        with Machine("1M", mode="real") as machine:
            # call next; next: pop ax; debug exit: AX is the offset within the code segment
            machine.load(bytes.fromhex("e80000 58") + DEBUG_EXIT, at=at)
            result = machine.run(timeout=10)
            assert result.outcome == "debug-exit"
            base = machine.cpus[0].get_sregs().cs.base
            assert (base + result.registers.rax) & 0xFFFFF == at + 3


# Ring 3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("port", [0, 1, 0x10, 0x3F8, 0xABC, 0xFFFC, 0xFFFF])
def test_all_ports_are_open_in_ring_3(mode: str, port: int) -> None:
    # mov edx, port; mov eax, 0x5a; out dx, al; in al, dx; debug exit
    code = b"\xba" + port.to_bytes(4, "little") + bytes.fromhex("b85a000000 ee ec") + DEBUG_EXIT
    seen: list[tuple[int, int | None]] = []
    with Machine("1M", mode=mode, ring=3, devices=False) as machine:

        @machine.on_port(port)
        def device(offset: int, size: int, value: int | None) -> int:
            seen.append((size, value))
            return 0x77

        @machine.on_port(0xF4)
        def last(offset: int, size: int, value: int | None) -> None:
            machine.stop()

        machine.load(code)
        result = machine.run(timeout=10)
        assert result.outcome == "stopped", result
    assert seen == [(1, 0x5A), (1, None)]
    assert result.registers.rax == 0x77


DIVIDE = bytes.fromhex("31c9 f7f1")  # xor ecx, ecx; div ecx
LOAD = bytes.fromhex("8a07")  # mov al, [rdi]
STORE = bytes.fromhex("8807")  # mov [rdi], al
FAULTS: dict[str, tuple[bytes, dict[str, int], str, int | None, int | None, int]] = {
    "divide": (DIVIDE, {}, "#DE", None, None, 2),
    "ud2": (b"\x0f\x0b", {}, "#UD", None, None, 0),
    "hlt": (b"\xf4", {}, "#GP", 0, None, 0),
    "cli": (b"\xfa", {}, "#GP", 0, None, 0),
    "mov to cr3": (b"\x0f\x22\xd8", {}, "#GP", 0, None, 0),
    "int3": (b"\xcc", {}, "#BP", None, None, 1),
    "load of nothing": (LOAD, {"rdi": 0x7F00_0000_1000}, "#PF", 4, 0x7F00_0000_1000, 0),
    "store to nothing": (STORE, {"rdi": 0x7F00_0000_1008}, "#PF", 6, 0x7F00_0000_1008, 0),
    "non-canonical": (LOAD, {"rdi": 1 << 63}, "#GP", 0, None, 0),
    "non-canonical stack": (b"\x50", {"rsp": 1 << 63}, "#SS", 0, None, 0),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_an_exception_in_long_mode_is_an_outcome(fault: str) -> None:
    code, registers, name, error_code, address, ahead = FAULTS[fault]
    result = run("long", 3, code, **registers)
    assert result.outcome == "exception", result
    assert result.crashed
    exception = result.exception
    assert exception is not None
    assert (exception.name, exception.error_code, exception.address) == (name, error_code, address)
    assert exception.vector == next(v for v, known in EXCEPTIONS.items() if known[0] == name)
    assert exception.rip == 0x1000 + ahead == result.registers.rip
    assert exception.cs & 3 == exception.ss & 3 == 3
    for word in (name, EXCEPTIONS[exception.vector][1], f"{exception.rip:#x}"):
        assert word in result.detail
    if address is not None:
        assert f"{address:#x}" in result.detail
    assert str(result).startswith("exception: ")


@pytest.mark.parametrize("fault", ["divide", "ud2", "hlt", "cli", "int3"])
def test_an_exception_in_protected_mode_is_an_outcome(fault: str) -> None:
    code, _, name, error_code, _, ahead = FAULTS[fault]
    result = run("protected", 3, code)
    lacking = isinstance(result.exit, InternalError)
    if result.exception is not None and fault == "int3":
        lacking = result.exception.name == "#UD"
    if lacking:
        pytest.skip(f"this KVM's emulator lacks the instruction {code.hex()} in protected mode")
    assert result.outcome == "exception", result
    assert result.exception is not None
    assert (result.exception.name, result.exception.error_code) == (name, error_code)
    assert result.exception.rip == 0x1000 + ahead
    assert result.exception.address is None


@pytest.mark.parametrize("write", [False, True])
def test_kvmpys_area_is_closed_to_ring_3(write: bool) -> None:
    with Machine("1M", ring=3) as machine:
        layout = machine.layout
        places = (layout.base, layout.gdt, layout.idt, layout.tss, layout.low_ram - 1)
    for place in places:
        assert place is not None
        result = run("long", 3, STORE if write else LOAD, rdi=place)
        assert result.exception is not None, result
        found = (result.exception.name, result.exception.error_code, result.exception.address)
        assert found == ("#PF", 7 if write else 5, place)


def test_an_exception_is_reported_again_after_a_new_start() -> None:
    with Machine("1M", ring=3) as machine:
        machine.load(DIVIDE)
        machine.load(b"\x0f\x0b", at=0x2000)
        for at, name in ((0x1000, "#DE"), (0x2000, "#UD"), (0x1000, "#DE")):
            machine.set_entry(at)
            exception = machine.run(timeout=10).exception
            assert exception is not None
            assert exception.name == name
        # Without a new start the stub halts, and says no more.
        assert machine.run(timeout=10).outcome == "halt"


def test_an_exception_on_a_bad_stack_does_not_matter() -> None:
    """The processor changes to kvmpy's stack, whatever the guest made of its own."""
    result = run("long", 3, b"\x0f\x0b", rsp=0xDEAD_0000_0000)
    assert result.exception is not None
    assert (result.exception.name, result.exception.rsp) == ("#UD", 0xDEAD_0000_0000)


def test_the_watching_path_ends_at_an_exception() -> None:
    with Machine("1M", ring=3) as machine:
        machine.load(DIVIDE)
        shown = list(machine.exits(timeout=10))
        assert [getattr(exit_, "port", None) for exit_ in shown] == [0xF1]


@pytest.mark.parametrize(("mode", "ring"), [("real", 0), ("protected", 0), ("long", 0)])
def test_an_exception_in_ring_0_is_the_guests_own_affair(mode: str, ring: int) -> None:
    if mode == "real":  # through the vector table at 0: there a guest finds its handler
        with Machine("64K", mode="real") as machine:
            machine.load(b"\x0f\x0b")
            machine.memory.write_u16(6 * 4, 0x500)
            machine.memory.write(0x500, DEBUG_EXIT)
            assert machine.run(timeout=10).outcome == "debug-exit"
    else:
        assert run(mode, ring, b"\x0f\x0b").outcome == "shutdown"


# Memory sizes -------------------------------------------------------------------------------


def least_memory(mode: str, ring: int) -> int:
    for pages in range(1, 1024):
        try:
            Machine(pages * 4096, mode=mode, ring=ring).close()
            return pages * 4096
        except ConfigError as error:
            assert "needs at least" in str(error)
    raise AssertionError("no size of up to 4 MiB is enough")


@pytest.mark.parametrize(("mode", "ring"), STARTS)
def test_the_least_memory_is_enough(mode: str, ring: int) -> None:
    size = least_memory(mode, ring)
    assert size <= 128 << 10
    with Machine(size, mode=mode, ring=ring) as machine:
        machine.load(DEBUG_EXIT, at=0x800)
        assert machine.run(timeout=10).outcome == "debug-exit"
        if mode != "real":
            with pytest.raises(AddressError, match="does not fit"):
                machine.load(bytes(size))


@pytest.mark.parametrize("size", ["64K", "640K", "2M", "3M", "16M", "1G", "3G"])
@pytest.mark.parametrize("ring", [0, 3])
def test_long_mode_reaches_the_end_of_its_ram(ring: int, size: str) -> None:
    with Machine(size, ring=ring) as machine:
        last = machine.layout.base - 1
        machine.load(STORE + DEBUG_EXIT)
        cpu = machine.cpus[0]
        state = cpu.get_regs()
        state.rdi, state.rax = last, 0x77
        cpu.set_regs(state)
        assert machine.run(timeout=10).value == 0x77
        assert machine.memory.read_u8(last) == 0x77


@pytest.mark.parametrize("ring", [0, 3])
def test_more_than_3_gib_go_on_at_4_gib(ring: int) -> None:
    with Machine("5G", ring=ring) as machine:
        last = (6 << 30) - 1
        assert [(ram.address, ram.end) for ram in machine.memory] == [
            (0, 3 << 30),
            (4 << 30, 6 << 30),
        ]
        # mov [rdi], al; mov [rsi], al; mov al, [rdx] (nobody's, between the two); debug exit
        machine.load(bytes.fromhex("8807 8806 8a02") + DEBUG_EXIT)
        machine.load(b"far away", at=BEYOND_4_GIB + 0x100)
        cpu = machine.cpus[0]
        state = cpu.get_regs()
        state.rax, state.rdi, state.rsi, state.rdx = 0x5A, BEYOND_4_GIB, last, 3 << 30
        cpu.set_regs(state)
        result = machine.run(timeout=10)
        assert (result.outcome, result.value) == ("debug-exit", 0xFF)
        assert machine.memory.read_u8(BEYOND_4_GIB) == machine.memory.read_u8(last) == 0x5A
        assert machine.memory.read(BEYOND_4_GIB + 0x100, 8) == b"far away"
        assert result.unclaimed == ("MMIO 0xc0000000: 1 read",)
        with pytest.raises(AddressError):
            machine.load(b"\xf4", at=3 << 30)
        with pytest.raises(AddressError):
            machine.load(bytes(2), at=last)


@pytest.mark.parametrize("ring", [0, 3])
def test_code_runs_beyond_4_gib(ring: int) -> None:
    with Machine("4G", ring=ring) as machine:
        machine.load(bytes.fromhex("b02b") + DEBUG_EXIT, at=BEYOND_4_GIB)
        result = machine.run(timeout=10)
        assert (result.outcome, result.value) == ("debug-exit", 0x2B)
        assert machine.entry == BEYOND_4_GIB
