"""Symbols of a guest, as the command line names them."""

from difflib import get_close_matches

from kvmpy.boot.image import Image
from kvmpy.views.symbols import places

__all__ = ["suggestion"]


def suggestion(name: str, image: Image) -> str:
    """What to say after a symbol that the image does not have."""
    if near := get_close_matches(name, image.symbols):
        return f"did you mean {', '.join(near)}?"
    known = {
        place
        for segment in image.segments
        for place in places(image.symbols, segment.address, segment.memory_size)
    }
    return f"it has {', '.join(sorted(known)[:8]) or 'none: symbols come from .S and ELF files'}"
