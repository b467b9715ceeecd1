"""Sizes and addresses as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import ConfigError
from kvmpy.sizes import MAXIMUM_ADDRESS, parse_address, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        (4096, 4096),
        ("0x1000", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("1M", 1 << 20),
        (" 16M ", 16 << 20),
        ("2G", 2 << 30),
        ("4096T", MAXIMUM_ADDRESS + 1),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "1.5M", "1MM", "1 000", "M1", "-", "one", "1E6", "\0", "0x", 1.5, True, None]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", 0, "0M", "-1", -4096, "-16M"])
def test_sizes_of_nothing(text: str | int) -> None:
    with pytest.raises(ConfigError, match="at least one byte"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["4097T", 1 << 53, pytest.param(1 << 20000, id="20000 bits"), "9" * 200]
)
def test_absurd_sizes(text: str | int) -> None:
    with pytest.raises(ConfigError, match="too large"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "address"), [("0", 0), ("31744", 0x7C00), ("0x7c00", 0x7C00), (0x7C00, 0x7C00)]
)
def test_addresses(text: str | int, address: int) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "7c00", "0x", "1M", "here", False, 1.0])
def test_what_is_no_address(text: object) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        parse_address(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["-1", -1, 1 << 64, "0x1" + "0" * 16])
def test_addresses_out_of_64_bits(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not between"):
        parse_address(text)


@given(st.text(max_size=60) | st.from_regex(r"-?[0-9]{1,6000}[KMGTx]?", fullmatch=True))
def test_any_text_is_a_number_or_a_config_error_of_one_short_line(text: str) -> None:
    for parse in (parse_size, parse_address):
        try:
            assert parse(text) >= 0
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 150
