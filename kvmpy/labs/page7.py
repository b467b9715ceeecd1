"""Exercises of docs/7-devices.md."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.labs.checks import console, ends, exits, wrote
from kvmpy.labs.model import Case, Exercise, Finding, Run
from kvmpy.machine import Machine

__all__ = ["EXERCISES"]

_PAGE: Final = "7-devices.md"
_DATA, _STATUS = 0x300, 0x301
_READY: Final = 1
_QUEUE: Final = 0xD000_0000
_COUNT, _NEXT, _SUM = 0, 4, 8
_UART, _LINE_STATUS = 0x3F8, 0x3FD


class _Sensor:
    """A byte comes in after some looks at the status port; data read before that is 0xff."""

    def __init__(self, machine: Machine, values: Sequence[int], patience: Sequence[int]) -> None:
        self.early = 0
        self._left = list(zip(values, patience, strict=True))
        self._looks = 0
        machine.on_port(_DATA, 2)(self.access)

    def access(self, offset: int, size: int, value: int | None) -> int | None:
        """Two registers of a byte each; writes are dropped."""
        if value is not None:
            return None
        if size != 1:
            return (1 << 8 * size) - 1
        ready = bool(self._left) and self._looks >= self._left[0][1]
        if offset == _STATUS - _DATA:
            self._looks += 1
            return _READY if ready else 0
        if not ready:
            self.early += 1
            return 0xFF
        self._looks = 0
        return self._left.pop(0)[0]


def _waits(random: Random) -> Sequence[Case]:
    def case(count: int) -> Case:
        values = [random.randrange(1, 255) for _ in range(count)] + [0]
        patience = [random.randrange(1, 6) for _ in values]
        return Case(
            f"with the bytes {bytes(values).hex(' ')}",
            prepare=lambda machine: _Sensor(machine, values, patience),
            expect={"printed": bytes(values[:-1])},
        )

    return [case(2), case(random.randrange(5, 12))]


def _never_early(run: Run) -> Finding:
    assert isinstance(run.kept, _Sensor)
    if run.kept.early:
        times = run.kept.early
        return Finding(False, f"it reads the data port before the status says ready, {times} times")
    return Finding(True, "it reads data only when the status says ready")


def _queues(random: Random) -> Sequence[Case]:
    def case(values: list[int]) -> Case:
        def prepare(machine: Machine) -> None:
            left = list(values)

            @machine.on_mmio(_QUEUE, 12)
            def queue(offset: int, size: int, value: int | None) -> int | None:
                if value is not None:
                    return None
                if size != 4:
                    return (1 << 8 * size) - 1
                if offset == _COUNT:
                    return len(left)
                return left.pop(0) if offset == _NEXT and left else 0xFFFF_FFFF

        total = sum(values) & 0xFFFF_FFFF
        expect = {"sum": total, "reads": len(values) + 1}
        return Case(f"with {len(values)} numbers in the queue", prepare=prepare, expect=expect)

    return [
        case([1, 2, 3]),
        case([random.randrange(1 << 32) for _ in range(random.randrange(5, 30))]),
        case([]),
    ]


def _lines(random: Random) -> Sequence[Case]:
    def case(text: str) -> Case:
        line = text.encode() + b"\n"
        pieces = [piece for at in range(len(line)) for piece in late(line[at : at + 1])]
        return Case(f"with {text!r} as input", pieces, expect={"line": line.upper()})

    def late(byte: bytes) -> list[bytes]:
        return [b""] * random.randrange(3) + [byte]

    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ 0123456789 "
    line = "".join(random.choices(letters, k=random.randrange(10, 30)))
    return [case("abc"), case(line + "az@[`{")]


def _asks_first(run: Run) -> Finding:
    """Each access to the data register comes after a look at the status that allows it."""
    status = 0
    for one in run.records:
        if one.kind == "port-in" and one.address == _LINE_STATUS:
            status = one.value or 0
        elif one.address == _UART and one.kind in ("port-in", "port-out"):
            bit, name = (1, "DR") if one.kind == "port-in" else (0x20, "THRE")
            if not status & bit:
                done = "reads" if one.kind == "port-in" else "writes"
                text = f"it {done} port {_UART:#x} without having seen {name} in the line status"
                return Finding(False, f"{text} since the last access")
            status = 0
    return Finding(True, "it looks at the line status before each access to the data register")


EXERCISES: Final = (
    Exercise(
        number="7.1",
        title="Wait until it is ready",
        page=_PAGE,
        text="""\
A sensor has two ports of a byte each: 0x301 is its status, of which bit 0 says that a value has
come in, and 0x300 its data. Write each value to port 0xe9, up to a zero, which you do not write;
then HLT. Read the data port only when the status says that there is something to read.""",
        checks=(
            ends("halt"),
            console(lambda run: bytes(run.case.expect["printed"])),
            _never_early,
        ),
        look='"Asking before you take" in docs/7-devices.md; guests/serial_echo.S',
        cases=_waits,
    ),
    Exercise(
        number="7.2",
        title="A queue in memory that is none",
        page=_PAGE,
        text="""\
At guest-physical address 0xd0000000 is a device with three registers of 32 bits: +0 tells how many
numbers wait, each read of +4 takes one of them, and +8 is where their sum goes. Read the count once
and each number once, write the sum, its lower 32 bits, once, and HLT.""",
        checks=(
            ends("halt"),
            wrote("mmio-write", _QUEUE + _SUM, lambda run: [int(run.case.expect["sum"])]),
            exits("mmio-read", lambda run: int(run.case.expect["reads"])),
        ),
        look='"MMIO" in docs/7-devices.md; guests/mmio.S',
        cases=_queues,
    ),
    Exercise(
        number="7.3",
        title="Louder",
        page=_PAGE,
        text="""\
Send back what comes in at the serial port, in capital letters: a to z become A to Z, everything
else stays. HLT after the newline. The bytes come in one by one, when they please. Look at the line
status (port 0x3fd) before each access to the data register (0x3f8). You may leave baud rate and
line control as they are.""",
        checks=(
            ends("halt"),
            console(lambda run: bytes(run.case.expect["line"])),
            _asks_first,
        ),
        look='"Asking before you take" in docs/7-devices.md; PC16550D data sheet, "Registers"',
        cases=_lines,
    ),
)
