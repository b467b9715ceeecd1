"""Ending a run from outside: stop(), deadlines, Ctrl-C, and whose signals are whose.

Where a test is about kicks, the heartbeat is put out of reach: it would hide a lost kick by
ending KVM_RUN a few times a second.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from kvmpy import ConfigError, Interrupted, Machine
from kvmpy.devices.native import Sink

SPIN = b"\xeb\xfe"  # jmp to itself
COUNT_UP = bytes.fromhex("e610 fec0 ebfa")  # again: out 0x10, al; inc al; jmp again
HALT = b"\xf4"
NEVER_NS = 3600 * 10**9
DEADLINE = 5.0


def machine_with(code: bytes, device: Any = None, heartbeat: bool = True) -> Machine:
    machine = Machine("64K", mode="real", devices=False)
    machine.load(code)
    if device is not None:
        machine.attach_port(0x10, 1, device)
    if not heartbeat:
        machine.cpus[0].loop.heartbeat_ns = NEVER_NS
    return machine


class Recorder:
    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(value)


def gaps(values: list[int]) -> int:
    """How many of a counting guest's writes are missing or doubled."""
    return sum(second != (first + 1) % 256 for first, second in pairwise(values))


@contextmanager
def thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread that has to end by itself."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    yield worker
    worker.join(DEADLINE)
    assert not worker.is_alive()
    assert not failed, failed


# Kicks --------------------------------------------------------------------------------------

GUESTS = {"spins": (SPIN, None), "exits to C": (COUNT_UP, Sink), "exits": (COUNT_UP, Recorder)}


def race_stops(guest: str, tries: int) -> None:
    code, device = GUESTS[guest]
    go = threading.Semaphore(0)
    chance = random.Random(tries)
    waits = [chance.choice((0, 0, chance.random() * 1e-4)) for _ in range(tries)]
    with machine_with(code, device and device(), heartbeat=False) as machine:

        def stop_each() -> None:
            for wait in waits:
                go.acquire()
                until = time.perf_counter() + wait
                while time.perf_counter() < until:
                    pass
                machine.stop()

        with thread(stop_each):
            for number in range(tries):
                go.release()
                result = machine.run(timeout=DEADLINE)
                assert result.outcome == "stopped", f"try {number}: {result}"
        assert machine.run(timeout=0.001).outcome == "timeout"  # as many stops as runs


@pytest.mark.parametrize("guest", sorted(GUESTS))
def test_no_stop_is_lost(kvm_host: None, guest: str) -> None:
    race_stops(guest, 400)


@pytest.mark.slow
@pytest.mark.parametrize("guest", sorted(GUESTS))
def test_no_stop_of_ten_thousand_is_lost(kvm_host: None, guest: str) -> None:
    race_stops(guest, 10_000)


def test_no_kick_is_lost_one_floor_below(kvm_host: None) -> None:
    go = threading.Semaphore(0)
    with machine_with(COUNT_UP, heartbeat=False) as machine:
        vcpu = machine.cpus[0]

        def kick_each() -> None:
            for _ in range(300):
                go.acquire()
                vcpu.kick()

        with thread(kick_each):
            for _ in range(300):
                go.release()
                until = time.monotonic() + DEADLINE
                while vcpu.run(timeout=DEADLINE) != Interrupted("stopped"):
                    assert time.monotonic() < until


def test_a_stop_before_the_run_ends_it_before_it_starts(kvm_host: None) -> None:
    with machine_with(HALT, heartbeat=False) as machine:
        for _ in range(3):
            machine.stop()  # several are one
        stopped = machine.run(timeout=DEADLINE)
        assert (stopped.outcome, stopped.exits) == ("stopped", {})
        assert machine.run(timeout=DEADLINE).outcome == "halt"


def test_a_device_stops_its_own_machine(kvm_host: None) -> None:
    class Stopper(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            machine.stop()

    device = Stopper()
    with machine_with(COUNT_UP, device, heartbeat=False) as machine:
        for turn in range(1, 20):
            assert machine.run(timeout=DEADLINE).outcome == "stopped"
            assert device.seen == list(range(turn))


def test_the_teaching_path_is_stopped_as_well(kvm_host: None) -> None:
    with machine_with(SPIN, heartbeat=False) as machine, thread(machine.stop):
        assert list(machine.exits(timeout=DEADLINE)) == [Interrupted("stopped")]


def test_a_thread_with_all_signals_blocked_can_be_stopped(kvm_host: None) -> None:
    masks: list[set[int]] = []
    outcomes: list[str] = []
    running = threading.Event()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        masks.append({*signal.pthread_sigmask(signal.SIG_BLOCK, ())})
        running.set()
        outcomes.append(machine.run(timeout=DEADLINE).outcome)
        outcomes.append(machine.run(timeout=0.02).outcome)
        masks.append({*signal.pthread_sigmask(signal.SIG_BLOCK, ())})

    with machine_with(SPIN, heartbeat=False) as machine, thread(run):
        running.wait(DEADLINE)
        time.sleep(0.01)
        machine.stop()
    assert outcomes == ["stopped", "timeout"]
    assert masks[0] == masks[1]
    assert signal.SIGUSR1 in masks[0]


@pytest.mark.slow
def test_stopping_a_machine_that_is_being_closed_is_harmless(kvm_host: None) -> None:
    current: list[Machine] = []
    done = threading.Event()

    def stop_all_the_time() -> None:
        while not done.is_set():
            for machine in current[-1:]:
                machine.stop()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with thread(stop_all_the_time):
            until = time.monotonic() + 1
            while time.monotonic() < until:
                current[:] = [machine_with(HALT)]
                assert current[0].run(timeout=DEADLINE).outcome in ("halt", "stopped")
                current[0].close()
                current[0].stop()
            done.set()
    finally:
        done.set()
        sys.setswitchinterval(before)


# Deadlines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.001, 0.03, 0.12])
@pytest.mark.parametrize("guest", sorted(GUESTS))
@pytest.mark.parametrize("heartbeat", [True, False])
def test_a_timeout_is_kept(kvm_host: None, guest: str, timeout: float, heartbeat: bool) -> None:
    code, device = GUESTS[guest]
    with machine_with(code, device and device(), heartbeat) as machine:
        result = machine.run(timeout=timeout)
        assert result.outcome == "timeout"
        assert timeout <= result.seconds < timeout + 2  # never early; late by the scheduler only


def test_a_timeout_is_kept_while_a_device_is_slow(kvm_host: None) -> None:
    class Slow(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            time.sleep(0.06)

    device = Slow()
    with machine_with(COUNT_UP, device) as machine:
        assert machine.run(timeout=0.03).outcome == "timeout"
        assert device.seen == [0]


def test_the_teaching_path_keeps_its_timeout_over_all_exits(kvm_host: None) -> None:
    with machine_with(COUNT_UP, Recorder()) as machine:
        started = time.monotonic()
        seen = list(machine.exits(timeout=0.1))
        assert 0.1 <= time.monotonic() - started < DEADLINE
        assert seen[-1] == Interrupted("timeout")
        assert len(seen) > 10


@pytest.mark.parametrize("timeout", [-1, -1e-9, float("nan"), float("inf"), 1e9, 1e300])
def test_a_timeout_that_is_none_is_refused(kvm_host: None, timeout: float) -> None:
    with machine_with(HALT) as machine:
        for run in (
            lambda: machine.run(timeout=timeout),
            lambda: list(machine.exits(timeout=timeout)),
            lambda: machine.cpus[0].run(timeout=timeout),
        ):
            with pytest.raises(ConfigError, match="timeout of"):
                run()
        assert machine.run(timeout=9e8).outcome == "halt"


def test_no_timeout_means_no_limit(kvm_host: None) -> None:
    with machine_with(HALT) as machine:
        assert machine.run(timeout=None).outcome == "halt"


# Ctrl-C and other signals -------------------------------------------------------------------


def interrupt_often(machine: Machine, times: int, run: Callable[[], object]) -> int:
    """Let a thread send SIGINT at random moments of `run`, again and again; how many came."""
    go = threading.Semaphore(0)
    chance = random.Random(times)

    def send() -> None:
        for _ in range(times):
            go.acquire()
            time.sleep(chance.random() * 0.001)
            os.kill(os.getpid(), signal.SIGINT)

    caught = 0
    with thread(send):
        for _ in range(times):
            try:
                go.release()
                until = time.monotonic() + DEADLINE
                while time.monotonic() < until:
                    run()
            except KeyboardInterrupt:
                caught += 1
                assert not machine.cpus[0].loop.running
    return caught


def race_interrupts(times: int) -> None:
    device = Recorder()
    with machine_with(COUNT_UP, device) as machine:
        # Short runs, so that it also comes before and after KVM_RUN.
        assert interrupt_often(machine, times, lambda: machine.run(max_exits=7)) == times
        assert machine.run(max_exits=3).outcome == "max-exits"
    # One that comes within the device itself, or just as it is called, may cost that access.
    assert gaps(device.seen) <= times // 20
    assert len(device.seen) > times


def test_ctrl_c_loses_nothing(kvm_host: None) -> None:
    race_interrupts(300)


@pytest.mark.slow
def test_ctrl_c_loses_nothing_in_thousands_of_tries(kvm_host: None) -> None:
    race_interrupts(5000)


def test_ctrl_c_leaves_the_exit_to_the_next_run_below(kvm_host: None) -> None:
    """vcpu.run() either returns an exit or keeps it."""
    values: list[int] = []
    with machine_with(COUNT_UP) as machine:
        vcpu = machine.cpus[0]

        def run() -> None:
            values.append(vcpu.run(timeout=DEADLINE).data[0])  # type: ignore[union-attr]

        assert interrupt_often(machine, 300, run) == 300
    assert gaps(values) <= 15  # between its return and the append there is room for one


def test_an_outcome_survives_ctrl_c(kvm_host: None) -> None:
    """A guest that halts is either reported, or still halted: it never runs past its HLT."""
    halts = 0
    with machine_with(b"\xf4\x40\xeb\xfc") as machine:  # again: hlt; inc ax; jmp again

        def run() -> None:
            nonlocal halts
            assert machine.run(timeout=DEADLINE).outcome == "halt"
            halts += 1

        interrupt_often(machine, 300, run)
        machine.run(timeout=DEADLINE)
        turns = machine.cpus[0].get_regs().rax & 0xFFFF
    assert abs(turns - (halts & 0xFFFF)) <= 15


def test_ctrl_c_reaches_a_guest_that_spins(kvm_host: None) -> None:
    """Also when the kernel gives the signal to another thread than the one in KVM_RUN."""

    def send() -> None:
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with machine_with(SPIN) as machine:
        for _ in range(5):
            with thread(send):
                with pytest.raises(KeyboardInterrupt):
                    machine.run(timeout=DEADLINE)
                assert machine.cpus[0].get_regs().rip == 0x7C00
        assert machine.run(timeout=0.01).outcome == "timeout"


def test_a_callers_handler_that_does_not_raise_lets_the_guest_go_on(kvm_host: None) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with machine_with(SPIN) as machine, thread(lambda: None):
            timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            assert machine.run(timeout=0.3).outcome == "timeout"
            timer.join()
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_stop_in_a_signal_handler(kvm_host: None) -> None:
    with machine_with(SPIN) as machine:
        before = signal.signal(signal.SIGALRM, lambda *_: machine.stop())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            assert machine.run(timeout=DEADLINE).outcome == "stopped"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def run_python(script: str) -> str:
    """Run a script in a fresh process: what it does to signals is its own affair."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_real_time_signal_is_taken_and_no_other_disposition_changes(kvm_host: None) -> None:
    output = run_python("""
import signal
from pathlib import Path
from kvmpy import Machine

def dispositions():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
    return {name: int(fields[name], 16) for name in ("SigCgt", "SigIgn", "SigBlk")}

signal.signal(signal.SIGUSR2, lambda *_: None)
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
before = dispositions()
for _ in range(3):
    with Machine("64K", mode="real") as machine:
        machine.load(bytes.fromhex("ebfe"))
        machine.stop()
        machine.run()
        machine.run(timeout=0.06)
assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
after = dispositions()
print({name: before[name] ^ after[name] for name in before}, signal.SIGRTMIN, signal.SIGRTMAX)
""")
    changes, least, most = output.rsplit(maxsplit=2)
    assert "'SigIgn': 0, 'SigBlk': 0" in changes
    (caught,) = [int(text) for text in changes.replace(",", "").split() if text.isdigit()][:1]
    assert caught.bit_count() == 1
    assert int(least) <= caught.bit_length() <= int(most)


def test_kvmpy_leaves_taken_signals_alone_and_says_when_none_is_left(kvm_host: None) -> None:
    output = run_python("""
import signal
from kvmpy import HostError, Machine

real_time = range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
for number in real_time:
    signal.signal(number, signal.SIG_IGN)
with Machine("64K", mode="real") as machine:
    machine.load(bytes.fromhex("ebfe"))
    try:
        machine.run(timeout=5)
    except HostError as error:
        print(error)
    free = signal.SIGRTMIN + 5
    signal.signal(free, signal.SIG_DFL)
    machine.stop()
    print(machine.run(timeout=5).outcome)
    print(machine.run(timeout=0.01).outcome)
ignored = {number for number in real_time if signal.getsignal(number) == signal.SIG_IGN}
print(len(real_time) - len(ignored))
""")
    assert output.splitlines() == [
        "all real-time signals are taken: kvmpy needs one for itself",
        "stopped",
        "timeout",
        "1",
    ]


def test_a_forked_child_is_told_and_the_parent_goes_on(kvm_host: None) -> None:
    output = run_python("""
import os
from kvmpy import HostError, Machine

def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

with Machine("64K", mode="real") as machine:
    machine.load(bytes.fromhex("e610 fec0 ebfa"))
    seen = []

    def run_in_child():
        try:
            machine.run(timeout=5)
        except HostError as error:
            assert "process that made its VM" in str(error), error
            machine.close()
            with Machine("64K", mode="real") as fresh:
                fresh.load(b"\\xf4")
                assert fresh.run(timeout=5).outcome == "halt"
                fresh.load(bytes.fromhex("ebfe"))
                fresh.set_entry(0x7c00)
                assert fresh.run(timeout=0.01).outcome == "timeout"
            return
        raise AssertionError("it ran")

    @machine.on_port(0x10)
    def device(offset, size, value):
        seen.append(value)
        if len(seen) == 6:  # while the machine runs
            pid = os.fork()
            if not pid:
                return
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

    child(run_in_child)
    parent = os.getpid()
    try:
        outcome = machine.run(timeout=5, max_exits=20).outcome
    except HostError:
        if os.getpid() == parent:
            raise
        machine.close()
        os._exit(7)
    child(run_in_child)
    assert machine.run(timeout=5, max_exits=20).outcome == "max-exits"
    assert machine.run(timeout=0.01).outcome == "timeout"
    print(outcome, seen[:40] == list(range(40)))
""")
    assert output == "max-exits True\n"
