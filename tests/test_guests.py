"""The shipped guests: their golden bytes, and that they do what their headers say, on KVM."""

import re
import shutil
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import Machine
from kvmpy.asm import assemble
from kvmpy.boot.guests import golden_bytes
from kvmpy.boot.header import GuestHeader, parse_header
from kvmpy.boot.image import Image, load_image
from kvmpy.devices.debugexit import exit_status
from kvmpy.result import Result
from kvmpy.x86.flags import CR0, EFER
from kvmpy.x86.segments import Segment

GUESTS = Path(__file__).parent.parent / "guests"
NAMES = sorted(path.stem for path in GUESTS.glob("*.S"))
SECONDS = 30.0  # a deadline for a guest that hangs, not a measure: each takes milliseconds

every_guest = pytest.mark.parametrize("name", NAMES)
needs_kvm = pytest.mark.usefixtures("kvm_host")


def header_of(name: str) -> GuestHeader:
    return parse_header((GUESTS / f"{name}.S").read_text(), f"{name}.S")


def golden_image(name: str) -> Image:
    image = load_image(GUESTS / f"{name}.S")
    assert image.why == "an assembly source with golden bytes"
    return image


def make_machine(
    image: Image, *, strict: bool = False, input: Callable[[], bytes] | None = None
) -> Machine:
    """The machine that an image asks for, with the image in it."""
    memory = image.header.memory if image.header else None
    machine = Machine(
        memory or "16M", mode=image.mode, ring=image.ring or 0, strict=strict, input=input
    )
    for segment in image.segments:
        machine.load(segment.data, at=segment.address)
    machine.set_entry(image.entry)
    return machine


def status_of(result: Result) -> int | None:
    """The exit status of a run that a guest ended itself; None of any other."""
    if result.outcome == "debug-exit":
        assert result.value is not None
        return exit_status(result.value)
    return 0 if result.outcome in ("halt", "reset", "power-off") else None


@pytest.fixture
def no_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvmpy.asm", None)  # importing it now fails


# What the sources say of themselves, and their bytes -------------------------------------------


def test_the_guests_that_a_reader_expects_are_there() -> None:
    assert set(NAMES) >= {
        "boot_sector",
        "exceptions",
        "harness",
        "hello_long",
        "hello_protected",
        "hello_real",
        "mmio",
        "primes",
        "ring3",
        "serial_echo",
        "string_io",
    }


@every_guest
def test_a_header_is_complete(name: str) -> None:
    first, *rest = (GUESTS / f"{name}.S").read_text().splitlines()
    comment = []
    for line in rest:
        if not line.startswith("#"):
            break
        comment.append(line)
    assert re.fullmatch(rf"# {name} - [a-z].*[^.]", first)
    for start in ("# Shows", "# At entry: ", "# mode: ", "# load: 0x", "# output: "):
        assert any(line.startswith(start) for line in comment), start
    assert header_of(name).output


@every_guest
def test_a_source_assembles_to_its_golden_bytes(name: str) -> None:
    source = (GUESTS / f"{name}.S").read_bytes()
    header = header_of(name)
    golden = golden_bytes(GUESTS / f"{name}.S", source)
    assert golden is not None, "stale: run python -m kvmpy.boot.golden"
    assert header.load is not None
    program = assemble(source.decode(), mode=header.mode, at=header.load)
    assert bytes(program) == golden.data
    assert program.origin == golden.origin == header.load
    assert program.symbols == golden.symbols


def test_the_boot_sector_is_one() -> None:
    path = GUESTS / "golden" / "boot_sector.bin"
    data = path.read_bytes()
    assert len(data) == 512 and data[-2:] == b"\x55\xaa"
    image = load_image(path)
    assert (image.kind, image.mode, image.entry) == ("boot sector", "real", 0x7C00)


def test_shipped_guests_are_loaded_without_keystone() -> None:
    code = (
        "import sys\n"
        "from kvmpy.boot.image import load_image\n"
        "for path in sys.argv[1:]:\n"
        "    load_image(path)\n"
        "print([name for name in ('keystone', 'kvmpy.asm') if name in sys.modules])\n"
    )
    paths = [str(GUESTS / f"{name}.S") for name in NAMES]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=GUESTS.parent,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_the_primes_guest_says_it_prints_is_right() -> None:
    limit = golden_image("primes").symbols["LIMIT"]
    sieve = bytearray(2) + bytearray([1]) * (limit - 2)
    for number in range(2, int(limit**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, limit, number)))
    assert header_of("primes").output == b"%d primes below %d\n" % (sum(sieve), limit)


# What they do on KVM ---------------------------------------------------------------------------


@needs_kvm
@every_guest
def test_a_guest_does_what_its_header_says(name: str, no_assembler: None) -> None:
    image = golden_image(name)
    header = image.header
    assert header is not None
    # These two are about accesses that no device claims.
    with make_machine(image, strict=name not in ("harness", "mmio")) as machine:
        machine.devices["serial"].feed(header.input)  # type: ignore[attr-defined]
        result = machine.run(timeout=SECONDS)
        assert machine.console == header.output, result
    assert status_of(result) == header.exit_status, result


@needs_kvm
def test_the_boot_sector_ends_in_long_mode() -> None:
    image = golden_image("boot_sector")
    with make_machine(image) as machine:
        start = machine.cpus[0].get_sregs()
        assert not start.cr0 & CR0.PE and start.efer == 0
        machine.run(timeout=SECONDS)
        end = machine.cpus[0].get_sregs()
    assert end.cr0 & CR0.PE and end.cr0 & CR0.PG
    assert end.efer & EFER.LMA
    assert end.cs.l and end.cs.selector == image.symbols["CODE64"]
    assert end.cr3 == image.symbols["PML4"]


@needs_kvm
def test_the_boot_sector_starts_at_either_spelling_of_its_address() -> None:
    image = golden_image("boot_sector")
    with make_machine(image) as machine:
        cpu = machine.cpus[0]
        special, registers = cpu.get_sregs(), cpu.get_regs()
        special.cs = Segment.real_mode(0x07C0, code=True)
        registers.rip = 0
        cpu.set_sregs(special)
        cpu.set_regs(registers)
        result = machine.run(timeout=SECONDS)
        assert (result.outcome, machine.console) == ("halt", header_of("boot_sector").output)


@needs_kvm
@pytest.mark.parametrize(
    ("pieces", "echo"),
    [
        ([b"a\n"], b"a\n"),
        ([b"no newline\x04lost"], b"no newline"),
        ([b"", b"in ", b"", b"", b"pieces\n", b"lost"], b"in pieces\n"),
        (
            [b"more than the sixteen bytes of a FIFO\nlost"],
            b"more than the sixteen bytes of a FIFO\n",
        ),
        ([bytes(range(5, 10)) + bytes(range(11, 256)) + b"\n"], None),
        ([b"\x04"], b""),
    ],
)
def test_the_echo_ends_at_a_newline_or_an_eot(pieces: list[bytes], echo: bytes | None) -> None:
    waiting = iter(pieces)
    with make_machine(golden_image("serial_echo"), input=lambda: next(waiting, b"")) as machine:
        result = machine.run(timeout=SECONDS)
        assert machine.console == (pieces[0] if echo is None else echo)
    assert result.outcome == "halt"


@needs_kvm
def test_the_echo_waits_for_input() -> None:
    with make_machine(golden_image("serial_echo")) as machine:
        result = machine.run(max_exits=100)
        assert (result.outcome, machine.console) == ("max-exits", b"")


@needs_kvm
def test_the_mmio_guest_meets_a_device() -> None:
    image = golden_image("mmio")
    registers: dict[int, tuple[int, int]] = {}
    with make_machine(image, strict=True) as machine:

        @machine.on_mmio(image.symbols["DEVICE"])
        def storage(offset: int, size: int, value: int | None) -> int | None:
            if value is None:
                assert registers[offset][0] == size
                return registers[offset][1]
            registers[offset] = (size, value)
            return None

        result = machine.run(timeout=SECONDS)
        assert machine.console == (
            b"1 byte:  0x11\n2 bytes: 0x2211\n4 bytes: 0x44332211\n8 bytes: 0x8877665544332211\n"
        )
    assert result.outcome == "halt" and not result.unclaimed
    assert {offset: size for offset, (size, _) in registers.items()} == {0: 1, 8: 2, 16: 4, 24: 8}


@needs_kvm
def test_the_mmio_guest_alone_is_reported() -> None:
    with make_machine(golden_image("mmio"), strict=True) as machine:
        result = machine.run(timeout=SECONDS)
        assert machine.console == b""
    assert result.outcome == "unclaimed"
    assert result.detail == "1-byte write of 0x11 at MMIO 0xd0000000, which no device claims"


# The guests in C -------------------------------------------------------------------------------

C_SOURCES = sorted((GUESTS / "c").glob("*.c"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with each C guest as an ELF file."""
    for tool in ("gcc", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool}, which builds the guests in C, is not installed")
    build = tmp_path_factory.mktemp("c")
    command = ["make", "-C", str(GUESTS / "c"), "CC=gcc", f"BUILD={build}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return build


def said_output(source: Path) -> bytes:
    """What a C guest says that it prints: the Output line of its first comment."""
    found = re.search(r'^ \* Output: (".*")$', source.read_text(), re.MULTILINE)
    assert found, f"{source.name}: no Output line"
    return literal_eval(found.group(1)).encode()  # type: ignore[no-any-return]


def test_there_are_guests_in_c_for_both_rings() -> None:
    assert {path.stem for path in C_SOURCES} >= {"hello", "primes"}


@needs_kvm
@pytest.mark.parametrize("source", C_SOURCES, ids=lambda path: path.stem)
def test_a_guest_in_c_prints_what_it_says(built: Path, source: Path) -> None:
    with make_machine(load_image(built / f"{source.stem}.elf"), strict=True) as machine:
        result = machine.run(timeout=SECONDS)
        assert machine.console == said_output(source), result
    assert (result.outcome, status_of(result)) == ("power-off", 0)
