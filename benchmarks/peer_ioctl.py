"""KVM from Python alone: fcntl.ioctl, mmap and struct, written as one would without kvmpy."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.peer import PeerError
from benchmarks.peer_guests import ADDRESS, MEMORY, MMIO, PORT, State

__all__ = ["lives", "runs"]

# include/uapi/linux/kvm.h
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90

KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_MMIO = 2, 5, 6
NO_LIMIT = 1 << 64

# Both only for VMX; anywhere without RAM, but fcntl.ioctl takes no number from 2 GiB on.
_IDENTITY_MAP, _TSS = 0x7FFBC000, 0x7FFBD000
_REASON, _EXIT = 8, 32  # in struct kvm_run
_APIC_BASE = slice(272, 280)  # in struct kvm_sregs
_U32 = struct.Struct("=I")
_IO = struct.Struct("=BBHIQ")  # direction, size, port, count, data_offset
_MMIO = struct.Struct("=Q8sIB")  # phys_addr, data, len, is_write

Device = Callable[[int, int], None]


class Machine:
    """A VM with one vCPU in the state given, closed by `close`."""

    def __init__(self, state: State) -> None:
        ioctl = fcntl.ioctl
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        run_size = ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE, 0)
        self.vm = ioctl(self.kvm, KVM_CREATE_VM, 0)
        with contextlib.suppress(OSError):
            ioctl(self.vm, KVM_SET_IDENTITY_MAP_ADDR, struct.pack("=Q", _IDENTITY_MAP))
            ioctl(self.vm, KVM_SET_TSS_ADDR, _TSS)
        self.ram = mmap.mmap(-1, MEMORY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, MEMORY, at))
        self.ram[state.area_address : state.area_address + len(state.area)] = state.area
        self.ram[ADDRESS : ADDRESS + len(state.image)] = state.image
        self.cpu = ioctl(self.vm, KVM_CREATE_VCPU, 0)
        self.run_page = mmap.mmap(self.cpu, run_size)
        ioctl(self.cpu, KVM_SET_CPUID2, bytearray(state.cpuid))  # more than bytes may have
        before, sregs = bytearray(len(state.sregs)), bytearray(state.sregs)
        ioctl(self.cpu, KVM_GET_SREGS, before)
        sregs[_APIC_BASE] = before[_APIC_BASE]
        ioctl(self.cpu, KVM_SET_SREGS, sregs)
        ioctl(self.cpu, KVM_SET_REGS, state.regs)

    def run(self, ports: dict[int, Device], pages: dict[int, Device], limit: int) -> None:
        """Serve writes until HLT, or that many."""
        ioctl, cpu, page = fcntl.ioctl, self.cpu, self.run_page
        while limit:
            try:
                ioctl(cpu, KVM_RUN, 0)
            except InterruptedError:
                continue
            (reason,) = _U32.unpack_from(page, _REASON)
            if reason == KVM_EXIT_IO:
                _, size, port, _, offset = _IO.unpack_from(page, _EXIT)
                ports[port](size, int.from_bytes(page[offset : offset + size], "little"))
            elif reason == KVM_EXIT_MMIO:
                address, data, size, _ = _MMIO.unpack_from(page, _EXIT)
                pages[address](size, int.from_bytes(data[:size], "little"))
            elif reason == KVM_EXIT_HLT:
                return
            else:
                raise PeerError(f"fcntl.ioctl: KVM_RUN ended with exit reason {reason}")
            limit -= 1

    def close(self) -> None:
        """Give everything back."""
        self.run_page.close()
        os.close(self.cpu)
        os.close(self.vm)
        self.ram.close()
        os.close(self.kvm)


def _runner(machine: Machine, limit: int) -> Callable[[], int]:
    total = 0

    def device(size: int, value: int) -> None:
        nonlocal total
        total += value

    def run() -> int:
        nonlocal total
        total = 0
        machine.run({PORT: device}, {MMIO: device}, limit)
        return total

    return run


@contextmanager
def runs(image: bytes, ring: int = 0, limit: int = NO_LIMIT) -> Iterator[Callable[[], int]]:
    """A machine that stays: each call runs it until HLT, or for `limit` writes."""
    machine = Machine(State.of(image, ring))
    try:
        yield _runner(machine, limit)
    finally:
        machine.close()


@contextmanager
def lives(image: bytes) -> Iterator[Callable[[], int]]:
    """Each call makes a machine, runs it to its first write, and closes it."""
    state = State.of(image, 0)

    def live() -> int:
        machine = Machine(state)
        try:
            return _runner(machine, 1)()
        finally:
            machine.close()

    yield live
