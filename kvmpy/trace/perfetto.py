"""Records as Chrome's trace JSON, which ui.perfetto.dev and chrome://tracing open.

Source: "Trace Event Format" (Chromium's tracing documentation): complete events ("X") with a
beginning and a duration in microseconds, one thread for each vCPU.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from kvmpy.trace.record import INTERRUPTED, Record
from kvmpy.trace.split import followed, place_of

__all__ = ["events", "lines"]

_PROCESS = 1


def events(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The events: for each record a slice in KVM_RUN, and one for what served the exit."""
    seen: set[int] = set()
    yield _meta("process_name", 0, "kvmpy guest")
    for record, outside in followed(records):
        if record.cpu not in seen:
            seen.add(record.cpu)
            yield _meta("thread_name", record.cpu, f"vCPU {record.cpu}")
        yield _slice(record, "KVM_RUN", "KVM_RUN", record.entered, record.inside)
        name = record.text or record.kind
        if outside is None:
            yield {
                **_event(record, name, "exit", record.left),
                "ph": "i",
                "s": "t",
                "args": _facts(record),
            }
        elif record.kind != INTERRUPTED:
            yield _slice(record, name, place_of(record), record.left, outside)


def _meta(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _event(record: Record, name: str, category: str, at: int) -> dict[str, Any]:
    return {"name": name, "cat": category, "pid": _PROCESS, "tid": record.cpu, "ts": at / 1000}


def _slice(record: Record, name: str, category: str, at: int, length: int) -> dict[str, Any]:
    event = _event(record, name, category, at)
    return {**event, "ph": "X", "dur": length / 1000, "args": _facts(record)}


def _facts(record: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "exit": record.kind,
        "served by": record.level,
        "number": record.number,
    }
    for name in ("address", "value", "rip"):
        number = getattr(record, name)
        if number is not None:
            facts[name] = f"{number:#x}"
    if record.elements > 1:
        facts["elements"] = record.elements
    return facts


def lines(records: Iterable[Record], dropped: int = 0) -> Iterator[str]:
    """The whole file, an event a line."""
    yield '{"displayTimeUnit": "ns", "traceEvents": ['
    before = ""
    for event in events(records):
        if before:
            yield before + ","
        before = json.dumps(event)
    yield before
    yield f'], "otherData": {{"dropped": {dropped}}}}}'
