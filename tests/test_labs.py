"""The exercises: each solution passes, and each wrong guest is told what is wrong with it.

A solution is tests/lab_solutions/N_M.S. Lines in its header make wrong guests of it:

    # variant: ("old text", "new text", "words that the grader says")

A file N_M_NAME.S is a wrong guest as a whole; its line `# words: "..."` has the grader's words.
"""

import ast
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy.cli.lab import lab
from kvmpy.errors import ConfigError
from kvmpy.labs.table import EXERCISES, find
from kvmpy.probe import probe

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
            found.append(pytest.param(number_of(path), source, words, id=f"{path.stem}-{at}"))
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
