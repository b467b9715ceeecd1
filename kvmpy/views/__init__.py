"""What a guest's state means: page tables, descriptor tables, registers, memory, decoded.

The pure half is made of functions of `read(address, length)`, which gives bytes of RAM at a
guest-physical address or None where there is none, and of `SpecialRegisters`: it needs no machine,
and works on a snapshot as well.
"""
