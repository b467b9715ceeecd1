"""A device's state as JSON, for devices that have more of it than a number."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

__all__ = ["packed", "unpacked"]


def packed(values: Mapping[str, Any]) -> bytes:
    """What `save_state` gives."""
    import json  # slow to load, and most machines are never saved

    return json.dumps(values).encode()


@lru_cache(maxsize=32)
def unpacked(state: bytes) -> Mapping[str, Any]:
    """What it was made of, not to be changed; loops of resets ask for the same ever again."""
    import json

    values: Mapping[str, Any] = json.loads(state)
    return values
