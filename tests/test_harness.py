"""The harness: a device by itself, and with guests that are copied and reset."""

import copy
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmpy
from kvmpy import AddressError, ConfigError, Entropy, Harness, Machine, Snapshot, assemble, runs
from kvmpy.devices import EndRun
from kvmpy.devices.harness import ADDRESS, IDENTITY, SIZE, Offset

ROOT = Path(__file__).parent.parent
KEPT = [Offset.BUFFER, Offset.BUFFER_SIZE, Offset.MAP, Offset.MAP_SIZE, Offset.CRASH_ADDRESS]
needs_kvm = pytest.mark.usefixtures("kvm_host")


# The device by itself --------------------------------------------------------------------------


class Attached:
    """Stands for a machine: remembers what is attached, and how runs ended."""

    def __init__(self, harness: Harness) -> None:
        self.claims: list[tuple[str, int, int, Any]] = []
        self.ends: list[tuple[str, str, int | None]] = []
        harness.attach(self)  # type: ignore[arg-type]

    def attach_port(self, base: int, size: int, device: Any) -> None:
        self.claims.append(("port", base, size, device))

    def attach_mmio(self, base: int, size: int, device: Any) -> None:
        self.claims.append(("mmio", base, size, device))

    def end_run(self, outcome: str, detail: str = "", value: int | None = None) -> None:
        self.ends.append((outcome, detail, value))


accesses = st.tuples(st.sampled_from(KEPT), st.sampled_from([1, 2, 4, 8])).flatmap(
    lambda pair: st.tuples(
        st.integers(0, 8 // pair[1] - 1).map(lambda piece: pair[0] + piece * pair[1]),
        st.just(pair[1]),
        st.integers(0, (1 << 8 * pair[1]) - 1),
    )
)


@given(st.lists(accesses))
def test_registers_are_memory_in_pieces(writes: list[tuple[int, int, int]]) -> None:
    harness, memory = Harness(), bytearray(SIZE)
    for offset, size, value in writes:
        harness.write(offset, size, value)
        memory[offset : offset + size] = value.to_bytes(size, "little")
        assert harness.read(offset, size) == value
    for offset in KEPT:
        for size in (1, 2, 4, 8):
            expected = int.from_bytes(memory[offset : offset + size], "little")
            assert harness.read(offset, size) == expected


def test_what_a_guest_says_is_seen_and_saved() -> None:
    harness = Harness()
    attached = Attached(harness)
    assert not harness.ready and harness.coverage is None
    values = {Offset.BUFFER: 0x5000, Offset.BUFFER_SIZE: 100, Offset.MAP: 0x7000}
    for register, value in {**values, Offset.MAP_SIZE: 4096, Offset.READY: 1}.items():
        harness.write(register, 8, value)
    assert (harness.buffer, harness.buffer_size, harness.ready) == (0x5000, 100, True)
    assert harness.coverage == (0x7000, 4096)
    assert attached.ends == [("ready", "", 1)]
    assert harness.read(Offset.IDENTITY, 8) == IDENTITY
    other = Harness()
    other.load_state(harness.save_state())
    assert (other.buffer, other.coverage, other.ready) == (0x5000, (0x7000, 4096), True)


@pytest.mark.parametrize("where", ["port", "mmio"])
def test_done_is_a_device_that_c_serves(where: str) -> None:
    harness = Harness(port=0x500) if where == "port" else Harness()
    attached = Attached(harness)
    base = 0x500 if where == "port" else ADDRESS
    (kind, first, size, device), (other_kind, done, rest, ending) = attached.claims
    assert (kind, first, device) == (where, base, harness)
    assert (other_kind, done) == (where, base + Offset.DONE) and size + rest == SIZE
    assert isinstance(ending, EndRun)
    harness.write(Offset.CRASH, 4, 9)
    harness.write(Offset.CRASH_ADDRESS, 8, 0x1234)
    harness.write(Offset.CRASH, 8, 10)
    assert attached.ends == [
        ("crash", "code 9", 9),
        ("crash", "code 10 at 0x1234", 10),
    ]


def test_inputs_have_their_length_and_must_fit() -> None:
    harness = Harness()
    harness.write(Offset.BUFFER_SIZE, 8, 12)
    assert harness.pack(b"abcd") == b"\4\0\0\0\0\0\0\0abcd"
    with pytest.raises(AddressError, match="5 bytes does not fit"):
        harness.pack(b"abcde")


def test_the_header_and_the_documentation_have_the_same_registers() -> None:
    header = (ROOT / "guests/c/kvmpy_harness.h").read_text()
    found = re.findall(r"^    KVMPY_HARNESS_(\w+) = (0x\w+),$", header, re.MULTILINE)
    names = {"ID": "IDENTITY"}
    assert {names.get(name, name): int(at, 16) for name, at in found} == {
        one.name: one.value for one in Offset
    }
    assert f"{IDENTITY:#x}ull" in header and f"{ADDRESS:#x}u" in header
    rows = re.findall(
        r"^\| (0x\w\w) \| (\w+) \|", (ROOT / "docs/harness.md").read_text(), re.MULTILINE
    )
    assert [(int(at, 16), name) for at, name in rows] == [(one.value, one.name) for one in Offset]


def pickled(harness: Harness) -> Harness:
    made: Harness = pickle.loads(pickle.dumps(harness.attach)).__self__
    return made


# Entropy ---------------------------------------------------------------------------------------


def generations(harness: Harness, count: int) -> list[tuple[int, bytes]]:
    found = []
    for _ in range(count):
        harness.load_state(harness.save_state())
        assert harness.read(Offset.GENERATION, 8) == harness.read(Offset.GENERATION, 8)
        found.append((harness.generation, harness.read(Offset.ENTROPY, 8).to_bytes(8, "little")))
    return found


@pytest.mark.parametrize("make", [Entropy, lambda: Entropy(5)])
def test_generations_differ_also_among_harnesses(make: Callable[[], Entropy]) -> None:
    entropy = make()
    found = [one for _ in range(3) for one in generations(Harness(entropy), 10)]
    assert len({number for number, _ in found}) == len({data for _, data in found}) == 30


def test_bytes_differ_within_a_generation() -> None:
    for entropy in (Entropy(), Entropy(1), Entropy(1, fixed=True)):
        harness = Harness(entropy)
        assert len({harness.random(8) for _ in range(100)}) == 100


def test_a_seed_makes_them_the_same_again() -> None:
    assert generations(Harness(Entropy(5)), 10) == generations(Harness(Entropy(5)), 10)
    assert generations(Harness(Entropy(5)), 1) != generations(Harness(Entropy(6)), 1)
    assert generations(Harness(), 1) != generations(Harness(), 1)


def test_fixed_generations_are_alike() -> None:
    assert len(set(generations(Harness(Entropy(5, fixed=True)), 10))) == 1
    with pytest.raises(ConfigError, match="seed"):
        Entropy(fixed=True)


def test_a_copy_of_entropy_begins_with_the_first_generation() -> None:
    for entropy in (Entropy(5), Entropy(5, fixed=True)):
        copied: Entropy = pickle.loads(pickle.dumps(entropy))
        assert generations(Harness(copied), 3) == generations(Harness(entropy), 3)
    unseeded: Entropy = pickle.loads(pickle.dumps(Entropy()))
    assert generations(Harness(unseeded), 3) != generations(Harness(unseeded), 3)


# With guests -----------------------------------------------------------------------------------

INPUT = 0x8000
ASKING = f"""
mov ebx, {ADDRESS}
mov [rbx + {Offset.READY.value}], eax
mov r8, [rbx + {Offset.GENERATION.value}]
mov r9, [rbx + {Offset.ENTROPY.value}]
mov r10, [rbx + {Offset.GENERATION.value}]
mov r11, [rbx + {Offset.ENTROPY.value}]
mov [rbx + {Offset.DONE.value}], rax
"""


def ready(source: str, harness: Harness, ring: int) -> Snapshot:
    with Machine("1M", ring=ring) as machine:
        harness.attach(machine)
        machine.load(assemble(source, mode="long", at=0x1000))
        assert machine.run(timeout=10).outcome == "ready"
        return machine.snapshot()


def asked(machine: Machine) -> tuple[int, int, int]:
    result = machine.run(timeout=10)
    assert result.outcome == "ended" and result.registers.r8 == result.registers.r10
    return result.registers.r8, result.registers.r9, result.registers.r11


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("seed", [None, 3])
@needs_kvm
def test_every_copy_and_every_return_is_another_generation(ring: int, seed: int | None) -> None:
    def all_of_them() -> list[tuple[int, int, int]]:
        entropy, found = Entropy(seed), []
        snapshot = ready(ASKING, Harness(entropy), ring)

        def attach(machine: Machine) -> None:
            Harness(entropy).attach(machine)

        for _ in range(2):
            with Machine.from_snapshot(snapshot, attach) as clone:
                found.append(asked(clone))
                clone.restore(snapshot)
                found.append(asked(clone))
                for _ in range(2):
                    clone.reset_to(snapshot)
                    found.append(asked(clone))
                clone.reset_to(snapshot)
                with clone.fork(attach) as fork:
                    found.append(asked(fork))
        return found

    found = all_of_them()
    assert len({number for number, _, _ in found}) == len(found)
    assert len({one for _, *random in found for one in random}) == 2 * len(found)
    assert (all_of_them() == found) == (seed is not None)


@pytest.mark.parametrize("batch", [1, 3, 16])
@needs_kvm
def test_each_run_that_asks_has_a_generation_of_its_own(batch: int) -> None:
    # An input of 1 asks, and one of 0 does not.
    source = f"""
    mov ebx, {ADDRESS}
    mov [rbx + {Offset.READY.value}], eax
    cmp byte ptr [{INPUT}], 0
    je done
    mov r8, [rbx + {Offset.GENERATION.value}]
    mov r9, [rbx + {Offset.ENTROPY.value}]
    done:
    mov [rbx + {Offset.DONE.value}], r8
    """
    found = []
    for _ in range(2):
        harness = Harness(Entropy(1))
        snapshot = ready(source, harness, 3)
        inputs = [bytes([number % 3 > 0]) for number in range(20)]
        outcomes = runs(snapshot, inputs, INPUT, timeout=10, batch=batch, attach=harness.attach)
        found.append([(one.value, one.registers.r9) for one in outcomes if one.input != b"\0"])
    assert found[0] == found[1]
    assert len(set(found[0])) == len(found[0]) == 13
    fresh = Harness(Entropy(1))
    expected = [(number, int.from_bytes(data, "little")) for number, data in generations(fresh, 13)]
    assert found[0] == expected  # whatever the batch


@pytest.mark.parametrize("batch", [1, 5])
@needs_kvm
def test_the_shipped_guest_adds_up_its_inputs(batch: int) -> None:
    harness = Harness()
    with Machine.from_image("harness", strict=True) as machine:
        harness.attach(machine)
        assert machine.run(timeout=10).outcome == "ready"
        snapshot = machine.snapshot()
    data = [bytes(range(number)) for number in range(40)] + [b"\xff" * 1000, b""]
    inputs = [harness.pack(one) for one in data]
    found = list(
        runs(snapshot, inputs, harness.buffer, timeout=10, batch=batch, attach=harness.attach)
    )
    for one, given_ in zip(found, data, strict=True):
        expected = ("ended", sum(given_)) if given_ else ("crash", 1)
        assert (one.outcome, one.value, one.crashed) == (*expected, not given_)
    assert re.fullmatch("code 1 at 0x10..", found[0].detail)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
@needs_kvm
def test_an_attached_harness_is_copied_without_its_machine(
    again: Callable[[Harness], Harness],
) -> None:
    harness = Harness(Entropy(1))
    with Machine("1M", ring=3) as machine:
        harness.attach(machine)
        machine.load(assemble(ASKING, mode="long", at=0x1000))
        assert machine.run(timeout=10).outcome == "ready"
        assert machine.run(timeout=10).outcome == "ended"
        mine = again(harness)
        assert mine.ready and mine.save_state() == harness.save_state()
        mine.write(Offset.BUFFER, 8, 0x5000)
        mine.write(Offset.CRASH, 8, 1)  # ends no run
        assert harness.buffer == 0
        if again is copy.copy:  # shares the entropy, and so is another generation
            assert mine.generation != harness.generation
        with Machine("1M", ring=3) as other:
            mine.attach(other)
            other.load(assemble(ASKING, mode="long", at=0x1000))
            assert other.run(timeout=10).outcome == "ready"


@needs_kvm
def test_map_on_threads_has_a_harness_for_each_machine() -> None:
    """A run that says CRASH is ended itself, and not what runs beside it."""
    harness = Harness(Entropy(1))
    source = f"""
    mov ebx, {ADDRESS}
    mov [rbx + {Offset.READY.value}], eax
    movzx eax, byte ptr [{INPUT}]
    mov [rbx + {Offset.CRASH_ADDRESS.value}], rax
    mov ecx, 2000
    wait: dec ecx
    jnz wait
    mov [rbx + {Offset.CRASH.value}], rax
    """
    snapshot = ready(source, harness, 3)
    inputs = [bytes([number]) for number in range(1, 200)]
    options: dict[str, Any] = {"write_to": INPUT, "attach": harness.attach, "timeout": 10}
    with ThreadPoolExecutor(2) as threads:
        found = list(kvmpy.map(snapshot, inputs, threads, chunk_size=1, **options))
    assert [(one.outcome, one.detail) for one in found] == [
        ("crash", f"code {number} at {number:#x}") for number in range(1, 200)
    ]
