"""The exercises: each solution passes, and each wrong guest is told what is wrong with it.

A solution is tests/lab_solutions/N_M.S. Lines in its header make wrong guests of it:

    # variant: ("old text", "new text", "words that the grader says")

A file N_M_NAME.S is a wrong guest as a whole; its line `# words: "..."` has the grader's words.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli import main
from kvmpy.cli.lab import lab
from kvmpy.errors import ConfigError, UnsupportedError
from kvmpy.labs.checks import console, ends, exits, memory, register, starts_in, value, wrote
from kvmpy.labs.grade import grade
from kvmpy.labs.model import Case, Check, Exercise
from kvmpy.labs.table import EXERCISES, find
from kvmpy.probe import Finding, probe

ROOT = Path(__file__).parent.parent
SOLUTIONS = Path(__file__).parent / "lab_solutions"
needs_kvm = pytest.mark.usefixtures("kvm_host")


def number_of(path: Path) -> str:
    return ".".join(path.stem.split("_")[:2])


def header(path: Path, key: str) -> list[str]:
    return re.findall(rf"^# {key}: (.*)$", path.read_text(), re.MULTILINE)


def wrong_guests() -> list[object]:
    """The number, the source and the words of each."""
    found = []
    for path in sorted(SOLUTIONS.glob("*.S")):
        text = path.read_text()
        for at, variant in enumerate(header(path, "variant")):
            old, new, words = ast.literal_eval(variant)
            rest = re.sub("^# variant: .*\n", "", text, flags=re.MULTILINE)
            assert old in rest, f"{path.name}: nothing to replace: {old}"
            source = rest.replace(old, new)
            # One for each exercise at once, the others with the slow tests.
            marks = [pytest.mark.slow] if at else []
            name = f"{path.stem}-{at}"
            found.append(pytest.param(number_of(path), source, words, id=name, marks=marks))
        for words in header(path, "words"):
            found.append(pytest.param(number_of(path), text, ast.literal_eval(words), id=path.stem))
    return found


def able(number: str) -> None:
    for name in EXERCISES[number].needs:
        if probe(name).answer != "yes":
            pytest.skip(f"exercise {number}: {probe(name).detail}")


def check(number: str, path: Path) -> tuple[int, str]:
    done = CliRunner().invoke(lab, ["check", number, str(path)], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value, done.output


@needs_kvm
@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_passes(number: str) -> None:
    able(number)
    status, text = check(number, SOLUTIONS / f"{number.replace('.', '_')}.S")
    assert status == 0, text
    assert "\n  no" not in text and "\npassed: " in text


@needs_kvm
@pytest.mark.parametrize(("number", "source", "words"), wrong_guests())
def test_a_wrong_guest_is_told_so(number: str, source: str, words: str, tmp_path: Path) -> None:
    able(number)
    (tmp_path / "guest.S").write_text(source)
    status, text = check(number, tmp_path / "guest.S")
    assert status == 1, text
    wrong = [line for line in text.splitlines() if line.startswith("  no")]
    assert any(words in line for line in wrong), text
    assert "  look at: " in text and "not passed yet" in text


def test_every_exercise_has_a_solution_and_a_wrong_guest_and_a_page() -> None:
    wrong = {param.values[0] for param in wrong_guests()}  # type: ignore[attr-defined]
    assert wrong == set(EXERCISES)
    assert {number_of(path) for path in SOLUTIONS.glob("*.S")} == set(EXERCISES)
    for number, one in EXERCISES.items():
        assert one.number == number
        assert one.page.startswith(f"{number.split('.', maxsplit=1)[0]}-")


@pytest.mark.parametrize("number", EXERCISES)
def test_the_page_has_the_exercise_in_the_same_words(number: str) -> None:
    one = EXERCISES[number]
    page = (ROOT / "docs" / one.page).read_text()
    assert f"\n### {number} {one.title}\n\n{one.text.strip()}\n" in page


def test_exercises_are_found_by_number() -> None:
    assert find("1") is find("1.1") is EXERCISES["1.1"]
    with pytest.raises(ConfigError, match=r"no exercise '1\.77': use one of 1\.1"):
        find("1.77")


# The command ---------------------------------------------------------------------------------


def kvmpy(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["lab", *map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_the_list_and_a_text(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = kvmpy(capfd)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(EXERCISES)
    status, out, err = kvmpy(capfd, "show", "2.2")
    assert (status, err) == (0, "")
    assert EXERCISES["2.2"].text in out and "kvmpy lab check 2.2 FILE.S" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "12"), "no exercise '12': use one of 1.1, 1.2"),
        (("check", "1.9", "hello_long"), "no exercise '1.9'"),
        (("check", "1", "missing.S"), "no such file"),
        (("check", "1", "broken.S"), "mvo"),
        (("check", "1.2", "tiny.S"), 'leave out "# memory:"'),
        (("check", "1"), "Missing argument"),
        (("chekc",), "No such command"),
    ],
)
@needs_kvm
def test_bad_input_is_one_line_and_status_2(
    arguments: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("broken.S").write_text("mvo eax, 1\n")
    Path("tiny.S").write_text("# tiny - little memory\n# mode: real\n# memory: 32K\nhlt\n")
    status, out, err = kvmpy(capfd, *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


# The grader ----------------------------------------------------------------------------------


def exercise(*checks: Check, cases: Sequence[Case] = (Case(),), **more: Any) -> Exercise:
    return Exercise(
        "0.1", "A title", "0-page.md", "A text.", checks, "a book", lambda random: cases, **more
    )


def answers(one: Exercise, source: str, path: Path) -> list[tuple[bool, str]]:
    (path / "guest.S").write_text(source)
    found = grade(one, path / "guest.S")
    return [(answer.finding.passed, answer.finding.text) for answer in found.answers]


@needs_kvm
def test_a_guest_that_hangs_is_ended_and_said_so(tmp_path: Path) -> None:
    one = exercise(ends("halt"), cases=[Case(timeout=0.1), Case()])
    (answer,) = answers(one, "start: nop\nspin: jmp spin\n", tmp_path)
    assert not answer[0]
    assert answer[1].startswith("it did not end: after 0.1 s it was stopped, at rip 0x1001 (spin);")
    one = exercise(ends("halt"), cases=[Case(max_exits=5)])
    (answer,) = answers(one, "start: out 0x80, al\njmp start\n", tmp_path)
    assert "it did not end: after 5 exits it was stopped" in answer[1]


@needs_kvm
def test_flat_and_elf_guests(tmp_path: Path) -> None:
    flat = tmp_path / "guest.bin"
    flat.write_bytes(bytes.fromhex("b041e6e9f4"))  # mov al, 'A'; out 0xe9, al; hlt
    one = exercise(starts_in("real"), console(b"A"), mode="real")
    assert grade(one, flat).passed
    assert not grade(exercise(starts_in("real")), flat).passed


@needs_kvm
def test_the_first_case_that_fails_is_told_and_is_the_last(tmp_path: Path) -> None:
    cases = [
        Case(f"case {n}", prepare=lambda m, n=n: m.memory.write_u8(0x8000, n)) for n in (1, 2, 3)
    ]
    one = exercise(register("rax", 1), exits("", 1), cases=cases)
    (tmp_path / "guest.S").write_text("movzx eax, byte ptr [0x8000]\nhlt\n")
    found = grade(one, tmp_path / "guest.S")
    assert (found.runs, found.passed) == (2, False)
    assert [answer.about for answer in found.answers] == ["case 2", ""]
    assert found.answers[0].finding.text == "rax is 0x2 at the end, not 0x1"


@needs_kvm
def test_each_check_says_what_it_found(tmp_path: Path) -> None:
    source = (
        "mov dword ptr [0x9000], 0x01020304\nmov al, 7\nout 0x80, al\nmov eax, 5\nout 0xf4, eax\n"
    )
    right = (value(5), memory(0x9000, b"\4\3\2\1"), exits("port-out", 2), exits("", 1, 9),
             wrote("port-out", 0x80, [7]), ends("debug-exit"), console(b""))  # fmt: skip
    assert all(passed for passed, _ in answers(exercise(*right), source, tmp_path))
    wrong = {
        value(6): "it ends by writing 0x5 to port 0xf4, not 0x6",
        memory(0x9000, b"\5"): "memory at 0x9000 is 04, not 05",
        memory(1 << 40, b"\5"): "cannot be looked at",
        exits("port-out", 1): "port writes: 2, but 1 were expected",
        exits("halt", 1, 2): "HLT exits: 0, but 1 to 2 were expected",
        wrote("port-out", 0x80, []): "it writes 0x7 to port 0x80, not nothing",
        ends("halt"): "it ended so: the guest wrote to the debug-exit device (value 5)",
        console(b"x"): "it prints nothing; 'x' was expected",
        starts_in("real"): 'it starts in long mode, ring 0, not in real mode: "# mode: real"',
    }
    for (passed, text), words in zip(
        answers(exercise(*wrong), source, tmp_path), wrong.values(), strict=True
    ):
        assert not passed and words in text


@needs_kvm
def test_what_the_host_lacks_is_no_fault_of_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Finding("single-step", "no", "single-stepping: not here")
    monkeypatch.setattr("kvmpy.labs.grade.probe", lambda name: missing)
    with pytest.raises(UnsupportedError, match=r"exercise 0\.1 cannot run here: single-stepping"):
        grade(exercise(ends("halt"), needs=("single-step",)), "hello_long")


PORTS = (0x10, 0x11, 0x12, 0x60, 0x61, 0x300, 0x301, 0x3F8, 0x3FD)
TOUCHY = "\n".join(
    [f"mov edx, {port}\nin al, dx\nin ax, dx\nin eax, dx\nout dx, al\nout dx, ax\nout dx, eax"
     for port in PORTS]
    + [f"mov ebx, {address}\nmov al, [rbx]\nmov rax, [rbx]\nmov [rbx], ax\nmov [rbx], rax"
       for address in range(0xD0000000, 0xD0000010, 3)]
    + ["hlt"]
)  # fmt: skip


@needs_kvm
@pytest.mark.parametrize("number", EXERCISES)
def test_whatever_a_guest_does_to_the_devices_it_gets_an_answer(
    number: str, tmp_path: Path
) -> None:
    able(number)
    (tmp_path / "guest.S").write_text(TOUCHY)
    status, text = check(number, tmp_path / "guest.S")
    assert status == 1 and "not passed yet" in text
