"""All exercises, in the order of the pages."""

from typing import Final

from kvmpy.errors import ConfigError
from kvmpy.labs import page1, page2, page3, page4, page5, page6, page7, page8, page9
from kvmpy.labs.model import Exercise

__all__ = ["EXERCISES", "find"]

EXERCISES: Final[dict[str, Exercise]] = {
    one.number: one
    for page in (
        page1,
        page2,
        page3,
        page4,
        page5,
        page6,
        page7,
        page8,
        page9,
    )
    for one in page.EXERCISES
}  # fmt: skip
"""Every exercise by its number."""


def find(number: str) -> Exercise:
    """The exercise of that number, "1.2"; "1" is the first one of page 1.

    Raises ConfigError for a number that no exercise has.
    """
    wanted = number if "." in number else f"{number}.1"
    if wanted not in EXERCISES:
        raise ConfigError(f"no exercise {number!r}: use one of {', '.join(EXERCISES)}")
    return EXERCISES[wanted]
