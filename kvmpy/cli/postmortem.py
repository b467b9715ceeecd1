"""What `kvmpy run` prints of a guest that crashed: registers, code, and what to try."""

import sys
from typing import TYPE_CHECKING, Final

from kvmpy.boot.image import Image
from kvmpy.errors import KvmpyError
from kvmpy.exits import InternalError
from kvmpy.machine import Machine
from kvmpy.result import OUTCOMES, Result
from kvmpy.snapshot import Snapshot
from kvmpy.views.code import decoder
from kvmpy.views.cpumode import cpu_mode, linear_rip
from kvmpy.x86.registers import REGISTER_NAMES
from kvmpy.x86.state import SpecialRegisters

__all__ = ["disassemble", "postmortem"]

if TYPE_CHECKING:
    from kvmpy.autopsy import Autopsy

_HINTS: Final = {
    "shutdown": "an exception met no handler: load an IDT, check the stack and the page tables; "
    "or run it with --ring 3, where kvmpy reports exceptions by name",
    "internal-error": "this host's KVM cannot emulate the instruction: use another one, or run "
    "the code in 64-bit ring 3; `kvmpy info` says what runs natively",
    "fail-entry": "the register state breaks a rule of VM entry (SDM Vol.3 27.3): look at the "
    "control registers and segments",
    "unclaimed": "attach a device there, or leave out --strict",
    "exception": "look at the instruction above; `kvmpy asm` shows addresses beside the source",
}

_SHOWN: Final = 3  # instructions
_NO_RAM: Final = "where there is no RAM"
_NOWHERE: Final = (
    "the guest jumped to where there is no RAM: look at the last jump, call or return, and at "
    "the stack it returns by"
)


def postmortem(
    machine: Machine, result: Result, start: Image | Snapshot | None = None
) -> "Autopsy | None":
    """Write it to standard error, and with `start` an autopsy: the run began there.

    None where there is no autopsy, also because the outcome says it all. What to try is written
    where no autopsy says it better.
    """
    exception = result.exception
    text = [f"kvmpy: {result.outcome}: {OUTCOMES[result.outcome]}"]
    if result.detail:
        text.append(f"  {result.detail}")
    registers = result.registers.as_dict()
    names = list(REGISTER_NAMES)
    for at in range(0, len(names), 4):
        row = names[at : at + 4]
        text.append("  " + "  ".join(f"{name:>6} {registers[name]:016x}" for name in row))
    special = machine.cpus[0].get_sregs()
    cs, ss = special.cs.selector, special.ss.selector
    if exception is not None:  # the vCPU's own are those of the stub that reported it
        cs, ss = exception.cs, exception.ss
    text.append(
        f"     cs {cs:04x} base {special.cs.base:x}  ss {ss:04x}"
        f"  cr0 {special.cr0:x}  cr2 {special.cr2:x}  cr3 {special.cr3:x}  cr4 {special.cr4:x}"
        f"  efer {special.efer:x}"
    )
    rip = result.registers.rip if exception is None else exception.rip
    code = result.exit.instruction if isinstance(result.exit, InternalError) else b""
    rflags = result.registers.rflags
    text += [f"  {line}" for line in disassemble(machine, special, rip, code, rflags)]
    hint = _NOWHERE if text[-1].endswith(_NO_RAM) else _HINTS[result.outcome]
    found = None
    if start is not None and result.outcome != "unclaimed":
        found = machine.autopsy(result, start=start)
    if found is None or found.failure or found.cause == "unknown":
        text.append(f"  try: {hint}")
    text += [f"  {line}" for line in str(found).splitlines()] if found is not None else []
    _write("\n".join(text))
    return found


def _write(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # standard error is closed


def disassemble(
    machine: Machine,
    special: SpecialRegisters,
    rip: int,
    code: bytes,
    rflags: int = 2,
) -> list[str]:
    """The next instructions at `rip`, one a line, as the vCPU's mode reads them.

    `code` are their bytes if they are known; otherwise they are read through its page tables.
    """
    linear = linear_rip(special, rip, rflags)
    code = code or _read_code(machine, linear)
    if not code:
        return [f"rip {rip:#x} {_without_code(machine, linear)}"]
    lines = [
        f"{one.address:#x}: {one.bytes.hex(' '):<24} {one.mnemonic} {one.op_str}".rstrip()
        for one in decoder(cpu_mode(special, rflags)).disasm(code, rip, _SHOWN)
    ]
    return lines or [f"{rip:#x}: {code.hex(' ')}  (no instruction)"]


def _without_code(machine: Machine, linear: int) -> str:
    """Why there is none to read at a linear address."""
    try:
        physical = machine.cpus[0].translate(linear).physical
    except KvmpyError:
        physical = None
    if physical is None:
        return "is not mapped: its page tables have no page there"
    return f"is at physical {physical:#x}, {_NO_RAM}"


def _read_code(machine: Machine, linear: int) -> bytes:
    """Up to 15 bytes of code at a linear address, as far as they are mapped."""
    code = bytearray()
    for address in range(linear, linear + 15):
        try:
            physical = machine.cpus[0].translate(address).physical
            if physical is None:
                break
            code += machine.memory.read(physical, 1)
        except KvmpyError:
            break
    return bytes(code)
