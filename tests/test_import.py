"""`import kvmpy` loads cffi's runtime and nothing else from outside the standard library."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

import kvmpy

SCRIPT = """
import sys
before = set(sys.modules)
import kvmpy
if "ALL" in sys.argv:
    [getattr(kvmpy, name) for name in kvmpy.__all__]
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(roots - set(sys.stdlib_module_names)))
print(sorted(roots & {"subprocess", "asyncio", "ctypes", "json", "tempfile", "logging"}))
"""


def loaded(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.splitlines()


def test_what_is_loaded() -> None:
    assert loaded() == ["['kvmpy']", "[]"]


def test_what_is_loaded_by_everything_in_the_face() -> None:
    assert loaded("ALL") == ["['_cffi_backend', 'kvmpy']", "[]"]


def test_the_face_is_whole() -> None:
    for name in kvmpy.__all__:
        assert getattr(kvmpy, name) is not None
        # A module of that name would take its place as soon as somebody imports it.
        assert find_spec(f"kvmpy.{name}") is None
    assert set(kvmpy.__all__) <= set(dir(kvmpy))
    assert sorted(kvmpy._HOME) == sorted(kvmpy.__all__)
    with pytest.raises(AttributeError, match="nosuch"):
        kvmpy.nosuch  # noqa: B018


def test_a_name_that_a_module_has_as_well() -> None:
    script = "from kvmpy import Outcome, runs; assert callable(runs)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
