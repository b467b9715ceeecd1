"""Machine: loading, outcomes, devices, what is refused, and the posted console."""

import errno
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from kvmpy import (
    KVM,
    AddressError,
    ClosedError,
    ConfigError,
    DeviceError,
    Halt,
    HostError,
    Interrupted,
    Machine,
    OverlapError,
    PortIn,
    PortOut,
    Shutdown,
    UnsupportedError,
    assemble,
)
from kvmpy.bus import Claim, Device
from kvmpy.devices.native import Capture, Constant, Counter, Sink
from kvmpy.result import OUTCOMES

HALT = b"\xf4"
SPIN = b"\xeb\xfe"
WRITE_FOREVER = bytes.fromhex("e610 fec0 ebfa")  # again: out 0x10, al; inc al; jmp again
READ_FOREVER = bytes.fromhex("e410 ebfc")  # again: in al, 0x10; jmp again
MMIO = 0x20000  # beyond the 64 KiB of RAM; real mode reaches it by DS = 0x2000
READ_MMIO = bytes.fromhex("b80020 8ed8 a10400 f4")  # mov ax, 0x2000; mov ds, ax; mov ax, [4]; hlt


def real(code: bytes, **options: Any) -> Machine:
    machine = Machine("64K", mode="real", **options)
    machine.load(code)
    return machine


def long(code: bytes, **options: Any) -> Machine:
    machine = Machine("1M", mode="long", **options)
    machine.load(code)
    return machine


# Outcomes -----------------------------------------------------------------------------------

LONG_GUESTS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "halt": (HALT, {}),
    "reset": (bytes.fromhex("b0fe e664 f4"), {}),  # mov al, 0xfe; out 0x64, al
    # mov dx, 0x604; mov ax, 0x2000; out dx, ax
    "power-off": (bytes.fromhex("66ba0406 66b80020 66ef f4"), {}),
    "debug-exit": (bytes.fromhex("b02a e6f4 f4"), {}),  # mov al, 42; out 0xf4, al
    "shutdown": (bytes.fromhex("0f0b"), {}),  # ud2 without an IDT
    "unclaimed": (bytes.fromhex("e699 f4"), {"strict": True}),  # out 0x99, al
    "exception": (bytes.fromhex("0f0b"), {"ring": 3}),  # ud2
    "timeout": (SPIN, {}),
    "max-exits": (bytes.fromhex("e680 ebfc"), {}),  # again: out 0x80, al; jmp again
    "stopped": (SPIN, {}),
    # mov eax, 0xd0000000; jmp rax: there is nothing to fetch
    "internal-error": (bytes.fromhex("b8000000d0 ffe0"), {}),
}


def provoke(outcome: str) -> tuple[Machine, Any]:
    code, options = LONG_GUESTS[outcome]
    machine = long(code, **options)
    with machine:
        if outcome == "stopped":
            machine.stop()
        timeout = 0.02 if outcome == "timeout" else 10
        return machine, machine.run(timeout, max_exits=3 if outcome == "max-exits" else None)


@pytest.mark.parametrize("outcome", sorted(LONG_GUESTS))
def test_every_outcome_has_a_guest(kvm_host: None, outcome: str) -> None:
    _, result = provoke(outcome)
    assert result.outcome == outcome
    assert result.seconds > 0
    assert str(result).startswith(f"{outcome}: {OUTCOMES[outcome]}")
    crashes = {"shutdown", "internal-error", "unclaimed", "exception"}
    assert result.crashed == (outcome in crashes)
    assert result.value == (42 if outcome == "debug-exit" else None)
    assert (result.exception is not None) == (outcome == "exception")
    assert sum(result.exits.values()) == {"timeout": 0, "stopped": 0, "max-exits": 3}.get(
        outcome, 1
    )


def test_all_outcomes_are_provoked_but_one(kvm_host: None) -> None:
    """A processor's refusal to enter, and the ends by a device, have tests of their own."""
    assert set(OUTCOMES) == {*LONG_GUESTS, "fail-entry", "ended", "ready", "crash"}


def test_a_state_that_the_processor_refuses(kvm_host: None) -> None:
    """VMX checks the guest's state at each entry (SDM Vol.3 27.3); not every KVM does."""
    with long(HALT) as machine:
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.tr.type = 3  # a busy 16-bit TSS: not for long mode
        try:
            cpu.set_sregs(special)
            result = machine.run(timeout=5)
        except ConfigError:
            pytest.skip("this KVM refuses the state before it enters the guest")
    if result.outcome != "fail-entry":
        pytest.skip(f"this KVM enters the guest in any state: {result.outcome}")
    assert result.crashed
    assert "hardware reason 0x" in result.detail


def test_the_first_outcome_counts(kvm_host: None) -> None:
    # out 0xf4, al (42), by way of a string of two: the second does not change the outcome
    code = bytes.fromhex("fc be007c b90200 baf400 f36e f4")
    with real(code) as machine:
        result = machine.run(timeout=5)
        assert (result.outcome, result.value) == ("debug-exit", code[0])


def test_a_halted_guest_goes_on_after_its_halt(kvm_host: None) -> None:
    with real(bytes.fromhex("f4 40 ebfc")) as machine:  # again: hlt; inc ax; jmp again
        for turn in range(4):
            result = machine.run(timeout=5)
            assert (result.outcome, result.registers.rax) == ("halt", turn)


def test_a_run_counts_only_its_own_exits(kvm_host: None) -> None:
    with real(bytes.fromhex("e680 e680 f4 e680 f4")) as machine:
        assert machine.run(timeout=5).exits == {"port-out": 2, "halt": 1}
        assert machine.run(timeout=5).exits == {"port-out": 1, "halt": 1}
        assert machine.cpus[0].exit_counts() == {"port-out": 3, "halt": 2}


def test_an_exception_tells_its_registers_where_it_happened(kvm_host: None) -> None:
    _, result = provoke("exception")
    assert result.exception is not None
    assert result.registers.rip == result.exception.rip == 0x1000


@pytest.mark.parametrize("limit", [0, -1, 1 << 64])
def test_a_limit_of_exits_out_of_range_is_refused(kvm_host: None, limit: int) -> None:
    with real(HALT) as machine:
        with pytest.raises(ConfigError, match="max_exits"):
            machine.run(max_exits=limit)
        with pytest.raises(ConfigError, match="max_exits"):
            list(machine.exits(max_exits=limit))
        assert machine.run(timeout=5, max_exits=1).outcome == "halt"


# Unclaimed accesses -------------------------------------------------------------------------


def test_unclaimed_reads_are_ones_and_writes_are_dropped(kvm_host: None) -> None:
    # in eax, 0x98; mov [0x1000], eax; out 0x99, al; mov ds, 0x2000; mov eax, [4]; mov [8], eax
    code = bytes.fromhex("66e598 66a30010 e699 bb0020 8edb 66a10400 66a30800 f4")
    with real(code) as machine:
        result = machine.run(timeout=5)
        assert machine.memory.read_u32(0x1000) == 0xFFFF_FFFF
        assert result.registers.rax == 0xFFFF_FFFF
    assert result.outcome == "halt"
    assert result.unclaimed == (
        "port 0x98: 1 read",
        "port 0x99: 1 write",
        "MMIO 0x20004: 1 read",
        "MMIO 0x20008: 1 write",
    )


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("66e598", "4-byte read at port 0x98"),
        ("b007 e699", "1-byte write of 0x7 at port 0x99"),
        ("bb0020 8edb 66a10400", "4-byte read at MMIO 0x20004"),
        ("bb0020 8edb b80700 a30400", "2-byte write of 0x7 at MMIO 0x20004"),
    ],
)
def test_strict_ends_at_an_unclaimed_access(kvm_host: None, code: str, what: str) -> None:
    with real(bytes.fromhex(code) + WRITE_FOREVER, strict=True) as machine:
        result = machine.run(timeout=5)
        assert result.outcome == "unclaimed"
        assert result.crashed
        assert result.detail == f"{what}, which no device claims"
        assert len(result.exits) == 1


def test_strict_lets_claimed_accesses_through(kvm_host: None) -> None:
    with real(bytes.fromhex("e680 b0fe e664 f4"), strict=True) as machine:
        assert machine.run(timeout=5).outcome == "reset"


# Devices ------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("code", [WRITE_FOREVER, READ_FOREVER], ids=["write", "read"])
def test_a_devices_exception_reaches_the_caller(kvm_host: None, code: bytes, watched: bool) -> None:
    calls = 0

    def unhappy_device(offset: int, size: int, value: int | None) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OwnError(calls)
        return 0

    with real(code) as machine:
        machine.on_port(0x10)(unhappy_device)

        def run() -> object:
            return list(machine.exits(timeout=5)) if watched else machine.run(timeout=5)

        for turn in range(1, 5):
            with pytest.raises(OwnError) as caught:
                run()
            assert caught.value.args == (3 * turn,)
            assert calls == 3 * turn  # the guest goes on after the access, once
            kind = "write" if code is WRITE_FOREVER else "read"
            assert caught.value.__notes__ == [
                f"raised by device unhappy_device, serving a 1-byte {kind} at port 0x10"
            ]
            frames = traceback.extract_tb(caught.value.__traceback__)
            assert frames[-1].name == "unhappy_device"
        calls = 0
        assert machine.run(timeout=5, max_exits=2).outcome == "max-exits"


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "answer", [None, "x", b"\0", 1.0, 0.5, float("nan"), -1, 256, 1 << 64, [], object()], ids=repr
)
@pytest.mark.parametrize("where", ["port", "mmio"])
def test_an_answer_that_is_none_ends_the_run(
    kvm_host: None, where: str, answer: object, watched: bool
) -> None:
    class Odd:
        name = "odd one"

        def read(self, offset: int, size: int) -> Any:
            return answer

        def write(self, offset: int, size: int, value: int) -> None:
            pass

    # in al, 0x10 / mov ds, 0x2000; mov al, [4]
    code = bytes.fromhex("e410 f4" if where == "port" else "bb0020 8edb a00400 f4")
    with real(code) as machine:
        if where == "port":
            machine.attach_port(0x10, 1, Odd())
        else:
            machine.attach_mmio(MMIO, 8, Odd())
        with pytest.raises(DeviceError) as caught:
            list(machine.exits(timeout=5)) if watched else machine.run(timeout=5)
        message = str(caught.value)
        assert "odd one" in message
        assert "1-byte read" in message
        assert ("0x10" if where == "port" else "0x20004") in message
        result = machine.run(timeout=5)  # the read has given all ones
        assert result.outcome == "halt"
        assert result.registers.rax & 0xFF == 0xFF


def test_functions_are_devices(kvm_host: None) -> None:
    seen: list[tuple[str, int, int, int | None]] = []
    # mov dx, 0x301; out dx, ax; in al, dx; mov bx, 0x2000; mov ds, bx; mov [0x10], ax;
    # mov eax, [0x20]; hlt
    code = bytes.fromhex("ba0103 b83412 ef ec bb0020 8edb a31000 66a12000 f4")
    with real(code) as machine:

        @machine.on_port(0x300, 4)
        def port(offset: int, size: int, value: int | None) -> int:
            seen.append(("port", offset, size, value))
            return 0x77

        @machine.on_mmio(MMIO)
        def mmio(offset: int, size: int, value: int | None) -> int:
            seen.append(("mmio", offset, size, value))
            return 0xCAFE_F00D

        assert callable(port)
        assert callable(mmio)
        assert machine.run(timeout=5).registers.rax == 0xCAFE_F00D
    assert seen == [
        ("port", 1, 2, 0x1234),
        ("port", 1, 1, None),
        ("mmio", 0x10, 2, 0x1277),
        ("mmio", 0x20, 4, None),
    ]


def test_overlaps_name_both_owners(kvm_host: None) -> None:
    with real(HALT) as machine:
        with pytest.raises(OverlapError, match=r"0x3fd of mine .* of (16550A|serial)"):
            machine.attach_port(0x3FD, 1, Sink(), "mine")
        machine.attach_mmio(MMIO, 0x1000, Sink(), "yours")
        with pytest.raises(OverlapError, match=r"mine .*yours"):
            machine.attach_mmio(MMIO + 0xFFF, 1, Sink(), "mine")
        with pytest.raises(OverlapError, match=r"mine overlaps the RAM at \[0x0, 0x10000\)"):
            machine.attach_mmio(0xFFFF, 2, Sink(), "mine")
        with pytest.raises(AddressError, match="outside of the bus"):
            machine.attach_port(0xFFFF, 2, Sink())
        assert machine.run(timeout=5).outcome == "halt"


def test_a_device_attaches_and_detaches_while_the_guest_runs(kvm_host: None) -> None:
    """Each write to port 0x10 changes who answers at 0x11: nobody, C, Python, nobody ..."""
    # mov di, 0x1000; mov cx, 9; again: out 0x10, al; in al, 0x11; stosb; loop again; hlt
    code = bytes.fromhex("fc bf0010 b90900 e610 e411 aa e2f9 f4")
    constant = Constant(0x5C)
    with real(code) as machine:
        claims: list[Claim] = []
        turn = 0

        @machine.on_port(0x10)
        def changer(offset: int, size: int, value: int | None) -> None:
            nonlocal turn
            while claims:
                machine.detach(claims.pop())
            if turn % 3:
                device: Device = constant if turn % 3 == 1 else FixedDevice()
                claims.append(machine.attach_port(0x11, 1, device))
                claims.append(machine.attach_mmio(MMIO - 0x1000 * (turn + 1) % 0x8000, 1, Sink()))
            turn += 1

        assert machine.run(timeout=5).outcome == "halt"
        assert machine.memory.read(0x1000, 9) == bytes([0xFF, 0x5C, 0x9A] * 3)


class FixedDevice:
    name = "fixed"

    def read(self, offset: int, size: int) -> int:
        return 0x9A

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def test_a_device_may_detach_itself(kvm_host: None) -> None:
    with real(WRITE_FOREVER) as machine:
        claims: list[Claim] = []

        def once(offset: int, size: int, value: int | None) -> int:
            machine.detach(claims.pop())
            return 0

        claims.append(machine.attach_port(0x10, 1, make_device(once)))
        result = machine.run(timeout=5, max_exits=10)
        assert not claims
        assert result.unclaimed == ("port 0x10: 9 writes",)


def make_device(function: Callable[[int, int, int | None], int]) -> Any:
    class Made:
        name = "made"

        def read(self, offset: int, size: int) -> int:
            return function(offset, size, None)

        def write(self, offset: int, size: int, value: int) -> None:
            function(offset, size, value)

    return Made()


def test_detaching_what_is_not_attached_is_refused(kvm_host: None) -> None:
    with real(HALT) as machine, real(HALT) as other:
        claim = machine.attach_port(0x10, 1, Sink())
        with pytest.raises(AddressError, match="nothing to detach"):
            other.detach(claim)
        machine.detach(claim)
        with pytest.raises(AddressError, match="nothing to detach"):
            machine.detach(claim)
        high = machine.attach_mmio(MMIO, 1, Sink())
        machine.detach(high)


def test_a_machine_without_devices_has_none(kvm_host: None) -> None:
    with real(bytes.fromhex("e6e9 e6f4 f4"), devices=False) as machine:
        assert machine.devices == {}
        assert len(machine.dispatch.ports) == 0
        assert machine.run(timeout=5).unclaimed == ("port 0xe9: 1 write", "port 0xf4: 1 write")


# The teaching path --------------------------------------------------------------------------


def test_exits_are_values_to_match(kvm_host: None) -> None:
    code = bytes.fromhex("b041 e6e9 e5e9 f4")  # mov al, 'A'; out 0xe9, al; in ax, 0xe9; hlt
    with real(code) as machine:
        assert list(machine.exits(timeout=5)) == [PortOut(0xE9, 1, b"A"), PortIn(0xE9, 2), Halt()]
        assert machine.console == b"A"
        assert machine.cpus[0].get_regs().rax == 0xFFE9


def test_watching_can_end_at_any_exit(kvm_host: None) -> None:
    with real(WRITE_FOREVER) as machine:
        counter = Counter()
        machine.attach_port(0x10, 1, counter)
        for exit_ in machine.exits(timeout=5):
            assert isinstance(exit_, PortOut)
            if exit_.data == b"\x05":
                break
        assert counter.count == 6
        assert machine.run(timeout=5, max_exits=4).exits == {"port-out": 4}
        assert next(machine.exits(timeout=5)) == PortOut(0x10, 1, b"\x0a")
        assert counter.count == 11


@pytest.mark.parametrize("outcome", ["reset", "power-off", "debug-exit", "unclaimed"])
def test_watching_ends_where_a_run_would(kvm_host: None, outcome: str) -> None:
    code, options = LONG_GUESTS[outcome]
    with long(code, **options) as machine:
        assert [type(exit_) for exit_ in machine.exits(timeout=5)] == [PortOut]
        assert machine.run(timeout=5).outcome == "halt"


def test_watching_ends_with_a_crash(kvm_host: None) -> None:
    with long(bytes.fromhex("0f0b")) as machine:
        assert list(machine.exits(timeout=5)) == [Shutdown()]


# Loading ------------------------------------------------------------------------------------


def test_the_first_load_sets_the_entry(kvm_host: None) -> None:
    with Machine("1M") as machine:
        with pytest.raises(ConfigError, match="nothing is loaded"):
            machine.run(timeout=5)
        with pytest.raises(ConfigError, match="nothing is loaded"):
            next(machine.exits(timeout=5))
        machine.load(HALT)
        machine.load(SPIN, at=0x3000)
        assert machine.entry == 0x1000
        assert machine.run(timeout=5).registers.rip == 0x1001
        machine.load(HALT, at=0x5000, entry=0x5000)
        assert machine.run(timeout=5).registers.rip == 0x5001


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_are_loaded(kvm_host: None, kind: Callable[[bytes], Any]) -> None:
    with Machine("64K", mode="real") as machine:
        machine.load(kind(b"\x90\xf4"))
        assert machine.memory[0x7C00:0x7C02] == b"\x90\xf4"
        assert machine.run(timeout=5).outcome == "halt"


def test_a_view_of_wider_items_is_measured_in_bytes(kvm_host: None) -> None:
    with Machine("1M") as machine:
        base = machine.layout.base
        items = memoryview(bytes(64)).cast("Q")
        with pytest.raises(AddressError, match="64 bytes"):
            machine.load(items, at=base - 32)
        machine.load(items, at=base - 64)


def test_a_load_over_kvmpys_own_tables_is_refused(kvm_host: None) -> None:
    with Machine("1M") as machine:
        base = machine.layout.base
        before = machine.memory.read(base, 0x100000 - base)
        for at, size in ((base, 1), (base - 1, 2), (0xFFFFF, 1), (0, 0x100000), (base + 64, 8)):
            with pytest.raises(AddressError) as caught:
                machine.load(bytes(size), at=at)
            assert f"{base:#x}" in str(caught.value)
        assert machine.memory.read(base, 0x100000 - base) == before
        assert machine.entry is None
        machine.load(HALT, at=base - 1)
        assert machine.run(timeout=5).outcome == "halt"


@pytest.mark.parametrize(("at", "size"), [(0x10000, 1), (0xFFFF, 2), (-1, 1), (1 << 64, 1)])
def test_a_load_outside_of_ram_is_refused(kvm_host: None, at: int, size: int) -> None:
    with Machine("64K", mode="real") as machine:
        with pytest.raises(AddressError):
            machine.load(bytes(size), at=at)
        assert machine.entry is None


@pytest.mark.parametrize("entry", [-1, 0x100000, 1 << 40, 1 << 63, 1 << 70])
def test_an_entry_outside_of_ram_is_refused(kvm_host: None, entry: int) -> None:
    with Machine("1M") as machine:
        with pytest.raises(AddressError):
            machine.set_entry(entry)
        with pytest.raises(AddressError):
            machine.load(HALT, entry=entry)
        machine.set_entry(0x1000)
        machine.memory.write(0x1000, HALT)
        assert machine.run(timeout=5).outcome == "halt"


# Options and lifetime -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"memory": 0},
        {"memory": -4096},
        {"memory": 4097},
        {"memory": "x"},
        {"memory": "1E"},
        {"memory": 4096},
        {"mode": "virtual"},
        {"ring": 1},
        {"mode": "real", "ring": 3},
        {"cpus": 0},
        {"cpus": -1},
        {"irqchip": "half"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(kvm_host: None, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Machine(**options)
    assert "\n" not in str(caught.value)


def test_there_is_no_vcpu_of_a_number_out_of_range(kvm_host: None) -> None:
    with long(HALT, cpus=2) as machine:
        for number in (2, -1):
            with pytest.raises(ConfigError, match=f"no vCPU {number}"):
                machine.run(cpu=number)


def test_cpuid_says_which_vcpu_it_is_asked_on(kvm_host: None) -> None:
    """And not which of the host's CPUs the process was on."""
    guest = assemble("mov eax, 1; cpuid; mov eax, ebx; out 0xf4, eax", at=0x1000)
    with Machine("1M", cpus=3) as machine:
        machine.load(guest)
        first = machine.cpus[0]
        regs, sregs = first.get_regs(), first.get_sregs()
        regs.rip = 0x1000
        for number, cpu in enumerate(machine.cpus):
            for leaf in cpu.get_cpuid2():
                if leaf.function in (0xB, 0x1F):
                    assert leaf.edx == number
            cpu.set_sregs(sregs)
            cpu.set_regs(regs)
            ended = machine.run(timeout=10, cpu=number)
            assert isinstance(ended.value, int) and ended.value >> 24 == number


def test_a_closed_machine_says_so(kvm_host: None) -> None:
    machine = real(HALT)
    vcpu = machine.cpus[0]
    machine.close()
    machine.close()
    machine.stop()
    for use in (
        machine.run,
        lambda: list(machine.exits()),
        machine.__enter__,
        vcpu.run,
        vcpu.get_regs,
        lambda: machine.load(HALT),
        lambda: machine.load(HALT, 1 << 40),
        lambda: machine.set_entry(0),
        lambda: machine.memory.read(0, 1),
        lambda: machine.memory.write(0x1000, b"x"),
        lambda: machine.memory[0],
        lambda: machine.memory.view,
        lambda: machine.on_port(0x30)(lambda offset, size, value: 1),
        lambda: machine.on_mmio(0x8000_0000)(lambda offset, size, value: 1),
        machine.snapshot,
        machine.fork,
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_a_machine_with_a_live_view_stays_open(kvm_host: None) -> None:
    machine = real(HALT)
    view = machine.memory.view
    with pytest.raises(BufferError, match="live views"):
        machine.close()
    assert machine.run(timeout=5).outcome == "halt"
    view.release()
    machine.close()


def test_an_exception_under_way_is_not_hidden(kvm_host: None) -> None:
    with pytest.raises(OwnError), real(HALT) as machine:
        view = machine.memory.view
        raise OwnError
    assert machine.vm.closed
    view.release()


def test_the_least_host_error_names_the_cure(kvm_host: None) -> None:
    with KVM() as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        with pytest.raises(HostError) as caught:
            vcpu.run(timeout=1)
        if caught.value.errno != errno.ENOSPC:
            pytest.skip(f"this KVM says otherwise: {caught.value}")
        assert "add_memory() first" in str(caught.value)


# The posted console -------------------------------------------------------------------------


@pytest.fixture
def posted(kvm_host: None) -> dict[str, Any]:
    with KVM() as kvm:
        try:
            kvm.require("COALESCED_PIO")
        except UnsupportedError as error:
            pytest.skip(str(error))
    return {"posted_console": True}


def writes(count: int) -> bytes:
    """A guest that writes the low byte of CX to the console, for CX from `count` down to 1."""
    loop = bytes.fromhex("88c8 e6e9 e2fa f4")  # again: mov al, cl; out 0xe9, al; loop again; hlt
    return b"\xb9" + count.to_bytes(2, "little") + loop


@pytest.mark.parametrize("count", [1, 100, 168, 169, 170, 171, 400, 5000])
def test_a_posted_console_has_the_same_bytes(posted: dict[str, Any], count: int) -> None:
    """The ring of one page holds 169 writes: more wrap round in it."""
    got = []
    for options in ({}, posted):
        pieces: list[bytes] = []
        with real(writes(count), output=pieces.append, **options) as machine:
            result = machine.run(timeout=30)
            assert result.outcome == "halt"
            assert machine.console == b"".join(pieces)
            got.append((machine.console, sum(result.exits.values())))
    (plain, plain_exits), (collected, few_exits) = got
    assert collected == plain == bytes(n % 256 for n in range(count, 0, -1))
    assert plain_exits == count + 1
    if count > 1:
        assert few_exits < plain_exits


def test_a_posted_console_keeps_its_place_among_other_accesses(posted: dict[str, Any]) -> None:
    # mov cx, 600; again: mov al, cl; out 0xe9, al; out 0xe9, al; in al, 0x10;
    # mov al, cl; test al, 15; jnz next; out 0x11, al; next: loop again; hlt
    code = bytes.fromhex("b95802 88c8 e6e9 e6e9 e410 88c8 a80f 7502 e611 e2f0 f4")
    traces = []
    for options in ({}, posted):
        trace: list[tuple[str, int]] = []

        def note(
            kind: str, trace: list[tuple[str, int]] = trace
        ) -> Callable[[int, int, int | None], int]:
            def device(offset: int, size: int, value: int | None) -> int:
                trace.append((kind, -1 if value is None else value))
                return 0

            return device

        def output(data: bytes, trace: list[tuple[str, int]] = trace) -> None:
            trace.extend(("console", byte) for byte in data)

        with real(code, output=output, **options) as machine:
            machine.on_port(0x10)(note("read"))
            machine.on_port(0x11)(note("write"))
            assert machine.run(timeout=30).outcome == "halt"
        traces.append(trace)
    assert traces[0] == traces[1]
    assert len(traces[0]) == 600 * 3 + 600 // 16


def test_a_posted_console_keeps_its_place_when_devices_are_cs(posted: dict[str, Any]) -> None:
    """An access that C serves goes through its device in the guest's order, too."""
    code = bytes.fromhex("b90003 88c8 e6e9 e610 e2f8 f4")  # out 0xe9, al; out 0x10, al; loop
    capture = Capture(64)
    with real(code, **posted) as machine:
        machine.attach_port(0x10, 1, capture)
        assert machine.run(timeout=30).outcome == "halt"
        assert capture.data() == machine.console == bytes(n % 256 for n in range(0x300, 0, -1))


def test_a_posted_console_is_late_by_a_heartbeat_at_most(posted: dict[str, Any]) -> None:
    seen: list[float] = []
    code = bytes.fromhex("e6e9 ebfe")  # out 0xe9, al; and nothing more
    with real(code, output=lambda _: seen.append(time.monotonic()), **posted) as machine:
        started = time.monotonic()
        assert machine.run(timeout=1.0).outcome == "timeout"
    # It is to come after 50 ms; 0.9 s would be the end of the run.
    assert len(seen) == 1
    assert seen[0] - started < 0.9


def test_what_was_posted_is_there_however_the_run_ends(posted: dict[str, Any]) -> None:
    code = bytes.fromhex("b055 e6e9 e6e9 e6e9 ebfe")
    with real(code, **posted) as machine:
        machine.run(timeout=0.01)
        assert machine.console == b"UUU"
    with long(code[:-2] + b"\x0f\x0b", **posted) as machine:
        assert machine.run(timeout=5).outcome == "shutdown"
        assert machine.console == b"UUU"


def test_an_output_that_fails_loses_only_its_own_bytes(posted: dict[str, Any]) -> None:
    got: list[bytes] = []

    def output(data: bytes) -> None:
        got.append(data)
        if len(got) in (20, 21, 22, 50):
            raise BrokenPipeError("closed")

    failures = 0
    with real(writes(300), output=output, **posted) as machine:
        while True:
            try:
                outcome = machine.run(timeout=30).outcome
                break
            except BrokenPipeError as error:
                failures += 1
                assert any("debug console" in note for note in error.__notes__)
                assert error.__context__ is None
        assert outcome == "halt"
        assert b"".join(got) == machine.console == bytes(n % 256 for n in range(300, 0, -1))
    assert failures == 4


def test_a_posted_console_hides_exits_and_so_refuses_to_show_them(posted: dict[str, Any]) -> None:
    with real(writes(3), **posted) as machine:
        with pytest.raises(ConfigError, match="posted_console hides exits"):
            next(machine.exits())
        assert machine.run(timeout=5).outcome == "halt"


def test_a_posted_machine_can_be_driven_by_its_vcpu(posted: dict[str, Any]) -> None:
    """One floor below, nobody takes the writes out of the ring: the next run does."""
    with real(writes(40) + b"\xeb\xfe", **posted) as machine:  # then: jmp itself
        assert machine.cpus[0].run(timeout=5) == Halt()
        machine.cpus[0].set_regs(machine.cpus[0].get_regs())
        assert machine.cpus[0].run(timeout=0.01) == Interrupted("timeout")
        machine.run(timeout=0.01)
        assert machine.console == bytes(range(40, 0, -1))


class _InterruptedAfter(set[Any]):
    """A set to which adding is the last that is done before Ctrl-C."""

    def add(self, one: object) -> None:
        super().add(one)
        raise KeyboardInterrupt


def test_a_signal_just_before_a_watched_exit_is_served_leaves_the_machine_usable() -> None:
    with Machine("1M") as machine:
        machine.load(b"\xe6\xe9" + HALT)  # out 0xe9, al
        machine._watched = _InterruptedAfter()
        with pytest.raises(KeyboardInterrupt):
            list(machine.exits(timeout=10))
        machine._watched = set(machine._watched)
        machine.check_stopped()
        assert machine.run(timeout=10).outcome == "halt"
