"""`kvmpy run --gdb` with a real gdb, in scripts, as a user has it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import assemble

PATIENCE = 20
GDB = shutil.which("gdb")
pytestmark = [
    pytest.mark.usefixtures("kvm_host"),
    pytest.mark.skipif(GDB is None, reason="gdb is not installed (apt install gdb)"),
]
GUESTS = Path(__file__).parent.parent / "guests"


class Waiting:
    """`kvmpy run ... --gdb`, which waits for gdb."""

    def __init__(self, socket: Path, *arguments: object) -> None:
        self.socket = socket
        command = [sys.executable, "-m", "kvmpy", "run", *map(str, arguments)]
        self.process = subprocess.Popen(
            [*command, "--gdb", f"unix:{socket}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said = ""

    def hear(self, words: str) -> None:
        """Wait for a line on standard error."""
        assert self.process.stderr is not None
        while words not in self.said:
            line = self.process.stderr.readline().decode()
            assert line, f"it ended: {self.said}"
            self.said += line

    def start(self, *commands: str) -> "subprocess.Popen[str]":
        arguments = [part for one in commands for part in ("-ex", one)]
        return subprocess.Popen(
            [GDB or "", "-batch", "-nx", "-ex", f"target remote {self.socket}", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def gdb(self, *commands: str) -> str:
        """What gdb prints for these commands."""
        with self.start(*commands) as process:
            try:
                return process.communicate(timeout=PATIENCE)[0]
            finally:
                process.kill()

    def end(self) -> tuple[int, str]:
        """Exit status and standard output."""
        out, err = self.process.communicate(timeout=PATIENCE)
        self.said += err.decode()
        return self.process.returncode, out.decode()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[object]:
    made: list[Waiting] = []

    def start(*arguments: object) -> Waiting:
        made.append(Waiting(tmp_path / "gdb", *arguments))
        made[-1].hear("waiting for gdb on")
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.communicate()


def test_the_real_mode_guest(run) -> None:
    one = run("hello_real")
    said = one.gdb(
        "info registers rip cs cs_base cr0",
        "break *0x7c09", "continue", "print (char)$al", "stepi", "print/x $pc",
        "monitor code", "x/s 0x7c10", "set var *(char*)0x7c11 = 'a'",
        "delete", "continue",
    )  # fmt: skip
    assert re.search(r"rip +0x7c00", said) and "Breakpoint 1, 0x0000000000007c09" in said
    assert "$1 = 72 'H'" in said and "$2 = 0x7c0b" in said
    assert "jmp 0x7c04" in said and '"Hello from real mode\\n"' in said
    assert "exited normally" in said
    assert one.end() == (0, "Hallo from real mode\n")


def test_protected_mode_is_watched_by_steps(run) -> None:
    one = run("hello_protected")
    said = one.gdb(
        "set can-use-hw-watchpoints 0", "watch $al", "continue", "continue",
        "info registers cs", "print $cr0 & 1", "delete", "continue",
    )  # fmt: skip
    assert said.count("Watchpoint 1: $al") >= 2 and "New value = 72" in said
    assert "$1 = 1" in said
    assert one.end() == (0, "Hello from protected mode\n")


def test_control_registers_are_numbers_that_can_be_set(run) -> None:
    one = run("hello_long")
    said = one.gdb(
        "set var $efer = 0xd01", "print/x $efer", "set var $cr4 = 0x6a0", "print/x $cr4",
        "set var $cr0 = 0x80000033", "print/x $cr0", "set var $eflags = 0x246", "print $eflags",
        "set var $cr0 = 0", "kill",
    )  # fmt: skip
    assert "$1 = 0xd01" in said and "$2 = 0x6a0" in said and "$3 = 0x80000033" in said
    assert "$4 = [ PF ZF IF ]" in said
    assert "Invalid cast" not in said and "KVM refuses the special registers" in said


def test_long_mode_with_everything_in_it(run, tmp_path: Path) -> None:
    """Ring 0: registers, memory, breakpoints by patch and by register, threads, monitor."""
    code = assemble("again: inc rax; mov [0x9000], rax; cmp rax, 100; jne again; hlt", at=0x1000)
    image = tmp_path / "guest.bin"
    image.write_bytes(code)
    one = run(image)
    store = code.symbols["again"] + 3
    said = one.gdb(
        f"break *{store} if $rax == 42", "continue", "print $rax", "print/x $efer", "print $cr4",
        "info threads", "set var $rbx = 0x1234", "set var $xmm1.v2_int64[0] = 5",
        "print $xmm1.v2_int64", "print $st0", "set var {long}0x9008 = -2", "print {long}0x9008",
        "print {long}0x900000000", "monitor walk 0x1000", "monitor exits", "delete",
        "tbreak *0x1000", "continue", "stepi 3", "print $pc", "print {long}0x9000", "continue",
    )  # fmt: skip
    assert "$1 = 42" in said
    assert "$2 = 0xd00" in said and "$3 = 1568" in said
    assert re.search(r"\* 1 +Thread 1 \(64-bit mode, ring 0\)", said)
    assert "{5, 0}" in said and "= -2" in said
    assert "Cannot access memory at address 0x900000000" in said
    assert "leads to physical 0x1000" in said
    assert "$9 = 43" in said or "= 43" in said
    assert "exited normally" in said
    assert one.end()[0] == 0


def test_ring_3_and_its_exceptions(run, tmp_path: Path) -> None:
    code = assemble("mov eax, 1; inc eax; inc eax; at: inc eax; ud2", at=0x1000)
    image = tmp_path / "guest.bin"
    image.write_bytes(code)
    one = run(image, "--ring", 3)
    said = one.gdb(
        f"break *{code.symbols['at']}", "continue", "print $eax", "stepi", "print $eax",
        "print $cs & 3", "continue", "x/i $pc", "kill",
    )  # fmt: skip
    assert re.findall(r"\$\d = (\d+)", said) == ["3", "4", "3"]
    assert "kvmpy: #UD (invalid opcode) at rip 0x100b" in said
    assert "SIGILL" in said and "ud2" in said
    assert one.end() == (137, "")
    assert "killed by gdb" in one.said


def test_a_triple_fault_is_there_to_look_at(run, tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(b"\x90\x0f\x0b")
    one = run(image)
    said = one.gdb(
        "continue", "x/i $pc", "monitor idt", "monitor reset", "maintenance flush register-cache",
        "print $pc", "detach",
    )  # fmt: skip
    assert "kvmpy: shutdown: triple fault" in said
    assert "SIGSEGV" in said and "0x1001:\tud2" in said
    assert "any exception shuts down" in said
    assert "0x1000" in said.splitlines()[-2]
    one.hear("the guest is stopped: shutdown")  # without gdb there is nobody to show it to
    assert "0x1001" in one.gdb("print $pc", "kill")
    assert one.end()[0] == 137


def test_ctrl_c_detach_and_back(run, tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(assemble("again: inc qword ptr [0x9000]; jmp again", at=0x1000))
    one = run(image)
    commands = ("echo going\\n", "continue", "print {long}0x9000", "detach")
    with one.start(*commands) as gdb:
        assert gdb.stdout is not None
        for line in gdb.stdout:
            if "going" in line:
                break
        time.sleep(0.3)
        gdb.send_signal(signal.SIGINT)
        said = gdb.communicate(timeout=PATIENCE)[0]
    assert "SIGINT" in said
    first = int(re.findall(r"\$1 = (\d+)", said)[0])
    assert first > 0
    one.hear("detached")
    said = one.gdb("print {long}0x9000", "kill")
    assert int(re.findall(r"\$1 = (\d+)", said)[0]) > first
    assert one.end()[0] == 137


def test_gdb_dies_and_another_comes(run, tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(assemble("again: inc qword ptr [0x9000]; jmp again", at=0x1000))
    one = run(image)
    with one.start("break *0x2000", "continue") as gdb:
        time.sleep(0.5)
        gdb.kill()
    one.hear("gdb is gone, the guest is stopped")
    said = one.gdb("x/2i 0x1000", "kill")
    assert "incq" in said and "jmp" in said
    assert one.end()[0] == 137


def test_the_status_is_the_guests(run) -> None:
    one = run("ring3")
    assert "exited with code 07" in one.gdb("continue")  # gdb says it in octal
    assert one.end()[0] == 7


@pytest.mark.parametrize("running", [False, True])
def test_ctrl_c_at_kvmpy_itself(run, tmp_path: Path, running: bool) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(b"\xeb\xfe")
    one = run(image)
    if running:
        one.gdb("detach")
        one.hear("detached")
    os.kill(one.process.pid, signal.SIGINT)
    assert one.end()[0] == 130
    assert not one.socket.exists()


def test_what_is_wrong_is_one_line() -> None:
    for address, status, words in (
        ("nowhere", 2, "use PORT, HOST:PORT or unix:PATH"),
        ("unix:/nonexistent/x", 125, "No such file or directory"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "kvmpy", "run", "hello_long", "--gdb", address],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (status, 1)
        assert words in done.stderr


@pytest.mark.slow
def test_a_c_guest_by_its_source(run, tmp_path: Path) -> None:
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("gcc or make is not installed")
    subprocess.run(
        ["make", "-s", "-C", GUESTS / "c", "CC=gcc -g", f"BUILD={tmp_path}", "hello"],
        check=True, timeout=PATIENCE, capture_output=True,
    )  # fmt: skip
    elf = tmp_path / "hello.elf"
    one = run(elf)
    said = one.gdb(
        f"symbol-file {elf}", "break main", "continue", "next", "next", "tbreak putch", "continue",
        "print character", "backtrace", "finish", "continue",
    )  # fmt: skip
    assert "Breakpoint 1, main () at hello.c" in said
    assert "$1 = 48 '0'" in said
    assert re.search(r"#2 +print_number \(number=0\) at .*\n#3 +main \(\) at hello.c", said)
    assert one.end() == (0, "Hello from C in ring 0\n")
