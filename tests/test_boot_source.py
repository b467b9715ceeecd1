"""Assembly sources: what the header says, what options say, and what cannot be run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmpy.boot.image import LoadSegment, load_image
from kvmpy.errors import AssemblyError, ImageError
from kvmpy.modes import DEFAULT_LOAD


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def error_of(guest: Path) -> str:
    """The one line that load_image refuses `guest` with."""
    with pytest.raises(ImageError) as caught:
        load_image(guest)
    message = str(caught.value)
    assert "\n" not in message
    return message


class FakeProgram(bytes):
    """What assemble() gives: bytes with an origin and symbols."""

    origin = 0
    symbols: dict[str, int] = {}  # noqa: RUF012


@pytest.fixture
def assembled(monkeypatch) -> list[tuple[str, str, int]]:
    """Replace the assembler by one that notes its arguments and gives one HLT."""
    calls: list[tuple[str, str, int]] = []

    def assemble(source: str, *, mode: str, at: int) -> FakeProgram:
        if "bad" in source:
            raise AssemblyError("no such instruction", 2, "bad")
        calls.append((source, mode, at))
        program = FakeProgram(b"" if "nothing" in source else b"\xf4")
        program.origin, program.symbols = at, {"start": at}
        return program

    fake = SimpleNamespace(assemble=assemble)
    monkeypatch.setitem(sys.modules, "kvmpy.asm", fake)
    return calls


SOURCE = b"# g - title\n# mode: protected\n# ring: 0\n# memory: 1M\nhlt\n"


@pytest.mark.parametrize("suffix", [".S", ".s", ".asm"])
def test_a_source_is_assembled_as_its_header_says(write, assembled, suffix: str) -> None:
    image = load_image(write(f"g{suffix}", SOURCE))
    at = DEFAULT_LOAD["protected"]
    assert assembled == [(SOURCE.decode(), "protected", at)]
    assert (image.kind, image.mode, image.ring, image.entry) == ("assembly", "protected", 0, at)
    assert image.segments == (LoadSegment(at, b"\xf4", 1),)
    assert image.symbols == {"start": at}
    assert image.header is not None and image.header.memory == 1 << 20


def test_options_win_over_the_header(write, assembled) -> None:
    image = load_image(write("g.S", SOURCE), mode="long", ring=3, load=0x5000, entry=0x5001)
    assert assembled[0][1:] == ("long", 0x5000)
    assert (image.mode, image.ring, image.entry) == ("long", 3, 0x5001)


def test_a_load_address_of_zero_is_one(write, assembled) -> None:
    assert load_image(write("g.S", b"# g - t\n# load: 0\nhlt\n")).entry == 0
    assert load_image(write("g.S", SOURCE), load=0).entry == 0


def test_sources_that_cannot_be_run(write, assembled) -> None:
    assert "assembles to no bytes" in error_of(write("g.S", b"# nothing\n"))
    assert "line 2: is not UTF-8" in error_of(write("g.S", b"hlt\n\xff\n"))
    assert "line 2: mode 'x' is unknown" in error_of(write("g.S", b"# g - t\n# mode: x\n"))
    assert "is empty" in error_of(write("g.S", b""))


def test_an_assembly_error_keeps_its_line_and_gains_the_file(write, assembled) -> None:
    path = write("g.S", b"hlt\nbad\n")
    with pytest.raises(AssemblyError) as caught:
        load_image(path)
    assert str(caught.value) == f"{path}: line 2: no such instruction: bad"
    assert (caught.value.line, caught.value.text) == (2, "bad")
