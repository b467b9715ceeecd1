"""What a PC has at the ports that no device of kvmpy's claims, for traces.

Sources: IBM PC/AT Technical Reference (I/O address map); Intel ICH9 data sheet, "Fixed I/O
Ranges"; the QEMU and Linux names of what came later.
"""

from typing import Final

__all__ = ["known_port"]

_KNOWN: Final = (
    (0x00, 0x0F, "DMA controller 1"),
    (0x20, 0x20, "PIC command"),
    (0x21, 0x21, "PIC mask"),
    (0x40, 0x42, "PIT counter"),
    (0x43, 0x43, "PIT mode"),
    (0x60, 0x60, "keyboard data"),
    (0x61, 0x61, "port B (speaker, PIT gate)"),
    (0x64, 0x64, "keyboard controller"),
    (0x70, 0x70, "CMOS index"),
    (0x71, 0x71, "CMOS data"),
    (0x80, 0x80, "POST code"),
    (0x81, 0x8F, "DMA page"),
    (0x92, 0x92, "port A (A20, fast reset)"),
    (0xA0, 0xA0, "PIC 2 command"),
    (0xA1, 0xA1, "PIC 2 mask"),
    (0xC0, 0xDF, "DMA controller 2"),
    (0xE9, 0xE9, "debug console"),
    (0xF0, 0xFF, "x87 error"),
    (0x170, 0x177, "IDE 2"),
    (0x1F0, 0x1F7, "IDE 1"),
    (0x278, 0x27F, "LPT2"),
    (0x2E8, 0x2EF, "COM4"),
    (0x2F8, 0x2FF, "COM2"),
    (0x376, 0x376, "IDE 2 control"),
    (0x378, 0x37F, "LPT1"),
    (0x3B0, 0x3DF, "VGA"),
    (0x3E8, 0x3EF, "COM3"),
    (0x3F0, 0x3F5, "floppy controller"),
    (0x3F6, 0x3F6, "IDE 1 control"),
    (0x3F8, 0x3FF, "COM1"),
    (0x510, 0x511, "fw_cfg"),
    (0xCF8, 0xCFB, "PCI config address"),
    (0xCFC, 0xCFF, "PCI config data"),
)


def known_port(port: int) -> str:
    """Its name on a PC, or ""; where it is more than one port wide, with the offset."""
    for first, last, name in _KNOWN:
        if first <= port <= last:
            return name if first == last else f"{name} +{port - first:#x}"
    return ""
