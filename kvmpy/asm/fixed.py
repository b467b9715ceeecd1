"""Instructions whose size depends on the mode, encoded here from tables.

Keystone gives many of them the operand size of another mode: its `ret` in 16-bit code
takes four bytes off the stack, its `iret`, `pushf` and `push ds` in 32-bit code are the
16-bit ones. Source: Intel SDM Vol. 2; the default operand size is Vol. 1 section 3.6.1.
"""

from kvmpy.asm.instructions import STRING_OPERATIONS
from kvmpy.errors import AssemblyError

__all__ = ["FIXED", "encode_far", "encode_fixed", "encode_push", "encode_return"]

_MODE_SIZED = {
    "ret": "c3",
    "retf": "cb",
    "lret": "cb",
    "iret": "cf",
    "pushf": "9c",
    "popf": "9d",
    "pusha": "60",
    "popa": "61",
}
"""Instructions of the default operand size, which data16 and data32 change."""

_SIZED = {
    "retfw": ("cb", 16),
    "retfd": ("cb", 32),
    "retfq": ("cb", 64),
    "lretq": ("cb", 64),
    "iretw": ("cf", 16),
    "iretd": ("cf", 32),
    "iretq": ("cf", 64),
    "leavew": ("c9", 16),
    "pushaw": ("60", 16),
    "pushad": ("60", 32),
    "popaw": ("61", 16),
    "popad": ("61", 32),
    "pushfw": ("9c", 16),
    "pushfd": ("9c", 32),
    "popfw": ("9d", 16),
    "popfd": ("9d", 32),
    "cbw": ("98", 16),
    "cwde": ("98", 32),
    "cdqe": ("98", 64),
    "cwd": ("99", 16),
    "cdq": ("99", 32),
    "cqo": ("99", 64),
}
"""Instructions whose name holds the operand size."""

_STRING_OPCODES = {
    "movs": 0xA4,
    "cmps": 0xA6,
    "stos": 0xAA,
    "lods": 0xAC,
    "scas": 0xAE,
    "ins": 0x6C,
    "outs": 0x6E,
}
_SUFFIX_BITS = {"w": 16, "d": 32, "q": 64}

_PLAIN = {
    "endbr32": "f30f1efb",
    "endbr64": "f30f1efa",
    "fclex": "9bdbe2",
    "finit": "9bdbe3",
    "invlpga": "0f01df",
    "serialize": "0f01e8",
    "skinit": "0f01de",
    "vmload": "0f01da",
    "vmrun": "0f01d8",
    "vmsave": "0f01db",
}
_LONG_PLAIN = {
    "pushfq": "9c",
    "popfq": "9d",
    "sysretd": "0f07",
    "sysretq": "480f07",
    "sysexitd": "0f35",
    "sysexitq": "480f35",
}
"""Instructions that only 64-bit code has, or has under this name."""

_NOT_LONG = {"pusha", "popa", "pushaw", "popaw", "pushad", "popad", "pushfd", "popfd"}
"""Instructions that 64-bit code does not have."""

FIXED = (
    frozenset(_MODE_SIZED)
    | frozenset(_SIZED)
    | frozenset(_PLAIN)
    | frozenset(_LONG_PLAIN)
    | STRING_OPERATIONS
)
"""Mnemonics that `encode_fixed` knows, where they have no operands."""


def encode_fixed(bits: int, mnemonic: str, operand_bits: int = 0) -> bytes:
    """An instruction without operands; `operand_bits` is that of data16 or data32, or 0."""
    if mnemonic in _NOT_LONG and bits == 64:
        raise AssemblyError(f"{mnemonic} does not exist in 64-bit code")
    if mnemonic in _MODE_SIZED:
        opcode = bytes.fromhex(_MODE_SIZED[mnemonic])
        return _size_prefix(bits, operand_bits or (16 if bits == 16 else 32)) + opcode
    if mnemonic in _SIZED:
        digits, size = _SIZED[mnemonic]
        return _size_prefix(bits, size) + bytes.fromhex(digits)
    if mnemonic in _PLAIN:
        return bytes.fromhex(_PLAIN[mnemonic])
    if mnemonic in _LONG_PLAIN:
        if bits != 64:
            raise AssemblyError(f"{mnemonic} exists in 64-bit code only")
        return bytes.fromhex(_LONG_PLAIN[mnemonic])
    string = _STRING_OPCODES[mnemonic[:-1]]
    if mnemonic[-1] == "b":
        return bytes([string])
    return _size_prefix(bits, _SUFFIX_BITS[mnemonic[-1]]) + bytes([string + 1])


def _size_prefix(bits: int, size: int) -> bytes:
    """What makes an operand `size` bits wide where the default is that of `bits`-bit code."""
    if size == 64:
        if bits != 64:
            raise AssemblyError("a 64-bit operand needs 64-bit code")
        return b"\x48"
    return b"" if size == (16 if bits == 16 else 32) else b"\x66"


def encode_return(bits: int, mnemonic: str, count: int, operand_bits: int) -> bytes:
    """`ret n` and `retf n`, which take `count` bytes of arguments off the stack."""
    if not 0 <= count <= 0xFFFF:
        raise AssemblyError(f"{count} does not fit the 16 bits of {mnemonic}")
    code = encode_fixed(bits, mnemonic, operand_bits)
    return code[:-1] + bytes([code[-1] - 1]) + count.to_bytes(2, "little")


def encode_push(bits: int, value: int, size: int) -> bytes:
    """`push` of a number; `size` is in bits, 0 for the mode's own.

    Keystone makes `66 68 00 00` of `push 0x80000000` in 64-bit code.
    """
    width = size or bits
    if width not in {16: (16, 32), 32: (16, 32), 64: (16, 64)}[bits]:
        raise AssemblyError(f"there is no push of {width} bits in {bits}-bit code")
    encoded = min(width, 32)
    if width == 64 and value >= 1 << 63:
        value -= 1 << 64
    end = 1 << (31 if width == 64 else width)
    if not -(1 << encoded - 1) <= value < end:
        raise AssemblyError(f"{value:#x} does not fit a push of {width} bits")
    signed = (value + (1 << encoded - 1)) % (1 << encoded) - (1 << encoded - 1)
    prefix = _size_prefix(bits, 16 if width == 16 else 32)
    if -128 <= signed <= 127:
        return prefix + b"\x6a" + signed.to_bytes(1, "little", signed=True)
    return prefix + b"\x68" + signed.to_bytes(encoded // 8, "little", signed=True)


def encode_far(bits: int, mnemonic: str, selector: int, offset: int, size: int) -> bytes:
    """A far jump or call to `selector:offset`; `size` of the offset in bits, 0 for the mode's."""
    if bits == 64:
        raise AssemblyError("64-bit code has no far jump to a constant: use retfq or a pointer")
    width = size or bits
    if width not in (16, 32):
        raise AssemblyError("the offset of a far pointer has 16 or 32 bits")
    if not 0 <= selector <= 0xFFFF:
        raise AssemblyError(f"the selector {selector:#x} does not fit 16 bits")
    if not 0 <= offset < 1 << width:
        hint = ": write data32 before it" if width == 16 else ""
        raise AssemblyError(f"the offset {offset:#x} does not fit {width} bits{hint}")
    opcode = b"\xea" if mnemonic in ("jmp", "ljmp") else b"\x9a"
    pointer = offset.to_bytes(width // 8, "little") + selector.to_bytes(2, "little")
    return _size_prefix(bits, width) + opcode + pointer
