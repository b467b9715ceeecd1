"""`kvmpy snapshot` and `kvmpy resume`, as a user meets them."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmpy import Machine, Snapshot, SnapshotError
from kvmpy.cli import main
from kvmpy.snapshot.newfile import check_new_file

pytestmark = pytest.mark.usefixtures("kvm_host")

SOURCE = """# words - says one word after another
# mode: MODE
# ring: RING
# load: 0x7c00
start:
    mov al, 'a'
    out 0xe9, al
    out 0x80, al
middle:
    mov al, 'b'
    out 0xe9, al
    in al, 0x64
last:
    mov al, 'c'
    out 0xe9, al
    mov al, 5
    out 0xf4, al
spin:
    jmp spin
"""


def source(folder: Path, mode: str = "long", ring: int = 0, text: str = SOURCE) -> Path:
    path = folder / "words.S"
    path.write_text(text.replace("MODE", mode).replace("RING", str(ring)))
    return path


def kvmpy(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    status = main([*map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err.splitlines()


MODES = [("real", 0), ("protected16", 0), ("protected", 0), ("long", 0), ("long", 3)]


@pytest.mark.parametrize(("mode", "ring"), MODES)
@pytest.mark.parametrize("place", ["symbol=start", "symbol=middle", "symbol=last", "exit=2"])
def test_to_a_place_and_on_from_it(
    tmp_path: Path, capfd: Any, mode: str, ring: int, place: str
) -> None:
    said = {"symbol=start": "", "symbol=middle": "a", "symbol=last": "ab", "exit=2": "a"}[place]
    out, report = tmp_path / "words.snapshot", tmp_path / "report"
    guest = source(tmp_path, mode, ring)
    options = ("--memory", "1M", "--timeout", 20)
    done = kvmpy(capfd, "snapshot", guest, "--at", place, "--out", out, *options)
    assert done == (0, said, [])
    snapshot = Snapshot.load(out)
    if place.startswith("symbol"):  # the code is as the source has it
        kvmpy(capfd, "snapshot", guest, "--at", "exit=1", "--out", tmp_path / "plain", *options)
        plain = Snapshot.load(tmp_path / "plain")
        assert snapshot.read(0x7C00, 0x20) == plain.read(0x7C00, 0x20)
    done = kvmpy(capfd, "resume", out, "--timeout", 20, "--report", report)
    assert done == (11, "abc"[len(said) :], [])
    facts = json.loads(report.read_text())
    assert (facts["outcome"], facts["console"], facts["mode"]) == ("debug-exit", "abc", mode)
    assert snapshot.config.ring == ring


def test_at_a_port(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "one"
    guest = source(tmp_path)
    for port, said in (("0x80", "a"), (0x64, "ab"), ("0xe9", "a")):
        done = kvmpy(capfd, "snapshot", guest, "--at", f"port={port}", "--out", out)
        assert done == (0, said, [])
        assert kvmpy(capfd, "resume", out, "--timeout", 20) == (11, "abc"[len(said) :], [])


def test_resume_has_the_statuses_of_run(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "one"
    text = SOURCE.replace("out 0xf4, al", "out 0x82, al")
    kvmpy(capfd, "snapshot", source(tmp_path, text=text), "--at", "symbol=last", "--out", out)
    status, said, lines = kvmpy(capfd, "resume", out, "--timeout", 0.2)
    assert (status, said, len(lines)) == (124, "c", 3)  # where, and what touched port 0x82
    assert kvmpy(capfd, "resume", out, "--max-exits", 1)[:2] == (124, "c")
    text = SOURCE.replace("mov al, 5", "ud2")
    kvmpy(capfd, "snapshot", source(tmp_path, text=text), "--at", "symbol=last", "--out", out)
    assert kvmpy(capfd, "resume", out, "--timeout", 20)[:2] == (126, "c")


def test_a_guest_that_ends_before(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "one"
    spinning = SOURCE.replace("middle:", "again: jmp again\nmiddle:")
    crashing = SOURCE.replace("middle:", "ud2\nmiddle:")
    for text, place, status in (
        (SOURCE, "exit=99", 2),
        (SOURCE.replace("middle:", "hlt\nmiddle:"), "symbol=last", 2),
        (SOURCE, "port=0x99", 2),
        (spinning, "symbol=middle", 124),
        (spinning, "port=0x64", 124),
        (crashing, "exit=99", 126),
        (crashing, "port=0x64", 126),
    ):
        guest = source(tmp_path, text=text)
        options = ("--timeout", 0.5, "--out", out)
        done, _, lines = kvmpy(capfd, "snapshot", guest, "--at", place, *options)
        assert (done, len(lines)) == (status, 1), (place, lines)
        assert "before it came to" in lines[0]
        assert not out.exists()


def test_info_and_diff(tmp_path: Path, capfd: Any) -> None:
    guest = source(tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    kvmpy(capfd, "snapshot", guest, "--at", "symbol=middle", "--out", one)
    options = ("--compress", "zstd")
    kvmpy(capfd, "snapshot", guest, "--at", "symbol=last", "--out", other, *options)
    status, text, lines = kvmpy(capfd, "snapshot", "info", one, other, "--verify")
    assert (status, lines) == (0, [])
    shown = f"{one} {other} 16777216 zstd 0x7c00, RIP port 0x3f8 console right".split()
    for words in ("long, ring 0", "RIP 0x7c06", "irqchip none", "2 bytes", *shown):
        assert words in text, words
    assert kvmpy(capfd, "snapshot", "diff", one, one) == (0, "0 pages differ, in 0 bytes\n", [])
    status, text, lines = kvmpy(capfd, "snapshot", "diff", one, other)
    assert (status, lines) == (1, [])
    assert "cpu0.rip: 0x7c06 -> 0x7c0c" in text
    assert "console: 61 -> 6162" in text
    with one.open("r+b") as file:
        file.seek(0x1000 + 0x7C00)
        file.write(b"!")
    assert kvmpy(capfd, "snapshot", "info", one)[0] == 0  # of the pages it says nothing
    assert "(--verify)" in kvmpy(capfd, "snapshot", "info", one)[1]
    for command in (
        ("snapshot", "info", one, "--verify"),
        ("snapshot", "diff", one, other),
        ("resume", one),
    ):
        status, text, lines = kvmpy(capfd, *command)
        assert (status, text, len(lines)) == (2, "", 1)
        assert "altered" in lines[0]
    with pytest.raises(SnapshotError):
        Snapshot.load(one)


BAD = [
    (("snapshot",), "GUEST"),
    (("snapshot", "GOOD"), "--at"),
    (("snapshot", "GOOD", "--at", "exit=1"), "--out"),
    (("snapshot", "GOOD", "--at", "exit=0", "--out", "OUT"), "exit=0"),
    (("snapshot", "GOOD", "--at", "exit=x", "--out", "OUT"), "exit=x"),
    (("snapshot", "GOOD", "--at", "port=0x10000", "--out", "OUT"), "port=0x10000"),
    (("snapshot", "GOOD", "--at", "symbol=", "--out", "OUT"), "symbol="),
    (("snapshot", "GOOD", "--at", "noon", "--out", "OUT"), "noon"),
    (("snapshot", "GOOD", "--at", "symbol=nosuch", "--out", "OUT"), "middle"),
    (("snapshot", "GOOD", "--at", "symbol=beyond", "--out", "OUT"), "beyond"),
    (("snapshot", "GOOD", "--at", "exit=1", "--out", "OUT", "--compress", "lzma"), "lzma"),
    (("snapshot", "nosuch", "--at", "exit=1", "--out", "OUT"), "nosuch"),
    (("snapshot", "info"), "FILE"),
    (("snapshot", "info", "GOOD"), "no snapshot"),
    (("snapshot", "info", "nosuch"), "nosuch"),
    (("snapshot", "diff", "GOOD"), "FILE"),
    (("snapshot", "diff", "GOOD", "GOOD"), "no snapshot"),
    (("resume",), "FILE"),
    (("resume", "GOOD"), "no snapshot"),
    (("resume", "nosuch"), "nosuch"),
    (("resume", "GOOD", "--verify", "some"), "some"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=lambda value: "_".join(value)[:40])
def test_bad_input_is_one_line(tmp_path: Path, capfd: Any, arguments: Any, named: str) -> None:
    text = SOURCE.replace("start:", ".set beyond, 0x7fffffff\nstart:")
    places = {"GOOD": source(tmp_path, text=text), "OUT": tmp_path / "out"}
    words = [places.get(word, word) for word in arguments]
    status, said, lines = kvmpy(capfd, *words)
    assert (status, said) == (2, "")
    assert named in "\n".join(lines)
    if len(words) > 1:
        assert len(lines) == 1, lines
        assert lines[0].startswith("kvmpy: ")


def test_a_place_that_cannot_be_written(tmp_path: Path, capfd: Any) -> None:
    guest = source(tmp_path)
    for out in (tmp_path, tmp_path / "no" / "one"):
        done = kvmpy(capfd, "snapshot", guest, "--at", "exit=1", "--out", out)
        assert done[0] == 125
        assert len(done[2]) == 1
        assert "cannot save there" in done[2][0]


def test_verbs_win_over_guests_of_that_name(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("info").write_bytes(b"\xe6\x80\xf4")
    assert kvmpy(capfd, "snapshot", "info")[0] == 2
    done = kvmpy(capfd, "snapshot", "./info", "--at", "exit=1", "--out", "one")
    assert done == (0, "", [])


@pytest.mark.parametrize("verb", ["run", "trace", "stat", "step", "explain", "snapshot"])
def test_a_snapshot_in_the_place_of_a_guest(tmp_path: Path, capfd: Any, verb: str) -> None:
    out = tmp_path / "one"
    options = ("--at", "exit=1", "--out", out)
    kvmpy(capfd, "snapshot", source(tmp_path), *options, "--timeout", 20)
    with out.open("r+b") as file:
        file.truncate(1 << 31)  # larger than any guest
    done = kvmpy(capfd, verb, out, *(options if verb == "snapshot" else ()))
    assert done[0] == 2
    assert f"{out}: is a snapshot: `kvmpy resume {out}` goes on with it" in done[2][-1]


@pytest.mark.parametrize("verb", ["snapshot", "trace"])
def test_help_shows_the_options_for_a_guest(capfd: Any, verb: str) -> None:
    status, text, _ = kvmpy(capfd, verb, "--help")
    assert status == 0
    for option in ("--out FILE", "--timeout SECONDS", "--ring", "diff"):
        assert option in text
    assert text.count("--help") == 1


def test_what_cannot_be_saved_is_known_before_the_guest_runs(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, at = source(tmp_path), ("--at", "symbol=last", "--timeout", 20)
    taken = tmp_path / "taken"
    taken.mkdir()
    for out, reason in (
        (tmp_path / "no" / "one", "No such file or directory"),
        (guest / "one", "Not a directory"),
        (taken, "it is no regular file"),
    ):
        status, text, lines = kvmpy(capfd, "snapshot", guest, *at, "--out", out)
        assert (status, text, len(lines)) == (125, "", 1)
        assert f"{out}: cannot save there: {reason}" in lines[0]
    monkeypatch.setitem(sys.modules, "zstandard", None)
    out = tmp_path / "one"
    done = kvmpy(capfd, "snapshot", guest, *at, "--out", out, "--compress", "zstd")
    assert done[:2] == (2, "") and "pip install 'kvmpy[zstd]'" in done[2][0]
    assert sorted(tmp_path.iterdir()) == [taken, guest]


def test_a_file_system_without_unnamed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check leaves nothing behind there, either."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    check_new_file(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_a_symbol_that_is_nearly_right(tmp_path: Path, capfd: Any) -> None:
    for name, meant in (
        ("midle", "did you mean middle?"),
        ("x", "it has last, middle, spin, start"),
    ):
        place = ("--at", f"symbol={name}", "--out", tmp_path / "one")
        status, _, lines = kvmpy(capfd, "snapshot", source(tmp_path), *place)
        assert status == 2 and lines[0].endswith(f"no symbol {name!r}; {meant}")


def test_a_report_that_cannot_be_written_says_why(tmp_path: Path, capfd: Any) -> None:
    guest = source(tmp_path)
    for path, reason in (
        (tmp_path / "no" / "one", "No such file or directory"),
        (guest / "one", "Not a directory"),
    ):
        status, text, lines = kvmpy(capfd, "run", guest, "--timeout", 20, "--report", path)
        assert (status, text) == (2, "")
        assert lines == [f"kvmpy: cannot write the report {path}: {reason}"]


def test_a_difference_in_words() -> None:
    with Machine("1M") as machine:
        machine.load(b"\xf4")
        before = machine.snapshot()
        machine.memory.write(0x5000, b"\1")
        one = machine.snapshot().diff(before)
        assert str(one) == "1 page differs, in 1 byte\n  page 0x5000"
        leaves = machine.cpus[0].get_cpuid2()
        first = leaves[0]
        machine.cpus[0].set_cpuid2([replace(first, ebx=first.ebx ^ 1), *leaves[1:]])
        found = before.diff(machine.snapshot()).registers
    name = f"cpu0.cpuid {first.function:#x}.{first.index} ebx"
    assert found == {name: (first.ebx, first.ebx ^ 1)}
