"""Which instructions touch memory, and how: what Capstone does not say, or says wrongly."""

from typing import Final

__all__ = [
    "BIT_TESTS",
    "FAR_LOADS",
    "NO_ACCESS",
    "POPS",
    "PUSHES",
    "READ_FIRST",
    "STRINGS",
    "WRITE_ONLY_OPERAND",
    "is_hint",
    "is_too_long",
]

NO_ACCESS: Final = ("lea", "nop", "invlpg", "prefetch", "cldemote", "bnd")
"""What instructions begin with whose operand in memory is only an address."""
BIT_TESTS: Final = ("bt", "btc", "btr", "bts")
"""Those that look as far from their operand as a bit number in a register says."""
FAR_LOADS: Final = ("lds", "les", "lfs", "lgs", "lss")
"""Those that load a far pointer."""

# Capstone's own word on reads and writes is wrong for shifts, SETcc, stores of SSE, and others.
READ_FIRST: Final = frozenset(("cmp", "test", "bt", "scas", "cmps", "outs", "lods"))
"""Those of several operands that do not write to the first; the others do."""
WRITE_ONLY_OPERAND: Final = frozenset(
    (
        *("inc", "dec", "neg", "not", "pop", "sgdt", "sidt", "sldt", "str", "smsw", "stmxcsr"),
        *("fst", "fstp", "fist", "fistp", "fisttp", "fbstp", "fnstcw", "fnstenv", "fnsave"),
        *("fnstsw", "fxsave", "fxsave64", "xsave", "xsave64", "xsavec", "xsaveopt", "xsaves"),
        *("cmpxchg8b", "cmpxchg16b", "rol", "ror", "rcl", "rcr", "shl", "sal", "shr", "sar"),
    )
)
"""Those that write to the only operand that Capstone shows; the others read it."""

STRINGS: Final = tuple(
    name + size
    for name in ("movs", "stos", "lods", "cmps", "scas", "ins", "outs")
    for size in "bwdq"
)
"""String operations, each with its size."""
PUSHES: Final = {"push": 1, "call": 1, "lcall": 2, "enter": 1, "pushal": 8, "pushaw": 8}
POPS: Final = {"pop": 1, "ret": 1, "retf": 2, "retfq": 2, "popal": 8, "popaw": 8}
"""How many slots of the stack they write, and read."""

_PREFIXES: Final = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3)) + bytes(
    range(0x40, 0x50)
)
_HINTS: Final = tuple(bytes((code,)) for code in (0x0D, *range(0x18, 0x20)))


def is_too_long(code: bytes) -> bool:
    """Whether bytes are prefixes all the way to the longest instruction (SDM Vol.2 2.3.11)."""
    return len(code) == 15 and not code.strip(_PREFIXES)


def is_hint(code: bytes) -> bool:
    """Whether bytes that Capstone does not know are a NOP with an operand (0F 0D, 0F 18 to 1F)."""
    opcode = code.lstrip(_PREFIXES)
    return opcode[:1] == b"\x0f" and opcode[1:2] in _HINTS
