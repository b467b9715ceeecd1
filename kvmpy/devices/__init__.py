"""The devices that kvmpy ships: each knows offset, size and value, and nothing of KVM.

| device | where a PC has it | what it is for |
|---|---|---|
| `DebugConsole` | port 0xe9, 0x402 | output, a byte at a time |
| `Serial16550A` | ports 0x3f8-0x3ff | input and output |
| `DebugExit` | ports 0xf4-0xf7 | ends the run with a status |
| `PostCode` | port 0x80 | progress codes |
| `KeyboardReset`, `ResetControl` | port 0x64, 0xcf9 | reset |
| `PowerOff` | ports 0x604-0x605 | ends the run |
| `Sink`, `Constant`, `Capture`, `Counter` | anywhere | answered by the C loop, without Python |
| `EndRun` | anywhere | ends the run with a value, without Python |
| `Harness` | where it is attached | inputs, coverage and entropy for fuzzers |
"""

from .console import DebugConsole
from .debugexit import DebugExit, exit_status
from .harness import Entropy, Harness
from .native import Backing, Capture, Constant, Counter, EndRun, NativeDevice, Sink
from .post import PostCode
from .power import PowerOff
from .reset import KeyboardReset, ResetControl
from .serial import Serial16550A

__all__ = [
    "Backing",
    "Capture",
    "Constant",
    "Counter",
    "DebugConsole",
    "DebugExit",
    "EndRun",
    "Entropy",
    "Harness",
    "KeyboardReset",
    "NativeDevice",
    "PostCode",
    "PowerOff",
    "ResetControl",
    "Serial16550A",
    "Sink",
    "exit_status",
]
