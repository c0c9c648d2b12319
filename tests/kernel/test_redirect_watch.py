"""The watcher tells which namespaces somebody has changed nftables in, soon and at a bounded rate."""

import gc
import os
import select
import signal
import subprocess
import time

import pytest
from namespaces import DEADLINE_S, namespace, open_descriptors

from tidegate.enforce.redirect.watch import Watcher
from tidegate.kernel import netns, nftables
from tidegate.kernel.errors import KernelError


@pytest.fixture
def watcher():
    made = Watcher()
    yield made
    made.close()


def change(netns_path, table="somebodys"):
    """What another program does: a process of its own."""
    process = netns.spawn(netns_path, ["nft", "add", "table", "inet", table], stdout=None)
    assert process.wait(DEADLINE_S) == 0


def told(watcher, deadline_s=DEADLINE_S):
    """What the watcher tells next, () when it does not in time."""
    deadline = time.monotonic() + deadline_s
    while (rest := deadline - time.monotonic()) > 0:
        if select.select([watcher], [], [], rest)[0] and (paths := watcher.changed()):
            return paths
    return ()


def is_quiet(watcher):
    """Whether nothing is left to tell, even after a rest."""
    return told(watcher, 0.3) == ()


def test_a_change_by_another_program_wakes(watcher, new_namespace):
    path = new_namespace()
    watcher.watch(path)
    change(path)
    assert told(watcher) == (path,)
    assert is_quiet(watcher)


def test_only_the_namespace_that_was_changed_is_told(watcher, new_namespace):
    changed, other, unwatched = new_namespace(), new_namespace(), new_namespace()
    watcher.watch(changed)
    watcher.watch(other)
    change(unwatched)
    change(changed)
    assert told(watcher) == (changed,)
    assert is_quiet(watcher)


def test_every_kind_of_change_wakes(watcher, new_namespace):
    path = new_namespace()
    netns.run_in(path, nftables.load, "table inet t { chain c { }\n }")
    watcher.watch(path)
    for command in (
        "add rule inet t c accept",
        "flush table inet t",
        "delete table inet t",
    ):
        netns.run_in(path, nftables.load, command)
        assert told(watcher) == (path,), command


def test_a_change_that_comes_while_the_namespace_rests_is_told_as_well(watcher, new_namespace):
    path = new_namespace()
    watcher.watch(path)
    for number in range(3):
        change(path, f"t{number}")
        assert told(watcher) == (path,)


def test_many_changes_before_it_is_asked_are_told_once(watcher, new_namespace):
    path = new_namespace()
    watcher.watch(path)
    for number in range(20):
        netns.run_in(path, nftables.load, f"add table inet t{number}")
    assert told(watcher) == (path,)
    assert is_quiet(watcher)


def test_many_namespaces_are_told_apart(watcher, new_namespace):
    paths = [new_namespace() for _ in range(60)]
    for path in paths:
        watcher.watch(path)
    for path in paths[::7]:
        netns.run_in(path, nftables.load, "add table inet t")
    heard = set()
    while heard != set(paths[::7]):
        more = told(watcher)
        assert more, f"only heard of {heard}"
        heard.update(more)
    assert is_quiet(watcher)


def test_a_flood_wakes_at_a_bounded_rate_and_hides_no_other_namespace(watcher, new_namespace):
    noisy, other = new_namespace(), new_namespace()
    watcher.watch(noisy)
    watcher.watch(other)
    shell = "while :; do echo add table inet t; echo delete table inet t; done | nft -i"
    flood = netns.spawn(
        noisy,
        ["sh", "-c", shell],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert told(watcher) == (noisy,)
        netns.run_in(other, nftables.load, "add table inet t")
        heard, wakes, began = set(), 0, time.monotonic()
        while other not in heard or time.monotonic() - began < 1:
            more = told(watcher)
            assert more, "the flood came to an end by itself"
            wakes += 1
            heard.update(more)
        # One rest between any two of them, and one more for the other namespace.
        assert wakes <= (time.monotonic() - began) / 0.1 + 3
    finally:
        os.killpg(flood.pid, signal.SIGKILL)
        flood.wait(DEADLINE_S)
    while told(watcher, 0.3):
        pass
    change(noisy, "after")
    assert told(watcher) == (noisy,)


def test_events_that_were_lost_are_a_change(watcher, new_namespace):
    path = new_namespace()
    watcher.watch(path)
    # More than the socket has room for.
    commands = "\n".join(f"add table inet t{number}" for number in range(2000))
    netns.run_in(path, nftables.load, commands)
    assert told(watcher) == (path,)
    assert is_quiet(watcher)


def test_what_is_forgotten_is_not_told_and_dies(watcher):
    with namespace() as path:
        watcher.watch(path)
        change(path)
        watcher.forget(path)
        assert is_quiet(watcher)
        watcher.watch(path)
        held = open_descriptors()
        watcher.forget(path)
        assert open_descriptors() == held - 1
        watcher.forget(path)


def test_watching_twice_is_watching_once(watcher, new_namespace):
    path = new_namespace()
    watcher.watch(path)
    before = open_descriptors()
    change(path)
    watcher.watch(path)
    assert open_descriptors() == before
    assert told(watcher) == (path,)


def test_a_path_that_is_gone_or_names_another_namespace_is_stale(watcher, new_namespace):
    path = new_namespace()
    watcher.watch(path)
    watcher.watch(new_namespace())
    assert watcher.stale() == ()
    name = path.rpartition("/")[2]
    netns.delete(name)
    assert watcher.stale() == (path,)
    netns.create(name)
    assert watcher.stale() == (path,)
    watcher.watch(path)
    assert watcher.stale() == ()
    change(path)
    assert told(watcher) == (path,)


def test_a_namespace_that_is_not_there_is_refused_and_not_watched(watcher):
    before = open_descriptors()
    with pytest.raises(KernelError, match="no network namespace at /run/netns/tg-none"):
        watcher.watch("/run/netns/tg-none")
    assert watcher.stale() == ()
    assert open_descriptors() == before


def test_no_descriptor_is_left_behind(new_namespace):
    paths = [new_namespace() for _ in range(5)]
    gc.collect()
    before = open_descriptors()
    for _ in range(20):
        watcher = Watcher()
        for path in paths:
            watcher.watch(path)
        watcher.forget(paths[0])
        watcher.close()
    assert open_descriptors() == before
