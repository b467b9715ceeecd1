"""A machine at one moment, as a value: memory, CPU state, interrupt controllers, devices.

What files need (json, hashlib) is imported by those who save or load: it takes milliseconds.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from kvmpy.errors import AddressError, ConfigError, SnapshotError
from kvmpy.kvm import backend, unpack_cpuid
from kvmpy.snapshot.config import Attached, Config, Saved
from kvmpy.snapshot.cpu import CpuState, VmState
from kvmpy.snapshot.diff import Difference, difference
from kvmpy.snapshot.host import check_host
from kvmpy.snapshot.image import Image
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

if TYPE_CHECKING:
    from kvmpy.snapshot.load import SnapshotFile
    from kvmpy.views.state import StateView

__all__ = ["Config", "Snapshot"]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Snapshot:
    """All of a machine at one moment; made by `Machine.snapshot` or `load`, and never changed.

    It shares pages with its `parent`, an earlier snapshot, if it is an increment, and with the
    machines that are made from it; its memory is freed when none of them is left. In a long chain,
    an increment has an earlier parent than the last snapshot, so that those between can go.
    `devices` are the states of the devices that have any, by bus and address, and `attached` says
    where devices were that are not standard ones: each machine of it needs some there, too.

    It is pickled by reference to its file, so it must have been saved or loaded.
    """

    config: Config
    images: tuple[Image, ...]
    cpus: tuple[CpuState, ...]
    vm: VmState
    devices: Mapping[str, bytes]
    console: bytes
    entry: int | None
    parent: "Snapshot | None" = None
    backend: str = field(default_factory=backend)
    saved: Saved | None = None
    """The file that it was saved to, or loaded from."""
    file: "SnapshotFile | None" = None
    """That which it was loaded from, open."""
    attached: tuple[Attached, ...] = ()

    def save(self, path: str | os.PathLike[str], *, compress: str | None = None) -> None:
        """Write all of it to the file `path`, which then needs no other one.

        Pages of zeros take no room, and pages that are the same are written once. The file appears
        as a whole or not at all. With `compress` "zstd" it is smaller, and is expanded into memory
        when it is loaded; without, machines map it as their RAM. Raises ConfigError where the
        library zstandard is not installed, and HostError for what the host refuses.
        """
        from kvmpy.snapshot.save import save
        from kvmpy.snapshot.values import Contents

        what = Contents(
            self.config,
            self.cpus,
            self.vm,
            self.devices,
            self.console,
            self.entry,
            self.backend,
            self.attached,
        )
        saved = save(Path(path), self.images, what, compress)
        object.__setattr__(self, "saved", saved)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: str = "auto") -> Self:
        """The snapshot in the file `path`. Its RAM is mapped, not read, unless it is compressed.

        The file must stay as it is while the snapshot or a machine of it is in use (replacing it
        by another one, as `save` does, is no change). `verify` says which checksums are compared
        now: "index", all but those of pages; "all"; or "auto", all if there are at most 64 MiB of
        pages. `verify()` does it later. Raises SnapshotError for a file that is missing, cut off,
        altered, or of another version.
        """
        from kvmpy.snapshot.load import SnapshotFile

        return cls._of(SnapshotFile(path), verify)

    @classmethod
    def _of(cls, file: "SnapshotFile", verify: str) -> Self:
        return cls(
            images=file.images(verify),
            saved=file.saved,
            file=file,
            **file.contents._asdict(),
        )

    @property
    def path(self) -> Path | None:
        """The file that it was saved to or loaded from last."""
        return None if self.saved is None else self.saved.path

    def verify(self) -> None:
        """Compare every page of its file with its checksum; SnapshotError where one is another.

        That is the file that it was loaded from, or else that which it was saved to.
        """
        if self.file is not None:
            self.file.verify()
        elif self.saved is None:
            raise ConfigError("the snapshot is in no file: save it first")
        else:
            _same(self.saved).verify()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.saved is None:
            raise ConfigError(
                "a snapshot is pickled by reference to its file: save it first, snapshot.save(path)"
            )
        _known[self.saved] = self
        return _known_or_loaded, (str(self.saved.path), self.saved.digest)

    def __copy__(self) -> Self:
        return self  # it is never changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def size(self) -> int:
        """The bytes of memory that it takes beside its parent's: its pages and states.

        Once a machine has gone back to it, or something was read of it, also a copy of each page
        that has changed since the first of its chain of parents.
        """
        states = sum(len(data) for state in self.cpus for data in state.values())
        devices = sum(map(len, self.devices.values()))
        return sum(image.stored for image in self.images) + states + devices + len(self.console)

    @property
    def pages(self) -> int:
        """How many pages of 4 KiB of RAM the machine has."""
        return sum(image.pages for image in self.images)

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes of RAM at guest-physical `address`; AddressError outside."""
        for image in self.images:
            if image.address <= address and address + length <= image.address + image.size:
                start = address - image.address
                return bytes(image.view()[start : start + length])
        raise AddressError(f"{length} bytes at address {address:#x} lie outside of the RAM")

    @property
    def view(self) -> "StateView":
        """Views of the first vCPU and of memory: registers, tables, page walks, code, bytes."""
        from kvmpy.views.pages import reader
        from kvmpy.views.state import Processor, StateView

        state = self.cpus[0]
        return StateView(
            reader(self.read),
            Registers.unpack(state["REGS"]),
            SpecialRegisters.unpack(state["SREGS"]),
            processor=Processor.of(unpack_cpuid(state["CPUID2"])),
        )

    def diff(self, other: "Snapshot") -> Difference:
        """What differs from here to another snapshot of the same kind of machine."""
        return difference(self, check_snapshot(other))

    def check_host(self, across: bool = False) -> None:
        """Raise ConfigError on another backend than that which it was taken on.

        With `across`, that is no reason: what of the state means the same there is up to KVM.
        UnsupportedError names what its vCPUs need and this host's do not have.
        """
        here = backend()
        if here != self.backend and not across:
            raise ConfigError(
                f"the snapshot was taken under {self.backend}, and this host has {here}: "
                "across_backends=True tries all the same"
            )
        if self.file is not None:  # otherwise it was taken here
            check_host(self.cpus)

    def __repr__(self) -> str:
        kind = "increment" if self.parent else "snapshot"
        return f"<{kind} of a {self.config.mode} machine, {self.pages} pages, {self.size} bytes>"


def check_snapshot(given: Snapshot) -> Snapshot:
    """The same; ConfigError for what is no snapshot, such as the path of one."""
    if not isinstance(given, Snapshot):
        raise ConfigError(f"{given!r:.80}: give a Snapshot; Snapshot.load(path) reads one")
    return given


def depth(snapshot: Snapshot | None) -> int:
    """How many snapshots one keeps alive, itself among them."""
    found = 0
    while snapshot is not None:
        snapshot, found = snapshot.parent, found + 1
    return found


def parent_of(images: Sequence[Image], before: Snapshot | None) -> Snapshot | None:
    """Which of `before` and its parents images share pages with: the last of them, if any."""
    parents = [image.parent for image in images if image.parent is not None]
    while before is not None and not any(image in parents for image in before.images):
        before = before.parent
    return before


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists of regions or images cover the same addresses."""
    return [(a.address, a.size) for a in one] == [(b.address, b.size) for b in other]


# Those that have files and are in use in this process.
_known: Final[weakref.WeakValueDictionary[Saved, Snapshot]] = weakref.WeakValueDictionary()


def _same(saved: Saved) -> "SnapshotFile":
    """That file, if it is still the one that it was."""
    from kvmpy.snapshot.load import SnapshotFile

    file = SnapshotFile(saved.path)
    if file.digest != saved.digest:
        raise SnapshotError(f"{saved.path}: was replaced by another snapshot since")
    return file


def _known_or_loaded(path: str, digest: bytes) -> Snapshot:
    """What a pickled snapshot refers to; loaded once per process."""
    saved = Saved(Path(path), digest)
    found = _known.get(saved)
    if found is None:
        found = _known.setdefault(saved, Snapshot._of(_same(saved), "auto"))
    return found
