"""docs/outcomes.md says what the code has."""

import re
from pathlib import Path

import pytest

from kvmpy.cli.run import _status
from kvmpy.result import CRASHES, OUTCOMES, Result

PAGE = (Path(__file__).parent.parent / "docs" / "outcomes.md").read_text()
ROWS = [
    tuple(map(str.strip, row))
    for row in re.findall(r"^\| `(.*)` \|(.*)\|(.*)\|(.*)\|$", PAGE, re.M)
]


def test_the_table_is_that_of_the_code() -> None:
    assert [(name, what) for name, what, _, _ in ROWS] == list(OUTCOMES.items())
    assert tuple(name for name, _, crash, _ in ROWS if crash == "yes") == CRASHES
    assert {crash for _, _, crash, _ in ROWS} == {"", "yes"}


def test_the_statuses_are_those_of_the_command_line() -> None:
    for name, _, _, status in ROWS:
        if name == "debug-exit":
            assert status == "of its value"
        else:
            assert _status(Result(name, b"", 0.0)) == int(status)


@pytest.mark.usefixtures("kvm_host")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    ((code, words),) = re.findall(r"```python\n(.*?)```\n\nThat prints (.*?)\.\n", PAGE, re.S)
    exec(compile(code, "docs/outcomes.md", "exec"), {})
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed == re.findall("`(.*?)`", words)
