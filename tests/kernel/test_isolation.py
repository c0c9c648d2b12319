"""Work in a process of its own: what comes back, and that nothing it does reaches the process that asked."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from namespaces import DEADLINE_S, namespace, open_descriptors

from tidegate.kernel import isolation, netns, nftables
from tidegate.kernel.errors import KernelError


def identity():
    return tuple(netns.identity(netns.CURRENT))


def children():
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def _nothing_grows():
    before = (open_descriptors(), children(), threading.active_count())
    yield
    assert (open_descriptors(), children(), threading.active_count()) == before


def test_the_work_runs_in_the_namespace_and_in_a_process_of_its_own(new_namespace):
    path = new_namespace()
    where, pid = isolation.run_in(path, lambda: (identity(), os.getpid()))
    assert where == list(netns.identity(path))
    assert pid != os.getpid()
    assert not Path(f"/proc/{pid}").exists()


def test_what_the_work_returns_comes_back(new_namespace):
    value = {"text": "ä", "bytes": b"\0\xff", "list": [1, None, True, 2.5], "empty": {}}
    assert isolation.run_in(new_namespace(), lambda one, two: [one, two], value, 7) == [value, 7]


def test_the_namespace_may_be_the_one_of_the_calling_thread(new_namespace):
    path = new_namespace()
    where = netns.run_in(path, isolation.run_in, netns.CURRENT, identity)
    assert where == list(netns.identity(path))


def test_an_answer_of_megabytes_comes_whole(new_namespace):
    assert isolation.run_in(new_namespace(), lambda: "x" * 5_000_000) == "x" * 5_000_000


def test_the_kernels_refusal_comes_with_its_message_and_its_number(new_namespace):
    def refuse():
        raise KernelError("the kernel said no", 42)

    with pytest.raises(KernelError, match=r"^the kernel said no$") as refused:
        isolation.run_in(new_namespace(), refuse)
    assert refused.value.errno == 42


def test_another_exception_is_told_by_its_name(new_namespace):
    def fail():
        raise ValueError("\udcff is odd")

    with pytest.raises(KernelError, match=r"^ValueError: \\udcff is odd$"):
        isolation.run_in(new_namespace(), fail)
    with pytest.raises(KernelError, match=r"^SystemExit: 3$"):
        isolation.run_in(new_namespace(), sys.exit, 3)


def test_what_cannot_be_sent_is_refused(new_namespace):
    with pytest.raises(KernelError, match="TypeError"):
        isolation.run_in(new_namespace(), object)


def test_a_namespace_that_is_gone_is_named():
    with namespace() as path:
        pass
    with pytest.raises(KernelError, match=path):
        isolation.run_in(path, identity)


def crash():
    ctypes.string_at(0)


def abort():
    os.abort()


def library_exit():
    ctypes.CDLL(None).exit(1)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "death"),
    [
        (crash, "crash died in a process of its own: killed by SIGSEGV"),
        (abort, "killed by SIGABRT"),
        (kill_itself, "killed by SIGKILL"),
        (library_exit, "exit status 1"),
    ],
)
def test_work_that_dies_is_told_by_what_it_died_of(new_namespace, work, death):
    with pytest.raises(KernelError, match=death):
        isolation.run_in(new_namespace(), work)


def hang():
    while True:
        signal.pause()


def close_the_answer_and_hang():
    os.closerange(3, 256)
    hang()


@pytest.mark.parametrize("work", [hang, close_the_answer_and_hang])
def test_work_that_hangs_is_killed(new_namespace, work):
    with pytest.raises(KernelError, match=f"{work.__name__} did not end in time and was killed"):
        isolation.run_in(new_namespace(), work, deadline_s=0.2)


def test_work_that_needs_too_much_memory_gets_an_error(new_namespace):
    with pytest.raises(KernelError, match="more than 256 MiB of memory are needed"):
        isolation.run_in(new_namespace(), lambda: len(bytearray(300 * 2**20)))
    assert isolation.run_in(new_namespace(), lambda: len(bytearray(100 * 2**20))) == 100 * 2**20


def test_work_that_says_too_much_gets_an_error(new_namespace, monkeypatch):
    monkeypatch.setattr(isolation, "ANSWER_BYTES", 2**20)
    with pytest.raises(KernelError, match="longer than 1 MiB"):
        isolation.run_in(new_namespace(), lambda: bytes(2**20))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"\xff\xff\xff\xff" + bytes(100), "take_over wants to say too much: 4294967295 bytes"),
        (b"\4\0\0\0\xc1\xc1\xc1\xc1", "take_over answered nonsense"),
        (b"\4\0\0\0", "take_over died in a process of its own: killed by SIGKILL"),
    ],
)
def test_work_that_was_taken_over_cannot_harm_the_process_that_asked(
    new_namespace, answer, problem
):
    def take_over():
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                os.write(int(entry.name), answer)
        kill_itself()

    with pytest.raises(KernelError, match=problem):
        isolation.run_in(new_namespace(), take_over)


def test_no_open_file_and_no_output_of_the_process_that_asked_is_within_reach(new_namespace, capfd):
    path = new_namespace()
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def look_around():
            os.write(1, b"to standard output")
            os.write(2, b"to standard error")
            found = []
            for entry in Path("/proc/self/fd").iterdir():
                with suppress(FileNotFoundError):
                    found.append(str(entry.readlink()).partition(":")[0])
            return sorted(found)

        found = isolation.run_in(path, look_around)
    assert sorted(found) == sorted(["/dev/null"] * 3 + [path, "pipe"])
    assert capfd.readouterr() == ("", "")


def test_signals_for_the_service_do_not_end_the_work(new_namespace):
    def signalled():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        return "still here"

    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append("in the parent"))
    try:
        assert isolation.run_in(new_namespace(), signalled) == "still here"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_signal_while_the_work_runs_reaches_the_process_that_asked_and_ends_the_work(
    new_namespace,
):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    path = new_namespace()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Stopped):
            isolation.run_in(path, signal.pause)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_work_ends_with_the_process_that_asked(new_namespace):
    path = new_namespace()
    read_end, write_end = os.pipe()
    asking = os.fork()
    if asking == 0:
        try:
            isolation.run_in(path, tell_pid_and_pause, f"/proc/{os.getpid()}/fd/{write_end}")
        finally:
            os._exit(0)
    os.close(write_end)
    pid = int(os.read(read_end, 16))
    os.kill(asking, signal.SIGKILL)
    os.waitpid(asking, 0)
    # The work's process is the last that has the pipe open.
    os.set_blocking(read_end, True)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    deadline = time.monotonic() + DEADLINE_S
    while is_alive(pid):
        assert time.monotonic() < deadline
        os.sched_yield()


def tell_pid_and_pause(pipe):
    descriptor = os.open(pipe, os.O_WRONLY)
    os.write(descriptor, str(os.getpid()).encode())
    signal.pause()


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_many_threads_at_once_get_each_their_own_answer(new_namespace):
    paths = [new_namespace() for _ in range(4)]

    def ask(number):
        if number % 5 == 0:
            with pytest.raises(KernelError, match="SIGSEGV"):
                isolation.run_in(paths[number % 4], crash)
            return None
        where, told = isolation.run_in(paths[number % 4], lambda: (identity(), number))
        assert where == list(netns.identity(paths[number % 4]))
        return told

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(ask, range(120)))
    assert told == [None if number % 5 == 0 else number for number in range(120)]


def test_locks_that_other_threads_hold_at_the_fork_do_no_harm_to_libnftables(new_namespace):
    path = new_namespace()
    netns.run_in(path, nftables.load, "add table inet tg-nft")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            netns.run_in(path, nftables.list_text, "inet", "tg-nft")

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(work)
        try:
            for _ in range(40):
                assert "tg-nft" in isolation.run_in(path, nftables.list_text, "inet", "tg-nft")
        finally:
            stop.set()
