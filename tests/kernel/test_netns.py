"""Named network namespaces and working in them."""

import os
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from namespaces import DEADLINE_S, namespace, open_descriptors

from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError


def here():
    return netns.identity(netns.CURRENT)


def mounts():
    return {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}


def test_a_namespace_is_made_named_and_gone_without_a_trace():
    name = f"tg-test-{os.getpid()}-trace"
    before = mounts()
    path = netns.create(name)
    try:
        assert path == netns.path(name)
        assert name in netns.names()
        assert netns.identity(path) != here()
    finally:
        netns.delete(name)
    assert name not in netns.names()
    assert mounts() == before
    netns.delete(name)


def test_a_name_that_is_taken_is_refused_and_keeps_its_namespace(new_namespace):
    path = new_namespace()
    identity = netns.identity(path)
    with pytest.raises(KernelError, match="already exists"):
        netns.create(Path(path).name)
    assert netns.identity(path) == identity


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../etc", "a\0b", "a b", "x" * 65])
def test_what_is_no_name_never_becomes_a_path(name):
    for function in (netns.path, netns.create, netns.delete):
        with pytest.raises(KernelError, match="is not a name"):
            function(name)


def test_the_function_runs_inside_and_the_caller_stays_where_it_was(new_namespace):
    path = new_namespace()
    before = here()
    assert netns.run_in(path, here) == netns.identity(path)
    assert here() == before


def test_a_function_that_fails_inside_leaves_no_thread_behind(new_namespace):
    path = new_namespace()
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        netns.run_in(path, lambda: 1 // 0)
    assert threading.active_count() == threads
    # The kernel's task ends a moment after Python's thread.
    deadline = time.monotonic() + DEADLINE_S
    while tasks_in(netns.identity(path)):
        assert time.monotonic() < deadline


def tasks_in(identity):
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            if netns.identity(str(task / "ns" / "net")) == identity:
                found.append(task.name)
        except KernelError:
            continue
    return found


@pytest.mark.parametrize("path", ["/run/netns/tg-test-nowhere", "/proc/self/ns/uts", "/dev/null"])
def test_a_path_without_a_network_namespace_is_refused_by_name(path):
    with pytest.raises(KernelError, match=path):
        netns.run_in(path, here)


def test_many_threads_in_many_namespaces_each_see_their_own():
    with namespace() as first, namespace() as second:
        paths = [first, second] * 20
        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(lambda path: netns.run_in(path, here), paths))
        assert seen == [netns.identity(path) for path in paths]


def test_a_thousand_visits_leave_no_descriptor_and_no_thread(new_namespace):
    path = new_namespace()
    before = open_descriptors(), threading.active_count()
    for _ in range(1000):
        netns.run_in(path, int)
    assert (open_descriptors(), threading.active_count()) == before


def test_a_nameless_namespace_is_new_and_dies_with_its_function():
    assert netns.run_in_new(here) != here()


@pytest.mark.parametrize("fails", [False, True], ids=["", "that fails"])
def test_from_inside_another_one_a_nameless_namespace_is_left_again_by_the_same_thread(
    new_namespace, fails
):
    path = new_namespace()

    def visit():
        place = here(), threading.get_ident()
        if fails:
            raise LookupError(place)
        return place

    def inside():
        try:
            place = netns.run_in_new(visit)
        except LookupError as error:
            (place,) = error.args
        return place, (here(), threading.get_ident())

    (there, thread), (back, same) = netns.run_in(path, inside)
    assert there not in (back, here())
    assert back == netns.identity(path)
    assert thread == same


@pytest.fixture
def supplementary_group():
    groups = os.getgroups()
    os.setgroups([*groups, 4242])
    yield
    os.setgroups(groups)


@pytest.mark.usefixtures("supplementary_group")
def test_a_process_starts_inside_as_its_user_and_is_found_there(new_namespace):
    path = new_namespace()
    process = netns.spawn(
        path, ["sleep", "1000"], user=5995, group=5995, start_new_session=True, env={"A": "b"}
    )
    try:
        assert netns.pids(path) == (process.pid,)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "Uid:\t5995\t5995\t5995\t5995" in status
        assert "Gid:\t5995\t5995\t5995\t5995" in status
        assert [line.split()[1:] for line in status.splitlines() if "Groups:" in line] == [[]]
        assert os.getsid(process.pid) == process.pid
        assert Path(f"/proc/{process.pid}/environ").read_text() == "A=b\0"
    finally:
        process.kill()
        process.wait()
    assert netns.pids(path) == ()


def test_a_process_inherits_the_descriptor_that_it_is_given(new_namespace):
    path = new_namespace()
    with tempfile.TemporaryFile() as given:
        process = netns.spawn(
            path,
            ["readlink", "/proc/self/ns/net", f"/proc/self/fd/{given.fileno()}"],
            pass_fds=(given.fileno(),),
            stdout=subprocess.PIPE,
        )
        output, _ = process.communicate(timeout=DEADLINE_S)
        inside, inherited = output.decode().splitlines()
        assert inside == f"net:[{netns.identity(path).inode}]"
        assert inherited == str(Path(f"/proc/self/fd/{given.fileno()}").readlink())


def test_a_program_that_does_not_exist_is_an_error_of_the_caller(new_namespace):
    with pytest.raises(FileNotFoundError):
        netns.spawn(new_namespace(), ["/no/such/program"])
