"""The C loop: what it serves itself, what it hands over, in what order, and how often.

The first half drives it with a fabricated run page and a descriptor on which KVM_RUN fails, so
that every kind of exit can be shown to it, also those that a given host never gives. The
second half lets guests on KVM make the same accesses, and compares the loop with the teaching
path, `machine.exits()`.
"""

import errno
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import Machine
from kvmpy.abi import address_of, ffi, lib
from kvmpy.devices.native import Capture, Constant, Counter, NativeDevice, Sink
from kvmpy.dispatch import Dispatch
from kvmpy.exits import OFFSET_REASON, OFFSET_UNION, MmioRead, PortIn, decode
from kvmpy.serve import serve, serve_one

EXIT_IO, EXIT_MMIO = 2, 6
DATA_OFFSET = 4096
PORT = 0x5A
CONSTANT = 0x1122_3344_5566_7788


class Recorder:
    """A Python device that answers reads with 1, 2, 3 ... and writes down what it is asked."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int | None]] = []
        self.answers = 0

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size, None))
        self.answers += 1
        return self.answers % (1 << 8 * size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


class FakeRun:
    """A C loop on a run page of our own making: no KVM at all."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.page = bytearray(3 * 4096)
        self.dispatch = dispatch
        self.loop = ffi.new("struct kvmpy_loop *")
        self.loop.fd = -1  # KVM_RUN: EBADF
        self.loop.run = ffi.cast("void *", address_of(self.page))
        self.loop.routes = dispatch.routes
        self.loop.exits_left = 1000

    def io(self, write: bool, size: int, port: int, data: bytes) -> None:
        struct.pack_into("<I", self.page, OFFSET_REASON, EXIT_IO)
        count = len(data) // size
        fields = (write, size, port, count, DATA_OFFSET)
        struct.pack_into("<BBHIQ", self.page, OFFSET_UNION, *fields)
        self.page[DATA_OFFSET : DATA_OFFSET + len(data)] = data
        self.loop.open = 1

    def mmio(self, write: bool, address: int, data: bytes) -> None:
        struct.pack_into("<I", self.page, OFFSET_REASON, EXIT_MMIO)
        fields = (address, data.ljust(8, b"\0"), len(data), write)
        struct.pack_into("<Q8sIB", self.page, OFFSET_UNION, *fields)
        self.loop.open = 1

    def run(self) -> int:
        """Serve the exit; what is returned is then KVM_RUN's failure."""
        return serve(lib.kvmpy_run, self.loop, self.dispatch, lambda: None)

    def watch(self) -> None:
        """Serve the exit as machine.exits() does."""

        def reply(data: bytes) -> None:
            at = DATA_OFFSET if isinstance(exit_, PortIn) else OFFSET_UNION + 8
            self.page[at : at + len(data)] = data

        exit_ = decode(self.page)
        serve_one(SimpleNamespace(reply=reply), self.dispatch, exit_)  # type: ignore[arg-type]

    def io_data(self, length: int) -> bytes:
        return bytes(self.page[DATA_OFFSET : DATA_OFFSET + length])

    def mmio_data(self, length: int) -> bytes:
        return bytes(self.page[OFFSET_UNION + 8 : OFFSET_UNION + 8 + length])


ROUTES: dict[str, Callable[[], Any]] = {
    "python": Recorder,
    "sink": Sink,
    "constant": lambda: Constant(CONSTANT),
    "capture": lambda: Capture(16),
    "counter": Counter,
    "nobody": lambda: None,
}


def shown(device: Any) -> Any:
    """What a device has to show for the accesses made to it."""
    match device:
        case Recorder():
            return device.seen
        case Capture():
            return device.data()
        case Counter():
            return device.count
    return None


def expected_answer(route: str, size: int, number: int) -> int:
    ones = (1 << 8 * size) - 1
    return {"python": number, "constant": CONSTANT}.get(route, ones) & ones


def expected_show(route: str, write: bool, size: int, values: list[int]) -> Any:
    match route:
        case "python":
            return [(0, size, value if write else None) for value in values]
        case "capture":
            return b"".join(value.to_bytes(size, "little") for value in values) if write else b""
        case "counter":
            return len(values)
    return None


@st.composite
def string_io(draw: st.DrawFn) -> tuple[bool, int, list[int], str]:
    size = draw(st.sampled_from((1, 2, 4)))
    values = draw(st.lists(st.integers(0, (1 << 8 * size) - 1), min_size=1, max_size=64))
    return draw(st.booleans()), size, values, draw(st.sampled_from(sorted(ROUTES)))


@given(string_io(), st.booleans())
def test_each_element_of_a_string_instruction_is_one_access_in_order(
    access: tuple[bool, int, list[int], str], watched: bool
) -> None:
    write, size, values, route = access
    dispatch = Dispatch()
    device = ROUTES[route]()
    if device is not None:
        dispatch.attach(dispatch.ports, PORT, 1, device, None)
    fake = FakeRun(dispatch)
    data = b"".join(value.to_bytes(size, "little") for value in values)
    fake.io(write, size, PORT, data)

    if watched:
        fake.watch()
    else:
        assert fake.run() == -errno.EBADF
        assert not fake.loop.open

    if write:
        assert fake.io_data(len(data)) == data
    else:
        answers = struct.iter_unpack(f"<{' BH I'[size]}", fake.io_data(len(data)))
        wanted = [expected_answer(route, size, n) for n in range(1, len(values) + 1)]
        assert [answer for (answer,) in answers] == wanted
    assert shown(device) == expected_show(route, write, size, values)
    counts = dispatch.unclaimed[dispatch.ports].accesses
    assert counts == ({(PORT, size, write): len(values)} if route == "nobody" else {})


@given(
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from(sorted(ROUTES)),
    st.booleans(),
)
def test_mmio_of_every_width_reaches_its_device(
    size: int, write: bool, value: int, route: str, watched: bool
) -> None:
    value &= (1 << 8 * size) - 1
    dispatch = Dispatch()
    device = ROUTES[route]()
    if device is not None:
        dispatch.attach(dispatch.mmio, 0xD000_0000, 0x1000, device, None)
    fake = FakeRun(dispatch)
    fake.mmio(write, 0xD000_0000, value.to_bytes(size, "little"))

    if watched:
        fake.watch()
    else:
        assert fake.run() == -errno.EBADF

    wanted = value if write else expected_answer(route, size, 1)
    assert int.from_bytes(fake.mmio_data(size), "little") == wanted
    assert shown(device) == expected_show(route, write, size, [value])
    assert dispatch.unclaimed[dispatch.mmio].total == (route == "nobody")


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12),
    st.lists(st.integers(0, 80), min_size=1, max_size=20),
)
def test_mmio_finds_the_range_that_holds_the_address(
    wanted: list[tuple[int, int]], addresses: list[int]
) -> None:
    dispatch = Dispatch()
    owner: dict[int, tuple[Recorder, int]] = {}
    for base, size in wanted:
        if not any(address in owner for address in range(base, base + size)):
            device = Recorder()
            dispatch.attach(dispatch.mmio, base, size, device, None)
            owner |= {base + offset: (device, offset) for offset in range(size)}
    for address in addresses:
        fake = FakeRun(dispatch)
        fake.mmio(True, address, b"\x55")
        assert fake.run() == -errno.EBADF
        if address in owner:
            device, offset = owner[address]
            assert device.seen.pop() == (offset, 1, 0x55)
    assert not any(device.seen for device, _ in owner.values())
    unclaimed = [address for address in addresses if address not in owner]
    assert dispatch.unclaimed[dispatch.mmio].total == len(unclaimed)


def test_an_exception_at_one_element_leaves_the_others_to_the_next_run() -> None:
    class Faulty(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if value == 3:
                raise ZeroDivisionError

    dispatch, device = Dispatch(), Faulty()
    dispatch.attach(dispatch.ports, PORT, 1, device, None)
    fake = FakeRun(dispatch)
    fake.io(True, 1, PORT, bytes([1, 2, 3, 4, 5]))
    with pytest.raises(ZeroDivisionError) as caught:
        fake.run()
    assert caught.value.__notes__ == [
        "raised by device recorder, serving a 1-byte write at port 0x5a"
    ]
    assert fake.loop.open
    assert fake.run() == -errno.EBADF
    assert [value for _, _, value in device.seen] == [1, 2, 3, 4, 5]


def test_an_access_that_never_reached_python_is_handed_over_again() -> None:
    """What `serve` does where a signal handler raises as the C function returns."""
    dispatch, device = Dispatch(), Recorder()
    dispatch.attach(dispatch.ports, PORT, 1, device, None)
    fake = FakeRun(dispatch)
    fake.io(True, 1, PORT, bytes([7, 8]))

    def interrupted(loop: Any) -> int:
        assert lib.kvmpy_run(loop) & lib.KVMPY_WRITE
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            serve(interrupted, fake.loop, dispatch, lambda: None)
    assert fake.run() == -errno.EBADF
    assert [value for _, _, value in device.seen] == [7, 8]


@pytest.mark.parametrize("function", ["kvmpy_run", "kvmpy_finish"])
def test_finishing_serves_what_is_open_and_enters_the_kernel_once(function: str) -> None:
    dispatch, device = Dispatch(), Recorder()
    dispatch.attach(dispatch.ports, PORT, 1, device, None)
    fake = FakeRun(dispatch)
    fake.io(False, 2, PORT, bytes(6))
    fake.loop.incomplete = 1
    code = serve(getattr(lib, function), fake.loop, dispatch, lambda: None)
    assert code == -errno.EBADF
    assert fake.io_data(6) == bytes([1, 0, 2, 0, 3, 0])
    assert fake.loop.entries == 1
    assert fake.page[1] == 0  # immediate_exit


def test_finishing_what_is_complete_does_not_enter_the_kernel() -> None:
    fake = FakeRun(Dispatch())
    assert lib.kvmpy_finish(fake.loop) == lib.KVMPY_COMPLETED
    assert fake.loop.entries == 0


def test_the_limit_of_exits_comes_after_the_service_of_the_last_one() -> None:
    dispatch, device = Dispatch(), Recorder()
    dispatch.attach(dispatch.ports, PORT, 1, device, None)
    fake = FakeRun(dispatch)
    fake.loop.exits_left = 0
    fake.io(True, 1, PORT, b"\x01\x02")
    assert fake.run() == lib.KVMPY_MAX_EXITS
    assert len(device.seen) == 2
    assert fake.loop.entries == 0


# Guests on KVM -----------------------------------------------------------------------------

PORTS = 0x100
MMIO = 0x20000  # real mode reaches it by DS = 0x2000; RAM is 64 KiB
COUNT = 300

GUESTS = {
    # mov cx, COUNT; again: out 0x5a, al; inc al; loop again; hlt
    "out": b"\xb9" + COUNT.to_bytes(2, "little") + bytes.fromhex("e65a fec0 e2fa f4"),
    # mov cx, COUNT; again: in ax, 0x5a; loop again; hlt
    "in": b"\xb9" + COUNT.to_bytes(2, "little") + bytes.fromhex("e55a e2fc f4"),
    # cld; mov di, 0x1000; mov cx, COUNT; mov dx, 0x5a; rep insb; hlt
    "ins": bytes.fromhex("fc bf0010 b9") + COUNT.to_bytes(2, "little") + b"\xba\x5a\0\xf3\x6c\xf4",
    # the same with rep insd
    "insd": bytes.fromhex("fc bf0010 b9")
    + COUNT.to_bytes(2, "little")
    + bytes.fromhex("ba5a00 f3666d f4"),
    # cld; mov si, 0x7c00; mov cx, COUNT; mov dx, 0x5a; rep outsb; hlt
    "outs": bytes.fromhex("fc be007c b9") + COUNT.to_bytes(2, "little") + b"\xba\x5a\0\xf3\x6e\xf4",
    # mov bx, 0x2000; mov ds, bx; mov cx, COUNT; again: mov [4], al; inc al; loop again; hlt
    "mmio-write": bytes.fromhex("bb0020 8edb b9")
    + COUNT.to_bytes(2, "little")
    + bytes.fromhex("a20400 fec0 e2f9 f4"),
    # mov bx, 0x2000; mov ds, bx; mov cx, COUNT; again: mov eax, [4]; loop again; hlt
    "mmio-read": bytes.fromhex("bb0020 8edb b9")
    + COUNT.to_bytes(2, "little")
    + bytes.fromhex("66a10400 e2fa f4"),
}


def make(guest: str, route: str) -> tuple[Machine, Any]:
    machine = Machine("64K", mode="real", devices=False)
    machine.load(GUESTS[guest])
    device = ROUTES[route]()
    if device is not None and guest.startswith("mmio"):
        machine.attach_mmio(MMIO, 0x100, device)
    elif device is not None:
        machine.attach_port(PORT, 1, device)
    return machine, device


@pytest.mark.parametrize("route", sorted(ROUTES))
@pytest.mark.parametrize("guest", sorted(GUESTS))
def test_the_loop_and_the_teaching_path_agree(kvm_host: None, guest: str, route: str) -> None:
    machine, device = make(guest, route)
    with machine:
        result = machine.run(timeout=30)
        assert result.outcome == "halt"
        memory, registers = machine.memory[0x1000:0x2000], result.registers
        unclaimed = result.unclaimed
    watched_machine, watched_device = make(guest, route)
    with watched_machine:
        seen = list(watched_machine.exits(timeout=30))
        counts = watched_machine.cpus[0].exit_counts()
        assert watched_machine.memory[0x1000:0x2000] == memory
        assert watched_machine.cpus[0].get_regs() == registers
        assert tuple(watched_machine.unclaimed()) == unclaimed
    assert shown(watched_device) == shown(device)
    assert dict(result.exits) == counts
    assert sum(counts.values()) == len(seen)
    assert counts["halt"] == 1


@pytest.mark.parametrize("guest", sorted(GUESTS))
def test_every_access_is_counted_once(kvm_host: None, guest: str) -> None:
    machine, device = make(guest, "counter")
    with machine:
        result = machine.run(timeout=30)
    assert device.count == COUNT
    kind = {
        "out": "port-out",
        "outs": "port-out",
        "mmio-write": "mmio-write",
        "mmio-read": "mmio-read",
    }.get(guest, "port-in")
    if guest in ("in", "out", "mmio-write", "mmio-read"):
        assert result.exits == {kind: COUNT, "halt": 1}
    else:  # a string instruction's elements may share exits
        assert set(result.exits) == {kind, "halt"}
        assert 1 <= result.exits[kind] <= COUNT


def test_string_input_fills_memory_from_a_device_in_python(kvm_host: None) -> None:
    machine, device = make("ins", "python")
    with machine:
        assert machine.run(timeout=30).outcome == "halt"
        assert machine.memory[0x1000 : 0x1000 + COUNT] == bytes(n % 256 for n in range(1, 301))
    assert device.seen == [(0, 1, None)] * COUNT


def test_string_output_arrives_in_the_guests_order(kvm_host: None) -> None:
    machine, device = make("outs", "capture")
    with machine:
        assert machine.run(timeout=30).outcome == "halt"
        assert device.data() == machine.memory[0x7C00 : 0x7C00 + COUNT]


def test_scattered_mmio_finds_its_ranges(kvm_host: None) -> None:
    """The loop remembers the range it found last; here each access is to another one."""
    code = bytes.fromhex(
        "bb0020 8edb"  # mov bx, 0x2000; mov ds, bx
        "b95802 31db"  # mov cx, 600; xor bx, bx
        "880f"  # again: mov [bx], cl
        "81c3b506"  # add bx, 0x6b5
        "e2f8 f4"  # loop again; hlt
    )
    devices = [Recorder() for _ in range(32)]
    with Machine("64K", mode="real", devices=False) as machine:
        machine.load(code)
        for number, device in enumerate(devices):
            machine.attach_mmio(MMIO + number * 0x800, 0x700, device)
        assert machine.run(timeout=30).outcome == "halt"
        lost = machine.dispatch.unclaimed[machine.dispatch.mmio].writes
    wanted: list[list[tuple[int, int, int]]] = [[] for _ in devices]
    unclaimed: dict[int, int] = {}
    for turn in range(600):
        at = turn * 0x6B5 % 0x10000
        if at % 0x800 < 0x700:
            wanted[at // 0x800].append((at % 0x800, 1, (600 - turn) & 0xFF))
        else:
            unclaimed[MMIO + at] = unclaimed.get(MMIO + at, 0) + 1
    assert [device.seen for device in devices] == wanted
    assert lost == unclaimed


@pytest.mark.parametrize("guest", ["out", "mmio-write"])
@pytest.mark.parametrize("capacity", [8, 13, 299, 300, 301, 4096])
def test_a_full_capture_keeps_every_byte_in_order(
    kvm_host: None, guest: str, capacity: int
) -> None:
    with Machine("64K", mode="real", devices=False) as machine:
        machine.load(GUESTS[guest])
        device = Capture(capacity)
        if guest == "out":
            machine.attach_port(PORT, 1, device)
        else:
            machine.attach_mmio(MMIO, 0x100, device)
        assert machine.run(timeout=30).outcome == "halt"
        assert device.data() == bytes(n % 256 for n in range(COUNT))


def test_what_c_collected_outlives_the_machine(kvm_host: None) -> None:
    machine, device = make("out", "capture")
    with machine:
        machine.run(timeout=30)
    assert isinstance(device, NativeDevice)
    assert device.backing is None
    assert len(shown(device)) == COUNT


def test_a_limit_of_exits_is_exact(kvm_host: None) -> None:
    for route in ("counter", "python"):
        machine, device = make("out", route)
        with machine:
            total = 0
            for limit in (1, 2, 7, 100):
                result = machine.run(timeout=30, max_exits=limit)
                total += limit
                assert result.outcome == "max-exits"
                assert result.exits == {"port-out": limit}
                assert (device.count if route == "counter" else len(device.seen)) == total
            assert machine.run(timeout=30).exits == {"port-out": COUNT - total, "halt": 1}


def test_a_limit_of_exits_does_not_outlive_its_run(kvm_host: None) -> None:
    machine, _ = make("in", "constant")
    with machine:
        assert machine.run(timeout=30, max_exits=3).outcome == "max-exits"
        assert machine.cpus[0].run(timeout=30) == PortIn(PORT, 2)
        assert machine.run(timeout=30).outcome == "halt"


def test_the_teaching_path_sees_the_limit_too(kvm_host: None) -> None:
    machine, _ = make("mmio-read", "constant")
    with machine:
        assert list(machine.exits(timeout=30, max_exits=3)) == [MmioRead(MMIO + 4, 4)] * 3
        assert machine.run(timeout=30).exits == {"mmio-read": COUNT - 3, "halt": 1}
