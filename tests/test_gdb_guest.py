"""Guests under the debugger, by a client of the tests' own: each mode, rings, vCPUs, ends."""

import re
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gdbclient import Client, Served, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy import ConfigError, Debug, HostError, Machine, Result, UnsupportedError, assemble
from kvmpy.boot import load_image
from kvmpy.gdb.control import Control
from kvmpy.gdb.description import REGISTERS
from kvmpy.gdb.host import Host
from kvmpy.gdb.packets import frame
from kvmpy.gdb.stops import Action, Stop
from kvmpy.probe import probe
from kvmpy.x86.exceptions import GuestException
from kvmpy.x86.segments import DescriptorTable

pytestmark = pytest.mark.usefixtures("kvm_host")

INC = {"real": b"\x40", "protected16": b"\x40", "protected": b"\x40", "long": b"\x48\xff\xc0"}
MODES = [
    *(("real", 0), ("protected16", 0), ("protected", 0), ("long", 0)),
    *(("protected", 3), ("long", 3)),
]
HLT = b"\xf4"


def needs(name: str) -> None:
    found = probe(name)
    if found.answer != "yes":
        pytest.skip(found.detail)


@pytest.mark.parametrize(("mode", "ring"), MODES)
def test_breakpoints_and_steps(tmp_path: Path, mode: str, ring: int) -> None:
    size = len(INC[mode])
    code = INC[mode] * 6 + b"\xe6\xe9" + b"\xeb\xfe"  # six times inc ax; out 0xe9, al; jmp $
    with served(tmp_path, code, mode=mode, ring=ring) as one, one.client() as gdb:
        assert gdb.register("rip") == 0x1000
        third, fourth = 0x1000 + 2 * size, 0x1000 + 3 * size
        reply = gdb.stop_at(third)
        assert reply.startswith(b"T05") and reply.endswith(b"swbreak:;")
        assert (gdb.register("rip"), gdb.register("rax")) == (third, 2)
        assert gdb.memory(0x1000, len(code)) == code
        assert gdb.ask(b"vCont;s:1").startswith(b"T05")
        assert (gdb.register("rip"), gdb.register("rax")) == (fourth, 3)
        # A breakpoint where it stands already is stepped over; one that is in the way is met.
        gdb.ask(b"Z0,%x,1" % fourth)
        gdb.ask(b"Z0,%x,1" % (fourth + size))
        assert gdb.ask(b"c").endswith(b"swbreak:;")
        assert (gdb.register("rip"), gdb.register("rax")) == (fourth + size, 4)
        for at in range(1, 4):
            assert gdb.ask(b"s").startswith(b"T05")
            assert gdb.register("rax") == min(4 + at, 6)
        assert one.machine.console == b"\x06"
        assert gdb.register("eflags") & 0x100 == 0
        assert gdb.memory(0x1000, len(code)) == code
        gdb.send(b"vCont;c")
        assert gdb.waits(0.02)
        gdb.interrupt()
        assert gdb.receive().startswith(b"T02")
        assert gdb.register("rip") == 0x1000 + 6 * size + 2


@pytest.mark.parametrize(("mode", "ring"), MODES)
def test_hardware_breakpoints(tmp_path: Path, mode: str, ring: int) -> None:
    needs("breakpoint-ring3" if (mode, ring) == ("long", 3) else "breakpoint")
    size = len(INC[mode])
    code = (
        INC[mode] * 2 + b"\xeb" + bytes((256 - 2 * size - 2,))
    )  # inc ax; inc ax; jmp to the first
    with served(tmp_path, code, mode=mode, ring=ring) as one, one.client() as gdb:
        assert gdb.ask(b"Z1,%x,1" % (0x1000 + size)) == b"OK"
        for count in (1, 3, 5):
            assert gdb.ask(b"c").endswith(b"hwbreak:;")
            assert (gdb.register("rip"), gdb.register("rax")) == (0x1000 + size, count)
        for at in range(3):
            assert gdb.ask(b"Z1,%x,1" % (0x2000 + at)) == b"OK"
        assert gdb.ask(b"Z1,3000,1").startswith(b"E.x86 has 4 debug registers")


def test_hardware_breakpoints_are_refused_where_there_are_none(tmp_path: Path) -> None:
    if probe("breakpoint-ring3").answer == "yes":
        pytest.skip("this host's KVM has hardware breakpoints in ring 3")
    with served(tmp_path, b"\x90\xeb\xfd", ring=3) as one, one.client() as gdb:
        assert gdb.ask(b"Z1,1001,1").startswith(b"E.this KVM has no hardware breakpoints")


def test_watchpoints(tmp_path: Path) -> None:
    code = assemble("mov byte ptr [0x8000], 7; nop; mov al, [0x8000]; nop; hlt", at=0x1000)
    with served(tmp_path, code) as one, one.client() as gdb:
        if probe("watchpoint").answer != "yes":
            assert gdb.ask(b"Z2,8000,1") == b""
            pytest.skip(probe("watchpoint").detail)
        assert gdb.ask(b"Z2,8001,2").startswith(b"E.2 bytes at 0x8001")
        assert gdb.ask(b"Z2,8000,1") == b"OK"
        assert gdb.ask(b"c").endswith(b"watch:8000;")
        assert gdb.memory(0x8000, 1) == b"\x07"


@pytest.mark.parametrize(("mode", "ring"), MODES)
def test_a_step_over_an_access_to_a_device_is_one_step(
    tmp_path: Path, mode: str, ring: int
) -> None:
    bits = {"real": 16, "protected16": 16, "protected": 32}.get(mode, 64)
    source = "out 0xe9, al; nop; in al, 0x10; nop; mov ax, 0x7ffd; nop; nop; nop"
    code = assemble(source, mode=mode, at=0x1000)
    places = [2, 3, 5, 6]
    where = 0xFFFFE if ring == 0 else 0x100000  # in ring 0, an access that RAM has half of
    if bits == 64:
        code = assemble(f"{source}; mov [{where}], eax; nop; mov ebx, [0x100000]; nop", at=0x1000)
    with served(tmp_path, bytes(code), mode=mode, ring=ring) as one, one.client() as gdb:
        seen: list[int | None] = []

        @one.machine.on_port(0x10)
        def port(offset: int, size: int, value: int | None) -> int:
            return 0x5A

        @one.machine.on_mmio(0x100000)
        def memory(offset: int, size: int, value: int | None) -> int:
            seen.append(value)
            return 0x1234

        for place in places:
            assert gdb.ask(b"s").startswith(b"T05")
            assert gdb.register("rip") == 0x1000 + place
        assert gdb.register("rax") & 0xFF == 0x5A
        if bits == 64:
            start = gdb.register("rip")
            for _ in range(4):
                gdb.ask(b"s")
            start = gdb.register("rip")
            for place in (7, 8, 15, 16):
                assert gdb.ask(b"s").startswith(b"T05")
                assert gdb.register("rip") == start + place
            assert gdb.register("rbx") == 0x1234
            assert seen == [0 if ring == 0 else 0x7FFD, None]


def test_a_range_is_stepped_through(tmp_path: Path) -> None:
    code = assemble("mov ecx, 5; again: dec ecx; jnz again; nop; hlt", at=0x1000)
    with served(tmp_path, code) as one, one.client() as gdb:
        gdb.ask(b"s")
        end = code.symbols["again"] + 4
        gdb.ask(b"vCont;r%x,%x:1" % (code.symbols["again"], end))
        assert (gdb.register("rip"), gdb.register("rcx")) == (end, 0)


def test_the_program_counter_of_a_segment_is_linear(tmp_path: Path) -> None:
    with served(tmp_path, b"\x90\x40\xf4", 0x20000, mode="real") as one, one.client() as gdb:
        assert one.machine.cpus[0].get_regs().rip == 0
        assert (gdb.register("rip"), gdb.register("cs_base")) == (0x20000, 0x20000)
        gdb.stop_at(0x20001)
        assert gdb.register("rip") == 0x20001
        assert gdb.set_register("rip", 0x20000) == b"OK"
        gdb.ask(b"s")
        assert gdb.register("rip") == 0x20001
        assert gdb.set_register("ds", 0x1234) == b"OK"
        assert gdb.register("ds_base") == 0x12340


def test_every_register_is_written_and_read(tmp_path: Path) -> None:
    with served(tmp_path, b"\x90\xf4") as one, one.client() as gdb:
        wanted = {
            **{register.name: 0x1122_3344_5566 + n for n, register in enumerate(REGISTERS[:16])},
            "eflags": 0x46,
            "fctrl": 0x27F,
            "mxcsr": 0x1F81,
            "fs_base": 0x7000,
            "cr8": 5,
            **{f"xmm{n}": n << 100 | 7 for n in range(16)},
            **{f"st{n}": (0x3FFF << 64) + (1 << 63) + n for n in range(8)},
            "ds": 0x28 | 3,
            "cr2": 0x1234,
            "idt_base": 0x5000,
            "idt_limit": 0xFF,
            "ftag": 0,
        }
        for name, value in wanted.items():
            assert gdb.set_register(name, value) == b"OK", name
        assert {name: gdb.register(name) for name in wanted} == wanted
        whole = gdb.ask(b"g")
        assert gdb.ask(b"G" + whole) == b"OK"
        assert gdb.ask(b"g") == whole
        gdb.ask(b"s")
        assert {name: gdb.register(name) for name in wanted} == wanted
        assert one.machine.cpus[0].get_regs().r15 == wanted["r15"]
        assert gdb.register("ftag") == 0
        for name, value in (("cr8", 16), ("ds", 0x18 | 7), ("cr4", 1 << 60)):
            before = gdb.register(name)
            assert gdb.set_register(name, value).startswith(b"E."), name
            assert gdb.register(name) == before
        assert gdb.ask(b"s")[:1] in b"TW"


def test_memory_is_that_of_the_guests_page_tables(tmp_path: Path) -> None:
    with served(tmp_path, HLT) as one, one.client() as gdb:
        tables = one.machine.cpus[0].get_sregs().cr3
        (pdpt,) = struct.unpack("<Q", one.machine.memory.read(tables, 8))
        one.machine.memory.write(tables + 8, struct.pack("<Q", pdpt))  # 512 GiB: the same again
        assert gdb.ask(b"M8000001ffc,8:6162636465666768") == b"OK"
        assert one.machine.memory.read(0x1FFC, 8) == b"abcdefgh"
        assert gdb.memory(0x8000001FFE, 4) == b"cdef"
        assert gdb.memory(0xFFFFE, 8) == one.machine.memory.read(0xFFFFE, 2)  # RAM ends there
        assert gdb.ask(b"m100000,4") == b"E0e"
        assert gdb.ask(b"m7fffffffffff,4") == b"E0e"
        assert gdb.ask(b"Mffffe,4:00000000") == b"E0e"
        assert gdb.ask(b"Z0,100000,1").startswith(b"E.no RAM at 0x100000")
        assert gdb.ask(b"Qqemu.PhyMemMode:1") == b"OK"
        assert gdb.memory(0x1FFE, 4) == b"cdef"
        assert gdb.ask(b"m8000001ffc,4") == b"E0e"


# Crashes and ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "options", "signal", "said"),
    [
        (b"\x0f\x0b", {}, b"T0b", "triple fault"),
        (b"\x0f\x0b", {"ring": 3}, b"T04", "#UD (invalid opcode) at rip 0x1001"),
        (b"\xf4", {"ring": 3}, b"T0b", "#GP"),
        (b"\x31\xc9\xf7\xf1", {"ring": 3}, b"T08", "#DE"),
        (b"\xa2" + b"\xff" * 8, {"ring": 3, "mode": "protected"}, b"T0b", "#GP"),
        (b"\xe6\x77", {"strict": True}, b"T0a", "unclaimed"),
    ],
)
def test_a_crash_is_a_stop(tmp_path: Path, code, options, signal: bytes, said: str) -> None:
    if options.get("mode") == "protected":
        code = b"\x0f\x20\xc0"  # mov eax, cr0
    with served(tmp_path, b"\x90" + code + HLT, **options) as one, one.client() as gdb:
        assert gdb.ask(b"c").startswith(signal)
        assert said in gdb.said
        if "strict" not in options:
            at = 0x1003 if code.startswith(b"\x31") else 0x1001
            assert gdb.register("rip") == at
            assert gdb.register("cs") & 3 == options.get("ring", 0)
            assert gdb.ask(b"c").startswith(signal)  # and again
            assert gdb.set_register("rip", 0x1000) == b"OK"
            assert gdb.ask(b"s").startswith(b"T05")
            assert gdb.register("rip") == 0x1001


@pytest.mark.parametrize(
    ("code", "reply", "outcome"),
    [
        (HLT, b"W00", "halt"),
        (b"\x66\xba\xf4\x00\xb0\x10\xee", b"W21", "debug-exit"),  # mov dx, 0xf4; mov al, 16; out
    ],
)
def test_an_end_is_told_with_its_status(tmp_path: Path, code, reply: bytes, outcome: str) -> None:
    for action in (b"c", b"s"):
        with served(tmp_path, code) as one, one.client() as gdb:
            while (said := gdb.ask(action)).startswith(b"T"):
                pass
            assert said == reply
            one.thread.join(5)
            assert one.result is not None and one.result.outcome == outcome


def test_a_device_that_fails_is_raised(tmp_path: Path) -> None:
    with served(tmp_path, b"\xe6\x10\xf4") as one, one.client() as gdb:

        @one.machine.on_port(0x10)
        def fail(offset: int, size: int, value: int | None) -> int:
            raise ZeroDivisionError("the device")

        assert gdb.ask(b"c") == b"X06"
        one.thread.join(5)
        assert isinstance(one.error, ZeroDivisionError)


# Ctrl-C, detaching, coming back, killing --------------------------------------------------------

COUNT = assemble("again: inc qword ptr [0x9000]; jmp again", at=0x1000)


def count(gdb: Client) -> int:
    return int.from_bytes(gdb.memory(0x9000, 8), "little")


@pytest.mark.parametrize("ring", [0, 3])
def test_ctrl_c_detach_and_back(tmp_path: Path, ring: int) -> None:
    with served(tmp_path, COUNT, ring=ring) as one:
        with one.client() as gdb:
            gdb.send(b"c")
            assert gdb.waits(0.02)
            gdb.interrupt()
            assert gdb.receive().startswith(b"T02")
            first = count(gdb)
            assert first > 0
            assert gdb.ask(b"Z0,1000,1") == b"OK"
            assert gdb.ask(b"D") == b"OK"  # and its breakpoints go with it
        one.wait(lambda: len(one.lines) == 2)
        assert "detached" in one.lines[1]
        time.sleep(0.02)
        with one.client() as gdb:
            assert gdb.ask(b"?").startswith(b"T02")
            second = count(gdb)
            assert second > first
            assert gdb.memory(0x1000, 2) == bytes(COUNT[:2])
            gdb.send(b"c")
            assert gdb.waits(0.02)
        one.wait(lambda: len(one.lines) == 3)  # the connection is lost in the middle of a run
        assert "stopped" in one.lines[2]
        with one.client() as gdb:
            third = count(gdb)
            assert third > second
            time.sleep(0.02)
            assert count(gdb) == third
            assert gdb.ask(b"vKill;1") == b"OK"
        one.thread.join(5)
        assert one.result is None and one.error is None
        one.machine.stop()
        assert one.machine.run(timeout=5).outcome == "stopped"
        assert one.machine.run(timeout=0.02).outcome == "timeout"


def test_a_machine_can_be_run_on_after_gdb(tmp_path: Path) -> None:
    code = assemble("nop; nop; mov eax, 5; hlt", at=0x1000)
    with served(tmp_path, code) as one, one.client() as gdb:
        gdb.stop_at(0x1001)
        gdb.ask(b"Z0,1002,1")
        gdb.send(b"k")
        one.thread.join(5)
        result = one.machine.run(timeout=5)
        assert (result.outcome, result.registers.rax) == ("halt", 5)


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with Machine("1M") as machine:
        with pytest.raises(ConfigError, match="nothing is loaded"):
            machine.gdb(0)
        machine.load(HLT)
        with pytest.raises(ConfigError, match="gdb address"):
            machine.gdb("nowhere")
        with pytest.raises(HostError, match="No such file or directory"):
            machine.gdb(f"unix:{tmp_path}/none/gdb")
    with Machine("1M", posted_console=True) as machine:
        machine.load(HLT)
        with pytest.raises(ConfigError, match="posted_console"):
            machine.gdb(0)


# What other hosts have ------------------------------------------------------------------------

EVERYTHING = Host(*[True] * 7)
NOTHING = Host(*[False] * 7)


def debug(machine: Machine, pc: int, dr6: int, vector: int = 1) -> Result:
    """What KVM_EXIT_DEBUG at `pc` makes of a run."""
    registers = machine.cpus[0].get_regs()
    registers.rip = pc
    return Result("debug", registers.pack(), 0.0, exit=Debug(vector, pc, dr6, 0))


def test_debug_exits_of_hosts_that_have_all_of_them() -> None:
    with Machine("1M") as machine:
        machine.load(bytes.fromhex("9090909090f4"))
        control = Control(machine, EVERYTHING)
        points, special = control.points, machine.cpus[0].get_sregs()
        points.insert(0, 0x1001, 1, special)
        points.insert(1, 0x1002, 1, special)
        for kind, address in ((2, 0x8000), (3, 0x8008), (4, 0x8010)):
            points.insert(kind, address, 8, special)
        with pytest.raises(ConfigError, match="4 debug registers"):
            points.insert(2, 0x8018, 8, special)
        points.remove(1, 0x1002)
        points.insert(1, 0x1003, 1, special)
        expected = {0x8000: "w8", 0x8008: "rw8", 0x8010: "rw8", 0x1003: "x"}
        assert points.registers() == expected
        assert points.registers(lifted=0x1003).keys() == {0x8000, 0x8008, 0x8010}
        control._set_debug(0, False, points.registers())
        points.arm(machine.cpus)
        assert machine.memory.read(0x1000, 5) == bytes.fromhex("90cc909090")
        found = [
            control._judged(0, debug(machine, 0x1000, dr6, vector), stepping=False)
            for dr6, vector in ((1, 1), (2, 1), (4, 1), (8, 1), (1 << 14, 1))
        ]
        assert [(one.reason, one.address) for one in found if isinstance(one, Stop)] == [
            *(("watch", 0x8000), ("rwatch", 0x8008), ("awatch", 0x8010)),
            *(("hwbreak", 0), ("step", 0)),
        ]
        one = control._judged(0, debug(machine, 0x1001, 0, 3), stepping=False)
        assert isinstance(one, Stop) and one.reason == "swbreak"
        one = control._judged(0, debug(machine, 0x1004, 0, 3), stepping=False)
        assert isinstance(one, Stop) and "of the guest's own" in one.text
        points.disarm()
        assert machine.memory.read(0x1000, 5) == bytes.fromhex("9090909090")
        control.release()


def test_a_host_that_has_none_of_them_is_told_of() -> None:
    with Machine("1M") as machine:
        machine.load(b"\x90\xf4")
        control = Control(machine, NOTHING)
        special = machine.cpus[0].get_sregs()
        for kind in (1, 2, 3, 4):
            with pytest.raises(UnsupportedError, match="this KVM has no"):
                control.points.insert(kind, 0x1000, 1, special)
        with socket.socket() as sock, pytest.raises(UnsupportedError, match="no single-stepping"):
            watch = SimpleNamespace(fileno=sock.fileno, interrupted=lambda: False)
            control.resume({0: Action("s")}, watch)


# Several vCPUs --------------------------------------------------------------------------------

TWO = assemble(
    """
first:  inc qword ptr [0x9000]
        jmp first
second: inc qword ptr [0x9008]
at:     jmp second
""",
    at=0x1000,
)


def two(one: Served) -> None:
    cpu = one.machine.cpus[1]
    registers = cpu.get_regs()
    registers.rip = TWO.symbols["second"]
    cpu.set_regs(registers)


@pytest.mark.parametrize("ring", [0, 3])
def test_two_vcpus_are_two_threads(tmp_path: Path, ring: int) -> None:
    with served(tmp_path, TWO, cpus=2, ring=ring) as one:
        two(one)
        with one.client() as gdb:
            assert gdb.ask(b"qfThreadInfo") == b"m1,2"
            assert gdb.stop_at(TWO.symbols["at"]).endswith(b"thread:2;swbreak:;")
            assert gdb.register("rip") == TWO.symbols["at"]
            numbers = struct.unpack("<QQ", gdb.memory(0x9000, 16))
            assert numbers[1] == 1
            assert gdb.ask(b"Hg1") == b"OK"
            assert gdb.register("rip") < TWO.symbols["second"]
            # One of them alone: the other stands still.
            for _ in range(4):
                assert b"thread:1;" in gdb.ask(b"vCont;s:1")
            later = struct.unpack("<QQ", gdb.memory(0x9000, 16))
            assert numbers[0] < later[0] <= numbers[0] + 2 and later[1] == 1
            # One by steps, the other beside it.
            for _ in range(4):
                assert b"thread:2;" in gdb.ask(b"vCont;s:2;c")
            last = struct.unpack("<QQ", gdb.memory(0x9000, 16))
            assert last[0] > later[0] + 2 and last[1] == 3
            gdb.send(b"vCont;c")
            assert gdb.waits(0.02)
            gdb.interrupt()
            assert gdb.receive().startswith(b"T02")
            assert gdb.ask(b"D") == b"OK"


def test_two_vcpus_at_one_breakpoint_are_both_told(tmp_path: Path) -> None:
    with served(tmp_path, TWO, cpus=2) as one, one.client() as gdb:
        gdb.ask(b"Z0,1008,1")
        seen = set()
        for _ in range(8):
            reply = gdb.ask(b"vCont;c")
            assert reply.endswith(b"swbreak:;")
            seen.add(reply.split(b"thread:")[1][:1])
            assert gdb.register("rip") == 0x1008
        assert seen == {b"1", b"2"}


def test_a_stop_that_came_beside_another_is_told_at_the_next_resume() -> None:
    with Machine("1M", cpus=2) as machine:
        machine.load(TWO)
        control = Control(machine, NOTHING)
        special = machine.cpus[0].get_sregs()
        control.points.insert(0, 0x1000, 1, special)
        both = [Stop(0, 5, "swbreak"), Stop(1, 5, "swbreak", text="this one")]
        assert control._first(list(both), False, 0) == both[0]
        with socket.socket() as sock:
            watch = SimpleNamespace(fileno=sock.fileno, interrupted=lambda: True)
            every = dict.fromkeys((0, 1), Action("c"))
            assert control.resume(every, watch) == both[1]
            assert machine.memory.read(0x9000, 16) == bytes(16)  # without running
            control._first(list(both), False, 0)
            control.points.remove(0, 0x1000)  # then there is nothing to tell of any more
            came = control.resume(every, watch)
        assert isinstance(came, Stop) and came.signal == 2
        control.release()


def test_another_vcpus_exception_is_not_ones_own() -> None:
    with Machine("1M", ring=3, cpus=2) as machine:
        machine.load(TWO)
        control = Control(machine, NOTHING)
        before = machine.cpus[0].get_regs()
        raised = GuestException(6, "#UD", "", None, 0x1234, 0x33, 2, 0x8000, 0x2B, None)
        result = Result("exception", before.pack(), 0.0, exception=raised)
        assert control._judged(0, result, stepping=False) is None
        assert machine.cpus[0].get_regs() == before


def test_the_guest_ends_when_all_have_halted(tmp_path: Path) -> None:
    code = assemble(
        """
        hlt
later:  mov ecx, 2000
again:  dec ecx
        jnz again
        mov byte ptr [0x9000], 1
        hlt
""",
        at=0x1000,
    )
    with served(tmp_path, code, cpus=2) as one:
        cpu = one.machine.cpus[1]
        registers = cpu.get_regs()
        registers.rip = code.symbols["later"]
        cpu.set_regs(registers)
        with one.client() as gdb:
            assert gdb.ask(b"vCont;c") == b"W00"
            one.thread.join(5)
        assert one.machine.memory.read(0x9000, 1) == b"\1"


# A guest with its own kernel and ring 3 ---------------------------------------------------------


def test_ring_3_of_a_guest_with_an_idt_of_its_own(tmp_path: Path) -> None:
    """ring3.S: int3 is its system call, and it has no gate for #DB."""
    image = load_image("ring3")
    with Machine.from_image(image) as machine:
        one = Served(machine, tmp_path / "gdb")
        try:
            with one.client() as gdb:
                # Where the kernel's handler begins: after the first int3 it knows its program.
                handler = image.symbols["breakpoint"]
                assert gdb.stop_at(handler).endswith(b"swbreak:;")
                table = machine.cpus[0].get_sregs().idt
                assert isinstance(table, DescriptorTable)
                before = machine.memory.read(table.base, table.limit + 1)
                assert gdb.stop_at(0x20000D).endswith(b"swbreak:;")  # hlt
                assert gdb.register("cs") & 3 == 3
                # The step ends in the handler of what it raises, as if nobody had stepped.
                assert gdb.ask(b"s").startswith(b"T05")
                assert gdb.register("rip") == image.symbols["general_protection"]
                words = struct.unpack("<4Q", gdb.memory(gdb.register("rsp"), 32))
                assert words[:3] == (0, 0x20000D, 0x23)
                assert words[3] & 0x100 == 0
                assert gdb.stop_at(0x20001A).endswith(b"swbreak:;")  # int3, the guest's own
                assert gdb.ask(b"s").startswith(b"T05")
                assert gdb.register("rip") == handler
                assert gdb.stop_at(0x20001B).endswith(b"swbreak:;")
                assert gdb.ask(b"s").startswith(b"T05")  # mov, which raises nothing
                assert gdb.register("rip") == 0x200020
                assert gdb.register("eflags") & 0x100 == 0
                assert machine.memory.read(table.base, table.limit + 1) == before
                # Every system call passes the handler, where a trap is for our own int3.
                assert gdb.stop_at(0x200025).endswith(b"swbreak:;")
                assert gdb.ask(b"c") == b"W07"
            one.thread.join(5)
        finally:
            one.end()
        assert machine.console.count(b"\n") == 3
        assert machine.memory.read(table.base, table.limit + 1) == before


# monitor ------------------------------------------------------------------------------------------


def test_monitor(tmp_path: Path) -> None:
    code = assemble("mov al, 'x'; out 0xe9, al; nop; hlt", at=0x1000)
    with served(tmp_path, code, ring=3) as one, one.client() as gdb:
        gdb.stop_at(0x1004)
        for line in gdb.monitor("help").splitlines():
            word = line.split()[0]
            assert "no command" not in gdb.monitor(word)
        assert "rax 0000000000000078" in gdb.monitor("regs")
        assert "port-out" in gdb.monitor("exits")
        assert "64-bit code, execute/read" in gdb.monitor("gdt")
        assert "#PF" in gdb.monitor("idt")
        assert "leads to physical 0x1000" in gdb.monitor("walk 0x1000")
        assert "no RAM is there" in gdb.monitor("walk 0xfffff000 write")
        assert "physical" in gdb.monitor("map")
        assert "page tables" in gdb.monitor("devices")
        assert "64-bit TSS" in gdb.monitor("tss")
        assert "LDTR" in gdb.monitor("ldt")
        assert "CS" in gdb.monitor("segments")
        assert "0x1000  b0 78" in gdb.monitor("mem 0x1000 2")
        assert "debug console" in gdb.monitor("devices")
        assert "cr3" in gdb.monitor("cr")
        assert "0x1004" in gdb.monitor("code") and "nop" in gdb.monitor("code")
        assert "no memory at" in gdb.monitor("mem 0xfffffff0 64")
        assert "1 to 4096" in gdb.monitor("mem 0 0x100000000")
        assert "usage: monitor walk ADDRESS" in gdb.monitor("walk")
        assert "usage: monitor regs" in gdb.monitor("regs 1")
        assert "is not an address" in gdb.monitor("walk nowhere")
        assert "use one of read" in gdb.monitor("walk 0 sniff")
        assert "no command 'frobnicate'" in gdb.monitor("frobnicate")
        assert "No closing quotation" in gdb.monitor("walk 'x")
        assert "on or off" in gdb.monitor("phys maybe")
        assert "goes back" in gdb.monitor("snapshot")
        gdb.ask(b"s")
        assert gdb.register("rip") == 0x1005
        assert "as it was" in gdb.monitor("reset")
        assert gdb.register("rip") == 0x1004
        assert gdb.ask(b"s").startswith(b"T05")


# Hostile clients ----------------------------------------------------------------------------------


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.binary(max_size=60).map(frame),
            st.tuples(
                st.sampled_from(b"m M X Z0, Z1, Z2, z0, p P G Hg Hc T qRcmd,".split()),
                st.integers(0, (1 << 64) - 1),
                st.sampled_from([b"", b",1", b",ffffffffffffffff", b"=00", b",1:00", b",4:X"]),
            ).map(lambda t: frame(b"%b%x%b" % t)),
        ),
        max_size=8,
    )
)
def test_no_bytes_break_the_server(hostile: Served, chunks: list[bytes]) -> None:
    with hostile.client() as gdb:
        for chunk in chunks:
            # What would run the guest, or end it, has tests of its own.
            gdb.sock.sendall(re.sub(rb"\$[kDvcCsS]", b"$?", chunk))
    with hostile.client() as gdb:
        assert gdb.ask(b"qC") == b"QC1"
        assert hostile.thread.is_alive()


@pytest.fixture
def hostile(tmp_path: Path):
    with served(tmp_path, COUNT) as one:
        yield one


@pytest.mark.parametrize(
    "packet", [b"c", b"s", b"vCont;c", b"vCont;r0,ffffffffffffffff:1", b"c7c00", b"sfffffffffff"]
)
def test_who_resumes_and_leaves_at_once_leaves_a_guest_that_is_stopped(
    tmp_path: Path, packet: bytes
) -> None:
    with served(tmp_path, b"\xeb\xfe") as one:
        for times in (1, 5):
            with one.client() as gdb:
                gdb.sock.sendall(frame(packet) * times)
            one.wait(lambda: "gdb is gone" in one.lines[-1])
            one.lines.append("and again")
        with one.client() as gdb:
            assert gdb.ask(b"?").startswith(b"T")


def test_a_client_that_does_not_read_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpy.gdb.server._PATIENCE", 0.1)
    with served(tmp_path, COUNT) as one:
        with one.client() as gdb, pytest.raises(OSError):
            for _ in range(1000):
                gdb.sock.sendall(frame(b"m0,2000") * 10)
        one.wait(lambda: len(one.lines) == 2)
        with one.client() as gdb:
            assert gdb.ask(b"?").startswith(b"T")


def test_a_flood_while_the_guest_runs_is_no_gdb(tmp_path: Path) -> None:
    with served(tmp_path, COUNT) as one:
        with one.client() as gdb:
            gdb.send(b"c")
            try:
                for _ in range(100):
                    gdb.sock.sendall(frame(b"g") * 100)
            except OSError:
                pass  # it was hung up on
        one.wait(lambda: len(one.lines) == 2)
        with one.client() as gdb:
            assert gdb.ask(b"?").startswith(b"T")
