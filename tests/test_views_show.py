"""The three forms of each view: plain, by rich, and as HTML."""

from html.parser import HTMLParser
from io import StringIO

import pytest

from kvmpy import ConfigError, Machine, assemble
from kvmpy.exits import PortOut
from kvmpy.stepping import Change, Step
from kvmpy.views.code import CodeView, HexView, Instruction
from kvmpy.views.cpumode import cpu_mode
from kvmpy.views.registers import ControlView, RegistersView, flag_names
from kvmpy.views.show import Grid, Shown, clean
from kvmpy.views.symbols import Symbols, places
from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

EVIL = "<script>alert('&')</script>\x1b[31m[red]\n"
VOID = {"br", "hr"}


class Checker(HTMLParser):
    """Refuses tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def well_formed(html: str) -> set[str]:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker.seen


def by_rich(view: object) -> str:
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=200, color_system=None).print(view)
    return out.getvalue()


class Evil(Shown):
    __slots__ = ()

    def grids(self):
        return (
            Grid(EVIL, (EVIL, ""), [(EVIL, EVIL)], (EVIL,), frozenset({0})),
            Grid(EVIL),
            Grid("", ("", ""), [("a", "b")]),
        )


def test_nothing_of_a_guests_gets_through():
    html = Evil()._repr_html_()
    assert well_formed(html) <= {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;script&gt;" in html
    for text in (str(Evil()), by_rich(Evil()), html):
        assert "\x1b" not in text
    assert "[red]" in by_rich(Evil()) and clean("a\x9bb\u202e") == "a\ufffdb\ufffd"


def test_a_symbols_name_is_text():
    code = CodeView(cpu_mode(SpecialRegisters()), (Instruction(0, b"\x90", "nop", EVIL),))
    step = Step(1, cpu_mode(SpecialRegisters()), 0, 0, 0, EVIL, b"\x90", "nop",
                (Change("rax", 0, 1),), exits=(PortOut(0xE9, 1, EVIL.encode()),))  # fmt: skip
    for view in (code, step):
        assert "<script>" not in view._repr_html_() and "\x1b" not in str(view)
        well_formed(view._repr_html_())


@pytest.fixture(scope="module")
def machine(kvm_host):
    with Machine("2M", "long", 3) as machine:
        machine.load(assemble("start: nop; jmp start", mode="long", at=0x4000))
        yield machine


VIEWS = ["registers", "control", "segments", "gdt", "ldt", "idt", "tss", "map", "memory_map",
         "disassemble"]  # fmt: skip


@pytest.mark.parametrize("name", [*VIEWS, "walk", "hexdump"])
def test_each_view_has_three_forms(machine, name):
    arguments = {"walk": (0x4000, "fetch"), "hexdump": (0x4000, 100)}.get(name, ())
    view = getattr(machine.view, name)(*arguments)
    text, html, rich = str(view), view._repr_html_(), by_rich(view)
    assert text and rich.strip()
    well_formed(html)
    for grid in view.grids():
        for row in grid.rows:
            assert len(row) == len(grid.columns)
            for cell in row:
                assert cell in text and cell.strip() in rich


def test_views_of_a_machine(machine):
    view = machine.view
    assert view.registers().registers.rip == 0x4000
    assert "64-bit mode, ring 3, 4-level" in str(view.control())
    assert [one.symbol for one in view.disassemble(count=2).instructions] == ["start", "start+0x1"]
    walk = view.walk(machine.layout.stubs, "read")
    assert (walk.allowed, walk.cpl) == (False, 3)
    assert view.walk(machine.layout.stubs, "read", cpl=0).allowed
    assert "slot 0" in str(view.memory_map()) and "serial" in str(view.memory_map())
    assert view.cpu(0).registers() == view.registers()
    with pytest.raises(ConfigError, match="no vCPU 1"):
        view.cpu(1)
    assert view.hexdump(0x4000, 2).data == b"\x90\xeb"
    assert view.hexdump(0x4000, 2, linear=False).data == b"\x90\xeb"
    assert view.map().ranges[0].physical == 0


@pytest.mark.parametrize(
    ("access", "cpl", "named"),
    [("foo", None, "access='foo'"), ("read", 7, "cpl=7"), ("read", -1, "cpl=-1")],
)
def test_a_walk_for_what_there_is_not(machine, access, cpl, named):
    with pytest.raises(ConfigError, match=named):
        machine.view.walk(0x1000, access, cpl)
    with pytest.raises(ConfigError, match=named):
        machine.snapshot().view.walk(0x1000, access, cpl)


def test_views_of_a_snapshot(machine):
    snapshot = machine.snapshot()
    for name in VIEWS:
        if name not in ("memory_map", "disassemble"):
            assert getattr(snapshot.view, name)() == getattr(machine.view, name)()
    assert snapshot.view.walk(0x4000) == machine.view.walk(0x4000)


def test_flags_by_name():
    assert flag_names(0x80000011 | 1 << 60, CR0) == f"PE ET PG {1 << 60:#x}"
    assert flag_names(0x3046, RFLAGS) == "PF ZF IOPL=3"
    assert all(one.meaning.endswith(".") for kind in (CR0, CR4, EFER, RFLAGS) for one in kind)


def test_registers_bit_by_bit():
    text = str(RegistersView(Registers(rax=0x1234, rflags=0x246)))
    assert "rax 0000000000001234" in text and "rflags 0x246: PF ZF IF IOPL=0" in text
    assert "External interrupts are taken." in text
    special = SpecialRegisters(cr0=0x80000011, cr3=0x1001, cr4=0x20020, efer=0x500)
    text = str(ControlView(special))
    assert "PCID 0x1" in text and "SDM Vol.3 10.8.5" in text and "APM Vol.2 3.1.7" in text
    assert "page directory at 0x1000" in str(ControlView(SpecialRegisters(cr0=1 << 31, cr3=0x1008)))


def test_symbols():
    symbols = Symbols({"a": 0x1000, "b": 0x1010})
    assert [symbols.at(at) for at in (0xFFF, 0x1000, 0x100F, 0x1011)] == [
        "", "a", "a+0xf", "b+0x1"
    ]  # fmt: skip
    assert symbols.at(0x1000000) == "" and Symbols().at(0) == ""
    assert places({"a": 0x1000, "PORT": 0xE9}, 0x1000, 16) == {"a": 0x1000}


def test_a_dump_leaves_out_what_repeats():
    text = str(HexView(0x1000, bytes(64) + b"hello" + bytes(11), True))
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["0x1000", "*", "0x1040"]
    assert "hello" in text


def test_steps_ask_for_what_makes_sense(machine):
    with pytest.raises(ConfigError, match="no symbol 'nowhere'; there is start"):
        machine.trace_instructions(until="nowhere")
    with pytest.raises(ConfigError, match="count=-1"):
        machine.trace_instructions(count=-1)
