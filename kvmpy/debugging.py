"""The part of a machine that gdb debugs, and that tells why a guest died."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvmpy.boot.segments import Image
from kvmpy.errors import ConfigError
from kvmpy.result import Result
from kvmpy.running import Running
from kvmpy.snapshot import Snapshot

if TYPE_CHECKING:
    from kvmpy.autopsy import Autopsy

__all__ = ["Debugging"]


class Debugging(Running):
    """Serving gdb (see docs/gdb.md), and the autopsy (docs/autopsy.md)."""

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

    def autopsy(
        self,
        result: Result | None = None,
        *,
        start: Snapshot | Image | None = None,
        attach: Callable[[Any], object] | None = None,
        last: Sequence[str] | None = None,
        cpu: int = 0,
    ) -> "Autopsy":
        """Why the guest died: a triple fault, a refused entry, an emulator's gap, an exception.

        `result` is that of the run that ended so; without it, the last exit counts. The state is
        looked at and stays as it is. Where it does not settle the matter, copies of the guest run
        to the same end from `start`, or from the machine's last snapshot: with deadlines, without
        input, and with the devices that `attach(copy)` attaches. `last` are lines on what came
        before, by default those of the recorder.

        What fails in it is told in the answer (`Autopsy.failure`) and raises nothing.
        """
        from kvmpy.autopsies import autopsy_of

        machine: Any = self  # a Machine, of which this is a part
        return autopsy_of(machine, result, start, attach, last=last, cpu=cpu)
