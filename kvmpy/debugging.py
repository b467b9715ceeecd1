"""The part of a machine that gdb debugs."""

from collections.abc import Callable

from kvmpy.errors import ConfigError
from kvmpy.result import Result
from kvmpy.running import Running

__all__ = ["Debugging"]


class Debugging(Running):
    """Serving gdb (see docs/gdb.md)."""

    def gdb(
        self, address: str | int, announce: Callable[[str], object] | None = None
    ) -> Result | None:
        """Have gdb debug the guest: wait for it, and serve it until the guest ends.

        `address` is PORT (on loopback), HOST:PORT or unix:PATH; who can connect there can do
        anything to the guest. gdb finds the guest as it is, with nothing run. `announce` gets a
        line whenever gdb is waited for. The value is what the guest came to, None if gdb killed
        it. A crash is a stop that gdb is shown. Raises HostError where the address is taken or
        refused, ConfigError for one that is none or with nothing loaded, and what a device raises.
        """
        from kvmpy.gdb import serve  # it needs `probe`, which needs Machine

        self._ready(0)
        if self._posted:
            raise ConfigError("posted_console hides exits: make the machine without it for gdb")
        return serve(self, address, announce)
