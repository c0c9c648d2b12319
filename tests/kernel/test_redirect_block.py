"""Fail closed: of a blocked workload nothing passes but loopback, either way, until it is unblocked."""

import errno
import socket
import subprocess
import threading
from contextlib import ExitStack

import pytest
from hostile import owned_table
from namespaces import DEADLINE_S, dial, echoes, landing, serving

from tidegate.enforce.redirect import block as blocking
from tidegate.enforce.redirect.backend import Change
from tidegate.enforce.redirect.block import TABLE, TABLES, block, is_blocked, unblock
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import DEFAULT
from tidegate.kernel import netns, nftables, xtables
from tidegate.kernel.errors import KernelError

APP, INBOUND, OUTBOUND = 8080, 20000, 15001


def refuse(*_):
    raise KernelError("nftables: not here", errno.EOPNOTSUPP)


@pytest.fixture(params=["nftables", "legacy tables"])
def way(request, monkeypatch):
    """Each way of blocking; the second one is what happens where nf_tables refuses."""
    if request.param == "legacy tables":
        monkeypatch.setattr(blocking, "_block_by_nftables", refuse)
    return request.param


def passes(netns_path, address, port=APP):
    """Whether a connection can be opened at all."""

    def connect():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(0.3)
            try:
                connection.connect((address, port))
            except (TimeoutError, OSError):
                return False
            return True

    return netns.run_in(netns_path, connect)


def answers_datagrams(pair, version, *, from_pod):
    """Whether a UDP datagram gets through one way."""
    here, there = (pair.pod, pair.peer) if from_pod else (pair.peer, pair.pod)
    address = pair.peer_address(version) if from_pod else pair.pod_address(version)
    family = socket.AF_INET if version == 4 else socket.AF_INET6

    def open_datagrams():
        return socket.socket(family, socket.SOCK_DGRAM)

    with netns.run_in(there, open_datagrams) as receiver, netns.run_in(here, open_datagrams) as out:
        receiver.bind(("", 0))
        receiver.settimeout(0.2)
        try:
            out.sendto(b"x", (address, receiver.getsockname()[1]))
            return receiver.recv(8) == b"x"
        except (TimeoutError, PermissionError):
            return False


def ruleset(netns_path):
    """All that both stores hold, by the tools of their makers."""
    held = []
    for command in (
        ["nft", "list", "ruleset"],
        ["iptables-legacy-save"],
        ["ip6tables-legacy-save"],
    ):
        process = netns.spawn(netns_path, command, stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        lines = output.decode().splitlines()
        # Empty tables stay, with the policies and counters of their chains.
        held += [line for line in lines if line[:1] not in ("#", "*", ":") and line != "COMMIT"]
    return held


def test_nothing_passes_either_way_and_unblocking_restores_it(pair, way):
    with serving(pair.pod, "pod", [APP]), serving(pair.peer, "peer", [APP]):
        assert block(pair.pod) is Change.CREATED
        assert is_blocked(pair.pod)
        for version in (4, 6):
            assert not passes(pair.pod, pair.peer_address(version))
            assert not passes(pair.peer, pair.pod_address(version))
            assert not answers_datagrams(pair, version, from_pod=True)
            assert not answers_datagrams(pair, version, from_pod=False)
        assert unblock(pair.pod) is Change.REMOVED
        assert not is_blocked(pair.pod)
        for version in (4, 6):
            assert landing(pair.pod, pair.peer_address(version), APP).server == "peer"
            assert landing(pair.peer, pair.pod_address(version), APP).server == "pod"
            assert answers_datagrams(pair, version, from_pod=True)
            assert answers_datagrams(pair, version, from_pod=False)


def test_loopback_passes(pair, way):
    with serving(pair.pod, "pod", [APP]):
        block(pair.pod)
        for address in ("127.0.0.1", "::1", pair.pod_ipv4, pair.pod_ipv6):
            assert landing(pair.pod, address, APP).server == "pod"


def test_an_open_connection_stops_and_goes_on_afterwards(pair, way):
    with serving(pair.peer, "peer", [APP]):
        for version in (4, 6):
            connection, _ = dial(pair.pod, pair.peer_address(version), APP)
            with connection:
                assert echoes(connection)
                block(pair.pod)
                connection.sendall(b"ping\n")
                connection.settimeout(0.4)
                with pytest.raises(TimeoutError):
                    connection.recv(16)
                unblock(pair.pod)
                # TCP sends it again by itself.
                connection.settimeout(DEADLINE_S)
                assert connection.recv(16) == b"ping\n"


def test_neighbours_are_still_found_so_that_the_address_stays_alive(pair, way):
    block(pair.pod)
    ask = ["ip", "-6", "neigh", "flush", "dev", "host0"]
    assert netns.spawn(pair.peer, ask, stdout=subprocess.DEVNULL).wait(DEADLINE_S) == 0
    found = threading.Event()

    def state():
        command = ["ip", "-6", "neigh", "show", pair.pod_ipv6]
        process = netns.spawn(pair.peer, command, stdout=subprocess.PIPE)
        return process.communicate(timeout=DEADLINE_S)[0].decode()

    passes(pair.peer, pair.pod_ipv6)
    for _ in range(50):
        if "lladdr" in state():
            break
        found.wait(0.1)
    else:
        pytest.fail(state())


def test_blocking_twice_is_blocking_once(pair, way):
    assert block(pair.pod) is Change.CREATED
    assert block(pair.pod) is Change.UNCHANGED
    assert is_blocked(pair.pod)
    assert unblock(pair.pod) is Change.REMOVED
    assert unblock(pair.pod) is Change.UNCHANGED


def test_nothing_is_left_after_unblocking(pair, way):
    before = ruleset(pair.pod)
    block(pair.pod)
    assert ruleset(pair.pod) != before
    unblock(pair.pod)
    assert ruleset(pair.pod) == before


def test_a_block_that_somebody_opened_is_closed_again(pair):
    block(pair.pod)
    netns.run_in(pair.pod, nftables.load, f"insert rule inet {TABLE} arriving accept")
    assert not is_blocked(pair.pod)
    assert block(pair.pod) is Change.REPLACED
    assert is_blocked(pair.pod)


def test_a_legacy_block_that_somebody_opened_is_closed_again(pair, monkeypatch):
    monkeypatch.setattr(blocking, "_block_by_nftables", refuse)
    block(pair.pod)
    command = ["iptables-legacy", "-t", "raw", "-D", "PREROUTING", "-j", "TIDEBLOCK_IN"]
    assert netns.spawn(pair.pod, command).wait(DEADLINE_S) == 0
    assert not is_blocked(pair.pod)
    assert block(pair.pod) is Change.REPLACED
    assert is_blocked(pair.pod)


class TestNamesThatAreTaken:
    """A table that another program owns cannot be replaced; the block takes another name then."""

    def test_a_block_of_another_name_blocks_and_is_found_again(self, pair):
        with serving(pair.pod, "pod", [APP]), serving(pair.peer, "peer", [APP]):
            with ExitStack() as owned:
                for name in TABLES[:2]:
                    owned.enter_context(netns.run_in(pair.pod, owned_table, name))
                assert not is_blocked(pair.pod)
                assert block(pair.pod) is Change.CREATED
                assert is_blocked(pair.pod)
                assert block(pair.pod) is Change.UNCHANGED
                assert not passes(pair.pod, pair.peer_ipv4)
                assert not passes(pair.peer, pair.pod_ipv6)
                netns.run_in(pair.pod, nftables.load, f"flush chain inet {TABLES[2]} sent")
                assert not is_blocked(pair.pod)
                assert block(pair.pod) is Change.REPLACED
                assert unblock(pair.pod) is Change.REMOVED
                assert unblock(pair.pod) is Change.UNCHANGED
                assert not is_blocked(pair.pod)
                assert landing(pair.pod, pair.peer_ipv4, APP).server == "peer"
                assert block(pair.pod) is Change.CREATED
            # The owners are gone, and their tables with them.
            assert is_blocked(pair.pod)
            assert block(pair.pod) is Change.UNCHANGED
            assert unblock(pair.pod) is Change.REMOVED
            assert ruleset(pair.pod) == []

    def test_where_all_names_are_taken_the_legacy_tables_block(self, pair):
        with ExitStack() as owned:
            for name in TABLES:
                owned.enter_context(netns.run_in(pair.pod, owned_table, name))
            assert block(pair.pod) is Change.CREATED
            assert is_blocked(pair.pod)
            assert not passes(pair.pod, pair.peer_ipv4)
            assert unblock(pair.pod) is Change.REMOVED
            assert not is_blocked(pair.pod)


def test_redirection_and_block_leave_each_other_alone(pair, way):
    backend, rules = NftablesBackend(), rules_for(DEFAULT)
    backend.apply(pair.pod, rules)
    with serving(pair.pod, "pod", [INBOUND, OUTBOUND]), serving(pair.peer, "peer", [APP]):
        block(pair.pod)
        assert backend.check(pair.pod, rules) == ()
        assert not passes(pair.pod, pair.peer_ipv4)
        assert not passes(pair.peer, pair.pod_ipv4)
        assert backend.apply(pair.pod, rules) is Change.UNCHANGED
        assert is_blocked(pair.pod)
        unblock(pair.pod)
        assert backend.check(pair.pod, rules) == ()
        assert landing(pair.pod, pair.peer_ipv4, APP).port == OUTBOUND
        assert landing(pair.peer, pair.pod_ipv4, APP).port == INBOUND
        block(pair.pod)
        backend.remove(pair.pod)
        assert is_blocked(pair.pod)


def test_a_namespace_that_is_not_there_is_a_kernel_error():
    for call in (block, unblock, is_blocked):
        with pytest.raises(KernelError, match="no network namespace at /run/netns/tg-none"):
            call("/run/netns/tg-none")


def test_when_both_ways_are_refused_both_reasons_are_told(pair, monkeypatch):
    monkeypatch.setattr(blocking, "_block_by_nftables", refuse)

    def refuse_too(*_):
        raise KernelError("no ip_tables", errno.ENOENT)

    monkeypatch.setattr(xtables, "replace", refuse_too)
    with pytest.raises(KernelError, match="not here; no ip_tables"):
        block(pair.pod)
    assert not is_blocked(pair.pod)
