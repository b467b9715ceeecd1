"""Running a student's guest in each of an exercise's cases, and what the checks say of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

from kvmpy.boot.image import load_image
from kvmpy.boot.segments import Image
from kvmpy.errors import AddressError, ConfigError, UnsupportedError
from kvmpy.labs.model import Case, Check, Exercise, Finding, Moment, Run
from kvmpy.machine import Machine
from kvmpy.probe import probe

__all__ = ["Answer", "Grade", "grade", "guest_image"]

_MOST_MOMENTS: Final = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """What one check found in the last case, and if it failed, what was special in that."""

    finding: Finding
    about: str = ""


@dataclass(frozen=True, slots=True)
class Grade:
    """What came of an exercise: an answer for each check, in order."""

    exercise: Exercise
    answers: tuple[Answer, ...]
    runs: int

    @property
    def passed(self) -> bool:
        """Whether all is as it should be."""
        return all(answer.finding.passed for answer in self.answers)


def guest_image(exercise: Exercise, guest: str | Path) -> Image:
    """The student's guest; a flat binary starts in the mode that the exercise is about.

    Raises ImageError, ConfigError and AssemblyError as `load_image` does.
    """
    image = load_image(guest)
    if image.kind == "flat":
        image = load_image(guest, mode=exercise.mode, ring=exercise.ring)
    return image


def grade(exercise: Exercise, guest: str | Path, random: Random | None = None) -> Grade:
    """Run the guest in each case, until one fails, and have the checks look at each run.

    Raises UnsupportedError where this host's KVM lacks what the exercise needs, and what
    `guest_image` raises. What the guest does wrong is an answer, not an exception.
    """
    for name in exercise.needs:
        found = probe(name)
        if found.answer != "yes":
            raise UnsupportedError(f"exercise {exercise.number} cannot run here: {found.detail}")
    image = guest_image(exercise, guest)
    cases = exercise.cases(random or SystemRandom())
    answers: list[Answer] = []
    for number, case in enumerate(cases, 1):
        findings = list(_findings(exercise.checks, image, case))
        answers = [Answer(finding, "" if finding.passed else case.about) for finding in findings]
        if not all(finding.passed for finding in findings):
            return Grade(exercise, tuple(answers), number)
    return Grade(exercise, tuple(answers), len(cases))


def _findings(checks: tuple[Check, ...], image: Image, case: Case) -> Iterator[Finding]:
    moments: list[Moment] = []
    pieces = [case.input] if isinstance(case.input, bytes) else list(case.input)

    def output(data: bytes) -> None:
        if len(moments) < _MOST_MOMENTS:
            moments.append(Moment(data, machine.cpus[0].get_sregs()))

    def read() -> bytes:
        return pieces.pop(0) if pieces else b""

    machine = Machine.from_image(image, output=output, input=read)
    with machine:
        kept = None if case.prepare is None else _prepare(case.prepare, machine)
        machine.trace.start(when_full="stop")
        result = machine.run(timeout=case.timeout, max_exits=case.max_exits)
        machine.trace.stop()
        run = Run(case, image, machine, result, list(machine.trace), moments, kept)
        for check in checks:
            try:
                yield check(run)
            except AddressError as error:  # its RAM may be smaller than the check expects
                yield Finding(False, str(error))


def _prepare(prepare: Callable[[Machine], object], machine: Machine) -> object:
    try:
        return prepare(machine)
    except AddressError as error:
        raise ConfigError(
            f"this exercise needs more memory than the guest asks for: leave out "
            f'"# memory:" ({error})'
        ) from None
