"""A VM at a snapshot, made in one call into C: only what differs from a new vCPU is written.

What a new VM and a new vCPU are like on this host is found out once, when the plan is made.
"""

import os
import struct
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final
from weakref import WeakKeyDictionary

from kvmpy.abi import ffi, host_error, lib
from kvmpy.calls import Call, ioctl, native, open_file
from kvmpy.capabilities import CAPABILITIES
from kvmpy.errors import UnsupportedError
from kvmpy.kvm import KVM
from kvmpy.memory import Memory
from kvmpy.snapshot.cpu import CpuState, save_cpu
from kvmpy.snapshot.diff import without_in_use
from kvmpy.snapshot.reset import IN_PAGE, accepted_msrs
from kvmpy.snapshot.snapshot import Snapshot
from kvmpy.vcpu import VCPU
from kvmpy.vcpuregs import SYNC_EVENTS, SYNC_REGS, SYNC_SREGS
from kvmpy.vm import IDENTITY_MAP_ADDRESS, TSS_ADDRESS, VM
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Plan"]

_SYNC_ALL: Final = SYNC_REGS | SYNC_SREGS | SYNC_EVENTS
_BY_IOCTL: Final = ("XCRS", "MSRS", "XSAVE", "DEBUGREGS")
_USERSPACE_ADDR: Final = 24  # in struct kvm_userspace_memory_region
_KVM, _VM = 0, 1  # the numbers of the calls that give these descriptors


@dataclass(frozen=True, slots=True)
class _Cpu:
    """What goes into a vCPU's mapping: struct kvm_sync_regs, and CR8 as user space keeps it."""

    registers: bytes
    special: bytes
    events: bytes
    cr8: int


_plans: "WeakKeyDictionary[Snapshot, Plan]" = WeakKeyDictionary()


class Plan:
    """How to make VMs from one snapshot, of a machine without an in-kernel interrupt controller.

    `quirks` are those that are switched off (KVM_CAP_DISABLE_QUIRKS2). Raises what making a VM in
    the ordinary way does.
    """

    @classmethod
    def of(cls, snapshot: Snapshot, quirks: int) -> "Plan | None":
        """That of a snapshot, made once; None where its machines have to be made step by step."""
        config = snapshot.config
        if config.irqchip or config.posted_console:
            return None
        plan = _plans.get(snapshot)
        if plan is None or plan.process != os.getpid():
            plan = _plans[snapshot] = cls(snapshot, quirks)
        return plan if plan.possible else None

    def __init__(self, snapshot: Snapshot, quirks: int) -> None:
        self._images, self._lock, self.process = snapshot.images, Lock(), os.getpid()
        with KVM() as kvm, kvm.create_vm() as vm:
            self._facts = vm.facts
            listed = tuple(kvm.get_msr_index_list())
            with vm.create_vcpu() as cpu:
                cpu.set_cpuid2(snapshot.cpus[0]["CPUID2"])
                self.possible = cpu.can_sync & _SYNC_ALL == _SYNC_ALL
                """Whether this host can do it this way."""
                fresh = save_cpu(cpu, listed, apic=False)
                try:
                    states = [_differing(cpu, state, fresh) for state in snapshot.cpus]
                except UnsupportedError:  # before other state, which may allow it: CR4.LA57, say
                    self.possible, states = False, [{} for _ in snapshot.cpus]
            wanted = vm.check_extension("DISABLE_QUIRKS2") & quirks
            for_vmx = vm.for_vmx
        self._slots = [
            bytearray(struct.pack("<IIQQQ", slot, image.readonly * 2, image.address, image.size, 0))
            for slot, image in enumerate(snapshot.images)
        ]
        self._calls = [open_file("/dev/kvm"), ioctl("CREATE_VM", of=_KVM, opens=True)]
        self._calls += self._vm_calls(wanted, for_vmx, snapshot.vm.clock)
        self._cpus_at = len(self._calls)
        count = len(snapshot.cpus)
        self._calls += [
            ioctl("CREATE_VCPU", of=_VM, argument=number, opens=True) for number in range(count)
        ]
        for number, (state, differing) in enumerate(zip(snapshot.cpus, states, strict=True)):
            self._calls += _cpu_calls(self._cpus_at + number, state, differing)
        self._cpus = [_in_page(state) for state in snapshot.cpus]
        self._native = native(self._calls)

    def _vm_calls(self, quirks: int, for_vmx: bool, clock: bytes) -> list[Call]:
        made = []
        if for_vmx:
            address = bytearray(struct.pack("<Q", IDENTITY_MAP_ADDRESS))
            made += [
                ioctl("SET_IDENTITY_MAP_ADDR", of=_VM, argument=address),
                ioctl("SET_TSS_ADDR", of=_VM, argument=TSS_ADDRESS),
            ]
        if quirks:
            number = CAPABILITIES["DISABLE_QUIRKS2"]
            request = bytearray(struct.pack("<II4Q64x", number, 0, quirks, 0, 0, 0))
            made.append(ioctl("ENABLE_CAP", of=_VM, argument=request))
        made += [ioctl("SET_USER_MEMORY_REGION", of=_VM, argument=slot) for slot in self._slots]
        return [*made, ioctl("SET_CLOCK", of=_VM, argument=bytearray(clock))]

    def make(self) -> tuple[KVM, VM]:
        """A new VM at the snapshot, with its vCPUs."""
        regions: list[Memory] = []
        results = ffi.new("int[]", [-1] * len(self._calls))
        try:
            for slot, image in enumerate(self._images):
                region = image.map(slot)
                regions.append(region)
            self._make(regions, results)
        except BaseException:
            for call, result in zip(self._calls, results, strict=True):
                if call.opens and result >= 0:  # a signal handler raised when all was made
                    os.close(result)
            for region in regions:
                region.close()
            raise
        kvm = KVM.adopt(results[_KVM], self._facts.vcpu_mmap_size)
        vm = VM(results[_VM], self._facts)
        for region in regions:
            vm.memory.add(region)
            region.in_vm = True
        first = self._cpus_at
        try:
            for number, wanted in enumerate(self._cpus):
                cpu = vm.adopt_vcpu(results[first + number], number)
                cpu.begin_with(wanted.registers, wanted.special, wanted.events, wanted.cr8)
        except BaseException:
            vm.close()
            kvm.close()
            raise
        return kvm, vm

    def _make(self, regions: list[Memory], results: Any) -> None:
        failed = ffi.new("uint32_t *")
        with self._lock:  # the addresses are put into what all threads share
            for slot, region in zip(self._slots, regions, strict=True):
                struct.pack_into("<Q", slot, _USERSPACE_ADDR, region.host_address)
            code = lib.kvmpy_make_calls(self._native, len(self._calls), results, failed)
        if code < 0:
            what = self._calls[failed[0]].what
            raise host_error(-code, f"making a machine from a snapshot: {what}")


def _differing(cpu: VCPU, state: CpuState, fresh: CpuState) -> dict[str, bytearray]:
    """What has to be written to a new vCPU: MSRs one by one, the rest as a whole."""
    found = {}
    for name in ("XCRS", "DEBUGREGS"):
        if state[name] != fresh[name]:
            found[name] = bytearray(state[name])
    if without_in_use(state["XSAVE"]) != without_in_use(fresh["XSAVE"]):
        found["XSAVE"] = bytearray(state["XSAVE"])
    known = set(struct.iter_unpack("<IIQ", fresh["MSRS"]))
    left = [one for one in struct.iter_unpack("<IIQ", state["MSRS"]) if one not in known]
    if left:
        packed = b"".join(struct.pack("<IIQ", *one) for one in left)
        found["MSRS"] = accepted_msrs(cpu, packed)
    return found


def _cpu_calls(number: int, state: CpuState, differing: dict[str, bytearray]) -> list[Call]:
    leaves = state["CPUID2"]
    cpuid = bytearray(struct.pack("<II", len(leaves) // 40, 0) + leaves)
    return [
        ioctl("SET_CPUID2", of=number, argument=cpuid),
        *(
            ioctl(f"SET_{name}", of=number, argument=differing[name])
            for name in _BY_IOCTL
            if name in differing
        ),
    ]


def _in_page(state: CpuState) -> _Cpu:
    registers, special, events = (state[name] for name in IN_PAGE)
    return _Cpu(registers, special, events, SpecialRegisters.unpack(special).cr8)
