"""RDMSR and WRMSR that KVM leaves to user space, of a real guest."""

from collections.abc import Iterator

import pytest

from kvmpy import ConfigError, Halt, Machine, MsrRead, MsrWrite, UnsupportedError, assemble

pytestmark = pytest.mark.usefixtures("kvm_host")

MSR = 0x12345  # no processor's
UNKNOWN = 1 << 1  # KVM_MSR_EXIT_REASON_UNKNOWN
READ = f"mov ecx, {MSR}; mov eax, 7; mov edx, 7; rdmsr; hlt"
WRITE = f"mov ecx, {MSR}; mov eax, 0x9abcdef0; mov edx, 0x12345678; wrmsr; hlt"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("1M", mode="long") as made:
        try:
            made.vm.enable_cap("X86_USER_SPACE_MSR", UNKNOWN)
        except UnsupportedError as error:
            pytest.skip(f"this KVM leaves no MSRs to user space: {error}")
        yield made


def first_exit(machine: Machine, text: str) -> MsrRead | MsrWrite:
    machine.load(assemble(text, mode="long", at=0x1000))
    exit_ = machine.cpus[0].run(timeout=10)
    assert isinstance(exit_, MsrRead | MsrWrite)
    return exit_


def test_a_read_is_answered(machine: Machine) -> None:
    assert first_exit(machine, READ) == MsrRead(MSR, UNKNOWN)
    (cpu,) = machine.cpus
    with pytest.raises(ConfigError, match="8 bytes, not 4"):
        cpu.reply(bytes(4))
    cpu.reply((0x1122334455667788).to_bytes(8, "little"))
    assert cpu.run(timeout=10) == Halt()
    registers = cpu.get_regs()
    assert (registers.rax, registers.rdx) == (0x55667788, 0x11223344)


def test_a_read_that_nobody_answers_gives_0(machine: Machine) -> None:
    first_exit(machine, READ)
    (cpu,) = machine.cpus
    assert cpu.run(timeout=10) == Halt()
    registers = cpu.get_regs()
    assert (registers.rax, registers.rdx) == (0, 0)


def test_a_write_says_its_value(machine: Machine) -> None:
    assert first_exit(machine, WRITE) == MsrWrite(MSR, 0x123456789ABCDEF0, UNKNOWN)
    assert machine.cpus[0].run(timeout=10) == Halt()


@pytest.mark.parametrize("text", [READ, WRITE])
def test_a_refusal_is_a_general_protection_fault(text: str, machine: Machine) -> None:
    exit_ = first_exit(machine, text)
    machine.cpus[0].reply(bytes(8) if isinstance(exit_, MsrRead) else b"", error=True)
    result = machine.run(timeout=10)  # no IDT
    assert result.outcome == "shutdown"
    autopsy = machine.autopsy(result)
    assert (autopsy.cause, autopsy.vector, autopsy.error_code) == ("bad-msr", 13, 0)
