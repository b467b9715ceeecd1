"""Nothing is left behind: by 500 machines, and by a failure at any step of making one."""

import errno
import gc
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpy import KVM, VCPU, VM, HostError, KvmpyError, KVMUnavailableError, Machine, abi
from kvmpy import kvm as kvm_module
from kvmpy.abi import lib
from kvmpy.descriptor import Descriptor
from kvmpy.once import Once
from kvmpy.snapshot import spawn
from kvmpy.x86.state import SpecialRegisters

pytestmark = pytest.mark.usefixtures("kvm_host")

MIB = 1 << 20
LARGE = 16 * MIB
HALTS = b"\xe6\x80\xf4"  # out 0x80,al; hlt
TIMEOUT = 10.0


def resources() -> dict[str, int]:
    """How much of each kind this process holds."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    timers = Path("/proc/self/timers")  # absent where the kernel cannot checkpoint processes
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": sum("kvm" in "".join(line.split(maxsplit=5)[5:]) for line in maps),
        "threads": len(os.listdir("/proc/self/task")) + threading.active_count(),
        "timers": timers.read_text().count("ID:") if timers.exists() else 0,
    }


def address_space() -> int:
    """The bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def test_the_counts_notice_a_machine() -> None:
    before, space = resources(), address_space()
    with Machine(64 * MIB, "real") as one:
        one.load(HALTS)
        one.run(TIMEOUT)
        found = resources()
        assert found["descriptors"] >= before["descriptors"] + 3
        assert found["mappings"] > before["mappings"]
        assert address_space() >= space + 64 * MIB
        if Path("/proc/self/timers").exists():
            assert found["timers"] > before["timers"]
    assert resources() == before


@pytest.mark.slow
def test_500_machines_leave_nothing_behind() -> None:
    def use_one(number: int) -> None:
        irqchip = "split" if number % 10 == 9 else None
        with Machine(4 * MIB, "real", cpus=1 + number % 2, irqchip=irqchip) as one:
            one.load(HALTS)
            if irqchip is None:
                assert one.run(TIMEOUT).outcome == "halt"

    use_one(0)
    before, space = resources(), address_space()
    for number in range(500):
        use_one(number)
    assert resources() == before
    assert address_space() < space + 100 * MIB, "500 times 4 MiB of RAM would be 2000"


def test_machines_on_threads_leave_nothing_behind() -> None:
    def use_some() -> None:
        for _ in range(10):
            with Machine(MIB, "real") as one:
                one.load(HALTS)
                outcomes.append(one.run(TIMEOUT).outcome)

    outcomes: list[str] = []
    use_some()
    before = resources()
    threads = [threading.Thread(target=use_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert outcomes == ["halt"] * 50
    assert resources() == before


# Failures at each step ---------------------------------------------------------------------


class Saboteur:
    """Stands in for a function, counts its calls, and fails at the one that it is told."""

    def __init__(self, original: Callable[..., Any], error: Callable[[], BaseException]) -> None:
        self.original, self.error = original, error
        self.calls: list[str] = []
        self.fails_at = -1

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        number = len(self.calls)
        self.calls.append(str(arguments[1]) if len(arguments) > 1 else "")
        if number == self.fails_at:
            raise self.error()
        return self.original(*arguments, **named)


def by_parts() -> None:
    """Everything of the lower floor that takes a descriptor or a mapping."""
    with KVM() as kvm, kvm.create_vm() as vm:
        vm.create_split_irqchip()
        ram = vm.add_memory(0, LARGE)
        shared = vm.add_memory(LARGE, MIB, backing="shared", log_dirty=True)
        vm.add_memory(2 * LARGE, MIB, backing="private", fd=shared.fd)
        cpu = vm.create_vcpu()
        cpu.set_cpuid2(kvm.get_supported_cpuid())
        with vm.stats(), cpu.stats() as stats:
            stats.read()
        cpu.get_xsave()
        vm.remove_memory(ram)
        other = vm.create_vcpu()
        other.close()


def by_machine() -> None:
    """A machine with the options that take the most steps."""
    with KVM() as kvm:
        posted = bool(kvm.check_extension("COALESCED_PIO"))
    with Machine(LARGE, "long", 3, cpus=2, posted_console=posted) as one:
        one.load(HALTS)


SCENARIOS = [by_parts, by_machine]


@pytest.fixture(autouse=True)
def no_memory_of_cpuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines ask for CPUID once per process; here each asks."""
    monkeypatch.setattr("kvmpy.kvm._supported_cpuid", Once())


def fails_everywhere(
    sabotage: Callable[[Saboteur], None],
    saboteur: Saboteur,
    scenario: Callable[[], None],
    expected: type[BaseException],
) -> None:
    """Run the scenario with a failure at the first call, the second, and so on."""
    scenario()
    before, space = resources(), address_space()
    sabotage(saboteur)
    kvm_module._supported_cpuid.forget()
    scenario()
    steps = list(saboteur.calls)
    assert len(steps) > 1 and resources() == before
    for number, step in enumerate(steps):
        saboteur.calls.clear()
        saboteur.fails_at = number
        kvm_module._supported_cpuid.forget()
        with pytest.raises(expected) as caught:
            scenario()
        del caught
        assert resources() == before, f"after a failure of step {number}: {step}"
    assert address_space() < space + 4 * LARGE, "RAM is left mapped"


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: HostError("KVM said no", errno.ENOMEM), KvmpyError),
        (KeyboardInterrupt, KeyboardInterrupt),
    ],
    ids=["host", "ctrl-c"],
)
def test_failing_ioctl_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[], None],
    error: Callable[[], BaseException],
    expected: type[BaseException],
) -> None:
    def sabotage(saboteur: Saboteur) -> None:
        for where in ("kvmpy.descriptor.ioctl", "kvmpy.stats.ioctl"):
            monkeypatch.setattr(where, saboteur)

    fails_everywhere(sabotage, Saboteur(abi.ioctl, error), scenario, expected)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_failing_mmap_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[], None]
) -> None:
    def sabotage(saboteur: Saboteur) -> None:
        monkeypatch.setattr(mmap, "mmap", saboteur)

    saboteur = Saboteur(mmap.mmap, lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    fails_everywhere(sabotage, saboteur, scenario, KvmpyError)


@pytest.mark.parametrize("function", ["memfd_create", "truncate", "dup", "fstat"])
def test_failing_file_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    with KVM() as kvm, kvm.create_vm() as vm:
        shared = vm.add_memory(0, MIB, backing="shared")
        before = resources()

        def refuse(*_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        fd = shared.fd if function in ("dup", "fstat") else None
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            with pytest.raises(HostError, match="Too many open files") as caught:
                vm.add_memory(MIB, MIB, backing="shared", fd=fd)
        assert caught.value.errno == errno.EMFILE
        del caught
        assert resources() == before and len(vm.memory) == 1


@pytest.mark.slow
def test_no_descriptors_left_is_a_typed_error() -> None:
    """The real thing: the process may open no more files at any of the steps."""
    import resource

    by_parts()
    before = resources()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    failed = 0
    try:
        for room in range(100):
            # The lowest free number is what the next descriptor gets.
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, hard))
            try:
                by_parts()
                break
            except KvmpyError as error:
                assert error.errno == errno.EMFILE  # type: ignore[attr-defined]
                failed += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert resources() == before, f"with room for {room}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert failed >= 5
    assert resources() == before


def test_unusable_device_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resources()
    monkeypatch.setattr("kvmpy.kvm.API_VERSION", 99)
    for _ in range(3):
        with pytest.raises(KVMUnavailableError):
            Machine("1M", "real")
    assert resources() == before


def test_refused_memory_and_load_leave_nothing_behind() -> None:
    before = resources()
    for _ in range(3):
        with pytest.raises(KvmpyError), Machine("64K", "real") as one:
            one.load(bytes(MIB))
    assert resources() == before


def test_refused_registers_leave_nothing_behind() -> None:
    before = resources()
    with pytest.raises(KvmpyError), KVM() as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, MIB)
        cpu = vm.create_vcpu()
        cpu.set_sregs(SpecialRegisters(cr0=1 << 31))
        cpu.run(TIMEOUT)
    assert resources() == before


def test_failing_timer_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run` needs may fail, too; the vCPU can be run later."""
    with Machine("1M", "real") as one:
        one.load(HALTS)
        before = resources()

        class Lib:
            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

            @staticmethod
            def kvmpy_begin(*_: object) -> int:
                return -errno.EAGAIN

        with monkeypatch.context() as patch:
            patch.setattr("kvmpy.vcpu.lib", Lib())
            with pytest.raises(HostError, match="EAGAIN"):
                one.run(TIMEOUT)
        assert resources() == before
        assert one.run(TIMEOUT).outcome == "halt"


def test_a_signal_that_comes_while_a_copy_is_made_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python has a handler run, and raise, as soon as C has made all of it."""
    with Machine("1M") as machine:
        machine.load(HALTS)
        snapshot = machine.snapshot()
    Machine.from_snapshot(snapshot).close()
    before, calls = resources(), spawn.lib.kvmpy_make_calls

    class Lib:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def kvmpy_make_calls(self, *arguments: Any) -> int:
            assert calls(*arguments) >= 0
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spawn, "lib", Lib())
        with pytest.raises(KeyboardInterrupt):
            Machine.from_snapshot(snapshot)
    assert resources() == before


@pytest.mark.parametrize("what", [VM, VCPU])
def test_a_signal_while_a_descriptor_is_made_into_an_object_leaves_none_open(
    what: type[Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has its descriptor can be closed, and so it is when it goes."""
    fd = os.open(os.devnull, os.O_RDONLY)
    real = Descriptor.__init__

    def interrupted(self: Descriptor, *arguments: Any) -> None:
        real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Descriptor, "__init__", interrupted)
    numbers = {VM: (0,), VCPU: (0, 0)}[what]
    options = {"sync_regs": 0, "ring_page": 0, "xsave_size": 0} if what is VCPU else {}
    with pytest.warns(ResourceWarning, match="never closed"):
        with pytest.raises(KeyboardInterrupt):
            what(fd, *numbers, **options)  # type: ignore[arg-type]
        gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
