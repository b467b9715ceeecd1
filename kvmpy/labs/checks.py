"""What can be asked of a run: each function here makes a check.

A number or some bytes to compare with may also be given as a function of the run, for what
differs from case to case: `console(lambda run: run.case.expect["line"])`.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from kvmpy.errors import AddressError
from kvmpy.labs.model import Check, Finding, Run
from kvmpy.result import CRASHES, OUTCOMES
from kvmpy.views.cpumode import linear_rip

__all__ = [
    "console",
    "ends",
    "exits",
    "memory",
    "quoted",
    "register",
    "starts_in",
    "value",
    "wrote",
]

_T = TypeVar("_T")
_LONGEST: Final = 60
_NAMES: Final = {
    "port-out": "port writes",
    "port-in": "port reads",
    "mmio-write": "MMIO writes",
    "mmio-read": "MMIO reads",
    "halt": "HLT exits",
}


def quoted(data: bytes) -> str:
    """Bytes as a student would write them, on one line and not too many of them."""
    shown = repr(data[:_LONGEST])[1:]
    return shown if len(data) <= _LONGEST else f"{shown} and {len(data) - _LONGEST} bytes more"


def _now(wanted: _T | Callable[[Run], _T], run: Run) -> _T:
    return wanted(run) if callable(wanted) else wanted


def starts_in(mode: str, ring: int | None = None, look: str = "guests/README.md") -> Check:
    """The guest starts in that mode, and ring."""

    def check(run: Run) -> Finding:
        layout = run.machine.layout
        right = layout.mode == mode and ring in (None, layout.ring)
        wanted = f"{mode} mode" + ("" if ring is None else f", ring {ring}")
        if right:
            return Finding(True, f"it starts in {wanted}")
        header = f'"# mode: {mode}"' + ("" if ring is None else f' and "# ring: {ring}"')
        is_ = f"it starts in {layout.mode} mode, ring {layout.ring}, not in {wanted}"
        return Finding(False, f"{is_}: {header} in a source's header say so", look)

    return check


def ends(outcome: str, look: str = "") -> Check:
    """The run ends that way: a word of `kvmpy.result.OUTCOMES`."""

    def check(run: Run) -> Finding:
        result = run.result
        if result.outcome == outcome:
            return Finding(True, f"it ends as it should: {OUTCOMES[outcome]}")
        return Finding(False, f"{_how_it_ended(run)}; it should end so: {OUTCOMES[outcome]}", look)

    return check


def _how_it_ended(run: Run) -> str:
    result, case = run.result, run.case
    if result.outcome == "timeout":
        return f"it did not end: after {case.timeout:g} s it was stopped, {_where(run)}"
    if result.outcome == "max-exits":
        return f"it did not end: after {case.max_exits} exits it was stopped, {_where(run)}"
    said = OUTCOMES.get(result.outcome, result.outcome)
    detail = f" ({result.detail})" if result.detail else ""
    where = f", {_where(run)}{_why(run)}" if result.outcome in CRASHES else ""
    return f"it ended so: {said}{detail}{where}"


def _why(run: Run) -> str:
    """The cause in a few words, where the machine's state tells it."""
    if run.result.outcome not in ("shutdown", "fail-entry", "exception"):
        return ""  # the outcome and its detail say it
    found = run.machine.autopsy(run.result)
    return f": {found.summary}" if found.faults and found.certain else ""


def _where(run: Run) -> str:
    """Where the guest was, by the name that its source has for the place."""
    from kvmpy.views.symbols import Symbols

    registers, special = run.result.registers, run.machine.cpus[0].get_sregs()
    name = Symbols(run.machine.symbols).at(linear_rip(special, registers.rip, registers.rflags))
    return f"at rip {registers.rip:#x}" + (f" ({name})" if name else "")


def console(wanted: bytes | Callable[[Run], bytes], look: str = "") -> Check:
    """The guest wrote these bytes to its console, and no others."""

    def check(run: Run) -> Finding:
        expected, found = _now(wanted, run), run.console
        if found == expected:
            return Finding(True, f"it prints {quoted(expected)}")
        if not found:
            return Finding(False, f"it prints nothing; {quoted(expected)} was expected", look)
        both = zip(expected, found, strict=False)
        at = next((at for at, (one, other) in enumerate(both) if one != other), None)
        at = min(len(expected), len(found)) if at is None else at
        text = f"it prints {quoted(found)}, not {quoted(expected)}: they part at byte {at}"
        return Finding(False, text, look)

    return check


def exits(
    kind: str, least: int | Callable[[Run], int], most: int | None = None, look: str = ""
) -> Check:
    """From `least` to `most` (if None: exactly `least`) exits of that kind; "" for all kinds."""

    def check(run: Run) -> Finding:
        low = _now(least, run)
        high = low if most is None else most
        counts = run.result.exits
        found = counts.get(kind, 0) if kind else sum(counts.values())
        name = _NAMES.get(kind, f"exits of the kind {kind}" if kind else "exits")
        wanted = f"{low}" if low == high else f"{low} to {high}"
        if low <= found <= high:
            return Finding(True, f"{name}: {found}")
        return Finding(False, f"{name}: {found}, but {wanted} were expected", look)

    return check


def register(name: str, wanted: int | Callable[[Run], int], look: str = "") -> Check:
    """A general register has that value at the end."""

    def check(run: Run) -> Finding:
        expected, found = _now(wanted, run), run.result.registers.as_dict()[name]
        if found == expected:
            return Finding(True, f"{name} is {expected:#x} at the end")
        return Finding(False, f"{name} is {found:#x} at the end, not {expected:#x}", look)

    return check


def value(wanted: int | Callable[[Run], int], look: str = "") -> Check:
    """The run ends by a debug exit (port 0xf4) of that value."""

    def check(run: Run) -> Finding:
        expected, found = _now(wanted, run), run.result.value
        if run.result.outcome != "debug-exit":
            text = f"{_how_it_ended(run)}; it should end by writing {expected:#x} to port 0xf4"
            return Finding(False, text, look)
        if found == expected:
            return Finding(True, f"it ends by writing {expected:#x} to port 0xf4")
        return Finding(
            False, f"it ends by writing {found:#x} to port 0xf4, not {expected:#x}", look
        )

    return check


def memory(address: int, wanted: bytes | Callable[[Run], bytes], look: str = "") -> Check:
    """Guest-physical memory holds those bytes at the end."""

    def check(run: Run) -> Finding:
        expected = _now(wanted, run)
        try:
            found = run.machine.memory.read(address, len(expected))
        except AddressError as error:
            return Finding(False, f"memory at {address:#x} cannot be looked at: {error}", look)
        if found == expected:
            return Finding(True, f"memory at {address:#x} is {expected.hex(' ')}")
        text = f"memory at {address:#x} is {found.hex(' ')}, not {expected.hex(' ')}"
        return Finding(False, text, look)

    return check


def wrote(kind: str, address: int, wanted: list[int] | Callable[[Run], list[int]],
          look: str = "") -> Check:  # fmt: skip
    """Its writes there ("port-out" or "mmio-write") were these values, in this order."""

    def check(run: Run) -> Finding:
        expected = _now(wanted, run)
        found = [one.value for one in run.records if one.kind == kind and one.address == address]
        where = f"{'port' if kind == 'port-out' else 'address'} {address:#x}"
        if found == expected:
            return Finding(True, f"it writes {_numbers(expected)} to {where}")
        text = f"it writes {_numbers(found)} to {where}, not {_numbers(expected)}"
        return Finding(False, text, look)

    return check


def _numbers(values: list[int] | list[int | None]) -> str:
    shown = ", ".join("?" if one is None else f"{one:#x}" for one in values[:8])
    return (shown or "nothing") + (", ..." if len(values) > 8 else "")
