"""The command line as a user meets it: statuses, streams, messages. Each run has a deadline."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("kvm_host")

HLT = b"\xf4"
SPIN = b"\xeb\xfe"  # jmp $


def say(text: bytes) -> bytes:
    """mov al, byte; out 0xe9, al - for each byte."""
    return b"".join(b"\xb0" + bytes([byte]) + b"\xe6\xe9" for byte in text)


def kvmpy(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 30, **options}
    command = [sys.executable, "-m", "kvmpy", *map(str, arguments)]
    return subprocess.run(command, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def image(tmp_path: Path):
    def write(code: bytes, name: str = "guest.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(code)
        return path

    return write


def out_word(port: int, value: int) -> bytes:
    """mov dx, port; mov ax, value; out dx, ax."""
    return (
        b"\x66\xba" + port.to_bytes(2, "little") + b"\x66\xb8" + value.to_bytes(2, "little")
    ) + b"\x66\xef"


def out_byte(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al."""
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes([value]) + b"\xee"


@pytest.mark.parametrize(
    ("code", "options", "outcome", "status"),
    [
        (HLT, (), "halt", 0),
        (out_byte(0x64, 0xFE) + SPIN, (), "reset", 0),
        (out_byte(0xCF9, 0x06) + SPIN, (), "reset", 0),
        (out_word(0x604, 0x2000) + SPIN, (), "power-off", 0),
        (out_byte(0xF4, 0x10) + SPIN, (), "debug-exit", 33),
        (out_byte(0xF4, 0x80) + SPIN, (), "debug-exit", 1),
        (SPIN, ("--timeout", "0.2"), "timeout", 124),
        (out_byte(0x80, 1) * 2 + HLT, ("--max-exits", "2"), "max-exits", 124),
        (b"\x0f\x0b", (), "shutdown", 126),
        (b"\x0f\x0b", ("--ring", "3"), "exception", 126),
        (out_byte(0x1234, 1) + HLT, ("--strict",), "unclaimed", 126),
        (out_byte(0x1234, 1) + HLT, (), "halt", 0),
    ],
)
def test_outcome_and_status(image, tmp_path, code, options, outcome, status) -> None:
    report = tmp_path / "report.json"
    done = kvmpy("run", image(say(b"!") + code), *options, "--report", report)
    assert done.returncode == status, done.stderr
    facts = json.loads(report.read_text())
    assert facts["outcome"] == outcome
    assert facts["exit_status"] == status
    assert done.stdout == b"!"
    assert facts["console"] == "!"
    assert facts["mode"] == "long"
    assert facts["backend"].startswith("kvm_")
    assert facts["seconds"] > 0
    assert set(facts["registers"]) >= {"rax", "r15", "rip", "rflags"}
    assert facts["exits"]["port-out"] >= 1


def test_a_crash_shows_registers_code_and_advice(image) -> None:
    done = kvmpy("run", image(b"\x48\xb8\xef\xbe\xad\xde\x00\x00\x00\x00\x0f\x0b"), "--ring", "3")
    text = done.stderr.decode()
    assert "#UD" in text
    assert "00000000deadbeef" in text
    assert "ud2" in text
    assert "fix: " in text
    selectors = re.search(r" cs (\w{4}) .* ss (\w{4}) ", text)
    assert selectors is not None  # those of ring 3, not of the stub that reported it
    assert [int(one, 16) & 3 for one in selectors.groups()] == [3, 3]


def test_unclaimed_accesses_are_reported(image) -> None:
    done = kvmpy("run", image(out_byte(0x1234, 1) * 3 + HLT))
    assert b"port 0x1234: 3 writes" in done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("text", "options", "where"),
    [
        ("nop\nspin: jmp spin\n", ("--timeout", "0.2"), "at 0x1001 spin: jmp 0x1001"),
        ("nop\nmore: out 0xe9, al\njmp more\n", ("--max-exits", "2"), "more"),
    ],
)
def test_a_guest_out_of_time_says_where_it_was(tmp_path, text: str, options, where: str) -> None:
    guest = tmp_path / "guest.S"
    guest.write_text(text)
    done = kvmpy("run", guest, *options)
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, len(lines)) == (124, 2)
    assert re.match(r"kvmpy: at 0x[0-9a-f]+ \w+(\+0x\w)?: \w+", lines[1]) and where in lines[1]


@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [
        (
            "real",
            bytes(16),
            "a jump, call or return has led to where nothing was loaded, or an exc",
        ),
        ("long", bytes(16), "a jump, call or return has led to where nothing was loaded)"),
        ("long", bytes(2) + b"\xeb\xfe", None),
    ],
)
def test_a_guest_that_is_lost_among_zeros_is_told_so(image, mode, code, words) -> None:
    """Zeros are an instruction, and a vector table of zeros leads to them: it does not die."""
    done = kvmpy("run", image(code), "--mode", mode, "--timeout", "0")
    line = done.stderr.decode().splitlines()[1]
    assert (done.returncode, "zeros" in line) == (124, words is not None), line
    assert words is None or words in line


def test_standard_input_feeds_the_serial_port(image) -> None:
    # l: mov dx, 0x3fd; in al, dx; test al, 1; jz l; mov dx, 0x3f8; in al, dx; out dx, al;
    # cmp al, '.'; jne l; hlt
    echo = bytes.fromhex("66bafd03 ec a801 74f7 66baf803 ec ee 3c2e 75ed f4".replace(" ", ""))
    assert kvmpy("run", image(echo), stdin=None, input=b"hello.").stdout == b"hello."
    fed = image(b"from a file.", "input")
    assert kvmpy("run", image(echo), "--input", fed).stdout == b"from a file."


def test_output_is_unbuffered(image) -> None:
    command = [sys.executable, "-m", "kvmpy", "run", str(image(say(b"now") + SPIN))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"now"  # while the guest goes on spinning
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert rest == b""
    assert process.returncode == 130
    assert errors == b"kvmpy: interrupted\n"


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.08, 0.12, 0.2, 0.4])
def test_ctrl_c_at_any_moment(image, delay: float) -> None:
    path = image(SPIN)
    # exec, so that no moment of Python's own start is part of it: from `import kvmpy` on.
    call = f"raise SystemExit(cli.main(['run', {str(path)!r}]))"
    script = f"print(flush=True); import kvmpy.cli as cli; {call}"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    if b"Traceback" in errors:
        assert b"in main" not in errors, "an interrupt after main() began must not be a traceback"
    else:
        assert (process.returncode, errors) == (130, b"kvmpy: interrupted\n")


def test_standard_output_closed_early(image, tmp_path) -> None:
    report = tmp_path / "report.json"
    read, write = os.pipe()
    os.close(read)
    done = kvmpy(
        "run", image(say(b"x") + SPIN), "--report", report,
        capture_output=False, stdout=write, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 125
    assert done.stderr == b"kvmpy: standard output was closed early; the guest was stopped\n"
    assert json.loads(report.read_text())["console"] == "x"


@pytest.mark.parametrize(
    "arguments",
    [("step", "GUEST"), ("explain", "GUEST"), ("lab",), ("guests",), ("--help",), ("info",)],
)
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_full_disk_behind_standard_output(image, arguments, unbuffered: str) -> None:
    guest = image(HLT)
    with open("/dev/full", "wb") as full:
        done = kvmpy(
            *(guest if word == "GUEST" else word for word in arguments),
            capture_output=False, stdout=full, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.stderr == b"kvmpy: standard output failed: No space left on device\n"
    assert done.returncode == 125


def test_a_report_for_a_full_disk(image) -> None:
    done = kvmpy("run", image(say(b"!") + HLT), "--report", "/dev/full")
    assert (done.returncode, done.stdout) == (125, b"!")  # it was run
    assert done.stderr == b"kvmpy: writing the report /dev/full failed: No space left on device\n"


def test_closed_standard_streams_are_not_taken_for_others(image, tmp_path) -> None:
    script = f"{sys.executable} -m kvmpy run {image(say(b'x') + HLT)}"
    done = subprocess.run(["bash", "-c", f"{script} >&-"], capture_output=True, timeout=30)
    assert done.returncode == 125
    assert done.stderr == b"kvmpy: standard output was closed early; the guest was stopped\n"
    done = subprocess.run(["bash", "-c", f"{script} 2>&- <&-"], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, b"x")


def test_a_message_has_no_control_characters(tmp_path) -> None:
    source = tmp_path / "garbage.S"
    source.write_bytes(b"\x1b[2J\x07 '" + bytes(range(128, 256)) * 20)
    done = kvmpy("asm", source)
    assert done.returncode == 2
    assert not any(byte < 32 and byte != 10 for byte in done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_posted_console_prints_the_same(image) -> None:
    text = bytes(range(33, 127)) * 5
    assert kvmpy("run", image(say(text) + HLT), "--posted-console").stdout == text


BAD = [
    (("nope.bin",), "nope.bin"),
    (("EMPTY",), "empty"),
    (("DIRECTORY",), "directory"),
    (("GOOD", "--memory", "0"), "0"),
    (("GOOD", "--memory", "-1M"), "-1M"),
    (("GOOD", "--memory", "5000"), "5000"),
    (("GOOD", "--memory", "9999T"), "9999T"),
    (("GOOD", "--memory", "900G"), "256G"),
    (("GOOD", "--memory", "lots"), "lots"),
    (("GOOD", "--mode", "virtual8086"), "virtual8086"),
    (("GOOD", "--mode", "real", "--ring", "3"), "ring 3"),
    (("GOOD", "--ring", "2"), "2"),
    (("GOOD", "--entry", "0x40000000"), "0x40000000"),
    (("GOOD", "--load", "0x40000000"), "0x40000000"),
    (("GOOD", "--load", "0xfffff0"), "0xfffff0"),
    (("GOOD", "--load", "here"), "here"),
    (("GOOD", "--timeout", "-1"), "-1"),
    (("GOOD", "--timeout", "nan"), "nan"),
    (("GOOD", "--max-exits", "0"), "0"),
    (("GOOD", "--input", "/no/such/input"), "/no/such/input"),
    (("GOOD", "--report", "/no/such/directory/report"), "/no/such/directory/report"),
    (("GOOD", "--frobnicate"), "--frobnicate"),
    ((), "GUEST"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=lambda value: "_".join(value)[:40])
def test_bad_input_is_one_line_that_names_it(image, tmp_path, arguments, named) -> None:
    places = {
        "GOOD": image(HLT),
        "EMPTY": image(b"", "empty"),
        "DIRECTORY": tmp_path,
    }
    done = kvmpy("run", *(places.get(word, word) for word in arguments))
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert done.stdout == b""
    assert len(lines) == 1, lines
    assert lines[0].startswith("kvmpy: ")
    assert named in lines[0]


def test_an_unknown_verb() -> None:
    done = kvmpy("rum")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert b"run" in done.stderr


def test_guests_are_listed_and_run_by_name() -> None:
    done = kvmpy("guests")
    names = [line.split()[0] for line in done.stdout.decode().splitlines()]
    assert "hello_long" in names
    done = kvmpy("run", "hello_long")
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")


def test_asm_shows_addresses_bytes_and_symbols(tmp_path) -> None:
    source = tmp_path / "one.S"
    source.write_text("# one - a test\n# load: 0x2000\nstart:\n  mov al, 'A'\n  hlt\n")
    out = tmp_path / "one.bin"
    done = kvmpy("asm", source, "--out", out)
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "b0 41" in text
    assert "2002" in text
    assert "start" in text
    assert out.read_bytes() == b"\xb0\x41\xf4"
    source.write_text("  mov al, nosuch\n")
    done = kvmpy("asm", source)
    assert done.returncode == 2
    assert b"line 1" in done.stderr
    assert b"nosuch" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lgdt [gdtr]; spin: jmp spin; gdtr: .word 31; .quad 0xd0000000", True),
        ("lgdt [gdtr]; spin: jmp spin; gdtr: .word 31; .quad 0x5000", False),
        ("lgdt [gdtr]; mov eax, 16; mov ds, eax; hlt; gdtr: .word 31; .quad 0xd0000000", True),
    ],
)
def test_a_guest_out_of_time_whose_gdt_is_nowhere(tmp_path, text: str, told: bool) -> None:
    guest = tmp_path / "guest.S"
    guest.write_text(text)
    done = kvmpy("run", guest, "--timeout", "0.2")
    if done.returncode != 124 and "spin" not in text:
        pytest.skip("this host's KVM does not spin on it")
    assert done.returncode == 124
    line = b"kvmpy: GDTR's base is 0xd0000000, where there is no RAM: loading a segment register"
    assert (line in done.stderr) == told
