"""The pieces of work, and who does each; the first of a work's peers is what others are held to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import peer_c, peer_guests, peer_ioctl, peer_kvmpy, peer_qemu, peer_unicorn
from benchmarks.peer import Opened, Subject, kvm_name
from benchmarks.peer_guests import BOOT_STATUS, PRIMES, sum_to

__all__ = ["FULL", "QUICK", "Effort", "Work", "works"]


@dataclass(frozen=True)
class Effort:
    """Rounds (fewer where each turn is a process), and how much is done in each."""

    rounds: int
    process_rounds: int
    writes: int
    write_turns: int
    sieve_turns: int
    life_turns: int


FULL = Effort(21, 5, writes=2000, write_turns=5, sieve_turns=3, life_turns=15)
QUICK = Effort(3, 1, writes=500, write_turns=1, sieve_turns=1, life_turns=2)


@dataclass(frozen=True)
class Work:
    """One piece of work: seconds times `per_second` give its `unit`.

    In each of the rounds every subject has as many turns, and does the whole work in each.
    """

    key: str
    name: str
    unit: str
    per_second: float
    rounds: int
    turns: int
    subjects: tuple[Subject, ...]


def works(effort: Effort, directory: Path) -> list[Work]:
    """All of the work, in the table's order; images go to files in `directory`."""
    return [
        _port(effort),
        _mmio(effort),
        _sieve(effort),
        _life(effort),
        _process(effort, directory),
    ]


def _unicorn(what: str, open_: Callable[[], Opened], proof: int, note: str = "") -> Subject:
    name = f"Unicorn, {what}" if what else "Unicorn"
    return Subject(name, peer_unicorn.name(), open_, proof, note, peer_unicorn.missing())


def _writes(image: bytes, count: int) -> tuple[Subject, ...]:
    kvm, proof = kvm_name(), sum_to(count)
    return (
        Subject("bare C", kvm, partial(peer_c.runs, image), proof),
        Subject("kvmpy, its C loop", kvm, partial(peer_kvmpy.runs_in_c, image), count),
        Subject("kvmpy, a Python function", kvm, partial(peer_kvmpy.runs, image), proof),
        Subject("fcntl.ioctl in Python", kvm, partial(peer_ioctl.runs, image), proof),
    )


def _port(effort: Effort) -> Work:
    count = effort.writes
    image = peer_guests.port_writes(count)
    subjects = (
        *_writes(image, count),
        _unicorn("UC_HOOK_INSN", lambda: peer_unicorn.runs(image, "port"), sum_to(count)),
    )
    name = "a port write, served"
    return Work("port", name, "ns", 1e9 / count, effort.rounds, effort.write_turns, subjects)


def _mmio(effort: Effort) -> Work:
    count = effort.writes
    image, proof = peer_guests.mmio_writes(count), sum_to(count)
    subjects = (
        *_writes(image, count),
        _unicorn("mmio_map", lambda: peer_unicorn.runs(image, "mmio"), proof),
        _unicorn(
            "UC_HOOK_MEM_WRITE",
            lambda: peer_unicorn.runs(image, "memory"),
            proof,
            "the memory is there and is written as well",
        ),
    )
    name = "an MMIO write, served"
    return Work("mmio", name, "ns", 1e9 / count, effort.rounds, effort.write_turns, subjects)


def _sieve(effort: Effort) -> Work:
    image, kvm = peer_guests.sieve(), kvm_name()
    subjects = (
        Subject("bare C", kvm, partial(peer_c.runs, image, 3, 1), PRIMES),
        Subject("kvmpy", kvm, partial(peer_kvmpy.runs, image, 3, 1), PRIMES),
        Subject("fcntl.ioctl in Python", kvm, partial(peer_ioctl.runs, image, 3, 1), PRIMES),
        _unicorn("", lambda: peer_unicorn.runs(image, "port"), PRIMES),
    )
    name = "the primes below a million, counted"
    return Work("sieve", name, "ms", 1e3, effort.rounds, effort.sieve_turns, subjects)


def _life(effort: Effort) -> Work:
    image, kvm = peer_guests.port_writes(1), kvm_name()
    subjects = (
        Subject("bare C", kvm, partial(peer_c.lives, image), 1),
        Subject(
            "kvmpy, Machine", kvm, partial(peer_kvmpy.lives, image), 1, "with its standard devices"
        ),
        Subject("kvmpy, KVM, VM and VCPU", kvm, partial(peer_kvmpy.descriptor_lives, image), 1),
        Subject("fcntl.ioctl in Python", kvm, partial(peer_ioctl.lives, image), 1),
        _unicorn("", lambda: peer_unicorn.lives(image), 1),
    )
    name = "create, run to the first exit, destroy"
    return Work("life", name, "us", 1e6, effort.rounds, effort.life_turns, subjects)


def _process(effort: Effort, directory: Path) -> Work:
    disk, rom = directory / "boot.bin", directory / "firmware.bin"
    kvm, missing = kvm_name(), peer_qemu.missing()

    @contextmanager
    def written(open_: Callable[[], Opened]) -> Iterator[Callable[[], int]]:
        disk.write_bytes(peer_guests.boot_sector())
        rom.write_bytes(peer_guests.firmware())
        with open_() as run:
            yield run

    def qemu(accelerator: str, what: str, image: Path, *, firmware: bool) -> Subject:
        return Subject(
            f"QEMU {'KVM' if accelerator == 'kvm' else 'TCG'}, {what}",
            peer_qemu.name(accelerator, kvm),
            lambda: written(partial(peer_qemu.runs, image, accelerator, firmware=firmware)),
            BOOT_STATUS,
            "SeaBIOS runs first, and is most of the time" if firmware else "no firmware runs",
            missing,
        )

    subjects = (
        Subject(
            "kvmpy run",
            kvm,
            lambda: written(partial(peer_qemu.kvmpy_runs, disk)),
            BOOT_STATUS,
            "the start of Python; no firmware runs",
        ),
        qemu("tcg", "microvm", rom, firmware=False),
        qemu("kvm", "microvm", rom, firmware=False),
        qemu("tcg", "pc", disk, firmware=True),
        qemu("kvm", "pc", disk, firmware=True),
    )
    name = "a process, from its start to the guest's exit"
    return Work("process", name, "ms", 1e3, effort.process_rounds, 1, subjects)
