"""The guests that all peers run, byte for byte, and the state that those under KVM start in."""

import struct
from dataclasses import dataclass
from typing import Final

from kvmpy import KVM, assemble, modes
from kvmpy.asm import Program

__all__ = [
    "ADDRESS",
    "BOOT_STATUS",
    "MEMORY",
    "MMIO",
    "PORT",
    "PRIMES",
    "State",
    "boot_sector",
    "firmware",
    "mmio_writes",
    "port_writes",
    "sieve",
    "sum_to",
]

ADDRESS: Final = modes.DEFAULT_LOAD["long"]
MEMORY: Final = 4 << 20
PORT: Final = 0x42
MMIO: Final = 0x2000000
PRIMES: Final = 78498
"""The primes below a million."""

_DEBUG_EXIT, _DEBUG_VALUE = 0xF4, 42
BOOT_STATUS: Final = _DEBUG_VALUE << 1 | 1
"""The exit status of whoever runs the boot sector to its end."""

# Long mode, ring 0. Every write has a value of its own, so that their sum proves them all.
_WRITES = """
start:  mov     edx, {port}
        mov     edi, {mmio}
        xor     eax, eax
        mov     ecx, {count}
write:  inc     eax
        {write}
        dec     ecx
        jnz     write
end:    hlt
        jmp     start
"""

# Long mode, ring 3, where HLT is a fault: a port write hands over the result and ends a run.
_SIEVE = """
        .equ LIMIT, 1000000
        .equ COMPOSITE, 0x100000        # a byte for each number

start:  cld
        mov     edi, COMPOSITE
        mov     ecx, LIMIT
        xor     eax, eax
        rep stosb
        mov     edi, COMPOSITE
        xor     ebx, ebx                # the primes counted
        mov     ecx, 2                  # the number looked at
number: cmp     byte ptr [rdi + rcx], 0
        jne     next
        inc     rbx
        mov     rax, rcx
        imul    rax, rcx
cross:  cmp     rax, LIMIT
        jae     next
        mov     byte ptr [rdi + rax], 1
        add     rax, rcx
        jmp     cross
next:   inc     rcx
        cmp     rcx, LIMIT
        jb      number
        mov     eax, ebx
        mov     edx, {port}
        out     dx, eax
end:    jmp     start
"""

# Real mode: as a boot sector at 0x7c00, or at the reset vector in place of a firmware.
_EXIT = """
        cli
        mov     al, {value}
        out     {port}, al
stop:   hlt
        jmp     stop
"""


def port_writes(count: int) -> Program:
    """Write 1 to `count` to the port, four bytes each, halt at `end`, and so on again."""
    return assemble(
        _WRITES.format(port=PORT, mmio=MMIO, count=count, write="out dx, eax"), at=ADDRESS
    )


def mmio_writes(count: int) -> Program:
    """The same to an address where there is no RAM."""
    write = "mov dword ptr [rdi], eax"
    return assemble(_WRITES.format(port=PORT, mmio=MMIO, count=count, write=write), at=ADDRESS)


def sum_to(count: int) -> int:
    """The sum of the values that `port_writes` and `mmio_writes` write."""
    return count * (count + 1) // 2


def sieve() -> Program:
    """Count the primes below a million, write the number to the port, and so on again."""
    return assemble(_SIEVE.format(port=PORT), at=ADDRESS)


def boot_sector() -> bytes:
    """512 bytes that end with the status BOOT_STATUS by way of a debug-exit device."""
    code = assemble(_EXIT.format(port=_DEBUG_EXIT, value=_DEBUG_VALUE), mode="real", at=0x7C00)
    return bytes(code).ljust(510, b"\0") + b"\x55\xaa"


def firmware() -> bytes:
    """The same 64 KiB at the end of 4 GiB: its code is the first that the processor runs."""
    code = assemble(_EXIT.format(port=_DEBUG_EXIT, value=_DEBUG_VALUE), mode="real", at=0xFFF0)
    return bytes(0xFFF0) + bytes(code).ljust(16, b"\0")


@dataclass(frozen=True)
class State:
    """What a peer needs to run an image in long mode as kvmpy would, as the kernel's structs.

    `area` is what kvmpy keeps at the top of the guest's RAM, and `sync` are the
    KVM_SYNC_X86_* sets that struct kvm_run can carry here.
    """

    image: bytes
    area_address: int
    area: bytes
    regs: bytes
    sregs: bytes
    cpuid: bytes
    sync: int

    @classmethod
    def of(cls, image: bytes, ring: int) -> "State":
        layout = modes.build("long", ring, MEMORY)
        with KVM() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as cpu:
            registers, special = modes.entry_state(layout, ADDRESS, cpu.get_sregs())
            entries, sync = kvm.get_supported_cpuid(), cpu.can_sync
        cpuid = struct.pack("<II", len(entries), 0) + b"".join(one.pack() for one in entries)
        regs, sregs = registers.pack(), special.pack()
        return cls(bytes(image), layout.base, layout.data, regs, sregs, cpuid, sync)
