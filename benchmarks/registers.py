"""Reading the registers after an exit, by the number of calls into the compiled module.

Every ioctl of kvmpy's is such a call, and the interpreter reports each to a profile hook, so
none can hide. Reading the FPU is counted as well, to show that the count counts.
"""

import sys
from collections.abc import Callable
from types import FrameType

from benchmarks.exits import machine
from benchmarks.stats import Row, Spread

__all__ = ["measure_registers"]

_IOCTLS = ("kvmpy_ioctl", "kvmpy_ioctl_buffer")


def ioctls_of(call: Callable[[], object]) -> int:
    """How many ioctls a call issues."""
    count = 0

    def hook(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event == "c_call" and getattr(argument, "__name__", "") in _IOCTLS:
            count += 1

    sys.setprofile(hook)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def measure_registers(rounds: int) -> list[Row]:
    """The ioctls of get_regs after an exit."""
    with machine(True) as made:
        cpu = made.cpus[0]
        regs, fpu = [], []
        for _ in range(rounds):
            made.run(max_exits=1)
            regs.append(float(ioctls_of(cpu.get_regs)))
            fpu.append(float(ioctls_of(cpu.get_fpu)))
        synced = bool(cpu.can_sync & 1)
    note = f"get_fpu, counted likewise: {Spread.of(fpu).median:.0f}"
    if not synced:
        note = f"this host lacks KVM_CAP_SYNC_REGS; {note}"
    figure = Spread.of(regs)
    samples = {"subject": regs, "get_fpu": fpu}
    name = "ioctls of get_regs after an exit"
    return [Row(name, "count", "", figure, 0, figure, None, rounds, note, samples)]
