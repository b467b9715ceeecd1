"""Whether CR2, which the last page fault has set, agrees with what an autopsy has found.

Source: SDM Vol.3 4.7 and 2.5 (CR2 is the linear address that caused a page fault).
"""

from collections.abc import Sequence
from typing import Final

from kvmpy.autopsy.fault import PF, Fault
from kvmpy.autopsy.instruction import decode
from kvmpy.autopsy.scene import Scene

__all__ = ["contradiction"]

_PAGE: Final = 12  # an access across two pages may fault in the second


def contradiction(scene: Scene, faults: Sequence[Fault]) -> str:
    """What CR2 says against those faults in a sentence, empty where it says nothing.

    `scene` is the state at the end: CR2 is that of the last page fault, and stays what it was where
    there was none.
    """
    if faults and faults[0].cause == "tables-outside-ram":
        return ""  # KVM can end the guest then without a page fault that would set CR2
    cr2 = scene.special.cr2
    addresses = [one.address for one in faults if one.vector == PF and one.address is not None]
    if addresses:
        first = faults[0].vector == PF  # a host that delivers by itself need not set it on the way
        if not first or cr2 >> _PAGE in [address >> _PAGE for address in addresses]:
            return ""
        return (
            f"CR2 is {cr2:#x}, not {addresses[0]:#x}: either another access has faulted, or this "
            "host raises something else here"
        )
    if not cr2 or not faults or scene.walk(cr2, "read", cpl=0).allowed:
        return ""
    where = _used(scene, cr2)
    return f"CR2 is {cr2:#x}, in {where}: it may have been a page fault there" if where else ""


def _used(scene: Scene, address: int) -> str:
    """What the instruction, or the delivery of its exception, uses at that address."""
    special = scene.special
    tables = (
        ("GDT", special.gdt.base, special.gdt.limit),
        ("IDT", special.idt.base, special.idt.limit),
        ("LDT", special.ldt.base, special.ldt.limit),
        ("TSS", special.tr.base, special.tr.limit),
    )
    for name, base, limit in tables:
        if base <= address <= base + limit:
            return f"the {name}"
    instruction = decode(scene)
    for touch in instruction.touches() if instruction is not None else ():
        if touch.linear <= address < touch.linear + touch.size:
            return "an operand"
    return ""
