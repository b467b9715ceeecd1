"""The run loop's Python half: call the device that an access is for, and go on.

This is the hot path. It builds no object per exit: the C loop gives one number, one dict
lookup gives the function, and the device gets plain integers.
"""

from collections.abc import Callable
from typing import Any

from kvmpy.abi import ffi, lib
from kvmpy.bus import Bus
from kvmpy.dispatch import Dispatch, add_note, bad_answer
from kvmpy.exits import Exit, MmioRead, MmioWrite, PortIn, PortOut
from kvmpy.vcpu import VCPU

__all__ = ["serve", "serve_one", "serve_posted"]

_PORT = lib.KVMPY_PORT
_HEARTBEAT, _POSTED = lib.KVMPY_HEARTBEAT, lib.KVMPY_POSTED
_VALUE = ffi.offsetof("struct kvmpy_loop", "value")


def serve(
    step: Callable[[Any], int], loop: Any, dispatch: Dispatch, drain: Callable[[], None]
) -> int:
    """Serve accesses until `step`, one of C's functions, returns something else: that.

    `drain` is called a few times a second, and when coalesced writes wait. An exception of a
    device's leaves with a note that says what the device was serving. Where a signal handler
    raises (Ctrl-C) before an access has reached its device, the next call serves it.
    """
    served, resolve, again = dispatch.served, dispatch.resolve, lib.KVMPY_AGAIN
    loop.handed = 0  # nothing is at hand yet that KVMPY_AGAIN could mean
    # A memoryview, since it is twice as fast as the field.
    access = memoryview(ffi.buffer(loop))[_VALUE : _VALUE + 8].cast("Q")
    while True:
        try:
            code = step(loop)
        except BaseException:
            loop.awaiting = 0
            raise
        if code != again:
            try:
                how = served[code]
            except KeyError:
                how = None
            if how is None:  # not in the handler: what is raised here has nothing to do with it
                if code < _PORT:
                    if code not in (_HEARTBEAT, _POSTED):
                        return code
                    drain()
                    continue
                how = resolve(code)
            function, offset, size, limit, name = how
        at = loop.offset if offset is None else offset
        try:
            if limit is None:
                function(at, size, access[0])
                continue
            value = function(at, size)
        except Exception as error:
            where = f"{'MMIO' if offset is None else 'port'} {loop.address:#x}"
            add_note(error, name, where, size, limit is None)
            raise
        try:
            if not 0 <= value <= limit:
                raise bad_answer(name, loop.address, size, value)
            access[0] = value
        except TypeError:
            raise bad_answer(name, loop.address, size, value) from None


def serve_posted(vcpu: VCPU, dispatch: Dispatch) -> None:
    """Serve the writes that piled up in the coalesced ring, in the guest's order."""
    with dispatch.posting:
        for port, address, size, value in vcpu.drain_ring():
            dispatch.write(dispatch.ports if port else dispatch.mmio, address, size, value)


def serve_one(vcpu: VCPU, dispatch: Dispatch, exit_: Exit) -> None:
    """Serve one exit of the teaching path; others than port and MMIO exits are left alone."""
    match exit_:
        case PortOut(port=port, size=size):
            for value in exit_.values:
                dispatch.write(dispatch.ports, port, size, value)
        case PortIn(port=port, size=size, count=count):
            vcpu.reply(_read(dispatch, dispatch.ports, port, size, count))
        case MmioWrite(address=address, data=data):
            dispatch.write(dispatch.mmio, address, len(data), exit_.value)
        case MmioRead(address=address, size=size):
            vcpu.reply(_read(dispatch, dispatch.mmio, address, size, 1))


def _read(dispatch: Dispatch, bus: Bus, address: int, size: int, count: int) -> bytes:
    values = (dispatch.read(bus, address, size) for _ in range(count))
    return b"".join(value.to_bytes(size, "little") for value in values)
