"""Several vCPUs and several machines at once, each on its own thread, and one inside another."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmpy import KVM, ConfigError, Interrupted, Machine, PortOut, Result, UnsupportedError
from kvmpy.bus import Claim
from kvmpy.devices.native import Constant, Counter, Sink

pytestmark = pytest.mark.usefixtures("kvm_host")

ROOT = Path(__file__).parent.parent
SPIN = b"\xeb\xfe"
WRITE_FOREVER = bytes.fromhex("e610 fec0 ebfa")  # again: out 0x10, al; inc al; jmp again
PATIENCE = 10.0
MMIO = 0x20000


def real(code: bytes, **options: Any) -> Machine:
    machine = Machine("64K", mode="real", **options)
    machine.load(code)
    return machine


def two_cpus(code: bytes, **options: Any) -> Machine:
    """Two vCPUs that start alike, but for RDI: it is the vCPU's number."""
    machine = Machine("1M", cpus=2, **options)
    machine.load(code)
    for cpu in machine.cpus:
        registers = cpu.get_regs()
        registers.rdi = cpu.index
        registers.rsp -= 0x1000 * cpu.index
        cpu.set_regs(registers)
    return machine


def all_at_once(*works: Callable[[], Any]) -> list[Any]:
    """Run each on a thread of its own, and give what they return, or else raise."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def work(number: int) -> None:
        barrier.wait(PATIENCE)
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@contextmanager
def running(machine: Machine, cpu: int = 0) -> Iterator[list[Result]]:
    """The machine runs on another thread until it ends or is stopped; its result comes last."""
    results: list[Result] = []

    def work() -> None:
        results.append(machine.run(timeout=PATIENCE, cpu=cpu))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until = time.monotonic() + PATIENCE
    while not machine.cpus[cpu].loop.running and time.monotonic() < until:
        time.sleep(0.0005)
    try:
        yield results
    finally:
        machine.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def hasty_switching() -> Iterator[None]:
    """Let Python change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# Two vCPUs ----------------------------------------------------------------------------------


def test_two_vcpus_count_in_shared_memory() -> None:
    # mov ecx, 2000; again: lock inc qword [0x8000]; loop again; hlt
    code = bytes.fromhex("b9d0070000 f048ff042500800000 e2f5 f4")
    with two_cpus(code) as machine:
        results = all_at_once(*(lambda n=n: machine.run(PATIENCE, cpu=n) for n in (0, 1)))
        assert [result.outcome for result in results] == ["halt", "halt"]
        assert machine.memory.read_u64(0x8000) == 4000


def test_two_vcpus_hand_each_other_the_turn() -> None:
    """Each writes to its port when it is its turn, and gives the turn to the other."""
    code = bytes.fromhex(
        "b928000000"  # mov ecx, 40
        "393c2500800000 75f7"  # again: cmp [0x8000], edi; jne again
        "89f8 e610"  # mov eax, edi; out 0x10, al
        "83f001 89042500800000"  # xor eax, 1; mov [0x8000], eax
        "e2e7 f4"  # loop again; hlt
    )
    seen: list[int] = []
    with two_cpus(code) as machine:

        @machine.on_port(0x10)
        def turns(offset: int, size: int, value: int | None) -> None:
            assert value is not None
            seen.append(value)

        results = all_at_once(*(lambda n=n: machine.run(PATIENCE, cpu=n) for n in (0, 1)))
        assert [result.outcome for result in results] == ["halt", "halt"]
        assert [result.exits["port-out"] for result in results] == [40, 40]
    assert seen == [0, 1] * 40


def test_one_stop_ends_both() -> None:
    for _ in range(20):
        with (
            two_cpus(SPIN) as machine,
            running(machine, 0) as first,
            running(machine, 1) as second,
        ):
            machine.stop()
        assert [result.outcome for result in first + second] == ["stopped", "stopped"]


@pytest.mark.parametrize("writer", [0, 1])
def test_an_outcome_is_that_of_both(writer: int) -> None:
    """The machine is over for every vCPU that runs, whichever saw to it."""
    # cmp edi, writer; jne $; mov al, 7; out 0xf4, al; hlt
    code = b"\x83\xff" + bytes([writer]) + bytes.fromhex("75fe b007 e6f4 f4")
    for _ in range(10):
        with two_cpus(code) as machine, running(machine, 1 - writer) as other:
            own = machine.run(timeout=PATIENCE, cpu=writer)
            assert (own.outcome, own.value) == ("debug-exit", 7)
        assert [(result.outcome, result.value) for result in other] == [("debug-exit", 7)]


def test_a_ring_3_exception_is_that_of_its_vcpu() -> None:
    # test edi, edi; jz $; xor ecx, ecx; div ecx
    code = bytes.fromhex("85ff 74fe 31c9 f7f1")
    with two_cpus(code, ring=3) as machine, running(machine, 0):
        result = machine.run(timeout=PATIENCE, cpu=1)
        assert result.outcome == "exception", result
        assert result.exception is not None
        assert (result.exception.name, result.exception.rip) == ("#DE", 0x1006)


def test_routes_in_c_count_the_accesses_of_both() -> None:
    code = bytes.fromhex("b9e8030000 e610 e411 e2fa f4")  # 1000 times out 0x10, al; in al, 0x11
    counters = Counter(), Counter()
    with two_cpus(code, devices=False) as machine:
        for port, counter in zip((0x10, 0x11), counters, strict=True):
            machine.attach_port(port, 1, counter)
        all_at_once(*(lambda n=n: machine.run(PATIENCE, cpu=n) for n in (0, 1)))
    assert [counter.count for counter in counters] == [2000, 2000]


def test_two_vcpus_share_a_posted_console() -> None:
    with KVM() as kvm:
        try:
            kvm.require("COALESCED_PIO")
        except UnsupportedError as error:
            pytest.skip(str(error))
    # mov ecx, 3000; lea eax, [rdi + 'a']; again: out 0xe9, al; loop again; hlt
    code = bytes.fromhex("b9b80b0000 8d4761 e6e9 e2fc f4")
    with hasty_switching(), two_cpus(code, posted_console=True) as machine:
        results = all_at_once(*(lambda n=n: machine.run(PATIENCE, cpu=n) for n in (0, 1)))
        assert [result.outcome for result in results] == ["halt", "halt"]
        assert sorted(machine.console) == sorted(b"a" * 3000 + b"b" * 3000)


# One vCPU, two threads ----------------------------------------------------------------------


def test_a_vcpu_runs_on_one_thread_at_a_time() -> None:
    with real(WRITE_FOREVER) as machine:
        machine.attach_port(0x10, 1, Sink())
        with running(machine) as results:
            cpu = machine.cpus[0]
            runs: list[Callable[[], object]] = [
                lambda: machine.run(timeout=1, max_exits=1),
                lambda: next(machine.exits(timeout=1)),
                lambda: cpu.run(timeout=1),
            ]
            for run in runs:
                with pytest.raises(ConfigError, match="already running"):
                    run()
            accesses: list[Callable[[], object]] = [
                lambda: cpu.set_regs(cpu.get_regs()),
                lambda: cpu.set_sregs(cpu.get_sregs()),
                cpu.get_fpu,
                lambda: machine.set_entry(0x7C00),
            ]
            for access in accesses:
                with pytest.raises(ConfigError, match="running on another thread"):
                    access()
            assert not results  # the failures did not touch the run, nor its limits
        assert [result.outcome for result in results] == ["stopped"]
        assert machine.run(timeout=PATIENCE, max_exits=5).outcome == "max-exits"


def test_a_vcpu_moves_from_thread_to_thread() -> None:
    with real(WRITE_FOREVER) as machine:
        for _ in range(30):
            (result,) = all_at_once(lambda: machine.run(timeout=PATIENCE, max_exits=3))
            assert result.outcome == "max-exits"
            (result,) = all_at_once(lambda: machine.run(timeout=0.001))
            assert result.outcome == "timeout"
        assert machine.run(timeout=0.001).outcome == "timeout"


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_running_machine_cannot_be_closed(cpus: int) -> None:
    """Whichever of its vCPUs is running: nothing is closed then."""
    machine = Machine("1M", cpus=cpus)
    machine.load(SPIN)
    with running(machine, cpus - 1) as results:
        for _ in range(3):
            with pytest.raises(ConfigError, match="is running: stop it before closing it"):
                machine.close()
        assert not any(part.closed for part in (machine.kvm, machine.vm, *machine.cpus))
        assert not results
    assert [result.outcome for result in results] == ["stopped"]
    if cpus == 2:  # the stop was for both, and the other one has not run yet
        assert machine.run(timeout=PATIENCE).outcome == "stopped"
    assert machine.run(timeout=0.001).outcome == "timeout"
    machine.close()
    assert all(part.closed for part in (machine.kvm, machine.vm, *machine.cpus))


def test_leaving_a_running_machine_by_an_exception_does_not_hide_it() -> None:
    machine = real(SPIN)
    with running(machine) as results:
        with pytest.raises(LookupError) as caught, machine:
            raise LookupError("the caller's own")
        assert any("is running" in note for note in caught.value.__notes__)
        assert not results
    machine.close()


def test_closing_races_with_starting() -> None:
    """Either it runs, or it is closed; never a run on what was unmapped."""
    with hasty_switching():
        for _ in range(150):
            machine = real(b"\xf4")

            def run(machine: Machine = machine) -> str:
                try:
                    return machine.run(timeout=PATIENCE).outcome
                except ValueError as error:  # closed, or running
                    return type(error).__name__

            def close(machine: Machine = machine) -> str:
                try:
                    machine.close()
                    return "closed"
                except ConfigError:
                    return "running"

            ran, closed = all_at_once(run, close)
            assert ran in ("halt", "ClosedError")
            assert closed in ("closed", "running")
            machine.close()


# Two machines -------------------------------------------------------------------------------


def test_two_machines_on_two_threads() -> None:
    traces: list[list[int]] = [[], []]
    with real(WRITE_FOREVER) as first, real(WRITE_FOREVER) as second:
        for machine, trace in zip((first, second), traces, strict=True):
            machine.on_port(0x10)(lambda offset, size, value, trace=trace: trace.append(value))
        runs = [lambda m=m: m.run(PATIENCE, max_exits=2000) for m in (first, second)]
        results = all_at_once(*runs)
        assert [result.outcome for result in results] == ["max-exits", "max-exits"]
    assert traces == [[n % 256 for n in range(2000)]] * 2


def test_stopping_one_machine_leaves_the_other_alone() -> None:
    with real(SPIN) as first, real(SPIN) as second, running(first) as one, running(second) as two:
        first.stop()
        until = time.monotonic() + PATIENCE
        while not one and time.monotonic() < until:
            time.sleep(0.001)
        assert [result.outcome for result in one] == ["stopped"]
        time.sleep(0.02)
        assert not two


# One inside of another ----------------------------------------------------------------------


def test_a_device_runs_another_machine() -> None:
    outcomes: list[str] = []
    with real(WRITE_FOREVER) as outer, real(WRITE_FOREVER) as inner:

        @inner.on_port(0x10)
        def inside(offset: int, size: int, value: int | None) -> None:
            pass

        @outer.on_port(0x10)
        def outside(offset: int, size: int, value: int | None) -> None:
            outcomes.append(inner.run(timeout=PATIENCE, max_exits=3).outcome)
            outcomes.append(inner.run(timeout=0.002).outcome)

        result = outer.run(timeout=PATIENCE, max_exits=5)
        assert result.outcome == "max-exits"
        assert result.exits == {"port-out": 5}
        assert outcomes == ["max-exits", "timeout"] * 5
        assert outer.run(timeout=0.001).outcome == "timeout"


def test_the_outer_machine_is_stopped_from_inside() -> None:
    with real(WRITE_FOREVER) as outer, real(WRITE_FOREVER) as inner:
        for cpu in (*outer.cpus, *inner.cpus):
            cpu.loop.heartbeat_ns = 3600 * 10**9  # no help from there

        @inner.on_port(0x10)
        def inside(offset: int, size: int, value: int | None) -> None:
            outer.stop()
            if value == 3:
                inner.stop()

        outcomes = []

        @outer.on_port(0x10)
        def outside(offset: int, size: int, value: int | None) -> None:
            outcomes.append(inner.run(timeout=PATIENCE).outcome)

        assert outer.run(timeout=PATIENCE).outcome == "stopped"
        assert outcomes == ["stopped"]


def test_an_outer_deadline_is_met_after_the_inner_run() -> None:
    with real(WRITE_FOREVER) as outer, real(SPIN) as inner:

        @outer.on_port(0x10)
        def outside(offset: int, size: int, value: int | None) -> None:
            assert inner.run(timeout=0.05).outcome == "timeout"

        result = outer.run(timeout=0.02)
        assert (result.outcome, result.exits) == ("timeout", {"port-out": 1})


def test_a_machine_cannot_run_inside_of_itself() -> None:
    errors: list[str] = []
    with real(WRITE_FOREVER) as machine:

        @machine.on_port(0x10)
        def device(offset: int, size: int, value: int | None) -> None:
            for use in (
                lambda: machine.run(timeout=1),
                lambda: machine.cpus[0].run(timeout=1),
                lambda: next(machine.exits(timeout=1)),
                machine.close,
            ):
                try:
                    use()
                except ConfigError as error:
                    errors.append(str(error))

        result = machine.run(timeout=PATIENCE, max_exits=4)
        assert (result.outcome, result.exits) == ("max-exits", {"port-out": 4})
        already, closing = errors[0], errors[3]
        assert errors == [already, already, already, closing] * 4
        assert "vCPU 0 is already running" in already
        assert "vCPU 0 is running: stop it before closing" in closing
        assert machine.run(timeout=0.001).outcome == "timeout"


def test_watching_lets_the_machine_run_between_two_exits() -> None:
    with real(WRITE_FOREVER) as machine:
        watching = machine.exits(timeout=PATIENCE)
        assert next(watching) == PortOut(0x10, 1, b"\x00")
        assert machine.run(timeout=PATIENCE, max_exits=2).exits == {"port-out": 2}
        assert next(watching) == PortOut(0x10, 1, b"\x03")
        machine.stop()
        assert list(watching) == [Interrupted("stopped")]


# Devices that come and go on another thread -------------------------------------------------


@pytest.mark.slow
def test_claims_change_on_another_thread_while_the_guest_runs() -> None:
    """Devices next to those that the guest uses come and go; each access finds its own."""
    code = bytes.fromhex(
        "b80020 8ed8"  # mov ax, 0x2000; mov ds, ax
        "a00000 3c5a 750f"  # again: mov al, [0]; cmp al, 0x5a; jne out
        "a00008 3ca5 7508"  # mov al, [0x800]; cmp al, 0xa5; jne out
        "e410 3c77 7502"  # in al, 0x10; cmp al, 0x77; jne out
        "ebea f4"  # jmp again; out: hlt
    )
    done = threading.Event()
    with hasty_switching(), real(code) as machine:
        machine.on_mmio(MMIO, 0x100)(lambda offset, size, value: 0x5A)
        machine.attach_mmio(MMIO + 0x800, 0x100, Constant(0xA5))
        machine.on_port(0x10)(lambda offset, size, value: 0x77)

        def churn() -> int:
            changes = 0
            while not done.is_set():
                claims: list[Claim] = []
                for number in range(8):
                    at = 0x100 * number
                    claims.append(machine.attach_mmio(MMIO - 0x1000 + at, 0x100, Constant(1)))
                    claims.append(machine.attach_mmio(MMIO + 0x1000 + at, 0x100, Constant(1)))
                    claims.append(machine.attach_port(0x11 + number, 1, Constant(1)))
                for claim in claims:
                    machine.detach(claim)
                changes += len(claims)
            return changes

        def run() -> Result:
            try:
                return machine.run(timeout=1.0)
            finally:
                done.set()

        result, changes = all_at_once(run, churn)
        assert result.outcome == "timeout", result
        assert result.unclaimed == ()
        assert changes > 100
        assert result.exits["mmio-read"] > 100


def finishable() -> Machine:
    """At an exit that KVM has yet to finish, being recorded."""
    machine = real(WRITE_FOREVER, devices=False)
    machine.trace.start(64)
    assert machine.run(max_exits=1).outcome == "max-exits"
    return machine


def test_what_one_thread_finishes_is_not_run_finished_or_closed_by_another() -> None:
    with finishable() as machine:
        (cpu,) = machine.cpus
        snapshot = machine.snapshot()
        for _ in range(2):
            machine.reset_to(snapshot)
            machine.run(max_exits=1)
        cpu.loop.finishing = 1  # as in the middle of another thread's kvmpy_finish()
        with pytest.raises(ConfigError, match="finished by another thread"):
            cpu.finish()
        with pytest.raises(ConfigError, match="already running"):
            machine.run(max_exits=1)
        with pytest.raises(ConfigError, match="finished by another thread"):
            machine.reset_to(snapshot)
        machine.trace.start(64)
        assert len(cpu.keeps) == 2  # that thread may be filling the first one
        closer = threading.Thread(target=machine.close)
        closer.start()
        closer.join(0.05)
        assert closer.is_alive() and not machine.vm.closed
        cpu.loop.finishing = 0
        closer.join(PATIENCE)
        assert machine.vm.closed
    with finishable() as machine:
        machine.cpus[0].finish()
        assert machine.run(max_exits=1).outcome == "max-exits"


STORM = """
import threading, time
from kvmpy import KvmpyError
from tests.test_threads import finishable

machines, until = [finishable()], time.monotonic() + 0.7

def finish():
    while time.monotonic() < until:
        try:
            machines[-1].run(max_exits=1)
            machines[-1].cpus[0].finish()
        except KvmpyError:
            pass

def close():
    while time.monotonic() < until:
        try:
            machines.append(finishable())
            machines.pop(0).close()
        except KvmpyError:
            pass

threads = [threading.Thread(target=one) for one in (finish, finish, close)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_machines_that_threads_finish_exits_of_are_closed_without_a_crash() -> None:
    command = [sys.executable, "-W", "ignore", "-c", STORM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
