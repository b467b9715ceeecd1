"""What is shipped: every package of the source tree."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    there = {
        ".".join(found.parent.relative_to(ROOT).parts)
        for found in (ROOT / "kvmpy").rglob("__init__.py")
    }
    own = {name for name, folder in setuptools["package-dir"].items() if (ROOT / folder).is_dir()}
    assert own == {"kvmpy.guests"}
    assert sorted(setuptools["packages"]) == sorted(there | own)
