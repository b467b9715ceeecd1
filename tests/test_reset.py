"""Resets: a loop of runs that start alike, whatever each of them has done."""

import gc
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_snapshot import (
    DATA,
    END,
    EVERYWHERE,
    MEMORY,
    MMIO,
    NATIVE,
    PORT,
    attach,
    code,
    disturb,
    end_state,
    machine_of,
)

from kvmpy import AddressError, ConfigError, Machine, assemble, runs
from kvmpy.devices import Counter, EndRun, Sink
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot.tables import table_pages

pytestmark = pytest.mark.usefixtures("kvm_host")

INPUT = 0x30000
# Adds up the bytes of an input of so many (the first of them) and exits with the sum.
SUMMING = f"""
mov esi, {INPUT}
movzx ecx, byte ptr [rsi]
xor eax, eax
again:
inc esi
movzx edx, byte ptr [rsi]
add eax, edx
dec ecx
jnz again
mov edi, {DATA}
add [rdi], eax
out 0xf4, eax
hlt
"""


def given_input(*numbers: int) -> bytes:
    return bytes([len(numbers), *numbers])


@settings(max_examples=10)
@pytest.mark.parametrize("ring", [0, 3])
@given(pieces=st.lists(st.sampled_from(EVERYWHERE), min_size=1, max_size=14), k=st.integers(0, 5))
def test_after_a_reset_a_guest_ends_as_the_first_time(ring: int, pieces: list[str], k: int) -> None:
    body = b"".join(map(code, pieces)) + code(END)
    with machine_of(body, ring) as machine:
        if k:
            machine.run(max_exits=k, timeout=10)
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        whole = end_state(machine)
        for _ in range(4):
            disturb(machine)
            machine.reset_to(snapshot)
            assert end_state(machine) == whole
            machine.reset_to(snapshot)
            assert end_state(machine) == whole


@pytest.mark.parametrize("scope", ["all", "registers"])
@pytest.mark.parametrize("ring", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_thousand_resets_are_as_one(ring: int, scope: str) -> None:
    body = b"".join(map(code, EVERYWHERE)) + code(END)
    with machine_of(body, ring) as machine:
        snapshot = machine.snapshot()
        machine.reset_to(snapshot, scope)
        whole = end_state(machine)
        for _ in range(1000):
            machine.reset_to(snapshot, scope)
            result = machine.run(timeout=10)
            assert (result.outcome, result.registers) == ("debug-exit", whole[2])
        machine.reset_to(snapshot, scope)
        assert end_state(machine) == whole


def test_native_registers_are_brought_back_unless_they_are_left_out() -> None:
    body = code("\n".join(NATIVE[:2]) + "\n" + END)
    with machine_of(body, 3) as machine:
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        rbx = {machine.run(timeout=10).registers.rbx for _ in range(1)}
        for _ in range(5):
            machine.reset_to(snapshot)
            rbx.add(machine.run(timeout=10).registers.rbx)
        assert len(rbx) == 1
        machine.memory.write(0x1000, code("paddq xmm1, xmm1\n" * 3 + END))
        area = bytearray(machine.cpus[0].get_xsave())
        area[512] |= 2
        area[176] = 1  # XMM1
        machine.cpus[0].set_xsave(bytes(area))
        machine.reset_to(snapshot)
        assert machine.cpus[0].get_xsave()[176] == 0


def test_it_says_how_much_had_changed() -> None:
    with machine_of(code(SUMMING), 0) as machine:
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        machine.memory.write(INPUT, given_input(1, 2))
        machine.run(timeout=10)
        done = machine.reset_to(snapshot)
        assert (done.pages, done.bytes) == (2, 2 * PAGE_SIZE)  # the input and the sum
        assert done.nanoseconds > 0
        assert machine.reset_to(snapshot).pages == 0


@pytest.mark.parametrize("how", ["write", "view", "buffer", "held"])
def test_what_the_host_writes_is_taken_back(how: str) -> None:
    with machine_of(code(SUMMING), 0) as machine:
        (region,) = machine.memory
        held = machine.memory.view if how == "held" else None
        snapshot = machine.snapshot()
        for number in range(3):
            machine.reset_to(snapshot)
            at = 0x60000 + number * PAGE_SIZE
            if how == "write":
                machine.memory.write(at - 2, b"four")  # across a page's end
            elif how == "view":
                with machine.memory.view as view:
                    view[at] = 1
            elif how == "buffer":
                region.buffer[at] = 1
            else:
                assert held is not None
                held[at] = 1
        machine.reset_to(snapshot)
        assert not any(machine.memory.read(0x5F000, 0x4000))
        if held is not None:
            held.release()


def test_registers_that_somebody_wrote_are_taken_back() -> None:
    """Those that wait in the mapping as well as those that KVM has already."""
    with machine_of(code(SUMMING), 0) as machine:
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        cpu = machine.cpus[0]
        before = cpu.get_regs(), cpu.get_sregs(), cpu.get_vcpu_events()
        for hand_over in (False, True, False):
            registers, special = cpu.get_regs(), cpu.get_sregs()
            registers.rcx, special.gdt.limit = 77, 0x55
            cpu.set_regs(registers)
            cpu.set_sregs(special)
            if hand_over:
                cpu.get_xcrs()
                cpu.interrupt(0x50)
            machine.reset_to(snapshot)
            assert (cpu.get_regs(), cpu.get_sregs(), cpu.get_vcpu_events()) == before
            machine.memory.write(INPUT, given_input(1))
            assert machine.run(timeout=10).value == 1
            machine.reset_to(snapshot)


@pytest.mark.parametrize("ring", [0, 3])
def test_page_tables_that_a_run_has_changed_map_what_they_did(ring: int) -> None:
    """With shadow paging KVM keeps what it derived from tables that the host writes."""
    with Machine(4 << 20, "long", ring) as machine:
        attach(machine)
        # Tables of the guest's own: an address maps to 0x20000 or to 0x21000.
        machine.load(b"\xf4", 0x1000)
        cpu = machine.cpus[0]
        tables = table_pages(machine.memory.read, cpu.get_sregs())
        assert tables
        machine.memory.write(0x20000, b"one.")
        machine.memory.write(0x21000, b"two.")
        pml4 = cpu.get_sregs().cr3
        free = 0x100000  # three pages for tables of 0x8000000000
        virtual = 1 << 39
        machine.memory.write(pml4 + 8, (free | 7).to_bytes(8, "little"))
        machine.memory.write(free, (free + 0x1000 | 7).to_bytes(8, "little"))
        machine.memory.write(free + 0x1000, (free + 0x2000 | 7).to_bytes(8, "little"))
        machine.memory.write(free + 0x2000, (0x20000 | 7).to_bytes(8, "little"))
        text = f"mov rdi, {virtual:#x}\nmov eax, [rdi]\nout 0xf4, eax\nhlt"
        machine.memory.write(0x1000, code(text))
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        for _ in range(3):
            assert machine.run(timeout=10).value == int.from_bytes(b"one.", "little")
            machine.memory.write(free + 0x2000, (0x21000 | 7).to_bytes(8, "little"))
            machine.vm.drop_mappings()
            machine.set_entry(0x1000)
            assert machine.run(timeout=10).value == int.from_bytes(b"two.", "little")
            machine.reset_to(snapshot)


def test_page_tables_are_found() -> None:
    with Machine(4 << 20) as machine:
        machine.load(code(END), 0x1000)
        special = machine.cpus[0].get_sregs()
        found = table_pages(machine.memory.read, special)
        assert special.cr3 in found
        assert all(machine.layout.base <= page < machine.layout.low_ram for page in found)
        # A table that refers to itself, and entries that lead out of RAM.
        machine.memory.write(special.cr3, (special.cr3 | 1).to_bytes(8, "little") * 512)
        outside: Any = lambda at, size: machine.memory.read(at, size) if at < 4 << 20 else None  # noqa: E731
        assert table_pages(outside, special) == {special.cr3}
    with Machine(1 << 20, "protected") as machine:
        machine.load(b"\xf4", 0x1000)
        assert table_pages(machine.memory.read, machine.cpus[0].get_sregs()) == set()


def test_without_a_log_of_its_own_the_page_tables_tell() -> None:
    """Somebody else logs dirty pages already, or KVM has no manual protection."""
    with machine_of(code(SUMMING), 0) as machine:
        (region,) = machine.memory
        machine.vm.set_log_dirty(region, True)
        snapshot = machine.snapshot()
        machine.reset_to(snapshot)
        assert machine.resetter.method == "copy-on-write"
        for number in range(3):
            machine.memory.write(INPUT, given_input(number))
            assert machine.run(timeout=10).value == number
            assert machine.reset_to(snapshot).pages == (2 if number else 1)
        machine.vm.get_dirty_log(region)  # still theirs


def test_one_snapshot_after_another() -> None:
    with machine_of(code(SUMMING), 0) as machine:
        first = machine.snapshot()
        machine.memory.write(0x50000, b"second")
        second = machine.snapshot()
        for _ in range(3):
            machine.reset_to(first)
            assert machine.memory.read(0x50000, 6) == bytes(6)
            machine.reset_to(second)
            assert machine.memory.read(0x50000, 6) == b"second"
            machine.memory.write(0x50000, b"noise!")
            machine.reset_to(second)
            assert machine.memory.read(0x50000, 6) == b"second"


def test_with_an_irqchip_and_two_vcpus() -> None:
    with Machine(MEMORY, cpus=2, irqchip="split") as machine:
        machine.load(code(SUMMING), 0x1000)
        snapshot = machine.snapshot()
        lapic = machine.cpus[0].get_lapic()
        machine.reset_to(snapshot)
        for _ in range(3):
            changed = bytearray(lapic)
            changed[0x80] = 0x20  # the task priority
            machine.cpus[0].set_lapic(bytes(changed))
            machine.memory.write(INPUT, given_input(3, 4))
            assert machine.run(timeout=10).value == 7
            machine.reset_to(snapshot)
            assert machine.cpus[0].get_lapic()[0x80] == lapic[0x80]
            assert machine.memory.read(DATA, 4) == bytes(4)
        with pytest.raises(ConfigError, match="irqchip"):
            machine.reset_to(snapshot, "registers")


def test_a_scope_that_is_none_is_refused() -> None:
    with machine_of(code(SUMMING), 0) as machine:
        snapshot = machine.snapshot()
        with pytest.raises(ConfigError, match="'most'"):
            machine.reset_to(snapshot, "most")


# Loops over inputs --------------------------------------------------------------------------


@pytest.fixture
def summing() -> Any:
    with machine_of(code(SUMMING), 3) as machine:
        return machine.snapshot()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_each_input_is_run_from_the_same_state(summing: Any, batch: int) -> None:
    inputs = [given_input(*range(number % 9 + 1)) for number in range(100)]
    found = list(
        runs(
            summing,
            inputs,
            INPUT,
            timeout=10,
            batch=batch,
            collect=(DATA, 4),
            attach=attach,
        )
    )
    assert [one.input for one in found] == inputs
    assert [one.value for one in found] == [sum(one[1:]) for one in inputs]
    assert [int.from_bytes(one.collected, "little") for one in found] == [
        sum(one[1:]) for one in inputs
    ]
    assert {one.outcome for one in found} == {"debug-exit"}
    assert [one.registers.rax for one in found] == [sum(one[1:]) for one in inputs]


@pytest.mark.parametrize("batch", [1, 16])
def test_what_ends_a_run_costs_no_other(batch: int) -> None:
    """Halts that C sees, a crash, a hang, devices in Python, each in the midst of others."""
    text = f"""
    mov esi, {INPUT}
    mov al, [rsi]
    cmp al, 1
    je crash
    cmp al, 2
    je hang
    cmp al, 3
    je ask
    hlt
    crash:
    ud2
    hang:
    jmp hang
    ask:
    in al, {PORT}
    mov [rsi + 1], al
    hlt
    """
    with machine_of(code(text), 0) as machine:
        snapshot = machine.snapshot()
    inputs = [bytes([kind]) for kind in (0, 1, 0, 3, 2, 3, 0, 0, 1, 3)]
    found = list(
        runs(
            snapshot,
            inputs,
            INPUT,
            timeout=0.05,
            batch=batch,
            collect=(INPUT, 2),
            attach=attach,
        )
    )
    outcomes = {0: "halt", 1: "shutdown", 2: "timeout", 3: "halt"}
    assert [one.outcome for one in found] == [outcomes[one[0]] for one in inputs]
    assert [one.crashed for one in found] == [one[0] == 1 for one in inputs]
    answers = {one.collected[1] for one in found if one.input == b"\x03"}
    assert answers == {(33 + 1) & 0xFF}  # the device starts anew each time, too


def test_a_function_may_write_the_input_and_look_at_the_machine(summing: Any) -> None:
    def write(machine: Machine, numbers: list[int]) -> None:
        machine.memory.write(INPUT, given_input(*numbers))

    with Machine.from_snapshot(summing, attach) as machine:
        inputs = [[1, 2], [3], [4, 5, 6]]
        for one in runs(summing, inputs, write, timeout=10, machine=machine, batch=5):
            assert one.machine is machine
            assert (one.outcome, one.value) == ("debug-exit", sum(one.input))
            assert machine.memory.read(DATA, 1)[0] == sum(one.input)
        assert machine.run(timeout=10).outcome  # left open


def test_native_devices_with_a_state_start_anew_each_time() -> None:
    body = code(f"out {PORT}, al\nout {PORT}, al\nhlt")
    with Machine(MEMORY) as machine:
        counter = Counter()
        machine.attach_port(PORT, 1, counter)
        machine.load(body, 0x1000)
        snapshot = machine.snapshot()
        for one in runs(snapshot, range(3), timeout=10, batch=8, machine=machine):
            assert (one.outcome, counter.count) == ("halt", 2)


@pytest.mark.parametrize("batch", [1, 8])
def test_runs_that_end_by_a_device_of_cs_need_no_python(batch: int) -> None:
    text = f"mov esi, {INPUT}\nmov eax, [rsi]\nmov edi, {MMIO:#x}\nmov [rdi], eax\nhlt"
    with Machine(MEMORY, ring=3) as machine:
        machine.attach_mmio(MMIO, 4, EndRun())
        machine.load(code(text), 0x1000)
        snapshot = machine.snapshot()
        inputs = [bytes([number, 1, 0, 0]) for number in range(40)]
        made = list(runs(snapshot, inputs, INPUT, timeout=10, batch=batch, machine=machine))
    assert [(one.outcome, one.value) for one in made] == [
        ("ended", 256 + number) for number in range(40)
    ]


@pytest.mark.parametrize("at", [0, 4, 0xFFC, 0xFFD])
@pytest.mark.parametrize("register", ["ecx", "rcx", "cl"])
def test_a_reset_after_part_of_a_write_leaves_nothing_of_it(at: int, register: str) -> None:
    """Writes within a page, up to its end, and across it, which come in pieces."""
    store = f"mov edi, {MMIO + at:#x}\nmov rcx, 0x1122334455667788\nmov [rdi], {register}"
    written: list[tuple[int, int, int]] = []
    with Machine(MEMORY) as machine:

        @machine.on_mmio(MMIO, 2 * PAGE_SIZE)
        def device(offset: int, size: int, value: int | None) -> int:
            written.append((offset, size, value or 0))
            return 0

        machine.load(code(f"mov eax, 5\n{store}\nmov eax, 6\n{store}\nhlt"), 0x1000)
        snapshot = machine.snapshot()
        for _ in range(3):
            machine.reset_to(snapshot)
            written.clear()
            assert machine.run(max_exits=1, timeout=10).outcome == "max-exits"
            machine.reset_to(snapshot)
            assert machine.cpus[0].get_regs().rax == 0
        machine.reset_to(snapshot)
        written.clear()
        result = machine.run(timeout=10)
        assert (result.outcome, result.registers.rax) == ("halt", 6)
        assert written == written[: len(written) // 2] * 2  # both stores, whole, and no more


def test_max_exits_is_for_each_run() -> None:
    with Machine(MEMORY) as machine:
        machine.attach_port(PORT, 1, Sink())
        machine.load(code(f"again:\nout {PORT}, al\njmp again"), 0x1000)
        snapshot = machine.snapshot()
        made = list(runs(snapshot, range(5), timeout=10, max_exits=3, batch=2, machine=machine))
        assert [one.outcome for one in made] == ["max-exits"] * 5
        assert machine.cpus[0].exit_counts()["port-out"] == 15


def test_a_devices_exception_comes_out_and_the_machine_is_closed(summing: Any) -> None:
    gc.collect()  # what earlier tests left behind
    before = len(os.listdir("/proc/self/fd"))

    def broken(machine: Machine) -> None:
        attach(machine)

        @machine.on_port(0x61)
        def device(offset: int, size: int, value: int | None) -> int:
            raise ValueError("broken")

    with machine_of(code("in al, 0x61\nhlt"), 0) as machine:
        snapshot = machine.snapshot()
    with pytest.raises(ValueError, match="broken"):
        list(runs(snapshot, range(3), timeout=10, batch=2, attach=broken))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the snapshot: its file, and its view


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_what_is_raised_for_an_input_comes_after_the_outcomes_before_it(batch: int) -> None:
    """Of a device's exceptions as well as of inputs that are too large or no bytes at all."""

    def broken(machine: Machine) -> None:
        @machine.on_port(0x61)
        def device(offset: int, size: int, value: int | None) -> int:
            raise ValueError("broken")

    text = f"mov esi, {INPUT}\ncmp byte ptr [rsi], 1\nje ask\nhlt\nask:\nin al, 0x61\nhlt"
    with Machine(MEMORY) as machine:
        machine.load(code(text), 0x1000)
        snapshot = machine.snapshot()
    good = [b"\0"] * 5
    for bad, error in ((b"\1", ValueError), (bytes(MEMORY), AddressError), ("text", ConfigError)):
        found = []
        with pytest.raises(error):
            for one in runs(snapshot, [*good, bad, *good], INPUT, batch=batch, attach=broken):
                found.append(one.outcome)
        assert found == ["halt"] * 5


def test_a_loop_that_is_left_leaves_the_machine_usable(summing: Any) -> None:
    with Machine.from_snapshot(summing, attach) as machine:
        next(runs(summing, [given_input(1)] * 10, INPUT, timeout=10, machine=machine))
        assert not machine.cpus[0].loop.running
        machine.reset_to(summing)
        machine.memory.write(INPUT, given_input(5))
        assert machine.run(timeout=10).value == 5
        with machine_of(code(SUMMING), 0) as other:
            other.memory.write(INPUT, given_input(6))
            assert other.run(timeout=10).value == 6


def test_another_snapshot_in_the_midst_of_a_loop(summing: Any) -> None:
    with Machine.from_snapshot(summing, attach) as machine:
        machine.memory.write(0x50000, b"x")
        other = machine.snapshot()
        for one in runs(summing, [given_input(2)] * 4, INPUT, timeout=10, machine=machine):
            assert one.value == 2
            assert machine.memory.read(0x50000, 1) == b"\0"
            machine.restore(other)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"write_to": 1 << 40}, AddressError),
        ({"write_to": "here"}, ConfigError),
        ({"write_to": MEMORY - 1}, AddressError),
        ({"batch": 0}, ConfigError),
        ({"max_exits": 0}, ConfigError),
        ({"timeout": -1}, ConfigError),
        ({"timeout": 0}, ConfigError),
        ({"collect": (MEMORY - 1, 2)}, AddressError),
        ({"scope": "none"}, ConfigError),
    ],
)
def test_bad_settings_are_refused(summing: Any, options: dict[str, Any], error: type) -> None:
    summing.images[0].view()  # which has a descriptor
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        list(runs(summing, [b"ab"], attach=attach, **options))
    assert len(os.listdir("/proc/self/fd")) == before


def test_inputs_in_an_assembled_guest_of_ring_3() -> None:
    """The whole way, as a reader of the documentation goes it."""
    guest = assemble(SUMMING, mode="long", at=0x4000)
    with Machine("1M", ring=3) as machine:
        machine.load(guest)
        snapshot = machine.snapshot()
    inputs = (given_input(*os.urandom(5)) for _ in range(50))
    for one in runs(snapshot, inputs, INPUT, timeout=1, batch=10):
        assert one.value == sum(one.input[1:])
