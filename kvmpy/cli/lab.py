"""`kvmpy lab`: the exercises of the pages in docs/, and a grader for them."""

from typing import Final

import click

from kvmpy.labs.grade import Grade, grade
from kvmpy.labs.table import EXERCISES, find

__all__ = ["lab"]

NOT_PASSED: Final = 1


@click.group(invoke_without_command=True)
@click.pass_context
def lab(ctx: click.Context) -> None:
    """List the exercises of the pages in docs/; show one; check your guest against one.

    An exercise is called by page and number, "1.2"; "1" is the first one of page 1.
    """
    if ctx.invoked_subcommand is None:
        for one in EXERCISES.values():
            click.echo(f"{one.number:<5} {one.title:<44} docs/{one.page}")


@lab.command()
@click.argument("number")
def show(number: str) -> None:
    """Show what exercise NUMBER asks for."""
    one = find(number)
    click.echo(f"{one.number} {one.title}\n\n{one.text}\n\nPage: docs/{one.page}")
    click.echo(f"Check: kvmpy lab check {one.number} FILE.S")


@lab.command()
@click.argument("number")
@click.argument("guest")
def check(number: str, guest: str) -> int:
    """Run GUEST (a .S source, a static ELF64 or a flat binary) and grade it for exercise NUMBER.

    Some exercises run it several times, with inputs that are others each time. Exit status: 0
    passed, 1 not passed, 2 bad input, 125 the host failed or lacks what the exercise needs.
    """
    found = grade(find(number), guest)
    click.echo("\n".join(_lines(found)))
    return 0 if found.passed else NOT_PASSED


def _lines(found: Grade) -> list[str]:
    """What was right, what was not and where to look, and the sum of it."""
    exercise = found.exercise
    lines = [f"{exercise.number} {exercise.title}"]
    looks = []
    for answer in found.answers:
        finding = answer.finding
        about = f"{answer.about}: " if answer.about else ""
        lines.append(f"  {'ok' if finding.passed else 'no'}  {about}{finding.text}")
        if not finding.passed and (look := finding.look or exercise.look) not in looks:
            looks.append(look)
    lines += [f"  look at: {look}" for look in looks]
    right = sum(answer.finding.passed for answer in found.answers)
    runs = f"{found.runs} run" + "s" * (found.runs != 1)
    verdict = "passed" if found.passed else "not passed yet"
    lines.append(f"{verdict}: {right} of {len(found.answers)} checks, {runs}")
    return lines
