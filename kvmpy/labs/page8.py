"""Exercises of docs/8-exit-costs.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import ends, exits, register
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.labs.payload import stored
from kvmpy.machine import Machine

__all__ = ["EXERCISES"]

_PAGE: Final = "8-exit-costs.md"
_INPUT: Final = 0x8000
_OUTPUT: Final = 0x9000
_DEVICE: Final = 0xD0000000
_BYTES: Final = 64
_DOORBELL: Final = 0x10
_SAMPLES: Final = 64


# 8.1 ------------------------------------------------------------------------------------------


class _Memory:
    """A device that keeps what is written to it."""

    def __init__(self) -> None:
        self.data = bytearray(_BYTES)
        self.written = 0

    def access(self, offset: int, size: int, given: int | None) -> int | None:
        if given is None:
            return 0
        self.data[offset : offset + size] = given.to_bytes(size, "little")
        del self.data[_BYTES:]
        self.written += size
        return None


def _blocks(random: Random) -> Sequence[Case]:
    def case() -> Case:
        data = random.randbytes(_BYTES)

        def prepare(machine: Machine) -> _Memory:
            machine.memory.write(_INPUT, data)
            device = _Memory()
            machine.on_mmio(_DEVICE, size=_BYTES)(device.access)
            return device

        return Case(prepare=prepare, expect={"data": data})

    return [case(), case()]


def _device_has_it(run: Run) -> Finding:
    device: _Memory = run.kept
    wanted = run.case.expect["data"]
    if device.data == wanted:
        return Finding(True, f"the device has the {_BYTES} bytes")
    pairs = zip(device.data, wanted, strict=True)
    at = next(at for at, (found, right) in enumerate(pairs) if found != right)
    return Finding(False, f"the device got {device.written} bytes; the one at {at} is "
                          f"{device.data[at]:#04x}, not {wanted[at]:#04x}")  # fmt: skip


# 8.2 ------------------------------------------------------------------------------------------


class _Doorbell:
    """A device that looks at the results when the bell rings."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.rung = machine, 0
        self.seen: list[int] = []

    def ring(self, offset: int, size: int, given: int | None) -> int | None:
        if given is None:
            return 0xFF
        self.rung += 1
        count = self.machine.memory.read_u32(_INPUT)
        self.seen = [self.machine.memory.read_u64(_OUTPUT + 8 * at) for at in range(count)]
        return None


def _batches(random: Random) -> Sequence[Case]:
    def case(count: int) -> Case:
        numbers = [random.getrandbits(31) for _ in range(count)]

        def prepare(machine: Machine) -> _Doorbell:
            machine.memory.write_u32(_INPUT, count)
            for at, number in enumerate(numbers):
                machine.memory.write_u32(_INPUT + 4 + 4 * at, number)
            bell = _Doorbell(machine)
            machine.on_port(_DOORBELL)(bell.ring)
            return bell

        return Case(f"with {count} numbers", prepare=prepare,
                    expect={"squares": [number * number for number in numbers]})  # fmt: skip

    return [case(1), case(random.randrange(100, 200))]


def _squares_were_there(run: Run) -> Finding:
    bell: _Doorbell = run.kept
    squares = run.case.expect["squares"]
    if not bell.rung:
        return Finding(False, f"the doorbell, port {_DOORBELL:#x}, was not rung")
    for at, (found, wanted) in enumerate(zip(bell.seen, squares, strict=True)):
        if found != wanted:
            return Finding(False, f"when the bell rang, result {at} was {found:#x}, not "
                                  f"{wanted:#x}")  # fmt: skip
    return Finding(True, "when the bell rang, all results were there")


# 8.3 ------------------------------------------------------------------------------------------


def _bell_only(random: Random) -> Sequence[Case]:
    def prepare(machine: Machine) -> None:
        machine.on_port(_DOORBELL)(lambda offset, size, given: 0xFF if given is None else None)

    return [Case(prepare=prepare)]


def _is_a_part_of_the_whole(run: Run) -> Finding:
    """Each reading holds its exit's time outside, and lies between the exits around it."""
    outs = [at for at, one in enumerate(run.records)
            if one.kind == "port-out" and one.address == _DOORBELL]  # fmt: skip
    if len(outs) != _SAMPLES:
        return Finding(False, f"port {_DOORBELL:#x} was written {len(outs)} times, not {_SAMPLES}")
    cycles = run.machine.cpus[0].get_tsc_khz() / 1e6  # a nanosecond
    readings = stored(run, _OUTPUT, _SAMPLES)
    for number, (at, reading) in enumerate(zip(outs, readings, strict=True)):
        this, after = run.records[at], run.records[at + 1]
        outside = (after.entered - this.left) * cycles
        around = (after.left - this.entered) * cycles
        if not 0.9 * outside <= reading <= 1.1 * around:
            return Finding(False, f"reading {number} is {reading} cycles; by the host's clock that "
                                  f"exit took {outside:.0f} outside of the guest, and "
                                  f"{around:.0f} with the guest before and after it")  # fmt: skip
    return Finding(True, f"each of the {_SAMPLES} readings agrees with the host's clock")


EXERCISES: Final = (
    Exercise(
        number="8.1",
        title="Sixty-four bytes in eight exits",
        page=_PAGE,
        text="""\
Copy the 64 bytes at 0x8000 to a device at 0xd0000000, byte for byte at the same offsets, and
HLT. An exit costs the same for one byte as for eight: there should be eight exits and the one
of HLT.""",
        checks=(ends("halt"), _device_has_it, exits("mmio-write", 8), exits("", 9)),
        look='"Fewer exits" in docs/8-exit-costs.md',
        cases=_blocks,
    ),
    Exercise(
        number="8.2",
        title="One doorbell",
        page=_PAGE,
        text="""\
At 0x8000 there is a count, at 0x8004 that many numbers, all of 32 bits. Write the square of
each, of 64 bits, to the results from 0x9000 on. When they are all there, and not before, write
any byte to port 0x10, once, and HLT. The device reads the results from memory then: that costs
no exit.""",
        checks=(ends("halt"), _squares_were_there, exits("port-out", 1), exits("", 2)),
        look='"Fewer exits" in docs/8-exit-costs.md',
        cases=_batches,
    ),
    Exercise(
        number="8.3",
        title="Measure it yourself",
        page=_PAGE,
        text="""\
Write to port 0x10 sixty-four times. Read the TSC (RDTSC: EDX:EAX) just before and just after
each, and store the difference, of 64 bits, in a list from 0x9000 on. Leave the least of them in
RAX, and HLT. The grader takes the host's clock at the same exits, and compares.""",
        checks=(
            ends("halt"),
            _is_a_part_of_the_whole,
            register("rax", lambda run: min(stored(run, _OUTPUT, _SAMPLES))),
        ),
        look='"From inside" in docs/8-exit-costs.md; SDM Vol.2 RDTSC, Vol.3 18.17',
        cases=_bell_only,
    ),
)
