"""`kvmpy trace` and `kvmpy stat` as a user meets them."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy import HostError
from kvmpy.cli.live import Kept
from kvmpy.cli.reading import Reading
from kvmpy.trace import Tally, Totals

pytestmark = pytest.mark.usefixtures("kvm_host")

HLT = b"\xf4"
SPIN = b"\xeb\xfe"


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


def test_exits_go_to_standard_error_and_the_console_to_standard_output(image) -> None:
    done = kvmpy("trace", image(say(b"Hi\xff\n") + b"\xe4\x21" + HLT))
    assert (done.returncode, done.stdout) == (0, b"Hi\xff\n")
    lines = done.stderr.decode().splitlines()
    said = [line for line in lines if "port-" in line and "0x1" in line]
    assert "debug console <- 'H'" in said[0]
    assert "debug console <- '\\xff'" in said[2]
    assert "PIC mask -> 0xff" in said[4]
    assert any(line.split()[:2] == ["port-out", "4"] for line in lines)  # the summary
    assert any("in KVM_RUN" in line and "%" in line for line in lines)


@pytest.mark.parametrize(
    ("code", "options", "status"),
    [
        (SPIN, ("--timeout", "0.2"), 124),
        (b"\xb0\x10\xe6\xf4" + SPIN, (), 33),
        (b"\x0f\x0b", (), 126),
        (say(b"x") * 9, ("--max-exits", "3"), 124),
    ],
)
@pytest.mark.parametrize("verb", ["trace", "stat"])
def test_exit_statuses_are_those_of_run(image, verb: str, code: bytes, options, status) -> None:
    done = kvmpy(verb, image(code), *options)
    assert done.returncode == status, done.stderr
    assert b"in KVM_RUN" in done.stderr


@pytest.mark.parametrize("verb", ["trace", "stat"])
def test_what_the_exit_that_ends_the_run_took_to_serve_is_not_known(image, verb: str) -> None:
    """No entry comes after it: that is not 0 ns."""
    done = kvmpy(verb, image(say(b"x") + b"\xb0\x10\xe6\xf4" + SPIN))
    (row,) = [row for row in done.stderr.decode().splitlines() if "0xf4 " in row and "serve" in row]
    assert row.split("to serve")[0].split()[-1 if verb == "trace" else -2] == "-"
    assert "0 ns" not in row


def test_where_both_streams_are_one_the_console_comes_by_lines(image) -> None:
    done = kvmpy("trace", image(say(b"ab\ncd") + HLT), stderr=subprocess.STDOUT,
                 stdout=subprocess.PIPE, capture_output=False)  # fmt: skip
    lines = done.stdout.decode().splitlines()
    at = lines.index("  console | ab")
    assert "<- '\\n'" in lines[at - 1]  # after what made it ...
    assert "<- 'c'" in lines[at + 1]  # ... and before what came then
    assert lines.index("  console | cd") > at  # without an end of its line, but not lost
    assert sum("debug console <- " in line for line in lines) == 5


def test_on_a_terminal_the_console_comes_by_lines(image) -> None:
    ours, theirs = pty.openpty()
    path = image(say(b"hello\n") + HLT)
    kvmpy("trace", path, stdout=theirs, stderr=theirs, capture_output=False)
    os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 65536):
            seen += data
    except OSError:
        pass  # EIO: all is read
    os.close(ours)
    assert b"  console | hello\r\n" in seen


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "html"])
def test_a_trace_in_a_file(image, tmp_path, form: str) -> None:
    out = tmp_path / f"trace.{form}"
    done = kvmpy("trace", image(say(b"A") * 3000 + HLT), "--out", out)
    assert (done.returncode, done.stdout) == (0, b"A" * 3000)
    assert b"3001 exits" in done.stderr
    assert b"dropped" not in done.stderr
    assert b"<- 'A'" not in done.stderr
    text = out.read_text()
    assert "debug console &lt;- &#x27;A&#x27;" in text if form == "html" else "<- 'A'" in text
    if form == "jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        assert sum(row.get("kind") == "port-out" for row in rows) == 3000
        assert rows[-1]["end"]["dropped"] == 0
    if form == "json":
        assert len(json.loads(text)["traceEvents"]) >= 6000


def test_a_guest_that_computes_is_seen_while_it_runs(image) -> None:
    path = image(say(b"now") + SPIN)
    command = [sys.executable, "-m", "kvmpy", "trace", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(3) == b"now"
        while b"<- 'w'" not in process.stderr.readline():
            pass  # while the guest goes on spinning
        process.send_signal(2)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted\n" in errors
    assert b"3 exits in" in errors


def test_a_closed_standard_error_ends_the_guest(image) -> None:
    read, write = os.pipe()
    os.close(read)
    done = kvmpy("trace", image(say(b"x") * 9 + SPIN), stdout=subprocess.PIPE, stderr=write,
                 capture_output=False)  # fmt: skip
    os.close(write)
    assert done.returncode == 125


def test_diff(image, tmp_path) -> None:
    one, same, other = (tmp_path / f"{name}.jsonl" for name in ("one", "same", "other"))
    for path, text in ((one, b"kvm"), (same, b"kvm"), (other, b"kVm")):
        kvmpy("trace", image(say(text) + HLT), "--out", path)
    done = kvmpy("trace", "diff", one, same)
    assert (done.returncode, done.stdout) == (0, b"the same exits\n")
    done = kvmpy("trace", "diff", one, other)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1
    assert lines[0] == "vCPU 0: they part after 1 exits: value"
    assert "<- 'k'" in lines[1]
    assert any(line.startswith("-") and "<- 'v'" in line for line in lines)
    assert any(line.startswith("+") and "<- 'V'" in line for line in lines)
    assert kvmpy("trace", "diff", one, other).stdout == done.stdout
    done = kvmpy("trace", "diff", one, image(HLT))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_diff_says_what_is_not_there(image, tmp_path) -> None:
    whole, cut, lossy = (tmp_path / f"{name}.jsonl" for name in ("whole", "cut", "lossy"))
    kvmpy("trace", image(say(b"kvm") + HLT), "--out", whole)
    text = whole.read_text()
    lossy.write_text(text.replace('"dropped": 0', '"dropped": 5'))
    done = kvmpy("trace", "diff", whole, lossy)
    assert (done.returncode, done.stdout) == (0, b"the same exits, of those that are there\n")
    assert done.stderr.startswith(f"kvmpy: {lossy} lacks 5 records".encode())
    cut.write_text(text[: text.index("<- 'v'")])
    done = kvmpy("trace", "diff", whole, cut)
    assert done.returncode == 1 and b"one of them ends" in done.stdout
    assert done.stderr == f"kvmpy: {cut} was cut off after 1 records\n".encode()
    done = kvmpy("trace", "diff", whole, "/dev/zero")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_guest_of_a_verbs_name_needs_a_path(image, tmp_path) -> None:
    image(say(b"!") + HLT, "diff")
    assert kvmpy("trace", "./diff", cwd=tmp_path).stdout == b"!"
    assert kvmpy("trace", "diff", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("trace", "GOOD", "--out", "x.xml"), ".jsonl"),
        (("trace", "GOOD", "--out", "/no/such/place.txt"), "/no/such/place.txt"),
        (("trace", "GOOD", "--out", "/no/such/place.html"), "/no/such/place.html"),
        (("trace", "GOOD", "--max-exits", "0"), "0"),
        (("trace",), "usage"),
        (("stat", "GOOD", "--out", "/no/such/place"), "/no/such/place"),
        (("stat", "GOOD", "--interval", "0"), "0"),
        (("stat", "nope"), "nope"),
    ],
)
def test_bad_input(image, arguments, named: str) -> None:
    good = image(HLT)
    done = kvmpy(*(good if word == "GOOD" else word for word in arguments))
    assert done.returncode == 2
    assert named.lower() in done.stderr.decode().lower()
    assert b"Traceback" not in done.stderr


def test_stat_counts_as_json(image) -> None:
    done = kvmpy("stat", image(say(b"hey") + b"\xe4\x21" + HLT), "--json")
    assert (done.returncode, done.stdout) == (0, b"hey")
    facts = json.loads(done.stderr.splitlines()[-1])
    assert facts["exits"] == {"port-out": 3, "port-in": 1, "halt": 1}
    assert facts["exit_status"] == 0
    assert facts["in_kvm_run_ns"] > 0
    by_name = {one["name"]: one["exits"] for one in facts["addresses"]}
    assert by_name == {"debug console": 3, "PIC mask": 1, "": 1}
    if facts["kvm"]:
        assert facts["kvm"]["vCPU 0"]["exits"] >= 5  # KVM_RUN may come back inside the kernel


def test_the_seconds_of_stat_are_those_of_the_run(image, tmp_path) -> None:
    """Shares are of them. To describe a crash takes longer than this guest did, and is no part."""
    report = tmp_path / "report.json"
    done = kvmpy("stat", image(b"\x0f\x0b"), "--json", "--report", report)
    facts = json.loads(done.stderr.splitlines()[-1])
    assert facts["seconds"] == json.loads(report.read_text())["seconds"]


@pytest.mark.parametrize("instead", ["/dev/full", "/no/such/place"])
def test_a_trace_that_cannot_be_written_after_the_run(tmp_path, instead: str) -> None:
    kept = Kept(tmp_path / "trace.json")
    (tmp_path / "trace.json").unlink()
    (tmp_path / "trace.json").symlink_to(instead)
    with pytest.raises(HostError):  # which is status 125
        kept.finish(0)


def test_statistics_for_a_full_disk(image) -> None:
    done = kvmpy("stat", image(HLT), "--out", "/dev/full")
    assert done.returncode == 125
    assert (
        done.stderr == b"kvmpy: writing the statistics /dev/full failed: No space left on device\n"
    )


def test_times_between_two_readings_are_never_negative() -> None:
    def reading(nanoseconds: int, exits: int) -> Reading:
        tally = Tally("port-out", 0xE9, exits, nanoseconds, nanoseconds)
        totals = Totals(*[nanoseconds] * len(Totals._fields))
        return Reading(0.0, {}, totals, {("port-out", 0xE9): tally}, {})

    between = reading(999, 2).since(reading(1000, 1), frozenset())
    assert set(between.totals) == {0}
    assert between.tallies["port-out", 0xE9][2:] == (1, 0, 0)


def test_stat_prints_what_came_in_between(image, tmp_path) -> None:
    out = tmp_path / "stat"
    code = b"\xb0\x41\xe6\xe9" + SPIN
    done = kvmpy(
        "stat", image(code), "--timeout", "0.7", "--interval", "0.1", "--json", "--out", out
    )
    assert (done.returncode, done.stdout) == (124, b"A")
    *between, total = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(between) >= 2
    assert sum(one["exits"].get("port-out", 0) for one in between) <= 1
    assert total["exits"] == {"port-out": 1}
    assert total["interrupted"] > 0
    assert all(one["in_kvm_run_ns"] >= 0 for one in between)
    done = kvmpy("stat", image(code), "--timeout", "0.4", "--interval", "0.1")
    assert done.stderr.decode().count("% in KVM_RUN") >= 1
