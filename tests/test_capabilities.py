"""The capability table against the host's kernel header."""

import re
from pathlib import Path

import pytest

from kvmpy.capabilities import ALLOWS, CAPABILITIES

HEADER = Path("/usr/include/linux/kvm.h")
OTHER_ARCHITECTURES = ("ARM_", "MIPS_", "PPC_", "S390_", "SPAPR_", "RISCV_", "LOONGARCH_")


@pytest.fixture(scope="module")
def header() -> dict[str, int]:
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not installed (linux-libc-dev)")
    found = re.findall(r"^\s*#define\s+KVM_CAP_(\w+)\s+(\d+)", HEADER.read_text(), re.MULTILINE)
    assert len(found) > 200, "the pattern no longer fits the header"
    return {name: int(number) for name, number in found}


def test_every_name_of_the_header_has_the_same_number_here(header: dict[str, int]) -> None:
    last = max(CAPABILITIES.values())
    # A header newer than the table may end with capabilities that the table does not know.
    expected = {name: number for name, number in header.items() if number <= last}
    assert {name: CAPABILITIES.get(name) for name in expected} == expected


def test_names_that_the_header_lacks_are_newer_or_of_another_architecture(
    header: dict[str, int],
) -> None:
    last = max(header.values())
    strange = {
        name: number
        for name, number in CAPABILITIES.items()
        if name not in header and number <= last and not name.startswith(OTHER_ARCHITECTURES)
    }
    assert strange == {}


def test_each_number_has_one_name_in_ascending_order() -> None:
    numbers = list(CAPABILITIES.values())
    assert numbers == sorted(set(numbers))


def test_a_few_numbers_known_by_heart() -> None:
    known = {"USER_MEMORY": 3, "SYNC_REGS": 74, "IMMEDIATE_EXIT": 136, "GUEST_MEMFD": 234}
    assert {name: CAPABILITIES[name] for name in known} == known


def test_what_is_explained_exists_and_is_one_plain_line() -> None:
    assert set(ALLOWS) <= set(CAPABILITIES)
    for name, text in ALLOWS.items():
        assert text == text.strip() and "\n" not in text and len(text) < 90, name
        assert not text.endswith("."), name


def test_every_newer_x86_capability_is_explained() -> None:
    newer = {
        name
        for name, number in CAPABILITIES.items()
        if number > 223
        and not name.startswith(OTHER_ARCHITECTURES)
        and name != "COUNTER_OFFSET"  # an arm64 timer offset, in spite of its name
    }
    assert newer <= set(ALLOWS)
