"""The rooms: imports go down only, function-local ones included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvmpy"

# From the floor up; a module may import from rooms below its own, and from its own.
ROOMS = (
    {"errors"},
    {"abi"},
    {"exits", "sizes", "capabilities", "access", "once", "x86"},
    {"memory", "bus", "modes", "views"},
    {
        "calls",
        "counts",
        "descriptor",
        "stats",
        "interrupts",
        "vcpustate",
        "vcpuregs",
        "vcpu",
        "vm",
        "kvm",
    },
    {"devices", "asm"},
    {"boot", "snapshot", "trace", "autopsy"},
    {
        "console",
        "dispatch",
        "serve",
        "result",
        "running",
        "attaching",
        "devicestates",
        "copying",
        "spawning",
        "viewing",
        "machineview",
        "machine",
        "stepping",
        "paper",
        "probe",
        "probeguests",
        # gdb asks what the host can do, by probes, which are machines.
        "debugging",
        "gdb",
        "autopsies",
    },
    {"pytest", "outcome", "prepared", "repeat", "spares", "coverage"},
    {"bench", "labs", "pool"},
    {"cli"},
    {"__main__", "__init__"},
)
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Each module or package of kvmpy's that a file imports, as "room" or "room.module"."""
    package = ("kvmpy", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = (
                [f"{module}.{alias.name}" for alias in node.names]
                if module == "kvmpy"
                else [module]
            )
        else:
            continue
        for name in names:
            if name.startswith("kvmpy.") and name != "kvmpy.__version__":
                yield name.removeprefix("kvmpy.")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = room_of(path)
    assert own in RANK, f"give {own} a place in ROOMS"
    for name in imports(path):
        room = name.split(".")[0]
        if room == "_native":
            assert own == "abi", f"{path} imports the compiled module; only abi may"
        else:
            assert RANK[room] <= RANK[own], f"{own} imports {room}, which is above it"


def test_the_walk_sees_every_kind_of_import() -> None:
    found = set(imports(PACKAGE / "abi.py"))
    assert {"errors", "_native"} <= found
    assert "asm.assembler" in set(imports(PACKAGE / "asm" / "__init__.py"))  # function-local
    assert any(name.startswith("bus") for name in imports(PACKAGE / "devices" / "native.py"))
