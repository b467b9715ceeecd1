"""`kvmpy asm`: what a source assembles to."""

from pathlib import Path

import click

from kvmpy.asm import assemble
from kvmpy.boot.files import read_file, shown
from kvmpy.boot.header import parse_header
from kvmpy.cli.options import ADDRESS
from kvmpy.errors import AssemblyError
from kvmpy.modes import DEFAULT_LOAD, MODES

__all__ = ["asm"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--mode", type=click.Choice(MODES), help="Instead of what the header says.")
@click.option("--load", "at", type=ADDRESS, metavar="ADDR", help="The address of the first byte.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the bytes.")
def asm(file: Path, mode: str | None, at: int | None, out: Path | None) -> None:
    """Assemble FILE and print addresses, bytes and symbols beside its text."""
    source = read_file(file).decode("utf-8", "replace")
    header = parse_header(source, shown(file))
    mode = mode or header.mode
    where = at if at is not None else header.load
    try:
        program = assemble(source, mode, DEFAULT_LOAD[mode] if where is None else where)
    except AssemblyError as error:
        raise click.ClickException(f"{shown(file)}: {error}") from None
    if out is not None:
        try:
            out.write_bytes(program)
        except OSError as error:
            raise click.ClickException(f"cannot write {out}: {error.strerror}") from None
    click.echo(program.format_listing())
    if program.symbols:
        click.echo("\nsymbols:")
        for name, address in sorted(program.symbols.items(), key=lambda item: item[1]):
            click.echo(f"{address:#12x}  {name}")
