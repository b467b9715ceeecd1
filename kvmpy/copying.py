"""Snapshots of a machine, and going back to one."""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

from kvmpy.abi import lib
from kvmpy.bus import Stateful
from kvmpy.console import Console
from kvmpy.devices import NativeDevice
from kvmpy.devicestates import load_devices, stateful
from kvmpy.errors import ConfigError
from kvmpy.kvm import KVM
from kvmpy.running import Running
from kvmpy.snapshot import (
    Attached,
    Config,
    Snapshot,
    capture,
    load_cpu,
    load_vm,
    put_back,
    same_shape,
    save_cpu,
    save_vm,
)
from kvmpy.snapshot.reset import Resetter
from kvmpy.snapshot.snapshot import check_snapshot, depth, parent_of
from kvmpy.vcpu import VCPU

__all__ = ["Copying", "Restored"]

_LONGEST_CHAIN: Final = 64  # snapshots


class Restored(NamedTuple):
    """What going back did: pages that had changed, their bytes, and the time that it took."""

    pages: int
    bytes: int
    nanoseconds: int


class Copying(Running):
    """The part of a machine that is saved and restored."""

    kvm: KVM
    config: Config
    _console: Console
    _at: Snapshot | None = None  # that which the machine was at last
    resetter: Any = None
    """What `reset_to` works with, once it was called."""
    _device_loads: Sequence[tuple[Callable[[bytes], None], bytes]] = ()
    _loads_of = -1  # the generation of claims that these are of

    def snapshot(self) -> Snapshot:
        """All of the machine as it is now: RAM, vCPUs, interrupt controllers, clock, devices.

        Exits at hand are finished first. Only pages that changed since the machine's last
        snapshot take memory. Devices take part that have `save_state` and `load_state`
        (`kvmpy.bus.Stateful`). Not part of it: eventfds, statistics and counts, enabled
        capabilities, `set_guest_debug`, a `stop` that waits, what waits in `input`, machine-check
        banks, and the TSC where KVM does not give each guest its own.

        Raises PendingExitError while an exit waits to be seen, ConfigError while a vCPU runs.
        """
        with self.vm.whole:
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        self.check_stopped()
        for cpu in self.cpus:
            cpu.finish()
            self._drain(cpu)()
        msrs = tuple(self.kvm.get_msr_index_list())
        cpus = tuple(save_cpu(cpu, msrs, apic=bool(self.vm.irqchip)) for cpu in self.cpus)
        # Each holds a descriptor, and all of a chain are read for the last: it has an end.
        far = depth(self._at) >= _LONGEST_CHAIN
        images = tuple(capture(region, from_base=far) for region in self.vm.memory)
        made = Snapshot(
            config=self.config,
            images=images,
            cpus=cpus,
            vm=save_vm(self.vm),
            devices=dict(self._device_states()),
            console=self._console.data(),
            entry=self.entry,
            attached=tuple(
                Attached(bus.kind, claim.base, claim.size, str(claim.name))
                for bus, claim in self.dispatch.own()
            ),
            parent=parent_of(images, self._at),
        )
        self._at = made
        return made

    @property
    def last_snapshot(self) -> Snapshot | None:
        """The snapshot that the machine was at last: taken of it, or gone back to."""
        return self._at

    def restore(self, snapshot: Snapshot, *, across_backends: bool = False) -> Restored:
        """Bring the whole machine back to a snapshot of it, or of another of the same shape.

        Raises ConfigError for a snapshot with other RAM, vCPUs, interrupt controllers or
        devices, and for one of another backend unless `across_backends`.
        """
        started = perf_counter_ns()
        with self.vm.whole:
            changed = self._restore(snapshot, across_backends)
        return Restored(changed, changed * 4096, perf_counter_ns() - started)

    def _restore(self, snapshot: Snapshot, across_backends: bool = False) -> int:
        self._check_fits(snapshot, across_backends)
        changed, self.resetter = 0, None
        for cpu in self.cpus:
            _drop_exit(cpu)
        for region, image in zip(self.vm.memory, snapshot.images, strict=True):
            changed += len(put_back(region, image))
        self.vm.drop_mappings()  # of pages as they are now, or were in between
        self._load(snapshot)
        return changed

    def reset_to(self, snapshot: Snapshot, scope: str = "all") -> Restored:
        """The same as `restore`, and fast from the second time on: only what changed.

        With `scope` "registers", neither x87, SSE and AVX registers nor MSRs, debug registers and
        the clock are brought back: for guests that do not touch them.

        Other than with `restore`, translations of addresses outlive a run, in the processor or in
        KVM's shadow page tables, unless page tables or CR3 are others at its end than in the
        snapshot. So accessed and dirty bits that one run has set may stay clear in the next; and a
        guest that changes a page table without invalidating what it had mapped, or has it back at
        the end, can meet a mapping of an earlier run. `machine.vm.drop_mappings()` before a run
        ends them (some 100 us).
        """
        started = perf_counter_ns()
        changed = self.go_back(snapshot, scope)
        return Restored(changed, changed * 4096, perf_counter_ns() - started)

    def go_back(self, snapshot: Snapshot, scope: str = "all") -> int:
        """What `reset_to` does; only how many pages had changed."""
        with self.vm.whole:
            resetter = self.resetter
            if (
                resetter is None
                or resetter.snapshot is not snapshot
                or resetter.scope != scope
                or not resetter.fits()
            ):
                changed = self._restore(snapshot)
                self.resetter = Resetter(self.vm, snapshot, scope)
                self._loads_of = -1
                return changed
            self.check_stopped()
            unseen = self.before_reset()
            resetter.reset()
            return unseen + int(resetter.native.changed)

    @property
    def has_native_state(self) -> bool:
        """Whether a device that C serves has a state that runs change."""
        return any(isinstance(device, NativeDevice) for _, device in self._stateful())

    def before_reset(self) -> int:
        """All that comes before C's part of a reset (see `snapshot.reset`).

        How many pages are known to have changed already.
        """
        # Where a signal handler raises in the midst, the next reset is a whole one.
        resetter, self.resetter = self.resetter, None
        if resetter is None:
            raise ConfigError("another thread goes back to a snapshot with this machine: one does")
        self._reset_devices(resetter.snapshot)
        unseen: int = resetter.prepare()
        self.resetter = resetter
        return unseen

    def _reset_devices(self, snapshot: Snapshot) -> None:
        generation = self.dispatch.routes.generation
        if self._loads_of != generation:
            load_devices(snapshot, self.dispatch)
            found = dict(self._stateful())
            states = snapshot.devices.items()
            self._device_loads = [(found[name].load_state, state) for name, state in states]
            self._loads_of = generation
        else:
            for load_state, state in self._device_loads:
                load_state(state)
        self._console.replace(snapshot.console)
        self._forget_run()
        self.entry = snapshot.entry

    def _load(self, snapshot: Snapshot) -> None:
        load_vm(self.vm, snapshot.vm)
        for cpu, state in zip(self.cpus, snapshot.cpus, strict=True):
            load_cpu(cpu, state)
        load_devices(snapshot, self.dispatch)
        self._forget_run()
        self._came_from(snapshot)

    def _came_from(self, snapshot: Snapshot) -> None:
        self._console.replace(snapshot.console)
        self.entry = snapshot.entry
        self._at = snapshot

    def _forget_run(self) -> None:
        for cpu in self._ends:  # a device has ended a run that a signal handler left before
            lib.kvmpy_unkick(cpu.loop)
        self._ends.clear()
        if self._any_unclaimed:
            for unclaimed in self.dispatch.unclaimed.values():
                unclaimed.clear()

    def _stateful(self) -> Iterator[tuple[str, Stateful]]:
        return stateful(self.dispatch)

    def _device_states(self) -> Iterator[tuple[str, bytes]]:
        for name, device in self._stateful():
            state = device.save_state()
            if not isinstance(state, bytes):
                raise ConfigError(f"save_state of the device at {name} gave no bytes: {state!r}")
            yield name, state

    def check_stopped(self) -> None:
        """Raise ClosedError for a machine that is closed, ConfigError while a vCPU runs."""
        self.vm.fd  # noqa: B018 - refuse a closed machine
        for cpu in self.cpus:
            if cpu.loop.running or cpu in self._watched:  # by exits(), a device is being called
                raise ConfigError(f"{cpu.what} is running: stop it first")

    def _check_fits(self, snapshot: Snapshot, across_backends: bool) -> None:
        self.check_stopped()
        check_snapshot(snapshot).check_host(across_backends)
        if not same_shape(list(self.vm.memory), snapshot.images):
            raise ConfigError("the snapshot is of a machine with other RAM")
        if len(snapshot.cpus) != len(self.cpus):
            raise ConfigError(
                f"the snapshot has {len(snapshot.cpus)} vCPUs, this machine {len(self.cpus)}"
            )
        if snapshot.config.irqchip != self.vm.irqchip:
            raise ConfigError(
                f"the snapshot has irqchip={snapshot.config.irqchip!r}, this machine "
                f"{self.vm.irqchip!r}"
            )


def _drop_exit(cpu: VCPU) -> None:
    """Finish the exit at hand without asking a device: what it does will be undone anyway."""
    loop = cpu.loop
    lib.kvmpy_forget_end(loop)
    if loop.ring:
        loop.ring[0] = loop.ring[1]  # what was posted is undone, too
    loop.open = loop.awaiting = loop.held = 0
    loop.raw = True
    while (code := lib.kvmpy_finish(loop)) == lib.KVMPY_EXIT:
        loop.held = 0  # an access that was split: its other half
    if code < 0:
        raise cpu.run_error(-code)
