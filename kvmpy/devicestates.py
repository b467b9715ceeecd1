"""The states of a machine's devices: which have one, and loading those of a snapshot."""

import struct
from collections.abc import Container, Iterator

from kvmpy.bus import Stateful, has_state
from kvmpy.dispatch import Dispatch
from kvmpy.errors import ConfigError
from kvmpy.snapshot import Snapshot

__all__ = ["load_devices", "stateful"]


def stateful(dispatch: Dispatch) -> Iterator[tuple[str, Stateful]]:
    """The devices that have a state, each once, by bus and address."""
    seen = set()
    for bus in (dispatch.ports, dispatch.mmio):
        for claim in bus:
            if has_state(claim.device) and id(claim.device) not in seen:
                seen.add(id(claim.device))
                yield f"{bus.kind} {claim.base:#x}", claim.device


def load_devices(snapshot: Snapshot, dispatch: Dispatch, *, partly: bool = False) -> None:
    """Give the devices the states that a snapshot has for them.

    Raises ConfigError for a state that a device refuses and, unless `partly`, where the snapshot's
    machine had a device and there is none.
    """
    found = dict(stateful(dispatch))
    if not partly:
        _check_attached(snapshot, dispatch, found)
    for name, state in snapshot.devices.items():
        if name not in found:
            continue
        try:
            found[name].load_state(state)
        except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
            raise ConfigError(
                f"the device at {name} cannot take the state that the snapshot has for it: "
                f"{type(error).__name__}: {error}"
            ) from error


def _check_attached(snapshot: Snapshot, dispatch: Dispatch, found: Container[str]) -> None:
    """Raise ConfigError where the snapshot's machine had devices, and there is none now."""
    buses = {bus.kind: bus for bus in (dispatch.ports, dispatch.mmio)}
    missing = [
        str(one)
        for one in snapshot.attached
        if not all(buses[one.bus].find(at) for at in (one.base, one.base + one.size - 1))
    ]
    if missing:
        raise ConfigError(
            f"the snapshot's machine had a device at {', '.join(missing)}, and this one has none "
            "there: attach it first (from_snapshot, fork, runs, map and Spares take `attach`)"
        )
    missing = [name for name in snapshot.devices if name not in found]
    if missing:
        raise ConfigError(
            f"the snapshot has the state of a device at {', '.join(missing)}, and this machine "
            "has none there: attach it first (from_snapshot takes `attach`)"
        )
