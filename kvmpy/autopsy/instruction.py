"""The instruction at RIP: decoded by Capstone, and what it reads, writes, pushes and pops."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from kvmpy.autopsy.scene import Scene
from kvmpy.views.pages import Access

__all__ = ["Instruction", "Touch", "decode"]

_IMMEDIATE, _MEMORY = 2, 3  # CS_OP_IMM, CS_OP_MEM
_WRITES: Final = 2  # CS_AC_WRITE
_OPERAND_SIZE, _REPEAT = 0x66, (0xF2, 0xF3)
_NO_ACCESS: Final = frozenset(
    ("lea", "nop", "invlpg", "prefetcht0", "prefetcht1", "prefetcht2", "prefetchnta", "prefetchw")
)
_STRINGS: Final = ("movs", "stos", "lods", "cmps", "scas", "ins", "outs")
_PUSHES: Final = {"push": 1, "call": 1, "lcall": 2, "enter": 1, "pushal": 8, "pushaw": 8}
_POPS: Final = {"pop": 1, "ret": 1, "retf": 2, "retfq": 2, "popal": 8, "popaw": 8}


@dataclass(frozen=True, slots=True)
class Touch:
    """One access to memory: `segment` is what it goes through, `what` says it in words."""

    linear: int
    size: int
    access: Access
    segment: str
    offset: int
    what: str


class Instruction:
    """What Capstone says of one instruction."""

    def __init__(self, scene: Scene, decoded: Any) -> None:
        self.scene, self._decoded = scene, decoded
        self.mnemonic: str = decoded.mnemonic.split()[-1]
        self.text: str = f"{decoded.mnemonic} {decoded.op_str}".rstrip()
        self.raw: bytes = bytes(decoded.bytes)
        self.operands: list[Any] = decoded.operands
        self.groups: set[str] = {decoded.group_name(group) for group in decoded.groups}
        self.opcode = bytes(decoded.opcode).rstrip(b"\0") or b"\0"

    @property
    def wide_prefix(self) -> bool:
        """Whether there is a prefix of operand size."""
        return _OPERAND_SIZE in self._decoded.prefix

    @property
    def rex_w(self) -> bool:
        """Whether REX.W is set."""
        return bool(self._decoded.rex & 8)

    @property
    def modrm_reg(self) -> int:
        """The reg field of the ModR/M byte."""
        return int(self._decoded.modrm) >> 3 & 7

    @property
    def is_far(self) -> bool:
        """Whether it is a far jump or call."""
        memory = self.opcode[0] == 0xFF and self.modrm_reg in (3, 5)
        return memory or self.mnemonic in ("ljmp", "lcall")

    @property
    def operand_bytes(self) -> int:
        """The operand size in bytes: of near stack accesses 8 in 64-bit mode."""
        bits = self.scene.mode.bits
        if bits == 16:
            return 4 if self.wide_prefix else 2
        if self.wide_prefix:
            return 2
        return 8 if bits == 64 and self.mnemonic not in ("retf", "iretd") else 4

    def name_of(self, register: int) -> str:
        """A register's name, empty for none."""
        return str(self._decoded.reg_name(register) or "") if register else ""

    def register_operand(self, number: int) -> str:
        """The name of the register that an operand is, empty where it is none."""
        if number >= len(self.operands) or self.operands[number].type != 1:
            return ""
        return self.name_of(self.operands[number].reg)

    def value(self, number: int, size: int = 0) -> int | None:
        """What an operand holds: immediate, general register or memory; None if unknown."""
        operand = self.operands[number]
        if operand.type == _IMMEDIATE:
            return int(operand.imm)
        if operand.type == _MEMORY:
            linear = self._address(operand)[0]
            return self.scene.number(linear, size or operand.size)
        name = self.name_of(operand.reg)
        try:
            value = self.scene.register(name)
        except AttributeError:
            return None  # no general register
        return value

    @cached_property
    def memory_operands(self) -> list[Any]:
        """The operands that are in memory."""
        return [operand for operand in self.operands if operand.type == _MEMORY]

    def memory_address(self) -> int:
        """The linear address of the only operand in memory."""
        return self._address(self.memory_operands[0])[0]

    def touches(self) -> Iterator[Touch]:
        """Each access, in the order in which the processor makes them, but for fetches."""
        rep = self._decoded.prefix[0] in _REPEAT and self.mnemonic.startswith(_STRINGS)
        if rep and not self.scene.register("rcx"):
            return
        pops, pushes = self._stack_slots()
        if pops:
            yield from self._stack(pops, "read")
        if self.mnemonic not in _NO_ACCESS:
            for operand in sorted(self.memory_operands, key=lambda one: one.access & _WRITES):
                yield self._operand(operand)
        if pushes:
            yield from self._stack(pushes, "write")

    def _operand(self, operand: Any) -> Touch:
        linear, segment, offset = self._address(operand)
        writes = operand.access & _WRITES
        if self.mnemonic in ("call", "jmp", "push", "cmp", "test"):
            writes = 0
        far = self.is_far and self.operand_bytes + 2
        word = "writes to" if writes else "reads"
        size = far or self._size(operand)
        what = f"{self.mnemonic} {word} {linear:#x}{self._spelled(operand)}"
        return Touch(linear, size, "write" if writes else "read", segment, offset, what)

    def _size(self, operand: Any) -> int:
        if self.mnemonic in ("lgdt", "lidt", "sgdt", "sidt"):
            return 10 if self.scene.mode.bits == 64 else 6
        return int(operand.size) or 1

    def _spelled(self, operand: Any) -> str:
        base, index = self.name_of(operand.mem.base), self.name_of(operand.mem.index)
        parts = [name for name in (base, index) if name]
        return f" ([{' + '.join(parts)} ...])" if parts and base not in ("rip", "eip") else ""

    def _address(self, operand: Any) -> tuple[int, str, int]:
        """The linear address of an operand, its segment and its offset in it."""
        memory, scene = operand.mem, self.scene
        base, index = self.name_of(memory.base), self.name_of(memory.index)
        offset = int(memory.disp)
        if base in ("rip", "eip"):
            offset += scene.registers.rip + len(self.raw)
        elif base:
            offset += scene.register(base)
        if index and not index.endswith("iz"):
            offset += scene.register(index) * memory.scale
        offset &= (1 << 8 * self._decoded.addr_size) - 1
        name = self.name_of(memory.segment)
        if not name:
            stack = base in ("rsp", "esp", "rbp", "ebp", "bp", "sp")
            destination = self.mnemonic.startswith(_STRINGS) and base.endswith("di")
            name = "ss" if stack else "es" if destination else "ds"
        segment = scene.segment(name)
        if scene.mode.bits == 64:
            base_address = segment.base if name in ("fs", "gs") else 0
            return base_address + offset & (1 << 64) - 1, name, offset
        return segment.base + offset & 0xFFFF_FFFF, name, offset

    def _stack_slots(self) -> tuple[int, int]:
        name = self.mnemonic
        if name.startswith("iret"):
            return (5 if self.scene.mode.bits == 64 else 3), 0
        if name.startswith("pushf"):
            return 0, 1
        if name.startswith("popf"):
            return 1, 0
        if name == "call" and self.is_far:
            return 0, 2
        return _POPS.get(name, 0), _PUSHES.get(name, 0)

    def _stack(self, slots: int, access: Access) -> Iterator[Touch]:
        size = self.stack_bytes
        for slot in range(slots):
            offset = slot * size if access == "read" else -(slot + 1) * size
            linear = self.scene.stack_address(offset)
            word = "pops from" if access == "read" else "pushes to"
            yield Touch(linear, size, access, "ss", self.scene.registers.rsp + offset,
                        f"{self.mnemonic} {word} {linear:#x}")  # fmt: skip

    @property
    def stack_bytes(self) -> int:
        """The size of a stack slot of this instruction."""
        if self.mnemonic in ("retfq", "iretq"):
            return 8
        if self.mnemonic in ("retf", "iretd", "lcall") and not self.wide_prefix:
            return 2 if self.scene.mode.bits == 16 else 4
        return self.operand_bytes


def decode(scene: Scene) -> Instruction | None:
    """The instruction at RIP as the processor's mode reads it, None where there is none."""
    from capstone import CS_ARCH_X86, CS_MODE_16, CS_MODE_32, CS_MODE_64, Cs

    decoder = Cs(CS_ARCH_X86, {16: CS_MODE_16, 32: CS_MODE_32, 64: CS_MODE_64}[scene.mode.bits])
    decoder.detail = True
    for decoded in decoder.disasm(scene.instruction_bytes, scene.registers.rip, 1):
        return Instruction(scene, decoded)
    return None
