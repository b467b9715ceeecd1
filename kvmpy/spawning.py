"""New machines made from a snapshot, and the devices that they get when they need them."""

import sys
from collections.abc import Callable
from typing import Any, Self

from kvmpy.copying import Copying
from kvmpy.devices import standard
from kvmpy.devicestates import load_devices
from kvmpy.dispatch import Dispatch
from kvmpy.errors import ConfigError
from kvmpy.snapshot import Snapshot
from kvmpy.snapshot.snapshot import check_snapshot

__all__ = ["Spawning"]


class Spawning(Copying):
    """The part of a machine that copies are made of."""

    _waiting: Snapshot | None = None  # that whose devices are still to be made

    def fork(self, attach: Callable[[Self], object] | None = None) -> Self:
        """A second machine like this one; see `from_snapshot`."""
        return self.from_snapshot(self.snapshot(), attach)

    @classmethod
    def from_snapshot(
        cls,
        snapshot: Snapshot,
        attach: Callable[[Self], object] | None = None,
        *,
        across_backends: bool = False,
        **options: Any,
    ) -> Self:
        """A new machine at a snapshot, which shares the snapshot's pages until it writes them.

        Of a snapshot with a parent, it has copies of the pages that changed since the first of the
        chain: saved and loaded, a snapshot has no parent.

        `attach(machine)` attaches the devices that are not standard ones, before their state
        is loaded: those of `on_port` and `on_mmio`, too. `options` are `output` and `input` of
        `Machine`. Raises ConfigError where the snapshot's machine had a device and nobody has
        attached one, and like `restore`.
        """
        unknown = options.keys() - {"output", "input"}
        if unknown:
            raise ConfigError(
                f"no option {', '.join(sorted(unknown))}: a copy is as the snapshot has it, and "
                "takes attach, across_backends, output and input"
            )
        check_snapshot(snapshot).check_host(across_backends)
        spawned = cls._spawned(snapshot, options)
        machine = cls._made_from(snapshot, options) if spawned is None else spawned
        try:
            if spawned is not None:
                machine._waiting = snapshot
                machine._came_from(snapshot)
            if attach is not None:
                attach(machine)
            if spawned is None:
                machine._load(snapshot)
            elif attach or snapshot.attached or not standard.has_all(snapshot.devices):
                load_devices(snapshot, machine.dispatch)
        except BaseException:
            machine.vm.__exit__(*sys.exc_info())  # frames in its traceback may hold views
            machine.kvm.close()
            raise
        return machine

    @classmethod
    def _made_from(cls, snapshot: Snapshot, options: dict[str, Any]) -> Self:
        raise NotImplementedError

    @classmethod
    def _spawned(cls, snapshot: Snapshot, options: dict[str, Any]) -> Self | None:
        """The same, at the snapshot already but for its devices; None where that cannot be."""
        raise NotImplementedError

    def _standard(self) -> Dispatch:
        raise NotImplementedError

    @property
    def dispatch(self) -> Dispatch:
        """Who answers which access: the buses with what is attached to them."""
        found = self._dispatch
        return self._attach_late() if found is None else found

    def _attach_late(self) -> Dispatch:
        """Make the devices of a machine that was made from a snapshot, as it has them."""
        with self.vm.whole:  # two vCPUs may need a device at the same time
            if self._dispatch is None:
                made = self._standard()
                if self._waiting is not None:
                    load_devices(self._waiting, made, partly=True)
                for cpu in self.cpus:
                    made.lead(cpu.loop)
                self._dispatch = made
            return self._dispatch
