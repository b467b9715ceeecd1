"""Exits decoded from struct kvm_run, filled at random; its layout is tested in test_abi.

The bytes are built here with `struct.pack`, from the kernel's header and not from the decoder.
"""

import struct
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmpy.exits import (
    REASONS,
    RUN_SIZE,
    Debug,
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    IrqWindowOpen,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    OtherExit,
    PortIn,
    PortOut,
    Shutdown,
    SystemEvent,
    UnknownExit,
    decode,
    exit_kind,
)

PAGE = 4096
MAPPING = 3 * PAGE  # struct kvm_run, the page of port data, the coalesced ring
DATA = PAGE  # where KVM puts port data

u8 = st.integers(0, 0xFF)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
sizes = st.sampled_from([1, 2, 4])


def mapping(reason: int, union: bytes, data: bytes = b"") -> bytearray:
    """A vCPU's mapping as KVM leaves it at an exit; the rest of it is noise."""
    run = bytearray(b"\xa5" * MAPPING)
    struct.pack_into("<I", run, 8, reason)
    run[32:288] = union.ljust(256, b"\x5a")
    run[DATA : DATA + len(data)] = data
    return run


def io(direction: int, size: int, port: int, count: int, offset: int = DATA) -> bytes:
    return struct.pack("<BBHIQ", direction, size, port, count, offset)


# Ports -------------------------------------------------------------------------------------


@given(port=u16, size=sizes, elements=st.lists(u32, min_size=1, max_size=1024))
def test_out_carries_each_element_of_a_string_instruction(
    port: int, size: int, elements: list[int]
) -> None:
    elements = [element % (1 << 8 * size) for element in elements]
    data = b"".join(element.to_bytes(size, "little") for element in elements)
    exit_ = decode(mapping(2, io(1, size, port, len(elements)), data))
    assert exit_ == PortOut(port, size, data, len(elements))
    assert isinstance(exit_, PortOut) and exit_.values == tuple(elements)


@given(port=u16, size=sizes, count=st.integers(1, 4096))
def test_in_asks_for_count_elements(port: int, size: int, count: int) -> None:
    assert decode(mapping(2, io(0, size, port, count))) == PortIn(port, size, count)


@given(direction=u8, size=u8, port=u16, count=u32, offset=u64)
@example(1, 4, 0x60, 0xFFFF_FFFF, 0)  # 16 GiB of data
@example(1, 1, 0x60, 10, MAPPING - 4)  # over the end
@example(1, 1, 0x60, 1, MAPPING)  # just behind the end
@example(1, 1, 0x60, 1, (1 << 64) - 1)
@example(1, 0, 0x60, 1, DATA)
@example(1, 0xFF, 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1)
def test_no_size_count_or_offset_reads_beyond_the_mapping(
    direction: int, size: int, port: int, count: int, offset: int
) -> None:
    run = mapping(2, io(direction, size, port, count, offset))
    exit_ = decode(run)
    if direction == 0:
        assert exit_ == PortIn(port, size, count)
    else:
        end = min(MAPPING, offset + size * count)
        assert exit_ == PortOut(port, size, bytes(run[offset:end]), count)


# MMIO --------------------------------------------------------------------------------------


@given(address=u64, data=st.binary(min_size=1, max_size=8))
def test_mmio_write_has_the_bytes_that_were_written(address: int, data: bytes) -> None:
    union = struct.pack("<Q8sIB", address, data.ljust(8, b"\xee"), len(data), 1)
    exit_ = decode(mapping(6, union))
    assert exit_ == MmioWrite(address, data)
    assert isinstance(exit_, MmioWrite) and exit_.value == int.from_bytes(data, "little")


@given(address=u64, size=st.integers(1, 8))
def test_mmio_read_asks_for_its_size(address: int, size: int) -> None:
    union = struct.pack("<Q8sIB", address, b"\xee" * 8, size, 0)
    assert decode(mapping(6, union)) == MmioRead(address, size)


@given(size=u32, is_write=st.integers(1, 255))
def test_mmio_write_of_a_wild_size_has_eight_bytes_at_most(size: int, is_write: int) -> None:
    union = struct.pack("<Q8sIB", 0, b"12345678", size, is_write)
    assert decode(mapping(6, union)) == MmioWrite(0, b"12345678"[:size])


# The others --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "exit_"), [(5, Halt()), (7, IrqWindowOpen()), (8, Shutdown())], ids=str
)
def test_exits_without_data(reason: int, exit_: Exit) -> None:
    assert decode(mapping(reason, b"\xff" * 256)) == exit_


@given(reason=u64, cpu=u32)
def test_refused_entry_and_unknown_exit(reason: int, cpu: int) -> None:
    assert decode(mapping(9, struct.pack("<QI", reason, cpu))) == FailEntry(reason, cpu)
    assert decode(mapping(0, struct.pack("<Q", reason))) == UnknownExit(reason)


@given(exception=u32, pc=u64, dr6=u64, dr7=u64)
def test_debug(exception: int, pc: int, dr6: int, dr7: int) -> None:
    union = struct.pack("<IIQQQ", exception, 0xDEAD, pc, dr6, dr7)
    assert decode(mapping(4, union)) == Debug(exception, pc, dr6, dr7)


@given(index=u32, reason=u32, value=u64, error=u8)
def test_msr(index: int, reason: int, value: int, error: int) -> None:
    union = struct.pack("<B7xIIQ", error, reason, index, value)
    assert decode(mapping(29, union)) == MsrRead(index, reason)
    assert decode(mapping(30, union)) == MsrWrite(index, value, reason)


counts = st.one_of(st.integers(0, 20), u32)


@given(kind=u32, ndata=counts, data=st.lists(u64, min_size=16, max_size=16))
def test_system_event_has_at_most_the_data_there_is(kind: int, ndata: int, data: list[int]) -> None:
    union = struct.pack("<II16Q", kind, ndata, *data)
    assert decode(mapping(24, union)) == SystemEvent(kind, tuple(data[:ndata]))


@given(suberror=u32, ndata=counts, data=st.lists(u64, min_size=16, max_size=16))
def test_internal_error_has_at_most_the_data_there_is(
    suberror: int, ndata: int, data: list[int]
) -> None:
    exit_ = decode(mapping(17, struct.pack("<II16Q", suberror, ndata, *data)))
    assert isinstance(exit_, InternalError)
    assert (exit_.suberror, exit_.data) == (suberror, tuple(data[:ndata]))
    assert exit_.reason and "\n" not in exit_.reason
    assert len(exit_.instruction) <= 15


@given(
    instruction=st.binary(min_size=15, max_size=15),
    size=u8,
    flags=st.integers(0, 3),
    ndata=st.integers(0, 8),
)
def test_emulation_failure_shows_the_instruction_if_it_is_there(
    instruction: bytes, size: int, flags: int, ndata: int
) -> None:
    union = struct.pack("<IIQB15s", 1, ndata, flags, size, instruction)
    exit_ = decode(mapping(17, union.ljust(256, b"\0")))
    there = flags & 1 and ndata >= 3
    assert isinstance(exit_, InternalError)
    assert exit_.instruction == (instruction[: min(size, 15)] if there else b"")


@pytest.mark.parametrize("suberror", [2, 3, 4])
def test_only_an_emulation_failure_has_an_instruction(suberror: int) -> None:
    union = struct.pack("<IIQB15s", suberror, 4, 1, 15, b"\x90" * 15)
    exit_ = decode(mapping(17, union))
    assert isinstance(exit_, InternalError) and exit_.instruction == b""


def test_unheard_of_suberror_is_named_by_number() -> None:
    assert InternalError(77, ()).reason == "suberror 77"


@given(reason=u32.filter(lambda reason: reason not in (0, 2, 4, 5, 6, 7, 8, 9, 17, 24, 29, 30)))
def test_any_other_reason_is_kept_whole(reason: int) -> None:
    union = bytes(range(256))
    exit_ = decode(mapping(reason, union))
    assert exit_ == OtherExit(reason, REASONS.get(reason, f"exit-{reason}"), union)


@given(reason=st.one_of(st.sampled_from(sorted(REASONS)), u32), union=st.binary(max_size=256))
@example(2, b"")
@example(17, b"\x01\0\0\0" + b"\xff" * 252)
@example(24, b"\xff" * 256)
@example(6, b"\xff" * 256)
def test_whatever_the_struct_holds_an_exit_comes_out(reason: int, union: bytes) -> None:
    run = mapping(reason, union)
    before = bytes(run)
    assert isinstance(decode(run), Exit)
    # A mapping and its views decode alike, and none of them is written to.
    assert decode(memoryview(run)) == decode(bytes(run)) == decode(run)
    assert run == before


@given(union=st.binary(min_size=256, max_size=256), reason=st.sampled_from(sorted(REASONS)))
def test_the_exit_struct_alone_is_enough(union: bytes, reason: int) -> None:
    run = mapping(reason, union)[:RUN_SIZE]
    assert isinstance(decode(run), Exit)


# The values --------------------------------------------------------------------------------


def test_exits_are_frozen_values() -> None:
    for exit_ in (
        PortIn(1, 2),
        PortOut(1, 1, b"a"),
        MmioRead(1, 4),
        Halt(),
        Interrupted("stopped"),
    ):
        assert hash(exit_) == hash(type(exit_)(*(getattr(exit_, f.name) for f in fields(exit_))))
        with pytest.raises((FrozenInstanceError, TypeError)):
            exit_.anything = 1  # type: ignore[union-attr]


def test_they_match() -> None:
    match decode(mapping(2, io(1, 1, 0xE9, 1), b"A")):
        case PortOut(port=0xE9, data=data):
            assert data == b"A"
        case other:
            pytest.fail(f"{other} does not match")


def test_kinds_tell_reads_from_writes() -> None:
    assert (exit_kind(2), exit_kind(2, True)) == ("port-in", "port-out")
    assert (exit_kind(6), exit_kind(6, True)) == ("mmio-read", "mmio-write")
    assert (exit_kind(5), exit_kind(8, True), exit_kind(63)) == ("halt", "shutdown", "exit-63")


def test_kinds_are_distinct() -> None:
    kinds = {exit_kind(reason, write) for reason in range(64) for write in (False, True)}
    assert len(kinds) == 64 + 2
