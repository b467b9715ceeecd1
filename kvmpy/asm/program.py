"""What `assemble` returns: bytes that know their origin, their symbols and their source."""

from typing import Any, NamedTuple

__all__ = ["ListingLine", "Program"]

_ROW = 8
"""Bytes shown on one row of a listing."""

_ROWS = 4
"""Rows shown of one statement; what is left out is counted."""


class ListingLine(NamedTuple):
    """One statement of the source, or one line that holds none, and what it became.

    `line` counts from 1, `address` is guest-physical, `data` is empty where the statement
    makes no bytes.
    """

    line: int
    address: int
    data: bytes
    text: str


class Program(bytes):
    """Assembled bytes. A slice of them is plain bytes.

    `origin` is the guest address of the first byte; `symbols` maps each label and constant
    to its value, labels as absolute guest addresses; `listing` has the source in order.
    """

    origin: int
    symbols: dict[str, int]
    listing: tuple[ListingLine, ...]

    def __new__(
        cls,
        data: bytes = b"",
        origin: int = 0,
        symbols: dict[str, int] | None = None,
        listing: tuple[ListingLine, ...] = (),
    ) -> "Program":
        """Make a program of bytes assembled elsewhere, such as golden bytes."""
        program = super().__new__(cls, data)
        program.origin = origin
        program.symbols = dict(symbols or {})
        program.listing = tuple(listing)
        return program

    def __getnewargs__(self) -> Any:
        return (bytes(self), self.origin, self.symbols, self.listing)

    def __repr__(self) -> str:
        return f"<Program of {len(self)} bytes at {self.origin:#x}>"

    def format_listing(self) -> str:
        """Addresses and bytes side by side with the source, then the symbols by value."""
        end = self.origin + len(self)
        digits = 8 if end < 1 << 32 else 16
        rows = [row for line in self.listing for row in _format_line(line, digits)]
        if self.symbols:
            rows += ["", "Symbols"]
            ordered = sorted(self.symbols.items(), key=lambda item: (item[1], item[0]))
            rows += [f"{_hexadecimal(value, digits)}  {name}" for name, value in ordered]
        return "\n".join(rows) + "\n"


def _format_line(line: ListingLine, digits: int) -> list[str]:
    """One listing line as text; long data goes on rows of its own."""
    shown = line.data[: _ROW * _ROWS]
    chunks = [shown[i : i + _ROW] for i in range(0, len(shown), _ROW)] or [b""]
    width = 3 * _ROW - 1
    address = _hexadecimal(line.address, digits)
    rows = [f"{line.line:5d}  {address}  {chunks[0].hex(' '):{width}}  {line.text}".rstrip()]
    for index, chunk in enumerate(chunks[1:], 1):
        address = _hexadecimal(line.address + index * _ROW, digits)
        rows.append(f"{'':5}  {address}  {chunk.hex(' ')}")
    hidden = len(line.data) - len(shown)
    if hidden:
        rows.append(f"{'':5}  {'':{digits}}  ... {hidden} more bytes")
    return rows


def _hexadecimal(value: int, digits: int) -> str:
    """A value in `digits` hexadecimal digits; a negative constant keeps its sign."""
    return f"-{-value:0{digits - 1}x}" if value < 0 else f"{value:0{digits}x}"
