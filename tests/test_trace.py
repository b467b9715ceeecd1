"""The recorder: what the C loop writes, and that nothing is lost without a count."""

import gc
import signal
import threading
import time
from itertools import pairwise

import pytest

from kvmpy import ConfigError, Interrupted, Machine, MmioRead, PortIn, assemble
from kvmpy.abi import lib
from kvmpy.devices.native import Capture, Constant, Sink
from kvmpy.trace import Record

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("kvm_host")

PORT = 0x42
LOOP = bytes.fromhex("ba 42 00 00 00  ee  fe c0  eb fb")
"""mov edx, 0x42; again: out dx, al; inc al; jmp again"""


def machine(code: bytes = LOOP, **options) -> Machine:
    made = Machine("1M", **options)
    made.load(code, at=0x1000)
    return made


def exits(records) -> list[Record]:
    return [one for one in records if one.kind != "interrupted"]


def test_a_record_for_each_exit_with_all_that_is_known() -> None:
    code = assemble(
        "mov al, 'A'; out 0x42, al; in ax, 0x43; mov eax, [0x2000000]; out 0x99, al; hlt", at=0x1000
    )
    with machine(code) as made:
        made.attach_port(0x43, 1, Constant(0xBEEF))
        written = []
        made.on_port(PORT)(lambda offset, size, value: written.append(value))
        made.on_mmio(0x2000000)(lambda offset, size, value: 0xC0FFEE)
        made.trace.start()
        before = time.monotonic_ns()
        result = made.run(timeout=5)
        after = time.monotonic_ns()
        made.trace.stop()
        records = exits(made.trace)
        assert [(one.kind, one.address, one.size, one.value, one.level) for one in records] == [
            ("port-out", PORT, 1, ord("A"), "Python"),
            ("port-in", 0x43, 2, 0xBEEF, "C"),
            ("mmio-read", 0x2000000, 4, 0xC0FFEE, "Python"),
            ("port-out", 0x99, 1, 0xEE, "nobody"),
            ("halt", None, 0, None, "caller"),
        ]
        assert [one.text for one in records] == [
            "<lambda> <- 0x41",
            "constant -> 0xbeef",
            "<lambda> +0x0 -> 0x00c0ffee",
            "nobody <- 0xee",
            "",
        ]
        times = [moment for one in made.trace for moment in (one.entered, one.left)]
        assert times == sorted(times)
        assert before <= times[0] <= times[-1] <= after
        assert [one.number for one in made.trace] == list(range(len(made.trace)))
        assert [one.starts for one in records] == [True] + 4 * [False]
        if made.cpus[0].sync_regs:
            assert records[-1].rip == result.registers.rip
        counts = {one.kind: 0 for one in records}
        for one in made.trace.tallies():
            counts[one.kind] += one.exits
        assert counts == result.exits
        made.run(max_exits=1)
        assert len(exits(made.trace)) == 5  # it was stopped


def test_off_there_is_nothing() -> None:
    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        made.run(max_exits=10)
        assert len(made.trace) == made.trace.dropped == 0
        assert list(made.trace) == made.trace.tallies() == []
        assert not made.trace.recording
        assert len(made.trace.view) == 0


@pytest.mark.parametrize("records", [1, 64, 65, 128])
def test_wrapping_keeps_the_newest_in_one_piece(records: int) -> None:
    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        made.trace.start(records)
        room = made.trace.rings[0].capacity
        assert room == -(-records // 64) * 64
        made.run(max_exits=room - 1)
        assert made.trace.dropped == 0
        made.run(max_exits=250)
        total = made.trace[-1].number + 1
        assert len(made.trace) == len(made.trace.view) == room
        assert made.trace.dropped == total - room
        numbers = list(range(total - room, total))
        assert made.trace.view["number"].tolist() == numbers
        assert [one.number for one in made.trace] == numbers
        values = [one.value for one in exits(made.trace)]
        assert all((old + 1) % 256 == new for old, new in pairwise(values))


def test_stopping_when_full_keeps_the_oldest_and_counts_the_rest() -> None:
    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        made.trace.start(64, when_full="stop")
        made.run(max_exits=200)
        assert [one.number for one in made.trace] == list(range(64))
        assert made.trace.dropped == 200 + made.trace.totals().interrupted - 64
        assert made.trace.tallies()[0].exits == 200  # counts go on


def test_counting_only() -> None:
    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        made.trace.start(records=0)
        made.run(max_exits=1000)
        assert len(made.trace) == made.trace.dropped == 0
        (one,) = made.trace.tallies()
        assert (one.kind, one.address, one.exits) == ("port-out", PORT, 1000)
        totals = made.trace.totals()
        assert one.inside_ns <= totals.inside_ns
        assert 0 < one.outside_ns <= totals.outside_ns
        with pytest.raises(ConfigError, match="sink"):
            made.trace.start(records=0, sink=print)
        assert len(made.trace.view) == 0


def test_addresses_beyond_the_table_are_counted_together() -> None:
    count = 5000
    code = assemble(f"mov ecx, {count}; l: mov [rcx*8+0x2000000], al; dec ecx; jnz l; hlt")
    with machine(code) as made:
        made.attach_mmio(0x2000000, 0x10000, Sink())
        made.trace.start(records=0)
        assert made.run(timeout=20).outcome == "halt"
        found = made.trace.tallies()
        assert sum(one.exits for one in found) == count + 1
        assert found[0].kind == "other"
        assert len(found) > 4000


@pytest.mark.parametrize("size", [1, 2])
def test_string_instructions_have_their_number_and_a_digest_of_all_elements(size: int) -> None:
    def digests(last: int) -> list[Record]:
        letter = {1: "b", 2: "w"}[size]
        code = assemble(f"mov edx, 0x42; mov edi, 0x3000; mov ecx, 5; rep ins{letter}; hlt")
        values = iter([1, 2, 3, 4, last])
        with machine(code) as made:
            made.on_port(PORT)(lambda offset, size, value: next(values))
            made.trace.start()
            assert made.run(timeout=5).outcome == "halt"
            return exits(made.trace)[:-1]

    one, other, again = digests(5), digests(6), digests(5)
    assert sum(record.elements for record in one) == 5
    assert one[0].value == 1
    if one[0].elements == 1:
        pytest.skip("this host's KVM gives string instructions an element at a time")
    assert [record.digest for record in one] == [record.digest for record in again]
    assert [record.digest for record in one] != [record.digest for record in other]
    assert "and 4 more" in one[0].text


def test_a_full_capture_is_left_to_python_and_recorded_so() -> None:
    with machine() as made:
        capture = Capture(8)
        made.attach_port(PORT, 1, capture)
        made.trace.start()
        made.run(max_exits=18)
        levels = [one.level for one in exits(made.trace)]
        assert levels == (8 * ["C"] + ["Python"]) * 2
        assert len(capture.data()) == 18


# The teaching path ----------------------------------------------------------------------------


def test_exits_and_vcpu_run_are_recorded() -> None:
    code = assemble("out 0x42, al; in al, 0x43; mov eax, [0x2000000]; hlt")
    with machine(code) as made:
        made.on_port(0x43)(lambda offset, size, value: 0x55)
        made.trace.start()
        walk = made.exits(timeout=5)
        next(walk)
        assert isinstance(next(walk), PortIn)
        walk.close()
        cpu = made.cpus[0]
        assert made.trace[1].value is None  # carried out when the guest goes on
        assert isinstance(cpu.run(timeout=5), MmioRead)
        cpu.reply(b"\x78\x56\x34\x12")
        cpu.run(timeout=5)
        records = exits(made.trace)
        assert [one.kind for one in records] == ["port-out", "port-in", "mmio-read", "halt"]
        assert [one.value for one in records] == [0, 0x55, 0x12345678, None]
        assert {one.level for one in records} == {"caller"}
        assert all(one.starts for one in records)


def test_a_sink_sees_exits_with_their_answers() -> None:
    code = assemble("in al, 0x43; in al, 0x43; hlt")
    with machine(code) as made:
        values = iter([7, 8])
        made.on_port(0x43)(lambda offset, size, value: next(values))
        seen: list[Record] = []
        made.trace.start(sink=seen.append)
        assert [type(one).__name__ for one in made.exits(timeout=5)] == ["PortIn", "PortIn", "Halt"]
        assert len(exits(seen)) == 3  # as they came
        made.trace.stop()
        assert [one.value for one in exits(seen)] == [7, 8, None]


# What goes wrong ------------------------------------------------------------------------------


def test_an_exception_in_a_device_leaves_the_read_open_until_it_is_answered() -> None:
    with machine(assemble("in al, 0x42; hlt")) as made:

        @made.on_port(PORT)
        def device(offset: int, size: int, value: int | None) -> int:
            raise ValueError("broken")

        made.trace.start()
        with pytest.raises(ValueError, match="broken"):
            made.run(timeout=5)
        (read,) = exits(made.trace)
        assert (read.kind, read.value, read.level) == ("port-in", None, "Python")
        assert read.text == "device -> ?"
        result = made.run(timeout=5)
        read, halt = exits(made.trace)
        assert read.value == result.registers.rax & 0xFF == 0xFF  # what the guest came to see
        assert (halt.kind, halt.starts) == ("halt", True)


def test_the_last_exit_of_a_run_has_its_value() -> None:
    with machine(assemble("in al, 0x42; hlt")) as made:
        made.attach_port(PORT, 1, Constant(0x31))
        made.trace.start()
        made.run(max_exits=1)
        assert made.trace[-1].value == 0x31
    with machine(assemble("in al, 0x42; hlt")) as made:

        @made.on_port(PORT)
        def device(offset: int, size: int, value: int | None) -> int:
            made.stop()
            return 0x32

        made.trace.start()
        assert made.run(timeout=5).outcome == "stopped"
        assert exits(made.trace)[-1].value == 0x32


def test_entries_that_signals_end_are_recorded_as_such() -> None:
    with machine(b"\xeb\xfe") as made:
        made.trace.start()
        assert made.run(timeout=0.2).outcome == "timeout"
        kinds = [one.kind for one in made.trace]
        assert set(kinds) == {"interrupted"}
        assert made.trace.totals().interrupted == len(kinds) >= 2
        assert sum(one.inside for one in made.trace) == made.trace.totals().inside_ns
        assert made.trace.tallies() == []
        assert isinstance(made.cpus[0].run(timeout=0.01), Interrupted)
        assert len(made.trace) > len(kinds)


def test_a_python_signal_handler_that_raises_loses_nothing() -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with machine() as made:
            seen: list[int] = []
            made.on_port(PORT)(lambda offset, size, value: seen.append(value))
            made.trace.start(1 << 16)
            in_device = 0  # where it may have come before the value was noted
            for _ in range(5):
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                with pytest.raises(Alarm) as caught:
                    made.run(timeout=20)
                in_device += hasattr(caught.value, "__notes__")
            made.run(max_exits=1)
            recorded = [one.value for one in exits(made.trace)]
            assert len(seen) <= len(recorded) <= len(seen) + in_device
            rest = iter(recorded)
            assert all(value in rest for value in seen)  # in that order, and none is missing
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Sinks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_a_sink_gets_every_record_of_a_ring_that_is_much_too_small(native: bool) -> None:
    with machine() as made:
        if native:
            made.attach_port(PORT, 1, Sink())
        else:
            made.on_port(PORT)(lambda offset, size, value: None)
        seen: list[Record] = []
        made.trace.start(1, sink=seen.append)
        made.run(max_exits=1000)
        assert len(exits(seen)) == 1000
        assert [one.number for one in seen] == list(range(len(seen)))
        assert made.trace.dropped == 0
        assert len(made.trace) == 0
        assert [one.value for one in exits(seen)] == [at % 256 for at in range(1000)]
        assert seen[64].starts  # what the sink took before it is no time of the device's
        assert not seen[65].starts


def test_nobody_drains_vcpu_run_so_drops_are_counted() -> None:
    with machine() as made:
        seen: list[Record] = []
        made.trace.start(64, sink=seen.append)
        for _ in range(100):
            made.cpus[0].run(timeout=5)
        made.trace.stop()
        assert len(seen) == 64
        assert made.trace.dropped >= 36


def test_an_exception_of_a_sinks_reaches_the_caller_once() -> None:
    def full(record: Record) -> None:
        raise OSError("no room")

    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        made.trace.start(sink=full)
        with pytest.raises(OSError, match="no room"):
            made.run(max_exits=10)
        with pytest.raises(OSError, match="no room"):
            made.trace.stop()
        made.trace.stop()
        assert made.run(max_exits=10).outcome == "max-exits"


def test_a_device_may_start_and_stop_the_recorder() -> None:
    with machine() as made:

        @made.on_port(PORT)
        def device(offset: int, size: int, value: int) -> None:
            if value == 10:
                made.trace.start()
            if value == 20:
                made.trace.stop()

        made.run(max_exits=50)
        assert [one.value for one in exits(made.trace)] == list(range(11, 21))


# vCPUs, views, life ---------------------------------------------------------------------------


def test_two_vcpus_have_a_ring_each() -> None:
    with machine(cpus=2) as made:
        made.attach_port(PORT, 1, Sink())
        made.trace.start(4096)
        threads = [
            threading.Thread(target=made.run, kwargs={"max_exits": count, "cpu": cpu})
            for cpu, count in ((0, 300), (1, 500))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        records = exits(made.trace)
        assert [sum(one.cpu == cpu for one in records) for cpu in (0, 1)] == [300, 500]
        assert [one.left for one in records] == sorted(one.left for one in records)
        assert made.trace.tallies()[0].exits == 800
        for cpu in (0, 1):
            values = [one.value for one in records if one.cpu == cpu]
            assert values == [at % 256 for at in range(len(values))]
            assert len(made.trace.rings[cpu].view) == len(made.trace.rings[cpu])
        with pytest.raises(ConfigError, match="rings"):
            made.trace.view  # noqa: B018


def test_a_view_is_the_ring_itself_and_outlives_everything() -> None:
    made = machine()
    made.attach_port(PORT, 1, Sink())
    made.trace.start(64)
    made.run(max_exits=64)
    view = made.trace.view
    first = view["value"].copy()
    with pytest.raises(ValueError, match="read-only"):
        view["value"][0] = 1
    made.run(max_exits=64)  # it wraps, under the view
    assert (view["number"] >= 64).all()
    kept = view["number"].copy()
    made.trace.clear()
    assert len(made.trace) == made.trace.dropped == 0
    made.run(max_exits=10)
    assert len(exits(made.trace)) == 10
    text = list(made.trace)
    made.close()
    assert list(made.trace) == text  # readable after closing, as a Result is
    del made
    gc.collect()
    assert (view["number"] == kept).all()
    assert len(first) == 64


def test_starting_anew_while_another_thread_runs_is_safe() -> None:
    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        thread = threading.Thread(target=made.run, kwargs={"timeout": 20})
        made.trace.start(64)
        thread.start()
        until = time.monotonic() + 10
        while not made.cpus[0].loop.running and time.monotonic() < until:
            time.sleep(0.001)  # a thread may take its time until it is there
        for _ in range(5):
            made.trace.start(64)
        gc.collect()
        assert len(made.cpus[0].keeps) > 2  # the thread may be filling any of them
        made.stop()
        thread.join()
        made.trace.start(64)
        assert len(made.cpus[0].keeps) == 1
        made.run(max_exits=5)
        assert len(exits(made.trace)) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"records": -1},
        {"records": 1 << 40},
        {"records": 1 << 40, "sink": print},
        {"records": 1.5},
        {"records": None, "sink": print},
        {"when_full": "hand"},
        {"when_full": "x"},
        {"sink": "x"},
    ],
)
def test_bad_options_change_nothing(options) -> None:
    with machine() as made:
        for _ in range(2):
            with pytest.raises(ConfigError):
                made.trace.start(**options)
            made.trace.stop()
            made.trace.clear()
            made.trace.start(64)
        with pytest.raises(ConfigError):
            made.trace.start(**options)
        made.run(max_exits=5)
        assert len(exits(made.trace)) == 5


def test_recording_does_not_disturb_sampling() -> None:
    from kvmpy.abi import ffi

    with machine() as made:
        made.attach_port(PORT, 1, Sink())
        made.trace.start()
        loop, room = made.cpus[0].loop, ffi.new("uint64_t[]", 20)
        loop.samples, loop.sample_room = room, 10
        loop.watch |= lib.KVMPY_SAMPLE
        made.run(max_exits=10)
        loop.watch &= ~lib.KVMPY_SAMPLE
        loop.samples = ffi.NULL
        assert loop.sample_count == 10
        assert made.trace.tallies()[0].exits == 10
        for at, one in enumerate(exits(made.trace)):
            assert room[2 * at] <= one.entered <= one.left <= room[2 * at + 1]


def test_a_snapshot_in_between_is_no_gap_and_no_crash() -> None:
    def attach(machine: Machine) -> None:
        machine.attach_port(PORT, 1, Constant(5))

    with machine(assemble("in al, 0x42; out 0x43, al; hlt")) as made:
        attach(made)
        made.trace.start()
        made.run(max_exits=1)
        saved = made.snapshot()
        made.run(timeout=5)
        made.reset_to(saved)
        assert made.run(timeout=5).outcome == "halt"
        kinds = [one.kind for one in exits(made.trace)]
        assert kinds == ["port-in", "port-out", "halt", "port-out", "halt"]
        with Machine.from_snapshot(saved, attach) as other:
            other.trace.start()
            other.run(timeout=5)
            assert [one.kind for one in exits(other.trace)] == ["port-out", "halt"]
