"""What comes to a guest from outside: interrupts, INIT and SIPI, and the kick that ends a run.

Most take two threads: this one runs the guest, and another, on a CPU of its own, raises the event
when the guest has been where it is wanted for a while. The guest's handler answers by a port
write, whose exit ends the sample.
"""

import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from kvmpy.abi import lib, pack
from kvmpy.bench.calls import Raiser, raiser, timed
from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import MODES, Batch, Case, Conditions, Operation, Unmeasured
from kvmpy.bench.takes import nothing
from kvmpy.boot import load_image
from kvmpy.boot.guests import guests_directory
from kvmpy.calls import Call, ioctl, kick, run_for, write
from kvmpy.errors import KvmpyError, UnsupportedError
from kvmpy.exits import PortOut, decode
from kvmpy.interrupts import IOAPIC, IrqchipRoute, MsiRoute
from kvmpy.vcpu import NO_LIMIT, VCPU
from kvmpy.x86.state import MPState

__all__ = ["ROWS"]

_MOST: Final = 60  # samples a batch, since between them lies a delay
_WARMUP: Final = 10
_DELAY_NS: Final = 100_000  # an exit, an entry and a few emulated instructions take less
_SENT_AT: Final = 0x40000  # where the guests note when it was sent, came, and how often
_COUNT: Final = 0x40010
_AT_APIC: Final = 0x40  # vectors of guests/bench/irq_long.S
_PLAIN: Final = 0x41
_GSI: Final = 4
_MSI_ADDRESS: Final = 0xFEE00000  # to the local APIC of ID 0, SDM Vol.3 10.11.1
_SPURIOUS: Final = 0xF0
_ENABLED: Final = 0x1FF
_FOREVER: Final = 0x7FFFFFFF
_HALT_POLL: Final = "/sys/module/kvm/parameters/halt_poll_ns"

_Take: TypeAlias = Callable[[GuestBench], Batch]


def _rounds(bench: GuestBench) -> int:
    return _WARMUP + min(_MOST, bench.conditions.count)


def _delay_ns(halted: bool) -> int:
    """How long the guest has waited: halted, for longer than KVM polls before it sleeps."""
    try:
        with open(_HALT_POLL) as file:
            polls = int(file.read()) if halted else 0
    except (OSError, ValueError):
        polls = 0
    return max(_DELAY_NS, 2 * polls)


def _asked(
    bench: GuestBench, cpu: VCPU, helper: Raiser, code: int, note: Callable[[], object] = nothing
) -> list[tuple[int, int]]:
    """Have the helper raise its event in each round, which shall end the run in that way.

    `note` is called after each round.
    """
    rows = []
    loop = cpu.begin(bench.conditions.deadline, raw=True)
    try:
        for _ in range(_rounds(bench)):
            found, raised, left = helper.ask(loop)
            if found == lib.KVMPY_DEADLINE:
                reason = f"no answer in {bench.conditions.deadline:g} s"
                raise Unmeasured("not available here", reason)
            if found != code:
                raise KvmpyError(f"{bench.case}: the run ended with {found}, not {code}")
            if found == lib.KVMPY_EXIT:
                exit_ = decode(memoryview(cpu.run_page))
                if not isinstance(exit_, PortOut):
                    raise Unmeasured("not available here", f"the guest ended in {exit_}")
            rows.append((raised, left))
            note()
    finally:
        lib.kvmpy_end(loop)
    return rows


def _batch(bench: GuestBench, rows: Sequence[tuple[int, int]], counted: int) -> Batch:
    pairs = np.array(rows, np.uint64)
    if counted != len(pairs):
        raise KvmpyError(f"{bench.case}: {counted} counted, where {len(pairs)} were claimed")
    samples = np.diff(pairs.astype(np.int64), axis=1)[_WARMUP:, 0].astype(np.float64)
    proof = {"claimed": len(pairs), "counted": counted, "per_sample": 1}
    return Batch(bench.case, samples, host=pairs[_WARMUP:], proof=proof)


def _handled(bench: GuestBench) -> int:
    """How many interrupts the guest's handler has counted."""
    return int.from_bytes(bench.machine.memory.read(_COUNT, 4), "little")


def _prepare(bench: GuestBench, label: str) -> None:
    bench.start(label, 1)
    bench.machine.memory.write(_SENT_AT, bytes(24))
    if bench.machine.vm.irqchip:
        for cpu in bench.machine.cpus:
            registers = bytearray(cpu.get_lapic())
            struct.pack_into("<I", registers, _SPURIOUS, _ENABLED)
            cpu.set_lapic(bytes(registers))


# Interrupts ---------------------------------------------------------------------------------


def _queued(halted: bool, bench: GuestBench) -> Batch:
    """KVM_INTERRUPT: both calls are this thread's, and the guest is not in KVM_RUN meanwhile."""
    _prepare(bench, "halted" if halted else "ready")
    cpu = bench.cpu
    cpu.sync_regs = 0
    cpu.get_xcrs()  # hands over the registers that wait in the mapping
    run = ioctl("RUN", cpu.fd)
    queue = ioctl("INTERRUPT", cpu.fd, bytearray(struct.pack("<I", _PLAIN)))
    loop = cpu.begin(bench.conditions.deadline, raw=True)  # for its deadline
    try:
        pairs = timed([run, queue, run], _rounds(bench), 1, 2)
    finally:
        lib.kvmpy_end(loop)
    return _batch(bench, [tuple(row) for row in pairs.tolist()], _handled(bench))


def _interrupt(
    make: Callable[[GuestBench, int], Sequence[Call]], halted: bool, bench: GuestBench
) -> Batch:
    """What `make` sets up and calls for raises the interrupt while the guest runs, or sleeps."""
    _prepare(bench, "halted" if halted else "running")
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        calls = make(bench, event)
        with raiser(calls, bench.conditions, _delay_ns(halted)) as helper:
            rows = _asked(bench, bench.cpu, helper, lib.KVMPY_EXIT)
    finally:
        os.close(event)
    return _batch(bench, rows, _handled(bench))


def _line(bench: GuestBench, event: int) -> Sequence[Call]:
    vm = bench.machine.vm
    vm.set_gsi_routing([IrqchipRoute(_GSI, IOAPIC, _GSI)])
    chip = bytearray(vm.get_irqchip(IOAPIC))
    # Its redirection entries begin at byte 24 (struct kvm_ioapic_state): edge, to APIC 0.
    struct.pack_into("<Q", chip, 24 + 8 * _GSI, _AT_APIC)
    vm.set_irqchip(IOAPIC, bytes(chip))
    return [ioctl("IRQ_LINE", vm.fd, pack("IRQ_LINE", "<II", _GSI, level)) for level in (1, 0)]


def _irqfd(bench: GuestBench, event: int) -> Sequence[Call]:
    bench.machine.vm.set_gsi_routing([MsiRoute(_GSI, _MSI_ADDRESS, _AT_APIC)])
    bench.machine.vm.irqfd(event, _GSI)
    return [write(event, 1)]


def _msi(bench: GuestBench, event: int) -> Sequence[Call]:
    message = pack("SIGNAL_MSI", "<IIII16x", _MSI_ADDRESS, 0, _AT_APIC, 0)
    return [ioctl("SIGNAL_MSI", bench.machine.vm.fd, message)]


# From vCPU to vCPU --------------------------------------------------------------------------


def _sent(label: str, waits: str, bench: GuestBench) -> Batch:
    """The first vCPU sends, the second one receives; both note the time-stamp counter."""
    if label == "init":
        bench.machine.load_image(load_image(guests_directory() / "bench" / "started_real.S"))
    _prepare(bench, waits)
    sender, receiver = bench.machine.cpus
    registers = sender.get_regs()
    registers.rip = bench.image.symbols[label]
    sender.set_regs(registers)
    if label != "init":
        receiver.set_mp_state(MPState.RUNNABLE)
    stamps: list[tuple[int, ...]] = []

    def note() -> None:
        stamps.append(struct.unpack("<QQ", bench.machine.memory.read(_SENT_AT, 16)))

    sender.loop.raw, sender.loop.exits_left = True, NO_LIMIT
    calls = [run_for(sender.loop, bench.conditions.deadline)]
    with raiser(calls, bench.conditions, _delay_ns(waits == "halted")) as helper:
        rows = _asked(bench, receiver, helper, lib.KVMPY_EXIT, note)
    batch = _batch(bench, rows, _handled(bench))
    batch.guest = np.array(stamps, np.uint64)[_WARMUP:]
    ticks = np.diff(batch.guest.astype(np.int64), axis=1)[:, 0].astype(np.float64)
    if (ticks <= 0).any():
        raise Unmeasured("not available here", "the TSCs of two vCPUs are not in step")
    batch.samples = ticks * 1e6 / bench.cpu.get_tsc_khz()
    bench.costs = ()  # the host's clock is no part of it
    return batch


def _kicked(bench: GuestBench) -> Batch:
    """A signal to the thread that runs the guest, which makes KVM_RUN return."""
    bench.start("empty", _FOREVER)
    with raiser([kick(bench.cpu.loop)], bench.conditions, _DELAY_NS) as helper:
        rows = _asked(bench, bench.cpu, helper, lib.KVMPY_STOPPED)
    return _batch(bench, rows, len(rows))


# The table ----------------------------------------------------------------------------------

_Make: TypeAlias = Callable[[GuestBench, int], Sequence[Call]]
_TO_HANDLER: Final = "from before {} to the exit of the handler's first port write"
_BY_TSC: Final = "by the guests' own TSC: from before the {} to {}'s first instructions"
_WAITS: Final = (("running", False), ("halted", True))
_INTERRUPTS: Final[tuple[tuple[str, str, str | None, _Make], ...]] = (
    ("irq-line", "KVM_IRQ_LINE, through the IOAPIC", "full", _line),
    ("irqfd", "a write to an irqfd, routed to an MSI", "split", _irqfd),
    ("msi", "KVM_SIGNAL_MSI", "split", _msi),
)


def _measure(
    take: _Take, kind: Kind, options: dict[str, Any], case: Case, conditions: Conditions
) -> Batch:
    try:
        bench = GuestBench(kind, case, conditions, **options)
        bench.most_stamps = 0
        bench.costs = ("clock",)  # the guest waits for the event, or the end, and goes no round
        return bench.proven(partial(take, bench))
    except UnsupportedError as error:
        raise Unmeasured("not available here", str(error)) from None


def _row(
    name: str,
    about: str,
    includes: str,
    take: _Take,
    **options: Any,
) -> Operation:
    """`options` are those of the machine."""
    measure = partial(_measure, take, Kind("irq", "empty"), options)
    return Operation(name, "inward", about, includes, measure, modes=("long",))


ROWS: Final = (
    *(
        _row(
            f"irq-inject-{state}",
            f"KVM_INTERRUPT to the handler of a guest that {'halted' if halted else 'left'}",
            _TO_HANDLER.format("KVM_INTERRUPT, and KVM_RUN after it,"),
            partial(_queued, halted),
        )
        for state, halted in _WAITS
    ),
    *(
        _row(
            f"{name}-{state}",
            f"{about}, to the handler of a {state} guest",
            _TO_HANDLER.format("the system call, on another CPU,"),
            partial(_interrupt, make, halted),
            irqchip=irqchip,
        )
        for name, about, irqchip, make in _INTERRUPTS
        for state, halted in _WAITS
    ),
    Operation(
        "kick",
        "inward",
        "a signal to the thread that runs a guest",
        "from before the signal, on another CPU, to the return of KVM_RUN and of the C loop",
        partial(_measure, _kicked, Kind("port", "empty"), {}),
        modes=MODES,
    ),
    *(
        _row(
            f"ipi-{state}",
            f"an interrupt from vCPU to vCPU, the second one {state}",
            _BY_TSC.format("write to the ICR", "the handler"),
            partial(_sent, "ipi", state),
            irqchip="split",
            cpus=2,
        )
        for state, _ in _WAITS
    ),
    _row(
        "init-sipi",
        "INIT and SIPI from vCPU to vCPU",
        _BY_TSC.format("two writes to the ICR", "the started vCPU"),
        partial(_sent, "init", "running"),
        irqchip="split",
        cpus=2,
    ),
)
"""The operations of this module."""
