"""Sizes and addresses as people write them ("16M", "0x7c00"), and counts within bounds."""

from operator import index

from kvmpy.errors import ConfigError

__all__ = ["MAXIMUM_ADDRESS", "check_count", "parse_address", "parse_size"]

# Physical addresses have at most 52 bits (SDM volume 3A, section 4.1.4, MAXPHYADDR).
MAXIMUM_ADDRESS = (1 << 52) - 1

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LONGEST_SHOWN = 40


def parse_size(size: str | int) -> int:
    """Return `size` in bytes: a number with an optional binary suffix K, M, G or T.

    "1M" is 1048576; "4096", "0x1000" and the integer 4096 are 4096. Raises ConfigError for
    anything else, for zero and less, and for more than the 4 PiB that 52 address bits reach.
    """
    if isinstance(size, str):
        text = size.strip()
        unit = _UNITS.get(text[-1:].upper(), 0)
        number = _integer(text[:-1] if unit else text)
        count = None if number is None else number * (unit or 1)
    else:
        count = _plain(size)
    if count is None:
        raise ConfigError(
            f"{_shown(size)} is not a size: give bytes, or a number with K, M, G or T"
        )
    if count <= 0:
        raise ConfigError(f"a size of {_shown(size)} is no use: give at least one byte")
    if count > MAXIMUM_ADDRESS + 1:
        raise ConfigError(f"a size of {_shown(size)} is too large: 52 address bits reach 4096T")
    return count


def parse_address(address: str | int) -> int:
    """Return `address` as an integer: decimal, or with 0x, 0o or 0b before it.

    Raises ConfigError for anything else, and for addresses below 0 or of more than 64 bits.
    """
    number = _integer(address.strip()) if isinstance(address, str) else _plain(address)
    if number is None:
        raise ConfigError(f"{_shown(address)} is not an address: write it as 0x7c00 or 31744")
    if not 0 <= number < 1 << 64:
        raise ConfigError(f"address {_shown(address)} is not between 0 and 0xffffffffffffffff")
    return number


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Raise ConfigError unless the option `name` is an integer of 1 or more, up to `most`."""
    number = _index(value)
    if number is None or not 1 <= number <= (number if most is None else most):
        bounds = "1 or more" if most is None else f"1 to {most}"
        raise ConfigError(f"{name}={_shown(value)}: give {bounds}")


def _index(value: object) -> int | None:
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _integer(text: str) -> int | None:
    """The integer that `text` writes in Python's way, or None."""
    try:
        return int(text, 0)
    except ValueError:
        return None


def _plain(value: object) -> int | None:
    """`value` if it is an integer and not a truth value, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | bool) else _number_text(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _number_text(value: object) -> str:
    # Python refuses to write out integers of thousands of digits, but writes them in hex.
    return hex(value) if isinstance(value, int) and value.bit_length() > 64 else repr(value)
