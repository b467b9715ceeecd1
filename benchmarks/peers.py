"""kvmpy beside what one would use instead, at the same work: `python -m benchmarks.peers`.

Bare C, a pure-Python loop of fcntl.ioctl, Unicorn from Python, and QEMU with TCG and with KVM
take turns, round by round. One that is not installed, or does not do the work here, has a row
that says so.
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import host
from benchmarks.command import Parser, rounds_of
from benchmarks.peer import prepared, tried
from benchmarks.peer_report import Figure, Result, as_json, markdown, print_table
from benchmarks.peer_works import FULL, QUICK, Effort, Work, works
from benchmarks.stats import Spread, interleave
from kvmpy.errors import KvmpyError

__all__ = ["main", "measure"]

LEAST_ROUNDS = 5


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, and no good figures")
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=rounds_of,
        help=f"default: {FULL.rounds}, and {FULL.process_rounds} of whole processes",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if options.json is not None:
        try:
            options.json.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {options.json}: {error.strerror}")
    return options


def measure(work: Work) -> Result:
    """Try every peer once, then let those that did the work take turns at it."""
    subjects = [tried(subject) for subject in work.subjects]
    samples = interleave(
        work.rounds,
        work.turns,
        {
            subject.name: partial(prepared, subject, work.per_second)
            for subject in subjects
            if not subject.missing
        },
    )
    base = samples.get(subjects[0].name)
    figures = []
    for subject in subjects:
        figure = Figure(subject.name, subject.runs_on, subject.note, subject.missing)
        values = samples.get(subject.name)
        if values:
            ratios = [one / other for one, other in zip(values, base or (), strict=bool(base))]
            figure = replace(
                figure,
                value=Spread.of(values),
                ratio=Spread.of(ratios) if ratios else None,
                samples=tuple(values),
            )
        figures.append(figure)
    return Result(work.key, work.name, work.unit, tuple(figures))


def _measure_all(effort: Effort, results: list[Result]) -> None:
    """Append a result for each work, as it is done."""
    shown = sys.stderr.isatty()
    with tempfile.TemporaryDirectory() as directory:
        for work in works(effort, Path(directory)):
            if shown:
                print(f"\r\x1b[Kmeasuring {work.key} ...", end="", file=sys.stderr, flush=True)
            try:
                results.append(measure(work))
            finally:
                if shown:
                    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _caution(effort: Effort, quick: bool, interrupted: bool) -> str:
    if interrupted:
        return "Interrupted: the rest of the work is not in the table."
    if quick or effort.process_rounds < LEAST_ROUNDS:
        return "A quick run: these are no figures to go by."
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and, if asked to, write; 0 whatever the figures are, 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse(given)
    effort = QUICK if options.quick else FULL
    if options.rounds:
        effort = replace(effort, rounds=options.rounds, process_rounds=options.rounds)
    described, command = host.describe(), shlex.join(["python", "-m", "benchmarks.peers", *given])
    results: list[Result] = []
    interrupted = False
    try:
        _measure_all(effort, results)
    except KeyboardInterrupt:
        interrupted = True
    except (KvmpyError, OSError) as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 1
    caution = _caution(effort, options.quick, interrupted)
    if options.markdown:
        print(markdown(described, results, command, caution), end="")
    else:
        print_table(described, results, command, caution)
    if options.json is not None:
        data = as_json(described, results, command)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
