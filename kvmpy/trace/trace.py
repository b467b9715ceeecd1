"""`machine.trace`: a sequence of records, filled by the C loop."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from kvmpy.abi import lib
from kvmpy.errors import ConfigError
from kvmpy.trace.names import Find, Names
from kvmpy.trace.record import Raw, Record
from kvmpy.trace.ring import Ring, Tally
from kvmpy.vcpu import VCPU

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Totals", "Trace"]

DEFAULT_RECORDS = 65536


class Totals(NamedTuple):
    """What all of the recorder's entries come to, in nanoseconds; wrapping does not change it."""

    inside_ns: int
    """In KVM_RUN: the guest and KVM, which nobody outside can tell apart."""
    outside_ns: int
    """Between exits and the next entries of the same run: C loop, Python, devices."""
    interrupted: int
    """How many entries a signal ended."""


class Trace(Sequence[Record]):
    """The records of a machine's exits, oldest first; those of several vCPUs by their time.

    They are read when nothing runs, or from a device: while another thread runs a vCPU, a ring
    that wraps may be written under the reader. Names of devices are those of the moment of
    reading.
    """

    def __init__(self, cpus: Sequence[VCPU], find: Find) -> None:
        self._cpus, self._find = cpus, find
        self._wanted = (DEFAULT_RECORDS, "wrap")
        self._names = [Names(find) for _ in cpus]
        self.rings: list[Ring] = []
        """A ring for each vCPU; empty before the first `start`."""
        self.sink: Callable[[Record], object] | None = None
        """What gets each record while the guest runs on."""

    # On and off ---------------------------------------------------------------------------

    def start(
        self,
        records: int = DEFAULT_RECORDS,
        when_full: str = "wrap",
        sink: Callable[[Record], object] | None = None,
    ) -> None:
        """Record from the next entry on, in new and empty rings of so many records a vCPU.

        `when_full` says whether the oldest records are overwritten ("wrap") or new ones left
        out ("stop"); `dropped` counts either. With records=0 only counts are kept (`tallies`,
        `totals`). A `sink` gets every record a few times a second and whenever the ring is
        full, on the thread that runs the vCPU, so that none is lost; after that `len()` is 0.

        Raises ConfigError for a size or policy that there is not, and for a sink that is no
        function or has no records, and goes on as before.
        """
        if when_full not in ("wrap", "stop"):
            raise ConfigError(f"when_full={when_full!r}: give wrap or stop")
        if sink is not None and not callable(sink):
            raise ConfigError(f"sink={sink!r}: give a function of a record")
        wanted = records, "hand" if sink is not None else when_full
        rings = self._made(wanted)
        if sink is not None and not records:
            raise ConfigError("a sink gets records: give room for some")
        self.stop()
        self._wanted, self.sink = wanted, sink
        self._renew(rings)
        for cpu in self._cpus:
            cpu.loop.watch |= lib.KVMPY_RECORD

    def stop(self) -> None:
        """Record no more; what there is stays, and the sink gets the rest of it."""
        for cpu in self._cpus:
            cpu.loop.watch &= ~lib.KVMPY_RECORD
        try:
            for cpu in self._cpus:
                self.drain(cpu, everything=True)
        finally:
            self.sink = None

    def clear(self) -> None:
        """Forget all records and counts; views keep what they show."""
        if self.rings:
            self._renew(self._made(self._wanted))

    def _made(self, wanted: tuple[int, str]) -> list[Ring]:
        return [Ring(*wanted) for _ in self._cpus]

    def _renew(self, rings: list[Ring]) -> None:
        for cpu, ring in zip(self._cpus, rings, strict=True):
            cpu.record_to(ring)
        self.rings = rings
        self._names = [Names(self._find) for _ in self._cpus]

    @property
    def recording(self) -> bool:
        """Whether it is on."""
        return any(cpu.loop.watch & lib.KVMPY_RECORD for cpu in self._cpus)

    @property
    def dropped(self) -> int:
        """How many records are lost: overwritten, or left out because the ring was full."""
        return sum(ring.dropped for ring in self.rings)

    def drain(self, cpu: VCPU, *, everything: bool = False) -> None:
        """Give the sink what has come of a vCPU; a read without an answer only if `everything`.

        For the thread that runs the vCPU: it is called for it while it runs.
        """
        if self.sink is None:
            return
        at = self._cpus.index(cpu)
        names, ring = self._names[at], self.rings[at]
        for raw in ring.take(everything=everything):
            ring.recorder.detached = 1  # the time that this takes is no device's
            self.sink(names.record(cpu.index, raw))

    # Reading ------------------------------------------------------------------------------

    @property
    def view(self) -> "NDArray[np.void]":
        """The records of a machine with one vCPU as a numpy structured array, without a copy.

        See `Ring.view`; ConfigError where there are more: `rings[n].view` has those of one.
        """
        if len(self._cpus) != 1:
            raise ConfigError(f"this machine has {len(self._cpus)} vCPUs: use trace.rings[n].view")
        if not self.rings:
            self._renew(self._made(self._wanted))
        return self.rings[0].view

    def tallies(self) -> list[Tally]:
        """Exits by kind and address, of all vCPUs, the most frequent first.

        They count what is dropped, too. Kinds and addresses beyond 4096 are under "other".
        """
        sums: dict[tuple[str, int], Tally] = {}
        for ring in self.rings:
            for one in ring.tallies():
                had = sums.get((one.kind, one.address), Tally(one.kind, one.address, 0, 0, 0))
                more = (old + new for old, new in zip(had[2:], one[2:], strict=True))
                sums[one.kind, one.address] = Tally(one.kind, one.address, *more)
        return sorted(sums.values(), key=lambda one: (-one.exits, one.kind, one.address))

    def totals(self) -> Totals:
        """The time inside and outside of KVM_RUN, of all vCPUs."""
        times = [ring.times() for ring in self.rings]
        return Totals(
            sum(inside for inside, _ in times),
            sum(outside for _, outside in times),
            sum(int(ring.recorder.interrupted) for ring in self.rings),
        )

    def __len__(self) -> int:
        return sum(map(len, self.rings))

    def __iter__(self) -> Iterator[Record]:
        names = [Names(self._find) for _ in self._cpus]
        for at, raw in self._in_order():
            yield names[at].record(self._cpus[at].index, raw)

    def _in_order(self) -> Iterator[tuple[int, Raw]]:
        if len(self.rings) == 1:
            return ((0, raw) for raw in self.rings[0].raw())
        found = [(at, raw) for at, ring in enumerate(self.rings) for raw in ring.raw()]
        return iter(sorted(found, key=lambda one: (one[1].left, one[0])))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """One record, or a list of them; found by going through all of them.

        What a register is called may depend on what was written before.
        """
        return list(self)[index]

    def save(self, path: str | Path) -> None:
        """Write all records to a file: .txt, .jsonl, .json (Perfetto, Chrome) or .html.

        Raises ConfigError for another ending, or where the file cannot be opened; HostError
        where it cannot be written.
        """
        from kvmpy.trace.exports import save

        save(self, Path(path), dropped=self.dropped)

    def _repr_html_(self) -> str:
        """For notebooks: the first and the last records, and the counts and times of all."""
        from kvmpy.trace.text import grids  # only a trace that is shown needs it
        from kvmpy.views.show import html

        return html(grids(list(self), self.dropped))

    def __repr__(self) -> str:
        state = "recording" if self.recording else "off"
        return f"<Trace {state}, {len(self)} records, {self.dropped} dropped>"
