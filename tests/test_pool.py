"""Many runs at once: `kvmpy.map` over processes, threads, and whatever has `submit`."""

import gc
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pool_functions
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_functions import (
    ASK,
    CRASH,
    HANG,
    INPUT,
    KILL,
    KILL_ONCE,
    LEAVE,
    RAISE,
    TRIPLE,
    LocalError,
    attach,
    prepared,
    refuse,
    write,
)

import kvmpy.pool.worker
from kvmpy import AddressError, ConfigError, HostError, Machine, Outcome, Snapshot, assemble, runs

pytestmark = pytest.mark.usefixtures("kvm_host")


@pytest.fixture(scope="module")
def snapshot(kvm_host: None) -> Snapshot:
    return prepared()


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files, which is empty at the end; and no process is left."""
    made = tmp_path / "temporary"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    yield made
    assert list(made.iterdir()) == []
    assert multiprocessing.active_children() == []


def essence(one: Outcome[Any]) -> tuple[Any, ...]:
    return one[:7]


def test_nothing_that_happens_to_an_input_costs_another(
    snapshot: Snapshot, temporary: Path, tmp_path: Path
) -> None:
    """In the default pool: a crash, a hang, an exception, a worker that dies once or always."""
    special = {
        7: bytes([CRASH, 0]),
        12: bytes([HANG, 0]),
        21: bytes([ASK, RAISE]),
        22: bytes([ASK, KILL_ONCE]),
        38: bytes([ASK, KILL]),
        55: bytes([ASK, LEAVE]),
        56: bytes(3 << 20),
        57: bytes([ASK, 0]),
    }
    inputs = [special.get(number, bytes([TRIPLE, number])) for number in range(80)]
    found = list(
        kvmpy.map(
            snapshot,
            inputs,
            write_to=INPUT,
            timeout=0.1,
            collect=(INPUT, 2),
            attach=partial(attach, directory=str(tmp_path)),
            chunk_size=5,
            workers=2,
        )
    )
    assert [one.input for one in found] == inputs
    assert all(one.input is given for one, given in zip(found, inputs, strict=True))
    assert {number: found[number].outcome for number in special} == {
        7: "shutdown",
        12: "timeout",
        21: "error",
        22: "debug-exit",
        38: "worker-died",
        55: "error",
        56: "error",
        57: "debug-exit",
    }
    for number in set(range(80)) - set(special):
        assert (found[number].outcome, found[number].value) == ("debug-exit", 3 * number)
        assert found[number].registers.rax == 3 * number
        assert found[number].collected == inputs[number]
    assert all(one.machine is None for one in found)
    assert [one.crashed for one in found].index(True) == 7
    assert found[22].value == found[57].value == 42
    assert found[21].detail == "ValueError: the device is broken"
    assert isinstance(found[21].error, ValueError)
    assert "pool_functions.py" in found[21].error.__notes__[-1]
    assert isinstance(found[55].error, SystemExit)
    assert isinstance(found[56].error, AddressError)
    assert "SIGKILL, 3 times" in found[38].detail
    # Two to start with, one for each death: with others, three times alone, and once.
    assert len(list(tmp_path.glob("*.pid"))) <= 2 + 4 + 1
    assert snapshot.path is None  # the temporary file is nobody's business


inputs_of = st.lists(
    st.tuples(st.sampled_from([TRIPLE, TRIPLE, CRASH, ASK]), st.sampled_from([0, 1, 7, RAISE])).map(
        lambda pair: bytes(pair) if pair[0] != ASK or pair[1] == RAISE else bytes((TRIPLE, 9))
    ),
    max_size=40,
)


@settings(max_examples=20)
@given(
    inputs=inputs_of,
    chunk_size=st.none() | st.integers(1, 12),
    batch=st.integers(1, 8),
    lazy=st.booleans(),
)
def test_it_is_runs(
    snapshot: Snapshot,
    threads: ThreadPoolExecutor,
    inputs: list[bytes],
    chunk_size: int | None,
    batch: int,
    lazy: bool,
) -> None:
    options: dict[str, Any] = {"write_to": INPUT, "timeout": 10, "collect": (INPUT, 2)}
    good = [one for one in inputs if one[0] != ASK]
    expected = list(runs(snapshot, good, attach=quiet, **options))
    given_out: Any = iter(inputs) if lazy else inputs
    options |= {"attach": quiet, "chunk_size": chunk_size, "batch": batch}
    found = list(kvmpy.map(snapshot, given_out, threads, **options))
    assert [one.input for one in found] == inputs
    whole = [one for one in found if one.outcome != "error"]
    assert list(map(essence, whole)) == list(map(essence, expected))
    assert all(one.input == bytes([ASK, RAISE]) for one in found if one.outcome == "error")
    mixed = kvmpy.map(snapshot, inputs, threads, ordered=False, **options)
    assert sorted(map(repr, mixed)) == sorted(map(repr, found)) or any(o.error for o in found)


def quiet(machine: Machine) -> None:
    attach(machine, tempfile.gettempdir())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_completed_first_comes_first(snapshot: Snapshot, threads: ThreadPoolExecutor) -> None:
    inputs = [bytes([HANG, 0]), *(bytes([TRIPLE, number]) for number in range(10))]
    options: dict[str, Any] = {"write_to": INPUT, "timeout": 0.3, "chunk_size": 1}
    found = list(kvmpy.map(snapshot, inputs, threads, ordered=False, **options))
    assert found[-1].outcome == "timeout"
    assert sorted(one.input for one in found) == sorted(inputs)
    found = list(kvmpy.map(snapshot, inputs, threads, **options))
    assert found[0].outcome == "timeout"


def test_a_thread_keeps_its_machine_and_all_are_closed(
    snapshot: Snapshot, threads: ThreadPoolExecutor
) -> None:
    made: list[Machine] = []
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    list(kvmpy.map(snapshot, range(100), threads, attach=made.append, timeout=10, chunk_size=1))
    assert 1 <= len(made) <= 2
    for machine in made:
        with pytest.raises(ValueError, match="closed"):
            machine.vm.fd  # noqa: B018
    made.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_guest_that_hangs_on_a_thread_is_stopped(
    snapshot: Snapshot, threads: ThreadPoolExecutor
) -> None:
    """Without a timeout, and the iterator is closed."""
    inputs = [bytes([TRIPLE, 1]), *repeat(bytes([HANG, 0]), 20)]
    made = kvmpy.map(snapshot, inputs, threads, write_to=INPUT, chunk_size=1)
    assert next(made).value == 3
    time.sleep(0.05)
    made.close()
    assert threads.submit(int).result(timeout=5) == 0


class Inline:
    """An executor of somebody else's: no more than `submit`."""

    def __init__(self) -> None:
        self.calls = 0

    def submit(self, function: Any, /, *args: Any) -> Future[Any]:
        self.calls += 1
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_whatever_has_submit_will_do(snapshot: Snapshot) -> None:
    executor = Inline()
    taken = count()
    inputs = (bytes([TRIPLE, next(taken) % 256]) for _ in repeat(None))
    made = kvmpy.map(snapshot, inputs, executor, write_to=INPUT, timeout=10, workers=1)
    assert [next(made).value for _ in range(300)] == [3 * (n % 256) for n in range(300)]
    made.close()
    assert 0 < executor.calls < 100  # in chunks
    assert next(taken) < 300 + 10 * 4096


def test_what_writes_may_raise_and_an_outcome_travels(snapshot: Snapshot) -> None:
    found = list(kvmpy.map(snapshot, range(10), Inline(), write_to=write, timeout=10))
    errors = [one for one in found if one.outcome == "error"]
    assert [one.input for one in errors] == [4, 9]
    assert errors[0].detail == "LocalError: 4 and 4"
    assert type(errors[0].error) is RuntimeError  # its own cannot be unpickled
    assert [one.value for one in found if one not in errors] == [0, 3, 6, 9, 15, 18, 21, 24]
    for one in [*found[:4], *runs(snapshot, [b"\0\1"], INPUT, timeout=10)]:
        copy = pickle.loads(pickle.dumps(one))
        assert essence(copy) == essence(one)
        assert type(copy) is Outcome
        assert copy.machine is None


def test_a_process_pool_of_the_users(snapshot: Snapshot, temporary: Path) -> None:
    inputs = [bytes([TRIPLE, number % 256]) for number in range(300)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        for _ in range(4):  # of which a worker keeps no more than two
            made = kvmpy.map(snapshot, inputs, executor, write_to=INPUT, timeout=10)
            assert [one.value for one in made] == [3 * one[1] for one in inputs]
        machines = executor.submit(pool_functions.machines_here).result()
        assert machines <= 2
        with pytest.raises(RuntimeError, match="1 and 2"):
            list(kvmpy.map(snapshot, inputs, executor, attach=refuse))


def test_an_iterator_that_is_closed_leaves_nothing(snapshot: Snapshot, temporary: Path) -> None:
    """While a guest hangs without a timeout, and inputs have no end."""
    inputs = (bytes([HANG if number == 5 else TRIPLE, 1]) for number in count())
    made = kvmpy.map(snapshot, inputs, write_to=INPUT, workers=1, chunk_size=3)
    assert next(made).value == 3
    assert len(list(temporary.iterdir())) == 1
    made.close()
    unused = kvmpy.map(snapshot, inputs, write_to=INPUT)
    del unused  # never begun


@pytest.mark.parametrize("name", ["attach", "write_to"])
def test_a_function_that_cannot_be_sent_is_named(snapshot: Snapshot, name: str) -> None:
    options: dict[str, Any] = {name: lambda *args: None}
    with pytest.raises(ConfigError, match=rf"{name}=.*<lambda> .*top level of a module") as error:
        kvmpy.map(snapshot, [], **options)
    assert "\n" not in str(error.value)


def test_a_method_whose_object_cannot_be_sent_is_named(snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError, match=r"attach=Unsendable.attach .* make its object in a func"):
        kvmpy.map(snapshot, [], attach=Unsendable().attach)


class Unsendable:
    def __init__(self) -> None:
        self.hidden = lambda: None

    def attach(self, machine: Machine) -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0}, {"chunk_size": 0}, {"workers": 0}, {"max_exits": 0}, {"batch": "a"},
        {"chunk_size": 1.5}, {"workers": "x"}, {"max_exits": "x"}, {"collect": 5},
        {"collect": (5,)}, {"collect": ("a", "b")}, {"collect": (1, 2, 3)}, {"inputs": 7},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_at_once(snapshot: Snapshot, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}="):
        kvmpy.map(snapshot, **{"inputs": [], **options})
    with pytest.raises(ConfigError):
        kvmpy.map(snapshot, [], timeout=-1)


def test_an_address_in_the_place_of_an_executor_is_told_where_it_belongs(
    snapshot: Snapshot,
) -> None:
    address: Any = INPUT
    with pytest.raises(ConfigError, match=r"^executor=196608 has no submit.*write_to="):
        kvmpy.map(snapshot, [b"a"], address)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"write_to": 1 << 40}, AddressError), ({"scope": "none"}, ConfigError)],
)
def test_settings_that_fit_no_input_end_it(
    snapshot: Snapshot, threads: ThreadPoolExecutor, options: dict[str, Any], error: type
) -> None:
    with pytest.raises(error):
        list(kvmpy.map(snapshot, [b"a", b"b"], threads, **options))


def test_what_attach_raises_ends_it(snapshot: Snapshot, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(LocalError):
        list(kvmpy.map(snapshot, [b"a", b"b"], threads, attach=refuse))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import kvmpy.pool.worker
from pool_functions import HANG, INPUT, TRIPLE, attach, prepared
def main():
    inputs = [bytes([TRIPLE, 1]), bytes([HANG, 0]), bytes([HANG, 0])]
    for one in kvmpy.map(
        prepared(), inputs, write_to=INPUT, attach=attach, chunk_size=1, workers=2
    ):
        print(one.value, flush=True)
{guard}main()
"""


def started(tmp_path: Path, guard: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), guard=guard))
    (tmp_path / "temporary").mkdir()
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")}, start_new_session=True,
    )  # fmt: skip


def workers_of(tmp_path: Path) -> list[int]:
    """Those that are still there."""
    found = [int(one.stem) for one in tmp_path.glob("*.pid")]
    return [pid for pid in found if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_the_end_of_the_parent_is_that_of_the_workers(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C on the terminal, which all processes get; and a parent that is killed."""
    with started(tmp_path, 'if __name__ == "__main__": ') as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "3\n"
        deadline = time.monotonic() + 20
        while len(workers_of(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(workers_of(tmp_path)) == 2
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)
        else:
            parent.kill()
        _, err = parent.communicate(timeout=20)
    assert parent.returncode == -how
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers_of(tmp_path) == []
    if how == signal.SIGINT:
        assert err.count("Traceback") == 1, err
        assert err.endswith("KeyboardInterrupt\n")
        assert list((tmp_path / "temporary").iterdir()) == []


def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    with started(tmp_path, "") as parent:
        _, err = parent.communicate(timeout=30)
    assert parent.returncode == 1
    assert err.count("Traceback") == 1, err  # the parent's own
    expected = (
        'HostError: a worker process exited with 1 while it started: .*__name__ == "__main__"'
    )
    assert re.search(expected, err.splitlines()[-1])


def test_a_function_of_an_interactive_session_is_named(tmp_path: Path) -> None:
    text = "import kvmpy\ndef attach(machine): pass\nkvmpy.map(None, [], attach=attach)"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False
    )
    assert "attach=attach was defined where worker processes cannot import" in done.stderr


def test_an_input_that_cannot_be_sent(snapshot: Snapshot, temporary: Path) -> None:
    with pytest.raises(ConfigError, match="an input cannot be sent to a worker process"):
        list(kvmpy.map(snapshot, [lambda: None], write_to=INPUT, workers=1))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_inputs_are_any_bytes(snapshot: Snapshot, threads: ThreadPoolExecutor, kind: str) -> None:
    inputs = [memoryview(b"\0\1--")[:2], bytearray(b"\0\2"), array("H", [0x300]), b"\0\4"]
    executor = threads if kind == "threads" else None
    found = list(kvmpy.map(snapshot, inputs, executor, write_to=INPUT, workers=1))
    assert [one.value for one in found] == [3, 6, 9, 12]
    assert all(one.input is given_ for one, given_ in zip(found, inputs, strict=True))


def test_no_worker_can_start(
    snapshot: Snapshot, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(kvmpy.pool.worker._Process, "start", start)
    with pytest.raises(HostError, match=r"a worker process cannot start: .*temporarily"):
        list(kvmpy.map(snapshot, [b"ab"], write_to=INPUT, workers=1))


PRINTS = f"""
mov al, 62
out 0xe9, al
hlt
mov esi, {INPUT}
movzx ecx, byte ptr [rsi]
print:
jrcxz done
mov al, [rsi + rcx]
out 0xe9, al
dec ecx
cmp al, 33
jne print
out 0x61, al
jmp print
done:
hlt
"""


@pytest.mark.parametrize("posted", [False, True])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_console_of_each_run(threads: ThreadPoolExecutor, posted: bool, batch: int) -> None:
    """Runs that print, among others, which C alone serves in a batch."""
    with Machine("1M", posted_console=posted) as machine:
        machine.load(assemble(PRINTS, mode="long", at=0x4000))
        machine.run(timeout=10)
        made = machine.snapshot()
    assert made.console == b">"
    words = [b"one", b"", b"", b"four", b"", b"six", *[b""] * 12, b"last"]
    inputs = [bytes([len(one)]) + one[::-1] for one in words]
    options: dict[str, Any] = {"write_to": INPUT, "timeout": 10, "batch": batch}
    expected = [b">" + one for one in words]
    found = list(runs(made, inputs, console=True, **options))
    assert [one.console for one in found] == expected
    assert pickle.loads(pickle.dumps(found[0])).console == b">one"
    found = list(kvmpy.map(made, inputs, threads, console=True, **options))
    assert [one.console for one in found] == expected
    assert all(one.console == b"" for one in runs(made, inputs, **options))


@pytest.mark.parametrize("batch", [1, 8])
def test_the_console_before_a_device_that_raises(batch: int) -> None:
    with Machine("1M") as machine:
        machine.load(assemble(PRINTS, mode="long", at=0x4000))
        machine.run(timeout=10)
        made = machine.snapshot()

    def attach(machine: Machine) -> None:
        machine.on_port(0x61)(lambda offset, size, value: 1 // 0)

    inputs = [b"\2ba", b"\0", b"\0", b"\2!a"]
    found = runs(made, inputs, INPUT, attach=attach, batch=batch, console=True, timeout=10)
    assert [next(found).console for _ in range(3)] == [b">ab", b">", b">"]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_the_whole_way_in_a_guest_of_ring_3(threads: ThreadPoolExecutor) -> None:
    with Machine("1M", ring=3) as machine:
        machine.load(assemble("mov esi, 0x30000; ud2", mode="long", at=0x4000))
        made = machine.snapshot()
    (one,) = kvmpy.map(made, [b"x"], threads, write_to=INPUT, timeout=10)
    assert (one.outcome, str(one.exception)[:3]) == ("exception", "#UD")


def test_processes_of_others_that_import_a_script_without_a_guard_are_told(tmp_path: Path) -> None:
    text = """
import multiprocessing, kvmpy
if multiprocessing.current_process().name == "MainProcess":
    multiprocessing.get_context("spawn").Process(target=print).start()
kvmpy.map(None, [])
"""
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, timeout=30, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert "ConfigError: a worker process imports the main module" in done.stderr


def storm(rounds: int, seed: int, timeout: float) -> None:
    script = Path(__file__).parent / "pool_storm.py"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "faulthandler", str(script), str(rounds), str(seed)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it says where it hangs
            out, err = process.communicate()
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out[-3:], err) == (0, "ok\n", "")


@pytest.mark.slow
def test_kills_closes_and_interrupts_at_random() -> None:
    storm(4, 3, 50)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 14))
def test_a_storm_of_kills_closes_and_interrupts(seed: int) -> None:
    storm(60, seed, 200)


@pytest.mark.slow  # a cluster takes seconds to start
def test_on_a_dask_cluster() -> None:
    """The example, which has a cluster of two processes. Not under -W error: Dask has warnings."""
    pytest.importorskip("distributed")
    example = Path(__file__).parent.parent / "examples" / "dask_map.py"
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{sum(n * n for n in range(1000))}\n"), (
        done.stderr
    )


def test_the_path_of_a_snapshot_is_told_what_to_do() -> None:
    path: Any = "a.snapshot"
    with pytest.raises(ConfigError, match="give a Snapshot"):
        kvmpy.map(path, [b"a"])
