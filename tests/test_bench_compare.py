"""`kvmpy bench compare`: a rank test of batches, what it finds and what it does not."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmpy import ConfigError
from kvmpy.bench.compare import LEVEL, _interval, compare, reference_change, refuse_unlike
from kvmpy.bench.model import Case
from kvmpy.bench.ranks import batches_needed, effective_size, holm, rank_test
from kvmpy.bench.results import NAME, VERSION, load
from kvmpy.bench.told import changes, gone

ROOT = Path(__file__).parent.parent
OPERATIONS = 30
BATCHES = 20
COUNT = 400


def measurement(name: str, medians: Any, random: np.random.Generator) -> dict[str, Any]:
    """As a run gives it: batches that differ, and blocks of each that differ less."""
    return {
        "operation": name,
        "level": "c",
        "mode": "long",
        "batches": [
            {
                "count": COUNT,
                "median": float(median),
                "blocks": (median * (1 + random.normal(0, 0.003, 20))).tolist(),
                "reference": [6200.0, 6210.0],
                "disturbed": False,
            }
            for median in medians
        ],
    }


def result(batches: int = BATCHES, seed: int = 5) -> dict[str, Any]:
    """A run of 30 operations whose batches differ by 1% and, one in ten, by 30%."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(OPERATIONS):
        slow = np.where(random.random(batches) < 0.1, 1.3, 1.0)
        medians = 1000 * (number + 1) * random.normal(1, 0.01, batches) * slow
        rows.append(measurement(f"operation-{number}", medians, random))
    return {
        "schema": NAME,
        "version": VERSION,
        "environment": {"backend": "kvm_pvm", "nested": True},
        "measurements": rows,
    }


def split(document: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batches of each measurement, dealt to two results at random."""
    random = np.random.default_rng(seed)
    first, second = copy.deepcopy(document), copy.deepcopy(document)
    for one, other in zip(first["measurements"], second["measurements"], strict=True):
        order = random.permutation(len(one["batches"]))
        half, batches = len(order) // 2, one["batches"]
        one["batches"] = [batches[at] for at in order[:half]]
        other["batches"] = [batches[at] for at in order[half:]]
    return first, second


def slow_down(document: dict[str, Any], number: int, factor: float) -> None:
    for batch in document["measurements"][number]["batches"]:
        batch["median"] *= factor
        batch["blocks"] = [value * factor for value in batch["blocks"]]


@pytest.mark.slow
def test_random_halves_of_a_run_do_not_differ_and_an_injected_slowdown_is_found() -> None:
    document = result()
    steady = [  # where no batch was slow: there 5% is more than all that chance does
        number
        for number, one in enumerate(document["measurements"])
        if np.ptp([batch["median"] for batch in one["batches"]]) < 100 * (number + 1)
    ]
    wrong = found = 0
    for seed in range(100):
        first, second = split(document, seed)
        at = steady[seed % len(steady)]
        slow_down(second, at, 1.05)
        verdicts = [one.verdict for one in compare(first, second)]
        found += verdicts.pop(at) == "slower"
        wrong += any(verdict != "no difference seen" for verdict in verdicts)
    assert wrong <= 5
    assert found >= 95


def test_faster_and_slower_are_told_apart_with_the_ratio_and_its_interval() -> None:
    before, after = result(seed=1), result(seed=2)
    slow_down(after, 3, 2.0)
    slow_down(after, 4, 0.5)
    rows = compare(before, after)
    assert {row.case.operation for row in rows if row.verdict == "slower"} == {"operation-3"}
    assert {row.case.operation for row in rows if row.verdict == "faster"} == {"operation-4"}
    assert rows[3].ratio == pytest.approx(2.0, rel=0.05)
    assert rows[3].interval[0] <= rows[3].ratio <= rows[3].interval[1]
    assert rows[3].interval[1] - rows[3].interval[0] < 0.2
    assert rows[3].samples == (BATCHES * COUNT, BATCHES * COUNT)
    assert BATCHES <= rows[3].effective[0] < BATCHES * COUNT


@pytest.mark.parametrize("count", [3, 5, 12])
def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says(count: int) -> None:
    random, covered = np.random.default_rng(5), 0
    for _ in range(100):
        low, high = _interval(*(random.normal(8000, 80, count) for _ in range(2)))
        covered += low <= 1 <= high
    assert covered >= 92


def test_too_few_batches_are_said_to_be_too_few() -> None:
    before, after = split(result(batches=6), 1)
    slow_down(after, 0, 10.0)
    row = compare(before, after)[0]
    assert row.verdict == f"too few batches: {batches_needed(OPERATIONS, LEVEL)} of each could tell"


def test_the_rank_test_is_the_exact_permutation_test() -> None:
    low = [np.array([value]) for value in (1.0, 2.0, 3.0)]
    high = [np.array([value]) for value in (4.0, 5.0, 6.0)]
    assert rank_test(low, high) == rank_test(high, low) == pytest.approx(2 / 20)
    assert rank_test(low, low) == 1
    mixed = [np.array([value]) for value in (0.5, 2.5, 3.5)]
    assert rank_test(low, mixed) > 0.5
    # As many as are drawn at random, where there are too many to look at all of them.
    many = [np.array([float(at)]) for at in range(60)]
    assert rank_test(many[:30], many[30:]) < 1e-4
    assert rank_test(many[::2], many[1::2]) > 0.5


def test_neighbours_that_resemble_each_other_make_no_difference_certain() -> None:
    """What a rank test of single samples would get wrong nearly always."""
    random = np.random.default_rng(4)
    wrong = 0
    for _ in range(200):
        sides = [[8000 + random.normal(0, 300) + random.normal(0, 5, 20) for _ in range(8)]] * 1
        other = [8000 + random.normal(0, 300) + random.normal(0, 5, 20) for _ in range(8)]
        wrong += rank_test(sides[0], other) <= 0.05
    assert wrong <= 20  # 10 are expected


def test_holm_corrects_in_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_batches_needed_is_the_least_with_which_a_difference_can_be_found() -> None:
    needed = batches_needed(60, 0.01)
    low, high = ([np.array([float(at)]) for at in range(n, n + needed)] for n in (0, needed))
    assert rank_test(low, high) * 60 <= 0.01
    assert rank_test(low[1:], high[1:]) * 60 > 0.01


def test_the_effective_size_is_between_the_batches_and_the_samples() -> None:
    random = np.random.default_rng(2)
    alike = [random.normal(0, 1, 20) for _ in range(200)]
    apart = [random.normal(0, 100) + random.normal(0, 1, 20) for _ in range(200)]
    assert effective_size(alike, 4000) > 3000
    assert effective_size(apart, 4000) == 200
    assert effective_size(alike[:1], 4000) == 1


def test_a_machine_that_was_slower_itself_shows() -> None:
    before, after = result(seed=1), result(seed=1)
    assert reference_change(before, after) == 1
    for one in after["measurements"]:
        for batch in one["batches"]:
            batch["reference"] = [1.4 * value for value in batch["reference"]]
    assert reference_change(before, after) == pytest.approx(1.4)


def test_unlike_backends_and_disjoint_results_are_refused() -> None:
    before, after = result(), result()
    refuse_unlike(before, after)
    after["environment"]["backend"] = "kvm_intel"
    with pytest.raises(ConfigError, match=r"kvm_pvm and kvm_intel.*--across-backends"):
        refuse_unlike(before, after)
    after["environment"] = {"backend": "kvm_pvm", "nested": False}
    with pytest.raises(ConfigError, match="nesting"):
        refuse_unlike(before, after)
    for one in after["measurements"]:
        one["operation"] += "-else"
    with pytest.raises(ConfigError, match="no measured case in common"):
        compare(before, after)


# The command --------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "bench", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    before, after = result(seed=1), result(seed=2)
    slow_down(after, 3, 1.2)
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, document in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(document))
    return paths


def test_the_command_says_what_is_slower_and_can_fail_for_it(files: tuple[Path, Path]) -> None:
    done = run(*files)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if "slower" in line)
    assert "operation-3 " in line
    assert done.stdout.count("no difference seen") == OPERATIONS - 1
    assert run(*files, "--fail-if-slower", 30).returncode == 0
    failed = run(*files, "--fail-if-slower", 5, "--json", files[0].parent / "c.json")
    assert failed.returncode == 1
    assert "operation-3/c/long is slower by" in failed.stderr
    written = json.loads((files[0].parent / "c.json").read_text())
    assert (written["schema"], written["version"]) == ("kvmpy-bench-comparison", 1)
    assert [one["backend"] for one in written["environments"]] == ["kvm_pvm"] * 2
    assert [row["verdict"] for row in written["comparisons"]].count("slower") == 1


@pytest.mark.slow
def test_the_command_does_not_pass_what_it_could_not_tell(files: tuple[Path, Path]) -> None:
    before, after = load(files[0]), load(files[1])
    after["measurements"][3]["batches"] = []  # the slower one is "not available here" now
    del after["measurements"][5]
    after["measurements"][7]["batches"] = after["measurements"][7]["batches"][:4]
    after["complete"] = False
    files[1].write_text(json.dumps(after))
    line = "of 1 cases there are too few batches to tell; 2 are measured in the first result only"
    for arguments, status in ((), 0), (("--fail-if-slower", 5), 3):
        done = run(*files, *arguments)
        assert done.returncode == status
        assert line in done.stderr
        assert "operation-3/c/long, operation-5/c/long" in done.stderr
        assert f"{files[1]} is the result of an interrupted run" in done.stderr
    assert gone(before, after) == [Case(f"operation-{n}", "c", "long") for n in (3, 5)]
    slow_down(after, 0, 2.0)
    files[1].write_text(json.dumps(after))
    assert run(*files, "--fail-if-slower", 5).returncode == 1


def test_what_the_environments_differ_in_is_said_and_the_raw_ratio(
    files: tuple[Path, Path],
) -> None:
    before, after = load(files[0]), load(files[1])
    before["environment"] |= {"kernel": "6.1", "date": "then", "mitigations": {"mds": "[on]"}}
    after["environment"] |= {"kernel": "6.2", "date": "now", "mitigations": {"mds": "off"}}
    assert changes(before, after) == {"kernel": ("6.1", "6.2"), "mitigations mds": ("[on]", "off")}
    for one in after["measurements"]:
        for batch in one["batches"]:  # a machine slower by a half, and the reference with it
            batch["median"] *= 1.5
            batch["blocks"] = [1.5 * value for value in batch["blocks"]]
            batch["reference"] = [1.5 * value for value in batch["reference"]]
    row = compare(before, after)[0]
    assert row.raw_ratio == pytest.approx(1.5, rel=0.05)
    assert row.ratio == pytest.approx(1, rel=0.05)
    for path, document in zip(files, (before, after), strict=True):
        path.write_text(json.dumps(document))
    done = run(*files)
    assert "kernel: 6.1 -> 6.2" in done.stdout
    assert "mitigations mds: [on] -> off" in done.stdout


def test_names_are_shown_as_they_stand(files: tuple[Path, Path]) -> None:
    for path in files:
        path.write_text(path.read_text().replace("operation-3", "[/red] :smile:"))
    assert "[/red] :smile:" in run(*files).stdout


def test_a_reader_that_goes_away_does_not_look_like_something_slower(
    files: tuple[Path, Path],
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    written = files[0].parent / "c.json"
    command = [sys.executable, "-m", "kvmpy", "bench", "compare", *map(str, files)]
    command += ["--json", str(written)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (125, "kvmpy: standard output was closed early\n")
    assert len(json.loads(written.read_text())["comparisons"]) == OPERATIONS


def test_a_limit_that_is_no_number_is_refused(files: tuple[Path, Path]) -> None:
    done = run(*files, "--fail-if-slower", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nan" in done.stderr


def test_across_backends_every_line_says_so(files: tuple[Path, Path]) -> None:
    document = load(files[1])
    document["environment"]["backend"] = "kvm_intel"
    files[1].write_text(json.dumps(document))
    refused = run(*files)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    done = run(*files, "--across-backends")
    rows = [line for line in done.stdout.splitlines() if "operation-" in line]
    assert len(rows) == OPERATIONS
    assert all("(kvm_pvm against kvm_intel)" in row for row in rows)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "version 7"),
        (lambda text: text.replace('"blocks"', '"pieces"', 1), "measurement 0"),
        (lambda text: text.replace("[6200.0", '["much"', 1), "measurement 0"),
        (lambda text: text.replace('"nested"', '"nest"'), "no backend"),
        (lambda text: text.replace('{"backend": "kvm_pvm", "nested": true}', "5"), "environment"),
        (lambda _: "", "not JSON"),
    ],
)
def test_a_spoilt_result_is_one_line(files: tuple[Path, Path], spoil: Any, named: str) -> None:
    files[1].write_text(spoil(files[1].read_text()))
    done = run(*files)
    assert done.returncode == 2
    assert named in done.stderr
    assert str(files[1]) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_where_the_comparison_cannot_be_written_nothing_is_compared(
    files: tuple[Path, Path],
) -> None:
    done = run(*files, "--json", "/nonexistent/c.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "/nonexistent/c.json" in done.stderr


def test_a_missing_result_or_argument_is_one_line(tmp_path: Path) -> None:
    for arguments in ((tmp_path / "no.json", tmp_path / "no.json"), (tmp_path / "no.json",)):
        done = run(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
