"""A machine with one guest of guests/bench in it, and the clock taken at its entries and exits.

The guests are loops around one instruction, and the same loop without it.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from kvmpy.abi import ffi, lib
from kvmpy.bench.model import Batch, Case, Conditions, Ticks, Unmeasured
from kvmpy.boot import Image, load_image
from kvmpy.boot.guests import guests_directory
from kvmpy.bus import Device, FunctionDevice
from kvmpy.devices import Sink
from kvmpy.errors import KvmpyError, UnsupportedError
from kvmpy.machine import Machine

__all__ = ["GuestBench", "Kind"]

PORT: Final = 0x10
OVER: Final = 0x11
PIC_MASK: Final = 0x21  # the interrupt mask of the master PIC, which KVM answers itself
MMIO: Final = 0xD0000000
REAL_MMIO: Final = 0xF0000  # within reach of a real-mode segment, above the machine's RAM
BLOCK: Final = 64
BLOCK_SHARE: Final = 8  # a block takes longer than a sample does, so there are fewer
EMPTY_ROUNDS: Final = 500
EMPTY_TIMES: Final = 5
_COUNTED: Final = ("exits", "io_exits", "mmio_exits", "insn_emulation")


class Kind(NamedTuple):
    """What an operation is made of: its guest and label, the exit's kind, the access's size."""

    guest: str
    label: str
    exit: str
    size: int


def _answer(offset: int, size: int, value: int | None) -> int | None:
    """The least that a device in Python can do."""
    return 0 if value is None else None


class GuestBench:
    """A machine with one guest of guests/bench, and who answers its accesses."""

    def __init__(self, kind: Kind, case: Case, conditions: Conditions) -> None:
        self.kind = kind
        self.conditions, self.case = conditions, case
        mode = "long" if case.mode == "ring3" else case.mode
        source = guests_directory() / "bench" / f"{kind.guest}_{mode}.S"
        self.image: Image = load_image(source)
        if kind.label not in self.image.symbols:
            raise Unmeasured("not available here", f"{mode} mode has no such access")
        pic = case.level == "kernel" and kind.guest == "port"
        try:
            self.machine = Machine(
                "512K" if mode == "real" else "1M",
                mode,
                3 if case.mode == "ring3" else 0,
                devices=False,
                irqchip="full" if pic else None,
            )
        except UnsupportedError as error:
            raise Unmeasured("not available here", str(error)) from None
        self.machine.load_image(self.image)
        self.port = PIC_MASK if pic else PORT
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
        if result.crashed:
            why = result.detail or "an exception: #UD or #GP"
            raise Unmeasured("not available here", f"{result.outcome}: {why}")
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

    def blocks(self) -> Batch:
        """Where KVM answers: a sample is a 64th of one entry with 64 operations in it."""
        wanted = self.conditions
        warmup, count = -(-wanted.warmup // BLOCK), -(-wanted.count // BLOCK_SHARE)
        rows, left = [], 0
        for _ in range(warmup + count):
            self.start(self.kind.label, BLOCK)
            rows.append(self.sample(1, self.run_to_its_end))
            registers = self.cpu.get_regs()
            left += (registers.rsi if self.kind.guest == "kernel" else registers.rcx) & 0xFFFFFFFF
        pairs = np.concatenate(rows)[warmup:]
        samples = np.diff(pairs, axis=1)[:, 0].astype(np.float64) / BLOCK
        total = BLOCK * (warmup + count)
        if left:
            raise KvmpyError(f"{self.case}: the guest left out {left} of {total}")
        # The guest's own counter says so: nobody else sees each of them.
        proof = {"claimed": total, "counted": total - left, "per_sample": BLOCK}
        return Batch(self.case, samples, host=pairs, proof=proof)

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
            batch.overhead = self.overhead()
        return batch
