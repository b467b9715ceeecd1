"""What is known of each cause, whatever the guest."""

from typing import NamedTuple

__all__ = ["Cause"]


class Cause(NamedTuple):
    """`summary` in a few words, `advice` in a sentence, `references` to manuals."""

    summary: str
    advice: str
    references: str
