"""Wrong arguments and closed machines: typed errors, in a line that says what to do."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmpy import AddressError, ConfigError, Machine, Snapshot, assemble, runs
from kvmpy.spares import Spares
from kvmpy.x86.state import MPState

pytestmark = pytest.mark.usefixtures("kvm_host")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("1M") as made:
        made.load(b"\xf4")
        yield made


@pytest.fixture
def snapshot(machine: Machine) -> Snapshot:
    return machine.snapshot()


@pytest.mark.parametrize("given", ["a.snap", None, b"\1" * 1000, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda _, given: Machine.from_snapshot(given),
        lambda _, given: list(runs(given, [b""])),
        lambda machine, given: list(runs(given, [b""], machine=machine)),
        lambda _, given: Spares(given),
        lambda machine, given: machine.snapshot().diff(given),
        lambda machine, given: machine.restore(given),
        lambda machine, given: machine.reset_to(given),
    ],
)
def test_what_is_no_snapshot(machine: Machine, call: Callable[..., Any], given: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a Snapshot; Snapshot\.load\(path\) reads one"):
        call(machine, given)


class Half:
    name = "half"

    def read(self, offset: int, size: int) -> int:
        return 0


class Whole(Half):
    def write(self, offset: int, size: int, value: int) -> None:
        pass


def function(offset: int, size: int, value: int | None) -> int:
    return 0


@pytest.mark.parametrize("attach", [Machine.attach_port, Machine.attach_mmio])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        (function, "function is a function: on_port and on_mmio"),
        (Half(), "no device, without write: a device has a name, read"),
        (None, "None is no device, without name and read and write"),
        (Whole, r"Whole is a class: attach an instance, Whole\(\)"),
    ],
)
def test_what_is_no_device(
    machine: Machine, attach: Callable[..., Any], device: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(machine, 0x8000, 1, device)
    assert machine.dispatch.ports.find(0x8000) is None


@pytest.mark.parametrize("place", [("x",), (function,), (1.5,), (0x8000_0000, "2"), (None, 1)])
@pytest.mark.parametrize("on", [Machine.on_port, Machine.on_mmio])
def test_places_that_are_no_numbers(machine: Machine, on: Any, place: Any) -> None:
    with pytest.raises(ConfigError, match=r"(port|MMIO) (address|size) .*: give an int"):
        on(machine, *place)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": "a"},
        {"batch": 1.5},
        {"batch": 10**9},
        {"timeout": "1"},
        {"timeout": [1]},
        {"max_exits": "1"},
        {"max_exits": 1.5},
        {"collect": 5},
        {"collect": (0, -4)},
        {"collect": (0, 0)},
        {"collect": (0, "4")},
        {"collect": (0, 1, 2)},
        {"collect": ()},
    ],
    ids=str,
)
def test_options_of_runs(snapshot: Snapshot, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"{name}.*{re.escape(str(value))}.*give"):
        list(runs(snapshot, [b""], **options))


def test_more_is_collected_than_there_is(snapshot: Snapshot) -> None:
    with pytest.raises(AddressError, match="not in writable RAM"):
        list(runs(snapshot, [b""], collect=(0, 1 << 60)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: Machine(cpus="2"), "cpus='2': give 1 or more"),
        (lambda _: Machine(irqchip=[1]), "irqchip="),
        (lambda machine: Spares(machine.snapshot(), "2"), "size='2': give 1 or more"),
        (lambda machine: machine.run("1"), "timeout of '1' seconds: give"),
        (lambda machine: machine.run(max_exits="1"), "max_exits='1': give"),
        (lambda machine: next(machine.exits(None, 1.5)), "max_exits=1.5: give"),
        (lambda _: assemble(b"nop"), "a source is text, not bytes"),
        (lambda _: assemble(None), "a source is text, not NoneType"),
        (lambda _: assemble("nop", mode=[]), "unknown mode"),
        (lambda _: assemble("nop", at="0x1000"), "'0x1000': give an int"),
        (lambda _: assemble("nop", timeout="1"), "a timeout of 1 s"),
    ],
)
def test_arguments_of_a_wrong_kind(
    machine: Machine, call: Callable[[Machine], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(machine)


def test_options_that_a_copy_does_not_take(snapshot: Snapshot) -> None:
    for options, named in (({"foo": 1}, "foo"), ({"memory": "2M", "cpus": 2}, "cpus, memory")):
        message = f"no option {named}: a copy is .* takes attach, across_backends, output and input"
        with pytest.raises(ConfigError, match=message):
            Machine.from_snapshot(snapshot, **options)


def test_what_is_no_number_claim_or_image_is_refused(machine: Machine) -> None:
    for given in (1.5, "x", None):
        with pytest.raises(ConfigError, match="no integer"):
            machine.memory.write_u16(0x2000, given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no claim"):
        machine.detach(0x10)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no Image"):
        machine.load_image("hello_long")  # type: ignore[arg-type]


class Number:
    """An integer that is no int, such as numpy's."""

    def __index__(self) -> int:
        return 0x81


def test_integers_of_others_are_written(machine: Machine) -> None:
    machine.memory.write_u16(0x2000, Number())  # type: ignore[arg-type]
    machine.memory[0x2003] = Number()  # type: ignore[assignment]
    assert machine.memory.read(0x2000, 4) == b"\x81\0\0\x81"


@pytest.mark.parametrize(
    "call",
    [
        lambda machine: machine.memory.read(1e9, 4),
        lambda machine: machine.memory.write(1e9, b"x"),
        lambda machine: machine.memory.read(16.0, 4),
        lambda machine: machine.vm.add_memory(1e9, 4096),
        lambda machine: machine.vm.add_memory(1 << 30, 4096.0),
    ],
)
def test_addresses_and_sizes_are_integers(machine: Machine, call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="integer"):
        call(machine)


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_numbers_that_kvm_s_structs_have_no_room_for(machine: Machine, number: int) -> None:
    with pytest.raises(ConfigError, match="KVM_SET_MP_STATE takes unsigned numbers"):
        machine.cpus[0].set_mp_state(number)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="KVM_CREATE_PIT2 takes unsigned numbers"):
        machine.vm.create_pit(number)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [5, None, "rip", MPState.HALTED])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("set_regs", "Registers"),
        ("set_sregs", "SpecialRegisters"),
        ("set_debugregs", "DebugRegisters"),
        ("set_xcrs", "XCRs"),
        ("set_vcpu_events", "VcpuEvents"),
        ("set_fpu", "FPU"),
        ("set_cpuid2", "CPUIDEntry values"),
        ("set_msrs", "values by index"),
    ],
)
def test_what_is_no_state(machine: Machine, name: str, kind: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} takes {kind}, not {type(given).__name__}$"):
        getattr(machine.cpus[0], name)(given)


def test_state_of_another_kind(machine: Machine) -> None:
    cpu = machine.cpus[0]
    registers, special, debug = cpu.get_regs(), cpu.get_sregs(), cpu.get_debugregs()
    for call, given in (
        (cpu.set_regs, special), (cpu.set_sregs, registers), (cpu.set_debugregs, registers),
        (cpu.set_fpu, debug), (cpu.set_vcpu_events, debug), (cpu.set_cpuid2, [debug, 1]),
        (cpu.set_xsave, 5), (cpu.set_lapic, None),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"^set_\w+ takes .*, not \w+$"):
            call(given)
    assert (cpu.get_regs(), cpu.get_sregs(), cpu.get_debugregs()) == (registers, special, debug)


@pytest.mark.parametrize("values", [{"star": 1}, {0x10: None}, {0x10: -1.5}, {1 << 32: 0}])
def test_msrs_that_are_no_numbers(machine: Machine, values: Any) -> None:
    with pytest.raises(ConfigError, match="32 bits of index, 64 of value"):
        machine.cpus[0].set_msrs(values)
