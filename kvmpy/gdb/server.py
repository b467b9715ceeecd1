"""One connection of gdb's after the other: sockets around the stub, the guest in between."""

import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal

from kvmpy.devices import exit_status
from kvmpy.errors import ConfigError, UnsupportedError
from kvmpy.gdb.address import Address, listen, parse_address
from kvmpy.gdb.control import Control
from kvmpy.gdb.crew import Came, readable
from kvmpy.gdb.host import probe_host
from kvmpy.gdb.monitor import Monitor
from kvmpy.gdb.packets import Event, Link
from kvmpy.gdb.stops import SIGABRT, SIGTRAP, Action, Ended, Failed, Stop
from kvmpy.gdb.stub import Detach, Kill, NoAcks, Resume, Stub
from kvmpy.gdb.target import GuestTarget
from kvmpy.result import Result

__all__ = ["serve"]

_CHUNK: Final = 1 << 16
_MOST_WAITING: Final = 64
_PATIENCE: Final = 10.0
"""Seconds for gdb to take what is sent to it."""

_Over = Literal["lost", "detached", "killed"] | Came


class _Connection:
    """A connection: packets from it, packets to it, and the interrupt that may come meanwhile."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.link = sock, Link()
        self.waiting: deque[Event] = deque()
        self.lost = False

    def fileno(self) -> int:
        """The socket's descriptor; -1 once the connection is lost."""
        return -1 if self.lost else self.sock.fileno()

    def interrupted(self) -> bool:
        """Take what has come while the guest runs: whether it was Ctrl-C, or gdb went away."""
        wanted = False
        for event in self._receive():
            if event.kind == "interrupt":
                wanted = True
            else:
                self.waiting.append(event)
        if len(self.waiting) > _MOST_WAITING:
            self.lost = True  # no gdb: it would wait for the stop
        return wanted or self.lost

    def next(self) -> Event | None:
        """Wait for an event; None once the connection is lost."""
        while not self.waiting and not self.lost:
            readable([self.sock.fileno()])
            self.waiting.extend(self._receive())
        return self.waiting.popleft() if self.waiting else None

    def _receive(self) -> list[Event]:
        try:
            data = self.sock.recv(_CHUNK)
        except OSError:
            data = b""
        if not data:
            self.lost = True
        events = list(self.link.feed(data))
        self.flush()
        return events

    def send(self, data: bytes) -> None:
        """Send a packet."""
        self.link.send(data)
        self.flush()

    def say(self, text: str) -> None:
        """Have gdb print a line; only while it waits for a stop."""
        self.send(b"O" + f"kvmpy: {text}\n".encode().hex().encode())

    def flush(self) -> None:
        """Send what waits to be sent."""
        out = self.link.take()
        if out and not self.lost:
            try:
                self.sock.sendall(out)
            except OSError:  # gone, or it does not read
                self.lost = True


class _Door:
    """The listening socket, while the guest runs without gdb: somebody at it stops the guest."""

    def __init__(self, sock: socket.socket) -> None:
        self.fileno = sock.fileno

    def interrupted(self) -> bool:
        """Yes: somebody is there."""
        return True


def serve(
    machine: Any, address: str | int | Address, announce: Callable[[str], object] | None = None
) -> Result | None:
    """Let gdb debug a machine that is stopped: what the guest came to, None if gdb killed it.

    `machine` is a `Machine`; `address` is PORT, HOST:PORT or unix:PATH. `announce` gets a line
    whenever gdb is waited for. Raises what `listen` raises, and what a device raises.
    """
    door, where = listen(address if isinstance(address, Address) else parse_address(address))
    say = announce or (lambda text: None)
    try:
        return _Server(machine, door, where, say).run()
    finally:
        door.close()
        if where.path:
            where.unlink()


class _Server:
    def __init__(
        self, machine: Any, door: socket.socket, where: Address, say: Callable[[str], object]
    ) -> None:
        self.door, self.where, self.say = door, where, say
        self.control = Control(machine, probe_host())
        self.stub = Stub(GuestTarget(self.control, Monitor(self.control, machine)))

    def run(self) -> Result | None:
        try:
            self.say(f"waiting for gdb on {self.where}: target remote {self.where.target}")
            while True:
                over = self._session()
                if over == "detached":
                    over = self._go_alone()
                if isinstance(over, Ended):
                    return over.result
                if isinstance(over, Failed):
                    raise over.error
                if over == "killed":
                    return None
                if over == "lost":
                    self.say(f"gdb is gone, the guest is stopped; waiting on {self.where}")
        finally:
            self.control.release()

    def _session(self) -> _Over:
        readable([self.door.fileno()])
        sock, _ = self.door.accept()
        with sock:
            sock.settimeout(_PATIENCE)
            if not self.where.path:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock)
            try:
                return self._talk(connection)
            finally:
                self.control.points.clear()
                self.control.memory.physical = False

    def _talk(self, connection: _Connection) -> _Over:
        while (event := connection.next()) is not None:
            if event.kind == "interrupt":
                continue  # it is stopped already
            answer = self.stub.handle(event.data) if event.kind == "packet" else b"E16"
            match answer:
                case Resume() if connection.lost:
                    break  # nobody would ever stop it
                case Resume(actions):
                    over = self._resume(connection, actions)
                    if over is not None:
                        return over
                case NoAcks():
                    connection.send(b"OK")
                    connection.link.acks = False
                case Detach():
                    connection.send(b"OK")
                    return "detached"
                case Kill(reply):
                    if reply:
                        connection.send(reply)
                    return "killed"
                case _:
                    connection.send(answer)
        return "lost"

    def _resume(self, connection: _Connection, actions: dict[int, Action]) -> _Over | None:
        try:
            came = self.control.resume(actions, connection)
        except (ConfigError, UnsupportedError) as error:
            came = Stop(min(actions, default=0), SIGTRAP, text=str(error))
        except Exception as error:
            came = Failed(0, error)
        if isinstance(came, Ended):
            connection.send(b"W%02x" % _status(came.result))
            return came
        if isinstance(came, Failed):
            connection.send(b"X%02x" % SIGABRT)
            return came
        if came.text:
            connection.say(came.text)
        connection.send(self.stub.stopped(came))
        return None

    def _go_alone(self) -> _Over:
        """Run without gdb, until the guest ends, or somebody is at the door."""
        actions = {cpu: Action("c") for cpu in range(self.control.count)}
        self.say(f"gdb has detached, the guest goes on; waiting on {self.where}")
        came = self.control.resume(actions, _Door(self.door))
        if isinstance(came, Stop):
            if came.text:
                self.say(f"the guest is stopped: {came.text}")
            self.stub.stopped(came)
        return came


def _status(result: Result) -> int:
    """The exit status, as `kvmpy run` has it."""
    return exit_status(result.value or 0) if result.outcome == "debug-exit" else 0
