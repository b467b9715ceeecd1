"""What `kvmpy bench` shows beside its table: waterfalls, plots, and whether to trust it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import ConfigError
from kvmpy.bench import selftest
from kvmpy.bench.calls import raiser, timed
from kvmpy.bench.measurement import Measurement
from kvmpy.bench.model import Batch, Case, Conditions, Unmeasured
from kvmpy.bench.plot import check_suffix, figure, plot, ticks
from kvmpy.bench.runner import pinning
from kvmpy.bench.waterfall import PARTS, waterfalls
from kvmpy.bench.waterfall import table as waterfall_table
from kvmpy.calls import Call, close, ioctl, write
from kvmpy.errors import HostError
from kvmpy.kvm import KVM

ROOT = Path(__file__).parent.parent
CLOSED = 1_000_000  # a descriptor that is none
FACTS = {
    "backend": "kvm_pvm",
    "nested": True,
    "cpu": "a CPU",
    "kernel": "6.1.2",
    "versions": {"kvmpy": "9.8"},
    "date": "2026-01-02",
}


def measured(level: str, median: float, mode: str = "long", **overhead: float) -> Measurement:
    case = Case("pio-out", level, mode)
    samples = np.full(100, median) + np.linspace(-50, 50, 100)
    return Measurement(case, [Batch(case, samples, overhead=overhead)])


LEVELS = [
    measured("kernel", 2500, loop=1500),
    measured("c", 6400, loop=1500, outside=70),
    measured("python", 6900, loop=1500, outside=450, device=90),
]


def test_a_waterfall_adds_up_to_the_slowest_level() -> None:
    (fall,) = waterfalls(LEVELS)
    assert fall.parts == pytest.approx(
        {
            "guest loop": 1500,
            "guest to KVM": 1000,
            "KVM to user space and back": 6400 - 70 - 2500,
            "C loop": 70,
            "Python dispatch": 6900 - 6400 - 90,
            "device": 90,
        }
    )
    assert fall.total == pytest.approx(6900)
    bar = fall.bar()
    assert len(bar) == 40
    assert bar.startswith("g")
    assert bar.endswith("d")
    assert set(bar) <= set(PARTS.values())


def test_the_caption_of_a_waterfall_says_what_its_parts_are_not() -> None:
    for levels, has_kernel in ((LEVELS, True), (LEVELS[1:], False)):
        caption = waterfall_table(waterfalls(levels)).caption
        assert "without an interval" in caption
        assert ("a 64th of an exit to user space" in caption) is has_kernel


def test_without_a_twin_in_the_kernel_the_way_is_one_part() -> None:
    (fall,) = waterfalls(LEVELS[1:])
    assert fall.parts["guest to user space and back"] == pytest.approx(6400 - 70 - 1500)
    assert fall.total == pytest.approx(6900)
    assert waterfalls(LEVELS[:2]) == []


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_suffix_chooses_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    check_suffix(path)
    plot([*LEVELS, measured("c", 20_000, "ring3")], FACTS, path)
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    data = path.read_bytes()
    assert data.startswith(start)
    if suffix == "svg":  # whose text is text
        for word in (
            "pio-out",
            "kvm_pvm",
            "python, long",
            "c, ring3",
            "KVM to user space and back",
            "latency [ns], log scale",
            "beyond p99.9 not shown",
            "Linux 6.1.2, kvmpy 9.8, 2026-01-02",
        ):
            assert word in data.decode()


@pytest.mark.parametrize(("count", "pages"), [pytest.param(12, 1, marks=pytest.mark.slow), (13, 3)])
def test_a_pdf_of_many_operations_has_pages(count: int, pages: int, tmp_path: Path) -> None:
    """Those of the panels, and that of the waterfalls, which come from the three levels."""
    more = [Measurement(Case(f"x{at}"), LEVELS[1].batches) for at in range(count - 1)]
    plot([*LEVELS, *more], FACTS, path := tmp_path / "a.pdf")
    assert len(re.findall(rb"/Type /Page\b", path.read_bytes())) == pages


def test_a_curve_goes_up_by_the_samples_share_at_each_of_them() -> None:
    samples = np.array([500.0, 300.0, 300.0, 400.0])
    case = Case("pio-out", "c", "long")
    made = figure("title", [("pio-out", [Measurement(case, [Batch(case, samples)])])], ())
    ((line,),) = [axes.get_lines() for axes in made.axes]
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xdata().tolist() == [300, 300, 300, 400, 500]
    assert line.get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_levels_and_modes_look_the_same_in_all_panels_and_one_legend_is_beside_them() -> None:
    """Within a panel it would hide the curves of slow modes, which are on the right."""
    slow = measured("c", 56_000, "ring3")
    made = figure("title", [("all", [*LEVELS, slow]), ("one", [slow])], ())
    made.draw_without_rendering()
    first, second = made.axes
    (legend,) = made.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["kernel, long", "c, long", "python, long", "c, ring3"]
    assert first.get_legend() is second.get_legend() is None
    assert first.get_lines()[-1].get_color() == second.get_lines()[0].get_color()
    left = legend.get_window_extent().x0
    assert all(axes.get_window_extent().x1 <= left for axes in made.axes)
    assert not figure("title", [("x", [Measurement(Case("x"), slow.batches)])], ()).legends


@given(low=st.floats(20, 1e7), factor=st.floats(1.2, 1e5))
def test_ticks_are_few_round_and_apart(low: float, factor: float) -> None:
    high = low * factor
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low <= value <= high for value in found)
    room = np.diff(np.log10(found)) / np.log10(factor)
    assert (room >= 0.19).all()  # a label has a fifth of the axis
    assert all(len(f"{value:.12g}".strip("0").replace(".", "").rstrip("0")) <= 4 for value in found)


def test_ticks_of_a_decade_and_of_more() -> None:
    assert ticks(900, 11_000) == [1000, 2000, 5000, 10_000]
    assert ticks(90, 110_000) == [100, 1000, 10_000, 100_000]
    assert ticks(5500, 46_000) == [6000, 10_000, 20_000, 40_000]
    assert ticks(7000, 9000) == [7000, 7500, 8000, 8500, 9000]


def test_what_cannot_be_plotted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.svg"):
        check_suffix(tmp_path / "a.doc")
    with pytest.raises(ConfigError, match="nothing was measured"):
        plot([Measurement(Case("x"), (), "hangs here", "no end")], FACTS, tmp_path / "a.png")
    with pytest.raises(ConfigError, match="cannot write"):
        plot(LEVELS, FACTS, tmp_path / "none" / "a.png")


# Lists of calls -----------------------------------------------------------------------------


def test_calls_are_timed_in_order_and_one_that_fails_is_named() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        pairs = timed([write(fd, 2), write(fd, 3)], 10, 1)
        assert os.eventfd_read(fd) == 50
        assert (pairs[:, 1] >= pairs[:, 0]).all()
        assert (np.diff(pairs[:, 0].astype(np.int64)) > 0).all()
        with pytest.raises(HostError, match="write"):
            timed([write(fd, 1), write(CLOSED, 1)], 10)
        assert os.eventfd_read(fd) == 1  # it stopped there
    finally:
        os.close(fd)


@pytest.mark.usefixtures("kvm_host")
def test_a_round_that_fails_leaves_no_descriptor_open() -> None:
    with KVM() as kvm:
        before = len(os.listdir("/proc/self/fd"))
        wrong: Call = ioctl("CREATE_VCPU", argument=1 << 31, of=0)
        with pytest.raises(HostError, match="KVM_CREATE_VCPU"):
            timed([ioctl("CREATE_VM", kvm.fd), wrong, close(0)], 3)
        assert len(os.listdir("/proc/self/fd")) == before
        timed([ioctl("CREATE_VM", kvm.fd), close(0)], 3)
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_expected_error_that_does_not_come_is_one() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with pytest.raises(HostError, match="write"):
            timed([Call("write", write(fd, 1).kind, fd, argument=1, error=5)], 1)
    finally:
        os.close(fd)


def test_a_second_thread_needs_a_second_cpu() -> None:
    with (
        pytest.raises(Unmeasured, match="two CPUs"),
        raiser([], Conditions(1, helper_cpu=None), 0),
    ):
        pass


@pytest.mark.skipif(pinning()[1] is None, reason="there is one CPU, and a thread needs another")
def test_a_call_that_fails_on_the_other_thread_is_an_error_here() -> None:
    from kvmpy import Machine

    with Machine("1M") as machine:
        machine.load(b"\xeb\xfe")  # jmp to itself
        cpu = machine.cpus[0]
        loop = cpu.begin(10, raw=True)
        loop.heartbeat_ns = 5_000_000
        try:
            with (
                raiser([write(CLOSED, 1)], Conditions(1, helper_cpu=pinning()[1]), 0) as helper,
                pytest.raises(HostError, match="write"),
            ):
                helper.ask(loop)
        finally:
            from kvmpy.abi import lib

            lib.kvmpy_end(loop)


# The self-test ------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm_host")
def test_the_self_test_measures_a_delay_that_is_known() -> None:
    def measured_us() -> float:
        return float(selftest._delay().found.split()[0].replace(",", ""))

    # A busy machine makes it longer, and is no wrong clock: one of three may be without it.
    assert min(measured_us() for _ in range(3)) == pytest.approx(1000, rel=0.25)


def test_a_delay_that_the_clock_gets_wrong_is_not_good(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bench:
        def __init__(self, *_: object) -> None:
            self.machine = self
            self.cpu = self
            self.now = 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tsc_khz(self) -> int:
            return 1_000_000

        def run_to_its_end(self) -> None:
            pass

        def start(self, label: str, rounds: int, rsi: int) -> None:
            self.now = rsi

        def sample(self, entries: int, run: object) -> Any:
            return np.array([[0, self.now * 1.02 + 5000]])

    monkeypatch.setattr(selftest, "GuestBench", Bench)
    check = selftest._delay()
    assert not check.good
    assert "+2.00%" in check.found


@pytest.mark.usefixtures("kvm_host")
def test_the_self_tests_verdict_is_its_exit_status() -> None:
    command = [sys.executable, "-m", "kvmpy", "bench", "self-test"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    words = "can be trusted now." if done.returncode == 0 else "Not now: "
    assert done.returncode in (0, 1)
    assert words in done.stdout
    assert ("NOT GOOD" in done.stdout) == bool(done.returncode)
    assert "a guest's wait" in done.stdout


def test_the_document_for_measurers_has_every_operation() -> None:
    from kvmpy.bench.catalogue import OPERATIONS

    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in OPERATIONS if f"`{name}`" not in text] == []
