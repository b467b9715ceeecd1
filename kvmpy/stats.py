"""KVM's own statistics of a VM or a vCPU, by name (KVM API, 4.133 "KVM_GET_STATS_FD")."""

import os
import struct

from kvmpy.abi import ioctl
from kvmpy.descriptor import Descriptor

__all__ = ["Stats"]

_HEADER = struct.Struct("<6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = struct.Struct("<IhHII")  # flags, exponent, size, offset, bucket_size
_TYPE, _INSTANT, _PEAK = 0xF, 1, 2  # KVM_STATS_TYPE_*


class Stats(Descriptor):
    """The statistics descriptor of a VM or vCPU. The names are read once; `read` is one call."""

    levels: frozenset[str]
    """Those that are no counts of events: a value of the moment, or the highest so far."""

    def __init__(self, owner: int, what: str) -> None:
        super().__init__(ioctl(owner, "GET_STATS_FD"), f"the statistics of {what}")
        try:
            self._names, self._data_offset, self._data_size = self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> tuple[list[tuple[str, int, int]], int, int]:
        header = os.pread(self.fd, _HEADER.size, 0)
        _, name_size, count, _, desc_offset, data_offset = _HEADER.unpack(header)
        step = _DESCRIPTOR.size + name_size
        table = os.pread(self.fd, step * count, desc_offset)
        names, size, levels = [], 0, set()
        for at in range(0, step * count, step):
            flags, _, values, offset, _ = _DESCRIPTOR.unpack_from(table, at)
            name = table[at + _DESCRIPTOR.size : at + step].partition(b"\0")[0].decode()
            names.append((name, offset, values))
            if flags & _TYPE in (_INSTANT, _PEAK):
                levels.add(name)
            size = max(size, offset + 8 * values)
        self.levels = frozenset(levels)
        return names, data_offset, size

    def read(self) -> dict[str, int | tuple[int, ...]]:
        """Each statistic by name: a number, or a tuple of numbers for a histogram."""
        data = os.pread(self.fd, self._data_size, self._data_offset)
        found: dict[str, int | tuple[int, ...]] = {}
        for name, offset, values in self._names:
            numbers = struct.unpack_from(f"<{values}Q", data, offset)
            found[name] = numbers[0] if values == 1 else numbers
        return found
