"""Which instructions want an operand in memory to be aligned.

Sources: SDM Vol.1 14.9 (AVX), Vol.2 2.4 (SSE), CMPXCHG16B, FXSAVE, XSAVE.
"""

from typing import Final

from kvmpy.autopsy.instruction import Instruction

__all__ = ["SSE", "alignment"]

SSE: Final = frozenset(
    ["sse1", "sse2", "sse3", "ssse3", "sse41", "sse42", "sse4a", "aes", "pclmul", "sha"]
)
"""Capstone's groups of SSE, and of what came with it."""
_UNALIGNED: Final = ("movup", "movdqu", "lddqu", "pcmpestr", "pcmpistr")
_AVX: Final = ("vmovap", "vmovdqa", "vmovnt")
_AREAS: Final = (("fxsave", 16), ("fxrstor", 16), ("xsave", 64), ("xrstor", 64))


def alignment(instruction: Instruction) -> int:
    """What the address of an operand in memory must be a multiple of, 1 where it may be any.

    SSE's operands of 16 bytes must be aligned, but for a few; AVX's need not be, but for a few.
    """
    groups, name = instruction.groups, instruction.mnemonic
    if name == "cmpxchg16b":
        return 16
    for area, size in _AREAS:
        if name.startswith(area):
            return size
    wide = max((int(operand.size) for operand in instruction.memory_operands), default=1)
    if any(group.startswith("avx") for group in groups):
        return wide or 1 if name.startswith(_AVX) else 1
    aligned = groups & SSE and wide == 16 and not name.startswith(_UNALIGNED)
    return 16 if aligned else 1
