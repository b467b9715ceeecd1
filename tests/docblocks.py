"""The code blocks of Markdown files: found, run, and compared with what is printed there.

docs/README.md says what the notation is.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvmpy.boot.guests import guests_directory
from kvmpy.probe import probe

ROOT = Path(__file__).parent.parent
KINDS = {"asm", "c", "console", "python", "sh", ""}
SECONDS = 60

_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# A number that is another one each time: with a decimal point, or of time, or a percentage.
_MEASURED = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+|(?=\s?(?:ns|us|ms|s|%)(?!\w)))(?![\w.])")
_UNIT = re.compile(r"(?<=#) ?(?:ns|us|ms|s)(?!\w)")
_STEP = re.compile(r"^ *\d+(?=  [0-9a-f]{8}  )", re.MULTILINE)
_TITLE = re.compile(r"# (?P<name>\w+) - ")
_SCRIPT = re.compile(r"# (?P<name>\w+\.py) - ")


class Block(NamedTuple):
    """A code block: its kind, its text, the line of its first line, and the probes it needs."""

    kind: str
    text: str
    line: int
    needs: tuple[str, ...]


def blocks(path: Path) -> list[Block]:
    """All of a file's blocks, in order; an AssertionError for a kind that is not tested."""
    text = path.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text[: match.start("text")].count("\n") + 1
        needs = tuple(re.split(r",\s*", match["needs"].strip())) if match["needs"] else ()
        assert match["kind"] in KINDS, f"{path}:{line}: nothing tests a block of {match['kind']}"
        found.append(Block(match["kind"], match["text"], line, needs))
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(found), f"{path}: a stray fence"
    return found


def lacking(block: Block) -> str:
    """Why this host cannot run the block, or nothing."""
    found = (probe(name) for name in block.needs)
    return "; ".join(one.detail for one in found if one.answer != "yes")


def run_block(block: Block, directory: Path) -> None:
    """Run it in that directory, or keep it there as a file; AssertionError where it is not so."""
    script = _SCRIPT.match(block.text)
    if block.kind == "python" and script:
        (directory / script["name"]).write_text(block.text)
    elif block.kind == "python":
        run_python(block.text, directory)
    elif block.kind == "console":
        run_console(block.text, directory)
    elif block.kind == "asm":
        title = _TITLE.match(block.text)
        if title:
            (directory / f"{title['name']}.S").write_text(block.text)
        else:
            lines = [line.strip() for line in block.text.splitlines() if line.strip() != "..."]
            unknown = [line for line in lines if line and line not in _lines_of_guests()]
            assert not unknown, f"no shipped guest has the line {unknown[0]!r}"


@cache
def _lines_of_guests() -> frozenset[str]:
    paths = guests_directory().glob("*.S")
    return frozenset(line.strip() for path in paths for line in path.read_text().splitlines())


def run_python(code: str, directory: Path) -> None:
    """Run it in a Python of its own: no exception, no warning."""
    done = _run([sys.executable, "-W", "error", "-c", code], directory)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr or f"status {done.returncode}"


def run_console(transcript: str, directory: Path) -> None:
    """Run each of its commands, and compare what is printed."""
    commands = re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]
    assert commands
    for command, _, expected in (text.partition("\n") for text in commands):
        script = re.sub(r"\bkvmpy ", f"{sys.executable} -m kvmpy ", command)
        done = _run(["bash", "-c", script], directory)
        found = done.stdout + done.stderr
        assert matches(expected, found), f"$ {command}\n{found}"


def matches(expected: str, found: str) -> bool:
    """Whether the text is what the notation says."""
    pattern = "".join(_pattern(line) for line in _plain(expected))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _plain(found))) is not None


def _plain(text: str) -> list[str]:
    """Its lines with single blanks, and with signs for numbers that are others elsewhere."""
    plain = _UNIT.sub("", _MEASURED.sub("#", _STEP.sub("#", text.replace(f"{ROOT}/", ""))))
    plain = re.sub(" +", " ", plain)
    return plain.splitlines()


def _pattern(line: str) -> str:
    if line.strip() == "...":
        return "(?:.*\n)*?"
    if line.endswith(" ..."):
        return re.escape(line.removesuffix(" ...")) + ".*\n"
    return re.escape(line) + "\n"


def _run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, cwd=directory,
        env=environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """With this checkout's kvmpy and its command first, wherever the tests were started."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PATH": scripts + os.pathsep + os.environ["PATH"]}
