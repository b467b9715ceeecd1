"""Running a guest up to a place: so many exits, an access to a port, a symbol of its code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import click

from kvmpy.boot.image import Image
from kvmpy.bus import FunctionDevice
from kvmpy.cli.symbols import suggestion
from kvmpy.errors import AddressError, ConfigError
from kvmpy.exits import OFFSET_REASON, Interrupted, PortIn, PortOut, exit_kind
from kvmpy.machine import Machine
from kvmpy.result import CRASHES, OUTCOMES
from kvmpy.sizes import parse_address

__all__ = ["PLACE", "Ended", "Place", "crashed", "run_until"]

_PORTS: Final = 1 << 16
_HLT: Final = b"\xf4"
_OUT: Final = 0xE6  # out imm8, al
_FREE_PORTS: Final = range(0xE0, 0x100)


class Place(NamedTuple):
    """Where to stop: `kind` is "exit", "port" or "symbol"."""

    kind: str
    value: int
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Ended(NamedTuple):
    """How a guest ended that did not come to the place."""

    outcome: str
    text: str


class _PlaceType(click.ParamType[Place]):
    name = "place"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Place:
        kind, _, name = str(value).partition("=")
        if kind == "symbol" and name:
            return Place(kind, 0, name)
        number = _number(name)
        if kind == "exit" and number >= 1:
            return Place(kind, number, name)
        if kind == "port" and 0 <= number < _PORTS:
            return Place(kind, number, name)
        raise click.BadParameter(f"{value!r}: use exit=N, port=P or symbol=NAME", ctx, param)


def _number(text: str) -> int:
    try:
        return parse_address(text)
    except ConfigError:
        return -1


PLACE: Final = _PlaceType()


def run_until(machine: Machine, image: Image, place: Place, timeout: float | None) -> Ended | None:
    """Run it; None if it came there. A port is left after its access, a symbol before its code."""
    if place.kind == "exit":
        result = machine.run(timeout=timeout, max_exits=place.value)
        return None if result.outcome == "max-exits" else Ended(result.outcome, str(result))
    if place.kind == "port":
        return _until_port(machine, place.value, timeout)
    address = image.symbols.get(place.name)
    if address is None:
        meant = suggestion(place.name, image)
        raise ConfigError(f"{image.name} has no symbol {place.name!r}; {meant}")
    return _until_code(machine, address, place.name, timeout)


def _until_port(machine: Machine, port: int, timeout: float | None) -> Ended | None:
    last: object = "no exit"
    for last in machine.exits(timeout=timeout):
        if isinstance(last, PortIn | PortOut) and last.port == port:
            return None
    if isinstance(last, Interrupted):
        return Ended("timeout", "the time given to the run was over")
    kind = exit_kind(machine.cpus[0].run_page[OFFSET_REASON])
    return Ended(kind, f"{kind}: {OUTCOMES.get(kind, last)}")


def _until_code(machine: Machine, address: int, name: str, timeout: float | None) -> Ended | None:
    """Stop before the instruction at `address`, by another one in its place that exits.

    Breakpoints of KVM's would leave the guest's code alone, but not every KVM has them in every
    ring. HLT is one byte, and privileged; so ring 3, which kvmpy lets use ports, gets an OUT.
    """
    if machine.layout.ring == 0:
        with _in_place_of(machine, address, name, _HLT):
            result = machine.run(timeout=timeout)
            there = result.outcome == "halt" and _came_from(machine, address, len(_HLT))
    else:
        with _stopping_port(machine) as port:
            patch = bytes([_OUT, port])
            with _in_place_of(machine, address, name, patch):
                result = machine.run(timeout=timeout)
                there = result.outcome == "stopped" and _came_from(machine, address, len(patch))
    return None if there else Ended(result.outcome, str(result))


@contextmanager
def _in_place_of(machine: Machine, address: int, name: str, patch: bytes) -> Iterator[None]:
    try:
        before = machine.memory.read(address, len(patch))
    except AddressError as error:
        raise ConfigError(f"symbol {name} is {address:#x}, which is not in RAM: {error}") from None
    machine.memory.write(address, patch)
    try:
        yield
    finally:
        machine.memory.write(address, before)


@contextmanager
def _stopping_port(machine: Machine) -> Iterator[int]:
    """A port that nobody has; who writes to it stops the machine."""

    def stop(offset: int, size: int, value: int | None) -> int:
        machine.stop()
        return 0

    port = next(one for one in _FREE_PORTS if machine.dispatch.ports.find(one) is None)
    claim = machine.attach_port(port, 1, FunctionDevice(stop), "symbol")
    try:
        yield port
    finally:
        machine.detach(claim)


def _came_from(machine: Machine, address: int, size: int) -> bool:
    """Whether the vCPU is behind an instruction of that size there; then it goes back before it."""
    cpu = machine.cpus[0]
    cpu.finish()
    registers, code = cpu.get_regs(), cpu.get_sregs().cs
    start = registers.rip - size
    if cpu.translate(start + (0 if code.l else code.base)).physical != address:
        return False
    registers.rip = start
    cpu.set_regs(registers)
    return True


def crashed(ended: Ended) -> bool:
    """Whether the guest died of its own fault."""
    return ended.outcome in CRASHES
