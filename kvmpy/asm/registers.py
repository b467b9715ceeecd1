"""The names that mean registers, and the words that Intel syntax reserves.

Source: Intel SDM Vol. 1 section 3.4 and Vol. 2 section 2.
"""

__all__ = [
    "ADDRESS_BITS",
    "KEYWORDS",
    "LONG_ONLY",
    "POINTER_SIZES",
    "REGISTERS",
    "SEGMENT_PREFIXES",
    "is_reserved",
]

_LEGACY = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_NUMBERED = range(8, 16)

_WORDS = set(_LEGACY) | {f"r{n}w" for n in _NUMBERED}
_DWORDS = {f"e{name}" for name in _LEGACY} | {f"r{n}d" for n in _NUMBERED}
_QWORDS = {f"r{name}" for name in _LEGACY} | {f"r{n}" for n in _NUMBERED}
_BYTES = {"al", "cl", "dl", "bl", "ah", "ch", "dh", "bh", "spl", "bpl", "sil", "dil"} | {
    f"r{n}b" for n in _NUMBERED
}

SEGMENT_PREFIXES = {"es": 0x26, "cs": 0x2E, "ss": 0x36, "ds": 0x3E, "fs": 0x64, "gs": 0x65}
"""Segment registers and the prefix byte that overrides with each."""

_VECTORS = {f"{kind}mm{n}" for kind in "xyz" for n in range(32)}

ADDRESS_BITS = (
    dict.fromkeys(_LEGACY, 16)
    | dict.fromkeys(_DWORDS | {"eip"}, 32)
    | dict.fromkeys(_QWORDS | {"rip"}, 64)
    | dict.fromkeys(_VECTORS, 0)
)
"""Registers that may stand inside brackets, and the address size each asks for.

Vector registers are indices of gathers and scatters and ask for none of their own."""

REGISTERS = (
    _BYTES
    | _WORDS
    | _DWORDS
    | _QWORDS
    | _VECTORS
    | set(SEGMENT_PREFIXES)
    | {"rip", "eip", "st"}
    | {f"st({n})" for n in range(8)}
    | {f"{kind}{n}" for kind in ("cr", "dr") for n in range(16)}
    | {f"{kind}{n}" for kind in ("mm", "k") for n in range(8)}
    | {f"bnd{n}" for n in range(4)}
)
"""Every name that is a register, in lower case."""

LONG_ONLY = (
    _QWORDS
    | {"spl", "bpl", "sil", "dil", "rip", "eip"}
    | {f"r{n}{suffix}" for n in _NUMBERED for suffix in "bwd"}
    | {f"{kind}mm{n}" for kind in "xyz" for n in range(8, 32)}
    | {f"{kind}{n}" for kind in ("cr", "dr") for n in _NUMBERED}
)
"""Registers that need a REX, VEX or EVEX bit that only 64-bit code has."""

POINTER_SIZES = {
    "byte": 1,
    "word": 2,
    "dword": 4,
    "fword": 6,
    "qword": 8,
    "mmword": 8,
    "tbyte": 10,
    "xmmword": 16,
    "oword": 16,
    "ymmword": 32,
    "zmmword": 64,
}
"""Words that give the size of an operand, in bytes."""

KEYWORDS = frozenset(POINTER_SIZES) | {"ptr", "offset", "short", "near", "far"}
"""Words that mean something in an operand, in lower case."""


def is_reserved(name: str) -> bool:
    """Whether `name` cannot be a symbol because Intel syntax gives it a meaning."""
    lower = name.lower()
    return lower in REGISTERS or lower in KEYWORDS
