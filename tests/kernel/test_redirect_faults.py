"""Redirection when things go wrong: refusals, kills, other programs' hands, namespaces that vanish, long use.

The number of cycles of the last test is 200; TIDEGATE_SOAK=1 makes it 2,000.
"""

import contextlib
import gc
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import consul_rules
import msgspec
import psutil
import pytest
from namespaces import DEADLINE_S, namespace, open_descriptors
from rulesets import parts, ruleset

from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Engine
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    IdRange,
    Inbound,
    Outbound,
    Policy,
    PortRange,
    Proxy,
)
from tidegate.kernel import legacy_tables, nf_tables, nf_transaction, xtables
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import NLM_F_CREATE, attribute, text_attribute
from tidegate.kernel.nfnetlink import Request

CYCLES = 2000 if os.environ.get("TIDEGATE_SOAK") else 200
KILLS = 30
NAMESPACES = 50
GROWTH_BYTES = 8 * 2**20

OLD = Policy(
    inbound=Inbound(exclude_ports=(PortRange(9000, 9100), PortRange(9999, 9999))),
    outbound=Outbound(exclude_cidrs=("10.0.0.0/8", "192.0.2.0/24", "fd00::/8")),
)
NEW = Policy(
    proxy=Proxy(uids=(5995, 5996)),
    outbound=Outbound(
        exclude_ports=tuple(PortRange(port, port) for port in range(1000, 1200, 2)),
        exclude_uids=(IdRange(1000, 1009), IdRange(33, 33)),
    ),
    dns=Dns(enabled=True),
    drop_invalid=True,
)


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces."""
    return new_namespace()


@pytest.fixture(params=tuple(BackendName))
def redirecting(request):
    """An engine of each backend."""
    return Engine(request.param)


@pytest.fixture
def refuse_half_way(monkeypatch):
    """Has the kernel refuse the last of what a backend loads."""

    @contextlib.contextmanager
    def refusing(backend):
        with monkeypatch.context() as patched:
            REFUSALS[backend](patched)
            yield

    return refusing


def refuse_a_transaction(patched):
    run = nf_transaction.run
    # linux/netfilter/nf_tables.h: a chain of type nat in the hook forward, which there is not.
    hook = attribute(1, (2).to_bytes(4, "big")) + attribute(2, bytes(4))
    chain = (
        text_attribute(1, "tidegate")
        + text_attribute(3, "impossible")
        + attribute(4, hook)
        + text_attribute(7, "nat")
    )
    request = Request(3, NLM_F_CREATE, nf_tables.FAMILIES["inet"], chain)
    impossible = nf_transaction.Step(request, "make an impossible chain")
    patched.setattr(
        nf_transaction,
        "run",
        lambda steps, generation=None: run((*steps, impossible), generation),
    )


def refuse_the_last_table(patched):
    replace = xtables.replace

    def refused(family, table, owned, wanted, indexes):
        if (family, table) == (legacy_tables.Family.IPV6, "nat"):
            redirecting = next(
                counted.entry
                for rules in wanted.chains.values()
                for counted in rules
                if b"REDIRECT" in counted.entry.data
            )
            # The kernel takes this target in two hooks of the table, and this is not one of them.
            jump = xtables.InstalledJump("POSTROUTING", 1, redirecting)
            wanted = msgspec.structs.replace(wanted, jumps=(*wanted.jumps, jump))
        return replace(family, table, owned, wanted, indexes)

    patched.setattr(xtables, "replace", refused)


REFUSALS = {
    BackendName.NFTABLES: refuse_a_transaction,
    BackendName.IPTABLES: refuse_the_last_table,
}


REFUSED = {
    BackendName.NFTABLES: "cannot make an impossible chain: Operation not supported",
    BackendName.IPTABLES: "cannot change the legacy table nat of ip6: Invalid argument",
}


@pytest.mark.parametrize("backend", BackendName)
def test_a_refusal_half_way_leaves_the_old_rules(backend, pod, refuse_half_way):
    redirecting = Engine(backend)
    redirecting.apply(pod, OLD)
    before = ruleset(pod)
    with refuse_half_way(backend), pytest.raises(KernelError, match=REFUSED[backend]):
        redirecting.apply(pod, NEW)
    assert ruleset(pod) == before
    assert redirecting.check(pod, OLD) == ()
    assert redirecting.apply(pod, NEW).change is Change.REPLACED
    assert redirecting.check(pod, NEW) == ()


@pytest.mark.parametrize("backend", BackendName)
def test_a_refusal_of_the_first_rules_leaves_nothing(backend, pod, refuse_half_way):
    redirecting = Engine(backend)
    with refuse_half_way(backend), pytest.raises(KernelError, match=REFUSED[backend]):
        redirecting.apply(pod, NEW)
    assert redirecting.backend_of(pod) is None
    assert ruleset(pod) == []
    assert redirecting.apply(pod, NEW).change is Change.CREATED


@pytest.mark.timeout(300)
def test_killed_at_any_moment_the_rules_are_old_or_new_and_the_next_apply_is_clean(
    redirecting, pod
):
    chance = random.Random(5995)
    whole = {}
    for policy in (OLD, NEW):
        redirecting.apply(pod, policy)
        whole[policy] = parts(pod)
    torn = 0
    for number in range(KILLS):
        kill_while_applying(redirecting, pod, chance)
        left = parts(pod)
        for name, content in left.items():
            assert content in [whole[policy].get(name) for policy in (OLD, NEW)], name
        torn += left not in whole.values()
        policy = (OLD, NEW)[number % 2]
        redirecting.apply(pod, policy)
        assert redirecting.check(pod, policy) == ()
        assert parts(pod) == whole[policy]
    if redirecting.choice.backend is BackendName.NFTABLES:
        assert torn == 0
    assert redirecting.remove(pod) is Change.REMOVED
    assert redirecting.backend_of(pod) is None


def test_fifty_namespaces_at_once_get_each_their_own_rules(redirecting):
    with ExitStack() as stack:
        pods = [stack.enter_context(namespace()) for _ in range(NAMESPACES)]
        policies = [
            Policy(
                outbound=Outbound(exclude_ports=(PortRange(5000 + n, 5000 + n), PortRange(7, 7)))
            )
            for n in range(NAMESPACES)
        ]
        with ThreadPoolExecutor(NAMESPACES) as pool:
            applied = list(pool.map(redirecting.apply, pods, policies))
            assert [one.change for one in applied] == [Change.CREATED] * NAMESPACES
            assert list(pool.map(redirecting.check, pods, policies)) == [()] * NAMESPACES
            unchanged = list(pool.map(redirecting.apply, pods, policies))
            assert [one.change for one in unchanged] == [Change.UNCHANGED] * NAMESPACES
            assert list(pool.map(redirecting.remove, pods)) == [Change.REMOVED] * NAMESPACES


FLUSHES = {
    BackendName.NFTABLES: (
        "nft flush ruleset",
        "nft delete table inet tidegate",
        "nft flush table inet tidegate",
    ),
    BackendName.IPTABLES: (
        "iptables-legacy -t nat -F; iptables-legacy -t nat -X",
        "ip6tables-legacy -t nat -F; ip6tables-legacy -t nat -X",
        "iptables-legacy -t nat -F OUTPUT",
        "ip6tables-legacy -t nat -F PREROUTING",
        "iptables-legacy -t raw -F; iptables-legacy -t raw -X",
        "ip6tables-legacy -t mangle -F",
    ),
}


@pytest.mark.parametrize(
    ("backend", "command"),
    [(backend, command) for backend, commands in FLUSHES.items() for command in commands],
)
def test_rules_that_another_program_flushed_are_missed_and_come_back(backend, command, pod):
    redirecting = Engine(backend)
    redirecting.apply(pod, NEW)
    before = parts(pod)
    consul_rules.run(pod, "sh", "-e", text=command)
    assert redirecting.check(pod, NEW) != ()
    assert redirecting.apply(pod, NEW).change in (Change.REPLACED, Change.CREATED)
    assert redirecting.check(pod, NEW) == ()
    assert parts(pod) == before


@pytest.mark.parametrize("command", FLUSHES[BackendName.IPTABLES])
def test_what_a_flush_left_of_the_rules_is_removed(command, pod):
    redirecting = Engine("iptables")
    redirecting.apply(pod, NEW)
    consul_rules.run(pod, "sh", "-e", text=command)
    redirecting.remove(pod)
    assert ruleset(pod) == []
    assert redirecting.remove(pod) is Change.UNCHANGED


def test_a_namespace_that_is_gone_is_an_error_that_names_it(redirecting):
    with namespace() as path:
        pass
    for attempt in (
        lambda: redirecting.apply(path, DEFAULT),
        lambda: redirecting.apply(path, DEFAULT, adopt=True),
        lambda: redirecting.check(path, DEFAULT),
        lambda: redirecting.current(path),
        lambda: redirecting.backend_of(path),
        lambda: redirecting.gaps(path, DEFAULT),
        lambda: redirecting.remove(path),
    ):
        with pytest.raises(KernelError, match=path):
            attempt()


def test_namespaces_that_vanish_in_the_middle_are_errors_and_nothing_is_left_open(redirecting):
    before = open_descriptors(), threading.active_count()
    errors = []
    for _ in range(10):
        with namespace() as path:
            begun = threading.Barrier(2)
            thread = threading.Thread(
                target=apply_until_gone, args=(redirecting, path, begun, errors)
            )
            thread.start()
            begun.wait(DEADLINE_S)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert len(errors) == 10
    assert all(isinstance(error, KernelError) for error in errors), errors
    assert (open_descriptors(), threading.active_count()) == before


def test_cycles_of_apply_and_remove_leave_no_memory_descriptor_or_thread(redirecting, pod):
    def cycle():
        assert redirecting.apply(pod, NEW).change is Change.CREATED
        assert redirecting.remove(pod) is Change.REMOVED

    for _ in range(CYCLES // 4):
        cycle()
    before = resources()
    for _ in range(CYCLES):
        cycle()
    after = resources()
    assert after[1:] == before[1:]
    assert after[0] - before[0] < GROWTH_BYTES
    assert ruleset(pod) == []


def resources():
    """Resident bytes, descriptors, threads and children of this process."""
    gc.collect()
    process = psutil.Process()
    memory = process.memory_info().rss
    return memory, open_descriptors(), threading.active_count(), len(process.children())


def apply_until_gone(redirecting, path, begun, errors):
    begun.wait(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < deadline:
            redirecting.apply(path, OLD)
            redirecting.apply(path, NEW)
    except Exception as error:  # noqa: BLE001
        errors.append(error)


def kill_while_applying(redirecting, path, chance):
    """A process that applies one policy after the other is killed within some tens of milliseconds."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            os.write(write_end, b"x")
            for _ in range(10_000):
                redirecting.apply(path, OLD)
                redirecting.apply(path, NEW)
        finally:
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb", buffering=0) as started:
        assert started.read(1) == b"x"
    threading.Event().wait(chance.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    deadline = time.monotonic() + DEADLINE_S
    while alive_in_group(pid):
        assert time.monotonic() < deadline, "a process outlives the one that started it"


def alive_in_group(group):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
