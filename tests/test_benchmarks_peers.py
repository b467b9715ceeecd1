"""The peers do the work that is timed, and one that does not has a row that says why."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.errors import KvmpyError

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # the benchmarks are no part of what is installed

peer, peers, report, works, guests, qemu, unicorn, c = (
    importlib.import_module(f"benchmarks.{name}")
    for name in (
        "peer",
        "peers",
        "peer_report",
        "peer_works",
        "peer_guests",
        "peer_qemu",
        "peer_unicorn",
        "peer_c",
    )
)

HOST = {
    "backend": "kvm_intel",
    "nested": False,
    "processor": "a processor",
    "cpus": 2,
    "kernel": "6.1",
    "python": "3.11",
    "load": 0.1,
    "date": "2026-01-02T03:04:05+00:00",
}
EFFORT = works.Effort(2, 1, writes=5, write_turns=1, sieve_turns=1, life_turns=1)
WORKS = ("port", "mmio", "sieve", "life", "process")


def subject(
    name: str, run: Callable[[], int] = lambda: 7, *, proof: int = 7, missing: str = ""
) -> Any:
    @contextmanager
    def opened() -> Iterator[Callable[[], int]]:
        yield run

    return peer.Subject(name, "nothing", opened, proof, "", missing)


def fake_work(*subjects: Any, rounds: int = 3) -> Any:
    return works.Work("fake", "a fake", "ns", 1e9, rounds, 2, subjects)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# What a peer is ---------------------------------------------------------------------------------


def test_work_that_was_not_done_is_not_timed() -> None:
    wrong = peer.tried(subject("lazy", lambda: 6))
    assert wrong.missing == "not available here: lazy: the proof of the work is 6, not 7"
    seen = iter((7, 7, 5))
    with peer.prepared(subject("tiring", lambda: next(seen)), 1e9) as turn:
        assert turn() > 0
        with pytest.raises(peer.PeerError, match="tiring: the proof of the work is 5, not 7"):
            turn()


@pytest.mark.parametrize("error", [KvmpyError("it is\nbroken"), OSError("it is broken")])
def test_a_peer_that_fails_has_a_reason_of_one_line(error: Exception) -> None:
    def fail() -> int:
        raise error

    assert peer.tried(subject("bad", fail)).missing == "not available here: it is broken"
    assert peer.tried(subject("good")).missing == ""


def test_a_peer_that_hangs_has_a_deadline_and_leaves_no_timer() -> None:
    def hang() -> int:
        while True:
            pass

    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert "slow did not end within 0.05 s" in peer.tried(subject("slow", hang), 0.05).missing
    assert signal.getsignal(signal.SIGALRM) is handler
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == bool(left)


def test_figures_are_ratios_to_the_first_peer_of_the_same_round() -> None:
    result = peers.measure(fake_work(subject("one"), subject("two"), subject("no", missing="why")))
    one, two, no = result.figures
    assert one.ratio == type(one.ratio)(1.0, 1.0, 1.0)
    assert len(one.samples) == len(two.samples) == 3
    ratios = sorted(b / a for a, b in zip(one.samples, two.samples, strict=True))
    assert (two.ratio.least, two.ratio.median, two.ratio.greatest) == tuple(ratios)
    assert (no.missing, no.value, no.ratio, no.samples) == ("why", None, None, ())


def test_without_the_first_peer_there_are_no_ratios() -> None:
    result = peers.measure(fake_work(subject("one", missing="why"), subject("two")))
    assert [figure.ratio for figure in result.figures] == [None, None]
    assert result.figures[1].value is not None


# The tables -------------------------------------------------------------------------------------


def results() -> list[Any]:
    spread = importlib.import_module("benchmarks.stats").Spread
    first = report.Figure("bare C", "KVM", "", "", spread(1234.5, 12.34, 5e6), spread(1, 1, 1))
    second = report.Figure("other", "emulator", "a|b", "", spread(2.5, 1, 3), spread(0.5, 0.4, 2))
    absent = report.Figure("gone", "emulator", "", "not installed: pip install gone")
    return [report.Result("port", "a port write", "ns", (first, second, absent))]


def test_markdown_has_a_row_for_each_peer_and_the_host_and_command_below() -> None:
    text = report.markdown(HOST, results(), "python -m benchmarks.peers", "")
    table, _, below = text.partition("\n\n")
    assert table.splitlines() == [
        "| work | with | runs on | median | least to greatest | ratio |",
        "| --- | --- | --- | --: | --: | --- |",
        "| a port write, ns | bare C | KVM | 1,234 | 12.3 to 5,000,000 | 1.00 |",
        "|  | other (a\\|b) | emulator | 2.50 | 1.00 to 3.00 | 0.50 |",
        "|  | gone | emulator | - | - | not installed: pip install gone |",
    ]
    first = below.splitlines()[0]
    for part in ("kvm_intel, not nested", "2026-01-02", "`python -m benchmarks.peers`"):
        assert part in first
    assert "kvm_pvm" not in below
    assert report.PVM_NOTE in report.markdown(HOST | {"backend": "kvm_pvm"}, [], "x", "")
    assert report.markdown(HOST, [], "x", "take care").endswith("\ntake care\n")


def test_the_table_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(HOST, results(), "python -m benchmarks.peers", "take care")
    shown = capsys.readouterr().out
    for part in ("1,234", "other (a|b)", "not installed: pip install gone", "take care"):
        assert part in shown


def test_json_keeps_every_sample() -> None:
    done = peers.measure(fake_work(subject("one"), subject("no", missing="why")))
    data = json.loads(json.dumps(report.as_json(HOST, [done], "x")))
    (work,) = data["works"]
    assert (work["key"], work["unit"], data["command"]) == ("fake", "ns", "x")
    assert len(work["figures"][0]["samples"]) == 3
    assert work["figures"][1]["missing"] == "why"


# The real peers ---------------------------------------------------------------------------------


def real(tmp_path: Path) -> dict[str, Any]:
    return {work.key: work for work in works.works(EFFORT, tmp_path)}


def check(one: Any) -> None:
    """Try a real peer; skip where it is not installed."""
    if one.missing.startswith("not installed"):
        pytest.skip(one.missing)
    seen = peer.tried(one).missing
    if "cannot build the C" in seen:
        pytest.skip(seen)
    assert not seen


def named(work: Any, start: str) -> list[Any]:
    return [one for one in work.subjects if one.name.startswith(start)]


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("name", ["bare C", "kvmpy", "fcntl.ioctl"])
@pytest.mark.parametrize("key", WORKS[:-1])
def test_peers_under_kvm_do_the_work(key: str, name: str, tmp_path: Path) -> None:
    found = named(real(tmp_path)[key], name)
    assert found
    for one in found:
        check(one)


@pytest.mark.parametrize("key", WORKS[:-1])
def test_unicorn_does_the_work(key: str, tmp_path: Path) -> None:
    found = named(real(tmp_path)[key], "Unicorn")
    assert len(found) == (2 if key == "mmio" else 1)
    for one in found:
        check(one)


def test_a_life_in_unicorn_ends(tmp_path: Path) -> None:
    if unicorn.missing():
        pytest.skip(unicorn.missing())
    engine = importlib.import_module("unicorn").Uc
    gc.collect()
    gc.disable()  # as while it is timed
    try:
        with unicorn.lives(guests.port_writes(1)) as live:
            assert [live() for _ in range(3)] == [1] * 3
        assert not any(isinstance(one, engine) for one in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.usefixtures("kvm_host")
def test_kvmpy_run_ends_with_the_status_of_the_boot_sector(tmp_path: Path) -> None:
    check(named(real(tmp_path)["process"], "kvmpy run")[0])


@pytest.mark.parametrize("what", ["QEMU TCG, microvm", "QEMU TCG, pc"])
def test_qemu_ends_with_the_same_status(what: str, tmp_path: Path) -> None:
    check(named(real(tmp_path)["process"], what)[0])


@pytest.mark.usefixtures("kvm_host")
def test_a_count_that_is_not_the_guests_is_seen(tmp_path: Path) -> None:
    subjects = works._writes(guests.port_writes(4), 5)
    for one, proofs in zip(subjects, ((10, 15), (4, 5), (10, 15), (10, 15)), strict=True):
        seen = peer.tried(one).missing
        if "cannot build the C" not in seen:
            assert f"the proof of the work is {proofs[0]}, not {proofs[1]}" in seen


@pytest.mark.usefixtures("kvm_host")
def test_work_can_be_done_again_and_again(tmp_path: Path) -> None:
    for key in ("port", "sieve"):
        for one in real(tmp_path)[key].subjects:
            if one.missing or peer.tried(one).missing:
                continue
            with one.open() as do:
                assert [do() for _ in range(3)] == [one.proof] * 3


def test_the_images_are_of_the_size_that_firmware_wants() -> None:
    sector, firmware = guests.boot_sector(), guests.firmware()
    assert (len(sector), sector[-2:]) == (512, b"\x55\xaa")
    assert len(firmware) == 65536
    code = firmware[0xFFF0:].rstrip(b"\0")
    assert code and sector.startswith(code)  # runs wherever it is


# Peers that are not there -----------------------------------------------------------------------


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was found out about installed peers is not kept, before and after."""
    for one in (qemu.missing, qemu._version, qemu._processor, unicorn.missing):
        one.cache_clear()
    yield
    for one in (qemu.missing, qemu._version, qemu._processor, unicorn.missing):
        one.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_unicorn_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        unicorn, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    )
    (one,) = named(real(tmp_path)["port"], "Unicorn")
    assert one.missing == "not installed: pip install unicorn"
    assert one.runs_on == "emulator (Unicorn)"
    assert peer.tried(one) is one


def fake_qemu(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    program = directory / qemu.PROGRAM
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.usefixtures("forgetful")
def test_qemu_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = named(real(tmp_path)["process"], "QEMU")
    assert len(found) == 4
    for one in found:
        assert one.missing.startswith("not installed: qemu-system-x86_64")
        assert "qemu-system-x86" in one.missing


VERSION = '[ "$1" = --version ] && echo "QEMU emulator version 1.2.3 (x)" && exit 0\n'


@pytest.mark.usefixtures("forgetful")
def test_qemu_that_fails_says_why_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_qemu(monkeypatch, tmp_path, VERSION + "echo it has no KVM >&2; exit 1")
    for one in named(real(tmp_path)["process"], "QEMU"):
        seen = peer.tried(one).missing
        assert seen.endswith("not available here: qemu-system-x86_64 ended with 1: it has no KVM")
    tcg, _, _, _ = named(real(tmp_path)["process"], "QEMU")
    assert tcg.runs_on == "emulator (QEMU 1.2.3, TCG)"


@pytest.mark.usefixtures("forgetful")
def test_qemu_gets_the_processor_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    last = qemu.KVM_PROCESSORS[-1]
    script = (
        f'{VERSION}echo "$@" >> {tmp_path}/seen\ncase "$*" in *" {last}") exit 85;; esac; exit 1'
    )
    fake_qemu(monkeypatch, tmp_path, script)
    image = tmp_path / "a,b.bin"
    with qemu.runs(image, "kvm", firmware=True) as do:
        assert do() == guests.BOOT_STATUS
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in seen] == ["host", last, last]
    assert "a,,b.bin" in seen[0]


# The command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rounds", "0"), "'0' is no number of rounds"),
        (("--rounds", "many"), "'many' is no number of rounds"),
        (("--json", "/nowhere/figures.json"), "cannot write /nowhere/figures.json"),
        (("--fast",), "unrecognized arguments: --fast"),
    ],
)
def test_a_bad_option_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_ctrl_c_prints_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(effort: object, so_far: list[Any]) -> None:
        so_far += results()
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "_measure_all", interrupted)
    assert peers.main(["--markdown"]) == 130
    shown = capsys.readouterr().out
    assert "| bare C |" in shown
    assert "Interrupted" in shown


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_a_quick_run_has_a_row_for_every_peer(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--markdown", "--json", str(file))
    assert done.returncode == 0, done.stderr
    data = json.loads(file.read_text())
    assert tuple(work["key"] for work in data["works"]) == WORKS
    assert [len(work["figures"]) for work in data["works"]] == [5, 6, 4, 5, 5]
    for work in data["works"]:
        for figure in work["figures"]:
            assert f"| {figure['name']}" in done.stdout
            assert bool(figure["missing"]) == (figure["value"] is None)
    assert data["command"].startswith("python -m benchmarks.peers --quick")
    assert data["host"]["backend"] in done.stdout and "quick run" in done.stdout


def test_a_module_that_another_python_has_built_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = importlib.import_module("benchmarks.floor")
    monkeypatch.setattr(floor, "BUILD", tmp_path)
    (tmp_path / "floor_1.cpython-99-x86_64-linux-gnu.so").touch()
    assert not floor.is_built("floor_1")
    (tmp_path / f"floor_1{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert floor.is_built("floor_1")
