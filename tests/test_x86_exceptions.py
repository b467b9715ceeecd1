"""Exception frames decoded."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import ConfigError
from kvmpy.x86.exceptions import ERROR_CODE_VECTORS, EXCEPTIONS, decode_exception

quad = st.integers(0, 2**64 - 1)
selector = st.integers(0, 0xFFFF)


@given(st.integers(0, 255), quad, selector, quad, quad, selector, quad, st.integers(0, 0xFFFF))
def test_long_mode_frames(
    vector: int, rip: int, cs: int, rflags: int, rsp: int, ss: int, cr2: int, code: int
) -> None:
    words = [rip, cs, rflags, rsp, ss]
    if vector in ERROR_CODE_VECTORS:
        words.insert(0, code)
    found = decode_exception(vector, struct.pack(f"<{len(words)}Q", *words) + bytes(8), cr2)
    assert (found.rip, found.cs, found.rflags, found.rsp, found.ss) == (rip, cs, rflags, rsp, ss)
    assert found.error_code == (code if vector in ERROR_CODE_VECTORS else None)
    assert found.address == (cr2 if vector == 14 else None)
    assert found.name == EXCEPTIONS.get(vector, (f"vector {vector}",))[0]
    assert f"{rip:#x}" in str(found)


def test_a_protected_mode_frame() -> None:
    frame = struct.pack("<6I", 4, 0x1010, 0xDEAD_0023, 0x10202, 0x3000, 0xBEEF_002B)
    found = decode_exception(14, frame, 0xC000_0000, bits=32)
    assert (found.name, found.error_code, found.address) == ("#PF", 4, 0xC000_0000)
    assert (found.rip, found.cs, found.rflags) == (0x1010, 0x23, 0x10202)
    assert (found.rsp, found.ss) == (0x3000, 0x2B)


def test_the_error_code_vectors_are_those_of_the_sdm() -> None:
    assert {8, 10, 11, 12, 13, 14, 17, 21, 29, 30} == ERROR_CODE_VECTORS
    assert set(EXCEPTIONS) >= ERROR_CODE_VECTORS
    assert EXCEPTIONS[0] == ("#DE", "divide error")
    assert EXCEPTIONS[13][0] == "#GP"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0b00100, "user read of an unmapped"),
        (0b00111, "user write to a protected"),
        (0b00010, "supervisor write to an unmapped"),
        (0b10101, "user fetch from a protected"),
        (0b01101, "user read of an entry with reserved bits at"),
    ],
)
def test_a_page_fault_says_what_was_tried(code: int, words: str) -> None:
    frame = struct.pack("<6Q", code, 0x1000, 0x33, 2, 0x2000, 0x2B)
    text = str(decode_exception(14, frame, 0x5000))
    assert text == (f"#PF (page fault) at rip 0x1000, error code {code:#x}: {words} address 0x5000")


@pytest.mark.parametrize(
    ("vector", "size", "bits", "named"),
    [
        (256, 48, 64, "256"),
        (-1, 48, 64, "-1"),
        (3, 47, 64, "47"),
        (3, 23, 32, "23"),
        (3, 48, 16, "16"),
    ],
)
def test_what_is_no_frame_is_refused(vector: int, size: int, bits: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        decode_exception(vector, bytes(size), 0, bits=bits)
