"""The recorder: what a machine's exits were, when, and who served them.

`machine.trace` is the recorder of a machine. It works on vCPUs and devices, and never on
`Machine` itself; docs/tracing.md has the layout of the records and what they cannot tell.
"""

from kvmpy.trace.record import Record
from kvmpy.trace.ring import Tally
from kvmpy.trace.trace import Totals, Trace

__all__ = ["Record", "Tally", "Totals", "Trace"]
