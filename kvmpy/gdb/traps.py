"""Debug events of ring 3 on a KVM that gives them to the guest instead of the host.

There, int3 and RFLAGS.TF raise #BP and #DB in the guest. So their handlers are made to stop the
guest at their first instruction, in ring 0, where the host does get breakpoints; and then the
vCPU is taken back to where it was in ring 3, by the frame that the processor pushed. What was
written to the stack lies below ring 0's stack pointer of then, where nothing is kept.
(SDM Vol.3 6.12.1, 6.14.2.)
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from kvmpy.gdb.memory import GuestMemory
from kvmpy.modes import Layout
from kvmpy.vcpu import VCPU
from kvmpy.views.descriptors import look_up
from kvmpy.views.gates import Gate, gate_at
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Read, page_walk
from kvmpy.x86.exceptions import ERROR_CODE_VECTORS, GuestException, decode_exception
from kvmpy.x86.flags import CR0, EFER, RFLAGS
from kvmpy.x86.segments import Segment
from kvmpy.x86.state import SpecialRegisters
from kvmpy.x86.tables import STUB_SIZE

__all__ = [
    "BREAKPOINT",
    "DEBUG",
    "EXCEPTION_VECTORS",
    "INVALID_OPCODE",
    "Trap",
    "clear_pushed_flag",
    "pushed",
    "take_back",
    "traps",
]

DEBUG, BREAKPOINT, INVALID_OPCODE = 1, 3, 6
_DPL3: Final = 3 << 5
_NEEDED: Final = frozenset({DEBUG, BREAKPOINT})
EXCEPTION_VECTORS: Final = tuple(range(32))
_RESERVED: Final = 12


class Trap(NamedTuple):
    """A handler to stop at. `gate` is where an IDT entry is to be replaced by `entry`, if any."""

    vector: int
    handler: int
    gate: int = 0
    entry: bytes = b""


def traps(
    read: Read, special: SpecialRegisters, layout: Layout, vectors: tuple[int, ...]
) -> Iterator[Trap]:
    """What stops the guest at these exceptions of ring 3.

    None for those that kvmpy's reporting stubs tell of anyway, and for those that cannot be:
    without an IDT that has room for the vector and any handler at all. Of others than #DB and
    #BP, only those that have a handler.
    """
    if not special.cr0 & CR0.PE:
        return
    for vector in vectors:
        gate = gate_at(read, special, vector)
        stub = None if layout.stubs is None else layout.stubs + vector * STUB_SIZE
        if _usable(gate) and gate.offset == stub:
            continue
        if _usable(gate) and (gate.dpl == 3 or vector != BREAKPOINT):
            yield Trap(vector, gate.offset)
            continue
        size = 16 if special.efer & EFER.LMA else 8
        if vector not in _NEEDED or (vector + 1) * size > special.idt.limit + 1:
            continue
        where = special.idt.base + vector * size
        if _usable(gate):  # but not for ring 3
            yield Trap(vector, gate.offset, where, _entry(gate.raw, gate.offset))
            continue
        donor = _any_gate(read, special)
        if donor is not None:
            # The last four bytes of a long-mode gate mean nothing: a place that nobody runs.
            place = where + _RESERVED
            if size <= _RESERVED or not page_walk(read, special, place, "fetch", cpl=0).allowed:
                place = donor.offset
            yield Trap(vector, place, where, _entry(donor.raw, place))


def _entry(raw: bytes, offset: int) -> bytes:
    """A gate like `raw` that leads to `offset`, and that ring 3's int3 may use."""
    entry = bytearray(raw)
    entry[0:2], entry[6:8] = offset.to_bytes(8, "little")[0:2], offset.to_bytes(8, "little")[2:4]
    if len(raw) > _RESERVED:
        entry[8:12] = offset.to_bytes(8, "little")[4:8]
    entry[5] |= _DPL3
    return bytes(entry[:_RESERVED])


def _usable(gate: Gate) -> bool:
    return not gate.problem and gate.present and "gate" in gate.kind and "task" not in gate.kind


def _any_gate(read: Read, special: SpecialRegisters) -> Gate | None:
    gates = (gate_at(read, special, vector) for vector in range(32))
    return next((gate for gate in gates if _usable(gate)), None)


def pushed(read: Read, cpu: VCPU, vector: int) -> GuestException | None:
    """The exception whose handler a vCPU is at the start of; None unless it came from ring 3."""
    special = cpu.get_sregs()
    bits = 64 if special.efer & EFER.LMA else 32
    stack = special.ss.base + cpu.get_regs().rsp & (1 << bits) - 1
    frame = read_linear(read, special, stack, 6 * bits // 8)
    if len(frame) < 6 * bits // 8:
        return None
    raised = decode_exception(vector, frame, special.cr2, bits)
    return raised if raised.cs & 3 == 3 else None


def clear_pushed_flag(memory: GuestMemory, cpu: VCPU, vector: int) -> None:
    """Take RFLAGS.TF out of the frame of a vCPU at the start of a handler of long mode."""
    special = cpu.get_sregs()
    place = cpu.get_regs().rsp + 8 * (2 + (vector in ERROR_CODE_VECTORS))
    flags = int.from_bytes(memory.read(special, place, 8), "little") & ~int(RFLAGS.TF)
    memory.write(special, place, flags.to_bytes(8, "little"))


def take_back(read: Read, cpu: VCPU, raised: GuestException) -> None:
    """Bring a vCPU from the start of a handler back to the ring-3 code that raised it."""
    special, registers = cpu.get_sregs(), cpu.get_regs()
    long_mode = bool(special.efer & EFER.LMA)
    code = look_up(read, special, raised.cs).segment
    if code is None or not code.s or code.unusable:
        code = Segment.code64(raised.cs, 3) if long_mode else Segment.code32(raised.cs, 3)
    stack = look_up(read, special, raised.ss).segment
    if stack is None or not stack.s or stack.unusable:
        stack = Segment.data(raised.ss, 3)
    code.dpl = stack.dpl = 3
    special.cs, special.ss = code, stack
    registers.rip, registers.rsp, registers.rflags = raised.rip, raised.rsp, raised.rflags
    cpu.set_sregs(special)
    cpu.set_regs(registers)
