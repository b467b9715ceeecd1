"""Going back to one snapshot again and again: what changed, in one call into C.

The guest's writes are in KVM's dirty log, the host's in a bitmap that `Memory.write` fills. What
else has touched RAM (a view, a buffer that was given away) nobody logs: then the kernel's page
tables tell, and so they do where KVM has no manual protection, or the log is somebody else's.
"""

import errno
import struct
from collections.abc import Iterator
from typing import Any, Final

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.calls import Call, ioctl, native
from kvmpy.errors import ConfigError
from kvmpy.exits import OFFSET_CR8, OFFSET_DIRTY_REGS
from kvmpy.memory import PAGE_SIZE, Memory
from kvmpy.snapshot.cpu import ORDER, CpuState, load_routes, write_msrs
from kvmpy.snapshot.image import set_bits
from kvmpy.snapshot.pages import put_back
from kvmpy.snapshot.snapshot import Snapshot
from kvmpy.snapshot.tables import table_pages
from kvmpy.vcpu import VCPU
from kvmpy.vcpuregs import SYNC_EVENTS, SYNC_REGS, SYNC_SREGS
from kvmpy.vm import SPARE_PAGE, VM
from kvmpy.x86.state import SpecialRegisters

__all__ = ["DIRTY_LOG", "IN_PAGE", "SCOPES", "Resetter", "accepted_msrs"]

DIRTY_LOG: Final = "dirty-log"
SCOPES: Final = ("all", "registers")
_SYNC_ALL: Final = SYNC_REGS | SYNC_SREGS | SYNC_EVENTS
IN_PAGE: Final = ("REGS", "SREGS", "VCPU_EVENTS")  # the order of struct kvm_sync_regs
_MANUAL: Final = 1  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE


class Resetter:
    """Brings one VM, which is at `snapshot` when this is made, back to it.

    `scope` "registers" leaves alone what only takes ioctls: x87, SSE and AVX registers, MSRs, debug
    registers; it is for guests that do not touch them. `method` says how changed pages are
    found: "dirty-log" or "copy-on-write".
    """

    def __init__(self, vm: VM, snapshot: Snapshot, scope: str) -> None:
        if scope not in SCOPES:
            raise ConfigError(f"scope {scope!r}: use {' or '.join(SCOPES)}")
        self.snapshot, self.scope = snapshot, scope
        self._vm, self._cpus = vm, list(vm.vcpus)
        self.method = DIRTY_LOG if self._log() else "copy-on-write"
        self._in_page = not vm.irqchip and all(
            cpu.can_sync & _SYNC_ALL == _SYNC_ALL for cpu in self._cpus
        )
        if scope == "registers" and not self._in_page:
            raise ConfigError(
                "scope 'registers' takes KVM_CAP_SYNC_REGS with events, and no irqchip: use 'all'"
            )
        self._by_tables = self.method == "copy-on-write"
        self._regions = list(vm.memory)
        self._pairs = list(zip(vm.memory, snapshot.images, strict=True))
        self._kept: list[object] = []
        self.native = made = self._make()
        self._each_cpu = [
            (made.cpu[number], cpu, cpu.run_page) for number, cpu in enumerate(self._cpus)
        ]

    def fits(self) -> bool:
        """Whether the VM still has the RAM and the vCPUs that it had."""
        return self._vm.vcpus == self._cpus and list(self._vm.memory) == self._regions

    def prepare(self) -> int:
        """What comes before C's part; how many pages only the kernel's page tables knew of."""
        if not self.fits():
            raise ConfigError("the snapshot is of a machine with other RAM or vCPUs")
        unseen = 0
        for region, image in self._pairs:
            # Others may map what is shared; of read-only RAM, KVM has no log.
            if (
                self._by_tables
                or region.backing == "shared"
                or region.may_have_changed()
                or (region.readonly and region.written and any(region.written))
            ):
                unseen += len(put_back(region, image))
                if region.readonly:
                    region.written = set_bits(region.size // PAGE_SIZE, [])
        if unseen:
            self.native.drop = 1
        load_routes(self._vm, self.snapshot.vm.routes)
        for one, cpu, page in self._each_cpu:
            if page[OFFSET_DIRTY_REGS]:  # what waits there is not the vCPU's, and never will be
                cpu.outdate()
                page[OFFSET_DIRTY_REGS] = 0
            one.stale = cpu.outdated_at
            if not self._in_page:
                cpu.outdate()
        return unseen

    def reset(self) -> None:
        """C's part; also done by kvmpy_run_again()."""
        code = lib.kvmpy_reset(self.native)
        if code:
            raise self.error(-code)

    def error(self, code: int) -> Exception:
        """The exception for an errno of C's part."""
        if code == errno.EBUSY:
            return ConfigError("a vCPU is run or finished by another thread: stop it first")
        number = self.native.failed
        failed = self._calls[number].what if number < len(self._calls) else "the dirty log"
        return host_error(code, f"going back to a snapshot: {failed}")

    def _log(self) -> bool:
        """Have KVM log writes, if that can be done without taking the log from somebody."""
        vm = self._vm
        regions = [region for region in vm.memory if not region.readonly]
        if vm.logs_for_reset:
            for region in regions:
                if region.log_dirty:
                    vm.clear_dirty_log(region, b"\xff" * (region.size // PAGE_SIZE // 8 + 1))
                else:  # it was added meanwhile
                    vm.set_log_dirty(region, True)
            return True
        if any(region.log_dirty for region in regions):
            return False
        if not vm.check_extension("MANUAL_DIRTY_LOG_PROTECT2") & _MANUAL:
            return False
        vm.enable_cap("MANUAL_DIRTY_LOG_PROTECT2", _MANUAL)
        for region in regions:
            vm.set_log_dirty(region, True)
        vm.logs_for_reset = True
        return True

    # What C works with ----------------------------------------------------------------------

    def _make(self) -> Any:
        made = ffi.new("struct kvmpy_reset *")
        made.vm = self._vm.fd
        made.spare_slot, made.spare_address = self._vm.spare_slot()
        made.spare_page = ffi.cast("void *", address_of(SPARE_PAGE))
        logged = [pair for pair in self._pairs if not pair[0].readonly]
        # Without a log, C puts no region back; where inputs are written it knows all the same.
        made.regions = len(logged) if self.method == DIRTY_LOG else 0
        made.region = self._keep(ffi.new("struct kvmpy_reset_region[]", len(logged)))
        for one, (region, image) in zip(made.region[0 : len(logged)], logged, strict=True):
            self._region(one, region, address_of(image.view()))
        for region in self._regions:
            if region.readonly:
                region.written = set_bits(region.size // PAGE_SIZE, [])
        made.cpus = len(self._cpus)
        made.cpu = self._keep(ffi.new("struct kvmpy_reset_cpu[]", len(self._cpus)))
        for number, (cpu, state) in enumerate(zip(self._cpus, self.snapshot.cpus, strict=True)):
            self._cpu(made.cpu[number], cpu, state)
        self._calls = [] if self.scope == "registers" else list(self._state())
        made.calls, made.count = self._keep(native(self._calls)), len(self._calls)
        return made

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def _words(self, bitmap: bytearray) -> Any:
        return self._keep(ffi.from_buffer("uint64_t[]", bitmap, require_writable=True))

    def _region(self, one: Any, region: Memory, saved: int) -> None:
        pages = region.size // PAGE_SIZE
        region.written = set_bits(pages, [])
        one.slot, one.pages = region.slot, pages
        one.ram = ffi.cast("uint8_t *", region.host_address)
        one.saved = ffi.cast("uint8_t *", saved)
        one.dirty = self._words(set_bits(pages, []))
        one.more = self._words(region.written)
        tables = {
            (address - region.address) // PAGE_SIZE
            for address in self._tables()
            if region.address <= address < region.end
        }
        one.tables = self._words(set_bits(pages, sorted(tables)))

    def _tables(self) -> set[int]:
        def read(address: int, length: int) -> bytes | None:
            for image in self.snapshot.images:
                if image.address <= address and address + length <= image.address + image.size:
                    return self.snapshot.read(address, length)
            return None

        found: set[int] = set()
        for state in self.snapshot.cpus:
            found |= table_pages(read, SpecialRegisters.unpack(state["SREGS"]))
        return found

    def _cpu(self, one: Any, cpu: VCPU, state: CpuState) -> None:
        one.loop = cpu.loop
        special = SpecialRegisters.unpack(state["SREGS"])
        for at, value in enumerate((special.cr0, special.cr3, special.cr4, special.efer)):
            one.paging[at] = value
        if self._in_page:
            packed = b"".join(state[name] for name in IN_PAGE)
            one.sync = self._keep(ffi.new("uint8_t[]", packed))
        cpu.sync_regs |= SYNC_SREGS | SYNC_EVENTS  # so that it shows what changed

    def _state(self) -> Iterator[Call]:
        """The ioctls for all that is not in the mapping, in their order."""
        vm, snapshot = self._vm, self.snapshot
        yield ioctl("SET_CLOCK", vm.fd, bytearray(snapshot.vm.clock))
        for chip, packed in enumerate(snapshot.vm.chips):
            data = bytearray(struct.pack("<II", chip, 0) + packed)
            yield ioctl("SET_IRQCHIP", vm.fd, data)
        if snapshot.vm.pit:
            yield ioctl("SET_PIT2", vm.fd, bytearray(snapshot.vm.pit))
        for cpu, state in zip(self._cpus, snapshot.cpus, strict=True):
            yield from self._cpu_state(cpu, state)

    def _cpu_state(self, cpu: VCPU, state: CpuState) -> Iterator[Call]:
        cr8 = SpecialRegisters.unpack(state["SREGS"]).cr8
        poke = {"poke": address_of(cpu.run_page) + OFFSET_CR8, "value": cr8}
        for name in ORDER:
            in_page = self._in_page and name in IN_PAGE
            if name not in state or in_page or (name == "MP_STATE" and not self._vm.irqchip):
                continue  # without an irqchip, a vCPU is always runnable
            data = bytearray(state[name])
            if name == "MSRS":
                data = accepted_msrs(cpu, state[name])
            yield ioctl(f"SET_{name}", cpu.fd, data, **poke)


def accepted_msrs(cpu: VCPU, packed: bytes) -> bytearray:
    """The MSRs that the vCPU takes back: KVM stops at the first that it refuses."""
    taken = write_msrs(cpu, packed)
    entries = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in taken.items())
    return bytearray(struct.pack("<II", len(taken), 0) + entries)
