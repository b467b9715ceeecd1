"""The commands of GDB's remote serial protocol: a packet's data in, the answer out.

It knows no socket and no KVM: what it asks of the guest is a `Target`, and what makes the guest run
it hands back. (GDB manual, E.2 "Packets" to E.5 "General Query Packets".)
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from kvmpy.errors import KvmpyError
from kvmpy.gdb.description import RIP, RSP, target_xml
from kvmpy.gdb.fields import MalformedError, as_action, as_number, as_numbers, unhex
from kvmpy.gdb.inspecting import MOST, Inspecting
from kvmpy.gdb.packets import PACKET_SIZE, escape
from kvmpy.gdb.stops import SIGTRAP, Action, Stop
from kvmpy.gdb.target import Target

__all__ = ["Answer", "Detach", "Kill", "NoAcks", "Resume", "Stub"]

_ERROR: Final = b"E01"
_SPECIAL: Final = re.compile(rb"[^ -~]|[#$*}]")
_SHARED: Final = (RIP, RSP)
"""Registers that a stop reply brings along."""


class Resume(NamedTuple):
    """Run: the action of each vCPU that has one."""

    actions: dict[int, Action]


class Detach(NamedTuple):
    """gdb leaves, and the guest goes on; it expects an OK."""


class Kill(NamedTuple):
    """gdb has the guest end; `answer` is what it expects, if anything."""

    answer: bytes


class NoAcks(NamedTuple):
    """Acknowledge no more, after an OK."""


Answer: TypeAlias = bytes | Resume | Detach | Kill | NoAcks


class Stub(Inspecting):
    """The protocol's state: which vCPU a packet means, and how the guest stopped last."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.stop = Stop(0, SIGTRAP)
        """Why the guest stands still."""
        self._resumed = -1  # the vCPU of Hc; -1: all

    def handle(self, data: bytes) -> Answer:
        """Answer a packet; an empty answer for one that is not known."""
        try:
            command = _COMMANDS.get(data[:1])
            return b"" if command is None else command(self, data[1:])
        except MalformedError:
            return _ERROR
        except KvmpyError as error:
            return b"E." + _SPECIAL.sub(b"'", str(error).encode("ascii", "replace"))

    # What the guest is doing ------------------------------------------------------------------

    def stopped(self, stop: Stop) -> bytes:
        """The stop reply for `stop`, which the guest has just come to."""
        self.stop = stop
        self._general = stop.cpu
        return self._why(b"")

    def _why(self, rest: bytes) -> bytes:
        stop = self.stop
        reply = b"T%02x" % stop.signal
        for number in _SHARED:
            reply += b"%x:%b;" % (number, self._register(stop.cpu, number))
        reply += b"thread:%x;" % (stop.cpu + 1)
        if stop.reason in ("swbreak", "hwbreak"):
            reply += stop.reason.encode() + b":;"
        elif stop.reason.endswith("watch"):
            reply += b"%b:%x;" % (stop.reason.encode(), stop.address)
        return reply

    # Threads ----------------------------------------------------------------------------------

    def _cpu(self, text: bytes) -> int:
        """A thread's vCPU; -1 for all, and any is 0."""
        if text == b"-1":
            return -1
        number = as_number(text)
        if number == 0:
            return 0
        if number > self.target.count:
            raise MalformedError
        return number - 1

    def _select(self, data: bytes) -> bytes:
        cpu = self._cpu(data[1:])
        if data[:1] == b"g":
            self._general = max(cpu, 0)
        elif data[:1] == b"c":
            self._resumed = -1 if data[1:] in (b"0", b"-1") else cpu
        else:
            return b""
        return b"OK"

    def _alive(self, data: bytes) -> bytes:
        self._cpu(data)
        return b"OK"

    # Running ----------------------------------------------------------------------------------

    def _one_or_all(self, action: Action) -> Resume:
        if action.kind == "s" or self._resumed >= 0:
            return Resume({self._general if self._resumed < 0 else self._resumed: action})
        return Resume(dict.fromkeys(range(self.target.count), action))

    def _continue(self, rest: bytes) -> Answer:
        self._jump(rest)
        return self._one_or_all(Action("c"))

    def _step(self, rest: bytes) -> Answer:
        self._jump(rest)
        return self._one_or_all(Action("s"))

    def _with_signal(self, rest: bytes) -> Answer:
        """C and S: a guest has no signals, so the number is not used."""
        as_number(rest[:2])
        self._jump(rest.partition(b";")[2])
        return self._one_or_all(Action("c"))

    def _step_with_signal(self, rest: bytes) -> Answer:
        answer = self._with_signal(rest)
        assert isinstance(answer, Resume)
        return self._one_or_all(Action("s"))

    def _jump(self, rest: bytes) -> None:
        if rest:
            address = as_number(rest).to_bytes(8, "little")
            cpu = self._general if self._resumed < 0 else self._resumed
            self.target.write_registers(cpu, {RIP: address})

    def _verbose(self, rest: bytes) -> Answer:
        if rest == b"Cont?":
            return b"vCont;c;C;s;S;r"
        if rest.startswith(b"Cont;"):
            return self._vcont(rest[5:])
        if rest == b"Kill" or rest.startswith(b"Kill;"):
            return Kill(b"OK")
        if rest == b"CtrlC":
            return b"OK"
        return b""

    def _vcont(self, rest: bytes) -> Answer:
        actions: dict[int, Action] = {}
        for part in rest.split(b";"):
            what, colon, thread = part.partition(b":")
            cpu = self._cpu(thread) if colon else -1
            action = as_action(what)
            for one in range(self.target.count) if cpu < 0 else (cpu,):
                actions.setdefault(one, action)  # the leftmost that fits counts
        return Resume(actions)

    def _detach(self, rest: bytes) -> Answer:
        return Detach()

    def _kill(self, rest: bytes) -> Answer:
        return Kill(b"")

    # Queries ----------------------------------------------------------------------------------

    def _query(self, rest: bytes) -> Answer:
        name = re.split(rb"[:,]", rest, maxsplit=1)[0]
        query = _QUERIES.get(name)
        return b"" if query is None else query(self, rest[len(name) + 1 :])

    def _supported(self, rest: bytes) -> bytes:
        return (
            b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+"
            % PACKET_SIZE
        )

    def _xfer(self, rest: bytes) -> bytes:
        what, operation, annex, part = (rest.split(b":", 3) + [b""] * 3)[:4]
        if what != b"features" or operation != b"read":
            return b""
        if annex != b"target.xml":
            return b"E00"
        start, size = as_numbers(part, 2)
        data = target_xml()
        chunk = data[start : start + min(size, MOST)]
        return (b"m" if start + len(chunk) < len(data) else b"l") + escape(chunk)

    def _threads(self, rest: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (cpu + 1) for cpu in range(self.target.count))

    def _extra_info(self, rest: bytes) -> bytes:
        return self.target.describe(max(self._cpu(rest), 0)).encode().hex().encode()

    def _command(self, rest: bytes) -> bytes:
        line = unhex(rest).decode("utf-8", "replace")
        said = self.target.monitor(self._general, line)
        return said.encode("utf-8", "replace").hex().encode() or b"OK"

    def _set(self, rest: bytes) -> Answer:
        if rest == b"StartNoAckMode":
            return NoAcks()
        if rest.startswith(b"qemu.PhyMemMode:"):
            self.target.physical = as_number(rest.partition(b":")[2]) != 0
            return b"OK"
        return b""


_COMMANDS: Final[dict[bytes, Callable[[Stub, bytes], Answer]]] = {
    b"?": Stub._why,
    b"g": Stub._read_all,
    b"G": Stub._write_all,
    b"p": Stub._read_one,
    b"P": Stub._write_one,
    b"m": Stub._read_memory,
    b"M": Stub._write_memory,
    b"X": Stub._write_binary,
    b"H": Stub._select,
    b"T": Stub._alive,
    b"Z": Stub._insert,
    b"z": Stub._remove,
    b"c": Stub._continue,
    b"C": Stub._with_signal,
    b"s": Stub._step,
    b"S": Stub._step_with_signal,
    b"v": Stub._verbose,
    b"D": Stub._detach,
    b"k": Stub._kill,
    b"q": Stub._query,
    b"Q": Stub._set,
}
_QUERIES: Final[dict[bytes, Callable[[Stub, bytes], Answer]]] = {
    b"Supported": Stub._supported,
    b"Xfer": Stub._xfer,
    b"C": lambda stub, rest: b"QC%x" % (stub._general + 1),
    b"fThreadInfo": Stub._threads,
    b"sThreadInfo": lambda stub, rest: b"l",
    b"ThreadExtraInfo": Stub._extra_info,
    b"Attached": lambda stub, rest: b"1",
    b"Symbol": lambda stub, rest: b"OK",
    b"Rcmd": Stub._command,
    b"qemu.PhyMemMode": lambda stub, rest: b"1" if stub.target.physical else b"0",
}
