"""Whether the stack is full of the same return address: a handler or a function without an end."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvmpy.autopsy.scene import Scene
from kvmpy.views.linear import read_linear
from kvmpy.x86.flags import may_be_rflags

__all__ = ["recursion"]

_LOOKED_AT: Final = 0x10000  # bytes above RSP
_OFTEN: Final = 8  # so many exceptions inside of each other, and it is no accident
_DEEP: Final = 64  # so many calls, where recursion may be meant
_CALLS: Final = (2, 3, 5, 6, 7)  # lengths of CALL: FF /2 of some forms, E8 with its displacement


def recursion(scene: Scene) -> str:
    """A note where an exception's handler, or a function, came to the same place many times."""
    words = _stack(scene)
    cs = scene.special.cs.selector
    frames = Counter(
        rip
        for rip, selector, flags in zip(words, words[1:], words[2:], strict=False)
        if cs and selector == cs and may_be_rflags(flags)
    )
    often = [rip for rip, count in frames.items() if count >= _OFTEN]
    if often:
        rip = often[-1]  # the oldest: what came later may be what the frames have overwritten
        older = list(frames)[list(frames).index(rip) + 1 :]
        begun = f"; the first of all was at {older[-1]:#x}" if older else ""
        return (
            f"the stack has the frames of {frames[rip]} exceptions at {rip:#x}, none of which has "
            f"returned: a handler faults itself, again and again{begun}"
        )
    for back, count in Counter(words).most_common(3):
        if count >= _DEEP and _follows_call(scene, back):
            return (
                f"the stack has the return address {back:#x} {count} times or more: the call "
                "before it recurses, perhaps without an end"
            )
    return ""


def _stack(scene: Scene) -> Sequence[int]:
    """The words above RSP, as far as they are mapped; where tables are lost, as if one to one."""
    size = scene.mode.bits // 8
    at = scene.stack_address(0)
    # A push that failed left RSP where it was; a page that is not there may be just below.
    data = read_linear(scene.read, scene.special, at, _LOOKED_AT)
    if not data:
        data = scene.read(at, _LOOKED_AT) or b""
    ends = range(0, len(data) - size + 1, size)
    return [int.from_bytes(data[start : start + size], "little") for start in ends]


def _follows_call(scene: Scene, back: int) -> bool:
    """Whether there is a near CALL just before that address."""
    base = 0 if scene.mode.bits == 64 else scene.special.cs.base
    longest = max(_CALLS)
    code = read_linear(scene.read, scene.special, base + back - longest, longest)
    if len(code) < longest:
        return False
    relative = 3 if scene.mode.bits == 16 else 5
    if code[-relative] == 0xE8:
        return True
    return any(code[-n] == 0xFF and code[1 - n] >> 3 & 7 == 2 for n in _CALLS)
