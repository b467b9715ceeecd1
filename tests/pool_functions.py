"""What the workers of `kvmpy.map` import in its tests: a guest, its devices, what writes inputs."""

import os
import signal
import sys
from pathlib import Path

from kvmpy import Machine, Snapshot, assemble

INPUT = 0x30000
TRIPLE, CRASH, HANG, ASK = range(4)
KILL, KILL_ONCE, RAISE, LEAVE, PID = range(1, 6)
"""What the device does with its process when ASK writes that to it."""

GUEST = f"""
mov esi, {INPUT}
movzx eax, byte ptr [rsi + 1]
mov bl, [rsi]
cmp bl, {CRASH}
je crash
cmp bl, {HANG}
je hang
cmp bl, {ASK}
je ask
imul eax, eax, 3
out 0xf4, eax
hlt
crash:
ud2
hang:
jmp hang
ask:
out 0x61, al
in eax, 0x61
out 0xf4, eax
hlt
"""


def prepared() -> Snapshot:
    with Machine("1M") as machine:
        machine.load(assemble(GUEST, mode="long", at=0x4000))
        return machine.snapshot()


class LocalError(Exception):
    """One that cannot be unpickled: its arguments are not those of its class."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def attach(machine: Machine, directory: str = "") -> None:
    here = Path(directory)
    (here / f"{os.getpid()}.pid").touch()

    @machine.on_port(0x61)
    def device(offset: int, size: int, value: int | None) -> int:
        once = here / "killed"
        if value == KILL or (value == KILL_ONCE and not once.exists()):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if value == RAISE:
            raise ValueError("the device is broken")
        if value == LEAVE:
            sys.exit(3)
        return 42


def refuse(machine: Machine) -> None:
    raise LocalError(1, 2)


def write(machine: Machine, number: int) -> None:
    if number % 5 == 4:
        raise LocalError(number, number)
    machine.memory.write(INPUT, bytes([TRIPLE, number]))


def machines_here() -> int:
    from kvmpy.pool import held

    return sum(len(one.machines) for one in held._held.values())
