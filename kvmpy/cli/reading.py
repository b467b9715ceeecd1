"""What `kvmpy stat` reads of a machine at one moment, and the difference of two readings."""

import time
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from kvmpy.errors import UnsupportedError
from kvmpy.machine import Machine
from kvmpy.stats import Stats
from kvmpy.trace import Tally, Totals

__all__ = ["KvmStats", "Reader", "Reading"]

Values: TypeAlias = dict[str, int | tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Counts up to a moment, or between two. `kvm` is by owner: "VM", "vCPU 0" and so on."""

    seconds: float
    exits: dict[str, int]
    totals: Totals
    tallies: dict[tuple[str, int], Tally]
    kvm: dict[str, Values]

    def since(self, before: Self, levels: frozenset[str]) -> "Reading":
        """The difference; of KVM's statistics that are levels, the values of now."""
        return Reading(
            self.seconds - before.seconds,
            {
                kind: count - before.exits.get(kind, 0)
                for kind, count in self.exits.items()
                if count > before.exits.get(kind, 0)
            },
            Totals(*(_grown(*pair) for pair in zip(self.totals, before.totals, strict=True))),
            {
                key: _less(now, before.tallies.get(key))
                for key, now in self.tallies.items()
                if now.exits > (before.tallies[key].exits if key in before.tallies else 0)
            },
            {
                owner: {
                    name: value if name in levels else _minus(value, before.kvm[owner][name])
                    for name, value in values.items()
                }
                for owner, values in self.kvm.items()
            },
        )

    def as_json(self, names: dict[tuple[str, int], str]) -> dict[str, Any]:
        """The same as plain data; `names` are those of the addresses."""
        return {
            "seconds": self.seconds,
            "exits": self.exits,
            "in_kvm_run_ns": self.totals.inside_ns,
            "serving_ns": self.totals.outside_ns,
            "interrupted": self.totals.interrupted,
            "addresses": [
                {**one._asdict(), "name": names.get(key, "")}
                for key, one in sorted(self.tallies.items(), key=lambda one: -one[1].exits)
            ],
            "kvm": self.kvm,
        }


def _grown(now: int, before: int) -> int:
    """The difference, never negative: times are ticks of the TSC by the rate of the moment.

    That rate is known better each time, so that times which did not grow may seem to shrink.
    """
    return max(0, now - before)


def _less(now: Tally, before: Tally | None) -> Tally:
    if before is None:
        return now
    numbers = (_grown(*pair) for pair in zip(now[2:], before[2:], strict=True))
    return Tally(now.kind, now.address, *numbers)


def _minus(now: int | tuple[int, ...], before: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if isinstance(now, int):
        return now - before if isinstance(before, int) else now
    assert isinstance(before, tuple)
    return tuple(new - old for new, old in zip(now, before, strict=True))


class KvmStats:
    """The statistics descriptors of a machine's VM and vCPUs; none where KVM has no such thing."""

    def __init__(self, machine: Machine) -> None:
        self.missing = ""
        self._all: dict[str, Stats] = {}
        try:
            self._all["VM"] = machine.vm.stats()
            for cpu in machine.cpus:
                self._all[f"vCPU {cpu.index}"] = cpu.stats()
        except UnsupportedError as error:
            self.close()
            self.missing = str(error)
        except BaseException:
            self.close()
            raise

    @property
    def levels(self) -> frozenset[str]:
        """The names of those that are no counts."""
        return frozenset().union(*(one.levels for one in self._all.values()))

    def read(self) -> dict[str, Values]:
        """All of them."""
        return {owner: one.read() for owner, one in self._all.items()}

    def close(self) -> None:
        """Close the descriptors."""
        for one in self._all.values():
            one.close()
        self._all = {}


class Reader:
    """Reads a machine, also while another thread runs it."""

    def __init__(self, machine: Machine, stats: KvmStats) -> None:
        self._machine, self._stats = machine, stats

    def read(self) -> Reading:
        """The counts of now."""
        exits: dict[str, int] = {}
        for cpu in self._machine.cpus:
            for kind, count in cpu.exit_counts().items():
                exits[kind] = exits.get(kind, 0) + count
        recorder = self._machine.trace
        return Reading(
            time.perf_counter(),
            exits,
            recorder.totals(),
            {(one.kind, one.address): one for one in recorder.tallies()},
            self._stats.read(),
        )
