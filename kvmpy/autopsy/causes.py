"""Every cause that an autopsy can name: what it is, what to do, and where that is written."""

from typing import Final

from kvmpy.autopsy.cause import Cause
from kvmpy.autopsy.codecauses import CODE
from kvmpy.autopsy.memorycauses import MEMORY

__all__ = ["CAUSES", "Cause"]

CAUSES: Final[dict[str, Cause]] = MEMORY | CODE
"""The causes by key."""
