"""The worker process: hangs, crashes, threads, forks, signals, descriptors, its end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmpy.asm import assemble, client
from kvmpy.errors import AssemblyError

ROOT = Path(__file__).parents[1]
HANG = "start: nop\n.fill 510-(.-start), 1, 0"
CRASH = ".text"
BOTH_DIE = "mov ah, r8b"
"""An instruction that Keystone aborts on, and that reaches it by way of `assemble`."""


def fresh(number):
    """An instruction that no test has asked for, so that it is not answered from a cache."""
    return f"mov rax, {0x1234567800000000 + number}"


def run_script(script):
    """Run a script in a process of its own; its standard output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def wait_for_end(pid):
    """Wait until a process is gone or a zombie of another parent's."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_the_worker_stays_warm():
    assemble(fresh(1))
    pid = client.worker_pid()
    assemble(fresh(2))
    assert client.worker_pid() == pid


def test_a_hang_is_killed_and_named_and_the_next_request_works():
    with pytest.raises(client.WorkerHung) as caught:
        client.encode([(64, "nop", None), (64, HANG, None)], 0.3)
    assert caught.value.index == 1
    assert client.encode([(64, "hlt", None)], 10).answers[0].code == b"\xf4"


def test_a_crash_is_named_and_the_next_request_works():
    with pytest.raises(client.WorkerDied) as caught:
        client.encode([(64, "nop", None), (64, CRASH, None)], 10)
    assert caught.value.index == 1
    assert not isinstance(caught.value, client.WorkerHung)
    assert client.encode([(64, "hlt", None)], 10).answers[0].code == b"\xf4"


def test_a_crash_of_keystone_is_an_assembly_error_with_its_line():
    with pytest.raises(AssemblyError, match="crashes") as caught:
        assemble(f"nop\n{BOTH_DIE} # here\n{fresh(3)}")
    assert (caught.value.line, caught.value.text) == (2, f"{BOTH_DIE} # here")
    assert assemble(fresh(4))


def test_a_hang_of_keystone_is_an_assembly_error_with_its_line(monkeypatch):
    real = client.encode

    def hang(queries, seconds):
        return real([queries[0], (64, HANG, None)], seconds)

    monkeypatch.setattr("kvmpy.asm.layout.encode", hang)
    with pytest.raises(AssemblyError, match="too long") as caught:
        assemble(f"{fresh(5)}\n{fresh(6)}", timeout=0.3)
    assert caught.value.line == 2
    monkeypatch.undo()
    assert assemble(fresh(5))


def test_a_worker_killed_while_idle_is_replaced():
    assemble(fresh(7))
    pid = client.worker_pid()
    os.kill(pid, signal.SIGKILL)
    assert len(assemble(fresh(8))) == 10
    assert client.worker_pid() != pid


def test_workers_killed_at_work_do_not_disturb():
    stop = threading.Event()

    def kill():
        while not stop.wait(0.15):
            pid = client.worker_pid()
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                stop.wait(1.5)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for number in range(20):
            source = "\n".join(fresh(100 + 50 * number + each) for each in range(50))
            assert len(assemble(source, timeout=20)) == 500
    finally:
        stop.set()
        killer.join()


def test_threads_share_the_worker():
    def work(number):
        program = assemble(f"{fresh(2000 + number)}; .byte {number}", at=number)
        return program[-1] == number and program.origin == number

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(100)))


def test_a_hang_in_one_thread_spares_the_others(monkeypatch):
    with ThreadPoolExecutor(2) as pool:
        hung = pool.submit(client.encode, [(64, HANG, None)], 0.5)
        time.sleep(0.1)
        others = [pool.submit(assemble, fresh(2200 + each)) for each in range(3)]
        assert isinstance(hung.exception(), client.WorkerHung)
        assert all(len(other.result()) == 10 for other in others)


def test_descriptors_and_children_do_not_pile_up():
    assemble(fresh(9))
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(client.WorkerDied):
            client.encode([(64, CRASH, None)], 10)
        client.encode([(64, "nop", None)], 10)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert children.count(str(client.worker_pid())) == 1
    states = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children
    ]
    assert "Z" not in states


def test_an_interrupt_leaves_no_answer_behind():
    assemble(fresh(10))
    script = f"""
    import os, signal, threading, time
    from kvmpy.asm import assemble, client
    client.encode([(64, "nop", None)], 10)
    first = client.worker_pid()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        client.encode([(64, "nop", None), (64, {HANG!r}, None)], 10)
    except KeyboardInterrupt:
        print("interrupted")
    assert client.worker_pid() is None
    print(client.encode([(64, "hlt", None)], 10).answers[0].code.hex())
    """
    assert run_script(script).split() == ["interrupted", "f4"]


def test_a_terminal_interrupt_does_not_reach_the_worker():
    assemble(fresh(11))
    pid = client.worker_pid()
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) != os.getpgid(0)


def test_a_fork_gets_a_worker_of_its_own():
    script = """
    import os, warnings
    from kvmpy.asm import assemble, client
    assemble("mov eax, 1")
    ours = client.worker_pid()
    child = os.fork()
    if child == 0:
        fine = client.worker_pid() is None and assemble("mov eax, 2")
        fine = fine and client.worker_pid() != ours
        client._shared.discard()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert assemble("mov eax, 3") and client.worker_pid() == ours
    print("done")
    """
    assert run_script(script) == "done\n"


def test_it_works_with_closed_standard_streams():
    script = """
    import os
    copy = os.dup(1)
    for number in (0, 1, 2):
        os.close(number)
    from kvmpy.asm import assemble, client
    code = assemble("mov eax, 1").hex()
    taken = [number for number in (0, 1, 2) if os.path.exists(f"/proc/self/fd/{number}")]
    os.write(copy, f"{code} {taken}".encode())
    client._shared.discard()
    os._exit(0)
    """
    assert run_script(script) == "b801000000 []"


@pytest.mark.parametrize("busy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_worker_ends_with_its_parent(busy):
    script = f"""
    import os, threading, time
    from kvmpy.asm import client
    client.encode([(64, "nop", None)], 10)
    print(client.worker_pid(), flush=True)
    if {busy}:
        threading.Thread(
            target=lambda: client.encode([(64, {HANG!r}, None)], 1.0), daemon=True
        ).start()
        time.sleep(0.2)
    os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert wait_for_end(int(done.stdout))


def test_a_normal_exit_leaves_no_worker():
    script = """
    from kvmpy.asm import assemble, client
    assemble("mov eax, 1")
    print(client.worker_pid())
    """
    assert not Path(f"/proc/{run_script(script).strip()}").exists()


def test_a_missing_keystone_is_explained():
    script = """
    import sys
    sys.path = [entry for entry in sys.path if "site-packages" not in entry]
    from kvmpy.asm import client
    from kvmpy.errors import AssemblyError
    try:
        client.encode([(64, "nop", None)], 10)
    except AssemblyError as error:
        print(error)
    """
    assert "keystone-engine" in run_script(script)
