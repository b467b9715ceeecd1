"""Telling that a step took more than one instruction, because the trap after the first came late.

MOV SS and POP SS hold it back by design (SDM Vol.3 6.8.3); a host may do so after others as well.
"""

from collections.abc import Callable
from typing import Any, Final

__all__ = ["held_back"]

_BRANCHES: Final = frozenset(
    (1, 2, 3, 4, 5, 7)
)  # CS_GRP_JUMP, CALL, RET, INT, IRET, BRANCH_RELATIVE
_MOST: Final = 4


def held_back(instruction: Any, decode: Callable[[int], Any], after: int) -> str:
    """A sentence where RIP is at `after` by what follows `instruction`; empty where it is not.

    `decode` gives Capstone's instruction at an address, None where there is none.
    """
    ran: list[str] = []
    one = instruction
    while one is not None and not _BRANCHES & set(one.groups):
        rip = one.address + one.size
        if rip == after and ran:
            return f"the host held the trap: this step also took {'; '.join(ran)}"
        if rip >= after or len(ran) == _MOST:
            return ""
        one = decode(rip)
        if one is not None:
            ran.append(f"{one.mnemonic} {one.op_str}".rstrip())
    return ""
