"""Near jumps, calls and loops with a target: encoded here, not by Keystone.

Keystone always takes the 32-bit form in 16-bit code and reports no sizes; a short form is
used wherever the target is in its reach. Source: Intel SDM Vol. 2, JMP, CALL, Jcc, LOOP.
"""

from kvmpy.errors import AssemblyError

__all__ = ["BRANCHES", "encode_branch", "is_short_only"]

_CODES = (
    *("o", "no", "b c nae", "ae nb nc", "e z", "ne nz", "be na", "a nbe"),
    *("s", "ns", "p pe", "np po", "l nge", "ge nl", "le ng", "g nle"),
)
"""The condition codes' names, in the order of their numbers (SDM Vol. 1 appendix B)."""

_CONDITIONS = {name: code for code, names in enumerate(_CODES) for name in names.split()}
_LOOPS = {
    "loopne": 0xE0,
    "loopnz": 0xE0,
    "loope": 0xE1,
    "loopz": 0xE1,
    "loop": 0xE2,
    "jcxz": 0xE3,
    "jecxz": 0xE3,
    "jrcxz": 0xE3,
}
_COUNTER_BITS = {"jcxz": 16, "jecxz": 32, "jrcxz": 64}
_SHORT = (
    {"jmp": b"\xeb"}
    | {f"j{name}": bytes([0x70 + code]) for name, code in _CONDITIONS.items()}
    | {name: bytes([code]) for name, code in _LOOPS.items()}
)
_NEAR = {"jmp": b"\xe9", "call": b"\xe8"} | {
    f"j{name}": bytes([0x0F, 0x80 + code]) for name, code in _CONDITIONS.items()
}

BRANCHES = frozenset(_SHORT) | frozenset(_NEAR)
"""Mnemonics whose only operand can be a target."""


def is_short_only(mnemonic: str) -> bool:
    """Whether the branch has no form that reaches further than 127 bytes."""
    return mnemonic not in _NEAR


def encode_branch(bits: int, mnemonic: str, distance: str, target: int, address: int) -> bytes:
    """A branch at `address` to the address `target`.

    `distance` is "short", "near" or "" for the shorter form that reaches. Raises
    AssemblyError for a target out of reach and for a counter register the mode lacks.
    """
    prefix = _counter_prefix(bits, mnemonic)
    if not 0 <= target < 1 << (64 if bits == 64 else 32):
        raise AssemblyError(f"the target {target:#x} is outside of the address space")
    if mnemonic in _SHORT and distance != "near":
        opcode = prefix + _SHORT[mnemonic]
        offset = target - (address + len(opcode) + 1)
        if -128 <= offset <= 127:
            return opcode + offset.to_bytes(1, "little", signed=True)
        if distance == "short" or mnemonic not in _NEAR:
            raise AssemblyError(f"the target {target:#x} is {offset} bytes away: 127 are in reach")
    if mnemonic not in _NEAR or distance == "short":
        raise AssemblyError(f"{mnemonic} has no {distance} form")
    width = 2 if bits == 16 else 4
    offset = target - (address + len(_NEAR[mnemonic]) + width)
    if bits == 32:
        offset = (offset + (1 << 31)) % (1 << 32) - (1 << 31)
    if not -(1 << 8 * width - 1) <= offset < 1 << 8 * width - 1:
        raise AssemblyError(f"the target {target:#x} is out of reach from {address:#x}")
    return _NEAR[mnemonic] + offset.to_bytes(width, "little", signed=True)


def _counter_prefix(bits: int, mnemonic: str) -> bytes:
    """jcxz, jecxz and jrcxz are one instruction with different address sizes."""
    wanted = _COUNTER_BITS.get(mnemonic, bits)
    if wanted == bits:
        return b""
    if {wanted, bits} == {16, 64} or wanted == 64:
        raise AssemblyError(f"{mnemonic} does not exist in {bits}-bit code")
    return b"\x67"
