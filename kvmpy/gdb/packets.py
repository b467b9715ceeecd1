"""The packet layer of GDB's remote serial protocol: bytes in, packets out, and back.

A packet is `$data#cc`, where cc is the sum of the data's bytes modulo 256 in hex; 0x03 alone is an
interrupt. (GDB manual, appendix E "Remote Protocol", E.1 "Overview" and E.5 "Notification".)
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["PACKET_SIZE", "Event", "Link", "escape", "frame", "unescape"]

PACKET_SIZE: Final = 0x4000
"""The most bytes of a packet's data that are taken, as told by qSupported."""

_INTERRUPT, _ACK, _NAK, _START, _END, _ESCAPE = b"\x03+-$#}"
_SPECIAL: Final = frozenset(b"#$}*")


class Event(NamedTuple):
    """What came in: `kind` is "packet", "interrupt", or "long" for a packet that was too long."""

    kind: str
    data: bytes = b""


def escape(data: bytes) -> bytes:
    """Binary data as a packet can carry it (GDB manual, E.1 "Binary Data")."""
    if not _SPECIAL.intersection(data):
        return data
    return b"".join(
        bytes((_ESCAPE, byte ^ 0x20)) if byte in _SPECIAL else bytes((byte,)) for byte in data
    )


def unescape(data: bytes) -> bytes:
    """Escaped data as it was; an escape at the very end stands for nothing."""
    first, *rest = data.split(b"}")
    parts = [first]
    at = 0
    while at < len(rest):
        part = rest[at]
        if part:
            parts.append(bytes((part[0] ^ 0x20,)) + part[1:])
        elif at + 1 < len(rest):  # "}}": the second is what is escaped
            at += 1
            parts.append(bytes((_ESCAPE ^ 0x20,)) + rest[at])
        at += 1
    return b"".join(parts)


def frame(data: bytes) -> bytes:
    """The packet that carries `data`, which is escaped where it has to be."""
    return b"$%b#%02x" % (data, sum(data) & 0xFF)


class Link:
    """One connection's state: what has come in of a packet so far, and what is to go out.

    It keeps no more than one packet of either direction, however much comes in.
    """

    def __init__(self) -> None:
        self.acks = True
        """Whether each packet is acknowledged; QStartNoAckMode turns it off."""
        self._data = bytearray()
        self._state = self._idle
        self._sum = b""
        self._long = False
        self._out = bytearray()
        self._last = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Take bytes; the events in them. To be run to its end."""
        at = 0
        while at < len(data):
            if self._state == self._idle:
                event = self._idle(data[at])
                at += 1
            elif self._state == self._body:
                end = _first(data, at)
                self._keep(data[at:end])
                at = end
                event = None
                if at < len(data):
                    event = self._body(data[at])
                    at += 1
            else:
                event = self._check(data[at])
                at += 1
            if event is not None:
                yield event

    def _idle(self, byte: int) -> Event | None:
        if byte == _START:
            self._begin()
        elif byte == _INTERRUPT:
            return Event("interrupt")
        elif byte == _NAK and self.acks and not self._out:
            self._out += self._last
        return None

    def _begin(self) -> None:
        self._data.clear()
        self._long, self._sum = False, b""
        self._state = self._body

    def _keep(self, part: bytes) -> None:
        if len(self._data) + len(part) > PACKET_SIZE:
            self._long = True
        else:
            self._data += part

    def _body(self, byte: int) -> Event | None:
        if byte == _START:  # the one before was cut off
            self._begin()
        else:
            self._state = self._check
        return None

    def _check(self, byte: int) -> Event | None:
        self._sum += bytes((byte,))
        if len(self._sum) < 2:
            return None
        self._state = self._idle
        if self._long:
            self._acknowledge(b"+")
            return Event("long")
        good = self._sum.lower() == b"%02x" % (sum(self._data) & 0xFF)
        self._acknowledge(b"+" if good or not self.acks else b"-")
        if not good and self.acks:
            return None
        return Event("packet", bytes(self._data))

    def _acknowledge(self, answer: bytes) -> None:
        if self.acks:
            self._out += answer

    def send(self, data: bytes) -> None:
        """Put a packet with `data` on the way."""
        self._last = frame(data)
        self._out += self._last

    def take(self) -> bytes:
        """What is to go out, which is on its way then."""
        out = bytes(self._out)
        self._out.clear()
        return out


def _first(data: bytes, at: int) -> int:
    """Where a packet's data ends, or begins anew, from `at` on."""
    ends = [found for byte in b"#$" if (found := data.find(byte, at)) >= 0]
    return min(ends, default=len(data))
