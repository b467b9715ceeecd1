import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.abi import ffi
from kvmpy.devices import Capture, Constant, Counter, EndRun, Sink
from kvmpy.errors import ConfigError

SIZES = [1, 2, 4, 8]
ONES = {size: (1 << 8 * size) - 1 for size in SIZES}

accesses = st.sampled_from(SIZES).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(0, ONES[size]))
)


class FakeLoop:
    """Stands for what the C loop holds."""

    def __init__(self, hits: int = 0, data: bytes = b"") -> None:
        self.count = hits
        self.data = data

    def hits(self) -> int:
        return self.count

    def take(self) -> bytes:
        data, self.data = self.data, b""
        return data


@pytest.mark.parametrize(
    "device", [Sink(), Capture(), Counter(), EndRun()], ids=lambda device: device.name
)
def test_reads_are_all_ones(device):
    assert device.backing is None
    assert {size: device.read(3, size) for size in SIZES} == ONES


def test_sink_drops_writes():
    device = Sink()
    device.write(0, 4, 0x1234)
    assert device.read(0, 4) == ONES[4]


@given(st.integers(0, ONES[8]), st.sampled_from(SIZES))
def test_constant_is_cut_to_the_access(value, size):
    device = Constant(value)
    device.write(0, size, 0)
    assert device.read(5, size) == value % (1 << 8 * size)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_constant_must_fit(value):
    with pytest.raises(ConfigError, match="64 bits"):
        Constant(value)


@given(st.lists(accesses))
def test_capture_keeps_the_bytes_of_every_write(writes):
    device = Capture()
    for size, value in writes:
        device.write(0, size, value)
    expected = b"".join(value.to_bytes(size, "little") for size, value in writes)
    assert device.data() == expected
    assert device.data() == expected
    device.clear()
    assert device.data() == b""


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=20))))
def test_capture_keeps_the_guests_order_across_c_and_python(writes):
    device = Capture()
    loop = device.backing = FakeLoop()
    for in_c, data in writes:
        if in_c:
            loop.data += data
        else:
            for byte in data:
                device.write(0, 1, byte)
    device.release()
    assert device.backing is None
    assert device.data() == b"".join(data for _, data in writes)


def test_capture_clears_what_c_holds():
    device = Capture()
    device.backing = FakeLoop(data=b"old")
    device.clear()
    device.write(0, 1, ord("n"))
    assert device.data() == b"n"


def test_capture_must_hold_one_write():
    assert Capture(8).capacity == 8
    with pytest.raises(ConfigError, match="capacity of 7 bytes"):
        Capture(7)


def test_counter_counts_reads_and_writes():
    device = Counter()
    device.read(0, 1)
    device.write(0, 1, 0)
    device.write(1, 4, 7)
    assert device.count == 3


def test_counter_includes_what_c_has_counted_and_keeps_it():
    device = Counter()
    loop = device.backing = FakeLoop(hits=5)
    device.write(0, 1, 0)
    assert device.count == 6
    loop.count = 10
    assert device.count == 11
    device.release()
    loop.count = 99
    assert device.count == 11
    device.release()
    assert device.count == 11


@pytest.mark.parametrize("device", [Sink(), Constant(1)], ids=lambda device: device.name)
def test_release_lets_go_of_the_backing(device):
    device.backing = FakeLoop()
    device.release()
    assert device.backing is None


def test_the_end_of_a_run_is_told_to_the_machine():
    device, ended = EndRun(), []
    device.write(0, 1, 1)  # attached to nothing
    device.on_end = ended.append
    device.write(0, 4, 77)
    assert ended == [77]


@pytest.mark.parametrize("again", [copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_attached_to_nothing_and_has_what_c_has_collected(again):
    capture, counter, end, constant = Capture(), Counter(), EndRun(), Constant(7)
    capture.write(0, 1, 0x61)
    capture.backing = FakeLoop(data=b"b")
    counter.write(0, 1, 0)
    counter.backing = FakeLoop(hits=5)
    loop = constant.backing = end.backing = FakeLoop()
    loop.handle = ffi.new_handle(loop)  # no C data can be pickled
    end.on_end = [].append
    for device in (capture, counter, end, constant):
        device.backing.handle = loop.handle
        made = again(device)
        assert type(made) is type(device)
        assert made.backing is None
    assert again(end).on_end is None
    assert again(constant).read(0, 1) == 7
    assert again(counter).count == counter.count == 6
    made = again(capture)
    made.write(0, 1, 0x63)
    assert (made.data(), capture.data()) == (b"abc", b"ab")
