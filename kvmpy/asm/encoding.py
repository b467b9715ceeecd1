"""One instruction to bytes, or to a request for Keystone and the check of its answer.

Every number in a request is worked out first, so Keystone sees neither symbols nor labels
nor directives, and nothing in a request depends on the address it will run at.
"""

from dataclasses import dataclass
from typing import TypeAlias

from kvmpy.asm.branches import BRANCHES, encode_branch
from kvmpy.asm.client import Answer
from kvmpy.asm.expressions import Scope, evaluate
from kvmpy.asm.fixed import FIXED, encode_far, encode_fixed, encode_push, encode_return
from kvmpy.asm.instructions import Instruction
from kvmpy.asm.operands import FarPointer, Immediate, Memory, RegisterOperand
from kvmpy.asm.registers import ADDRESS_BITS, POINTER_SIZES, SEGMENT_PREFIXES
from kvmpy.asm.verify import Number, Place, Resolved, check_answer
from kvmpy.errors import AssemblyError

__all__ = ["Query", "Request", "encode_here", "finish", "make_request"]

Query: TypeAlias = tuple[int, str, int | None]
"""Bits, text and displacement: an item of the worker's protocol."""

_FAR_JUMPS = {"jmp": "ljmp", "call": "lcall", "ljmp": "ljmp", "lcall": "lcall"}
_TABLE_LOADS = {"lgdt", "lidt", "sgdt", "sidt"}
_REFUSED = {
    "sysret": "write sysretd or sysretq",
    "sysexit": "write sysexitd or sysexitq",
    "xbegin": "Keystone knows no target in it: use .byte",
}
_LONG_ONLY = {"cmpxchg16b", "swapgs"}
_SIZE_NAMES = {size: name for name, size in reversed(POINTER_SIZES.items())}
_LARGE = 0x7FFFFFFF
"""A displacement that makes Keystone take the 32-bit form; the worker replaces it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What Keystone is asked, and what its answer must decode to."""

    instruction: Instruction
    query: Query
    operands: tuple[Resolved, ...]


def encode_here(instruction: Instruction, scope: Scope, distance: str) -> bytes | None:
    """The bytes of an instruction that needs no Keystone; None for the others.

    `distance` is "near" where an earlier pass found a branch out of a short one's reach.
    """
    bits, mnemonic = instruction.bits, instruction.mnemonic
    if not mnemonic:
        return instruction.prefix
    code: bytes | None = None
    match instruction.operands:
        case () if mnemonic in FIXED:
            code = encode_fixed(bits, mnemonic, instruction.operand_bits)
        case (FarPointer(selector, offset, size),):
            if mnemonic not in _FAR_JUMPS:
                raise AssemblyError(f"{mnemonic} takes no selector:offset")
            numbers = evaluate(selector, scope).number, evaluate(offset, scope).number
            code = encode_far(bits, mnemonic, *numbers, size * 8 or instruction.operand_bits)
        case (Immediate(value, _, size, word) as immediate,):
            number = evaluate(value, scope).number
            if mnemonic in BRANCHES:
                if size or word == "far":
                    raise AssemblyError("write a far jump as ljmp selector:offset")
                code = encode_branch(bits, mnemonic, word or distance, number, scope.here)
            elif mnemonic == "int" and number == 3:
                code = b"\xcc"
            elif mnemonic == "push":
                _check_immediate(immediate, scope, pushed=True)
                code = encode_push(bits, number, size * 8 or instruction.operand_bits)
            elif mnemonic in ("ret", "retf", "lret"):
                code = encode_return(bits, mnemonic, number, instruction.operand_bits)
    return None if code is None else instruction.prefix + code


def _check_immediate(operand: Immediate, scope: Scope, pushed: bool = False) -> int:
    """The number of an immediate; refuses the notations that assemblers disagree about."""
    number, weight = evaluate(operand.value, scope)
    if weight and not operand.offset:
        raise AssemblyError("write offset before a label for its address, or [ ] for memory")
    if operand.word or (operand.size and not pushed):
        raise AssemblyError("a size goes with memory, not with a number")
    return number


def make_request(instruction: Instruction, scope: Scope, size: int) -> Request:
    """What to ask Keystone; `size` is that of the instruction in the pass before."""
    _check_mnemonic(instruction)
    mnemonic, texts = instruction.mnemonic, []
    resolved: list[Resolved] = []
    patch: int | None = None
    for operand in instruction.operands:
        if isinstance(operand, RegisterOperand):
            texts.append(operand.name + operand.decorations)
            resolved.append(operand.name)
        elif isinstance(operand, Immediate):
            number = _check_immediate(operand, scope)
            texts.append(str(number))
            resolved.append(Number(number))
        elif isinstance(operand, Memory):
            place, patched = _resolve(instruction, operand, scope, size)
            patch = place.displacement if patched else patch
            mnemonic = _far_mnemonic(mnemonic, operand)
            texts.append(_render(place, patched, mnemonic) + operand.decorations)
            resolved.append(place)
        elif isinstance(operand, FarPointer):
            raise AssemblyError(f"{mnemonic} takes no selector:offset")
        else:
            texts.append(operand.text)
    if sum(isinstance(each, Place) for each in resolved) > 1:
        raise AssemblyError("two memory operands: write a string operation as movsb, movsw, ...")
    text = f"{mnemonic} {', '.join(texts)}".rstrip()
    return Request(instruction, (instruction.bits, text, patch), tuple(resolved))


def _check_mnemonic(instruction: Instruction) -> None:
    """Refuse what Keystone gets wrong by its mnemonic."""
    bits, mnemonic, operands = instruction.bits, instruction.mnemonic, instruction.operands
    if mnemonic in _REFUSED:
        raise AssemblyError(f"{mnemonic}: {_REFUSED[mnemonic]}")
    if bits != 64 and (mnemonic.endswith("64") or mnemonic in _LONG_ONLY):
        raise AssemblyError(f"{mnemonic} exists in 64-bit code only")
    if mnemonic == "nop" and operands:
        raise AssemblyError("Keystone makes another instruction of nop with an operand: use .byte")
    match operands:
        case (Memory(size=4, far=False),) if bits == 16 and mnemonic in ("jmp", "call"):
            raise AssemblyError(
                f"{mnemonic} dword ptr can be near or far: write {mnemonic} far [ ]"
            )


def _far_mnemonic(mnemonic: str, operand: Memory) -> str:
    """Keystone spells jumps through a far pointer in memory ljmp and lcall."""
    return _FAR_JUMPS.get(mnemonic, mnemonic) if operand.far or operand.size == 6 else mnemonic


def _resolve(
    instruction: Instruction, operand: Memory, scope: Scope, size: int
) -> tuple[Place, bool]:
    """The numbers of a memory operand, and whether the worker must take its base out."""
    number, weight = evaluate(operand.displacement, scope)
    if operand.base == "rip" and weight:
        number -= scope.here + size
        if not -(1 << 31) <= number < 1 << 31 and size:
            raise AssemblyError("the label is out of reach of a 32-bit displacement")
    if operand.base == "eip":
        raise AssemblyError("addresses relative to eip are refused: use rip")
    names = operand.base, operand.index
    bits = next((ADDRESS_BITS[name] for name in names if ADDRESS_BITS.get(name)), instruction.bits)
    given = operand.size
    if _far_mnemonic(instruction.mnemonic, operand) in ("ljmp", "lcall"):
        given = 0
    elif instruction.mnemonic == "pop" and not given:
        given = instruction.bits // 8
    place = Place(operand.segment, operand.base, operand.index, operand.scale, number, given, bits)
    moffs = instruction.mnemonic == "movabs"
    absolute = instruction.bits == 64 and not operand.base and not operand.index and not moffs
    signed = number - (1 << 64) if number >= 1 << 63 else number
    if absolute and not -(1 << 31) <= signed < 1 << 31:
        raise AssemblyError(f"the address {number:#x} needs [rip + ...], or movabs")
    index_only = instruction.bits == 16 and bits == 32 and not operand.base
    vector = ADDRESS_BITS.get(operand.index) == 0
    return place, (absolute or index_only) and not vector


def _render(place: Place, patched: bool, mnemonic: str) -> str:
    """A memory operand in the notation that Keystone reads right."""
    base = place.base
    if patched:
        base = "ebp" if place.index else "rbp"
    index = place.index
    if index and place.scale != 1:
        index += f"*{place.scale}"
    terms = [term for term in (base, index) if term]
    displacement = _LARGE if patched else place.displacement
    if displacement or not terms:
        terms.append(str(displacement))
    size = f"{_SIZE_NAMES[place.size]} ptr " if place.size else ""
    if mnemonic in _TABLE_LOADS:
        size = ""
    segment = f"{place.segment}:" if place.segment else ""
    return f"{size}{segment}[{' + '.join(terms)}]"


def finish(request: Request, answer: Answer) -> bytes:
    """The bytes of an answer, checked and put right; raises AssemblyError."""
    instruction = request.instruction
    mnemonic = instruction.mnemonic
    code = check_answer(instruction.bits, request.operands, answer)
    first = instruction.operands[0] if instruction.operands else None
    wide = _operand_prefix(instruction, first)
    if code[:1] == b"\x66" and _has_needless_size(mnemonic, instruction):
        code = code[1:]
    return instruction.prefix + wide + code


def _has_needless_size(mnemonic: str, instruction: Instruction) -> bool:
    """Where Keystone adds an operand-size prefix that changes the meaning, or nothing.

    With it, lgdt in 32-bit code loads 24 bits of the base, and push ds moves the stack
    pointer by two; a mov to a segment register does the same without.
    """
    if mnemonic in _TABLE_LOADS:
        return True
    match instruction.operands:
        case (RegisterOperand(name), *_) if name in SEGMENT_PREFIXES:
            return mnemonic in ("mov", "push", "pop")
        case (Memory(), RegisterOperand(name)) if name in SEGMENT_PREFIXES:
            return mnemonic == "mov"
    return False


def _operand_prefix(instruction: Instruction, first: object) -> bytes:
    """The operand-size prefix of data16 and data32, and of far pointers in memory."""
    if instruction.operand_bits:
        return b"\x66"
    if not isinstance(first, Memory) or instruction.mnemonic not in _FAR_JUMPS:
        return b""
    far = first.far or first.size == 6 or instruction.mnemonic in ("ljmp", "lcall")
    if not far or not first.size:
        return b""
    if first.size not in (4, 6):
        raise AssemblyError("a far pointer in memory is a dword (16:16) or an fword (16:32)")
    return b"\x66" if (first.size == 6) == (instruction.bits == 16) else b""
