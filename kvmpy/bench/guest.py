"""A machine with one guest of guests/bench in it, and the clock taken at its entries and exits.

The guests are loops around one instruction, the same loop without it, and twins of both that
note the time-stamp counter on either side of it.
"""

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

import numpy as np

from kvmpy.abi import ffi, lib
from kvmpy.bench.model import Batch, Case, Conditions, Ticks, Unmeasured
from kvmpy.boot import Image, load_image
from kvmpy.boot.guests import guests_directory
from kvmpy.bus import Device, FunctionDevice
from kvmpy.errors import KvmpyError, UnsupportedError
from kvmpy.machine import Machine

__all__ = ["MMIO", "PORT", "REAL_MMIO", "GuestBench", "Kind", "answer", "device_cost"]

PORT: Final = 0x10
OVER: Final = 0x11
MMIO: Final = 0xD0000000
REAL_MMIO: Final = 0xF0000  # within reach of a real-mode segment, above the machine's RAM
BUFFER: Final = 0x40000  # where the guest keeps stamps, and REP INS what it reads
BYTES_END: Final = 0x8010  # where the bytes end that REP OUTS writes
STAMPS: Final = 100  # of at most 4096 that have room in the buffer
EMPTY_ROUNDS: Final = 300
EMPTY_TIMES: Final = 5
_COUNTED: Final = ("exits", "io_exits", "mmio_exits", "insn_emulation", "pf_fixed", "halt_exits")


class Kind(NamedTuple):
    """What an operation is made of: its guest and label, the exit's kind, the access's size."""

    guest: str
    label: str
    exit: str = ""
    size: int = 0


def answer(offset: int, size: int, value: int | None) -> int | None:
    """The least that a device in Python can do."""
    return 0 if value is None else None


class GuestBench:
    """A machine with one guest of guests/bench; `port` and `address` are what it accesses.

    Raises Unmeasured where the mode has no such guest, or this host no such machine.
    """

    def __init__(
        self,
        kind: Kind,
        case: Case,
        conditions: Conditions,
        *,
        irqchip: str | None = None,
        port: int = PORT,
        **options: Any,
    ) -> None:
        self.kind, self.case, self.conditions = kind, case, conditions
        mode = "long" if case.mode == "ring3" else case.mode
        self.image: Image = load_image(guests_directory() / "bench" / f"{kind.guest}_{mode}.S")
        if kind.label not in self.image.symbols:
            raise Unmeasured("not available here", f"{mode} mode has no such access")
        options = {"memory": "512K" if mode == "real" else "1M", **options}
        ring = 3 if case.mode == "ring3" else 0
        try:
            self.machine = Machine(mode=mode, ring=ring, devices=False, irqchip=irqchip, **options)
        except UnsupportedError as error:
            raise Unmeasured("not available here", str(error)) from None
        self.machine.load_image(self.image)
        self.port, self.address = port, REAL_MMIO if mode == "real" else MMIO
        self.machine.attach_port(OVER, 1, FunctionDevice(self._over))
        self.cpu = self.machine.cpus[0]
        self.most_stamps = STAMPS
        """How many operations the guest may time by itself; 0 for none."""
        self.costs: tuple[str, ...] = ("clock", "loop")
        """What of the cost of measuring is part of a sample."""

    def attach(self, device: Device) -> None:
        """Let `device` answer what the guest accesses."""
        if self.kind.guest == "mmio":
            self.machine.attach_mmio(self.address, 0x1000, device)
        else:
            self.machine.attach_port(self.port, 1, device)

    def _over(self, offset: int, size: int, value: int | None) -> int:
        self.machine.stop()
        return 0

    def start(self, label: str, rounds: int, **more: int) -> None:
        """Have the guest go round that loop so often, next time it runs.

        `more` are general registers by name, where a guest wants them otherwise.
        """
        self.machine.set_entry(self.image.symbols[label])
        registers, special = self.cpu.get_regs(), self.cpu.get_sregs()
        registers.rbx = registers.rcx = rounds
        registers.rdx = self.port
        registers.rsi = {"mmio": self.address, "string": BYTES_END}.get(self.kind.guest, self.port)
        registers.rdi = registers.rbp = BUFFER
        if self.case.mode == "real":
            special.es.selector, special.es.base = BUFFER >> 4, BUFFER
            registers.rdi = registers.rbp = 0
            if self.kind.guest == "mmio":
                special.ds.selector, special.ds.base = self.address >> 4, self.address
                registers.rsi = 0
            self.cpu.set_sregs(special)
        for name, value in more.items():
            setattr(registers, name, value)
        self.cpu.set_regs(registers)

    def sample(self, entries: int, run: Callable[[], None]) -> Ticks:
        """The clock at each entry and exit of what `run` does: exactly `entries` of them."""
        pairs = self.sample_at_most(entries, run)
        if len(pairs) != entries:
            raise KvmpyError(f"{self.case}: {len(pairs)} exits, where {entries} were claimed")
        return pairs

    def sample_at_most(self, entries: int, run: Callable[[], None]) -> Ticks:
        """The same for as many as there are; KvmpyError for more than `entries`."""
        pairs = np.zeros((entries, 2), np.uint64)
        loop = self.cpu.loop
        with ffi.from_buffer("uint64_t[]", pairs, require_writable=True) as room:
            loop.samples, loop.sample_room = room, entries
            loop.sample_count = loop.sample_dropped = loop.sample_entered = 0
            loop.watch |= lib.KVMPY_SAMPLE
            try:
                run()
            finally:
                loop.watch &= ~lib.KVMPY_SAMPLE
                loop.samples = ffi.NULL
        if loop.sample_dropped:
            found = loop.sample_count + loop.sample_dropped
            raise KvmpyError(f"{self.case}: {found} exits, where {entries} were claimed")
        return pairs[: loop.sample_count]

    def run_to_its_end(self) -> None:
        """Run the guest until it says that it is over."""
        result = self.machine.run(timeout=self.conditions.deadline)
        if result.outcome == "timeout":
            raise Unmeasured("hangs here", f"no end in {self.conditions.deadline:g} s")
        if result.crashed:
            why = result.detail or "an exception: #UD or #GP"
            raise Unmeasured("not available here", f"{result.outcome}: {why}")
        if result.outcome != "stopped":
            raise KvmpyError(f"{self.case}: the guest ended in {result}")

    def overhead(self, elements: int = 1) -> dict[str, float]:
        """What measuring costs, and the guest's loop without the operation, in ns.

        A loop is shared by so many `elements` of its operation.
        """
        rows = []
        for _ in range(EMPTY_TIMES):
            self.start("empty", EMPTY_ROUNDS)
            rows.append(self.sample(1, self.run_to_its_end))
        each = np.diff(np.concatenate(rows), axis=1) / EMPTY_ROUNDS / elements
        return {"clock": lib.kvmpy_clock_cost(1000) / 1000, "loop": float(np.median(each))}

    def stamps(self, label: str) -> Ticks:
        """The guest's own TSC before and after each operation; empty if it has no such loop."""
        count = min(self.most_stamps, max(2, self.conditions.count))
        if not count or f"tsc_{label}" not in self.image.symbols:
            return np.zeros((0, 2), np.uint64)
        self.machine.memory.write(BUFFER, bytes(16 * count))
        self.start(f"tsc_{label}", count)
        self.run_to_its_end()
        taken = np.frombuffer(self.machine.memory.read(BUFFER, 16 * count), np.uint64)
        pairs = taken.reshape(-1, 2).copy()
        if not pairs.all() or (pairs[:, 1] < pairs[:, 0]).any():
            raise KvmpyError(f"{self.case}: the guest left out stamps, or they run backwards")
        return pairs

    def statistics(self) -> dict[str, int]:
        """KVM's own counts of exits, as far as it has them."""
        try:
            with self.cpu.stats() as stats:
                values = stats.read()
        except UnsupportedError:
            return {}
        found = {name: values.get(name) for name in _COUNTED}
        return {name: value for name, value in found.items() if isinstance(value, int)}

    def proven(self, take: Callable[[], Batch]) -> Batch:
        """The batch that `take` gives, with KVM's own counts and the cost of measuring."""
        with self.machine:
            before = self.statistics()
            batch = take()
            counts = {f"kvm_{name}": now - before[name] for name, now in self.statistics().items()}
            batch.proof = {**batch.proof, **counts}
            costs = self.overhead(batch.proof.get("elements", 1))
            costs = {name: costs[name] for name in self.costs}
            batch.overhead = {**costs, **batch.overhead}
            with suppress(Unmeasured):  # a guest may run, and its TSC be out of reach
                stamps = self.stamps(self.kind.label)
                if stamps.size:
                    batch.guest = stamps
                    each = np.diff(self.stamps("empty").astype(np.float64), axis=1)
                    tick = 1e6 / self.cpu.get_tsc_khz()
                    batch.overhead = {**batch.overhead, "tsc": float(np.median(each)) * tick}
        return batch


def device_cost(device: FunctionDevice, calls: int = 2000) -> float:
    """What calling the device's function takes in Python, in ns, the call included."""
    function = device.function
    times = []
    for _ in range(5):
        started = perf_counter_ns()
        for _ in range(calls):
            function(0, 1, 0)
        times.append(perf_counter_ns() - started)
    return float(np.median(times)) / calls
