"""The guests of `kvmpy.probe`: a few bytes each, run with a deadline, and how they ended.

A guest that gets past what it tries writes to a port (`_END`); an exception leads it to a
reporting stub, which writes to `EXCEPTION_PORT` (kvmpy.x86.tables). Each function answers with
"yes", "no", "hangs" or "unknown", and why; it raises ConfigError where KVM refuses the state
that it sets, and HostError where the host fails. What real hardware does is in the SDM's and
the APM's description of each instruction, which KVM leaves to the processor in most cases.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from kvmpy.errors import UnsupportedError
from kvmpy.exits import Debug, Exit, InternalError, Interrupted, PortIn, PortOut, Shutdown
from kvmpy.kvm import KVM
from kvmpy.machine import Machine
from kvmpy.x86.exceptions import EXCEPTIONS
from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.registers import Registers
from kvmpy.x86.segments import DescriptorTable
from kvmpy.x86.tables import EXCEPTION_PORT, STUB_SIZE, VECTORS, idt32, idt64, stubs

__all__ = [
    "DEADLINE",
    "Answer",
    "breakpoint_hit",
    "hypercall",
    "native",
    "paging32",
    "passes",
    "single_step",
    "software_breakpoint",
    "string_count",
    "syscall",
    "tsc",
    "vectors",
    "watchpoint",
]

DEADLINE: Final = 0.3
"""Seconds that a probe guest gets: each is done in microseconds, or hangs."""

_CODE, _STUBS, _IDT, _DATA, _HANDLER, _PAGES = 0x7C00, 0x8000, 0x9000, 0xA000, 0xB000, 0xC000
_LOOPS: Final = 2000
_PORT: Final = 0x10
_END: Final = bytes((0xE6, _PORT))  # out 0x10, al
_NOP: Final = b"\x90"

_TSC, _STAR, _LSTAR, _FMASK = 0x10, 0xC000_0081, 0xC000_0082, 0xC000_0084  # MSRs
_STAR_VALUE: Final = 0x0020_0008 << 32  # the selectors of kvmpy.x86.tables
_NO_SUCH_HYPERCALL: Final = 0x7FFF
_ENOSYS: Final = (1 << 64) - 1000  # -KVM_ENOSYS, include/uapi/linux/kvm_para.h

Answer: TypeAlias = tuple[str, str]
"""yes, no, hangs or unknown; and why, unless it is yes."""


@contextmanager
def _guest(code: bytes, mode: str = "long", ring: int = 0) -> Iterator[Machine]:
    """A machine that starts at `code`, and where every vector leads to a reporting stub."""
    with Machine("1M", mode, ring, devices=False) as machine:
        machine.load(code, at=_CODE)
        if machine.layout.stubs is None:
            machine.memory.write(_STUBS, stubs())
            special = machine.cpus[0].get_sregs()
            if mode == "real":
                vectors = (_STUBS + STUB_SIZE * vector for vector in range(VECTORS))
                machine.memory.write(0, b"".join(struct.pack("<HH", at, 0) for at in vectors))
            else:
                idt = (idt64 if mode == "long" else idt32)(_STUBS)
                machine.memory.write(_IDT, idt)
                special.idt = DescriptorTable(_IDT, len(idt) - 1)
                machine.cpus[0].set_sregs(special)
        yield machine


def _vector(machine: Machine) -> int:
    base = machine.layout.stubs or _STUBS
    return (machine.cpus[0].get_regs().rip - base) // STUB_SIZE


def _judge(machine: Machine, exit_: Exit, good: bool) -> Answer:
    """The answer for how a guest ended, in words unless it is what was hoped for."""
    if good:
        return "yes", ""
    match exit_:
        case Interrupted():
            rip = machine.cpus[0].get_regs().rip
            return "hangs", f"only a signal ends KVM_RUN, with RIP at {rip:#x}"
        case PortOut(port=port) if port == EXCEPTION_PORT:
            vector = _vector(machine)
            name, words = EXCEPTIONS.get(vector, (f"vector {vector}", "interrupt"))
            return "no", f"the guest gets {name} ({words})"
        case PortOut(port=port) if port == _PORT:
            return "no", "the guest went on without it"
        case Shutdown():
            return "no", "a triple fault"
        case InternalError():
            return "no", exit_.reason
    return "no", f"the guest ended with {exit_}"


def _run(machine: Machine) -> Exit:
    return machine.cpus[0].run(DEADLINE)


def _is_end(exit_: Exit) -> bool:
    return isinstance(exit_, PortOut) and exit_.port == _PORT


def _is_exception(machine: Machine, exit_: Exit, vector: int) -> bool:
    reported = isinstance(exit_, PortOut) and exit_.port == EXCEPTION_PORT
    return reported and _vector(machine) == vector


def passes(code: bytes, mode: str = "long", rax: int | None = None) -> Answer:
    """Whether ring-0 code gets to its end, with that value in RAX."""
    with _guest(code + _END, mode) as machine:
        exit_ = _run(machine)
        if _is_end(exit_) and rax not in (None, found := machine.cpus[0].get_regs().rax):
            return "no", f"the result is {found:#x}, not {rax:#x}"
        return _judge(machine, exit_, _is_end(exit_))


def vectors(code: bytes, vector: int, mode: str = "long") -> Answer:
    """Whether code gets to the handler of that vector."""
    with _guest(code + _END, mode) as machine:
        exit_ = _run(machine)
        return _judge(machine, exit_, _is_exception(machine, exit_, vector))


def native(mode: str, ring: int) -> Answer:
    """Whether KVM's emulator stays out of a loop, by the statistic that counts its work."""
    # mov cx or ecx, 2000; dec cx or ecx; jnz to the dec
    load = b"\xb9" + _LOOPS.to_bytes(2 if mode == "real" else 4, "little")
    with _guest(load + b"\xff\xc9" + b"\x75\xfc" + _END, mode, ring) as machine:
        try:
            statistics = machine.cpus[0].stats()
        except UnsupportedError as error:
            return "unknown", str(error)
        with statistics:
            before = statistics.read().get("insn_emulation")
            exit_ = _run(machine)
            after = statistics.read().get("insn_emulation")
    if not isinstance(before, int) or not isinstance(after, int):
        return "unknown", "this KVM has no statistic insn_emulation"
    if not _is_end(exit_):
        return "unknown", f"the guest ended with {exit_}"
    emulated = f"KVM emulated {after - before} of {2 * _LOOPS} instructions"
    return ("yes", "") if after - before < _LOOPS else ("no", emulated)


def single_step(ring: int) -> Answer:
    """Whether two single steps stop after one instruction each."""
    with _guest(_NOP * 3 + _END, ring=ring) as machine:
        machine.cpus[0].set_guest_debug(single_step=True)
        for step in (1, 2):
            exit_ = _run(machine)
            good = isinstance(exit_, Debug) and exit_.pc == _CODE + step
            if not good:
                break
        return _judge(machine, exit_, good)


def breakpoint_hit(ring: int) -> Answer:
    """Whether a hardware breakpoint stops the guest before the third instruction."""
    at = _CODE + 2
    with _guest(_NOP * 3 + _END, ring=ring) as machine:
        machine.cpus[0].set_guest_debug(breakpoints={at: "x"})
        exit_ = _run(machine)
        return _judge(machine, exit_, isinstance(exit_, Debug) and exit_.pc == at)


def watchpoint() -> Answer:
    """Whether a hardware watchpoint stops the guest at a write."""
    # mov [_DATA], al; nop
    code = b"\x88\x04\x25" + _DATA.to_bytes(4, "little") + _NOP
    with _guest(code + _END) as machine:
        machine.cpus[0].set_guest_debug(breakpoints={_DATA: "w1"})
        exit_ = _run(machine)
        return _judge(machine, exit_, isinstance(exit_, Debug))


def software_breakpoint() -> Answer:
    """Whether int3 stops the guest and is not delivered to it."""
    with _guest(_NOP + b"\xcc" + _END) as machine:  # nop; int3
        machine.cpus[0].set_guest_debug(software_breakpoints=True)
        exit_ = _run(machine)
        return _judge(machine, exit_, isinstance(exit_, Debug))


def _vendor() -> bytes:
    with KVM() as kvm:
        for leaf in kvm.get_supported_cpuid():
            if leaf.function == 0:
                return struct.pack("<III", leaf.ebx, leaf.edx, leaf.ecx)
    return b""


def hypercall() -> Answer:
    """Whether the CPU's own instruction reaches KVM, which does not know that hypercall."""
    amd = _vendor() in (b"AuthenticAMD", b"HygonGenuine")
    instruction = b"\x0f\x01\xd9" if amd else b"\x0f\x01\xc1"  # vmmcall, vmcall
    # mov eax, a number that is no hypercall
    code = b"\xb8" + _NO_SUCH_HYPERCALL.to_bytes(4, "little") + instruction
    answer, why = passes(code, rax=_ENOSYS)
    return answer, why and f"with {'VMMCALL' if amd else 'VMCALL'}, {why}"


def string_count(code: bytes, kind: type[PortIn | PortOut]) -> Answer:
    """Whether REP OUTSB or REP INSB of 8 bytes gives an exit with more than one of them."""
    with _guest(code + _END) as machine:
        start = Registers(rip=_CODE, rsi=_DATA, rdi=_DATA, rcx=8, rdx=_PORT + 1)
        machine.cpus[0].set_regs(start)
        exit_ = _run(machine)
        if isinstance(exit_, kind) and exit_.port == _PORT + 1 and exit_.count == 1:
            return "no", "each element is an exit of its own"
        return _judge(machine, exit_, isinstance(exit_, kind) and exit_.count > 1)


def paging32() -> Answer:
    """Whether code runs at the linear address 4 MiB + _CODE, which paging puts at _CODE."""
    directory = struct.pack("<II", 0x83, 0x83)  # two 4 MiB pages: present, writable, at 0
    with _guest(_END, "protected") as machine:
        machine.memory.write(_PAGES, directory)
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.cr3, special.cr4 = _PAGES, special.cr4 | CR4.PSE
        special.cr0 |= CR0.PG
        cpu.set_sregs(special)
        cpu.set_regs(Registers(rip=(4 << 20) + _CODE))
        exit_ = _run(machine)
        answer, why = _judge(machine, exit_, _is_end(exit_))
        if answer != "yes" and not cpu.get_sregs().cr0 & CR0.PG:
            why += ", and CR0.PG reads as 0"
        return answer, why


def syscall() -> Answer:
    """Whether SYSCALL in ring 3 leads to ring 0, where MOV from CR0 is allowed."""
    with _guest(b"\x0f\x05", ring=3) as machine:  # syscall
        machine.memory.write(_HANDLER, b"\x0f\x20\xc0" + _END)  # mov rax, cr0
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.efer |= EFER.SCE
        cpu.set_sregs(special)
        cpu.set_msrs({_STAR: _STAR_VALUE, _LSTAR: _HANDLER, _FMASK: 0})
        exit_ = _run(machine)
        answer, why = _judge(machine, exit_, _is_end(exit_))
        if _is_exception(machine, exit_, 13):
            why = "its handler cannot use MOV from CR0, as if it were still in ring 3"
        return answer, why


def tsc() -> Answer:
    """Whether ring 3 reads the TSC that was set, which is that of decades."""
    wanted = 1 << 62
    # rdtsc; shl rdx, 32; or rax, rdx
    with _guest(b"\x0f\x31" + b"\x48\xc1\xe2\x20" + b"\x48\x09\xd0" + _END, ring=3) as machine:
        machine.cpus[0].set_msrs({_TSC: wanted})
        exit_ = _run(machine)
        if not _is_end(exit_):
            return _judge(machine, exit_, False)
        found = machine.cpus[0].get_regs().rax
        return ("yes", "") if found >= wanted else ("no", "the guest reads the host's")
