"""The IDT, or real mode's vector table, from guest memory: each gate and where it leads.

Sources: SDM Vol.3 6.10, 6.11 (gates of protected mode), 6.14.1 (of long mode), 21.1.4 (real mode).
"""

from dataclasses import dataclass
from typing import Final

from kvmpy.views.descriptors import Descriptor, look_up
from kvmpy.views.formats import canonical_bits, is_canonical
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Read
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.exceptions import EXCEPTIONS
from kvmpy.x86.flags import CR0, EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Gate", "GateView", "gate_at", "idt_view"]

VECTORS: Final = 256
_KINDS32: Final = {
    5: "task gate",
    6: "16-bit interrupt gate",
    7: "16-bit trap gate",
    14: "32-bit interrupt gate",
    15: "32-bit trap gate",
}
_KINDS64: Final = {14: "64-bit interrupt gate", 15: "64-bit trap gate"}
_TASK: Final = 5


@dataclass(frozen=True, slots=True)
class Gate:
    """One entry: the handler is at `offset` in the segment of `selector`.

    `ist` is the stack of long mode's IST (0: none), `dpl` the highest ring whose `int n` may use
    it. `problem` says what an exception through it would come to, empty where it would be taken.
    """

    vector: int
    name: str
    raw: bytes
    kind: str
    selector: int = 0
    offset: int = 0
    ist: int = 0
    dpl: int = 0
    present: bool = False
    problem: str = ""

    def key(self) -> tuple[object, ...]:
        """All but the vector and the offset."""
        return self.kind, self.selector, self.ist, self.dpl, self.present, self.problem


@dataclass(frozen=True, slots=True)
class GateView(Shown):
    """The table of gates: where it is, its entries, and what is wrong with it as a whole."""

    name: str
    base: int
    limit: int
    entries: tuple[Gate, ...]
    problem: str = ""

    def grids(self) -> tuple[Grid, ...]:
        """A row for each gate; one for a run of them that lead to evenly spaced handlers."""
        rows: list[tuple[str, ...]] = []
        bad: set[int] = set()
        for run in _runs(self.entries):
            first, last = run[0], run[-1]
            if first.problem:
                bad.add(len(rows))
            step = run[1].offset - first.offset if len(run) > 1 else 0
            where = f"{first.selector:#06x}:{first.offset:#x}"
            if step:
                where += f" and every {step:#x} on"
            rows.append(
                (
                    str(first.vector) if first is last else f"{first.vector} to {last.vector}",
                    first.name if first is last else "",
                    first.kind,
                    where if first.present else "",
                    str(first.dpl),
                    str(first.ist or ""),
                    first.problem,
                )
            )
        columns = ("vector", "", "what it is", "handler", "dpl", "ist", "problem")
        title = f"{self.name} at {self.base:#x}, limit {self.limit:#x}"
        notes = (self.problem,) if self.problem else ()
        return (Grid(title, columns, rows, notes, frozenset(bad)),)


def _runs(gates: tuple[Gate, ...]) -> list[list[Gate]]:
    """Neighbours that differ in their offsets alone, by the same step; named vectors if broken."""
    runs: list[list[Gate]] = []
    for gate in gates:
        run = runs[-1] if runs else []
        named = (gate.name or (run and run[-1].name)) and not gate.problem
        same = bool(run) and not named and gate.key() == run[0].key()
        if same and len(run) > 1:
            same = gate.offset - run[-1].offset == run[1].offset - run[0].offset
        if same:
            run.append(gate)
        else:
            runs.append([gate])
    return runs


def gate_at(read: Read, special: SpecialRegisters, vector: int) -> Gate:
    """The gate that the processor would take for `vector`."""
    return _Table(read, special).gate(vector)


def idt_view(read: Read, special: SpecialRegisters) -> GateView:
    """All gates within IDTR's limit, at most 256; real mode's are 4 bytes each."""
    table = _Table(read, special)
    count = min(VECTORS, (special.idt.limit + 1) // table.size)
    gates = tuple(table.gate(vector) for vector in range(count))
    name = "IDT" if table.protected else "real-mode vector table"
    problem = "" if count else "the limit leaves no room for a gate: any exception shuts down"
    return GateView(name, special.idt.base, special.idt.limit, gates, problem)


class _Table:
    def __init__(self, read: Read, special: SpecialRegisters) -> None:
        self.read, self.special = read, special
        self.protected = bool(special.cr0 & CR0.PE)
        self.long_mode = bool(special.efer & EFER.LMA)
        self.size = 16 if self.long_mode else 8 if self.protected else 4
        self.bits = canonical_bits(special)
        self.seen: dict[int, Descriptor] = {}

    def gate(self, vector: int) -> Gate:
        name = EXCEPTIONS.get(vector, ("",))[0]
        start = vector * self.size
        if start + self.size > self.special.idt.limit + 1:
            text = f"beyond the IDT's limit {self.special.idt.limit:#x}: #GP"
            return Gate(vector, name, b"", "none", problem=text)
        raw = read_linear(self.read, self.special, self.special.idt.base + start, self.size)
        if len(raw) < self.size:
            text = f"no RAM at {self.special.idt.base + start:#x}"
            return Gate(vector, name, raw, "none", problem=text)
        if not self.protected:
            offset, selector = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:], "little")
            return Gate(vector, name, raw, "far address", selector, offset, present=True)
        return self._decode(vector, name, raw)

    def _decode(self, vector: int, name: str, raw: bytes) -> Gate:
        kinds = _KINDS64 if self.long_mode else _KINDS32
        selector = int.from_bytes(raw[2:4], "little")
        offset = int.from_bytes(raw[0:2] + raw[6:8] + raw[8:12], "little")
        code, present, dpl = raw[5] & 0x1F, bool(raw[5] & 0x80), raw[5] >> 5 & 3
        ist = raw[4] & 7 if self.long_mode else 0
        kind = kinds.get(code, "null" if not any(raw) else f"no gate (type {code})")
        if code not in kinds:
            problem = "not a gate: #GP" if any(raw) else "empty: #GP"
        elif not present:
            problem = "not present: #NP"
        elif code == _TASK:
            problem = ""
        elif self.long_mode and not is_canonical(offset, self.bits):
            problem = f"the handler's address {offset:#x} is not canonical: #GP"
        else:
            problem = self._target(selector, offset)
        return Gate(vector, name, raw, kind, selector, offset, ist, dpl, present, problem)

    def _target(self, selector: int, offset: int) -> str:
        """What is wrong with the code segment; the same for all gates that name it."""
        if not selector & ~3:
            return "the selector is null: #GP"
        if selector not in self.seen:
            self.seen[selector] = look_up(self.read, self.special, selector)
        found = self.seen[selector]
        segment = found.segment
        if segment is None or not segment.s or not segment.type & 8:
            return f"the selector is no code segment ({found.problem or found.kind}): #GP"
        if not segment.present:
            return "the code segment is not present: #NP"
        if self.long_mode and (not segment.l or segment.db):
            return "the code segment is not a 64-bit one: #GP"
        if not self.long_mode and offset > segment.limit:
            return f"the handler is beyond the code segment's limit {segment.limit:#x}: #GP"
        return ""
