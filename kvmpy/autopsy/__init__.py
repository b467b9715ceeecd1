"""Why a guest died: `machine.autopsy()`, and the table of causes that it can name.

The diagnosis is made from the state alone (`examine`, `delivery`): registers, page tables,
descriptor tables and the bytes at RIP. It needs no KVM, and works on what a snapshot holds as
well. Only where that does not settle it, copies of the guest run to the same end (`replay`).
"""

from kvmpy.autopsy.autopsy import Autopsy
from kvmpy.autopsy.causes import CAUSES, Cause
from kvmpy.autopsy.fault import Fault

__all__ = ["CAUSES", "Autopsy", "Cause", "Fault"]
