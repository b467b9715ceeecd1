"""Autopsies of machines: the state of the dead one, and copies of it to replay."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvmpy.autopsy.autopsy import Autopsy
from kvmpy.autopsy.conduct import conduct
from kvmpy.autopsy.replay import Copy
from kvmpy.autopsy.scene import Scene
from kvmpy.boot.segments import Image
from kvmpy.errors import KvmpyError
from kvmpy.exits import InternalError, decode, exit_kind
from kvmpy.machine import Machine
from kvmpy.result import Result
from kvmpy.snapshot import Snapshot
from kvmpy.vcpu import VCPU
from kvmpy.views.pages import Read, reader

__all__ = ["autopsy_of"]

M = TypeVar("M", bound=Machine)
_PHYSICAL_BITS_LEAF = 0x8000_0008  # EAX[7:0] is MAXPHYADDR (SDM Vol.2 CPUID)
_RECORDS = 6  # of the recorder's
_SHORT = 0.05  # seconds of a run that is repeated just to tell what came before its end


def autopsy_of(
    machine: M,
    result: Result | None,
    start: Snapshot | Image | None,
    attach: Callable[[M], object] | None,
    *,
    last: Sequence[str] | None,
    cpu: int,
) -> Autopsy:
    """See `Machine.autopsy`. What fails here is said in the autopsy: it never hides an outcome."""
    outcome, rip = result.outcome if result else "unknown", 0
    try:
        vcpu = machine.cpus[cpu]
        machine.check_stopped()
        registers = vcpu.get_regs() if result is None else result.registers
        rip = registers.rip
        exit_ = decode(memoryview(vcpu.run_page)) if result is None else result.exit
        outcome = exit_kind(vcpu.run_page[8]) if result is None else outcome
        code = exit_.instruction if isinstance(exit_, InternalError) else b""
        bits = _physical_bits(vcpu)
        scene = _scene(vcpu, reader(machine.memory.read), code, bits)
        exception = result.exception if result is not None else None
        if exception is not None:
            scene = scene.at_ring3(registers, exception.cs, exception.ss, exception.address or 0)
        lines = _recorded(machine) if last is None else last
        origin = machine.last_snapshot if start is None else start

        def make_copy() -> M:
            assert origin is not None
            return _copy(machine, origin, attach)

        def scene_of(copy: Copy) -> Scene:
            assert isinstance(copy, Machine)
            return _scene(copy.cpus[0], reader(copy.memory.read), b"", bits)

        return conduct(
            scene,
            outcome,
            exit_,
            exception,
            last=lines,
            make_copy=None if origin is None or len(machine.cpus) > 1 else make_copy,
            scene_of=scene_of,
            cheap=result is not None and result.seconds < _SHORT and not lines,
        )
    except Exception as error:
        failure = f"the autopsy itself failed: {type(error).__name__}: {error}"
        return Autopsy("unknown", outcome, rip, "", failure=failure)


def _copy(machine: M, start: Snapshot | Image, attach: Callable[[M], object] | None) -> M:
    if isinstance(start, Snapshot):
        return type(machine).from_snapshot(start, attach)
    config = machine.config
    copy = type(machine).from_image(
        start, config.memory, irqchip=config.irqchip, strict=config.strict
    )
    if attach is not None:
        try:
            attach(copy)
        except BaseException:
            copy.close()
            raise
    return copy


def _scene(vcpu: VCPU, read: Read, code: bytes, physical_bits: int) -> Scene:
    registers, special = vcpu.get_regs(), vcpu.get_sregs()
    return Scene(registers, special, read, code, physical_bits, vcpu.get_debugregs())


def _physical_bits(vcpu: VCPU) -> int:
    try:
        leaves = {entry.function: entry.eax & 0xFF for entry in vcpu.get_cpuid2()}
    except KvmpyError:
        return 52
    return leaves.get(_PHYSICAL_BITS_LEAF) or 52


def _recorded(machine: object) -> list[str]:
    """The last exits, where the machine has a recorder and it is on."""
    records = list(getattr(machine, "trace", ()))[-_RECORDS:]
    return [record.text or record.kind for record in records]
