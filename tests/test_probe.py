"""Probes: the table, what becomes of errors, and that answers agree with what guests do."""

import errno
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy import probe as probes
from kvmpy import probeguests as guests
from kvmpy.errors import ConfigError, HostError, KVMUnavailableError, UnsupportedError
from kvmpy.exits import Debug, Exit, FailEntry, Halt, Interrupted, PortIn, PortOut, Shutdown
from kvmpy.machine import Machine
from kvmpy.probe import PROBES, Finding, Probe, probe, probe_all
from kvmpy.stats import Stats
from kvmpy.vcpu import VCPU
from kvmpy.x86.tables import EXCEPTION_PORT, STUB_SIZE

ANSWERS = {"yes", "no", "hangs", "unknown"}
UD2 = b"\x0f\x0b"
SPIN = b"\xeb\xfe"  # jmp $
HLT = b"\xf4"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing found yet; what is found meanwhile is forgotten."""
    monkeypatch.setattr(probes, "_found", {})


def put(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], guests.Answer]) -> None:
    monkeypatch.setitem(PROBES, "test", Probe("the thing", ask))


# The table and the cache, without KVM -----------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no probe is named 'singlestep'; use one of .*vmcall"):
        probe("singlestep")


def test_an_answer_is_found_once(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    calls = []

    def ask() -> guests.Answer:
        calls.append(1)
        return "no", "it broke"

    put(monkeypatch, ask)
    assert probe("test") == Finding("test", "no", "the thing: it broke")
    assert probe("test") is probe("test")
    assert len(calls) == 1


def test_a_yes_needs_no_reason(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    put(monkeypatch, lambda: ("yes", ""))
    assert probe("test") == Finding("test", "yes", "the thing")


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (ConfigError("vCPU 0 refuses it"), "no"),
        (UnsupportedError("no such ioctl", errno.ENOTTY), "no"),
        (HostError("KVM_RUN failed", errno.EIO), "unknown"),
        (OSError(errno.ENOMEM, "no memory"), "unknown"),
        (KVMUnavailableError("no /dev/kvm", errno.ENOENT), "unknown"),
    ],
)
def test_an_error_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, fresh: None, error: Exception, answer: str
) -> None:
    def ask() -> guests.Answer:
        raise error

    put(monkeypatch, ask)
    finding = probe("test")
    assert finding.answer == answer
    assert str(error) in finding.detail
    # What the host could not say today is asked again; what KVM lacks stays so.
    put(monkeypatch, lambda: ("yes", ""))
    assert probe("test").answer == ("yes" if answer == "unknown" else "no")


def test_a_mistake_in_a_probe_is_not_hidden(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def ask() -> guests.Answer:
        raise ZeroDivisionError

    put(monkeypatch, ask)
    with pytest.raises(ZeroDivisionError):
        probe("test")


def test_without_kvm_nothing_is_known(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def refuse(path: str) -> int:
        raise KVMUnavailableError(f"cannot open {path}", errno.ENOENT)

    monkeypatch.setattr("kvmpy.kvm._open", refuse)
    findings = probe_all()
    assert [one.name for one in findings] == list(PROBES)
    for one in findings:
        assert one.answer == "unknown"
        assert "/dev/kvm" in one.detail


def at_stub(vector: int) -> Any:
    """As much of a machine as `_judge` looks at, in the reporting stub of a vector."""
    registers = SimpleNamespace(rip=0x5000 + vector * STUB_SIZE + 2)
    return SimpleNamespace(
        cpus=[SimpleNamespace(get_regs=lambda: registers)], layout=SimpleNamespace(stubs=0x5000)
    )


@pytest.mark.parametrize(
    ("exit_", "answer", "why"),
    [
        (Interrupted("timeout"), "hangs", "only a signal"),
        (Shutdown(), "no", "triple fault"),
        (PortOut(EXCEPTION_PORT, 1, b"\0"), "no", "the guest gets #GP (general protection)"),
        (PortOut(0x10, 1, b"\0"), "no", "goes on without it"),
        (FailEntry(0x80000021, 0), "no", "FailEntry"),
        (PortIn(0x99, 1), "no", "PortIn"),
    ],
)
def test_how_a_guest_ends_becomes_an_answer(exit_: Exit, answer: str, why: str) -> None:
    found = guests._judge(at_stub(13), exit_, False)
    assert found[0] == answer
    assert why in found[1]


# On KVM -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm_host")
class TestOnKVM:
    def test_every_probe_answers(self) -> None:
        for one in probe_all():
            assert one.answer in ANSWERS
            assert one.detail.startswith(PROBES[one.name].subject)
            assert (one.detail == PROBES[one.name].subject) == (one.answer == "yes")
            assert "\n" not in one.detail

    @pytest.mark.parametrize("mode", ["long", "protected", "real"])
    def test_a_guest_that_goes_wrong_is_seen_to(self, mode: str) -> None:
        assert guests.passes(b"\x90", mode) == ("yes", "")
        assert guests.passes(UD2, mode) == ("no", "the guest gets #UD (invalid opcode)")
        assert guests.interrupts(UD2, 6, mode) == ("yes", "")
        assert guests.interrupts(UD2, 13, mode)[0] == "no"
        assert guests.interrupts(b"\x90", 6, mode) == ("no", "the guest goes on without it")
        assert guests.passes(HLT, mode) == ("no", f"the guest ends with {Halt()}")

    def test_a_hang_is_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guests, "DEADLINE", 0.02)
        assert guests.passes(SPIN)[0] == "hangs"

    def test_a_wrong_result_is_no_yes(self) -> None:
        load = b"\xb8\x05\0\0\0"  # mov eax, 5
        assert guests.passes(load, rax=5) == ("yes", "")
        assert guests.passes(load, rax=6) == ("no", "the result is 0x5, not 0x6")

    def test_probes_leave_no_descriptor_open(self) -> None:
        guests.native("long", 3)
        guests.hypercall()
        before = len(os.listdir("/proc/self/fd"))
        guests.native("long", 3)
        guests.hypercall()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_native_is_unknown_without_statistics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: VCPU) -> Stats:
            raise UnsupportedError("this host's KVM has no KVM_GET_STATS_FD")

        monkeypatch.setattr(VCPU, "stats", refuse)
        assert guests.native("long", 3) == ("unknown", "this host's KVM has no KVM_GET_STATS_FD")

    def test_native_is_unknown_without_the_statistic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Stats, "read", lambda self: {"exits": 1})
        assert guests.native("long", 3)[0] == "unknown"


# Answers agree with guests that are not the probes' own -----------------------------------------


@pytest.mark.usefixtures("kvm_host")
class TestAgreement:
    @pytest.mark.parametrize(("name", "ring"), [("single-step", 0), ("single-step-ring3", 3)])
    def test_single_step(self, name: str, ring: int) -> None:
        with Machine("1M", "long", ring) as machine:
            # inc eax, five times; jmp $
            machine.load(b"\xff\xc0" * 5 + SPIN, at=0x2000)
            cpu = machine.cpus[0]
            cpu.set_guest_debug(single_step=True)
            places = []
            for _ in range(5):
                exit_ = cpu.run(1.0)
                if not isinstance(exit_, Debug):
                    break
                places.append(exit_.pc)
            assert (places == [0x2002, 0x2004, 0x2006, 0x2008, 0x200A]) == (
                probe(name).answer == "yes"
            )

    @pytest.mark.parametrize(("name", "ring"), [("breakpoint", 0), ("breakpoint-ring3", 3)])
    def test_breakpoint(self, name: str, ring: int) -> None:
        with Machine("1M", "long", ring) as machine:
            # inc eax, three times; out 0x55, al. At the OUT a KVM may emulate, and so stop.
            machine.load(b"\xff\xc0" * 3 + b"\xe6\x55", at=0x2000)
            machine.cpus[0].set_guest_debug(breakpoints={0x2002: "x"})
            stopped = isinstance(machine.cpus[0].run(1.0), Debug)
            assert stopped == (probe(name).answer == "yes")

    def test_sse_in_ring_0(self) -> None:
        with Machine("1M") as machine:
            machine.load(b"\x66\x0f\xfe\xc8" + HLT)  # paddd xmm1, xmm0
            works = machine.run(timeout=1.0).outcome == "halt"
            assert works == (probe("ring0-sse").answer == "yes")

    def test_32_bit_paging_stays_on_where_it_works(self) -> None:
        with Machine("1M", "protected") as machine:
            machine.load(HLT)
            machine.memory.write(0x3000, struct.pack("<I", 0x83))  # a 4 MiB page at 0
            cpu = machine.cpus[0]
            special = cpu.get_sregs()
            special.cr0, special.cr3, special.cr4 = special.cr0 | 1 << 31, 0x3000, 1 << 4
            cpu.set_sregs(special)
            halted = machine.run(timeout=1.0).outcome == "halt"
            works = halted and bool(cpu.get_sregs().cr0 >> 31)
            assert works == (probe("32-bit-paging").answer == "yes")

    @pytest.mark.parametrize(("name", "code"), [("string-output", 0x6E), ("string-input", 0x6C)])
    def test_string_elements_per_exit(self, name: str, code: int) -> None:
        with Machine("1M") as machine:
            # mov ecx, 16; mov edx, 0x55; mov esi, 0x4000; mov edi, esi; rep outsb or insb
            setup = b"\xb9\x10\0\0\0" + b"\xba\x55\0\0\0" + b"\xbe\0\x40\0\0" + b"\x89\xf7"
            machine.load(setup + bytes((0xF3, code)) + HLT)
            exit_ = machine.cpus[0].run(1.0)
            assert isinstance(exit_, PortOut | PortIn)
            assert (exit_.count > 1) == (probe(name).answer == "yes")

    def test_native_code_gives_the_emulator_nothing_to_do(self) -> None:
        if probe("native-ring3").answer == "unknown":
            pytest.skip(probe("native-ring3").detail)
        with Machine("1M", "long", 3) as machine:
            # mov ecx, 30000; xor eax, ecx; loop to the xor; out 0x55, al
            machine.load(b"\xb9\x30\x75\0\0" + b"\x31\xc8\xe2\xfc" + b"\xe6\x55")
            with machine.cpus[0].stats() as statistics:
                before = statistics.read()["insn_emulation"]
                assert isinstance(machine.cpus[0].run(10.0), PortOut)
                after = statistics.read()["insn_emulation"]
            assert isinstance(before, int)
            assert isinstance(after, int)
            assert (after - before < 1000) == (probe("native-ring3").answer == "yes")
