"""`kvmpy explain`: what kvmpy takes a file for, and how it would start it; no KVM is needed."""

from collections.abc import Iterator
from typing import Final

import click

from kvmpy.boot.segments import Image
from kvmpy.cli.run import guest_options, image_of
from kvmpy.paper import Paper, on_paper
from kvmpy.views.memorymap import memory_map
from kvmpy.views.pages import size_words
from kvmpy.views.show import Grid, Shown
from kvmpy.views.state import StateView

__all__ = ["explain"]

INSTRUCTIONS: Final = 8
_KINDS: Final = {"elf": "an ELF file", "flat": "a flat binary", "assembly": "an assembly source",
                 "boot sector": "a boot sector"}  # fmt: skip


@click.command()
@guest_options
@click.option("--count", type=click.IntRange(min=0), default=INSTRUCTIONS, show_default=True,
              metavar="N", help="Show the first N instructions.")  # fmt: skip
def explain(
    *,
    guest: str,
    mode: str,
    ring: str | None,
    memory: int | None,
    load: int | None,
    entry: int | None,
    strict: bool,
    count: int,
) -> None:
    """Say what kvmpy takes GUEST for and why, where it would put it, and how it would start it.

    Nothing is run, and no KVM is needed. A guest that `kvmpy run` refuses is refused alike.
    """
    image = image_of(guest, mode, ring, load, entry)
    with on_paper(image, memory) as paper:
        text = "\n\n".join(map(str, _parts(image, paper, count)))
    click.echo(text)


def _parts(image: Image, paper: Paper, count: int) -> Iterator[Shown]:
    view = paper.view
    yield _ImageView(image, paper.layout.ring)
    yield memory_map(paper.ram, paper.layout)
    yield _Entry(view)
    yield view.segments()
    if count:
        yield view.disassemble(count=count)


class _ImageView(Shown):
    """What a file is taken for."""

    __slots__ = ("image", "ring")

    def __init__(self, image: Image, ring: int) -> None:
        self.image, self.ring = image, ring

    def grids(self) -> tuple[Grid, ...]:
        """Its segments, and the words for the rest."""
        image = self.image
        notes = [
            f"taken for {_KINDS.get(image.kind, image.kind)} ({image.why})",
            f"starts in {image.mode} mode, ring {self.ring}, at {image.entry:#x}",
        ]
        rows = [
            (f"{one.address:#x}", f"{one.end - 1:#x}", size_words(one.memory_size),
             f"{len(one.data)} bytes of the file" + (", zeros after them"
                                                     if one.memory_size > len(one.data) else ""))
            for one in image.segments
        ]  # fmt: skip
        about = image.header.title if image.header else ""
        title = f"{image.name}: {about}" if about else image.name
        return (Grid(title, ("from", "to", "size", "contents"), rows, tuple(notes)),)


class _Entry(Shown):
    """The registers that are not zero at the start, in short."""

    __slots__ = ("view",)

    def __init__(self, view: StateView) -> None:
        self.view = view

    def grids(self) -> tuple[Grid, ...]:
        """The mode, the general registers and the control registers."""
        registers = self.view.registers().registers.as_dict()
        mode, *control = self.view.control().grids()
        general = " ".join(f"{name}={value:#x}" for name, value in registers.items() if value)
        notes = (f"{general}, the others 0", *(grid.title for grid in control), mode.notes[1])
        return (Grid(f"entry state: {mode.title}", notes=notes),)
