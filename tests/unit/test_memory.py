"""An agent's many short-lived threads share one arena of glibc's."""

import subprocess
import sys

PROGRAM = """
import asyncio, contextlib, ctypes, sys, threading
from tidegate.node import running

THREADS = 8
libc = ctypes.CDLL(None)

class Begun(Exception):
    pass

def begun(_config):
    raise Begun

if sys.argv[1] == "agent":
    # What an agent does first, before it touches anything.
    running._make_directories = begun
    with contextlib.suppress(Begun):
        asyncio.run(running.run_agent(None))

meeting = threading.Barrier(THREADS)

def work():
    libc.malloc(4000)
    meeting.wait()

threads = [threading.Thread(target=work) for _ in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def arenas(of):
    """How many arenas a process has whose threads allocate at the same time (malloc_info(3))."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, of], text=True, capture_output=True, check=True
    )
    return done.stdout.count("<heap nr=")


def test_an_agent_has_one_arena():
    assert arenas("agent") == 1


def test_without_being_told_every_thread_would_have_one_of_its_own():
    assert arenas("nothing") > 2
