"""The text of one instruction to prefixes, a mnemonic and operands."""

import re
from dataclasses import dataclass

from kvmpy.asm.operands import Immediate, Memory, Operand, RegisterOperand, parse_operand
from kvmpy.asm.parser import LocalLabels, split_commas
from kvmpy.asm.registers import LONG_ONLY, SEGMENT_PREFIXES
from kvmpy.asm.tokens import tokenize
from kvmpy.errors import AssemblyError

__all__ = ["PREFIXES", "STRING_OPERATIONS", "Instruction", "parse_instruction"]

PREFIXES = {
    "lock": 0xF0,
    "rep": 0xF3,
    "repe": 0xF3,
    "repz": 0xF3,
    "repne": 0xF2,
    "repnz": 0xF2,
    "data16": 0x66,
    "data32": 0x66,
    "addr16": 0x67,
    "addr32": 0x67,
} | SEGMENT_PREFIXES
"""Prefixes that may be written before a mnemonic (Intel SDM Vol. 2 section 2.1.1)."""

STRING_OPERATIONS = {
    f"{name}{suffix}"
    for name in ("movs", "cmps", "stos", "lods", "scas", "ins", "outs")
    for suffix in ("b", "w", "d", "q")
} - {"insq", "outsq"}
"""The string operations in the forms without operands."""

_LOCKABLE = {
    *("adc", "add", "and", "btc", "btr", "bts", "cmpxchg", "cmpxchg16b", "cmpxchg8b", "dec"),
    *("inc", "neg", "not", "or", "sbb", "sub", "xadd", "xchg", "xor"),
}
_REPEATABLE = STRING_OPERATIONS | {"ret"}
_SIZEABLE = {
    *("call", "iret", "jmp", "lcall", "lgdt", "lidt", "ljmp", "lret", "popa", "popf", "push"),
    *("pusha", "pushf", "ret", "retf", "sgdt", "sidt"),
}
_RESIZEABLE = STRING_OPERATIONS | {"xlatb"}
_MNEMONIC = re.compile(r"([A-Za-z][\w.]*)(?:\s+|$)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction of `bits`-bit code.

    `prefix` holds the bytes of the prefixes as written, `operand_bits` is 16 or 32 where
    data16 or data32 asked for it and 0 elsewhere (no byte of it is in `prefix`).
    """

    bits: int
    mnemonic: str
    operands: tuple[Operand, ...] = ()
    prefix: bytes = b""
    operand_bits: int = 0


def parse_instruction(text: str, bits: int, labels: LocalLabels) -> Instruction:
    """Parse an instruction; raises AssemblyError, also for prefixes that do not fit it."""
    prefixes: list[str] = []
    while True:
        match = _MNEMONIC.match(text)
        if match is None:
            raise AssemblyError("no label, directive or instruction")
        mnemonic, text = match.group(1).lower(), text[match.end() :]
        if mnemonic not in PREFIXES:
            break
        prefixes.append(mnemonic)
        if not text:
            return _lone_prefixes(bits, prefixes)
    operands = tuple(parse_operand(part, labels) for part in split_commas(tokenize(text)))
    _check_prefixes(bits, prefixes, mnemonic, operands)
    _check_registers(bits, operands)
    operand_bits = next((int(name[4:]) for name in prefixes if name.startswith("data")), 0)
    prefix = bytes(PREFIXES[name] for name in prefixes if not name.startswith("data"))
    return Instruction(bits, mnemonic, operands, prefix, operand_bits)


def _lone_prefixes(bits: int, prefixes: list[str]) -> Instruction:
    """`rep` or `lock` as a statement of its own, before an instruction on the next."""
    if not set(prefixes) <= {"lock", "rep", "repe", "repz", "repne", "repnz"}:
        raise AssemblyError(f"write the prefix {prefixes[-1]} before its instruction")
    return Instruction(bits, "", (), bytes(PREFIXES[name] for name in prefixes))


def _check_prefixes(
    bits: int, prefixes: list[str], mnemonic: str, operands: tuple[Operand, ...]
) -> None:
    """Refuse a prefix that the instruction does not take, or that has no effect."""
    for name in prefixes:
        if name == "lock":
            memory = bool(operands) and isinstance(operands[0], Memory)
            if mnemonic == "xchg":
                memory = any(isinstance(operand, Memory) for operand in operands)
            fits = memory and mnemonic in _LOCKABLE
        elif name.startswith("rep"):
            fits = mnemonic in _REPEATABLE and not operands
        elif name.startswith("data"):
            fits = mnemonic in _SIZEABLE and int(name[4:]) != (16 if bits == 16 else 32)
            fits = fits and not any(isinstance(operand, RegisterOperand) for operand in operands)
        elif name.startswith("addr"):
            fits = mnemonic in _RESIZEABLE and int(name[4:]) == {16: 32, 32: 16, 64: 32}[bits]
        else:
            fits = mnemonic in _RESIZEABLE and not operands
        if not fits:
            raise AssemblyError(f"the prefix {name} does not go with {mnemonic} here")
    if len({PREFIXES[name] for name in prefixes}) < len(prefixes):
        raise AssemblyError("the same prefix twice")


def _check_registers(bits: int, operands: tuple[Operand, ...]) -> None:
    """Keystone takes the name of a register that the mode lacks for a symbol's."""
    for operand in operands:
        names: tuple[str, ...] = ()
        if isinstance(operand, RegisterOperand):
            names = (operand.name,)
        elif isinstance(operand, Memory):
            names = (operand.base, operand.index)
        for name in names:
            if bits != 64 and name in LONG_ONLY:
                raise AssemblyError(f"the register {name} exists in 64-bit code only")
            if name in ("rip", "eip") and not isinstance(operand, Memory):
                raise AssemblyError(f"the register {name} cannot be an operand")
        if isinstance(operand, Immediate) and operand.word and operand.offset:
            raise AssemblyError(f"{operand.word} and offset do not go together")
