"""`kvmpy bench`: sampling, batches in fresh processes, documents, the command."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from kvmpy import ConfigError, Interrupted, KvmpyError, Machine, assemble
from kvmpy import bench as kvmpy_bench
from kvmpy.abi import ffi, lib
from kvmpy.bench import (
    Batch,
    Case,
    Conditions,
    Measurement,
    cases,
    environment,
    kernel,
    measure,
    stats,
)
from kvmpy.bench.catalogue import OPERATIONS, left_out
from kvmpy.bench.exits import STRING
from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import FAILED, Unmeasured
from kvmpy.bench.report import table
from kvmpy.bench.results import SCHEMA, check_writable, document, load, save, to_csv
from kvmpy.bench.runner import GROUP, groups, measure_cases, pinning
from kvmpy.bench.takes import BLOCK, BLOCK_SHARE
from kvmpy.bench.worker import pack, unpack
from kvmpy.cli.bench import bench
from kvmpy.devices import Sink

ROOT = Path(__file__).parent.parent
SPIN = b"\xeb\xfe"
PAGES = 512
STAMPED = ("pio-", "mmio-", "ioeventfd-", "coalesced-", "ipi-", "init-sipi")
KERNEL = [row.name for row in kernel.ROWS]
OUTS = b"\xe6\x10\xeb\xfc"  # again: out 0x10, al; jmp again
FEW = Conditions(count=50, warmup=5, deadline=10, helper_cpu=pinning()[1])
CASES = [
    Case(row.name, level, mode)
    for row in OPERATIONS.values()
    for level in row.levels
    for mode in row.modes
]


def fake(medians: tuple[float, ...] = (8000.0, 8100.0), count: int = 400) -> Measurement:
    random = np.random.default_rng(3)
    made = [
        Batch(
            Case("pio-out", "c", "long"),
            random.normal(median, 100, count),
            overhead={"clock": 50.0, "loop": 600.0},
            proof={"claimed": count},
            interference={"steal_ticks": 0, "page_faults": 2},
        )
        for median in medians
    ]
    return Measurement(made[0].case, made, tsc_hz=2.5e9)


# The sampler --------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm_host")
def test_the_sampler_keeps_each_exit_and_counts_what_finds_no_room() -> None:
    with Machine("1M") as machine:
        machine.attach_port(0x10, 1, Sink())
        machine.load(OUTS)
        loop = machine.cpus[0].loop
        pairs = np.zeros((100, 2), np.uint64)
        with ffi.from_buffer("uint64_t[]", pairs, require_writable=True) as room:
            loop.samples, loop.sample_room = room, 60
            loop.watch = lib.KVMPY_SAMPLE
            before = time.monotonic_ns()
            machine.run(max_exits=90, timeout=10)
            after = time.monotonic_ns()
            loop.watch = 0
            loop.samples = ffi.NULL
            machine.run(max_exits=10, timeout=10)  # not sampled any more
        assert (loop.sample_count, loop.sample_dropped) == (60, 30)
    taken = pairs[:60].reshape(-1)
    assert before <= taken[0]
    assert taken[-1] <= after
    assert np.all(np.diff(taken.astype(np.int64)) >= 0)
    assert not pairs[60:].any()


@pytest.mark.usefixtures("kvm_host")
def test_an_entry_that_a_signal_ends_is_no_sample() -> None:
    with Machine("1M") as machine:
        machine.load(SPIN)
        loop = machine.cpus[0].loop
        loop.heartbeat_ns = 5_000_000
        pairs = np.zeros((10, 2), np.uint64)
        with ffi.from_buffer("uint64_t[]", pairs, require_writable=True) as room:
            loop.samples, loop.sample_room = room, 10
            loop.watch = lib.KVMPY_SAMPLE
            assert machine.run(timeout=0.05).outcome == "timeout"
            loop.watch = 0
            loop.samples = ffi.NULL
        assert (loop.sample_count, loop.sample_dropped) == (0, 0)
        assert loop.entries > 2


def test_the_cost_of_the_clock_grows_with_its_readings() -> None:
    assert lib.kvmpy_clock_cost(0) < lib.kvmpy_clock_cost(100_000)


# Operations ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_case_gives_as_many_samples_as_asked_or_a_reason(case: Case) -> None:
    try:
        batch = OPERATIONS[case.operation].measure(case, FEW)
    except Unmeasured as error:
        assert error.status in ("not available here", "does not exit here", "hangs here")
        assert error.reason
        return
    each = batch.proof["per_sample"]
    wanted = {BLOCK: -(-FEW.count // BLOCK_SHARE), PAGES: 2}.get(each, FEW.count)
    assert len(batch.samples) == wanted
    assert batch.proof["claimed"] == batch.proof["counted"] >= len(batch.samples) * each
    assert (batch.samples > 0).all()
    assert (batch.host[:, 1] >= batch.host[:, 0]).all()
    group, name = OPERATIONS[case.operation].group, case.operation
    by_guest_alone = name.startswith(("ipi-", "init-sipi"))
    no_round = group in ("host", "inward") or name in ("single-step", "emulation-failure")
    assert (batch.overhead.get("clock", 0) > 0) is not by_guest_alone
    assert (batch.overhead.get("loop", 0) > 0) is not no_round
    if len(batch.guest):  # what the guest sees of an operation is more than of none
        assert np.median(np.diff(batch.guest, axis=1)) > 0
        assert batch.overhead.get("tsc", 0) > 0 or case.operation.startswith(("ipi-", "init-"))
    by_guest = case.operation.startswith(STAMPED) or case.operation in KERNEL
    assert bool(len(batch.guest)) == by_guest


@pytest.mark.usefixtures("kvm_host")
def test_a_string_instruction_is_measured_whole_and_given_for_each_byte() -> None:
    few = Conditions(count=20, warmup=4, deadline=10)
    batch = OPERATIONS["string-out"].measure(Case("string-out", "c", "long"), few)
    each = batch.proof["per_sample"]
    assert batch.proof["elements"] == STRING
    assert batch.proof["claimed"] == (few.count + few.warmup) * each
    whole = batch.host[each::each, 0] - batch.host[:-each:each, 0]
    assert np.allclose(batch.samples * STRING, whole)
    assert batch.overhead["loop"] < np.median(batch.samples)  # a byte's share of it


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("operation", ["ioeventfd-pio", "coalesced-mmio"])
def test_a_way_around_an_exit_that_loses_a_write_is_an_error(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpy.bench.around.BLOCK", BLOCK + 1)  # one more than there are
    with pytest.raises(KvmpyError, match=f"{BLOCK} of {BLOCK + 1}|{BLOCK}"):
        OPERATIONS[operation].measure(Case(operation, "kernel", "long"), FEW)


@pytest.mark.usefixtures("kvm_host")
def test_every_exit_of_a_device_in_python_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("kvmpy.bench.exits.answer", lambda offset, size, value: seen.append(size))
    OPERATIONS["pio-out-2"].measure(Case("pio-out-2", "python", "long"), FEW)
    guests_own = FEW.count  # the loop in which the guest takes the time
    assert seen.count(2) == FEW.count + FEW.warmup + guests_own


def test_cases_are_chosen_by_name_level_and_mode() -> None:
    assert cases(["pio-out"], ["c"], ["long"]) == [Case("pio-out", "c", "long")]
    assert cases() == CASES
    for wrong, named in (
        ((["pio-oot"],), "pio-out"),
        (((), ["d"]), "kernel"),
        (((), (), ["virtual8086"]), "ring3"),
        ((["halt"], ["python"]), "level"),
    ):
        with pytest.raises(ConfigError, match=named):
            cases(*wrong)


# Processes ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm_host")
def test_measure_takes_batches_in_processes_of_their_own() -> None:
    one = measure("pio-out", level="c", samples=300, batches=3)
    assert [len(batch.samples) for batch in one.batches] == [100, 100, 100]
    assert len({int(batch.host[0, 0]) for batch in one.batches}) == 3
    assert one.quantile(0) <= one.median <= one.quantile(0.99) <= one.samples.max()
    low, high = one.interval()
    assert low <= high
    assert {"involuntary_switches", "page_faults", "steal_ticks"} <= set(one.interference())
    absent = measure("halt", level="c", mode="ring3", samples=10, batches=1)
    assert absent.status == "not available here"
    assert "ring 0" in str(absent)


def test_measure_takes_the_level_and_mode_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []
    monkeypatch.setattr(
        "kvmpy.bench.measure_cases", lambda plan, *_, **__: asked.extend(plan) or [None]
    )
    measure("pio-out")
    measure("pio-out", "python", "real")
    measure("cpuid")
    assert asked == [
        Case("pio-out", "c", "long"),
        Case("pio-out", "python", "real"),
        Case("cpuid", "kernel", "long"),
    ]
    with pytest.raises(ConfigError, match="level and mode"):
        measure("cpuid", level="c")


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 samples"):
        measure_cases([CASES[0]], 0, 1)
    with pytest.raises(ConfigError, match="1,000,001 samples: a batch has at most 1,000,000"):
        measure_cases([CASES[0]], 1_000_001, 1)
    with pytest.raises(ConfigError, match="no operation None"):
        measure(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 samples in 5 batches"):
        measure("pio-out", samples=3)
    for wrong, named in (({"batches": 0}, "0 batches"), ({"samples": "a"}, "'a' samples")):
        with pytest.raises(ConfigError, match=named):
            measure("pio-out", **wrong)  # type: ignore[arg-type]


def test_what_has_no_samples_says_why_it_has_no_median() -> None:
    absent = Measurement(Case("halt", "c", "ring3"), (), "not available here", "HLT is for ring 0")
    for ask in (lambda: absent.median, absent.interval, lambda: absent.quantile(0.9)):
        with pytest.raises(ConfigError, match=r"halt/c/ring3: not available here: HLT is for"):
            ask()
    assert absent.flags == []


@pytest.mark.parametrize("wrong", [95, 1, 0, -0.5, float("nan"), "0.95", None])
def test_an_interval_of_what_is_no_share_is_refused(wrong: Any) -> None:
    """Of less than nothing it would have its ends the wrong way round, and of 95 an error
    of numpy's."""
    with pytest.raises(ConfigError, match=r"0\.95 for 95%"):
        fake().interval(wrong)


@pytest.mark.parametrize("wrong", [99, -0.1, float("nan"), "0.5", None])
def test_a_quantile_of_what_is_no_share_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"0\.99 for p99"):
        fake().quantile(wrong)


def test_the_environment_tells_processors_of_one_name_apart() -> None:
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    cpu = {name.strip(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
    assert environment()["cpu_signature"] == {
        "family": cpu.get("cpu family"),
        "model": cpu.get("model"),
        "stepping": cpu.get("stepping"),
    }


def test_the_environment_says_which_cpus_are_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/README.md advises both: whether a result was taken so must be in it."""
    monkeypatch.setitem(environment.__globals__, "_read", os.path.basename)
    facts = environment()
    assert (facts["isolated_cpus"], facts["nohz_full_cpus"]) == ("isolated", "nohz_full")


def test_named_operations_that_a_plan_leaves_out_are_named() -> None:
    names = ["vm-create", "pio-out"]
    assert left_out(names, cases(names, ["c"])) == ["vm-create (levels -; modes -)"]
    assert left_out(names, cases(names)) == []


def test_what_cannot_be_written_is_found_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("earlier")
    check_writable(tmp_path / "a.json")
    check_writable(tmp_path / "b.json")
    check_writable(Path("/dev/null"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    for wrong in (tmp_path, tmp_path / "none" / "a", Path("/proc/x.csv"), tmp_path / ("a" * 300)):
        with pytest.raises(ConfigError, match="cannot write"):
            check_writable(wrong)


def test_batches_are_taken_in_random_order_and_ctrl_c_keeps_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[list[Case]] = []

    def process(group: list[Case], samples: int) -> list[tuple[Case, Batch]]:
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(group)
        return [(case, Batch(case, np.arange(1.0, samples + 1))) for case in group]

    monkeypatch.setattr("kvmpy.bench.runner._measured", process)
    measured = measure_cases(CASES[:60], 10, 3, seed=1)
    assert sum(len(one.batches) for one in measured) == sum(map(len, taken)) < 180
    part = next(one for one in measured if len(one.batches) < 3)
    assert f"interrupted: {len(part.batches)} of 3 batches" in part.flags
    assert document([part], {}, [])["complete"] is False
    whole = Measurement(part.case, part.batches)
    assert document([whole], {}, [])["complete"] is True
    cut = document([whole], {}, [], missing=[CASES[1]])
    assert (cut["complete"], cut["missing"]) == (False, [str(CASES[1])])


def test_disturbed_batches_are_taken_again_and_what_stays_so_is_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restless, quiet = CASES[0], CASES[1]
    taken: list[Case] = []

    def process(group: list[Case], samples: int) -> list[tuple[Case, Batch]]:
        batches = []
        for case in group:
            taken.append(case)
            slow = case == restless and taken.count(case) in (2, 3, 5)  # the third is the retake
            reading = 130.0 if slow else 100.0
            made = Batch(case, np.full(samples, reading), reference=(100.0, reading))
            batches.append((case, made))
        return batches

    monkeypatch.setattr("kvmpy.bench.runner._measured", process)
    first, second = measure_cases([restless, quiet], 10, 3)
    assert taken.count(quiet) == 3
    assert taken.count(restless) == 3 + 2 + 1  # the second and third; then one more
    assert (first.disturbed, second.disturbed, len(first.batches)) == (0, 0, 3)
    taken.clear()
    (late,) = measure_cases([restless], 10, 3, seconds=0)
    assert (late.disturbed, len(late.batches)) == (2, 3)
    assert "2 of 3 batches disturbed" in late.flags
    assert len(late.batches) == 3


def test_disturbed_batches_are_set_aside_where_enough_are_quiet() -> None:
    case = CASES[0]
    made = [Batch(case, np.full(10, 100.0)) for _ in range(3)]
    made += [Batch(case, np.full(10, 150.0), disturbed=True) for _ in range(4)]
    one = Measurement(case, made)
    assert (one.median, len(one.batches), len(one.all_batches)) == (100, 3, 7)
    assert "4 of 7 batches disturbed, and set aside" in one.flags
    assert Measurement(case, made[1:]).median == 150  # two quiet ones are too few to go by


def test_no_process_takes_two_batches_of_a_case_and_all_are_taken() -> None:
    made = groups(CASES[:20], 5, seed=2)
    assert all(len(group) == len(set(group)) <= GROUP for group in made)
    assert sorted(case for group in made for case in group) == sorted(CASES[:20] * 5)
    assert made != groups(CASES[:20], 5, seed=3)


def run_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have measuring start another program instead of the worker."""
    real = subprocess.run
    monkeypatch.setattr(
        "kvmpy.bench.runner.subprocess.run",
        lambda command, **options: real([sys.executable, "-c", code, command[-1]], **options),
    )


def test_a_case_that_ends_its_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(monkeypatch, "import sys; sys.exit('out of luck')")
    found = measure_cases(CASES[:2], 10, 2)
    assert [(one.case, one.status) for one in found] == [(one, FAILED) for one in CASES[:2]]
    assert all(one.reason.endswith("ended with status 1: out of luck") for one in found)


@pytest.mark.usefixtures("kvm_host")
def test_a_case_that_fails_costs_no_other_and_its_name_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_in(
        monkeypatch,
        """if True:
        import sys
        from kvmpy.bench import worker
        def run_job(job, reference):
            if job["level"] == "python":
                raise worker.KvmpyError("59 exits were counted, not 60")
            return worker.Batch(worker.Case("x"), worker.np.ones(3), reference=(1.0, 1.0))
        worker.run_job = run_job
        sys.exit(worker.main(sys.argv[1:]))
        """,
    )
    path = tmp_path / "a.json"
    arguments = ["pio-out-2", "--mode", "long", "--batches", "2", "--json", str(path)]
    done = CliRunner().invoke(bench, arguments, standalone_mode=False)
    assert done.return_value == 125
    assert "failed: pio-out-2/python/long; the table says why" in done.stderr
    assert "59 exits were counted, not 60" in done.stdout
    found = json.loads(path.read_text())
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    assert {one["level"]: one["status"] for one in found["measurements"]} == {
        "c": "measured",
        "python": FAILED,
    }


@pytest.mark.slow
def test_a_case_that_hangs_its_process_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.bench.runner.DEADLINE", 0.0)
    monkeypatch.setattr("kvmpy.bench.runner._STARTING", 4.0)
    run_in(
        monkeypatch,
        """if True:
        import json, sys, time
        from kvmpy.bench import worker
        jobs = json.loads(sys.argv[1])
        def run_job(job, reference):
            if job["level"] == "python":
                time.sleep(100)
            return worker.Batch(worker.Case("x"), worker.np.ones(3))
        worker.run_job = run_job
        sys.exit(worker.main(sys.argv[1:]))
        """,
    )
    plan = [Case("pio-out", level, "long") for level in ("c", "python", "kernel")]
    found = {one.case.level: one.status for one in measure_cases(plan, 3, 1)}
    assert found == {"c": "measured", "python": "hangs here", "kernel": "measured"}


def test_a_batch_survives_the_way_between_processes() -> None:
    (before, _) = fake().batches
    before.host = np.arange(10, dtype=np.uint64).reshape(5, 2)
    before.guest = np.arange(6, dtype=np.uint64).reshape(3, 2)
    before.reference = (1.0, 2.0)
    after = unpack(before.case, pack(before))
    assert np.array_equal(after.samples, before.samples)
    assert np.array_equal(after.host, before.host)
    assert np.array_equal(after.guest, before.guest)
    assert (after.overhead, after.proof) == (before.overhead, before.proof)
    assert after.reference == before.reference


# Statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [2, 3, 5, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 20))]
)
def test_the_interval_covers_the_median_as_often_as_it_says(count: int) -> None:
    random = np.random.default_rng(11)
    covered, runs = 0, 80
    for _ in range(runs):
        batches = [
            Batch(Case("x"), 8000 + random.normal(0, 40) + random.normal(0, 300, 200))
            for _ in range(count)
        ]
        low, high = Measurement(Case("x"), batches).interval()
        covered += low <= 8000 <= high
    assert covered >= 73  # 95% of 80 is 76, give or take two


def test_students_quantiles_are_those_of_the_tables() -> None:
    found = [stats._student(freedom, 0.975) for freedom in (1, 2, 4, 9)]
    assert found == pytest.approx([12.706, 4.303, 2.776, 2.262], abs=0.001)


def test_the_interval_of_one_batch_is_flagged_and_that_of_few_holds_the_median() -> None:
    assert "one batch: the interval is within it only" in fake((8000,)).flags
    assert not any("one batch" in flag for flag in fake().flags)
    low, high = fake((8000, 8100, 9900)).interval()
    assert low < fake((8000, 8100, 9900)).median < high
    ends = fake((8000, 8100, 9900, 20_000))
    assert ends.interval()[0] >= ends.samples.min()
    assert fake((8000, 80_000)).interval()[0] == 0
    narrow = stats.bootstrap_median([one.samples for one in fake((8000, 8100, 9900)).batches])
    assert high - low > narrow[1] - narrow[0]


def test_disagreeing_runs_and_few_samples_are_flagged() -> None:
    assert fake((8000, 8100), 600).flags == []
    assert fake((8000, 9500), 600).flags == [
        f"runs disagree by {fake((8000, 9500), 600).spread:.0%}"
    ]
    assert "few samples" in fake(count=10).flags


def test_percentiles_of_means_and_of_few_samples_are_marked() -> None:
    of_means = Measurement(
        Case("x"), [Batch(Case("x"), np.arange(1.0, 501), proof={"per_sample": 64})] * 2
    )
    assert of_means.summary()["per_sample"] == 64
    assert "percentiles of means of 64" in of_means.flags
    by_byte = Batch(Case("x"), np.ones(10), proof={"per_sample": 3, "elements": STRING})
    assert Measurement(Case("x"), [by_byte]).per_sample == STRING
    assert (of_means.beyond(0.99), of_means.beyond(0.999)) == (10, 1)
    assert "p99" in str(of_means)
    assert "p99" not in str(fake(count=100))
    facts = environment() | {"date": "today"}
    out = io.StringIO()
    Console(file=out, width=300).print(table([of_means], facts))
    row = next(line for line in out.getvalue().splitlines() if "of means of 64" in line)
    assert f"{of_means.quantile(0.99):,.0f} " in row
    assert f"{of_means.quantile(0.999):,.0f}?" in row


def test_the_summary_is_right() -> None:
    samples = np.arange(1.0, 1001.0)
    summary = Measurement(Case("x"), [Batch(Case("x"), samples)], tsc_hz=2e9).summary()
    assert (summary["min"], summary["max"], summary["count"]) == (1, 1000, 1000)
    assert summary["p50"] == 500.5
    assert summary["p99"] == pytest.approx(990.01)
    assert summary["mad"] == 250
    assert summary["cycles"] == 1001
    assert Measurement(Case("x"), (), "hangs here", "no end").summary() == {}


def test_how_a_measurement_looks_names_backend_units_and_flags() -> None:
    one = Measurement(Case("x"), fake((8000,), 100).batches, backend="kvm_amd, nested")
    assert "under kvm_amd, nested; one batch" in repr(one)
    html = one._repr_html_()
    assert "under kvm_amd, nested; one batch" in html
    assert "<th>count</th><td>100</td><td>samples</td>" in html
    assert f"<th>p50</th><td>{one.median:,.2f}</td><td>ns</td>" in html
    assert f"<th>p99</th><td>{one.quantile(0.99):,.2f}?</td>" in html


def test_a_notebook_sees_no_markup_of_others() -> None:
    one = Measurement(Case("<b>"), fake().batches)
    assert "<b>" not in one._repr_html_()
    assert "&lt;b&gt;" in one._repr_html_()


# Documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.usefixtures("kvm_host")
def test_the_document_is_what_its_schema_says(raw: bool, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    absent = Measurement(Case("halt", "c", "ring3"), (), "not available here", "HLT is for ring 0")
    made = document([fake(), absent], environment(), ["kvmpy", "bench"], raw=raw)
    save(tmp_path / "a.json", json.dumps(made))
    found = load(tmp_path / "a.json")
    jsonschema.validate(found, schema)
    assert ("samples" in found["measurements"][0]["batches"][0]) is raw
    del found["measurements"][0]["summary"]["p99"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cut short"),
        ("[]", "not a result"),
        ('{"schema": "other"}', "not a result"),
        ('{"schema": "kvmpy-bench", "version": 2}', "version 2"),
        ('{"schema": "kvmpy-bench", "version": 1}', "no measurements"),
        (
            '{"schema": "kvmpy-bench", "version": 1, "measurements": [], "environment": null}',
            "no environment",
        ),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_document_is_refused(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    save(tmp_path / "a", "one")
    save(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    with pytest.raises(ConfigError, match="cannot write"):
        save(tmp_path / "none" / "a", "three")
    assert os.listdir(tmp_path) == ["a"]


def test_csv_has_a_line_for_each_case() -> None:
    absent = Measurement(Case("halt", "c", "ring3"), (), "not available here", "because")
    rows = list(csv.DictReader(io.StringIO(to_csv([fake(), absent], environment()))))
    assert [row["operation"] for row in rows] == ["pio-out", "halt"]
    assert float(rows[0]["p50_ns"]) == pytest.approx(fake().median)
    assert float(rows[0]["low_ns"]) == fake().interval()[0]
    assert (rows[0]["p99_ns"], rows[0]["p99.9_ns"]) == ("", "")  # of 800 samples
    assert rows[0]["flags"] == "; ".join(fake().flags) != ""
    assert rows[0]["kernel"] == environment()["kernel"]
    assert rows[0]["backend"] in ("kvm_intel", "kvm_amd", "kvm_pvm", "unknown")
    assert rows[1]["p50_ns"] == ""


# The command --------------------------------------------------------------------------------


def run(*arguments: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


@pytest.mark.usefixtures("kvm_host")
def test_the_command_prints_a_table_and_writes_files(tmp_path: Path) -> None:
    result, lines = tmp_path / "a.json", tmp_path / "a.csv"
    arguments = ("pio-out", "halt", "--quick", "--samples", 60, "--json", result, "--csv", lines)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    found = load(result)
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    assert found["environment"]["backend"] in done.stdout
    kinds = {(one["operation"], one["level"]) for one in found["measurements"]}
    assert kinds == {("pio-out", "kernel"), ("pio-out", "c"), ("pio-out", "python"), ("halt", "c")}
    assert len(lines.read_text().splitlines()) == 5
    assert found["command"][:2] == ["kvmpy", "bench"]


@pytest.mark.usefixtures("kvm_host")
def test_a_sample_has_what_came_before_a_signal_in_it() -> None:
    """The guest waits for 10 ms by its TSC, while a heartbeat ends KVM_RUN each millisecond."""
    bench = GuestBench(Kind("delay", "wait"), Case("x", "c", "long"), Conditions(count=1))
    with bench.machine:
        bench.cpu.loop.heartbeat_ns = 1_000_000
        bench.start("wait", 1, rsi=bench.cpu.get_tsc_khz() * 10)
        pairs = bench.sample(1, bench.run_to_its_end)
    assert int(pairs[0, 1] - pairs[0, 0]) >= 9_900_000


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("between", ["an exit is finished", "a run is stopped"])
def test_a_sample_has_nothing_of_what_came_between_two_runs(between: str) -> None:
    pairs = np.zeros((8, 2), np.uint64)
    with Machine("1M") as machine:
        (cpu,) = machine.cpus
        machine.load(assemble("again: out 0x55, al; jmp again", at=0x1000))
        room = ffi.from_buffer("uint64_t[]", pairs, require_writable=True)
        cpu.loop.samples, cpu.loop.sample_room = room, len(pairs)
        cpu.loop.watch |= lib.KVMPY_SAMPLE
        cpu.run(timeout=10)
        if between == "an exit is finished":
            cpu.finish()
        else:
            machine.stop()
            assert cpu.run(timeout=10) == Interrupted("stopped")
            assert cpu.run(timeout=0.0) == Interrupted("timeout")
        before = time.monotonic_ns()
        cpu.run(timeout=10)
        cpu.loop.watch &= ~lib.KVMPY_SAMPLE
        ffi.release(room)
    assert pairs[1, 0] >= before


@pytest.mark.usefixtures("kvm_host")
def test_batches_are_as_many_as_are_asked_for(tmp_path: Path) -> None:
    """So many as `compare` says that it takes, whether with --quick or without."""
    for more in ((), ("--quick",)):
        case = ("pio-out", "--level", "c", "--mode", "long", *more)
        done = run(*case, "--samples", 20, "--batches", 3, "--json", tmp_path / "a.json")
        assert done.returncode == 0, done.stderr
        (one,) = load(tmp_path / "a.json")["measurements"]
        assert [batch["count"] for batch in one["batches"]] == [20] * 3
        assert one["wanted_batches"] == 3


@pytest.mark.usefixtures("kvm_host")
def test_a_result_is_kept_whatever_becomes_of_its_table_or_of_another_file(tmp_path: Path) -> None:
    result = tmp_path / "a.json"
    command = [sys.executable, "-m", "kvmpy", "bench", "pio-out", "--level", "c", "--quick"]
    command += ["--samples", "20", "--json", str(result), "--csv", "/dev/full"]
    reader, writer = os.pipe()
    os.close(reader)
    for told, stdout, stderr in (
        ("/dev/full", subprocess.PIPE, subprocess.PIPE),
        ("standard output was closed early", writer, subprocess.PIPE),
    ):
        done = subprocess.run(command, stdout=stdout, stderr=stderr, text=True, timeout=60)
        assert told in done.stderr
        assert len(load(result)["measurements"]) == 1
        assert stdout == writer or "Exit latencies" in done.stdout
        result.unlink()
    os.close(writer)


def test_the_command_lists_what_can_be_measured() -> None:
    done = run("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(OPERATIONS)


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("pio-oot",), "pio-out"),
        (("--samples", "0"), "0"),
        (("--batches", "0"), "0"),
        (("pio-out", "--raw"), "give --json"),
        (("--level", "sea"), "sea"),
        (("--mode", "fast"), "fast"),
        (("pio-out", "--json", "/no/such/directory/a.json"), "/no/such/directory"),
    ],
)
def test_bad_input_of_the_command_is_one_line(arguments: tuple[str, ...], named: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("kvm_host")
def test_ctrl_c_prints_what_there_is() -> None:
    command = [sys.executable, "-m", "kvmpy", "bench", "pio-out", "--samples", "20000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert b"Exit latencies under" in out or b"interrupted" in errors


@pytest.mark.usefixtures("kvm_host")
def test_a_run_interrupted_before_its_first_batch_leaves_an_earlier_result_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvmpy.bench.measure_cases", lambda *_, **__: [])
    path = tmp_path / "a.json"
    path.write_text("earlier")
    done = CliRunner().invoke(bench, ["cpuid", "--json", str(path)], standalone_mode=False)
    assert (done.return_value, path.read_text()) == (130, "earlier")
    assert "nothing is written" in done.stderr


def test_importing_kvmpy_does_not_bring_numpy() -> None:
    face = "[getattr(kvmpy, name) for name in kvmpy.__all__]"
    script = f"import sys, kvmpy; {face}; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n"
    assert kvmpy_bench.measure is measure
