"""A VM's interrupt controllers, lines, routes and eventfds (KVM API, 4.24-4.26, 4.52, 4.59...)."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvmpy.abi import IOCTLS, lib, pack
from kvmpy.capabilities import capability_number
from kvmpy.descriptor import Descriptor
from kvmpy.errors import ConfigError, HostError, UnsupportedError

__all__ = ["GsiRoute", "InterruptController", "IrqchipRoute", "MsiRoute"]

PIC_MASTER: Final = 0
PIC_SLAVE: Final = 1
IOAPIC: Final = 2


@dataclass(frozen=True, slots=True)
class IrqchipRoute:
    """The GSI raises input `pin` of an in-kernel chip (0: PIC master, 1: PIC slave, 2: IOAPIC)."""

    gsi: int
    chip: int
    pin: int

    def pack(self) -> bytes:
        """Struct kvm_irq_routing_entry, 48 bytes."""
        return bytes(pack("SET_GSI_ROUTING", "<IIIIII24x", self.gsi, 1, 0, 0, self.chip, self.pin))


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """The GSI sends the message `data` to `address` (SDM Vol.3 11.11)."""

    gsi: int
    address: int
    data: int

    def pack(self) -> bytes:
        """Struct kvm_irq_routing_entry, 48 bytes."""
        low, high = self.address & 0xFFFFFFFF, self.address >> 32
        numbers = (self.gsi, 2, 0, 0, low, high, self.data)
        return bytes(pack("SET_GSI_ROUTING", "<IIIIIII20x", *numbers))


GsiRoute: TypeAlias = IrqchipRoute | MsiRoute


class InterruptController(Descriptor):
    """The part of a VM's descriptor that deals with interrupts and eventfds."""

    irqchip: str | None = None
    """None, "split" (local APICs in the kernel) or "full" (PIC, IOAPIC and local APICs)."""
    has_pit = False
    """Whether `create_pit` was called."""
    gsi_routes: tuple[GsiRoute, ...] | None = None
    """What `set_gsi_routing` was called with last; None for the kernel's own table."""

    def check_extension(self, capability: str | int) -> int:
        """What this VM says of a capability, by name or number; 0 for absent."""
        request = IOCTLS["CHECK_EXTENSION"].number
        return max(0, int(lib.kvmpy_ioctl(self.fd, request, capability_number(capability))))

    def enable_cap(self, capability: str | int, *arguments: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments; `capability` by name or number.

        Raises UnsupportedError where this host lacks it, HostError for arguments it refuses.
        """
        if len(arguments) > 4:
            raise ConfigError(f"KVM_ENABLE_CAP takes at most 4 arguments, not {len(arguments)}")
        padded = (*arguments, 0, 0, 0, 0)[:4]
        numbers = (capability_number(capability), 0, *padded)
        request = pack("ENABLE_CAP", "<II4Q64x", *numbers)
        name = str(capability).removeprefix("KVM_CAP_")
        try:
            self.ioctl("ENABLE_CAP", request, f"for KVM_CAP_{name} and {arguments}")
        except HostError:
            if self.check_extension(capability):
                raise
            raise UnsupportedError(f"this host's KVM lacks KVM_CAP_{name}") from None

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a local APIC for each vCPU, in the kernel; before the first vCPU."""
        self._refuse_second_irqchip()
        self.ioctl("CREATE_IRQCHIP", hint="create the irqchip before the first vCPU")
        self.irqchip = "full"

    def create_split_irqchip(self, routes: int = 24) -> None:
        """Local APICs in the kernel, `routes` GSIs for an IOAPIC in user space."""
        self._refuse_second_irqchip()
        self.enable_cap("SPLIT_IRQCHIP", routes)
        self.irqchip = "split"

    def _refuse_second_irqchip(self) -> None:
        if self.irqchip:
            raise ConfigError(f"{self.what} already has a {self.irqchip} irqchip")

    def create_pit(self, speaker_dummy: bool = False) -> None:
        """An i8254 in the kernel; it needs the full irqchip (KVM_CREATE_PIT2)."""
        hint = "the PIT needs create_irqchip() first"
        self.ioctl("CREATE_PIT2", pack("CREATE_PIT2", "<I60x", int(speaker_dummy)), hint)
        self.has_pit = True

    def irq_line(self, gsi: int, level: bool) -> int:
        """Set a GSI's line; what KVM says: above 0 delivered, 0 merged, below 0 masked."""
        buffer = pack("IRQ_LINE_STATUS", "<II", gsi, int(level))
        self.ioctl("IRQ_LINE_STATUS", buffer, "an IRQ line needs an irqchip")
        status: int = struct.unpack_from("<i", buffer)[0]
        return status

    def set_gsi_routing(self, routes: Iterable[GsiRoute]) -> None:
        """Replace the whole GSI routing table."""
        table = tuple(routes)
        entries = [route.pack() for route in table]
        data = struct.pack("<II", len(entries), 0) + b"".join(entries)
        self.ioctl("SET_GSI_ROUTING", bytearray(data))
        self.gsi_routes = table

    def signal_msi(self, address: int, data: int) -> int:
        """Send a message-signalled interrupt; above 0 if it was delivered."""
        low, high = address & 0xFFFFFFFF, address >> 32
        return self.ioctl("SIGNAL_MSI", pack("SIGNAL_MSI", "<IIII16x", low, high, data, 0))

    def irqfd(
        self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False
    ) -> None:
        """Raise the GSI whenever the eventfd `fd` is written (KVM_IRQFD)."""
        flags = int(deassign) | (2 if resample_fd is not None else 0)
        resample = 0 if resample_fd is None else resample_fd
        self.ioctl("IRQFD", pack("IRQFD", "<IIII16x", fd, gsi, flags, resample))

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int = 0,
        *,
        port: bool = False,
        value: int | None = None,
        deassign: bool = False,
    ) -> None:
        """Signal the eventfd `fd` when the guest writes there, without an exit to user space.

        `size` is 1, 2, 4, 8, or 0 for any; with `value`, only a write of that value counts.
        """
        flags = int(value is not None) | (2 if port else 0) | (4 if deassign else 0)
        numbers = (value or 0, address, size, fd, flags)
        self.ioctl("IOEVENTFD", pack("IOEVENTFD", "<QQIiI36x", *numbers))

    def register_coalesced(self, address: int, size: int, *, port: bool = False) -> None:
        """Let writes there pile up in the coalesced ring instead of causing an exit each."""
        self.ioctl("REGISTER_COALESCED_MMIO", _zone(address, size, port))

    def unregister_coalesced(self, address: int, size: int, *, port: bool = False) -> None:
        """Take back `register_coalesced`."""
        self.ioctl("UNREGISTER_COALESCED_MMIO", _zone(address, size, port))

    def get_irqchip(self, chip: int) -> bytes:
        """The 512 bytes of state of chip 0 (PIC master), 1 (PIC slave) or 2 (IOAPIC)."""
        buffer = pack("GET_IRQCHIP", "<I516x", chip)
        self.ioctl("GET_IRQCHIP", buffer)
        return bytes(buffer[8:])

    def set_irqchip(self, chip: int, state: bytes) -> None:
        """Write back what `get_irqchip` gave."""
        if len(state) != 512:
            raise ConfigError(f"the state of an irqchip has 512 bytes, not {len(state)}")
        self.ioctl("SET_IRQCHIP", pack("SET_IRQCHIP", "<I4x", chip) + state)

    def get_pit(self) -> bytes:
        """Struct kvm_pit_state2, 112 bytes."""
        buffer = bytearray(112)
        self.ioctl("GET_PIT2", buffer)
        return bytes(buffer)

    def set_pit(self, state: bytes) -> None:
        """Write back what `get_pit` gave."""
        if len(state) != 112:
            raise ConfigError(f"the state of the PIT has 112 bytes, not {len(state)}")
        self.ioctl("SET_PIT2", bytearray(state))


def _zone(address: int, size: int, port: bool) -> bytearray:
    return pack("REGISTER_COALESCED_MMIO", "<QII", address, size, int(port))
