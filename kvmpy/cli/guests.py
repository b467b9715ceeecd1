"""`kvmpy guests`: the guests that come with kvmpy, one line each."""

import click

from kvmpy.boot.guests import list_guests

__all__ = ["guests"]


@click.command()
def guests() -> None:
    """List the guests that come with kvmpy; `kvmpy run NAME` runs one."""
    known = list_guests()
    width = max((len(guest.name) for guest in known), default=0)
    for guest in known:
        click.echo(f"{guest.name:<{width}}  {guest.title}")
