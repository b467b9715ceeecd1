"""zstd, if it is installed: the library of the extra `zstd` is imported when it is first used."""

from collections.abc import Callable
from typing import Any, Final

from kvmpy.errors import ConfigError, SnapshotError

__all__ = ["compressor", "decompressor"]

_LEVEL: Final = 3  # zstd's own default: higher ones take many times as long for little


def compressor() -> Callable[[bytes], bytes]:
    """A function that compresses. Raises ConfigError where the library is not installed."""
    return _library().ZstdCompressor(level=_LEVEL).compress  # type: ignore[no-any-return]


def decompressor() -> Callable[[bytes, int], bytes]:
    """A function that gives the bytes back, which are as many as it is told, or SnapshotError."""
    library = _library()
    decompress = library.ZstdDecompressor().decompress

    def exactly(data: bytes, size: int) -> bytes:
        try:
            # The frame says its size first: nothing is made room for that is larger than expected.
            if library.frame_content_size(data) != size:
                raise SnapshotError("is malformed: a block does not hold its pages")
            found = decompress(data, max_output_size=size)
        except library.ZstdError:
            raise SnapshotError("is malformed: a block cannot be decompressed") from None
        if len(found) != size:
            raise SnapshotError("is malformed: a block does not hold its pages")
        return bytes(found)

    return exactly


def _library() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            "snapshots with zstd need the library zstandard: pip install 'kvmpy[zstd]'"
        ) from None
    return zstandard
