"""`kvmpy step`: a guest one instruction at a time, with what each instruction did."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from kvmpy.boot.image import Image
from kvmpy.cli import HOST_FAILED, INTERRUPTED, complain
from kvmpy.cli.options import Number
from kvmpy.cli.run import CRASHED, INPUT, TIMED_OUT, guest_options, image_of, input_of
from kvmpy.cli.symbols import suggestion
from kvmpy.devices import exit_status
from kvmpy.errors import ConfigError
from kvmpy.machine import Machine
from kvmpy.result import CRASHES, OUTCOMES
from kvmpy.sizes import parse_address
from kvmpy.stepping.step import Step
from kvmpy.views.show import clean

__all__ = ["step"]

COUNT: Final = 100
TIMEOUT: Final = 60.0
_STATUS: Final = {"timeout": TIMED_OUT, "stopped": INTERRUPTED, "fail-entry": HOST_FAILED}


@click.command()
@guest_options
@INPUT
@click.option("--count", type=click.IntRange(min=1), default=COUNT, show_default=True, metavar="N",
              help="Stop after N steps.")  # fmt: skip
@click.option("--until", metavar="PLACE", help="... or before the code at an address or symbol.")
@click.option("--from", "start", metavar="PLACE",
              help="Show nothing before the code at an address or symbol.")  # fmt: skip
@click.option("--diff", is_flag=True, help="A line for each change, with the value before it.")
@click.option("--timeout", type=Number(min=0, max=1e6), default=TIMEOUT,
              show_default=True, metavar="SECONDS", help="... or after that long.")  # fmt: skip
def step(
    *,
    guest: str,
    mode: str,
    ring: str | None,
    memory: int | None,
    load: int | None,
    entry: int | None,
    strict: bool,
    input_path: Path | None,
    count: int,
    until: str | None,
    start: str | None,
    diff: bool,
    timeout: float,
) -> int:
    """Step GUEST: each instruction, the registers, flags and memory that it changed, its exits.

    What the guest prints is shown with the instruction that prints it. Exit status: as that of
    `kvmpy run`, and 0 where the guest could go on.
    """
    image = image_of(guest, mode, ring, load, entry)
    stop, first = _place(until, image), _place(start, image)
    machine = Machine.from_image(image, memory, input=input_of(input_path), strict=strict)
    with machine:
        steps = machine.trace_instructions(until=stop, timeout=timeout)
        came, last, all_of_it = _show(steps, first, count, diff)
        if not came:
            when = f"in {last.number} steps" if last else "before it stopped"
            complain(f"--from {start}: the guest did not come there {when}")
        return _ending(last, all_of_it)


def _place(text: str | None, image: Image) -> int | None:
    """The address that a word means: a number, or a symbol with or without an offset."""
    if text is None:
        return None
    name, plus, offset = text.partition("+")
    try:
        if name in image.symbols:
            return image.symbols[name] + (parse_address(offset) if plus else 0)
        return parse_address(text)
    except ConfigError:
        raise ConfigError(
            f"{text!r} is no address, and no symbol of {image.name}; {suggestion(name, image)}"
        ) from None


def _show(
    steps: Iterator[Step], start: int | None, count: int, diff: bool
) -> tuple[bool, Step | None, bool]:
    """Print steps from `start` on, at most `count`, and the guest's last one.

    Whether it came to `start`, the last step, and whether that was all.
    """
    shown, mode, came = 0, "", start is None
    last: Step | None = None
    for last in steps:
        came = came or last.linear == start
        if not (came or last.outcome):
            continue
        now = f"--- {last.mode}, ring {last.ring}"
        if now != mode:
            click.echo(now)
            mode = now
        for line in last.lines(diff):
            click.echo(clean(line))
        shown += 1
        if shown == count:
            return came, last, False
    return came, last, True


def _ending(last: Step | None, all_of_it: bool) -> int:
    outcome = last.outcome if last else ""
    if last is None or not outcome:
        if not all_of_it:
            click.echo("--- the guest could go on: --count N shows more")
        return 0
    if outcome in ("timeout", *CRASHES):
        complain(f"{outcome}: {OUTCOMES[outcome]}" + (f" ({last.detail})" if last.detail else ""))
    if outcome == "debug-exit":
        return exit_status(last.value or 0)
    return _STATUS.get(outcome, CRASHED if outcome in CRASHES else 0)
