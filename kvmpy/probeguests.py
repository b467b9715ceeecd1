"""The guests of `kvmpy.probe`: a few bytes each, run with a deadline, and how each ended.

A guest that gets past what it tries writes to the port of `_END`; an exception leads it to a
reporting stub, which writes to `EXCEPTION_PORT` (see kvmpy.x86.tables). Each function answers
"yes", "no", "hangs" or "unknown", and why; it raises ConfigError where KVM refuses the state that
it sets, UnsupportedError where KVM lacks an ioctl, and HostError where the host fails.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

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
    "CODE",
    "DATA",
    "DEADLINE",
    "Answer",
    "hypercall",
    "interrupts",
    "native",
    "paging32",
    "passes",
    "stops",
    "string",
    "syscall",
    "tsc",
]

DEADLINE: Final = 0.3
"""Seconds that a probe guest gets: each is done in microseconds, or hangs."""

CODE: Final = 0x7C00
"""Where a probe guest's code starts."""
DATA: Final = 0xA000
"""A page that it may use."""

_STUBS, _IDT, _HANDLER, _PAGES = 0x8000, 0x9000, 0xB000, 0xC000
_LOOPS: Final = 2000
_PORT: Final = 0x10
_STRING_PORT: Final = 0x11
_END: Final = bytes((0xE6, _PORT))  # out 0x10, al

_TSC, _STAR, _LSTAR, _FMASK = 0x10, 0xC000_0081, 0xC000_0082, 0xC000_0084  # MSRs
_STAR_VALUE: Final = 0x0020_0008 << 32  # the selectors of kvmpy.x86.tables
_NO_SUCH_HYPERCALL: Final = 0x7FFF
_ENOSYS: Final = (1 << 64) - 1000  # -KVM_ENOSYS, include/uapi/linux/kvm_para.h
_GP: Final = 13

Answer: TypeAlias = tuple[str, str]
"""The answer; and why, unless it is yes."""


@contextmanager
def _guest(code: bytes, mode: str = "long", ring: int = 0) -> Iterator[Machine]:
    """A machine that starts at `code`, and where every vector leads to a reporting stub."""
    with Machine("1M", mode, ring, devices=False) as machine:
        machine.load(code, at=CODE)
        if machine.layout.stubs is None:
            _add_stubs(machine)
        yield machine


def _add_stubs(machine: Machine) -> None:
    machine.memory.write(_STUBS, stubs())
    if machine.layout.mode == "real":
        offsets = range(_STUBS, _STUBS + STUB_SIZE * VECTORS, STUB_SIZE)
        machine.memory.write(0, b"".join(struct.pack("<HH", offset, 0) for offset in offsets))
        return
    idt = (idt64 if machine.layout.mode == "long" else idt32)(_STUBS)
    machine.memory.write(_IDT, idt)
    special = machine.cpus[0].get_sregs()
    special.idt = DescriptorTable(_IDT, len(idt) - 1)
    machine.cpus[0].set_sregs(special)


def _run(machine: Machine) -> Exit:
    return machine.cpus[0].run(DEADLINE)


def _ended(exit_: Exit) -> bool:
    return isinstance(exit_, PortOut) and exit_.port == _PORT


def _vector(machine: Machine, exit_: Exit) -> int | None:
    """The vector whose stub the guest is in."""
    if not isinstance(exit_, PortOut) or exit_.port != EXCEPTION_PORT:
        return None
    return (machine.cpus[0].get_regs().rip - (machine.layout.stubs or _STUBS)) // STUB_SIZE


def _judge(machine: Machine, exit_: Exit, good: bool) -> Answer:
    """The answer for how a guest ended, in words unless it is what was hoped for."""
    vector = _vector(machine, exit_)
    if good:
        return "yes", ""
    if vector is not None:
        name, words = EXCEPTIONS.get(vector, (f"vector {vector}", "interrupt"))
        return "no", f"the guest gets {name} ({words})"
    if _ended(exit_):
        return "no", "the guest goes on without it"
    match exit_:
        case Interrupted():
            rip = machine.cpus[0].get_regs().rip
            return "hangs", f"only a signal ends KVM_RUN, with RIP at {rip:#x}"
        case Shutdown():
            return "no", "a triple fault"
        case InternalError():
            return "no", exit_.reason
    return "no", f"the guest ends with {exit_}"


def passes(code: bytes, mode: str = "long", rax: int | None = None) -> Answer:
    """Whether ring-0 code gets to its end, with that value in RAX."""
    with _guest(code + _END, mode) as machine:
        exit_ = _run(machine)
        if _ended(exit_) and rax not in (None, found := machine.cpus[0].get_regs().rax):
            return "no", f"the result is {found:#x}, not {rax:#x}"
        return _judge(machine, exit_, _ended(exit_))


def interrupts(code: bytes, vector: int, mode: str = "long") -> Answer:
    """Whether ring-0 code gets to the handler of that vector."""
    with _guest(code + _END, mode) as machine:
        exit_ = _run(machine)
        return _judge(machine, exit_, _vector(machine, exit_) == vector)


def stops(code: bytes, ring: int, *places: int, **debug: Any) -> Answer:
    """Whether KVM_SET_GUEST_DEBUG stops a guest at these places in its code, one by one."""
    with _guest(code + _END, ring=ring) as machine:
        machine.cpus[0].set_guest_debug(**debug)
        for place in places:
            exit_ = _run(machine)
            answer = _judge(machine, exit_, isinstance(exit_, Debug) and exit_.pc == CODE + place)
            if answer[0] != "yes":
                break
        return answer


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
    if not _ended(exit_):
        return "unknown", f"the guest ends with {exit_}"
    emulated = f"KVM emulates about {after - before} of {2 * _LOOPS + 2} instructions"
    return ("yes", "") if after - before < _LOOPS else ("no", emulated)


def _vendor() -> bytes:
    with KVM() as kvm:
        for leaf in kvm.get_supported_cpuid():
            if leaf.function == 0:
                return struct.pack("<III", leaf.ebx, leaf.edx, leaf.ecx)
    return b""


def hypercall() -> Answer:
    """Whether the CPU's own instruction reaches KVM, which does not know that hypercall.

    VMCALL is VMX's (SDM Vol.3 31.3), VMMCALL is SVM's (APM Vol.3). For an unknown number KVM
    puts -KVM_ENOSYS into RAX (Documentation/virt/kvm/x86/hypercalls.rst).
    """
    amd = _vendor() in (b"AuthenticAMD", b"HygonGenuine")
    instruction = b"\x0f\x01\xd9" if amd else b"\x0f\x01\xc1"  # vmmcall, vmcall
    load = b"\xb8" + _NO_SUCH_HYPERCALL.to_bytes(4, "little")  # mov eax, number
    answer, why = passes(load + instruction, rax=_ENOSYS)
    return answer, why and f"with {'VMMCALL' if amd else 'VMCALL'}, {why}"


def string(code: bytes, kind: type[PortIn | PortOut]) -> Answer:
    """Whether REP OUTSB or REP INSB of 8 bytes gives an exit with more than one of them."""
    with _guest(code + _END) as machine:
        start = Registers(rip=CODE, rsi=DATA, rdi=DATA, rcx=8, rdx=_STRING_PORT)
        machine.cpus[0].set_regs(start)
        exit_ = _run(machine)
        if isinstance(exit_, kind) and exit_.port == _STRING_PORT:
            alone = "each element is an exit of its own"
            return ("yes", "") if exit_.count > 1 else ("no", alone)
        return _judge(machine, exit_, False)


def paging32() -> Answer:
    """Whether code runs at the linear address 4 MiB + CODE, which paging puts at CODE."""
    with _guest(_END, "protected") as machine:
        # Two 4 MiB pages, present and writable, at 0 (SDM Vol.3 table 4-4).
        machine.memory.write(_PAGES, struct.pack("<II", 0x83, 0x83))
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.cr3, special.cr4 = _PAGES, special.cr4 | CR4.PSE
        special.cr0 |= CR0.PG
        cpu.set_sregs(special)
        cpu.set_regs(Registers(rip=(4 << 20) + CODE))
        exit_ = _run(machine)
        answer, why = _judge(machine, exit_, _ended(exit_))
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
        if _vector(machine, exit_) == _GP:
            return "no", "its handler cannot use MOV from CR0, as if it were still in ring 3"
        return _judge(machine, exit_, _ended(exit_))


def tsc() -> Answer:
    """Whether ring 3 reads a TSC that was set to one that no host has reached."""
    wanted = 1 << 62  # 29 years at 5 GHz
    # rdtsc; shl rdx, 32; or rax, rdx
    with _guest(b"\x0f\x31" + b"\x48\xc1\xe2\x20" + b"\x48\x09\xd0" + _END, ring=3) as machine:
        machine.cpus[0].set_msrs({_TSC: wanted})
        exit_ = _run(machine)
        if _ended(exit_) and machine.cpus[0].get_regs().rax < wanted:
            return "no", "the guest reads the host's"
        return _judge(machine, exit_, _ended(exit_))
