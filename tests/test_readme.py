"""Every block of the README runs, but for the one that runs these tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from docblocks import ROOT, blocks, run_console, run_python

BLOCKS = blocks(ROOT / "README.md")


def of_kind(kind: str) -> list[object]:
    return [pytest.param(one.text, id=f"line{one.line}") for one in BLOCKS if one.kind == kind]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {one.kind for one in BLOCKS} == {"sh", "console", "python", ""}
    (picture,) = [one.text for one in BLOCKS if not one.kind]
    assert picture.startswith("cli ")  # of the rooms: the one block that is not to be run


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("code", of_kind("python"))
def test_python(code: str, tmp_path: Path) -> None:
    run_python(code, tmp_path)


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("transcript", of_kind("console"))
def test_console(transcript: str, tmp_path: Path) -> None:
    run_console(transcript, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("kvm_host")
def test_the_command_that_installs_and_boots(tmp_path: Path) -> None:
    commands = [one.text for one in BLOCKS if one.kind == "sh"]
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
