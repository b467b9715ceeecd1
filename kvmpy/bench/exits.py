"""Operations whose exits reach user space: ports, MMIO and HLT, from each mode, at each level.

The guests are guests/bench/*.S: a loop around one instruction, and the same loop without it.
The C loop takes the clock at each entry of the guest and at each exit; a sample is the time from
one entry to the next, so that it holds the guest's loop, the exit, and who answers it.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from kvmpy.abi import ffi, lib
from kvmpy.bench.model import LEVELS, MODES, Batch, Case, Conditions, Operation, Ticks, Unmeasured
from kvmpy.boot import Image, load_image
from kvmpy.boot.guests import guests_directory
from kvmpy.bus import Device, FunctionDevice
from kvmpy.devices import Sink
from kvmpy.errors import KvmpyError, UnsupportedError
from kvmpy.machine import Machine

__all__ = ["ROWS"]

PORT: Final = 0x10
OVER: Final = 0x11
PIC_MASK: Final = 0x21  # the interrupt mask of the master PIC, which KVM answers itself
MMIO: Final = 0xD0000000
REAL_MMIO: Final = 0xF0000  # within reach of a real-mode segment, above the machine's RAM
BLOCK: Final = 64
BLOCK_SHARE: Final = 8  # a block takes longer than a sample does, so there are fewer
EMPTY_ROUNDS: Final = 500
EMPTY_TIMES: Final = 5


class _Kind(NamedTuple):
    """What an operation is made of: its guest and label, the exit's kind, the access's size."""

    guest: str
    label: str
    exit: str
    size: int


_KINDS: Final = {
    **{
        name if size == 1 else f"{name}-{size}": _Kind("port", f"{label}{size}", exit_, size)
        for name, label, exit_ in (("pio-out", "out", "port-out"), ("pio-in", "in", "port-in"))
        for size in (1, 2, 4)
    },
    **{
        f"{name}-{size}": _Kind("mmio", f"{label}{size}", exit_, size)
        for name, label, exit_ in (
            ("mmio-read", "read", "mmio-read"),
            ("mmio-write", "write", "mmio-write"),
        )
        for size in (1, 2, 4, 8)
    },
    "halt": _Kind("halt", "halt", "halt", 0),
}


def _answer(offset: int, size: int, value: int | None) -> int | None:
    """The least that a device in Python can do."""
    return 0 if value is None else None


class _Bench:
    """A machine with one guest of guests/bench, and who answers its accesses."""

    def __init__(self, case: Case, conditions: Conditions) -> None:
        self.kind = kind = _KINDS[case.operation]
        self.conditions, self.case = conditions, case
        mode = "long" if case.mode == "ring3" else case.mode
        source = guests_directory() / "bench" / f"{kind.guest}_{mode}.S"
        self.image: Image = load_image(source)
        if kind.label not in self.image.symbols:
            raise Unmeasured("not available here", f"{mode} mode has no {kind.size}-byte access")
        in_kernel = case.level == "kernel"
        if in_kernel and (kind.guest, kind.size) != ("port", 1):
            raise Unmeasured("not available here", "KVM itself answers no such access")
        if kind.guest == "halt" and case.mode == "ring3":
            raise Unmeasured("not available here", "HLT is for ring 0")
        try:
            self.machine = Machine(
                "512K" if mode == "real" else "1M",
                mode,
                3 if case.mode == "ring3" else 0,
                devices=False,
                irqchip="full" if in_kernel else None,
            )
        except UnsupportedError as error:
            raise Unmeasured("not available here", str(error)) from None
        self.machine.load_image(self.image)
        self.port = PIC_MASK if in_kernel else PORT
        self.address = REAL_MMIO if mode == "real" else MMIO
        self.machine.attach_port(OVER, 1, FunctionDevice(self._over))
        self._attach(case.level)
        self.cpu = self.machine.cpus[0]

    def _attach(self, level: str) -> None:
        device: Device = Sink() if level == "c" else FunctionDevice(_answer)
        if self.kind.guest == "port" and level != "kernel":
            self.machine.attach_port(PORT, 1, device)
        elif self.kind.guest == "mmio":
            self.machine.attach_mmio(self.address, 0x1000, device)

    def _over(self, offset: int, size: int, value: int | None) -> int:
        self.machine.stop()
        return 0

    def start(self, label: str, rounds: int) -> None:
        """Have the guest go round that loop so often, next time it runs."""
        self.machine.set_entry(self.image.symbols[label])
        registers, special = self.cpu.get_regs(), self.cpu.get_sregs()
        registers.rcx, registers.rdx = rounds, self.port
        registers.rdi = self.address
        if self.case.mode == "real":
            special.ds.selector, special.ds.base = self.address >> 4, self.address
            registers.rdi = 0
            self.cpu.set_sregs(special)
        self.cpu.set_regs(registers)

    def sample(self, entries: int, run: Callable[[], None]) -> Ticks:
        """The clock at each entry and exit of what `run` does, `entries` of them at most."""
        pairs = np.zeros((entries, 2), np.uint64)
        loop = self.cpu.loop
        with ffi.from_buffer("uint64_t[]", pairs, require_writable=True) as room:
            loop.samples, loop.sample_room = room, entries
            loop.sample_count = loop.sample_dropped = 0
            try:
                run()
            finally:
                loop.samples = ffi.NULL
        if loop.sample_dropped or loop.sample_count != entries:
            found = loop.sample_count + loop.sample_dropped
            raise KvmpyError(f"{self.case}: {found} exits, where {entries} were claimed")
        return pairs

    def run_to_its_end(self) -> None:
        """Run the guest until it says that it is over."""
        result = self.machine.run(timeout=self.conditions.deadline)
        if result.outcome == "timeout":
            raise Unmeasured("hangs here", f"no end in {self.conditions.deadline:g} s")
        if result.outcome != "stopped":
            raise KvmpyError(f"{self.case}: the guest ended in {result}")

    def overhead(self) -> dict[str, float]:
        """What measuring costs, and the guest's loop without the operation, in ns."""
        rows = []
        for _ in range(EMPTY_TIMES):
            self.start("empty", EMPTY_ROUNDS)
            rows.append(self.sample(1, self.run_to_its_end))
        each = np.diff(np.concatenate(rows), axis=1) / EMPTY_ROUNDS
        return {"clock": lib.kvmpy_clock_cost(1000) / 1000, "loop": float(np.median(each))}


def _measure(case: Case, conditions: Conditions) -> Batch:
    bench = _Bench(case, conditions)
    with bench.machine:
        before = _statistics(bench.cpu)
        if bench.kind.guest == "halt":
            batch = _halts(bench)
        elif case.level == "kernel":
            batch = _blocks(bench)
        else:
            batch = _periods(bench)
        proof = {**batch.proof}
        for name, value in _statistics(bench.cpu).items():
            proof[f"kvm_{name}"] = value - before[name]
        batch.proof = proof
        batch.overhead = bench.overhead()
    return batch


def _periods(bench: _Bench) -> Batch:
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


def _blocks(bench: _Bench) -> Batch:
    """KVM answers: a sample is a 64th of an entry of 64 operations, and of the exit after it."""
    wanted = bench.conditions
    warmup, count = -(-wanted.warmup // BLOCK), -(-wanted.count // BLOCK_SHARE)
    rows = []
    for _ in range(warmup + count):
        bench.start(bench.kind.label, BLOCK)
        rows.append(bench.sample(1, bench.run_to_its_end))
    pairs = np.concatenate(rows)[warmup:]
    samples = np.diff(pairs, axis=1)[:, 0].astype(np.float64) / BLOCK
    total = BLOCK * (warmup + count)
    proof = {"claimed": total, "counted": total, "per_sample": BLOCK}
    return Batch(bench.case, samples, host=pairs, proof=proof)


def _halts(bench: _Bench) -> Batch:
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


def _statistics(cpu: Any) -> dict[str, int]:
    """KVM's own counts of exits, as far as it has them."""
    try:
        with cpu.stats() as stats:
            values = stats.read()
    except UnsupportedError:
        return {}
    return {
        name: int(values[name]) for name in ("exits", "io_exits", "mmio_exits") if name in values
    }


def _row(name: str, kind: _Kind) -> Operation:
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
