import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.bus import Bus, Claim, FunctionDevice, Unclaimed, ones
from kvmpy.errors import AddressError, DeviceError, OverlapError

PORTS = 0x10000


class Stub:
    def __init__(self, name: str = "stub") -> None:
        self.name = name

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def ports() -> Bus:
    return Bus("port", PORTS)


@pytest.mark.parametrize(
    ("size", "value"),
    [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF), (8, 0xFFFF_FFFF_FFFF_FFFF), (3, 0xFF_FFFF)],
)
def test_ones(size, value):
    assert ones(size) == value


def test_a_claim_is_found_at_each_of_its_addresses_and_nowhere_else():
    bus = ports()
    claim = bus.attach(0x3F8, 8, Stub("serial"))
    assert (claim.base, claim.size, claim.end, claim.name) == (0x3F8, 8, 0x400, "serial")
    assert [bus.find(port) for port in range(0x3F8, 0x400)] == [claim] * 8
    assert bus.find(0x3F7) is None
    assert bus.find(0x400) is None


def test_a_name_replaces_the_devices_own():
    assert ports().attach(0, 1, Stub("stub"), name="COM1").name == "COM1"


def test_claims_that_touch_do_not_overlap():
    bus = ports()
    middle = bus.attach(0x10, 0x10, Stub())
    after = bus.attach(0x20, 1, Stub())
    before = bus.attach(0xF, 1, Stub())
    assert list(bus) == [before, middle, after]
    assert len(bus) == 3


@pytest.mark.parametrize(
    ("base", "size"), [(0x3F0, 9), (0x3FF, 1), (0x3F8, 8), (0x3F0, 0x20), (0x3FA, 2), (0x3FF, 9)]
)
def test_an_overlap_names_both_owners_and_both_ranges(base, size):
    bus = ports()
    bus.attach(0x3F8, 8, Stub("serial"))
    with pytest.raises(OverlapError) as caught:
        bus.attach(base, size, Stub("modem"))
    message = str(caught.value)
    span = f"{base:#x}" if size == 1 else f"{base:#x}-{base + size - 1:#x}"
    assert f"{span} of modem" in message
    assert "0x3f8-0x3ff of serial" in message
    assert "\n" not in message
    assert len(bus) == 1


@pytest.mark.parametrize(
    ("base", "size"), [(-1, 2), (PORTS, 1), (PORTS - 1, 2), (0, PORTS + 1), (1 << 70, 1)]
)
def test_a_claim_outside_of_the_bus_is_refused(base, size):
    bus = ports()
    with pytest.raises(AddressError, match=r"outside of the bus.*0x0 to 0xffff"):
        bus.attach(base, size, Stub())
    assert len(bus) == 0


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_claim_is_refused(size):
    with pytest.raises(AddressError, match="empty"):
        ports().attach(0x10, size, Stub())


def test_the_whole_bus_can_be_one_claim():
    bus = Bus("MMIO", 1 << 52)
    claim = bus.attach(0, 1 << 52, Stub())
    assert bus.find((1 << 52) - 1) is claim
    assert bus.find(1 << 52) is None


def test_detach_frees_the_range_for_another():
    bus = ports()
    claim = bus.attach(0x10, 4, Stub("old"))
    bus.detach(claim)
    assert bus.find(0x10) is None
    assert bus.attach(0x12, 4, Stub("new")).name == "new"


def test_detach_of_what_is_not_attached_is_refused():
    bus = ports()
    device = Stub()
    claim = bus.attach(0x10, 4, device)
    twin = Claim(0x10, 4, device, claim.name)
    with pytest.raises(AddressError, match="0x10-0x13 of stub is not attached"):
        bus.detach(twin)
    assert bus.find(0x10) is claim
    bus.detach(claim)
    with pytest.raises(AddressError, match="not attached"):
        bus.detach(claim)


def test_claims_can_be_detached_while_iterating():
    bus = ports()
    for base in range(5):
        bus.attach(base, 1, Stub())
    for claim in bus:
        bus.detach(claim)
    assert len(bus) == 0


SMALL = 48
steps = st.lists(
    st.tuples(
        st.sampled_from(["attach", "attach", "detach"]),
        st.integers(-2, SMALL + 2),
        st.integers(0, 12),
    ),
    max_size=40,
)


@given(steps)
def test_a_bus_does_what_a_list_of_owners_does(steps):
    bus = Bus("port", SMALL)
    owners: list[Claim | None] = [None] * SMALL
    for what, base, size in steps:
        inside = size > 0 and base >= 0 and base + size <= SMALL
        if what == "attach" and not inside:
            with pytest.raises(AddressError):
                bus.attach(base, size, Stub())
        elif what == "attach" and any(owners[base : base + size]):
            with pytest.raises(OverlapError):
                bus.attach(base, size, Stub())
        elif what == "attach":
            owners[base : base + size] = [bus.attach(base, size, Stub())] * size
        elif (claim := bus.find(base)) is not None:
            bus.detach(claim)
            owners = [None if owner is claim else owner for owner in owners]
        assert [bus.find(address) for address in range(SMALL)] == owners
        assert list(bus) == list(dict.fromkeys(owner for owner in owners if owner))
        assert len(bus) == len(list(bus))


def test_a_function_is_a_device():
    calls = []

    def doorbell(offset, size, value):
        calls.append((offset, size, value))
        return 0x5A if value is None else "ignored"

    device = FunctionDevice(doorbell)
    assert device.name == "doorbell"
    assert device.read(1, 2) == 0x5A
    assert device.write(3, 4, 0) is None
    assert calls == [(1, 2, None), (3, 4, 0)]


def test_a_function_that_does_not_answer_a_read_is_named():
    def doorbell(offset, size, value):
        return None

    with pytest.raises(DeviceError, match="doorbell answered a read of 4 bytes at offset 0x2"):
        FunctionDevice(doorbell).read(2, 4)


def test_a_callable_without_a_name_goes_by_its_type():
    class Bell:
        def __call__(self, offset, size, value):
            return 0

    assert FunctionDevice(Bell()).name == "Bell"


def test_unclaimed_accesses_are_counted_by_address_and_reported_in_order():
    unclaimed = Unclaimed("port")
    for size in (1, 2, 4):
        unclaimed.count(0x1234, size, is_write=True)
    unclaimed.count(0x1234, 1, is_write=False)
    unclaimed.count(0x20, 1, is_write=False, times=5)
    assert unclaimed.reads == {0x1234: 1, 0x20: 5}
    assert unclaimed.writes == {0x1234: 3}
    assert unclaimed.accesses[0x1234, 2, True] == 1
    assert unclaimed.total == 9
    assert unclaimed.lines() == ["port 0x20: 5 reads", "port 0x1234: 3 writes, 1 read"]
    unclaimed.clear()
    assert (unclaimed.total, unclaimed.reads, unclaimed.writes) == (0, {}, {})
    assert unclaimed.lines() == []


def test_a_guest_that_sweeps_addresses_does_not_fill_memory():
    unclaimed = Unclaimed("MMIO")
    kept = Unclaimed.MAX_DISTINCT
    for address in range(kept + 3):
        unclaimed.count(address, 8, is_write=False)
    unclaimed.count(0, 8, is_write=False)
    assert unclaimed.total == kept + 4
    assert len(unclaimed.reads) == kept
    assert unclaimed.reads[0] == 2
    assert unclaimed.other == 3
    assert unclaimed.lines()[-1] == "other MMIO addresses: 3 accesses"


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 4]), st.booleans())))
def test_no_unclaimed_access_is_lost(accesses):
    unclaimed = Unclaimed("port")
    for access in accesses:
        unclaimed.count(*access)
    assert unclaimed.total == len(accesses)
    assert sum(unclaimed.reads.values()) == sum(not write for _, _, write in accesses)
    assert sum(unclaimed.writes.values()) == sum(write for _, _, write in accesses)
