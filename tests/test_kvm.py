"""/dev/kvm itself: version, capabilities, CPUID and MSR lists; paths that are no KVM."""

import os
from pathlib import Path

import pytest

from kvmpy import KVM, ClosedError, ConfigError, HostError, KVMUnavailableError, UnsupportedError
from kvmpy.capabilities import CAPABILITIES
from kvmpy.kvm import backend, nested

HAS_KVM = pytest.mark.usefixtures("kvm_host")


@pytest.fixture
def kvm(kvm_host: None):  # type: ignore[no-untyped-def]
    with KVM() as opened:
        yield opened


# What the host says ------------------------------------------------------------------------


def test_api_version(kvm: KVM) -> None:
    assert kvm.api_version == 12


def test_mapping_holds_kvm_run_port_data_and_the_ring(kvm: KVM) -> None:
    size = kvm.vcpu_mmap_size
    assert size >= 4096 and size % 4096 == 0
    assert size > kvm.check_extension("COALESCED_MMIO") * 4096


def test_capability_by_name_with_prefix_and_by_number(kvm: KVM) -> None:
    value = kvm.check_extension("NR_MEMSLOTS")
    assert value >= 32
    assert kvm.check_extension("KVM_CAP_NR_MEMSLOTS") == value
    assert kvm.check_extension(CAPABILITIES["NR_MEMSLOTS"]) == value
    assert kvm.require("KVM_CAP_NR_MEMSLOTS") == kvm.require("NR_MEMSLOTS") == value


def test_all_capabilities_by_name(kvm: KVM) -> None:
    found = kvm.capabilities()
    assert set(found) == set(CAPABILITIES)
    for name in ("USER_MEMORY", "IRQCHIP", "SYNC_REGS", "IMMEDIATE_EXIT"):
        assert found[name] == kvm.check_extension(name) > 0
    assert found["S390_PSW"] == found["ARM_PSCI"] == 0  # of other architectures
    assert min(found.values()) >= 0


def test_capability_that_the_host_lacks(kvm: KVM) -> None:
    assert kvm.check_extension("S390_PSW") == kvm.check_extension(0xFFFF) == 0
    with pytest.raises(UnsupportedError, match=r"lacks KVM_CAP_S390_PSW$"):
        kvm.require("KVM_CAP_S390_PSW")


@pytest.mark.parametrize("name", ["SYNC_REG", "", "KVM_CAP_", "sync_regs"])
def test_capability_that_no_kernel_has(kvm: KVM, name: str) -> None:
    with pytest.raises(ConfigError, match=f"no capability is named '{name}'"):
        kvm.check_extension(name)


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_capability_number_out_of_range(kvm: KVM, number: int) -> None:
    with pytest.raises(ConfigError, match="KVM_CHECK_EXTENSION"):
        kvm.check_extension(number)


def test_supported_cpuid(kvm: KVM) -> None:
    entries = kvm.get_supported_cpuid()
    by_leaf = {(entry.function, entry.index): entry for entry in entries}
    assert len(by_leaf) == len(entries) > 5
    basic = by_leaf[0, 0]
    vendor = b"".join(r.to_bytes(4, "little") for r in (basic.ebx, basic.edx, basic.ecx))
    assert vendor.isalnum() and vendor.decode() in Path("/proc/cpuinfo").read_text()
    hypervisor = by_leaf[0x4000_0000, 0]
    assert hypervisor.ebx.to_bytes(4, "little") == b"KVMK"
    assert by_leaf[1, 0].edx & 1  # an x87 FPU


def test_msr_lists(kvm: KVM) -> None:
    state = kvm.get_msr_index_list()
    assert len(set(state)) == len(state)
    # SYSENTER_CS, STAR and TSC are state on every x86-64 host.
    assert {0x174, 0xC000_0081, 0x10} <= set(state)
    if kvm.check_extension("GET_MSR_FEATURES"):
        features = kvm.get_msr_feature_index_list()
        assert len(set(features)) == len(features)
        assert all(0 <= index < 1 << 32 for index in features)


def test_lists_longer_than_the_first_guess_are_asked_for_again(
    kvm: KVM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = []

    def crowded(name: str, buffer: bytearray) -> int:
        room = int.from_bytes(buffer[:4], "little")
        rooms.append(room)
        if room < 1000:
            raise HostError("too many", 7)
        buffer[:4] = (1000).to_bytes(4, "little")
        buffer[4 : 4 + 4000] = b"".join(n.to_bytes(4, "little") for n in range(1000))
        return 0

    monkeypatch.setattr(kvm, "ioctl", crowded)
    assert kvm.get_msr_index_list() == list(range(1000))
    assert rooms == sorted(rooms) and len(rooms) > 1


def test_list_that_never_fits_is_an_error(kvm: KVM, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str, buffer: bytearray) -> int:
        raise HostError("too many", 7)

    monkeypatch.setattr(kvm, "ioctl", never)
    with pytest.raises(HostError, match="too many"):
        kvm.get_msr_index_list()


@HAS_KVM
def test_backend_is_a_module_that_is_loaded() -> None:
    name = backend()
    assert name == "unknown" or Path("/sys/module", name).is_dir()
    assert isinstance(nested(), bool)


# Paths that are no KVM ---------------------------------------------------------------------


def refusal(path: Path | str) -> KVMUnavailableError:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KVMUnavailableError) as caught:
        KVM(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return caught.value


def test_missing_device_says_how_to_get_one(tmp_path: Path) -> None:
    error = refusal(tmp_path / "kvm")
    assert error.errno == 2
    for word in ("kvm_intel", "kvm_amd", "nested virtualization", "--device /dev/kvm"):
        assert word in str(error)


@pytest.mark.parametrize(("code", "word"), [(13, "kvm group"), (1, "--device"), (6, "driver")])
def test_forbidden_device_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, code: int, word: str
) -> None:
    # The superuser is never refused, so the answer is made up here.
    def refuse(path: str, flags: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KVMUnavailableError, match=word) as caught:
        KVM()
    assert caught.value.errno == code


def test_forbidden_file_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.touch(mode=0)
    if os.access(path, os.R_OK | os.W_OK):
        pytest.skip("this user may open every file (the superuser)")
    assert "kvm group" in str(refusal(path))


def test_regular_file_is_no_kvm(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.write_bytes(b"not a device")
    assert "it is no KVM device" in str(refusal(path))
    assert path.read_bytes() == b"not a device"


def test_other_things_are_no_kvm(tmp_path: Path) -> None:
    refusal(tmp_path)  # a directory
    assert "no KVM device" in str(refusal("/dev/null"))


def test_another_api_version_is_refused(kvm_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.kvm.API_VERSION", 13)
    assert "its API version is 12; kvmpy speaks 13" in str(refusal("/dev/kvm"))


# Closing -----------------------------------------------------------------------------------


@HAS_KVM
def test_close_is_idempotent_and_use_after_it_is_an_error() -> None:
    kvm = KVM()
    kvm.close()
    kvm.close()
    assert kvm.closed
    for call in (
        kvm.create_vm,
        kvm.capabilities,
        kvm.get_supported_cpuid,
        kvm.get_msr_index_list,
        lambda: kvm.check_extension("IRQCHIP"),
        lambda: kvm.vcpu_mmap_size,
        lambda: kvm.fd,
    ):
        with pytest.raises(ClosedError, match="/dev/kvm is closed"):
            call()
    with pytest.raises(ClosedError), kvm:
        pass


@HAS_KVM
def test_vm_outlives_the_system_descriptor() -> None:
    with KVM() as kvm:
        vm = kvm.create_vm()
    with vm:
        vm.add_memory(0, 4096)
        vm.create_vcpu().get_regs()


def test_leaving_by_an_exception_closes_and_keeps_it(kvm_host: None) -> None:
    with pytest.raises(ZeroDivisionError), KVM() as kvm:
        1 / 0  # noqa: B018
    assert kvm.closed
