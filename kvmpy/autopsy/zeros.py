"""Whether the guest executes zeros, and whether it ran into them from its own code."""

from typing import Final

from kvmpy.autopsy.scene import Scene
from kvmpy.views.linear import read_linear

__all__ = ["check_zeros", "zeros_before"]

_RUN: Final = 8  # so many zeros from RIP on are no code
_RUNWAY: Final = 64  # so many zeros before RIP, and the guest may have come through them
_BACK: Final = 1 << 16
_STEP: Final = 4096
_ENDS: Final = (b"\xf4", b"\xc3", b"\xcb", b"\xcf", b"\x0f\x0b")  # hlt, ret, retf, iret, ud2


def check_zeros(scene: Scene) -> tuple[str, tuple[str, ...]] | None:
    """The cause and a note where the bytes at RIP are zeros, None where they are not."""
    if len(scene.instruction_bytes) < _RUN or any(scene.instruction_bytes[:_RUN]):
        return None
    end = _code_end(scene)
    rip = scene.registers.rip
    if end is None:
        return "executing-zeros", (f"there are {_BACK:#x} bytes of zeros and more before {rip:#x}",)
    far, before = end
    if _stops(before):
        note = f"the code before it ends {far:#x} bytes below by what does not go on"
        return "executing-zeros", (note,)
    return "fell-off-code", (f"the code ends {far:#x} bytes below {rip:#x}, and nothing stops it",)


def zeros_before(scene: Scene) -> tuple[str, ...]:
    """A note where RIP, at which there is no instruction, is just past zeros."""
    start = scene.linear - _RUNWAY & (1 << 64) - 1
    before = read_linear(scene.read, scene.special, start, _RUNWAY)
    if len(before) < _RUNWAY or any(before):
        return ()
    rip = scene.registers.rip
    return (
        f"there are zeros up to {rip:#x}: unless it was jumped to, the guest has run through them, "
        "from the end of its code or from where an earlier jump led",
    )


def _code_end(scene: Scene) -> tuple[int, bytes] | None:
    """How far below RIP the last byte is that is not zero, and the bytes up to there."""
    physical = scene.walk(scene.linear, "fetch").physical
    if physical is None:
        return None
    at = physical
    while at > 0 and physical - at < _BACK:
        start = max(0, at - _STEP)
        block = scene.read(start, at - start)
        if block is None:
            return None
        kept = block.rstrip(b"\0")
        if kept:
            end = start + len(kept)
            return physical - end, (scene.read(max(0, end - 8), min(8, end)) or b"")
        at = start
    return None


def _stops(code: bytes) -> bool:
    """Whether code that ends so does not go on: by HLT, a return, or a jump."""
    short, near = code[-2:-1] == b"\xeb", code[-5:-4] == b"\xe9"
    indirect = code[-2:-1] == b"\xff" and code[-1] & 0xF8 == 0xE0
    return code.endswith(_ENDS) or short or near or indirect
