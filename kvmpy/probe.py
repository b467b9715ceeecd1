"""What the host's KVM really does, found by running guests of a few bytes.

KVM_CHECK_EXTENSION tells what KVM offers, not what works: a KVM that runs ring 0 by emulation has
gaps that no capability names. So each probe runs a small guest, with a deadline, and looks at how
it ends. An answer is found once per process:

    if probe("single-step").answer != "yes":
        pytest.skip(probe("single-step").detail)

A guest that gets past what it tries writes to the port of `_END`; an exception leads it to a
reporting stub, which writes to `EXCEPTION_PORT` (see kvmpy.x86.tables).
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from kvmpy.errors import ConfigError, KvmpyError, UnsupportedError
from kvmpy.exits import Debug, Exit, InternalError, Interrupted, PortIn, PortOut, Shutdown
from kvmpy.kvm import KVM
from kvmpy.machine import Machine
from kvmpy.x86.exceptions import EXCEPTIONS
from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.registers import Registers
from kvmpy.x86.segments import DescriptorTable
from kvmpy.x86.tables import EXCEPTION_PORT, STUB_SIZE, VECTORS, idt32, idt64, stubs

__all__ = ["DEADLINE", "PROBES", "Finding", "Probe", "probe", "probe_all"]

DEADLINE: Final = 0.3
"""Seconds that a probe guest gets: each is done in microseconds, or hangs."""

_CODE, _STUBS, _IDT, _DATA, _HANDLER, _PAGES = 0x7C00, 0x8000, 0x9000, 0xA000, 0xB000, 0xC000
_LOOPS: Final = 2000
_PORT: Final = 0x10
_STRING_PORT: Final = 0x11
_END: Final = bytes((0xE6, _PORT))  # out 0x10, al

_TSC, _STAR, _LSTAR, _FMASK = 0x10, 0xC000_0081, 0xC000_0082, 0xC000_0084  # MSRs
_STAR_VALUE: Final = 0x0020_0008 << 32  # the selectors of kvmpy.x86.tables
_NO_SUCH_HYPERCALL: Final = 0x7FFF
_ENOSYS: Final = (1 << 64) - 1000  # -KVM_ENOSYS, include/uapi/linux/kvm_para.h
_GP: Final = 13

_Answer: TypeAlias = tuple[str, str]  # the answer; and why, unless it is yes


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found: `answer` is "yes", "no", "hangs" or "unknown".

    `detail` is what was probed, and unless the answer is yes, why it is not.
    """

    name: str
    answer: str
    detail: str


class Probe(NamedTuple):
    """What is probed, in words, and the function that finds it out."""

    subject: str
    ask: Callable[[], tuple[str, str]]


@contextmanager
def _guest(code: bytes, mode: str = "long", ring: int = 0) -> Iterator[Machine]:
    """A machine that starts at `code`, and where every vector leads to a reporting stub."""
    with Machine("1M", mode, ring, devices=False) as machine:
        machine.load(code, at=_CODE)
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


def _judge(machine: Machine, exit_: Exit, good: bool) -> _Answer:
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


def _passes(code: bytes, mode: str = "long", rax: int | None = None) -> _Answer:
    """Whether ring-0 code gets to its end, with that value in RAX."""
    with _guest(code + _END, mode) as machine:
        exit_ = _run(machine)
        if _ended(exit_) and rax not in (None, found := machine.cpus[0].get_regs().rax):
            return "no", f"the result is {found:#x}, not {rax:#x}"
        return _judge(machine, exit_, _ended(exit_))


def _interrupts(code: bytes, vector: int, mode: str = "long") -> _Answer:
    """Whether ring-0 code gets to the handler of that vector."""
    with _guest(code + _END, mode) as machine:
        exit_ = _run(machine)
        return _judge(machine, exit_, _vector(machine, exit_) == vector)


def _stops(code: bytes, ring: int, *places: int, **debug: Any) -> _Answer:
    """Whether KVM_SET_GUEST_DEBUG stops a guest at these places in its code, one by one."""
    with _guest(code + _END, ring=ring) as machine:
        machine.cpus[0].set_guest_debug(**debug)
        for place in places:
            exit_ = _run(machine)
            answer = _judge(machine, exit_, isinstance(exit_, Debug) and exit_.pc == _CODE + place)
            if answer[0] != "yes":
                break
        return answer


def _native(mode: str, ring: int) -> _Answer:
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
    emulated = f"KVM emulates about {after - before} of {2 * _LOOPS} instructions"
    return ("yes", "") if after - before < _LOOPS else ("no", emulated)


def _vendor() -> bytes:
    with KVM() as kvm:
        for leaf in kvm.get_supported_cpuid():
            if leaf.function == 0:
                return struct.pack("<III", leaf.ebx, leaf.edx, leaf.ecx)
    return b""


def _hypercall() -> _Answer:
    """Whether the CPU's own instruction reaches KVM, which does not know that hypercall.

    VMCALL is VMX's (SDM Vol.3 31.3), VMMCALL is SVM's (APM Vol.3); KVM patches the wrong one,
    which takes a writable code page (KVM API, 7 KVM_X86_QUIRK_FIX_HYPERCALL_INSN).
    """
    amd = _vendor() in (b"AuthenticAMD", b"HygonGenuine")
    instruction = b"\x0f\x01\xd9" if amd else b"\x0f\x01\xc1"  # vmmcall, vmcall
    load = b"\xb8" + _NO_SUCH_HYPERCALL.to_bytes(4, "little")  # mov eax, number
    answer, why = _passes(load + instruction, rax=_ENOSYS)
    return answer, why and f"with {'VMMCALL' if amd else 'VMCALL'}, {why}"


def _string(code: bytes, kind: type[PortIn | PortOut]) -> _Answer:
    """Whether REP OUTSB or REP INSB of 8 bytes gives an exit with more than one of them."""
    with _guest(code + _END) as machine:
        start = Registers(rip=_CODE, rsi=_DATA, rdi=_DATA, rcx=8, rdx=_STRING_PORT)
        machine.cpus[0].set_regs(start)
        exit_ = _run(machine)
        if isinstance(exit_, kind) and exit_.port == _STRING_PORT:
            alone = "each element is an exit of its own"
            return ("yes", "") if exit_.count > 1 else ("no", alone)
        return _judge(machine, exit_, False)


def _paging32() -> _Answer:
    """Whether code runs at the linear address 4 MiB + _CODE, which paging puts at _CODE."""
    with _guest(_END, "protected") as machine:
        # Two 4 MiB pages, present and writable, at 0 (SDM Vol.3 table 4-4).
        machine.memory.write(_PAGES, struct.pack("<II", 0x83, 0x83))
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.cr3, special.cr4 = _PAGES, special.cr4 | CR4.PSE
        special.cr0 |= CR0.PG
        cpu.set_sregs(special)
        cpu.set_regs(Registers(rip=(4 << 20) + _CODE))
        exit_ = _run(machine)
        answer, why = _judge(machine, exit_, _ended(exit_))
        if answer != "yes" and not cpu.get_sregs().cr0 & CR0.PG:
            why += ", and CR0.PG reads as 0"
        return answer, why


def _syscall() -> _Answer:
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


def _tsc() -> _Answer:
    """Whether ring 3 reads a TSC that was set to one that no host has reached."""
    wanted = 1 << 62  # 29 years at 5 GHz
    # rdtsc; shl rdx, 32; or rax, rdx
    with _guest(b"\x0f\x31" + b"\x48\xc1\xe2\x20" + b"\x48\x09\xd0" + _END, ring=3) as machine:
        machine.cpus[0].set_msrs({_TSC: wanted})
        exit_ = _run(machine)
        if _ended(exit_) and machine.cpus[0].get_regs().rax < wanted:
            return "no", "the guest reads the host's"
        return _judge(machine, exit_, _ended(exit_))


_NOPS: Final = b"\x90\x90\x90"  # nop; nop; nop
_STORE: Final = b"\x88\x04\x25" + _DATA.to_bytes(4, "little") + b"\x90"  # mov [_DATA], al; nop
_ADDPS: Final = b"\x0f\x58\xc0"  # addps xmm0, xmm0
_POPCNT: Final = b"\xb9\xff\0\0\0" + b"\xf3\x0f\xb8\xc1"  # mov ecx, 255; popcnt eax, ecx
_INT3, _INT40, _INT80 = b"\xcc", b"\xcd\x40", b"\xcd\x80"  # int3; int 0x40; int 0x80
_OUTSB, _INSB = b"\xf3\x6e", b"\xf3\x6c"  # rep outsb; rep insb
# pushfd; push cs; call the next instruction; add dword [esp], 5; iretd, to what follows it
_IRETD: Final = b"\x9c\x0e" + b"\xe8\0\0\0\0" + b"\x83\x04\x24\x05" + b"\xcf"

_at_third = partial(_stops, _NOPS, breakpoints={_CODE + 2: "x"})
_at_store = partial(_stops, _STORE, breakpoints={_DATA: "w1"})
_at_int3 = partial(_stops, _INT3, software_breakpoints=True)
_stepping = partial(_stops, _NOPS, single_step=True)

PROBES: Final[dict[str, Probe]] = {
    "native-ring3": Probe("native 64-bit code in ring 3", partial(_native, "long", 3)),
    "native-ring0": Probe("native 64-bit code in ring 0", partial(_native, "long", 0)),
    "native-real": Probe("native code in real mode", partial(_native, "real", 0)),
    "32-bit-paging": Probe("32-bit paging (CR0.PG without EFER.LME)", _paging32),
    "single-step": Probe("single-stepping ring-0 code", partial(_stepping, 0, 1, 2)),
    "single-step-ring3": Probe("single-stepping ring-3 code", partial(_stepping, 3, 1, 2)),
    "breakpoint": Probe("hardware breakpoints in ring 0", partial(_at_third, 0, 2)),
    "breakpoint-ring3": Probe("hardware breakpoints in ring 3", partial(_at_third, 3, 2)),
    "watchpoint": Probe("hardware watchpoints in ring 0", partial(_at_store, 0, len(_STORE) - 1)),
    "software-breakpoint": Probe("int3 in ring 0 reported to the host", partial(_at_int3, 0, 0)),
    "vmcall": Probe("the CPU's hypercall instruction in ring 0", _hypercall),
    "ring0-sse": Probe("SSE arithmetic in ring 0", partial(_passes, _ADDPS)),
    "ring0-popcnt": Probe("POPCNT in ring 0", partial(_passes, _POPCNT, rax=8)),
    "ring0-int3": Probe("int3 in ring 0", partial(_interrupts, _INT3, 3)),
    "ring0-int": Probe("int n in ring 0", partial(_interrupts, _INT40, 0x40)),
    "real-int": Probe("int 0x40 in real mode", partial(_interrupts, _INT40, 0x40, "real")),
    "real-int-high": Probe("int 0x80 in real mode", partial(_interrupts, _INT80, 0x80, "real")),
    "iret32": Probe("IRET in 32-bit protected mode", partial(_passes, _IRETD, "protected")),
    "syscall": Probe("SYSCALL from ring 3 to ring 0", _syscall),
    "string-output": Probe(
        "one exit for many bytes of REP OUTS", partial(_string, _OUTSB, PortOut)
    ),
    "string-input": Probe("one exit for many bytes of REP INS", partial(_string, _INSB, PortIn)),
    "virtual-tsc": Probe("a TSC of the guest's own in ring 3", _tsc),
}
"""Every probe by name."""

_found: dict[str, Finding] = {}


def probe(name: str) -> Finding:
    """Run a probe of `PROBES`, or give what it found before.

    What the host lacks is an answer, not an exception: without a usable KVM it is "unknown",
    and then asked again the next time. Raises ConfigError for a name that is not in the table.
    """
    if name not in PROBES:
        raise ConfigError(f"no probe is named {name!r}; use one of {', '.join(PROBES)}")
    if name in _found:
        return _found[name]
    subject, ask = PROBES[name]
    try:
        answer, why = ask()
    except (ConfigError, UnsupportedError) as error:  # KVM refuses a state, or lacks an ioctl
        answer, why = "no", str(error)
    except (KvmpyError, OSError) as error:
        return Finding(name, "unknown", f"{subject}: {error}")
    _found[name] = Finding(name, answer, f"{subject}: {why}" if why else subject)
    return _found[name]


def probe_all() -> tuple[Finding, ...]:
    """What all probes find, in the order of the table."""
    return tuple(probe(name) for name in PROBES)
