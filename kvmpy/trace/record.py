"""What is known of one exit, as a value; and the layout of the C loop's records."""

import struct
from typing import Final, NamedTuple

from kvmpy.abi import lib
from kvmpy.exits import exit_kind

__all__ = ["FIELDS", "INTERRUPTED", "LEVELS", "RECORD_SIZE", "Raw", "Record", "unpack"]

FIELDS: Final = (
    ("number", "<u8"),
    ("entered", "<u8"),
    ("left", "<u8"),
    ("address", "<u8"),
    ("value", "<u8"),
    ("rip", "<u8"),
    ("digest", "<u8"),
    ("count", "<u4"),
    ("reason", "u1"),
    ("size", "u1"),
    ("level", "u1"),
    ("flags", "u1"),
)
"""struct kvmpy_record (csrc/record.h), as numpy writes a structured type; `Raw` calls the count
of elements `elements`, since a tuple has a `count` of its own."""

_PACKED: Final = struct.Struct("<7QI4B")
RECORD_SIZE: Final = _PACKED.size
"""Bytes of a record."""

INTERRUPTED: Final = "interrupted"
"""The kind of a record that is no exit of the guest's: a signal ended KVM_RUN."""

LEVELS: Final = {
    lib.KVMPY_BY_CALLER: "caller",
    lib.KVMPY_BY_C: "C",
    lib.KVMPY_BY_PYTHON: "Python",
}


class Raw(NamedTuple):
    """One record as the C loop wrote it; the fields are those of struct kvmpy_record."""

    number: int
    entered: int
    left: int
    address: int
    value: int
    rip: int
    digest: int
    elements: int
    reason: int
    size: int
    level: int
    flags: int

    @property
    def write(self) -> bool:
        """Whether the guest wrote."""
        return bool(self.flags & lib.KVMPY_RECORD_WRITE)

    @property
    def kind(self) -> str:
        """The exit's name, as in `Result.exits`."""
        return exit_kind(self.reason, self.write)


def unpack(buffer: memoryview, at: int) -> Raw:
    """The record at that byte of a ring."""
    return Raw._make(_PACKED.unpack_from(buffer, at))


class Record(NamedTuple):
    """One return of KVM_RUN.

    Times are CLOCK_MONOTONIC in nanoseconds. What is not known is None: the `value` of a read
    that nobody has answered yet, `rip` where the host's KVM does not bring it along, `address`
    where the exit has none.
    """

    cpu: int
    number: int
    """How many records of this vCPU came before it, those that were dropped included."""
    entered: int
    left: int
    kind: str
    """"port-out", "mmio-read", "halt" ...; "interrupted" where a signal ended KVM_RUN."""
    address: int | None
    """Port, guest-physical address, MSR, number of a hypercall, or the address of a debug exit."""
    size: int
    elements: int
    """Elements of a string instruction; otherwise 1."""
    value: int | None
    """What was read or written, of the first element; of other exits, what says most."""
    digest: int
    """Of all elements of a string instruction (FNV-1a, 64 bits), else 0."""
    rip: int | None
    level: str
    """Who served it: "C", "Python", "nobody", or "caller" where `run` or `exits` handed it out."""
    starts: bool
    """Whether the time before `entered` is not the loop's: it is a run's first record, or a sink
    was given records meanwhile."""
    device: str
    """The name of the device there, "" where there is none."""
    text: str
    """The access in words: "serial THR <- 'A'"."""

    @property
    def inside(self) -> int:
        """Nanoseconds from entering to leaving KVM_RUN."""
        return self.left - self.entered
