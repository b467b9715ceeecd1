"""Operations whose exits reach user space: ports, MMIO and HLT, from each mode, at each level.

The guests are guests/bench/*.S: a loop around one instruction, and the same loop without it.
The C loop takes the clock at each entry of the guest and at each exit; a sample is the time from
one entry to the next, so that it holds the guest's loop, the exit, and who answers it.
"""

from functools import partial
from typing import Final

import numpy as np

from kvmpy.abi import lib
from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import LEVELS, MODES, Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.errors import KvmpyError

__all__ = ["ROWS"]

_KINDS: Final = {
    **{
        name if size == 1 else f"{name}-{size}": Kind("port", f"{label}{size}", exit_, size)
        for name, label, exit_ in (("pio-out", "out", "port-out"), ("pio-in", "in", "port-in"))
        for size in (1, 2, 4)
    },
    **{
        f"{name}-{size}": Kind("mmio", f"{label}{size}", exit_, size)
        for name, label, exit_ in (
            ("mmio-read", "read", "mmio-read"),
            ("mmio-write", "write", "mmio-write"),
        )
        for size in (1, 2, 4, 8)
    },
    "halt": Kind("halt", "halt", "halt", 0),
}


def _measure(case: Case, conditions: Conditions) -> Batch:
    kind = _KINDS[case.operation]
    if kind.guest == "halt" and case.mode == "ring3":
        raise Unmeasured("not available here", "HLT is for ring 0")
    bench = GuestBench(kind, case, conditions)
    if kind.guest == "halt":
        return bench.proven(partial(_halts, bench))
    if case.level == "kernel":
        return bench.proven(bench.blocks)
    return bench.proven(partial(_periods, bench))


def _periods(bench: GuestBench) -> Batch:
    """A sample is the time from one entry of the guest to the next."""
    wanted = bench.conditions
    rounds = wanted.warmup + wanted.count
    bench.start(bench.kind.label, rounds)
    before = bench.cpu.exit_counts().get(bench.kind.exit, 0)
    pairs = bench.sample(rounds + 1, bench.run_to_its_end)
    counted = bench.cpu.exit_counts()[bench.kind.exit] - before
    counted -= bench.kind.exit == "port-out"  # the one that says that it is over
    if counted != rounds:
        raise KvmpyError(f"{bench.case}: {counted} exits counted, where {rounds} were claimed")
    periods = np.diff(pairs[:, 0])[wanted.warmup :].astype(np.float64)
    proof = {"claimed": rounds, "counted": counted, "per_sample": 1}
    return Batch(bench.case, periods, host=pairs[wanted.warmup :], proof=proof)


def _halts(bench: GuestBench) -> Batch:
    """HLT always goes to Python: a sample is the time from entry to exit, without Python's."""
    wanted = bench.conditions
    rounds = wanted.warmup + wanted.count
    bench.start("halt", 0)
    cpu = bench.cpu

    def run() -> None:
        loop = cpu.begin(wanted.deadline)
        try:
            for _ in range(rounds):
                while (code := lib.kvmpy_run(loop)) == lib.KVMPY_HEARTBEAT:
                    pass
                if code == lib.KVMPY_DEADLINE:
                    raise Unmeasured("hangs here", f"no end in {wanted.deadline:g} s")
                if code != lib.KVMPY_EXIT:
                    raise KvmpyError(f"{bench.case}: KVM_RUN gave {code}")
        finally:
            lib.kvmpy_end(loop)

    before = cpu.exit_counts().get("halt", 0)
    pairs = bench.sample(rounds, run)
    counted = cpu.exit_counts()["halt"] - before
    samples = np.diff(pairs, axis=1)[wanted.warmup :, 0].astype(np.float64)
    proof = {"claimed": rounds, "counted": counted, "per_sample": 1}
    return Batch(bench.case, samples, host=pairs[wanted.warmup :], proof=proof)


def _row(name: str, kind: Kind) -> Operation:
    what = {
        "port": f"a {kind.size}-byte port {'write' if kind.exit == 'port-out' else 'read'}",
        "mmio": f"a {kind.size}-byte {kind.exit.removeprefix('mmio-')} where there is no RAM",
        "halt": "HLT",
    }[kind.guest]
    levels: tuple[str, ...]
    if kind.guest == "halt":
        includes, levels = "from the entry of the guest to its exit, and the jump between", ("c",)
    else:
        includes = "the guest's loop, the exit, and its answer, from one entry to the next"
        levels = LEVELS if (kind.guest, kind.size) == ("port", 1) else LEVELS[1:]
    return Operation(name, "exits", what, includes, _measure, levels, MODES)


ROWS: Final = tuple(_row(name, kind) for name, kind in _KINDS.items())
"""The operations of this module."""
