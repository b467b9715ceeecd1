"""What a comparison could not tell, and what was not the same about its two results."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from kvmpy.bench.compare import TOO_FEW, Comparison
from kvmpy.bench.model import Case

__all__ = ["changes", "cut_short", "document", "gone", "limits", "untold"]

NAME: Final = "kvmpy-bench-comparison"
VERSION: Final = 1
_ALWAYS_OTHERS: Final = ("date", "load")


def untold(found: Sequence[Comparison]) -> list[Case]:
    """The cases of which there are too few batches to find a difference."""
    return [one.case for one in found if one.verdict.startswith(TOO_FEW)]


def gone(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Case]:
    """The cases that only the first result has measured."""
    before, after = (
        [
            Case(one["operation"], one["level"], one["mode"])
            for one in document["measurements"]
            if one["batches"]
        ]
        for document in (first, second)
    )
    return [case for case in before if case not in set(after)]


def limits(untold: Sequence[Case], gone: Sequence[Case]) -> str:
    """One line about both; empty where the comparison could tell of all."""
    words = []
    if untold:
        words.append(f"of {len(untold)} cases there are too few batches to tell")
    if gone:
        some = ", ".join(map(str, gone[:3])) + (", ..." if len(gone) > 3 else "")
        words.append(f"{len(gone)} are measured in the first result only ({some})")
    return "; ".join(words)


def cut_short(document: Mapping[str, Any]) -> bool:
    """Whether the result is one of an interrupted run."""
    return document.get("complete") is False


def changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the two environments differ in, by name; None where one does not say.

    The date and the load, which are never the same, are left out.
    """
    before, after = (_flat(document["environment"]) for document in (first, second))
    return {
        name: (before.get(name), after.get(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    }


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The facts, those within facts by both names."""
    flat: dict[str, Any] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            flat.update({f"{name} {inner}": one for inner, one in value.items()})
        elif name not in _ALWAYS_OTHERS:
            flat[name] = value
    return flat


def document(
    found: Sequence[Comparison],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    reference_change: float,
) -> dict[str, Any]:
    """The comparison as JSON: both environments, the rows, and what it cannot tell."""
    return {
        "schema": NAME,
        "version": VERSION,
        "environments": [first["environment"], second["environment"]],
        "interrupted": [cut_short(first), cut_short(second)],
        "reference_change": reference_change,
        "too_few_batches": [str(case) for case in untold(found)],
        "first_only": [str(case) for case in gone(first, second)],
        "comparisons": [asdict(one) for one in found],
    }
