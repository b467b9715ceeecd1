"""GDT, LDT, IDT and TSS from memory, whole and broken."""

import struct
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.modes import build, entry_state
from kvmpy.views.code import disassemble, hexdump
from kvmpy.views.cpumode import cpu_mode
from kvmpy.views.descriptors import decode_descriptor, gdt_view, ldt_view, look_up
from kvmpy.views.gates import gate_at, idt_view
from kvmpy.views.pages import page_walk
from kvmpy.views.ranges import page_map
from kvmpy.views.taskstate import tss_view
from kvmpy.x86.flags import CR0
from kvmpy.x86.gates import interrupt_gate32, interrupt_gate64
from kvmpy.x86.segments import DescriptorTable, Segment
from kvmpy.x86.state import SpecialRegisters
from kvmpy.x86.tables import STUB_SIZE, Selector


def start(mode="long", ring=0, size=2 << 20):
    """RAM with what kvmpy keeps in it, and the registers at the start."""
    layout = build(mode, ring, size)
    ram = bytearray(size)
    ram[layout.base : layout.base + len(layout.data)] = layout.data
    _, special = entry_state(layout, 0x1000, SpecialRegisters())
    return ram, special, layout


def reading(ram):
    def read(address, length):
        end = address + length
        return bytes(ram[address:end]) if address >= 0 and end <= len(ram) else None

    return read


def flat(gdt=b"", idt=b"", at=0x2000):
    """Flat protected mode without paging, with tables at 0x2000 and 0x4000."""
    ram = bytearray(0x10000)
    ram[at : at + len(gdt)] = gdt
    ram[0x4000 : 0x4000 + len(idt)] = idt
    special = SpecialRegisters(cr0=int(CR0.PE), cs=Segment.code32(8), ss=Segment.data(16))
    special.gdt = DescriptorTable(at, max(0, len(gdt) - 1))
    special.idt = DescriptorTable(0x4000, max(0, len(idt) - 1))
    return ram, special


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_kvmpys_own_tables(mode):
    ram, special, layout = start(mode, 3)
    view = gdt_view(reading(ram), special)
    kinds = {one.selector: one.kind for one in view.entries}
    bits = 64 if mode == "long" else 32
    assert (kinds[0] == "null" and kinds[0x08] == "64-bit code, execute/read") or mode != "long"
    assert kinds[Selector.DATA] == "data, read/write"
    assert kinds[Selector.CODE16] == "16-bit code, execute/read"
    assert kinds[Selector.TSS] == f"{bits}-bit TSS (busy)"
    assert not view.problem
    gates = idt_view(reading(ram), special)
    assert len(gates.entries) == 256 and not any(one.problem for one in gates.entries)
    assert [one.offset for one in gates.entries] == [
        layout.stubs + vector * STUB_SIZE for vector in range(256)
    ]
    assert gates.entries[3].dpl == 3 and gates.entries[8].name == "#DF"
    assert gates.entries[8].ist == (1 if mode == "long" else 0)
    tss = tss_view(reading(ram), special)
    assert (tss.bits, tss.problems, tss.ports) == (bits, (), ((0, 0xFFFF),))
    assert tss.fields["rsp0" if mode == "long" else "esp0"] > layout.base
    assert "every 0x10 on" in str(gates)


def test_descriptors_that_are_broken():
    tss = Segment.tss(0x10, 0x1000, 0x67)
    cases = [
        (b"\xff" * 3, False, "only 3 of 8 bytes"),
        (tss.system_descriptor()[:8], True, "only 8 of the 16"),
        (Segment(type=8, present=1, unusable=0, limit=1).descriptor(), False, "reserved"),
        (Segment(type=1, present=1, unusable=0, limit=1).descriptor(), True, "reserved"),
        (Segment(type=3, s=1, limit=0xFFFF).descriptor(), False, "not present"),
        (interrupt_gate32(0x1000, 8), False, "into the IDT"),
        (Segment(type=0xB, s=1, l=1, db=1, present=1, unusable=0, limit=1).descriptor(), True,
         "L and D"),
        (Segment.tss(0x10, 1 << 50, 0x67).system_descriptor(), True, "not canonical"),
        (tss.system_descriptor()[:13] + b"\x01\0\0", True, "upper half"),
    ]  # fmt: skip
    for raw, long_mode, words in cases:
        assert words in decode_descriptor(0x10, raw, long_mode=long_mode).problem, words
    assert decode_descriptor(0x10, tss.system_descriptor(), long_mode=True).problem == ""


def test_call_gates_say_where_they_lead():
    raw = interrupt_gate32(0x12345678, 0x18)
    raw = raw[:5] + bytes((0x80 | 3 << 5 | 12,)) + raw[6:]
    one = decode_descriptor(0x20, raw)
    assert (one.kind, one.target) == ("32-bit call gate", (0x18, 0x12345678))


def test_a_gdt_that_leaves_ram_or_ends_in_the_midst_of_an_entry():
    ram, special = flat()
    special.gdt = DescriptorTable(len(ram) - 12, 0xFFFF)
    view = gdt_view(reading(ram), special)
    assert len(view.entries) == 2 and "no RAM from 0x10000" in view.problem
    assert view.entries[1].kind == "cut off"
    special.gdt = DescriptorTable(0xFFFF_0000, 0xFFFF)
    assert gdt_view(reading(ram), special).entries == ()
    assert look_up(reading(ram), special, 0x10).problem == "only 0 of 8 bytes are there"
    special.gdt = DescriptorTable(0x2000, 0xB)
    assert "limit 0xb" in look_up(reading(ram), special, 0x8).problem


def test_the_ldt():
    ram, special = flat(bytes(8) + Segment.code32(8).descriptor())
    assert ldt_view(reading(ram), special).problem == "LDTR holds no LDT"
    assert look_up(reading(ram), special, 0xC).problem == "LDTR holds no LDT"
    ram[0x3000:0x3008] = Segment.data(0xC, dpl=3).descriptor()
    special.ldt = Segment(0x3000, 7, 0x18, 2, 1, unusable=0)
    (one,) = ldt_view(reading(ram), special).entries
    assert (one.selector, one.segment.dpl) == (4, 3)
    special.ldt.limit = 0xFFFF_FFFF
    assert ldt_view(reading(ram), special).problem


GATE_CASES = [
    (interrupt_gate32(0x1000, 8), ""),
    (bytes(8), "empty"),
    (interrupt_gate32(0x1000, 0), "selector is null"),
    (interrupt_gate32(0x1000, 0x10), "no code segment (data"),
    (interrupt_gate32(0x1000, 0x18), "code segment is not present"),
    (interrupt_gate32(0x1000, 0x80), "beyond the GDT's limit"),
    (interrupt_gate32(0x12345, 0x20), "limit 0xffff"),
    (interrupt_gate32(0x1000, 8)[:5] + b"\x0e\0\0", "not present: #NP"),
    (interrupt_gate32(0x1000, 8)[:5] + b"\x8b\0\0", "not a gate"),
]


def test_gates_that_are_broken():
    absent = Segment(type=0xB, s=1, limit=0xFFFF).descriptor()
    gdt = b"".join(
        (bytes(8), Segment.code32(8).descriptor(), Segment.data(16).descriptor(), absent,
         Segment.code16(0x20).descriptor())
    )  # fmt: skip
    ram, special = flat(gdt, b"".join(raw for raw, _ in GATE_CASES))
    view = idt_view(reading(ram), special)
    assert len(view.entries) == len(GATE_CASES)
    for gate, (_, words) in zip(view.entries, GATE_CASES, strict=True):
        assert words in gate.problem and bool(words) is bool(gate.problem), gate
    assert "beyond the IDT's limit" in gate_at(reading(ram), special, 200).problem
    special.idt = DescriptorTable(0, 0)
    assert "no room" in idt_view(reading(ram), special).problem
    special.idt = DescriptorTable(0xFFFF_FF00, 0x7FF)
    gates = idt_view(reading(ram), special).entries  # it wraps to address 0
    assert [one.problem[:6] for one in (gates[0], gates[31], gates[32])] == [
        "no RAM",
        "no RAM",
        "empty:",
    ]


def test_gates_of_long_mode():
    ram, special, layout = start("long", 3)
    at = layout.idt
    ram[at : at + 16] = interrupt_gate64(1 << 50, Selector.CODE64)
    ram[at + 16 : at + 32] = interrupt_gate64(0x1000, Selector.CODE32)
    ram[at + 32 : at + 48] = interrupt_gate64(0xFFFF_8000_0000_1000, Selector.CODE64, ist=5)
    first, second, third, *_ = idt_view(reading(ram), special).entries
    assert "not canonical" in first.problem and "not a 64-bit one" in second.problem
    assert (third.problem, third.ist, third.offset) == ("", 5, 0xFFFF_8000_0000_1000)


def test_real_mode_vectors():
    ram, special, _ = start("real", size=1 << 20)
    ram[4 * 8 : 4 * 8 + 4] = struct.pack("<HH", 0x1234, 0xF000)
    gate = idt_view(reading(ram), special).entries[8]
    assert (gate.selector, gate.offset, gate.kind) == (0xF000, 0x1234, "far address")
    assert "real mode" in gdt_view(reading(ram), special).problem
    assert tss_view(reading(ram), special).problems == ("real mode has no TSS",)


def test_a_tss_that_is_broken():
    ram, special, _ = start("long", 3)
    special.tr.limit = 0x20
    assert "no whole TSS" in tss_view(reading(ram), special).problems[0]
    special.tr.base = 1 << 40
    view = tss_view(reading(ram), special)
    assert "no RAM at 0x10000000000" in view.problems[-1] and not view.fields
    special.tr.unusable = 1
    assert tss_view(reading(ram), special).problems == ("TR holds no TSS",)


@given(st.binary(max_size=64), st.integers(0, 200))
def test_open_ports(bitmap, start_at):
    """Against a model that looks at one bit after the other."""
    ram, special = flat()
    special.tr = Segment.tss(0x28, 0x6000, 104 + start_at + len(bitmap))
    struct.pack_into("<H", ram, 0x6000 + 102, 104 + start_at)
    ram[0x6000 + 104 + start_at : 0x6000 + 104 + start_at + len(bitmap)] = bitmap
    view = tss_view(reading(ram), special)
    listed = {port for first, last in view.ports for port in range(first, last + 1)}
    assert listed == {
        port for port in range(8 * len(bitmap)) if not bitmap[port // 8] >> port % 8 & 1
    }
    assert list(view.ports) == sorted(view.ports)


def test_modes():
    names = {}
    for mode, ring in [("real", 0), ("protected16", 0), ("protected", 3), ("long", 3)]:
        _, special, _ = start(mode, ring, 1 << 20)
        names[mode] = (cpu_mode(special).name, cpu_mode(special).bits)
    assert names == {
        "real": ("real mode", 16),
        "protected16": ("protected mode, 16-bit code", 16),
        "protected": ("protected mode, 32-bit code", 32),
        "long": ("64-bit mode", 64),
    }
    _, special, _ = start("long")
    special.cs.l, special.cs.db = 0, 1
    assert cpu_mode(special).name == "compatibility mode, 32-bit code"
    _, special, _ = start("protected", 0, 1 << 20)
    assert cpu_mode(special, 1 << 17).name == "virtual-8086 mode"
    special.cr0 = 0
    assert cpu_mode(special).bits == 32


@given(st.integers(0, 1 << 32))
@settings(max_examples=40)
def test_hostile_state_gives_views_and_no_exceptions(seed):
    random = Random(seed)
    special = SpecialRegisters.unpack(random.randbytes(SpecialRegisters.SIZE))
    special.cr0 = random.choice([0x10, 0x11, 0x80000011, 0x80010011])
    special.cr4 = random.choice([0, 0x10, 0x20, 0x1020, 0x300020])
    special.efer = random.choice([0, 0x800, 0x500, 0xD00])
    for one in (special.gdt, special.idt, special.tr, special.ldt):
        if random.random() < 0.7:
            one.base &= 0x7FFF
    if random.random() < 0.7:
        special.cr3 &= 0x7FFF
    special.tr.unusable = special.ldt.unusable = 0
    special.tr.present = special.ldt.present = 1
    read = reading(bytearray(random.randbytes(0x8000)))
    for view in (gdt_view, ldt_view, idt_view, tss_view, page_map):
        assert str(view(read, special))
    for linear in (0, 0x1234, random.getrandbits(64)):
        assert str(page_walk(read, special, linear, "write"))
        assert str(disassemble(read, special, linear))
        assert str(hexdump(read, special, linear, 64))
