"""`kvmpy stat`: run a guest and count, as `perf stat` does for a process."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

import click

from kvmpy.cli.live import say
from kvmpy.cli.options import Number
from kvmpy.cli.reading import KvmStats, Reader, Reading
from kvmpy.cli.report import Report
from kvmpy.cli.run import (
    INPUT,
    MAX_EXITS,
    REPORT,
    TIMEOUT,
    guest_options,
    image_of,
    input_of,
    run_machine,
)
from kvmpy.cli.stdio import write_output
from kvmpy.errors import ConfigError, HostError
from kvmpy.kvm import backend
from kvmpy.machine import Machine
from kvmpy.trace.names import name_of
from kvmpy.trace.text import duration, serving

__all__ = ["stat"]

_TOP: Final = 10


@click.command()
@guest_options
@INPUT
@TIMEOUT
@MAX_EXITS
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
@click.option("--interval", type=Number(min=0.01, max=1e6), metavar="SECONDS",
              help="Also print what was counted every so often.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the statistics to FILE instead of standard error.")  # fmt: skip
@REPORT
def stat(
    *,
    guest: str,
    mode: str,
    ring: str | None,
    memory: int | None,
    load: int | None,
    entry: int | None,
    strict: bool,
    input_path: Path | None,
    timeout: float | None,
    max_exits: int | None,
    as_json: bool,
    interval: float | None,
    out: Path | None,
    report_path: Path | None,
) -> int:
    """Run GUEST and count exits, time, ports and addresses, and what KVM counts itself.

    The console is standard output, the statistics go to standard error. The exit status is that
    of `kvmpy run`.
    """
    report = Report(report_path)
    image = image_of(guest, mode, ring, load, entry)
    report.mode = image.mode
    options = {"output": write_output, "input": input_of(input_path), "strict": strict}
    with (
        _Printer(out, as_json) as printer,
        Machine.from_image(image, memory, **options) as machine,
        closing(KvmStats(machine)) as stats,
    ):
        machine.trace.start(records=0)
        reader = Reader(machine, stats)
        before = reader.read()
        with _Ticking(reader, stats.levels, interval, printer.interval):
            status = run_machine(machine, report, timeout, max_exits)
        printer.total(machine, guest, status, reader.read().since(before, stats.levels), stats)
    return status


class _Ticking:
    """Prints the differences every so often, on a thread of its own."""

    def __init__(
        self, reader: Reader, levels: frozenset[str], interval: float | None, show: Any
    ) -> None:
        self._reader, self._levels, self._interval, self._show = reader, levels, interval, show
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        start = last = self._reader.read()
        while not self._over.wait(self._interval):
            now = self._reader.read()
            try:
                self._show(now.seconds - start.seconds, now.since(last, self._levels))
            except HostError:
                return  # the total will say it
            last = now

    def __enter__(self) -> None:
        if self._interval is not None:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._interval is not None:
            self._thread.join()


class _Printer:
    """Writes statistics to a file or to standard error."""

    def __init__(self, path: Path | None, as_json: bool) -> None:
        self._path, self._json = path, as_json
        self._file: TextIO | None = None
        try:
            if path is not None:
                self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the statistics {path}: {error.strerror}") from None

    def _write(self, text: str) -> None:
        if self._file is None:
            say(text)
            return
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> HostError:
        what = f"writing the statistics {self._path} failed: {error.strerror}"
        return HostError(what, error.errno or 0)

    def interval(self, at: float, reading: Reading) -> None:
        """What came since the last time."""
        if self._json:
            self._write(json.dumps({"at": at, **reading.as_json({})}))
            return
        kinds = sorted(reading.exits.items(), key=lambda one: -one[1])
        shown = ", ".join(f"{kind} {count:,}" for kind, count in kinds) or "none"
        inside = 100 * reading.totals.inside_ns / (reading.seconds * 1e9)
        total = sum(reading.exits.values())
        self._write(f"{at:10.3f} s {total:>10,} exits ({shown}); {inside:.1f} % in KVM_RUN")

    def total(
        self, machine: Machine, name: str, status: int, reading: Reading, stats: KvmStats
    ) -> None:
        """What the whole run came to."""
        names = {key: name_of(machine.claim_at, *key) for key in reading.tallies}
        if self._json:
            facts = {"guest": name, "exit_status": status, "backend": backend()}
            # The run's, as in the tables: around it a guest that failed is looked into.
            counted = {**reading.as_json(names), "seconds": machine.seconds}
            self._write(json.dumps({**facts, **counted}))
            return
        self._write(f"\nstatistics of {name} ({backend()}), {machine.seconds:.6f} s:\n")
        for line in _tables(reading, names, machine.seconds):
            self._write(line)
        if stats.missing:
            self._write(f"\nKVM's own: {stats.missing}")

    def __enter__(self) -> "_Printer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as failure:
            if error is None:
                raise self._failed(failure) from None


def _tables(reading: Reading, names: dict[tuple[str, int], str], seconds: float) -> Iterator[str]:
    inside: dict[str, int] = {}
    for (kind, _), one in reading.tallies.items():
        inside[kind] = inside.get(kind, 0) + one.inside_ns
    for kind, count in sorted(reading.exits.items(), key=lambda one: -one[1]):
        each = duration(inside.get(kind, 0) // count)
        yield f"{count:>16,}  {kind:<20} {each:>10} each in KVM_RUN"
    if reading.totals.interrupted:
        yield f"{reading.totals.interrupted:>16,}  entries that a signal ended"
    yield ""
    whole = seconds * 1e9 or 1
    rest = max(0, int(whole) - reading.totals.inside_ns - reading.totals.outside_ns)
    for spent, what in (
        (reading.totals.inside_ns, "in KVM_RUN: the guest and KVM"),
        (reading.totals.outside_ns, "serving exits: C loop, Python, devices"),
        (rest, "before the first entry and after the last exit"),
    ):
        yield f"{duration(spent):>16}  {100 * spent / whole:5.1f} %  {what}"
    accesses = [(key, one) for key, one in reading.tallies.items() if names[key]]
    accesses.sort(key=lambda one: (-one[1].exits, one[0]))
    if accesses:
        yield ""
    for (kind, address), one in accesses[:_TOP]:
        yield (
            f"{one.exits:>16,}  {kind:<11} {address:<#12x} "
            f"{serving(one.outside_ns // one.exits):>10} each to serve  {names[kind, address]}"
        )
    if len(accesses) > _TOP:
        yield f"{'':>16}  and {len(accesses) - _TOP} more ports and addresses"
    for owner, values in reading.kvm.items():
        yield f"\nKVM of the {owner}:"
        for name, value in values.items():
            number = sum(value) if isinstance(value, tuple) else value
            if number:
                yield f"{number:>16,}  {name}" + ("  (all buckets)" if number is not value else "")
