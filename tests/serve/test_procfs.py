"""What is asked of processes that may end at any moment."""

import os
import subprocess
import threading

from twotower.serve.procfs import descendants, memory_bytes


def test_processes_that_end_meanwhile_are_no_error() -> None:
    done = threading.Event()

    def start_many() -> None:
        for _ in range(1000):
            # A shell and what it starts: a child that ends while its own children are looked for.
            subprocess.run(["sh", "-c", "true & true & wait"], check=True)
        done.set()

    thread = threading.Thread(target=start_many)
    thread.start()
    while not done.is_set():
        assert memory_bytes([os.getpid(), *descendants(os.getpid())]) > 0
    thread.join()
