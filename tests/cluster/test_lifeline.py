"""Either end of a lifeline notices that the other is gone, with real processes and real signals."""

import os
import signal
import socket
import subprocess
import sys
import time

from harness.cluster.lifeline import Lifeline

WORKER = """
import sys, time
from harness.cluster.lifeline import hold
hold((sys.argv[1], int(sys.argv[2]), sys.argv[3]), int(sys.argv[4]))
print("held", flush=True)
time.sleep(600)
"""


def worker(lifeline: Lifeline, number: int) -> subprocess.Popen:
    address = [str(part) for part in lifeline.address]
    process = subprocess.Popen([sys.executable, "-c", WORKER, *address, str(number)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_both_ends() -> None:
    lifeline = Lifeline("127.0.0.1")
    first, second = worker(lifeline, 0), worker(lifeline, 7)
    assert lifeline.gone() == set()
    assert lifeline.wait_until_gone(0.1) == {0, 7}
    os.kill(second.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not lifeline.gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lifeline.gone() == {7}
    lifeline.close()
    assert first.wait(30) == 1
    second.wait()
    assert lifeline.wait_until_gone(30) == set()


def test_strangers_are_not_workers() -> None:
    lifeline = Lifeline("127.0.0.1")
    with socket.create_connection(lifeline.address[:2], timeout=30) as stranger:
        stranger.sendall(b"0" * 40)
        assert stranger.recv(1) == b""  # hung up on
    assert lifeline.wait_until_gone(0) == set()
    lifeline.close()
