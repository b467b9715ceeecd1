"""Running several vCPUs at the same time, each on a thread, until one of them stops."""

import os
import queue
import select
import threading
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeAlias

from kvmpy.gdb.stops import Ended, Failed, Stop

__all__ = ["Came", "Watch", "readable", "run_together", "wants_stop"]

# Seconds after which Python looks for signals: one that a vCPU's thread took ends no poll here.
_BEAT: Final = 0.1

Came: TypeAlias = Stop | Ended | Failed


class Watch(Protocol):
    """What may end a run from outside: gdb's connection, or the socket where it may come in."""

    def fileno(self) -> int:
        """What to look at for something to read; -1 if there is nobody any more."""

    def interrupted(self) -> bool:
        """Whether it wants the guest to stop; asked when there was something to read."""


def readable(fds: Iterable[int], timeout: float | None = None) -> set[int]:
    """Which of these descriptors have something to read, or are at their end."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout is None else 1000 * timeout)}


def wants_stop(watch: Watch, timeout: float = 0.0) -> bool:
    """Whether a `watch` ends the run, within so many seconds."""
    fd = watch.fileno()
    return fd < 0 or (bool(readable([fd], timeout)) and watch.interrupted())


def run_together(
    cpus: Iterable[int],
    run: Callable[[int], Came | None],
    kick: Callable[[int], None],
    watch: Watch,
) -> tuple[list[Came], bool]:
    """Run each vCPU on a thread of its own until one stops; what came, in order.

    `run(cpu)` runs one until it stops, and gives None where it was only kicked; `kick(cpu)` has it
    do so, as often as it is called. A vCPU that ends by HLT does not stop the others.
    The other value is whether `watch` wanted the stop.
    """
    done: queue.SimpleQueue[tuple[int, Came | None]] = queue.SimpleQueue()
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def work(cpu: int) -> None:
        try:
            came = run(cpu)
        except BaseException as error:  # it belongs to the thread that waits
            came = Failed(cpu, error)
        done.put((cpu, came))
        os.write(write_end, b"\0")

    threads = {
        cpu: threading.Thread(target=work, args=(cpu,), name=f"vCPU {cpu}", daemon=True)
        for cpu in cpus
    }
    running, found, interrupted = set(threads), list[Came](), False
    try:
        for thread in threads.values():
            thread.start()
        while running:
            fd = watch.fileno()
            if fd < 0:
                interrupted = True
                break
            there = readable([read_end, fd], _BEAT)
            if read_end in there:
                os.read(read_end, len(threads))
            elif fd in there and watch.interrupted():
                interrupted = True
                break
            while not done.empty():
                cpu, came = done.get()
                running.discard(cpu)
                if came is not None:
                    found.append(came)
            if any(not _halted(came) for came in found):
                break
    finally:
        for cpu in running:
            _end(threads[cpu], cpu, kick)
        os.close(read_end)
        os.close(write_end)
    while not done.empty():
        _, came = done.get()
        if came is not None:
            found.append(came)
    return found, interrupted


def _halted(came: Came) -> bool:
    return isinstance(came, Ended) and came.result.outcome == "halt"


def _end(thread: threading.Thread, cpu: int, kick: Callable[[int], None]) -> None:
    """Kick until the thread is done: a kick can come while it is between two runs."""
    if thread.ident is None:
        return  # never started
    while thread.is_alive():
        kick(cpu)
        thread.join(0.02)
