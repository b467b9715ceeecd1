"""The shipped guests, their golden bytes, and the command that makes these."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmpy.boot import golden, guests
from kvmpy.boot.guests import find_guest, golden_bytes, list_guests
from kvmpy.boot.image import load_image
from kvmpy.errors import AssemblyError, ImageError

SOURCE = "# one - the first guest\n# mode: real\nhlt\n"


class FakeProgram(bytes):
    """What assemble() gives: bytes with an origin and symbols."""

    origin = 0
    symbols: dict[str, int] = {}  # noqa: RUF012


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A directory of two guests, taken for the shipped one, and an assembler that counts."""
    (tmp_path / "one.S").write_text(SOURCE)
    (tmp_path / "two.S").write_text("# two - the second guest\nhlt\n")
    monkeypatch.setattr(guests, "_PLACES", (tmp_path,))

    def assemble(source: str, *, mode: str, at: int) -> FakeProgram:
        if "bad" in source:
            raise AssemblyError("no such instruction", 1, "bad")
        program = FakeProgram(mode.encode())
        program.origin, program.symbols = at, {"start": at}
        return program

    monkeypatch.setitem(sys.modules, "kvmpy.asm", SimpleNamespace(assemble=assemble))
    return tmp_path


@pytest.fixture
def no_assembler(monkeypatch):
    def forbid() -> None:
        monkeypatch.setitem(sys.modules, "kvmpy.asm", None)  # importing it now fails

    return forbid


def test_guests_are_listed_with_their_titles(place: Path) -> None:
    assert list_guests() == [
        ("one", "the first guest", place / "one.S"),
        ("two", "the second guest", place / "two.S"),
    ]


def test_a_guest_is_found_by_its_name(place: Path) -> None:
    assert find_guest("one") == place / "one.S"


@pytest.mark.parametrize(
    "name", ["three", "../one", "", ".", "one.S", "golden", "x" * 5000, "a\0b"]
)
def test_only_names_of_guests_are_found(place: Path, name: str) -> None:
    with pytest.raises(ImageError, match="no shipped guest has this name"):
        find_guest(name)


def test_no_guests_at_all(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(guests, "_PLACES", (tmp_path / "none", tmp_path / "nor here"))
    with pytest.raises(ImageError, match="install kvmpy again"):
        list_guests()
    with pytest.raises(ImageError, match="no such file"):
        load_image("hello_long")


def test_golden_bytes_need_no_assembler(place: Path, no_assembler) -> None:
    assert golden.main([]) == 0
    no_assembler()
    image = load_image("one")
    assert (image.mode, image.entry, image.segments[0].data) == ("real", 0x7C00, b"real")
    assert image.symbols == {"start": 0x7C00}
    assert image.header is not None and image.header.title == "the first guest"
    assert "golden" in image.why


def test_golden_bytes_are_of_this_source_mode_and_address_only(place: Path, no_assembler) -> None:
    assert golden.main([]) == 0
    assert load_image("one", mode="long").segments[0].data == b"long"
    assert load_image("one", load=0x8000).entry == 0x8000
    (place / "one.S").write_text(SOURCE + "nop\n")
    no_assembler()
    for options in ({}, {"mode": "long"}, {"load": 0x8000}):
        with pytest.raises(ImportError):
            load_image("one", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"one": 5}',
        '{"one": {"sha256": null}}',
        "[" * 100000,
        '{"one": {"sha256": "SUM", "origin": "x", "symbols": {}}}',
        '{"one": {"sha256": "SUM", "origin": 1, "symbols": []}}',
        '{"one": {"sha256": "SUM", "origin": 1}}',
    ],
)
def test_a_damaged_index_means_no_golden_bytes(place: Path, index: str) -> None:
    from hashlib import sha256

    assert golden.main([]) == 0
    total = sha256(SOURCE.encode()).hexdigest()
    (place / "golden/index.json").write_text(index.replace("SUM", total))
    assert golden_bytes(place / "one.S", SOURCE.encode()) is None


def test_missing_golden_files_mean_no_golden_bytes(place: Path) -> None:
    assert golden_bytes(place / "one.S", SOURCE.encode()) is None
    assert golden.main([]) == 0
    assert golden_bytes(place / "one.S", SOURCE.encode()) is not None
    (place / "golden/one.bin").unlink()
    assert golden_bytes(place / "one.S", SOURCE.encode()) is None


def test_check_names_what_is_stale(place: Path, capsys) -> None:
    assert golden.main(["--check"]) == 1
    assert not (place / "golden").exists()
    assert golden.main([]) == 0
    assert golden.main(["--check"]) == 0
    capsys.readouterr()
    (place / "golden/two.bin").write_bytes(b"other")
    (place / "golden/three.bin").write_bytes(b"left over")
    assert golden.main(["--check"]) == 1
    output = capsys.readouterr().out
    assert "three.bin: is stale" in output and "two.bin: is stale" in output
    assert "one.bin" not in output
    assert golden.main([]) == 0
    assert sorted(path.name for path in (place / "golden").iterdir()) == [
        "index.json",
        "one.bin",
        "two.bin",
    ]


def test_the_index_is_what_the_format_says(place: Path) -> None:
    assert golden.main(["--guests", str(place)]) == 0
    index = json.loads((place / "golden/index.json").read_text())
    assert index["one"]["origin"] == 0x7C00 and index["one"]["symbols"] == {"start": 0x7C00}
    assert len(index["one"]["sha256"]) == 64


def test_a_guest_that_does_not_assemble_leaves_all_as_it_was(place: Path, capsys) -> None:
    assert golden.main([]) == 0
    before = {path: path.read_bytes() for path in (place / "golden").iterdir()}
    (place / "two.S").write_text("bad\n")
    assert golden.main([]) == 2
    assert "two.S: line 1: no such instruction" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place / "golden").iterdir()} == before


def test_a_directory_without_guests(tmp_path: Path, capsys) -> None:
    assert golden.main(["--guests", str(tmp_path)]) == 2
    assert "no .S guest is here" in capsys.readouterr().err
