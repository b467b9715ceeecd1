"""Snapshots in files: whole or not there, and refused when they are not what was saved."""

import copy
import errno
import gc
import hashlib
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import ConfigError, HostError, Machine, Snapshot, SnapshotError, UnsupportedError, runs
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot import host, layout, regions
from kvmpy.snapshot.load import SnapshotFile

pytestmark = pytest.mark.usefixtures("kvm_host")

MEMORY = 1 << 20
COUNTING = bytes.fromhex("ffc0 e680 ebfa")  # again: inc eax; out 0x80, al; jmp again
WAYS = (None, "zstd")


def machine_of(size: int = MEMORY) -> Machine:
    """One that has pages of every kind: zeros, repeated ones, different ones."""
    machine = Machine(size)
    machine.load(COUNTING, 0x1000)
    machine.memory.write(0x20000, b"repeat" * PAGE_SIZE)  # six pages, of which three differ
    machine.memory.write(0x40000, os.urandom(3 * PAGE_SIZE))
    machine.run(max_exits=3, timeout=10)
    return machine


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    with machine_of() as machine:
        yield machine.snapshot()


@pytest.fixture(scope="module")
def files(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, bytes]:
    """The bytes of a file in each way; "packed" is one without compression that leaves out much."""
    path = tmp_path_factory.mktemp("snapshots") / "one"
    made: dict[str | None, bytes] = {}
    for way in WAYS:
        snapshot.save(path, compress=way)
        made[way] = path.read_bytes()
    with Machine(MEMORY) as machine:
        machine.load(COUNTING, 0x1000)
        machine.memory.write(0x20000, b"repeat!!" * (16 * PAGE_SIZE // 8))
        machine.snapshot().save(path)
    made["repeats"] = path.read_bytes()
    return made


def goes_on(snapshot: Snapshot, value: int = 3) -> None:
    with Machine.from_snapshot(snapshot) as machine:
        assert machine.cpus[0].get_regs().rax == value
        assert machine.run(max_exits=2, timeout=10).outcome == "max-exits"
        assert machine.cpus[0].get_regs().rax == value + 2


# Saving and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verify", ["auto", "all", "index"])
def test_what_is_loaded_is_what_was_saved(
    snapshot: Snapshot, tmp_path: Path, way: str | None, verify: str
) -> None:
    path = tmp_path / "one"
    snapshot.save(str(path), compress=way)
    assert snapshot.path == path
    found = Snapshot.load(path, verify=verify)
    assert found.path == path
    assert not snapshot.diff(found)
    assert found.parent is None
    for name in ("config", "cpus", "vm", "devices", "console", "entry", "backend"):
        assert getattr(found, name) == getattr(snapshot, name), name
    found.verify()
    goes_on(found)
    goes_on(found)
    assert [one.name for one in tmp_path.iterdir()] == ["one"]


def test_a_chain_of_increments_is_one_file(tmp_path: Path) -> None:
    with machine_of() as machine:
        machine.snapshot()
        machine.memory.write(0x40000, bytes(PAGE_SIZE))
        machine.memory.write(0x60000, b"x")
        middle = machine.snapshot()
        machine.run(max_exits=1, timeout=10)
        last = machine.snapshot()
        assert last.parent is middle
        last.save(tmp_path / "last")
        found = Snapshot.load(tmp_path / "last")
        assert not last.diff(found)
        goes_on(found, 4)
        machine.restore(found)  # into the machine that it is of, and from there on
        machine.memory.write(0x60000, b"y")
        again = machine.snapshot()
        assert again.parent is found
        assert found.diff(again).pages == (0x60000,)
        again.save(tmp_path / "again", compress="zstd")
        assert not again.diff(Snapshot.load(tmp_path / "again"))


def test_zeros_and_repeats_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "one"
    with Machine("256M") as machine:
        machine.load(COUNTING, 0x1000)
        machine.memory.write(8 << 20, os.urandom(PAGE_SIZE) * 2048)
        snapshot = machine.snapshot()
    for way in WAYS:
        snapshot.save(path, compress=way)
        status = path.stat()
        assert status.st_blocks * 512 < 256 << 10
        assert (status.st_size < 256 << 10) == (way == "zstd")
        found = Snapshot.load(path)
        assert found.read(8 << 20, 8 << 20) == snapshot.read(8 << 20, 8 << 20)


def test_saving_reads_no_holes(tmp_path: Path) -> None:
    """A hole in a file in memory that is read through a mapping takes memory from then on."""
    with Machine("64M") as machine:
        machine.load(COUNTING, 0x1000)
        snapshot = machine.snapshot()
        before = snapshot.size
        snapshot.save(tmp_path / "one")
        assert snapshot.size == before


def test_a_machine_maps_the_file(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "one"
    snapshot.save(path)
    found = Snapshot.load(path)
    with Machine.from_snapshot(found) as machine:
        assert str(path) in Path("/proc/self/maps").read_text()
        machine.memory.write(0x40000, b"not for the file")
    found.verify()
    path.unlink()  # it is open: nobody needs its name
    goes_on(found)
    found.verify()


def test_a_loop_over_inputs_goes_back_to_a_file(snapshot: Snapshot, tmp_path: Path) -> None:
    snapshot.save(tmp_path / "one")
    found = Snapshot.load(tmp_path / "one")
    words = [bytes([number]) for number in range(20)]
    seen = runs(found, words, 0x60000, max_exits=3, timeout=10, collect=(0x60000, 1))
    assert [(one.collected, one.registers.rax) for one in seen] == [(word, 6) for word in words]
    assert found.read(0x60000, 1) == b"\0"
    found.verify()


def test_files_are_closed_again(snapshot: Snapshot, tmp_path: Path) -> None:
    snapshot.save(tmp_path / "one", compress="zstd")
    snapshot.save(tmp_path / "two")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for name in ("one", "two"):
        found = Snapshot.load(tmp_path / name)
        with Machine.from_snapshot(found):
            pass
        del found
    (tmp_path / "two").write_bytes(b"x" * 5000)
    with pytest.raises(SnapshotError):
        Snapshot.load(tmp_path / "two")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_irqchip_and_several_vcpus(tmp_path: Path) -> None:
    for irqchip in ("split", "full"):
        with Machine(MEMORY, cpus=2, irqchip=irqchip) as machine:
            if irqchip == "full":
                machine.vm.create_pit()
            machine.load(COUNTING, 0x1000)
            snapshot = machine.snapshot()
            snapshot.save(tmp_path / "one")
            found = Snapshot.load(tmp_path / "one")
            assert (found.vm, found.cpus) == (snapshot.vm, snapshot.cpus)
            assert found.vm.routes == machine.vm.gsi_routes
            Machine.from_snapshot(found).close()


def test_names_that_cannot_be_written_or_read(snapshot: Snapshot, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "folder", tmp_path / ("x" * 300), "/dev/null"):
        with pytest.raises(HostError, match="cannot save there"):
            snapshot.save(path)
    with pytest.raises(ConfigError, match="gzip"):
        snapshot.save(tmp_path / "one", compress="gzip")
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "nosuch", "No such file"),
        ("nul\0byte", "null (byte|character)"),  # the latter since Python 3.13
        ("/dev/zero", "no regular file"),
    ):
        with pytest.raises(SnapshotError, match=words):
            Snapshot.load(path)
    snapshot.save(tmp_path / "one")
    with pytest.raises(ConfigError, match="verify"):
        Snapshot.load(tmp_path / "one", verify="some")


def test_a_symbolic_link_stays_one(snapshot: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/real")
    snapshot.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Snapshot.load(tmp_path / "folder" / "real").path == tmp_path / "folder" / "real"


def test_without_the_library_it_says_what_to_install(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one"
    snapshot.save(path, compress="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for call in (lambda: snapshot.save(path, compress="zstd"), lambda: Snapshot.load(path)):
        with pytest.raises(ConfigError, match=r"pip install 'kvmpy\[zstd\]'"):
            call()


# By reference -------------------------------------------------------------------------------


def test_pickled_it_is_its_file(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "one"
    snapshot.save(path)
    found = Snapshot.load(path)
    pickled = pickle.dumps(found)
    assert len(pickled) < 500
    assert pickle.loads(pickled) is found
    assert copy.deepcopy([found])[0] is found
    script = (
        "import pickle, sys, kvmpy; data = sys.stdin.buffer.read()\n"
        "one, other = pickle.loads(data), pickle.loads(data)\n"
        "print(one is other, one.pages, one.path)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=pickled, capture_output=True, check=True, timeout=30)
    assert done.stdout.decode().split() == ["True", str(found.pages), str(path)]
    path.rename(tmp_path / "away")
    assert pickle.loads(pickled) is found  # without a look at the file
    (tmp_path / "away").rename(path)
    del found
    snapshot.save(tmp_path / "other")
    object.__setattr__(snapshot, "saved", None)
    gc.collect()
    assert pickle.loads(pickled).path == path  # loaded again
    gc.collect()
    with machine_of() as machine:
        machine.snapshot().save(path)
    with pytest.raises(SnapshotError, match="replaced"):
        pickle.loads(pickled)
    path.unlink()
    with pytest.raises(SnapshotError, match="No such file"):
        pickle.loads(pickled)


def test_one_that_is_in_no_file_is_not_pickled() -> None:
    with machine_of() as machine:
        unsaved = machine.snapshot()
    with pytest.raises(ConfigError, match="save it first"):
        pickle.dumps(unsaved)
    with pytest.raises(ConfigError, match="save it first"):
        unsaved.verify()


# Damage -------------------------------------------------------------------------------------


def load_all(path: Path, data: bytes) -> Snapshot:
    path.write_bytes(data)
    return Snapshot.load(path, verify="all")


KINDS = (None, "zstd", "repeats")


@settings(max_examples=60)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_byte_that_was_altered_is_found(
    files: dict[str | None, bytes], tmp_path: Path, kind: str | None, data: st.DataObject
) -> None:
    """Wherever it is, holes included."""
    whole = files[kind]
    parts = [(0, 256), (256, len(whole)), (len(whole) - 40_000, len(whole))]
    at = data.draw(st.one_of(*(st.integers(a, b - 1) for a, b in parts if a >= 0)))
    bits = data.draw(st.integers(1, 255))
    altered = whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    with pytest.raises(SnapshotError) as caught:
        load_all(tmp_path / "altered", altered)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_is_refused(
    files: dict[str | None, bytes], tmp_path: Path, kind: str | None
) -> None:
    whole, path = files[kind], tmp_path / "one"
    path.write_bytes(whole)
    header = SnapshotFile(path).header
    ends = {
        0, 1, 8, 16, 20, 128, 160, PAGE_SIZE, 2 * PAGE_SIZE, len(whole) // 2, header.values_offset,
        header.values_offset + 8, header.tables_offset, header.tables_offset + 8, len(whole),
    }  # fmt: skip
    for end in sorted({max(0, one + step) for one in ends for step in (-1, 0, 1)}):
        if end == len(whole):
            continue
        with pytest.raises(SnapshotError, match=r"cut off|altered|no snapshot") as caught:
            load_all(path, whole.ljust(end, b"\0")[:end])
        assert "\n" not in str(caught.value)


def test_pages_are_not_checked_unless_they_are(
    files: dict[str | None, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "one"
    at = files[None].index(b"repeatrepeat")
    path.write_bytes(files[None][:at] + b"R" + files[None][at + 1 :])
    found = Snapshot.load(path, verify="index")
    with pytest.raises(SnapshotError, match=r"one: was altered: block 0 of the RAM at 0x0"):
        found.verify()
    for verify in ("auto", "all"):
        with pytest.raises(SnapshotError, match="altered"):
            Snapshot.load(path, verify=verify)
    for kind in ("zstd", "repeats"):  # what is expanded is always checked
        data = bytearray(files[kind])
        data[PAGE_SIZE * (1 if kind == "zstd" else 2) + 20] ^= 1
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match="altered"):
            Snapshot.load(path, verify="index")


def test_another_version_and_another_kind_of_file(
    files: dict[str | None, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "one"
    data = bytearray(files[None])
    data[16] = 2
    with pytest.raises(SnapshotError, match="format version 2, and this kvmpy reads version 1"):
        load_all(path, data)
    for other in (b"", b"\x7fELF" + bytes(5000), b"kvmpy"):
        with pytest.raises(SnapshotError, match="is no snapshot"):
            load_all(path, other)


def with_parts(
    whole: bytes, values: bytes, tables: bytes, pages: bytes | None = None, **changes: Any
) -> bytes:
    """A file with other values and tables, and every checksum as it should be."""
    old = layout.Header.unpack(whole[: layout.Header.SIZE], len(whole))
    if pages is None:
        pages = whole[layout.Header.SIZE : old.values_offset]
    offset = layout.Header.SIZE + len(pages)
    facts = {
        "compress": old.compress,
        "file_size": offset + len(values) + len(tables),
        "values_offset": offset,
        "values_size": len(values),
        "values_digest": layout.digest(values),
        "tables_offset": offset + len(values),
        "tables_size": len(tables),
        "tables_digest": layout.digest(tables),
        **changes,
    }
    return layout.Header(**facts).pack() + pages + values + tables


def parts_of(whole: bytes) -> tuple[bytes, bytes]:
    header = layout.Header.unpack(whole[: layout.Header.SIZE], len(whole))
    end = header.values_offset + header.values_size
    return whole[header.values_offset : end], whole[end:]


NUMBERS = st.one_of(
    st.integers(0, 20),
    st.sampled_from([0xFFF, 0x1000, 1 << 20, 1 << 31, 1 << 32, 1 << 43, 1 << 52, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=80)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_hostile_tables_are_refused_or_harmless(
    files: dict[str | None, bytes], tmp_path: Path, kind: str | None, data: st.DataObject
) -> None:
    """With checksums that are right: no crash, no end of the memory, no hang; SnapshotError."""
    values, tables = parts_of(files[kind])
    hostile = bytearray(tables)
    for _ in range(data.draw(st.integers(1, 3))):
        near = st.integers(0, len(hostile) // 8 - 1)
        at = 8 * data.draw(st.one_of(st.integers(0, 6), near))
        hostile[at : at + 8] = data.draw(NUMBERS).to_bytes(8, "little")
    end = data.draw(st.one_of(st.just(len(hostile)), st.integers(0, len(hostile))))
    path = tmp_path / "hostile"
    path.write_bytes(with_parts(files[kind], values, bytes(hostile[:end])))
    for verify in ("all", "index"):
        try:
            found = Snapshot.load(path, verify=verify)
        except SnapshotError as error:
            assert "\n" not in str(error)
        else:
            assert found.pages <= 1 << 31


@settings(max_examples=80)
@given(data=st.data())
def test_hostile_values_are_refused_or_harmless(
    files: dict[str | None, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    values, tables = parts_of(files[None])
    named = layout.unpack_values(values)
    name = data.draw(st.sampled_from(sorted(named)))
    if name == "machine":
        text = named[name].decode()
        old = data.draw(st.sampled_from(['"long"', "1048576", "null", "false", "0", "1", "[", "{"]))
        new = data.draw(
            st.sampled_from(['"x"', "-1", "1e99", "9" * 5000, "null", "[" * 9999, "true", "NaN"])
        )
        named[name] = text.replace(old, new, 1).encode()
    else:
        named[name] = data.draw(
            st.one_of(
                st.binary(max_size=200),
                st.just(named[name] * 2),
                st.just(named[name][:-1]),
                st.just(b"\xff" * len(named[name])),
            )
        )
    packed = layout.pack_values(named)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(packed) - 1))
        packed = packed[:at] + data.draw(st.binary(max_size=8)) + packed[at + 8 :]
    path = tmp_path / "hostile"
    path.write_bytes(with_parts(files[None], packed, tables))
    try:
        found = Snapshot.load(path)
        Machine.from_snapshot(found, across_backends=True).close()
    except (SnapshotError, ConfigError, HostError) as error:
        assert "\n" not in str(error)


def test_pages_beyond_the_region_are_refused(tmp_path: Path) -> None:
    with Machine(257 * PAGE_SIZE) as machine:
        machine.load(COUNTING, 0x1000)
        machine.snapshot().save(tmp_path / "one")
    whole = (tmp_path / "one").read_bytes()
    values, tables = parts_of(whole)
    for at, bit in ((32, 2), (39, 0x80)):  # 257 bits in five words, after 48 bytes
        hostile = bytearray(tables)
        hostile[48 + at] |= bit
        with pytest.raises(SnapshotError, match="that the region does not have"):
            load_all(tmp_path / "one", with_parts(whole, values, bytes(hostile)))


def test_hostile_headers_are_refused(files: dict[str | None, bytes], tmp_path: Path) -> None:
    values, tables = parts_of(files[None])
    for change in (
        {"values_offset": 0},
        {"values_size": 1 << 63},
        {"tables_offset": (1 << 64) - 1},
        {"tables_size": 1 << 40},
        {"file_size": 1 << 63},
    ):
        with pytest.raises(SnapshotError):
            load_all(tmp_path / "one", with_parts(files[None], values, tables, **change))
    # A file of a terabyte that is a hole, all of which would be tables.
    path = tmp_path / "hole"
    start = layout.Header.unpack(files[None][: layout.Header.SIZE], len(files[None])).tables_offset
    change = {"file_size": 1 << 40, "tables_size": (1 << 40) - start}
    path.write_bytes(with_parts(files[None], values, tables, **change))
    os.truncate(path, 1 << 40)
    with pytest.raises(SnapshotError, match="malformed"):
        Snapshot.load(path)


def test_a_block_that_expands_to_more_is_refused(
    files: dict[str | None, bytes], tmp_path: Path
) -> None:
    import zstandard

    values, packed = parts_of(files["zstd"])
    header = layout.Header.unpack(files["zstd"][: layout.Header.SIZE], len(files["zstd"]))
    (table,) = regions.unpack_tables(packed, header)
    for bomb in (
        zstandard.compress(bytes(1 << 26)),
        zstandard.compress(b""),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20)),
        b"\x28\xb5\x2f\xfd" + bytes(20),
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 44).to_bytes(8, "little") + bytes(20),  # so it says
    ):
        table.blocks = [regions.Block(PAGE_SIZE, len(bomb), layout.digest(bomb))]
        path = tmp_path / "bomb"
        path.write_bytes(
            with_parts(files["zstd"], values, regions.pack_tables([table]), pages=bomb)
        )
        with pytest.raises(SnapshotError, match="is malformed: a block"):
            Snapshot.load(path)


# Failures while it is written ---------------------------------------------------------------


def fails_and_leaves_all_as_it_was(snapshot: Snapshot, folder: Path, match: str) -> None:
    path = folder / "one"
    before = path.read_bytes(), sorted(folder.iterdir())
    for way in WAYS:
        with pytest.raises(HostError, match=match) as caught:
            snapshot.save(path, compress=way)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert (path.read_bytes(), sorted(folder.iterdir())) == before
    Snapshot.load(path, verify="all")


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Snapshot]:
    """A snapshot that takes some MiB, in whichever way it is saved."""
    with Machine("8M") as machine:
        machine.load(COUNTING, 0x1000)
        machine.memory.write(1 << 20, os.urandom(4 << 20))
        yield machine.snapshot()


def test_a_disk_that_is_full(snapshot: Snapshot, big: Snapshot, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "kvmpy-test", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, timeout=30).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        snapshot.save(folder / "one")
        fails_and_leaves_all_as_it_was(big, folder, os.strerror(errno.ENOSPC))
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@pytest.mark.parametrize("named", [False, True])
def test_a_file_that_may_not_grow(
    snapshot: Snapshot,
    big: Snapshot,
    tmp_path: Path,
    named: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if named:  # as on a file system without O_TMPFILE
        monkeypatch.setattr("os.O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    snapshot.save(tmp_path / "one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))
    try:
        fails_and_leaves_all_as_it_was(big, tmp_path, os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    big.save(tmp_path / "one")
    assert [one.name for one in tmp_path.iterdir()] == ["one"]
    goes_on(Snapshot.load(tmp_path / "one"), 0)


@pytest.mark.parametrize("call", ["fsync", "link", "rename", "pwrite"])
def test_every_step_may_fail(
    snapshot: Snapshot, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    snapshot.save(tmp_path / "one")
    monkeypatch.setattr(f"os.{call}", fail)
    fails_and_leaves_all_as_it_was(snapshot, tmp_path, os.strerror(errno.EIO))


KILLED = """
import os, sys
from kvmpy import Machine, Snapshot
with Machine("8M") as machine:
    machine.load(b"\\xf4", 0x1000)
    machine.memory.write(1 << 20, os.urandom(4 << 20))
    snapshot = machine.snapshot()
    print(flush=True)
    while True:
        snapshot.save(sys.argv[1])
"""


def test_a_process_that_is_killed_leaves_a_whole_file(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "one"
    snapshot.save(path)
    command = [sys.executable, "-c", KILLED, str(path)]
    for delay in (0.0, 0.003, 0.011, 0.03):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
        Snapshot.load(path, verify="all")
    left = [one.name for one in tmp_path.iterdir() if one.name != "one"]
    assert len(left) <= 4  # at most a name between link and rename


def test_two_threads_that_save_to_one_place(snapshot: Snapshot, tmp_path: Path) -> None:
    threads = [threading.Thread(target=snapshot.save, args=(tmp_path / "one",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    Snapshot.load(tmp_path / "one", verify="all")
    assert [one.name for one in tmp_path.iterdir()] == ["one"]


# Hosts --------------------------------------------------------------------------------------


def test_a_host_that_lacks_what_it_needs(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot.save(tmp_path / "one")
    found = Snapshot.load(tmp_path / "one")
    real = host._host()
    goes_on(found)

    def less(function: int, register: str, bits: int) -> host._Host:
        leaves = []
        for one in real.leaves:
            made = copy.deepcopy(one)
            entry = made[function, 0]
            setattr(entry, register, getattr(entry, register) & ~bits)
            leaves.append(made)
        return real._replace(leaves=(leaves[0], leaves[1]))

    some = next(i for i, _, v in host.struct.iter_unpack("<IIQ", found.cpus[0]["MSRS"]) if v)
    for lacking, words in (
        (less(1, "edx", 1 << 26), r"CPUID 0x1\.0 edx bit 26"),
        (less(0x80000001, "edx", 1 << 29), r"lm \(CPUID 0x80000001\.0 edx bit 29\)"),
        (real._replace(msrs=real.msrs - {some}), f"MSR {some:#x}"),
        (real._replace(xsave=576), "XSAVE area"),
    ):
        monkeypatch.setattr(host, "_host", lambda lacking=lacking: lacking)
        with pytest.raises(UnsupportedError, match=words) as caught:
            Machine.from_snapshot(found)
        assert "\n" not in str(caught.value)
        with machine_of() as machine, pytest.raises(UnsupportedError, match=words):
            machine.restore(found)
    monkeypatch.setattr("kvmpy.snapshot.snapshot.backend", lambda: "kvm_other")
    with pytest.raises(ConfigError, match="across_backends"):
        Machine.from_snapshot(found)


def test_what_xcr0_switches_on_must_be_there(snapshot: Snapshot) -> None:
    state = dict(snapshot.cpus[0])
    xcrs = bytearray(state["XCRS"])
    xcrs[16:24] = (7 | 1 << 60).to_bytes(8, "little")
    state["XCRS"] = bytes(xcrs)
    with pytest.raises(UnsupportedError, match="XSAVE components 0x1000000000000000 in XCR0"):
        host.check_host([state])
    area = bytearray(snapshot.cpus[0]["XSAVE"])
    area[512:520] = (1 << 59).to_bytes(8, "little")
    with pytest.raises(UnsupportedError, match="XSAVE components 0x800000000000000 in use"):
        host.check_host([{**snapshot.cpus[0], "XSAVE": bytes(area)}])


def test_an_msr_that_is_refused_is_not_left_out(snapshot: Snapshot) -> None:
    packed = snapshot.cpus[0]["MSRS"]
    lstar, none = 0xC0000082, 1 << 62  # no canonical address
    altered = b"".join(
        host.struct.pack("<IIQ", index, 0, none if index == lstar else value)
        for index, _, value in host.struct.iter_unpack("<IIQ", packed)
    )
    assert altered != packed
    cpus = tuple({**state, "MSRS": altered} for state in snapshot.cpus)
    values = {name: getattr(snapshot, name) for name in ("config", "images", "vm", "devices")}
    other = Snapshot(**values, console=b"", entry=snapshot.entry, cpus=cpus)
    with pytest.raises(UnsupportedError, match="MSR 0xc0000082"):
        Machine.from_snapshot(other)
    with machine_of() as machine, pytest.raises(UnsupportedError, match="MSR 0xc0000082"):
        machine.restore(other)


# The format ---------------------------------------------------------------------------------


def test_the_file_is_as_the_document_says(files: dict[str | None, bytes]) -> None:
    """Read by hand, from docs/snapshot-format.md alone."""
    data = files[None]
    number = lambda at, size: int.from_bytes(data[at : at + size], "little")  # noqa: E731
    assert data[:16] == b"kvmpysnapshot\r\n\x1a"
    assert (number(16, 4), number(20, 4), number(24, 8)) == (1, 0, len(data))
    assert hashlib.sha256(data[:128]).digest() == data[128:160]
    offset, size = number(32, 8), number(40, 8)
    assert hashlib.sha256(data[offset : offset + size]).digest() == data[48:80]
    offset, size = number(80, 8), number(88, 8)
    assert hashlib.sha256(data[offset : offset + size]).digest() == data[96:128]
    assert (number(offset, 8), number(offset + 8, 8)) == (0, MEMORY)
    ram = number(offset + 24, 8)
    assert ram % PAGE_SIZE == 0
    assert data[ram + 0x1000 : ram + 0x1006] == COUNTING
    bitmap = data[offset + 48 : offset + 48 + MEMORY // PAGE_SIZE // 8]
    assert bitmap[0] >> 1 & 1
    assert not bitmap[0] & 1


def test_spawning_from_a_file_in_a_forked_process(snapshot: Snapshot, tmp_path: Path) -> None:
    snapshot.save(tmp_path / "one")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_value, (Snapshot.load(tmp_path / "one"),)) == 3


def _value(snapshot: Snapshot) -> int:
    with Machine.from_snapshot(snapshot) as machine:
        return machine.cpus[0].get_regs().rax
