"""What is found out once in each process."""

import os
import threading

from kvmpy.once import Once


def test_it_is_found_out_once_and_again_when_forgotten() -> None:
    kept, found = Once[int](), iter(range(10))
    assert [kept.get(lambda: next(found)) for _ in range(3)] == [0, 0, 0]
    kept.forget()
    assert kept.get(lambda: next(found)) == 1


def test_threads_that_ask_at_the_same_time_each_get_a_value() -> None:
    kept, together = Once[int](), threading.Barrier(4, timeout=30)
    got: list[int] = []

    def ask() -> None:
        got.append(kept.get(lambda: together.wait() * 0 + 7))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [7] * 4


def test_the_child_of_a_fork_finds_out_its_own() -> None:
    kept = Once[int]()
    assert kept.get(os.getpid) == os.getpid()
    child = os.fork()
    if child == 0:
        os._exit(0 if kept.get(os.getpid) == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0
