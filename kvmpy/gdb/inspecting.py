"""The packets that look at a guest and change it: registers, memory, breakpoints."""

from typing import Final

from kvmpy.errors import KvmpyError, UnsupportedError
from kvmpy.gdb.description import REGISTERS
from kvmpy.gdb.fields import MalformedError, as_numbers, as_register, unhex
from kvmpy.gdb.packets import PACKET_SIZE, unescape
from kvmpy.gdb.target import Target

__all__ = ["MOST", "Inspecting"]

MOST: Final = PACKET_SIZE // 2
"""Bytes of memory, or of a document, in one answer."""
_NO_MEMORY: Final = b"E0e"  # EFAULT


class Inspecting:
    """The part of the stub that these packets are for."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._general = 0  # the vCPU of Hg

    def _register(self, cpu: int, number: int) -> bytes:
        return self.target.read_register(cpu, number).hex().encode()

    def _read_all(self, rest: bytes) -> bytes:
        return b"".join(self._register(self._general, number) for number in range(len(REGISTERS)))

    def _write_all(self, rest: bytes) -> bytes:
        data, values, at = unhex(rest), {}, 0
        for number, register in enumerate(REGISTERS):
            if at + register.size > len(data):
                break
            values[number] = data[at : at + register.size]
            at += register.size
        self.target.write_registers(self._general, values)
        return b"OK"

    def _read_one(self, rest: bytes) -> bytes:
        return self._register(self._general, as_register(rest))

    def _write_one(self, rest: bytes) -> bytes:
        name, _, value = rest.partition(b"=")
        self.target.write_registers(self._general, {as_register(name): unhex(value)})
        return b"OK"

    def _read_memory(self, rest: bytes) -> bytes:
        address, size = as_numbers(rest, 2)
        data = self.target.read_memory(self._general, address, min(size, MOST))
        return data.hex().encode() if data or not size else _NO_MEMORY

    def _write_memory(self, rest: bytes) -> bytes:
        place, _, data = rest.partition(b":")
        return self._write(place, unhex(data))

    def _write_binary(self, rest: bytes) -> bytes:
        place, _, data = rest.partition(b":")
        return self._write(place, unescape(data))

    def _write(self, place: bytes, data: bytes) -> bytes:
        address, size = as_numbers(place, 2)
        if len(data) != size:
            raise MalformedError
        try:
            self.target.write_memory(self._general, address, data)
        except KvmpyError:
            return _NO_MEMORY
        return b"OK"

    # Breakpoints ------------------------------------------------------------------------------

    def _insert(self, rest: bytes) -> bytes:
        kind, address, size = as_numbers(rest.partition(b";")[0], 3)
        if kind > 4:
            return b""
        try:
            self.target.insert(self._general, kind, address, size)
        except UnsupportedError:
            if kind > 1:
                return b""  # gdb watches by itself then
            raise
        return b"OK"

    def _remove(self, rest: bytes) -> bytes:
        kind, address, _ = as_numbers(rest.partition(b";")[0], 3)
        if kind > 4:
            return b""
        self.target.remove(kind, address)
        return b"OK"
