"""A client of GDB's remote serial protocol for tests, and a machine that is served to it."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from kvmpy.gdb.description import NUMBERS, REGISTERS
from kvmpy.gdb.packets import frame
from kvmpy.machine import Machine
from kvmpy.result import Result

PATIENCE = 10.0


class Client:
    """Speaks to a server of the protocol, and knows nothing of kvmpy's but register numbers."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.buffer = b""
        self.said = ""
        try:
            self.sock.connect(path)
            assert self.ask(b"QStartNoAckMode") == b"OK"
            self.sock.sendall(b"+")
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(frame(data))

    def receive(self) -> bytes:
        """The next packet; what the server has to say is kept in `said`."""
        while True:
            start = self.buffer.find(b"$")
            end = self.buffer.find(b"#", start)
            if start >= 0 and 0 < end <= len(self.buffer) - 3:
                data, self.buffer = self.buffer[start + 1 : end], self.buffer[end + 3 :]
                if data[:1] == b"O" and data != b"OK":
                    self.said += bytes.fromhex(data[1:].decode()).decode()
                    continue
                return data
            more = self.sock.recv(65536)
            if not more:
                raise ConnectionError("the server is gone")
            self.buffer += more

    def ask(self, data: bytes) -> bytes:
        self.send(data)
        return self.receive()

    def waits(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        return not self.buffer and not select.select([self.sock], [], [], seconds)[0]

    def interrupt(self) -> None:
        self.sock.sendall(b"\x03")

    def register(self, name: str) -> int:
        reply = self.ask(b"p%x" % NUMBERS[name])
        return int.from_bytes(bytes.fromhex(reply.decode()), "little")

    def set_register(self, name: str, value: int) -> bytes:
        number = NUMBERS[name]
        data = value.to_bytes(REGISTERS[number].size, "little").hex()
        return self.ask(b"P%x=%b" % (number, data.encode()))

    def memory(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(b"m%x,%x" % (address, size)).decode())

    def stop_at(self, address: int, action: bytes = b"vCont;c") -> bytes:
        """Run until a software breakpoint there; the stop reply."""
        assert self.ask(b"Z0,%x,1" % address) == b"OK"
        reply = self.ask(action)
        assert self.ask(b"z0,%x,1" % address) == b"OK"
        return reply

    def monitor(self, line: str) -> str:
        reply = self.ask(b"qRcmd," + line.encode().hex().encode())
        return bytes.fromhex(reply.decode()).decode()


class Served:
    """A machine under gdb, on a thread; `lines` are what it announces."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self.machine, self.path = machine, str(path)
        self.lines: list[str] = []
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        self.wait(lambda: bool(self.lines))

    def _serve(self) -> None:
        try:
            self.result = self.machine.gdb(f"unix:{self.path}", self.lines.append)
        except BaseException as error:
            self.error = error

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition() and self.thread.is_alive():
            assert time.monotonic() < end, "it takes too long"
            time.sleep(0.002)

    def client(self) -> Client:
        return Client(self.path)

    def end(self) -> None:
        """The guest's end, whatever became of the test."""
        if self.thread.is_alive():
            try:
                with self.client() as client:
                    client.send(b"k")
                    self.thread.join(PATIENCE)
            except OSError:
                pass
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextmanager
def served(tmp_path: Path, code: bytes, at: int = 0x1000, **options: Any) -> Iterator[Served]:
    """A machine with `code` loaded, served at a socket in `tmp_path`."""
    with Machine("1M", **options) as machine:
        machine.load(code, at=at)
        one = Served(machine, tmp_path / "gdb")
        try:
            yield one
        finally:
            one.end()
