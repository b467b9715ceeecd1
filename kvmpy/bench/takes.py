"""How a batch is taken from a guest: from entry to entry, from entry to exit, or in blocks."""

from collections.abc import Callable
from typing import Final

import numpy as np

from kvmpy.abi import lib
from kvmpy.bench.guest import GuestBench
from kvmpy.bench.model import Batch, Unmeasured
from kvmpy.errors import KvmpyError

__all__ = ["BLOCK", "blocks", "entries", "nothing", "periods"]

BLOCK: Final = 64
BLOCK_SHARE: Final = 8  # a block takes longer than a sample does, so there are fewer


def nothing() -> None:
    """What is done after an exit that asks for nothing."""


def periods(bench: GuestBench, elements: int = 1) -> Batch:
    """A sample is the time from one entry of the guest to the next, for each element.

    With `elements`, an operation moves so many, in as many exits as the host's KVM takes for
    them: a sample is then all of its exits together, divided by the elements.
    """
    wanted = bench.conditions
    rounds = wanted.warmup + wanted.count
    bench.start(bench.kind.label, rounds)
    before = bench.cpu.exit_counts().get(bench.kind.exit, 0)
    pairs = bench.sample_at_most(rounds * elements + 1, bench.run_to_its_end)
    counted = bench.cpu.exit_counts().get(bench.kind.exit, 0) - before
    counted -= bench.kind.exit == "port-out"  # the one that says that it is over
    each, left = divmod(counted, rounds)
    if left or not 1 <= each <= elements or len(pairs) != counted + 1:
        raise KvmpyError(f"{bench.case}: {counted} exits counted, where {rounds} were claimed")
    pairs = pairs[wanted.warmup * each :]
    samples = np.diff(pairs[::each, 0]).astype(np.float64) / elements
    outside = (pairs[1:, 0] - pairs[:-1, 1]).astype(np.float64)
    proof = {"claimed": rounds * each, "counted": counted, "per_sample": each}
    if elements > 1:
        proof["elements"] = elements
    cost = {"outside": float(np.median(outside)) * each / elements}
    return Batch(bench.case, samples, host=pairs, proof=proof, overhead=cost)


def entries(bench: GuestBench, serve: Callable[[], object] = nothing) -> Batch:
    """A sample is the time from the entry of the guest to its exit, each of which Python sees.

    `serve` is called after each exit, outside of the time that is taken. Raises Unmeasured
    where the guest exits in another way than the kind's.
    """
    wanted = bench.conditions
    rounds = wanted.warmup + wanted.count
    cpu, kind = bench.cpu, bench.kind.exit

    def run() -> None:
        loop = cpu.begin(wanted.deadline)
        try:
            for _ in range(rounds):
                while (code := lib.kvmpy_run(loop)) == lib.KVMPY_HEARTBEAT:
                    pass
                if code == lib.KVMPY_DEADLINE:
                    raise Unmeasured("hangs here", f"no end in {wanted.deadline:g} s")
                if code != lib.KVMPY_EXIT:
                    raise Unmeasured("not available here", f"the guest goes on without {kind}")
                serve()
        finally:
            lib.kvmpy_end(loop)

    before = cpu.exit_counts().get(kind, 0)
    pairs = bench.sample(rounds, run)
    counted = cpu.exit_counts().get(kind, 0) - before
    if counted != rounds:
        seen = ", ".join(bench.cpu.exit_counts())
        raise Unmeasured("not available here", f"the guest exits by {seen}, not by {kind}")
    samples = np.diff(pairs, axis=1)[wanted.warmup :, 0].astype(np.float64)
    proof = {"claimed": rounds, "counted": counted, "per_sample": 1}
    return Batch(bench.case, samples, host=pairs[wanted.warmup :], proof=proof)


def blocks(bench: GuestBench, check: Callable[[], object] = nothing) -> Batch:
    """Where KVM answers: a sample is a 64th of one entry with 64 operations in it.

    `check` is called after each entry, outside of the time that is taken.
    """
    wanted = bench.conditions
    warmup, count = -(-wanted.warmup // BLOCK), -(-wanted.count // BLOCK_SHARE)
    rows, left = [], 0
    for _ in range(warmup + count):
        bench.start(bench.kind.label, BLOCK)
        rows.append(bench.sample(1, bench.run_to_its_end))
        registers = bench.cpu.get_regs()
        left += (registers.rsi if bench.kind.guest == "kernel" else registers.rcx) & 0xFFFFFFFF
        check()
    pairs = np.concatenate(rows)[warmup:]
    samples = np.diff(pairs, axis=1)[:, 0].astype(np.float64) / BLOCK
    total = BLOCK * (warmup + count)
    if left:
        raise KvmpyError(f"{bench.case}: the guest left out {left} of {total}")
    # The guest's own counter says so: nobody else sees each of them.
    proof = {"claimed": total, "counted": total - left, "per_sample": BLOCK}
    return Batch(bench.case, samples, host=pairs, proof=proof)
