"""The processor's exceptions by vector, and the frame that one leaves on the stack.

Sources: SDM Vol.3 6.3 and table 6-1, 6.12.1 and 6.14.2 (frames), 4.7 (page-fault error codes);
APM Vol.2 8.2 for #HV, #VC and #SX.
"""

from dataclasses import dataclass
from struct import Struct

from kvmpy.errors import ConfigError
from kvmpy.x86.layout import Bytes

__all__ = ["ERROR_CODE_VECTORS", "EXCEPTIONS", "GuestException", "decode_exception"]

EXCEPTIONS: dict[int, tuple[str, str]] = {
    0: ("#DE", "divide error"),
    1: ("#DB", "debug exception"),
    2: ("NMI", "non-maskable interrupt"),
    3: ("#BP", "breakpoint"),
    4: ("#OF", "overflow"),
    5: ("#BR", "bound range exceeded"),
    6: ("#UD", "invalid opcode"),
    7: ("#NM", "device not available"),
    8: ("#DF", "double fault"),
    9: ("#MP", "coprocessor segment overrun"),
    10: ("#TS", "invalid TSS"),
    11: ("#NP", "segment not present"),
    12: ("#SS", "stack-segment fault"),
    13: ("#GP", "general protection"),
    14: ("#PF", "page fault"),
    16: ("#MF", "x87 floating-point error"),
    17: ("#AC", "alignment check"),
    18: ("#MC", "machine check"),
    19: ("#XM", "SIMD floating-point error"),
    20: ("#VE", "virtualization exception"),
    21: ("#CP", "control protection"),
    28: ("#HV", "hypervisor injection"),
    29: ("#VC", "VMM communication"),
    30: ("#SX", "security exception"),
}
"""Vector -> mnemonic and description. The other vectors below 32 are reserved."""

ERROR_CODE_VECTORS = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
"""The vectors of exceptions that push an error code."""

_PAGE_FAULT = 14
_FRAMES = {64: Struct("<6Q"), 32: Struct("<6I")}


@dataclass(frozen=True, slots=True)
class GuestException:
    """An exception or interrupt that a guest took in ring 3, as its stack frame tells it.

    `name` is the mnemonic, such as "#PF", or "vector N". `error_code` is None where the
    exception has none, and `address`, the linear address in CR2, where it is not a page fault.
    """

    vector: int
    name: str
    description: str
    error_code: int | None
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    address: int | None

    def __str__(self) -> str:
        text = f"{self.name} ({self.description}) at rip {self.rip:#x}"
        if self.error_code is not None:
            text += f", error code {self.error_code:#x}"
        if self.address is not None:
            text += f": {_page_fault(self.error_code or 0)} address {self.address:#x}"
        return text


def _page_fault(error_code: int) -> str:
    """Say what an error code of #PF means: who did what, and why not."""
    ring = "user" if error_code & 4 else "supervisor"
    access = "fetch from" if error_code & 16 else "write to" if error_code & 2 else "read of"
    if error_code & 8:
        page = "an entry with reserved bits at"
    else:
        page = "a protected" if error_code & 1 else "an unmapped"
    return f"{ring} {access} {page}"


def decode_exception(vector: int, stack: Bytes, cr2: int, bits: int = 64) -> GuestException:
    """Decode the frame that delivering `vector` out of ring 3 pushed.

    `stack` are the bytes from the handler's stack pointer upwards: 48 of them with `bits` = 64
    (long mode), 24 with `bits` = 32. An interrupt that is injected with the vector of an
    exception cannot be told from it. Raises ConfigError for a vector over 255, other `bits`,
    or fewer bytes.
    """
    if not 0 <= vector <= 255:
        raise ConfigError(f"vector {vector} is not 0 to 255")
    frame = _FRAMES.get(bits)
    if frame is None:
        raise ConfigError(f"an exception frame of {bits} bits: use 64 or 32")
    if len(stack) < frame.size:
        raise ConfigError(f"an exception frame takes {frame.size} bytes, not {len(stack)}")
    words = frame.unpack_from(stack)
    has_error_code = vector in ERROR_CODE_VECTORS
    error_code = words[0] & 0xFFFF_FFFF if has_error_code else None
    rip, cs, rflags, rsp, ss = words[has_error_code:][:5]
    kind = "reserved exception" if vector < 32 else "interrupt"
    name, description = EXCEPTIONS.get(vector, (f"vector {vector}", kind))
    return GuestException(
        vector,
        name,
        description,
        error_code,
        rip,
        cs & 0xFFFF,  # the rest of a pushed selector's slot is undefined in 32-bit frames
        rflags,
        rsp,
        ss & 0xFFFF,
        cr2 if vector == _PAGE_FAULT else None,
    )
