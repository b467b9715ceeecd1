"""A progress bar on standard error."""

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from kvmpy.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["with_bar"]

_T = TypeVar("_T")


def with_bar(
    outcomes: Generator[Outcome[_T], None, None],
    total: int | None,
    console: "Console | None" = None,
) -> Generator[Outcome[_T], None, None]:
    """The same outcomes, and a bar while they come, if the console is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = console or Console(stderr=True)
    with closing(outcomes):
        if not console.is_terminal:
            yield from outcomes
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[others]}"),
        )
        crashes = others = 0
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total, rate="", others="")
            for one in outcomes:
                crashes += one.crashed
                others += one.outcome in ("error", "worker-died", "timeout")
                speed = progress.tasks[0].speed
                progress.update(
                    task,
                    advance=1,
                    rate=f"{speed:,.0f}/s" if speed else "",
                    others=f"{crashes} crashes, {others} errors and timeouts",
                )
                yield one
