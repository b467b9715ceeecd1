"""Devices of one's own and copies of their machine: missing ones are named, not forgotten."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli_run import kvmpy

from kvmpy import ConfigError, Machine, Snapshot, assemble, runs
from kvmpy import map as kvmpy_map
from kvmpy.snapshot.values import Contents, contents, named
from kvmpy.spares import Spares

pytestmark = pytest.mark.usefixtures("kvm_host")

MMIO = 0x8000_0000
CODE = f"in al, 0x30; mov edi, {MMIO}; add al, [rdi]; out 0xf4, al; hlt"
MISSING = r"port 0x30-0x31 \(answer\), MMIO 0x80000000 \(answer\)"


def answer(offset: int, size: int, value: int | None) -> int:
    return 3


def attach(machine: Machine) -> None:
    machine.on_port(0x30, 2)(answer)
    machine.on_mmio(MMIO, 1)(answer)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("1M") as made:
        made.load(assemble(CODE, mode="long", at=0x1000))
        attach(made)
        yield made


def fork(snapshot: Snapshot, attach: Any) -> int | None:
    with Machine.from_snapshot(snapshot, attach) as machine, machine.fork(attach) as other:
        return other.run(timeout=10).value


def spare(snapshot: Snapshot, attach: Any) -> int | None:
    with Spares(snapshot, 1, attach) as spares, spares.machine() as machine:
        return machine.run(timeout=10).value


def run_one(snapshot: Snapshot, attach: Any) -> int | None:
    (one,) = runs(snapshot, [b""], timeout=10, attach=attach)
    return one.value


def map_one(snapshot: Snapshot, attach: Any) -> int | None:
    (one,) = kvmpy_map(snapshot, [b""], timeout=10, attach=attach, workers=1)
    return one.value


@pytest.mark.parametrize("way", [fork, spare, run_one, map_one])
@pytest.mark.parametrize("saved", [False, True])
def test_a_copy_has_the_devices_or_says_which_it_lacks(
    machine: Machine, tmp_path: Path, saved: bool, way: Callable[..., int | None]
) -> None:
    snapshot = machine.snapshot()
    if saved:
        snapshot.save(tmp_path / "it")
        snapshot = Snapshot.load(tmp_path / "it")
    assert way(snapshot, attach) == 6
    with pytest.raises(ConfigError, match=MISSING):
        way(snapshot, None)


def test_one_of_two_is_named(machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"at MMIO 0x80000000 \(answer\), and"):
        machine.fork(lambda other: other.on_port(0x30, 2)(answer))
    with machine.fork(attach) as other:
        other.detach(next(iter(other.dispatch.mmio)))
        with pytest.raises(ConfigError, match="MMIO"):
            other.restore(machine.snapshot())
        with other.fork(lambda another: another.on_port(0x30, 2)(answer)):
            pass  # what was detached is missed by nobody


def test_another_device_there_will_do(machine: Machine) -> None:
    def instead(other: Machine) -> None:
        other.on_port(0x30, 1)(answer)
        other.on_port(0x31, 1)(answer)
        other.on_mmio(MMIO)(lambda offset, size, value: 7)

    with machine.fork(instead) as other:
        assert other.run(timeout=10).value == 10


def test_the_file_and_the_command_line_tell(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "it"
    machine.snapshot().save(file)
    told = kvmpy("snapshot", "info", file).stdout.decode()
    assert "attached     port 0x30-0x31 (answer), MMIO 0x80000000 (answer)\n" in told
    done = kvmpy("resume", file)
    assert done.returncode == 2 and b"port 0x30-0x31 (answer)" in done.stderr


def test_a_malformed_one_is_refused(machine: Machine) -> None:
    saved = machine.snapshot()
    what = Contents(saved.config, saved.cpus, saved.vm, saved.devices, b"", 0, "kvm_intel")
    whole = named(what._replace(attached=saved.attached))
    assert contents(whole).attached == saved.attached
    assert contents(named(what)).attached == ()
    for name, value in (
        ("port 0x30", bytes(8)),
        ("port 0x30", b"\1"),
        ("port 30", b"\1" + bytes(7)),
        ("bus 0x30", b"\1" + bytes(7)),
        ("port 0x" + "1" * 17, b"\1" + bytes(7)),
    ):
        with pytest.raises(ValueError, match="malformed: a device attached at"):
            contents({**named(what), f"attached {name}": value})
