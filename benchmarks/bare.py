"""A life of a small machine in Python without kvmpy's classes: what the classes cost."""

import mmap
import os
from collections.abc import Callable

from benchmarks.life import GUEST, MEMORY
from kvmpy import KVM, modes
from kvmpy.abi import IOCTLS, address_of, ffi, lib
from kvmpy.exits import OFFSET_DIRTY_REGS, OFFSET_REASON, OFFSET_VALID_REGS
from kvmpy.vcpuregs import REGS, SREGS, SYNC_REGS, SYNC_SREGS
from kvmpy.vm import IDENTITY_MAP_ADDRESS, TSS_ADDRESS

__all__ = ["bare_life"]

_HALT = 5  # KVM_EXIT_HLT
_MAP_NORESERVE = 0x4000


def bare_life() -> Callable[[], None]:
    """A function that makes the same calls as `floor_life`, one by one, from prepared bytes."""
    layout, entry = modes.build("long", 0, MEMORY), modes.DEFAULT_LOAD["long"]
    with KVM() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as cpu:
        general, special = modes.entry_state(layout, entry, cpu.get_sregs())
        entries = kvm.get_supported_cpuid()
        both = SYNC_REGS | SYNC_SREGS
        synced = cpu.can_sync & both == both
    regs, sregs = general.pack(), special.pack()
    header = len(entries).to_bytes(8, "little")
    cpuid = ffi.new("uint8_t[]", header + b"".join(entry.pack() for entry in entries))
    identity = ffi.new("uint64_t *", IDENTITY_MAP_ADDRESS)
    before, ram_slice = ffi.new("uint8_t[]", len(sregs)), slice(layout.base, layout.low_ram)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    number = {name: row.number for name, row in IOCTLS.items()}
    plain, pointer = lib.kvmpy_ioctl, lib.kvmpy_ioctl_buffer

    def live() -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        plain(kvm, number["GET_API_VERSION"], 0)
        run_size = plain(kvm, number["GET_VCPU_MMAP_SIZE"], 0)
        vm = plain(kvm, number["CREATE_VM"], 0)
        pointer(vm, number["SET_IDENTITY_MAP_ADDR"], identity)
        plain(vm, number["SET_TSS_ADDR"], TSS_ADDRESS)
        ram = mmap.mmap(-1, MEMORY, flags=flags)
        slot = ffi.new("uint64_t[4]", [0, 0, MEMORY, address_of(ram)])
        pointer(vm, number["SET_USER_MEMORY_REGION"], slot)
        ram[ram_slice] = layout.data
        ram[entry : entry + len(GUEST)] = GUEST
        cpu = plain(vm, number["CREATE_VCPU"], 0)
        run = mmap.mmap(cpu, run_size)
        pointer(cpu, number["SET_CPUID2"], cpuid)
        pointer(cpu, number["GET_SREGS"], before)
        if synced:
            run[REGS], run[SREGS] = regs, sregs
            run[OFFSET_DIRTY_REGS], run[OFFSET_VALID_REGS] = both, SYNC_REGS
        else:
            pointer(cpu, number["SET_SREGS"], ffi.from_buffer(sregs))
            pointer(cpu, number["SET_REGS"], ffi.from_buffer(regs))
        plain(cpu, number["RUN"], 0)
        halted = run[OFFSET_REASON] == _HALT
        run.close()
        os.close(cpu)
        os.close(vm)
        ram.close()
        os.close(kvm)
        if not halted:
            raise RuntimeError("the guest of the benchmark did not halt")

    return live
