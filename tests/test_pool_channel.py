"""Messages between processes that are killed in the midst of them. No guest runs here."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.pool.channel import Channel, death_of, pair

SENDER = """
import os, signal, socket, struct, sys, time
from kvmpy.pool.channel import Channel
end = socket.socket(fileno=int(sys.argv[1]))
Channel(end).send(b"whole")
end.sendall(struct.pack("<Q", 1 << 20) + bytes(1000))
if os.fork() == 0:  # what holds the end open, whatever becomes of its parent
    os.execvp("sleep", ["sleep", "60"])
print("sent", flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@contextmanager
def sender(how: str) -> Iterator[tuple[Channel, "subprocess.Popen[bytes]"]]:
    """A process that has sent a message and a part of one, and has a child with its descriptors."""
    ours, theirs = pair()
    with theirs:
        os.set_inheritable(theirs.fileno(), True)
        process = subprocess.Popen(
            [sys.executable, "-c", SENDER, str(theirs.fileno()), how],
            pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    nothing, sentinel = os.pipe()
    death = death_of(process.pid, nothing)
    os.close(sentinel)
    os.close(nothing)
    with ours, process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"sent\n"
            yield Channel(ours, death), process
        finally:
            os.killpg(process.pid, 9)
            os.close(death)


@pytest.mark.timeout(20)
def test_the_rest_of_a_message_is_not_waited_for_when_its_sender_is_dead() -> None:
    with sender("killed") as (channel, _):
        assert channel.receive() == b"whole"
        with pytest.raises(EOFError):
            channel.receive()


@pytest.mark.timeout(20)
def test_a_sender_may_be_killed_while_one_waits_for_it() -> None:
    with sender("waits") as (channel, process):
        assert channel.receive() == b"whole"
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        with pytest.raises(EOFError):
            channel.receive()
        timer.join()


@pytest.mark.timeout(20)
def test_nor_is_room_for_a_message_to_one_that_is_dead() -> None:
    with sender("waits") as (channel, process):
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        with pytest.raises((EOFError, OSError)):
            channel.send(bytes(64 << 20))
        timer.join()


@given(st.lists(st.binary(max_size=50) | st.sampled_from([bytes(1 << 20), b"ab" * 500_000])))
def test_messages_arrive_as_they_were(messages: list[bytes]) -> None:
    one, other = pair()
    never, writer = os.pipe()
    with one, other:
        sending, receiving = Channel(one), Channel(other, never)
        thread = threading.Thread(target=lambda: [sending.send(data) for data in messages])
        thread.start()
        assert [receiving.receive() for _ in messages] == messages
        thread.join()
        sending.close()
        with pytest.raises(EOFError):
            receiving.receive()
    os.close(never)
    os.close(writer)
