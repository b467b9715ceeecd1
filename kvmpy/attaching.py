"""The part of a machine that devices are attached to."""

from collections.abc import Callable
from typing import TypeVar

from kvmpy.bus import AccessFunction, Claim, Device, FunctionDevice, check_device, check_place
from kvmpy.dispatch import Dispatch
from kvmpy.errors import ConfigError, OverlapError
from kvmpy.memory import PAGE_SIZE
from kvmpy.vm import VM

__all__ = ["Attaching"]

_F = TypeVar("_F", bound=AccessFunction)


class Attaching:
    """Attaching devices to ports and MMIO addresses, and detaching them."""

    vm: VM

    @property
    def dispatch(self) -> Dispatch:
        """Who answers which access."""
        raise NotImplementedError

    def attach_port(self, base: int, size: int, device: Device, name: str | None = None) -> Claim:
        """Let `device` answer `size` ports from `base` on; OverlapError names both owners."""
        self.vm.fd  # noqa: B018 - refuse a closed machine
        return self.dispatch.attach(self.dispatch.ports, base, size, device, name)

    def attach_mmio(self, base: int, size: int, device: Device, name: str | None = None) -> Claim:
        """Let `device` answer `size` bytes of guest-physical addresses from `base` on."""
        check_place("MMIO", base, size)
        check_device(device, name)
        self.vm.fd  # noqa: B018 - refuse a closed machine
        ram = self.vm.memory.overlapping(base, size)
        if ram is not None:
            raise OverlapError(
                f"MMIO [{base:#x}, {base + size:#x}) of {name or device.name} overlaps the RAM at "
                f"[{ram.address:#x}, {ram.end:#x})"
            )
        return self.dispatch.attach(self.dispatch.mmio, base, size, device, name)

    def detach(self, claim: Claim) -> None:
        """Take back what `attach_port` or `attach_mmio` gave."""
        if not isinstance(claim, Claim):
            raise ConfigError(f"{claim!r:.80} is no claim: attach_port and attach_mmio give them")
        bus = self.dispatch.ports
        if bus.find(claim.base) is not claim:
            bus = self.dispatch.mmio
        self.dispatch.detach(bus, claim)

    def on_port(self, base: int, size: int = 1) -> Callable[[_F], _F]:
        """Make a device at `size` ports from `base` on of a function `f(offset, size, value)`.

        `value` is None for a read, and what the function returns is the answer.
        """
        check_place("port", base, size)

        def attach(function: _F) -> _F:
            self.attach_port(base, size, FunctionDevice(function))
            return function

        return attach

    def on_mmio(self, base: int, size: int = PAGE_SIZE) -> Callable[[_F], _F]:
        """The same for `size` bytes of guest-physical addresses from `base` on."""
        check_place("MMIO", base, size)

        def attach(function: _F) -> _F:
            self.attach_mmio(base, size, FunctionDevice(function))
            return function

        return attach
