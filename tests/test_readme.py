"""Every block of the README runs, but for the one that runs these tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    (kind, text, README[: match.start()].count("\n") + 2)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    for kind, text in [match.groups()]
]


def blocks(kind: str) -> list[object]:
    return [pytest.param(text, id=f"line{line}") for found, text, line in BLOCKS if found == kind]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {kind for kind, _, _ in BLOCKS} == {"sh", "console", "python", ""}
    (picture,) = [text for kind, text, _ in BLOCKS if not kind]
    assert picture.startswith("cli ")  # of the rooms: the one block that is not to be run


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def environment() -> dict[str, str]:
    """With this checkout's kvmpy and its command first, wherever the tests were started."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PATH": scripts + os.pathsep + os.environ["PATH"]}


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("transcript", blocks("console"))
def test_console(transcript: str, tmp_path: Path) -> None:
    commands = re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]
    assert commands
    for command, _, expected in (text.partition("\n") for text in commands):
        script = re.sub(r"\bkvmpy ", f"{sys.executable} -m kvmpy ", command)
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=60,
            env=environment(), cwd=tmp_path,
        )  # fmt: skip
        # A line of dots stands for lines that are left out.
        pattern = re.escape(expected).replace(re.escape("  ...\n"), "(?:.*\n)*?")
        assert re.fullmatch(pattern, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("kvm_host")
def test_the_command_that_installs_and_boots(tmp_path: Path) -> None:
    commands = [text for kind, text, _ in BLOCKS if kind == "sh"]
    assert len(commands) == 2
    assert "pytest" in commands[1]  # runs these tests
    skip = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.so", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=skip)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "-c", commands[0]], capture_output=True, text=True, timeout=600,
        env=clean, cwd=tmp_path / "checkout",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Hello from long mode\n")
