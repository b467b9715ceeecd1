"""Running vCPUs on threads of their own, while the main thread waits for what comes."""

import os
import signal
import threading
import time

import pytest

from kvmpy.gdb.crew import run_together

PATIENCE = 20.0


class Silent:
    """A pipe that nobody writes to, but the test that gives up."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def fileno(self) -> int:
        return self.read_end

    def interrupted(self) -> bool:
        return True


def test_ctrl_c_that_another_thread_takes_is_not_lost() -> None:
    """Of a process's signals, the kernel may give any to a thread that takes one of its own."""
    silent, kicked, over = Silent(), threading.Event(), threading.Event()
    gave_up = []

    def work() -> None:
        time.sleep(0.2)  # the main thread is waiting now
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if not over.wait(PATIENCE):
            gave_up.append(True)
            os.write(silent.write_end, b"\0")

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_together(
            [0], lambda cpu: kicked.wait(2 * PATIENCE) and None, lambda cpu: kicked.set(), silent
        )
    over.set()
    thread.join()
    os.close(silent.read_end)
    os.close(silent.write_end)
    assert kicked.is_set() and not gave_up
