"""What load_image takes a file for, and what it refuses."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.boot import image as image_module
from kvmpy.boot.image import MAXIMUM_IMAGE, LoadSegment, load_image
from kvmpy.errors import ConfigError, ImageError
from kvmpy.modes import DEFAULT_LOAD

BOOT_SECTOR = bytes(510) + b"\x55\xaa"


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def error_of(guest: object, **options: object) -> str:
    """The one line that load_image refuses `guest` with."""
    with pytest.raises((ImageError, ConfigError)) as caught:
        load_image(guest, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_boot_sector(write) -> None:
    image = load_image(write("boot.img", BOOT_SECTOR))
    assert (image.kind, image.mode, image.entry, image.ring) == (
        "boot sector",
        "real",
        0x7C00,
        None,
    )
    assert image.segments == (LoadSegment(0x7C00, BOOT_SECTOR, 512),)
    assert image.segments[0].end == 0x7E00


@pytest.mark.parametrize("data", [BOOT_SECTOR[1:], BOOT_SECTOR + b"\0", bytes(512)])
def test_almost_a_boot_sector_is_a_flat_binary(write, data: bytes) -> None:
    image = load_image(write("g.bin", data))
    assert (image.kind, image.mode, image.entry) == ("flat", "long", DEFAULT_LOAD["long"])
    assert image.segments == (LoadSegment(DEFAULT_LOAD["long"], data, len(data)),)


def test_a_boot_sector_asked_for_in_another_mode_is_a_flat_binary(write) -> None:
    image = load_image(write("boot.img", BOOT_SECTOR), mode="protected")
    assert (image.kind, image.mode) == ("flat", "protected")
    assert "no boot sector starts" in image.why


@pytest.mark.parametrize("mode", sorted(DEFAULT_LOAD))
def test_a_flat_binary_lies_where_its_mode_says(write, mode: str) -> None:
    image = load_image(write("g.bin", b"\xf4"), mode=mode)
    assert image.mode == mode
    assert image.entry == image.segments[0].address == DEFAULT_LOAD[mode]


def test_options_win(write) -> None:
    image = load_image(write("g.bin", b"\xf4\xf4"), ring=3, load=0x4000, entry=0x4001)
    assert (image.ring, image.segments[0].address, image.entry) == (3, 0x4000, 0x4001)


def test_an_entry_outside_of_the_image_is_left_to_the_machine(write) -> None:
    assert load_image(write("g.bin", b"\xf4"), entry=0x9000).entry == 0x9000


@given(st.binary(min_size=1, max_size=600).filter(lambda data: not data.startswith(b"\x7fELF")))
def test_every_binary_is_loaded_whole(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    image = load_image(path)
    assert [segment.data for segment in image.segments] == [data]
    assert image.name == str(path) and image.why


def test_missing(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "missing.bin")
    assert "no such file" in error_of(tmp_path / "missing.bin" / "deeper")


def test_a_missing_name_near_a_shipped_guest(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hello_long.S").write_text("# hello_long - t\nhlt\n")
    monkeypatch.setattr("kvmpy.boot.guests._PLACES", (tmp_path,))
    assert "did you mean 'hello_long'?" in error_of("hello_lnog")
    assert "did you mean 'hello_long'?" in error_of("guests/hello_lnog.S")
    assert "did you mean" not in error_of("zzz")


def test_empty(write) -> None:
    assert "is empty" in error_of(write("g.bin", b""))
    assert "no guest was named" in error_of("")


def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in error_of(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable(write) -> None:
    path = write("g.bin", b"\xf4")
    path.chmod(0)
    assert "permission denied" in error_of(path)


def test_a_refused_open_names_the_file(write, monkeypatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = write("g.bin", b"\xf4")
    monkeypatch.setattr(os, "open", refuse)
    assert error_of(path) == f"{path}: permission denied: make the file readable for you"


def test_an_oversized_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(MAXIMUM_IMAGE + 1)
    assert f"is {MAXIMUM_IMAGE + 1} bytes" in error_of(path)


@pytest.mark.timeout(5)
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is not a regular file" in error_of(pipe)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_a_device_is_refused(device: str) -> None:
    if not Path(device).exists():
        pytest.skip(f"{device} does not exist here")
    assert "is not a regular file" in error_of(device)


def test_a_loop_of_links(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be opened" in error_of(loop)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "x" * 5000, "\udc80"])
def test_strange_names_make_one_printable_line(name: str) -> None:
    assert error_of(name).isprintable()


def test_c_source(write) -> None:
    assert "is C source: build it first" in error_of(write("g.c", b"int main;"))


@pytest.mark.parametrize("mode", ["Long", "", "32", "unreal"])
def test_an_unknown_mode_names_the_modes(write, mode: str) -> None:
    message = error_of(write("g.bin", b"\xf4"), mode=mode)
    assert all(known in message for known in ("auto", "real", "protected16", "protected", "long"))


def test_bad_options(write) -> None:
    path = write("g.bin", b"\xf4")
    assert "ring 1" in error_of(path, ring=1)
    assert "load address -0x1" in error_of(path, load=-1)
    assert "entry 0x10000000000000" in error_of(path, entry=1 << 52)


def test_options_are_looked_at_before_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_image(tmp_path / "missing", mode="huge")


def test_a_file_wins_over_a_shipped_guest_of_its_name(tmp_path: Path, monkeypatch) -> None:
    guests = tmp_path / "guests"
    guests.mkdir()
    monkeypatch.setattr("kvmpy.boot.guests._PLACES", (guests,))
    monkeypatch.setattr(image_module, "load_source", lambda path, **_: path)
    monkeypatch.chdir(tmp_path)
    (guests / "hello.S").write_text("hlt\n")
    assert load_image("hello") == guests / "hello.S"
    (tmp_path / "hello").mkdir()  # a directory does not: it cannot be run
    assert load_image("hello") == guests / "hello.S"
    (tmp_path / "hello").rmdir()
    (tmp_path / "hello").write_bytes(b"\xf4")
    assert load_image("hello").kind == "flat"
