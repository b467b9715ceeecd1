"""What all tests share: whether this machine has KVM, and strict hypothesis profiles."""

import os

import pytest
from hypothesis import HealthCheck, settings

from kvmpy.pytest import require_kvm

settings.register_profile(
    "kvmpy",
    deadline=None,  # machines are noisy, and no test asserts an absolute time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize=bool(os.environ.get("CI")),
    max_examples=50,
)
settings.load_profile("kvmpy")


@pytest.fixture(scope="session")
def kvm_host() -> None:
    """Skip where /dev/kvm cannot be used; under KVMPY_REQUIRE_KVM=1, fail."""
    require_kvm()
