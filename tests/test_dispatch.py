"""Which device answers, what an answer may be, and what is said when it may not: without KVM."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import AddressError, ConfigError, DeviceError, OverlapError
from kvmpy.abi import ffi, lib
from kvmpy.bus import Bus, FunctionDevice
from kvmpy.devices.native import Capture, Constant, Counter, NativeDevice, Sink
from kvmpy.dispatch import Dispatch, _Numbers
from kvmpy.serve import serve


class Fixed:
    """A device whose reads give one and the same thing, whatever it is."""

    name = "fixed"

    def __init__(self, value: Any) -> None:
        self.value = value

    def read(self, offset: int, size: int) -> Any:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class Script:
    """Stands for the C loop: hands over the codes it is given, then returns KVMPY_EXIT."""

    def __init__(self, *codes: int, address: int = 0) -> None:
        self.codes = list(codes)
        self.loop = ffi.new("struct kvmpy_loop *")
        self.loop.address = address

    def step(self, loop: Any) -> int:
        return self.codes.pop(0) if self.codes else lib.KVMPY_EXIT

    def serve(self, dispatch: Dispatch) -> None:
        assert serve(self.step, self.loop, dispatch, lambda: None) == lib.KVMPY_EXIT


def port_code(port: int, size: int, write: bool = False) -> int:
    shift = lib.KVMPY_SIZE_SHIFT
    return int(lib.KVMPY_PORT | write * lib.KVMPY_WRITE | size >> 1 << shift | port)


def read_hot(dispatch: Dispatch, port: int, size: int) -> Any:
    script = Script(port_code(port, size), address=port)
    script.serve(dispatch)
    return script.loop.value


def read_watched(dispatch: Dispatch, port: int, size: int) -> Any:
    return dispatch.read(dispatch.ports, port, size)


READERS = pytest.mark.parametrize("read", [read_hot, read_watched], ids=["hot", "watched"])
Reader = Callable[[Dispatch, int, int], Any]


@READERS
@given(size=st.sampled_from((1, 2, 4)), value=st.integers(-(1 << 40), 1 << 40))
def test_an_answer_must_fit_the_width_of_the_read(read: Reader, size: int, value: int) -> None:
    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x10, 1, Fixed(value), None)
    if 0 <= value < 1 << 8 * size:
        assert read(dispatch, 0x10, size) == value
    else:
        with pytest.raises(DeviceError) as caught:
            read(dispatch, 0x10, size)
        message = str(caught.value)
        assert "fixed" in message
        assert "0x10" in message
        assert f"{size}-byte" in message
        assert f"{value:#x}" in message
        assert "\n" not in message


@READERS
@pytest.mark.parametrize("value", [None, "x", b"\x01", [1], {}, object()], ids=repr)
def test_an_answer_must_be_an_integer(read: Reader, value: object) -> None:
    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x10, 1, Fixed(value), None)
    with pytest.raises(DeviceError, match="fixed answered"):
        read(dispatch, 0x10, 1)


@READERS
@pytest.mark.parametrize("value", [True, np.uint8(7), np.int64(9)], ids=repr)
def test_what_is_an_integer_by_another_name_is_an_answer(read: Reader, value: Any) -> None:
    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x10, 1, Fixed(value), None)
    assert read(dispatch, 0x10, 1) == int(value)


@READERS
@pytest.mark.parametrize("value", [1.0, 1.5, float("nan"), float("inf")])
def test_a_float_is_no_answer(read: Reader, value: float) -> None:
    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x10, 1, Fixed(value), None)
    with pytest.raises(DeviceError, match="fixed answered"):
        read(dispatch, 0x10, 1)


@READERS
def test_a_function_that_forgets_to_return_is_told_so(read: Reader) -> None:
    def forgetful(offset: int, size: int, value: int | None) -> int | None:
        return None

    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x10, 1, FunctionDevice(forgetful), None)
    with pytest.raises(DeviceError, match=r"forgetful answered .* with None"):
        read(dispatch, 0x10, 1)


def raising(offset: int, size: int, value: int | None) -> int:
    raise LookupError("a device's own")


@pytest.mark.parametrize("write", [False, True])
def test_a_devices_exception_says_what_it_was_serving(write: bool) -> None:
    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x10, 4, FunctionDevice(raising), None)
    kind = "write" if write else "read"
    note = [f"raised by device raising, serving a 2-byte {kind} at port 0x12"]
    script = Script(port_code(0x12, 2, write), address=0x12)
    with pytest.raises(LookupError) as hot:
        script.serve(dispatch)
    with pytest.raises(LookupError) as watched:
        if write:
            dispatch.write(dispatch.ports, 0x12, 2, 0)
        else:
            dispatch.read(dispatch.ports, 0x12, 2)
    assert hot.value.__notes__ == watched.value.__notes__ == note


def test_devices_see_offsets_from_their_base() -> None:
    seen: list[tuple[int, int, int | None]] = []

    def device(offset: int, size: int, value: int | None) -> int:
        seen.append((offset, size, value))
        return 0

    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x300, 0x20, FunctionDevice(device), None)
    for port in (0x300, 0x31F):
        read_hot(dispatch, port, 1)
        read_watched(dispatch, port, 4)
        dispatch.write(dispatch.ports, port, 2, 0xBEEF)
    assert seen == [
        *((0, 1, None), (0, 4, None), (0, 2, 0xBEEF)),
        *((0x1F, 1, None), (0x1F, 4, None), (0x1F, 2, 0xBEEF)),
    ]


def test_claims_change_what_answers_at_once() -> None:
    dispatch = Dispatch()
    assert read_hot(dispatch, 0x10, 1) == 0xFF
    first = dispatch.attach(dispatch.ports, 0x10, 1, Fixed(1), None)
    assert read_hot(dispatch, 0x10, 1) == 1
    dispatch.detach(dispatch.ports, first)
    assert read_hot(dispatch, 0x10, 1) == 0xFF
    dispatch.attach(dispatch.ports, 0x10, 1, Fixed(2), None)
    assert read_hot(dispatch, 0x10, 1) == 2
    assert dispatch.unclaimed[dispatch.ports].reads == {0x10: 2}


def test_a_claim_made_while_an_access_is_looked_up_is_not_forgotten() -> None:
    """What is found for an access is remembered; not so if it was out of date by then."""
    dispatch = Dispatch()
    find = dispatch.ports.find

    def attach_meanwhile(address: int) -> Any:
        found = find(address)
        dispatch.ports.find = find  # type: ignore[method-assign]
        dispatch.attach(dispatch.ports, 0x10, 1, Fixed(5), None)
        return found

    dispatch.ports.find = attach_meanwhile  # type: ignore[method-assign]
    assert read_hot(dispatch, 0x10, 1) == 0xFF  # the access was there first
    assert read_hot(dispatch, 0x10, 1) == 5


def test_rows_of_mmio_claims_do_not_move() -> None:
    """The C loop may have one in its hands while another thread attaches."""
    dispatch = Dispatch()
    bases = (0x5000, 0x1000, 0x9000, 0x3000)
    rows: dict[int, int] = {}
    for base in bases:
        dispatch.attach(dispatch.mmio, base, 0x100, Fixed(base), None)
        ranges = dispatch.routes.ranges
        now = {ranges.at[i].start: ranges.at[i].row for i in range(ranges.count)}
        assert list(now) == sorted(now)
        assert rows.items() <= now.items()
        assert len(set(now.values())) == len(now)
        rows = now


@pytest.mark.parametrize("bus_name", ["ports", "mmio"])
def test_overlaps_are_refused_by_both_names(bus_name: str) -> None:
    dispatch = Dispatch()
    bus: Bus = getattr(dispatch, bus_name)
    dispatch.attach(bus, 0x100, 0x10, Sink(), "first device")
    for base, size in ((0x10F, 1), (0xF8, 9), (0x100, 0x10), (0x80, 0x100), (0x104, 2)):
        with pytest.raises(OverlapError) as caught:
            dispatch.attach(bus, base, size, Sink(), "second device")
        assert "first device" in str(caught.value)
        assert "second device" in str(caught.value)
    dispatch.attach(bus, 0x110, 1, Sink(), "neighbour above")
    dispatch.attach(bus, 0xFF, 1, Sink(), "neighbour below")


def test_a_refused_claim_leaves_no_trace() -> None:
    dispatch = Dispatch()
    dispatch.attach(dispatch.ports, 0x100, 0x10, Fixed(3), None)
    sink = Sink()
    with pytest.raises(OverlapError):
        dispatch.attach(dispatch.ports, 0x10F, 1, sink, None)
    with pytest.raises(AddressError):
        dispatch.attach(dispatch.ports, 0xFFFF, 2, sink, None)
    with pytest.raises(AddressError):
        dispatch.attach(dispatch.mmio, 1 << 52, 1, sink, None)
    assert sink.backing is None
    assert dispatch.routes.ports[0x10F] == 0
    assert read_hot(dispatch, 0x10F, 1) == 3
    dispatch.attach(dispatch.ports, 0x110, 1, sink, None)
    assert dispatch.routes.ports[0x110] != 0


def test_a_device_of_cs_is_attached_once() -> None:
    dispatch = Dispatch()
    counter = Counter()
    claim = dispatch.attach(dispatch.ports, 1, 1, counter, None)
    with pytest.raises(OverlapError, match="counter is attached already"):
        dispatch.attach(dispatch.mmio, 1, 1, counter, None)
    dispatch.detach(dispatch.ports, claim)
    dispatch.attach(dispatch.mmio, 1, 1, counter, None)


@pytest.mark.parametrize("make", [Sink, lambda: Constant(1), Capture, Counter])
def test_detaching_ends_a_route_in_c(make: Callable[[], NativeDevice]) -> None:
    dispatch = Dispatch()
    device = make()
    claim = dispatch.attach(dispatch.ports, 0x20, 4, device, None)
    numbers = set(dispatch.routes.ports[0x1F:0x25])
    assert len(numbers) == 2
    assert dispatch.routes.ports[0x1F] == dispatch.routes.ports[0x24] == 0
    dispatch.detach(dispatch.ports, claim)
    assert set(dispatch.routes.ports[0x1F:0x25]) == {0}
    assert device.backing is None
    with pytest.raises(AddressError):
        dispatch.detach(dispatch.ports, claim)


def test_more_claims_in_c_than_it_has_room_for_are_refused() -> None:
    dispatch = Dispatch()
    most = lib.KVMPY_MAX_ROWS - 1
    claims = [dispatch.attach(dispatch.ports, n, 1, Sink(), None) for n in range(most - 40, most)]
    dispatch._free = _Numbers(most + 1)  # as if there were as many more
    with pytest.raises(ConfigError, match="served in C"):
        dispatch.attach(dispatch.ports, 0x9000, 1, Sink(), None)
    assert dispatch.ports.find(0x9000) is None
    dispatch.attach(dispatch.ports, 0x9000, 1, Fixed(1), None)
    dispatch.detach(dispatch.ports, claims[0])
    dispatch.attach(dispatch.ports, 0x9001, 1, Sink(), None)


@pytest.mark.slow
def test_more_mmio_claims_than_there_are_rows_are_refused() -> None:
    dispatch = Dispatch()
    most = lib.KVMPY_MAX_ROWS - 1
    claims = [dispatch.attach(dispatch.mmio, 16 * n, 8, Fixed(0), None) for n in range(most)]
    with pytest.raises(ConfigError, match=f"more than {most} MMIO claims"):
        dispatch.attach(dispatch.mmio, 16 * most, 8, Fixed(0), None)
    dispatch.detach(dispatch.mmio, claims[7])
    dispatch.attach(dispatch.mmio, 16 * most, 8, Fixed(0), None)


def test_unclaimed_accesses_are_reported_one_by_one() -> None:
    said: list[str] = []
    dispatch = Dispatch(said.append)
    read_hot(dispatch, 0x77, 2)
    dispatch.write(dispatch.mmio, 0xABC000, 8, 0x1234)
    assert said == [
        "2-byte read at port 0x77, which no device claims",
        "8-byte write of 0x1234 at MMIO 0xabc000, which no device claims",
    ]
