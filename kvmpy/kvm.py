"""/dev/kvm: what the host's KVM is and can do (KVM API, 2 "Restrictions", 4 "API description")."""

import errno
import os
import struct
from functools import cache, cached_property
from typing import Final, Self, TypeAlias

from kvmpy.abi import IOCTLS, lib
from kvmpy.capabilities import CAPABILITIES, capability_number
from kvmpy.descriptor import Descriptor
from kvmpy.errors import HostError, KVMUnavailableError, UnsupportedError
from kvmpy.once import Once
from kvmpy.vm import VM
from kvmpy.x86.state import CPUIDEntry

__all__ = ["KVM", "backend", "nested", "packed_cpuid"]

API_VERSION = 12
_MODULES = ("kvm_pvm", "kvm_intel", "kvm_amd")  # kvm_pvm first: it may sit beside another


@cache
def backend() -> str:
    """The kernel module that does KVM's work: kvm_intel, kvm_amd, kvm_pvm, or "unknown".

    Looked up once per process: it cannot be exchanged while a VM is there.
    """
    for module in _MODULES:
        if os.path.isdir(f"/sys/module/{module}"):
            return module
    return "unknown"


def nested() -> bool:
    """Whether this host is itself a guest (CPUID.1:ECX bit 31, as Linux reports it)."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return False
    return " hypervisor" in flags.partition("flags")[2].partition("\n")[0]


def _open(path: str) -> int:
    hints = {
        errno.ENOENT: "load kvm_intel or kvm_amd and enable virtualization in the firmware (in a "
        "VM: nested virtualization; in a container: --device /dev/kvm)",
        errno.EACCES: "add yourself to the kvm group (sudo usermod -aG kvm $USER), then log in "
        "again; in a container give --device /dev/kvm",
        errno.EPERM: "let the container or sandbox use the device (--device /dev/kvm)",
        errno.ENODEV: "the device has no driver: load kvm_intel or kvm_amd",
        errno.ENXIO: "the device has no driver: load kvm_intel or kvm_amd",
    }
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        code = error.errno or 0
        hint = hints.get(code, "see `kvmpy info`")
        text = f"cannot open {path}: {os.strerror(code)}; {hint}"
        raise KVMUnavailableError(text, code) from None


class KVM(Descriptor):
    """The KVM system descriptor. Raises KVMUnavailableError where there is no usable /dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__(_open(path), path)
        version = lib.kvmpy_ioctl(self.fd, IOCTLS["GET_API_VERSION"].number, 0)
        if version != API_VERSION:
            self.close()
            found = f"its API version is {version}" if version >= 0 else "it is no KVM device"
            raise KVMUnavailableError(f"cannot use {path}: {found}; kvmpy speaks {API_VERSION}")
        self.api_version: int = version

    @classmethod
    def adopt(cls, fd: int, vcpu_mmap_size: int) -> Self:
        """That of a descriptor that was opened already, and is then its own."""
        made = cls.__new__(cls)
        Descriptor.__init__(made, fd, "/dev/kvm")
        made.api_version, made.vcpu_mmap_size = API_VERSION, vcpu_mmap_size
        return made

    def check_extension(self, capability: str | int) -> int:
        """What KVM_CHECK_EXTENSION says of a capability: 0 for absent, else 1 or a number.

        `capability` is a name such as "SYNC_REGS", with or without KVM_CAP_, or a number.
        Raises ConfigError for a name that no kernel has.
        """
        return self.ioctl("CHECK_EXTENSION", capability_number(capability))

    def require(self, capability: str) -> int:
        """The same, but UnsupportedError where the capability is absent."""
        value = self.check_extension(capability)
        if value <= 0:
            name = capability.removeprefix("KVM_CAP_")
            raise UnsupportedError(f"this host's KVM lacks KVM_CAP_{name}")
        return value

    def capabilities(self) -> dict[str, int]:
        """Each KVM_CAP constant by name and what this host says of it (0: absent)."""
        return {
            name: max(0, lib.kvmpy_ioctl(self.fd, IOCTLS["CHECK_EXTENSION"].number, number))
            for name, number in CAPABILITIES.items()
        }

    @cached_property
    def vcpu_mmap_size(self) -> int:
        """The bytes of a vCPU's mapping: struct kvm_run, port data, coalesced ring."""
        return self.ioctl("GET_VCPU_MMAP_SIZE")

    def get_supported_cpuid(self) -> list[CPUIDEntry]:
        """The CPUID leaves that the host can give to guests."""
        return unpack_cpuid(self._list("GET_SUPPORTED_CPUID", 8, 40))

    def get_msr_index_list(self) -> list[int]:
        """The MSRs that make up a vCPU's state (KVM_GET_MSR_INDEX_LIST)."""
        return [index for (index,) in struct.iter_unpack("<I", self._list("GET_MSR_INDEX_LIST", 4))]

    def get_msr_feature_index_list(self) -> list[int]:
        """The MSRs that tell what the host supports (KVM_GET_MSR_FEATURE_INDEX_LIST)."""
        data = self._list("GET_MSR_FEATURE_INDEX_LIST", 4)
        return [index for (index,) in struct.iter_unpack("<I", data)]

    def _list(self, name: str, header: int, entry: int = 4) -> bytes:
        """An ioctl that fills a counted array, retried with more room while it says E2BIG."""
        room = 128
        while True:
            buffer = bytearray(header + room * entry)
            struct.pack_into("<I", buffer, 0, room)
            try:
                self.ioctl(name, buffer)
            except HostError as error:
                if error.errno != errno.E2BIG or room >= 1 << 16:
                    raise
                room *= 4
                continue
            (count,) = struct.unpack_from("<I", buffer)
            return bytes(buffer[header : header + count * entry])

    def create_vm(self) -> VM:
        """A new VM without memory or vCPUs (KVM_CREATE_VM)."""
        size = self.vcpu_mmap_size  # may fail, so before there is a descriptor to lose
        while True:
            try:
                fd = self.ioctl("CREATE_VM")
            except HostError as error:
                if error.errno != errno.EINTR:  # a signal came while the kernel made it
                    raise
            else:
                return VM(fd, size)


def unpack_cpuid(data: bytes) -> list[CPUIDEntry]:
    """An array of struct kvm_cpuid_entry2 as a list."""
    return [CPUIDEntry.unpack(data[at : at + 40]) for at in range(0, len(data), 40)]


_Places: TypeAlias = list[tuple[int, int]]

_supported_cpuid: Final = Once[tuple[bytes, _Places]]()
_APIC_IDS: Final = {1: (19, 1), 0xB: (24, 4), 0x1F: (24, 4), 0x8000001E: (12, 4)}
"""Where a leaf's struct kvm_cpuid_entry2 has the APIC ID, and in how many bytes."""


def packed_cpuid(kvm: KVM, number: int = 0) -> bytes:
    """What the host supports, packed, for a vCPU of that number, which is its APIC ID.

    KVM has in its place the APIC ID of the host's CPU that it was asked on.
    """
    # Once per process, since it takes a while.
    packed, places = _supported_cpuid.get(lambda: _with_places(kvm.get_supported_cpuid()))
    made = bytearray(packed)
    for place, size in places:
        made[place : place + size] = number.to_bytes(4, "little")[:size]
    return bytes(made)


def _with_places(entries: list[CPUIDEntry]) -> tuple[bytes, _Places]:
    """Entries packed, and where they have an APIC ID of so many bytes."""
    places = []
    for at, entry in enumerate(entries):
        if entry.function in _APIC_IDS:
            offset, size = _APIC_IDS[entry.function]
            places.append((CPUIDEntry.SIZE * at + offset, size))
    return b"".join(entry.pack() for entry in entries), places
