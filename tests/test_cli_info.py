"""`kvmpy info`: its keys, its tables, and what it says where KVM cannot be used."""

import errno
import importlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmpy.capabilities import ALLOWS, CAPABILITIES
from kvmpy.cli import main
from kvmpy.errors import HostError
from kvmpy.kvm import KVM
from kvmpy.probe import PROBES

info = importlib.import_module("kvmpy.cli.info")

KEYS = {
    "available",
    "reason",
    "hints",
    "device",
    "backend",
    "nested",
    "api_version",
    "vcpus",
    "capabilities",
    "probes",
    "versions",
}


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    status = main(["info", *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    _, out, _ = run(capsys, "--json", *options)
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


# Without a usable KVM ---------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    path = str(tmp_path / "kvm")
    monkeypatch.setattr(info, "DEVICE", path)
    return path


def refuse_opening(monkeypatch: pytest.MonkeyPatch, path: str, code: int) -> None:
    real = os.open

    def fake(name: Any, *rest: Any, **named: Any) -> int:
        if name == path:
            raise OSError(code, os.strerror(code), path)
        return real(name, *rest, **named)

    monkeypatch.setattr(os, "open", fake)


def test_missing(capsys: pytest.CaptureFixture[str], missing: str) -> None:
    status, out, err = run(capsys)
    assert status == 125
    first, *hints = err.splitlines()
    assert first.startswith(f"kvmpy: cannot open {missing}: No such file or directory")
    assert all(hint.startswith("  - ") for hint in hints)
    for word in ("kvm_intel", "--device /dev/kvm", "nested"):
        assert any(word in hint for hint in hints)
    assert "Backend" in out
    assert "Capability" not in out
    assert "Probe" not in out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, ("kvm group", "--device /dev/kvm")),
        (errno.EPERM, ("--device /dev/kvm",)),
        (errno.ENODEV, ("kvm_amd", "nested")),
        (errno.EMFILE, ("kvm group", "--device /dev/kvm", "nested", "kvm_intel")),
    ],
)
def test_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    code: int,
    words: tuple[str, ...],
) -> None:
    refuse_opening(monkeypatch, missing, code)
    status, _, err = run(capsys)
    assert status == 125
    first, *hints = err.splitlines()
    assert os.strerror(code) in first
    assert missing in first
    for word in words:
        assert any(word in hint for hint in hints)


def test_not_a_kvm_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "DEVICE", "/dev/null")
    status, _, err = run(capsys)
    assert status == 125
    assert "cannot use /dev/null" in err.splitlines()[0]


def test_json_of_a_missing_device(capsys: pytest.CaptureFixture[str], missing: str) -> None:
    status, out, err = run(capsys, "--json")
    found = json.loads(out)
    assert status == 125
    assert set(found) == KEYS
    assert found["available"] is False
    assert missing in found["reason"]
    assert found["reason"] in err
    assert found["hints"]
    assert found["device"] == missing
    for key in ("api_version", "vcpus", "capabilities", "probes"):
        assert found[key] is None
    assert set(found["versions"]) == {"kvmpy", "python", "kernel", "cpu"}


@pytest.mark.usefixtures("kvm_host")
def test_another_hypervisor_in_the_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: KVM) -> None:
        raise HostError("KVM_CREATE_VM failed: Device or resource busy (EBUSY)", errno.EBUSY)

    monkeypatch.setattr(KVM, "create_vm", refuse)
    status, _, err = run(capsys)
    assert status == 125
    assert "EBUSY" in err
    assert "VirtualBox" in err


# Parts ------------------------------------------------------------------------------------------


def test_limits_have_the_documented_fallbacks() -> None:
    none = {"NR_VCPUS": 0, "MAX_VCPUS": 0, "MAX_VCPU_ID": 0}
    assert info._vcpus(none) == {"recommended": 4, "maximum": 4, "maximum_id": 4}
    some = {"NR_VCPUS": 8, "MAX_VCPUS": 288, "MAX_VCPU_ID": 0}
    assert info._vcpus(some) == {"recommended": 8, "maximum": 288, "maximum_id": 288}


def test_cpu_model_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert info._cpu_model() == "unknown"


# With KVM ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kvm_host")
class TestOnKVM:
    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_json(capsys)
        assert set(found) == KEYS
        assert found["available"] is True
        assert found["reason"] is None
        assert found["hints"] == []
        assert found["api_version"] == 12
        assert set(found["vcpus"]) == {"recommended", "maximum", "maximum_id"}
        assert set(found["capabilities"]) == set(CAPABILITIES)
        assert found["capabilities"]["USER_MEMORY"] >= 1
        assert list(found["probes"]) == list(PROBES)
        for one in found["probes"].values():
            assert set(one) == {"answer", "detail"}

    def test_no_probe(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> None:
            pytest.fail("a probe was run")

        monkeypatch.setattr(info, "probe_all", fail)
        found = run_json(capsys, "--no-probe")
        assert found["available"] is True
        assert found["probes"] is None
        status, out, _ = run(capsys, "--no-probe")
        assert status == 0
        assert "Answer" not in out

    def test_the_page_tells_what_json_tells(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_json(capsys)
        status, out, err = run(capsys)
        assert status == 0
        assert err == ""
        lines = [" ".join(line.split()) for line in out.splitlines()]
        (absent,) = (line for line in lines if line.startswith("Absent: "))
        for name, value in found["capabilities"].items():
            if value:
                assert f"{name} {value} {ALLOWS.get(name, '')}".strip() in lines
                assert name not in absent.split(": ")[1].split(", ")
        for name, one in found["probes"].items():
            assert f"{name} {one['answer']} {one['detail']}" in lines
        for text in (found["backend"], *found["versions"].values()):
            assert text in out
        assert "HYPERV" not in absent

    def test_a_pipe_gets_plain_text(self) -> None:
        environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": "40"}
        command = [sys.executable, "-m", "kvmpy", "info", "--no-probe"]
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=30, check=True, text=True
        )
        assert "\x1b" not in done.stdout
        assert ALLOWS["IRQCHIP"] in done.stdout
        assert not any(line != line.rstrip() for line in done.stdout.splitlines())

    def test_a_narrow_terminal_cuts_nothing(self) -> None:
        outer, inner = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "60"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "kvmpy", "info", "--no-probe"]
        chunks = []
        with subprocess.Popen(
            command, stdout=inner, stdin=subprocess.DEVNULL, env=environment
        ) as child:
            os.close(inner)
            while chunk := read_terminal(outer):
                chunks.append(chunk)
            os.close(outer)
            assert child.wait(30) == 0
        text = b"".join(chunks).decode()
        assert "\x1b[1m" in text
        assert "…" not in text
        words = set(text.replace("\x1b[0m", "").split())
        assert set(ALLOWS["IRQCHIP"].split()) <= words


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: the other end is closed
        return b""
