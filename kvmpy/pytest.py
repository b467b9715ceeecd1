"""Tests on guests: each gets a machine as fresh as new, for the price of a reset.

It is a plugin of pytest's, loaded only where it is asked for: `pytest -p kvmpy.pytest`, or
`pytest_plugins = ["kvmpy.pytest"]` in the topmost conftest.py. Say what is to be tested:

    @pytest.fixture(scope="module")
    def kvmpy_guest():
        machine = Machine("1M")
        machine.load(assemble("in al, 0x30; out 0xf4, al; hlt", mode="long", at=0x1000))
        return machine

    @pytest.fixture(scope="module")
    def kvmpy_attach():             # only for devices of your own
        return lambda machine: machine.attach_port(0x30, 1, MyDevice())

    def test_it(kvmpy_machine):
        assert kvmpy_machine.run(timeout=1).value == 7

`kvmpy_guest` gives a `Machine`, a `Snapshot`, or an `Image`, a file or the name of a guest as
`Machine.from_image` takes them. Of it, one snapshot is taken for each module, and `kvmpy_machine`
is one machine that is reset to it before each test and closed at the module's end. A machine that
a test has closed, or given other devices, RAM or vCPUs, is replaced by a new one.

`kvmpy_attach` gives a function that attaches your devices to a machine, None by default. It is
called for each machine that is made here and for one that `kvmpy_guest` gives, where devices that
this one has already at the same addresses stay.

The report of a test that failed has the guest's last output and its registers. Without /dev/kvm
tests skip and say why; under KVMPY_REQUIRE_KVM=1 they fail. Not taken back between tests: what no
snapshot has (see `Machine.snapshot`), the counts of `exit_counts`, devices without `save_state`.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final, TypeAlias

import pytest

from kvmpy.abi import lib
from kvmpy.boot.segments import Image
from kvmpy.bus import Bus, Claim, Device
from kvmpy.dispatch import Dispatch
from kvmpy.errors import ConfigError, KvmpyError, KVMUnavailableError
from kvmpy.kvm import KVM
from kvmpy.machine import Machine
from kvmpy.snapshot import Snapshot

__all__ = [
    "kvmpy_attach",
    "kvmpy_guest",
    "kvmpy_host",
    "kvmpy_machine",
    "pytest_runtest_makereport",
    "require_kvm",
]

Attach: TypeAlias = Callable[[Machine], object]
_LAST_OUTPUT: Final = 4096  # bytes of the console that a report shows
_PATIENCE: Final = 500  # hundredths of a second
_SECTION: Final = "kvmpy guest"


def require_kvm() -> None:
    """Skip the test where /dev/kvm cannot be used; under KVMPY_REQUIRE_KVM=1, fail it."""
    try:
        KVM().close()
    except KVMUnavailableError as error:
        if os.environ.get("KVMPY_REQUIRE_KVM") == "1":
            pytest.fail(f"KVMPY_REQUIRE_KVM is set, but {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kvmpy_host() -> None:
    """Skips tests where there is no KVM; a `kvmpy_guest` of yours may ask for it, too."""
    require_kvm()


@pytest.fixture(scope="module")
def kvmpy_guest() -> Any:
    """What is to be tested: yours to define, as a fixture of scope "module" or wider."""
    pytest.fail("define a fixture kvmpy_guest that gives a Machine, a Snapshot or a guest's name")


@pytest.fixture(scope="module")
def kvmpy_attach() -> Attach | None:
    """A function that attaches your devices to a machine; None, unless you define another."""
    return None


@pytest.fixture(scope="module")
def _kvmpy_bench(
    kvmpy_host: None, kvmpy_guest: Any, kvmpy_attach: Attach | None
) -> "Iterator[_Bench]":
    bench = _Bench(kvmpy_guest, kvmpy_attach)
    yield bench
    bench.close()


@pytest.fixture
def kvmpy_machine(_kvmpy_bench: "_Bench") -> Machine:
    """The module's machine, reset to the snapshot of what `kvmpy_guest` gave."""
    return _kvmpy_bench.fresh()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the guest has come to, to the report of a test that failed."""
    report = yield
    machine = getattr(item, "funcargs", {}).get("kvmpy_machine")
    if report.when == "call" and report.failed and isinstance(machine, Machine):
        report.sections.append((_SECTION, _state(machine)))
    return report


class _Bench:
    """One snapshot, and the machine that is reset to it."""

    def __init__(self, guest: Any, attach: Attach | None) -> None:
        self._attach = attach
        self._machine = machine = self._first(guest)
        try:
            self._snapshot = guest if isinstance(guest, Snapshot) else machine.snapshot()
        except BaseException:
            _close(machine)
            raise
        self._shape = _shape(machine)

    def _first(self, guest: Any) -> Machine:
        if isinstance(guest, Snapshot):
            return _copy(guest, self._attach)
        if not isinstance(guest, Machine | Image | str | os.PathLike):
            raise ConfigError(
                f"kvmpy_guest gave {guest!r}: give a Machine, a Snapshot, an Image or a file's name"
            )
        machine = guest if isinstance(guest, Machine) else Machine.from_image(guest)
        try:
            if self._attach is not None:
                _attach_rest(machine, self._attach)
        except BaseException:
            _close(machine)
            raise
        return machine

    def fresh(self) -> Machine:
        """The machine at the snapshot: the one of the test before, if it is still good."""
        machine = self._machine
        if machine.vm.closed or _shape(machine) != self._shape:
            return self._replace()
        try:
            for cpu in machine.cpus:
                lib.kvmpy_unkick(cpu.loop)  # a stop that no run has answered
                cpu.set_guest_debug()
            machine.reset_to(self._snapshot)
        except (KvmpyError, ValueError):
            return self._replace()
        return machine

    def _replace(self) -> Machine:
        _close(self._machine)
        self._machine = machine = _copy(self._snapshot, self._attach)
        self._shape = _shape(machine)
        return machine

    def close(self) -> None:
        """Close the machine, whatever the last test has left of it."""
        _close(self._machine)


def _copy(snapshot: Snapshot, attach: Attach | None) -> Machine:
    """A new machine at the snapshot, with its devices."""
    if snapshot.attached and attach is None:
        raise ConfigError(
            f"a new machine has no device at {', '.join(map(str, snapshot.attached))}, as the "
            "first one had: define a fixture kvmpy_attach that gives a function to attach them"
        )
    return Machine.from_snapshot(snapshot, attach)


def _attach_rest(machine: Machine, attach: Attach) -> None:
    """Call `attach` for a machine that may have some or all of its devices."""
    dispatch = machine.dispatch
    own = {(bus, claim.base, claim.size): claim for bus, claim in dispatch.own()}

    def attach_rest(
        bus: Bus, base: int, size: int, device: Device, name: str | None = None
    ) -> Claim:
        claim = own.get((bus, base, size))
        return Dispatch.attach(dispatch, bus, base, size, device, name) if claim is None else claim

    vars(dispatch)["attach"] = attach_rest  # all ways of attaching come here
    try:
        attach(machine)
    finally:
        del vars(dispatch)["attach"]


def _close(machine: Machine) -> None:
    machine.stop()
    for _ in range(_PATIENCE):  # a thread of the test's runs it still, and has been stopped
        if not any(cpu.loop.running for cpu in machine.cpus):
            break
        time.sleep(0.01)
    try:
        machine.close()
    except BufferError as error:  # a view, held by a test or by the traceback of one
        machine.__exit__(BufferError, error, None)


def _shape(machine: Machine) -> tuple[object, ...]:
    """What no reset brings back: claims, regions and vCPUs, each by identity."""
    buses = (machine.dispatch.ports, machine.dispatch.mmio)
    claims = [claim for bus in buses for claim in bus]
    return claims, list(machine.memory), list(machine.cpus)


def _state(machine: Machine) -> str:
    """The end of the guest's output and the registers, as far as they can be had."""
    output = machine.console[-_LAST_OUTPUT:].decode("utf-8", "backslashreplace")
    lines = ["console:", output.rstrip("\n") or "(nothing)"]
    for cpu in machine.cpus:
        try:
            values = cpu.get_regs().as_dict().items()
        except (KvmpyError, ValueError) as error:
            lines.append(f"{cpu.what}: no registers: {error}")
            continue
        lines.append(f"{cpu.what}:")
        shown = [f"{name:>6} {value:#018x}" for name, value in values]
        lines += [" ".join(shown[at : at + 3]) for at in range(0, len(shown), 3)]
    if machine.vm.closed:
        lines.append("the machine is closed")
    return "\n".join(lines)
