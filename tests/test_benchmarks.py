"""The benchmarks run and say what they are to say; what they measure is not tested."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOUNDS = {
    "port served in C": 1.02,
    "the same, sampled": 1.03,
    "port served by Python": 500,
    "same, KVM_RUN a no-op": 200,
    "life of KVM, VM and VCPU": 1.10,
    "import kvmpy": 30,
    "kvmpy run hello_long": 250,
    "ioctls of get_regs after an exit": 0,
    "two threads, served in C": 1.15,
    "two threads, served by Python": 1.15,
}

spec = importlib.util.spec_from_file_location("benchmark_stats", ROOT / "benchmarks" / "stats.py")
assert spec is not None and spec.loader is not None
stats = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = stats  # dataclasses look for the module of a class
spec.loader.exec_module(stats)


def run(*arguments: str, module: str = "core") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.usefixtures("kvm_host")
def test_the_recorder_has_a_row_for_counting_and_one_for_records(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--rounds", "2", "--json", str(file), module="recorder")
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["bound"] for row in rows] == 2 * [1.01, 1.04]
    assert all(row["figure"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.usefixtures("kvm_host")
def test_a_quick_run_has_every_row_with_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--rounds", "2", "--json", str(file))
    if "cannot build the C floor" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["host"]["backend"] in done.stdout
    rows = {row["name"]: row for row in result["rows"]}
    assert {name: row["bound"] for name, row in rows.items() if row["bound"] is not None} == BOUNDS
    for name, row in rows.items():
        if row["figure"] is None:
            assert row["verdict"] == "not measured" and row["note"]
            continue
        assert row["rounds"] == 2
        assert row["figure"]["least"] <= row["figure"]["median"] <= row["figure"]["greatest"]
        assert name in done.stdout
    if not rows["ioctls of get_regs after an exit"]["note"].startswith("this host lacks"):
        assert rows["ioctls of get_regs after an exit"]["verdict"] == "met"


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.usefixtures("kvm_host")
def test_snapshots_are_measured_beside_c(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--rounds", "2", "--json", str(file), module="snapshots")
    if "cannot build the C floor" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    bounds = [row["bound"] for row in rows if row["bound"] is not None]
    assert bounds == [1.25] * 3 + [1.15] * 2 + [100] * 2 + [400, 1 / 1.7]
    assert all(row["figure"]["median"] > 0 for row in rows)
    (memory,) = (row for row in rows if row["bound"] == 400)
    assert memory["verdict"] == "met"


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


def test_subjects_take_turns_and_a_round_is_a_median() -> None:
    order: list[str] = []

    def subject(name: str, values: Iterator[float]) -> object:
        def turn() -> float:
            order.append(name)
            return next(values)

        return lambda: nullcontext(turn)

    samples = stats.interleave(
        2,
        3,
        {
            "a": subject("a", iter((1.0, 100.0, 2.0, 7.0, 8.0, 9.0))),
            "b": subject("b", iter((4.0, 4.0, 4.0, 5.0, 5.0, 500.0))),
        },
    )
    assert samples == {"a": [2.0, 8.0], "b": [4.0, 5.0]}
    assert order == list("abbaabbaabba")


def test_figures_are_made_pair_by_pair() -> None:
    row = stats.compare("x", "ratio", "ns", 1.5, [2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert row.figure == stats.Spread(2.0, 1.0, 3.0)
    assert row.subject == stats.Spread(4.0, 2.0, 9.0)
    assert row.verdict == "not met"
    row = stats.compare("x", "difference", "ns", 1, [2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (row.figure.median, row.verdict) == (1.0, "met")
    assert stats.compare("x", "value", "ms", None, [3.0]).verdict == "-"
    assert stats.Row("x", "value", "ms", None, 3).verdict == "not measured"
