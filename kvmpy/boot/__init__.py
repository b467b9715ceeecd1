"""From a guest on disk to memory and an entry point: binaries, ELF files, assembly sources."""

from kvmpy.boot.guests import find_guest, list_guests
from kvmpy.boot.header import GuestHeader
from kvmpy.boot.image import load_image
from kvmpy.boot.segments import Image, LoadSegment

__all__ = ["GuestHeader", "Image", "LoadSegment", "find_guest", "list_guests", "load_image"]
