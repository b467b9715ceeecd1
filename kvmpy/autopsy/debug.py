"""Debug exceptions: single steps, breakpoints of the guest's own, and what RIP is already past.

Sources: SDM Vol.3 18.2 (debug registers), 18.3.1 (#DB and #BP), 6.5 (faults and traps).
"""

from dataclasses import replace
from typing import Final

from kvmpy.autopsy.fault import Fault
from kvmpy.autopsy.scene import Scene
from kvmpy.views.linear import read_linear
from kvmpy.x86.flags import RFLAGS

__all__ = [
    "asked_for",
    "before_trap",
    "check_breakpoint",
    "check_general_detect",
    "check_single_step",
]

_DB: Final = 1
_GENERAL_DETECT: Final = 1 << 13  # DR7.GD
_OF_ONE_BYTE: Final = {1: b"\xf1", 3: b"\xcc", 4: b"\xce"}  # INT1, INT3, INTO
_FIRST_FREE: Final = 32  # vectors below are exceptions, and hardly asked for by INT n


def check_breakpoint(scene: Scene) -> Fault | None:
    """The #DB of an instruction breakpoint at RIP, which comes before all else."""
    registers = scene.debug
    if registers is None or scene.registers.rflags & RFLAGS.RF:
        return None
    for number, address in enumerate(registers.db):
        enabled = registers.dr7 >> 2 * number & 3
        kind = registers.dr7 >> 16 + 4 * number & 3
        if enabled and not kind and address == scene.linear:
            why = f"DR{number} and DR7 ({registers.dr7:#x}) set a breakpoint at {address:#x}"
            return Fault("trap", why, _DB, deliberate=True)
    return None


def check_general_detect(scene: Scene) -> Fault | None:
    """The #DB of a MOV of a debug register while DR7.GD is set."""
    if scene.debug is None or not scene.debug.dr7 & _GENERAL_DETECT:
        return None
    why = "it uses a debug register while DR7.GD (bit 13) is set"
    return Fault("trap", why, _DB, deliberate=True)


def check_single_step(scene: Scene) -> Fault | None:
    """The #DB that comes after each instruction while RFLAGS.TF is set: RIP is at the next one."""
    if not scene.registers.rflags & RFLAGS.TF:
        return None
    why = "RFLAGS.TF (bit 8) is set: the instruction before this one ended with a single-step trap"
    return Fault("trap", why, _DB, deliberate=True)


def before_trap(scene: Scene, vector: int) -> Scene | None:
    """The scene at the instruction that asked for `vector`, which RIP is past; None without one."""
    if _code(scene, 1) == _OF_ONE_BYTE.get(vector):
        return _moved(scene, 1)
    if vector in (3, 4) or vector >= _FIRST_FREE:
        return _moved(scene, 2) if _code(scene, 2) == bytes((0xCD, vector)) else None
    return None


def asked_for(scene: Scene) -> Scene | None:
    """The scene at the INT3, INTO or INT n that RIP is past; None where there is none."""
    number = _code(scene, 2)[1:]
    vectors = (3, 4, *number)
    return next((found for one in vectors if (found := before_trap(scene, one)) is not None), None)


def _code(scene: Scene, size: int) -> bytes:
    return read_linear(scene.read, scene.special, scene.linear - size & (1 << 64) - 1, size)


def _moved(scene: Scene, size: int) -> Scene:
    registers = replace(scene.registers, rip=scene.registers.rip - size)
    return replace(scene, registers=registers, code=b"")
