"""The C guests: gcc builds them, and kvmpy understands what it built."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpy.boot.image import Image, load_image
from kvmpy.errors import ImageError

SOURCES = Path(__file__).parent.parent / "guests" / "c"
SSE = (b"\xf2\x0f\x58", b"\xf2\x0f\x5e")  # addsd, divsd


def run(*command: str | Path) -> None:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A directory with each C guest as an ELF file."""
    for tool in ("gcc", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build: Path = tmp_path_factory.mktemp("c")
    run("make", "-C", SOURCES, "CC=gcc", f"BUILD={build}")
    return build


def image(built: Path, name: str) -> Image:
    loaded = load_image(built / f"{name}.elf")
    assert (loaded.kind, loaded.mode) == ("elf", "long")
    return loaded


@pytest.mark.parametrize(("name", "ring"), [("hello", 0), ("primes", 3)])
def test_a_guest_says_its_ring_and_starts_at_its_start(built: Path, name: str, ring: int) -> None:
    loaded = image(built, name)
    assert loaded.ring == ring
    assert loaded.entry == loaded.symbols["_start"] == loaded.symbols["image_start"] == 0x100000
    code = loaded.segments[0]
    assert code.address <= loaded.symbols["main"] < code.end
    assert code.data.startswith(b"\x31\xed")  # start.S: xorl %ebp, %ebp
    assert max(part.end for part in loaded.segments) <= 2 << 20


def test_ring_0_code_has_no_sse(built: Path) -> None:
    code = image(built, "hello").segments[0].data
    assert not any(instruction in code for instruction in SSE)


def test_ring_3_code_computes_with_sse(built: Path) -> None:
    code = image(built, "primes").segments[0].data
    assert all(instruction in code for instruction in SSE)


def test_zeroed_memory_takes_no_room_in_the_file(built: Path) -> None:
    loaded = image(built, "primes")
    data = loaded.segments[-1]
    assert data.memory_size >= 1_000_000 and len(data.data) < 4096
    assert data.address <= loaded.symbols["bss_start"] <= loaded.symbols["image_end"] == data.end


def test_a_guest_that_says_no_ring_starts_in_ring_0(built: Path, tmp_path: Path) -> None:
    source = tmp_path / "g.c"
    source.write_text('#include "kvmpy.h"\nint main(void) { print("x"); halt(); }\n')
    program = tmp_path / "g.elf"
    flags = ("-O2", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pic", f"-I{SOURCES}")
    run("gcc", *flags, "-T", SOURCES / "guest.ld", SOURCES / "start.S", source, "-o", program)
    assert load_image(program).ring == 0


def test_every_helper_compiles_without_a_warning(built: Path, tmp_path: Path) -> None:
    source = tmp_path / "all.c"
    source.write_text(
        '#include "kvmpy.h"\nKVMPY_RING(3);\nint main(void)\n{\n'
        "    outb(0x80, inb(0x60)); outw(0x500, inw(0x500)); outl(0xcf8, inl(0xcfc));\n"
        "    mmio_write8(4096, mmio_read8(4096)); mmio_write16(4096, mmio_read16(4096));\n"
        "    mmio_write32(4096, mmio_read32(4096)); mmio_write64(4096, mmio_read64(4096));\n"
        "    putch('x'); print_number(1);\n"
        "    if (inb(1)) kvmpy_exit(1);\n    if (inb(2)) power_off();\n    return 0;\n}\n"
    )
    flags = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", f"-I{SOURCES}")
    run("gcc", *flags, "-c", source, "-o", tmp_path / "all.o")
    with pytest.raises(ImageError, match="is an object file: link it"):
        load_image(tmp_path / "all.o")


def test_what_the_primes_guest_says_it_prints_is_right() -> None:
    limit = 1_000_000
    sieve = bytearray([1]) * limit
    for number in range(2, 1000):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, limit, number)))
    primes = [number for number in range(2, limit) if sieve[number]]
    reciprocals = sum(1 / prime for prime in primes)
    line = (
        f"{len(primes)} primes below {limit}\\nsum {sum(primes)}\\n"
        f"sum of reciprocals {reciprocals:.6f}\\n"
    )
    assert f'Output: "{line}"' in (SOURCES / "primes.c").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "needs a dynamic linker"),
        (("-static-pie",), "needs a dynamic linker"),
        (("-c",), "is an object file"),
    ],
)
def test_programs_for_an_operating_system(
    built: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    source, program = tmp_path / "g.c", tmp_path / "g"
    source.write_text("int main(void) { return 0; }\n")
    run("gcc", *flags, source, "-o", program)
    with pytest.raises(ImageError, match=message):
        load_image(program)
