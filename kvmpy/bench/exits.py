"""Operations whose exits reach user space: from each mode, at each level.

The guests are guests/bench/*.S: a loop around one instruction, and the same loop without it.
"""

from functools import partial
from typing import Final

from kvmpy.bench.guest import PORT, GuestBench, Kind, answer, device_cost
from kvmpy.bench.model import LEVELS, MODES, Batch, Case, Conditions, Operation
from kvmpy.bench.takes import blocks, periods
from kvmpy.bus import FunctionDevice
from kvmpy.devices import Sink
from kvmpy.errors import KvmpyError

__all__ = ["ROWS"]

STRING: Final = 16  # bytes that one REP instruction moves, as in guests/bench/string_*.S
PIC_MASK: Final = 0x21  # the interrupt mask of the master PIC, which KVM answers itself

_KINDS: Final = {
    **{
        name if size == 1 else f"{name}-{size}": Kind("port", f"{label}{size}", exit_, size)
        for name, label, exit_ in (("pio-out", "out", "port-out"), ("pio-in", "in", "port-in"))
        for size in (1, 2, 4)
    },
    "string-out": Kind("string", "outs", "port-out", 1),
    "string-in": Kind("string", "ins", "port-in", 1),
    **{
        f"{name}-{size}": Kind("mmio", f"{label}{size}", name, size)
        for name, label in (("mmio-read", "read"), ("mmio-write", "write"))
        for size in (1, 2, 4, 8)
    },
}


def _measure(case: Case, conditions: Conditions) -> Batch:
    kind = _KINDS[case.operation]
    if case.level == "kernel":
        bench = GuestBench(kind, case, conditions, irqchip="full", port=PIC_MASK)
        return bench.proven(partial(blocks, bench))
    bench = GuestBench(kind, case, conditions, port=PORT)
    return bench.proven(partial(_served, bench))


def _served(bench: GuestBench) -> Batch:
    """The exits of a device that the C loop serves, or Python does."""
    sink, python = Sink(), FunctionDevice(answer)
    in_c = bench.case.level == "c"
    bench.attach(sink if in_c else python)
    elements = STRING if bench.kind.guest == "string" else 1
    batch = periods(bench, elements)
    if not in_c:
        batch.overhead = {**batch.overhead, "device": device_cost(python)}
    elif sink.backing is not None:
        claimed = batch.proof["claimed"] // batch.proof["per_sample"] * elements
        if sink.backing.hits() != claimed:
            found = sink.backing.hits()
            raise KvmpyError(f"{bench.case}: {found} accesses served, where {claimed} were claimed")
    return batch


def _row(name: str, kind: Kind) -> Operation:
    what = {
        "port": f"a {kind.size}-byte port {'write' if kind.exit == 'port-out' else 'read'}",
        "mmio": f"a {kind.size}-byte {kind.exit.removeprefix('mmio-')} where there is no RAM",
        "string": f"REP {kind.label.upper()}B of {STRING} bytes, for each byte",
    }[kind.guest]
    includes = "the guest's loop, the exit, and its answer, from one entry to the next"
    levels = LEVELS if (kind.guest, kind.size) == ("port", 1) else LEVELS[1:]
    return Operation(name, "exits", what, includes, _measure, levels, MODES)


ROWS: Final = tuple(_row(name, kind) for name, kind in _KINDS.items())
"""The operations of this module."""
