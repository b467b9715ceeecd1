"""The C side of the snapshots' benchmark: the same RAM and the same state as a snapshot's."""

from types import TracebackType
from typing import Any, Self

from benchmarks.floor import check, load
from kvmpy import KVM, Snapshot
from kvmpy.snapshot.reset import accepted_msrs
from kvmpy.vm import IDENTITY_MAP_ADDRESS, TSS_ADDRESS

__all__ = ["FloorSnapshot", "SpawnedFloor"]


class FloorSnapshot:
    """A snapshot of one vCPU and one region, as C wants it."""

    def __init__(self, snapshot: Snapshot) -> None:
        (image,), (state,) = snapshot.images, snapshot.cpus
        self.module = load()
        self._ffi = ffi = self.module.ffi
        self._kept: list[Any] = [snapshot]
        cpuid = state["CPUID2"]
        with KVM() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as cpu:
            cpu.set_cpuid2(cpuid)
            msrs = accepted_msrs(cpu, state["MSRS"])
        self.saved = self._buffer(image.view())
        self.regs = self._buffer(state["REGS"])
        self.memory = image.size
        self.guest = self._keep(
            ffi.new(
                "struct floor_guest *",
                {
                    "memory": image.size,
                    "identity_map_address": IDENTITY_MAP_ADDRESS,
                    "tss_address": TSS_ADDRESS,
                    "image_fd": image.base.fd,
                },
            )
        )
        count = len(cpuid) // 40  # struct kvm_cpuid_entry2
        blobs = {
            "cpuid": count.to_bytes(8, "little") + cpuid,
            "xcrs": state["XCRS"],
            "sregs": state["SREGS"],
            "msrs": bytes(msrs),
            "xsave": state["XSAVE"],
            "regs": state["REGS"],
            "debugregs": state["DEBUGREGS"],
            "events": state["VCPU_EVENTS"],
        }
        pointers: dict[str, Any] = {name: self._buffer(data) for name, data in blobs.items()}
        pointers["clock"] = int.from_bytes(snapshot.vm.clock[:8], "little")
        self.state = self._keep(ffi.new("struct floor_state *", pointers))

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def _buffer(self, data: Any) -> Any:
        return self._keep(self._ffi.from_buffer("uint8_t[]", data))

    def reset(self, method: str, first: int, pages: int) -> Any:
        """What floor_resets() wants to know."""
        bitmap = self._keep(self._ffi.new("uint64_t[]", self.memory // 4096 // 64 + 1))
        numbers = {
            "method": getattr(self.module.lib, f"FLOOR_{method.upper()}"),
            "saved": self.saved,
            "regs": self.regs,
            "first": first,
            "pages": pages,
            "bitmap": bitmap,
        }
        return self._keep(self._ffi.new("struct floor_reset *", numbers))

    def spawn(self) -> "SpawnedFloor":
        """A machine made from it, run to its first exit."""
        return SpawnedFloor(self)


class SpawnedFloor:
    """A machine that C made from a snapshot; `nanoseconds` to its first exit. A context manager."""

    def __init__(self, origin: FloorSnapshot) -> None:
        self._lib, self._origin = origin.module.lib, origin
        self.machine = origin.module.ffi.new("struct floor_machine *")
        self.nanoseconds = self._lib.floor_spawn(self.machine, origin.guest, origin.state)
        check(min(self.nanoseconds, 0), "making a machine from a snapshot in C")

    def log(self) -> None:
        """Have KVM log the pages that are written."""
        check(self._lib.floor_log(self.machine), "the dirty log in C")

    def resets(self, reset: Any, times: int) -> None:
        """Restore and run so many times; without the GIL."""
        check(self._lib.floor_resets(reset, self.machine, times), "resetting a machine in C")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lib.floor_close(self.machine)
