"""The instruction at RIP: decoded by Capstone, and what it reads, writes, pushes and pops."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from kvmpy.autopsy.memory import Touch
from kvmpy.autopsy.mnemonics import (
    BIT_TESTS,
    FAR_LOADS,
    NO_ACCESS,
    POPS,
    PUSHES,
    READ_FIRST,
    STRINGS,
    WRITE_ONLY_OPERAND,
)
from kvmpy.autopsy.scene import Scene
from kvmpy.views.pages import Access

__all__ = ["Instruction", "decode"]

_IMMEDIATE, _MEMORY = 2, 3  # CS_OP_IMM, CS_OP_MEM
_OPERAND_SIZE, _REPEAT = 0x66, (0xF2, 0xF3)


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
    def far_offset_bytes(self) -> int:
        """The size of the offset in a far pointer in memory; the selector follows it."""
        if self.rex_w:
            return 8
        return 2 if (self.scene.mode.bits == 16) != self.wide_prefix else 4

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
        rep = self._decoded.prefix[0] in _REPEAT and self.mnemonic in STRINGS
        if rep and not self.scene.register("rcx"):
            return
        pops, pushes = self._stack_slots()
        if self.mnemonic == "xlatb":
            yield self._table_look_up()
        if self.mnemonic == "leave":
            at = self.scene.stack_address(self.scene.registers.rbp - self.scene.registers.rsp)
            size, rbp = self.operand_bytes, self.scene.registers.rbp
            yield Touch(at, size, "read", "ss", rbp, f"leave pops from {at:#x} (rbp = {rbp:#x})")
        if pops:
            yield from self._stack(pops, "read")
        if not self.mnemonic.startswith(NO_ACCESS):
            for operand in sorted(self.memory_operands, key=self._writes):
                yield self._operand(operand)
        if pushes:
            yield from self._stack(pushes, "write")

    def _table_look_up(self) -> Touch:
        """What XLATB reads: DS:[RBX + AL]."""
        scene = self.scene
        offset = (
            scene.register("rbx") + scene.register("al") & (1 << 8 * self._decoded.addr_size) - 1
        )
        base = 0 if scene.mode.bits == 64 else scene.special.ds.base
        return Touch(base + offset, 1, "read", "ds", offset, f"xlatb reads {base + offset:#x}")

    def _operand(self, operand: Any) -> Touch:
        linear, segment, offset = self._address(operand)
        writes = self._writes(operand)
        far = (self.is_far or self.mnemonic in FAR_LOADS) and self.far_offset_bytes + 2
        word = "writes to" if writes else "reads"
        size = far or self._size(operand)
        what = f"{self.mnemonic} {word} {linear:#x}{self._spelled(operand)}"
        return Touch(linear, size, "write" if writes else "read", segment, offset, what)

    def _writes(self, operand: Any) -> bool:
        """Whether the instruction writes to an operand in memory."""
        name = self.mnemonic
        if len(self.operands) == 1:
            return name in WRITE_ONLY_OPERAND or name.startswith("set")
        whole = name[:-1] if name in STRINGS else name
        return operand is self.operands[0] and whole not in READ_FIRST

    def _size(self, operand: Any) -> int:
        if self.mnemonic in ("lgdt", "lidt", "sgdt", "sidt"):
            return 10 if self.scene.mode.bits == 64 else 6
        return int(operand.size) or 1

    def _spelled(self, operand: Any) -> str:
        """The registers that make up an address, with their values."""
        names = (self.name_of(operand.mem.base), self.name_of(operand.mem.index))
        if names[0] in ("rip", "eip"):
            return ""
        shown = ", ".join(
            f"{name} = {self.scene.register(name):#x}"
            for name in dict.fromkeys(names)
            if name and not name.endswith("iz")
        )
        return f" ({shown})" if shown else ""

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
        if self.mnemonic in BIT_TESTS and self.operands[1].type != _IMMEDIATE:
            offset += self._bit_offset()
        offset &= (1 << 8 * self._decoded.addr_size) - 1
        name = self.name_of(memory.segment)
        if not name:
            stack = base in ("rsp", "esp", "rbp", "ebp", "bp", "sp")
            destination = self.mnemonic in STRINGS and base.endswith("di")
            name = "ss" if stack else "es" if destination else "ds"
        segment = scene.segment(name)
        if scene.mode.bits == 64:
            base_address = segment.base if name in ("fs", "gs") else 0
            return base_address + offset & (1 << 64) - 1, name, offset
        return segment.base + offset & 0xFFFF_FFFF, name, offset

    def _bit_offset(self) -> int:
        """How far from its operand BT with a bit number in a register looks (SDM Vol.2 BT)."""
        size = int(self.operands[1].size)
        number = self.value(1) or 0
        number -= (1 << 8 * size) if number >> 8 * size - 1 else 0
        return number // (8 * size) * size

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
        return POPS.get(name, 0), PUSHES.get(name, 0)

    def _stack(self, slots: int, access: Access) -> Iterator[Touch]:
        size = self.stack_bytes
        for slot in range(slots):
            offset = slot * size if access == "read" else -(slot + 1) * size
            linear = self.scene.stack_address(offset)
            word = "pops from" if access == "read" else "pushes to"
            yield Touch(linear, size, access, "ss", self.scene.registers.rsp + offset,
                        f"{self.mnemonic} {word} {linear:#x}", implicit=True)  # fmt: skip

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
