"""`kvmpy step` and `kvmpy explain`, as a user meets them."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest

from kvmpy import load_image
from kvmpy.cli import main
from kvmpy.probe import probe

verb = import_module("kvmpy.cli.step")


def kvmpy(capfd, *arguments):
    status = main([*map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err.splitlines()


@pytest.fixture
def stepping(kvm_host):
    found = probe("single-step")
    if found.answer != "yes":
        pytest.skip(found.detail)


@pytest.mark.usefixtures("stepping")
class TestStep:
    def test_a_guest_to_its_end(self, capfd, tmp_path):
        guest = tmp_path / "guest.S"
        guest.write_text("start: mov al, 'A'\nout 0xe9, al\nhlt\n")
        status, out, err = kvmpy(capfd, "step", guest)
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert (status, err) == (0, [])
        assert lines == [
            "--- 64-bit mode, ring 0",
            "1 00001000 start b0 41 mov al, 0x41 rax=0x41",
            "2 00001002 start+0x2 e6 e9 out 0xe9, al",
            "exit: 0x41 'A' to port 0xe9",
            "3 00001004 start+0x4 f4 hlt",
            "exit: HLT",
            "the guest ends: halt",
        ]

    def test_diff_shows_what_was_there_before(self, capfd):
        place = ("--from", "real+0x1f", "--until", "protected")
        status, out, _ = kvmpy(capfd, "step", "boot_sector", *place, "--diff")
        assert status == 0
        for text in ("cr0: 0x10 -> 0x11", "CR0.PE = 1: protected mode", "cs: 0x0 -> 0x8",
                     "--- protected mode, 16-bit code"):  # fmt: skip
            assert text in out
        assert "cr0=0x11" not in out

    def test_count_and_until(self, capfd):
        status, out, _ = kvmpy(capfd, "step", "hello_long", "--count", 3)
        assert status == 0 and len(re.findall(r"^ +\d+  ", out, re.MULTILINE)) == 3
        assert out.endswith("--- the guest could go on: --count N shows more\n")
        status, out, _ = kvmpy(capfd, "step", "hello_long", "--until", "0x1008")
        assert status == 0 and len(re.findall(r"^ +\d+  ", out, re.MULTILINE)) == 2
        assert "could go on" not in out

    @pytest.mark.parametrize("option", ["--until", "--from"])
    def test_a_place_that_is_none(self, capfd, option):
        status, out, err = kvmpy(capfd, "step", "boot_sector", option, "nowhere")
        assert (status, out, len(err)) == (2, "", 1)
        assert "'nowhere' is no address, and no symbol of" in err[0] and "done, gdt" in err[0]

    @pytest.mark.parametrize(
        ("code", "expected", "words"),
        [
            ("ud2", 126, "shutdown: triple fault"),
            ("mov al, 3\nout 0xf4, al", 7, ""),
            ("out 0x55, al", 126, "unclaimed"),
        ],
    )
    def test_exit_statuses(self, capfd, tmp_path, code, expected, words):
        guest = tmp_path / "guest.S"
        guest.write_text(code + "\n")
        status, _, err = kvmpy(capfd, "step", guest, "--strict")
        assert status == expected and words in "".join(err) and len(err) == bool(words)

    def test_a_symbol_does_nothing_to_a_terminal(self, capfd, monkeypatch):
        image = load_image("hello_long")
        evil = replace(image, symbols={"\x1b[31mstart\n": image.entry})
        monkeypatch.setattr(verb, "image_of", lambda *arguments: evil)
        _, out, _ = kvmpy(capfd, "step", "hello_long", "--count", 1)
        assert "\x1b" not in out and "\ufffd[31mstart\ufffd" in out

    def test_a_deadline(self, capfd, tmp_path):
        guest = tmp_path / "guest.S"
        guest.write_text("here: jmp here\n")
        status, out, err = kvmpy(capfd, "step", guest, "--count", 10**9, "--timeout", 0.1)
        assert status == 124 and err == ["kvmpy: timeout: the time given to the run was over"]
        assert "the guest ends: timeout" in out and "Interrupted" not in out

    @pytest.mark.parametrize(
        ("code", "options", "status"),
        [
            ("nop\nlast: hlt\n", (), 0),
            ("nop\nlast: hlt\n", ("--until", "last"), 0),
            ("last: jmp last\n", ("--timeout", 0.1), 124),
        ],
    )
    def test_a_place_that_is_never_reached(self, capfd, tmp_path, code, options, status):
        guest = tmp_path / "guest.S"
        guest.write_text(code)
        done, _, err = kvmpy(capfd, "step", guest, "--from", "0x2000", *options)
        assert done == status and re.search(r"--from 0x2000: the guest did not come there", err[0])
        assert kvmpy(capfd, "step", guest, "--from", "last", "--count", 1)[::2] == (0, [])


ON_PAPER = """
import sys
import kvmpy.abi, kvmpy.kvm
def refuse(*arguments, **options): raise SystemExit("KVM was opened")
kvmpy.kvm.KVM.__init__ = refuse
from kvmpy.cli import main
sys.exit(main(sys.argv[1:]))
"""


class TestExplain:
    def test_it_needs_no_kvm(self):
        command = [sys.executable, "-c", ON_PAPER, "explain", "boot_sector"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert "starts in real mode, ring 0, at 0x7c00" in done.stdout

    @pytest.mark.parametrize(
        ("guest", "words"),
        [
            ("boot_sector", ["real mode, ring 0, no paging", "0x7c00  start", "ljmp 0:0x7c05"]),
            ("hello_long", ["64-bit mode, ring 0, 4-level", "page tables", "lea rsi, [rip + 0xd]"]),
            ("hello_protected", ["protected mode, 32-bit code, ring 0, no paging", "GDT"]),
        ],
    )
    def test_shipped_guests(self, capfd, guest, words):
        status, out, err = kvmpy(capfd, "explain", guest)
        assert (status, err) == (0, [])
        for word in ("taken for an assembly source", "guest-physical memory", "segments", *words):
            assert word in out

    def test_what_files_are_taken_for(self, capfd, tmp_path):
        file = tmp_path / "file"
        file.write_bytes(b"\xf4".ljust(510, b"\0") + b"\x55\xaa")
        assert "taken for a boot sector (it is 512 bytes" in kvmpy(capfd, "explain", file)[1]
        file.write_bytes(b"\xf4")
        out = kvmpy(capfd, "explain", file, "--ring", 3, "--load", "0x5000", "--memory", "5G")[1]
        assert "taken for a flat binary" in out and "ring 3, at 0x5000" in out
        assert "slot 1" in out and re.search(r"0x5000  f4 +hlt\n", out)

    def test_a_file_with_control_characters_in_its_name_or_symbols(self, capfd, tmp_path):
        file = tmp_path / "a\x1b[31mb"
        file.write_bytes(b"\xf4")
        assert "\x1b" not in kvmpy(capfd, "explain", file)[1]

    @pytest.mark.parametrize(
        "arguments",
        [
            ("no-such-guest",),
            ("hello_long", "--memory", "12K"),
            ("hello_long", "--memory", "1T"),
            ("hello_long", "--entry", "0x80000000"),
            ("hello_real", "--ring", "3"),
            ("hello_long", "--load", "0xff9000"),
            ("hello_long", "--load", "0x80000000"),
        ],
    )
    @pytest.mark.usefixtures("kvm_host")
    def test_it_refuses_what_run_refuses_in_the_same_words(self, capfd, arguments):
        explained = kvmpy(capfd, "explain", *arguments)
        assert explained == kvmpy(capfd, "run", *arguments, "--timeout", 1)
        assert explained[0] == 2 and explained[1] == "" and len(explained[2]) == 1
