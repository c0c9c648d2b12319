"""What every backend does: real connections in real namespaces, whatever the rules are written with.

Where each kind of connection lands under each policy is in test_redirect_matrix.py.
"""

import os
import socket
import struct
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
from namespaces import dial, echoes, landing, set_sysctl
from redirecting import (
    APP,
    INBOUND,
    IPV4_ONLY,
    OTHER,
    OUTBOUND,
    PROXY_UID,
    cgroup,
    pair_with_servers,
    policies_that_say_everything,
    ports,
)

from tidegate.enforce.redirect.backend import Change
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import Hook, rules_for
from tidegate.intent.policy import DEFAULT, Family, IdRange, Outbound, Policy
from tidegate.kernel import netns

BACKENDS = {
    "nftables": NftablesBackend,
    "iptables": IptablesBackend,
    "iptables without sets": lambda: IptablesBackend(with_sets=False),
}
CLASH_FREE = (6, 7)
"""The first kernel with commit e27c3295114b, "netfilter: nf_nat: undo erroneous tcp edemux lookup after port clash".

What is to be done on older ones is in docs/redirect.md, Limits.
"""


@pytest.fixture(scope="module")
def lab():
    with pair_with_servers() as pair:
        yield pair


@pytest.fixture(params=["nftables", "iptables"])
def backend(request):
    return BACKENDS[request.param]()


@pytest.fixture
def redirected(lab, backend):
    assert apply(lab.pod, DEFAULT, backend) is Change.CREATED
    yield lab
    backend.remove(lab.pod)


def apply(netns_path, policy, backend):
    return backend.apply(netns_path, rules_for(policy))


def inbound_lines(backend, netns_path):
    """The packets of each line that decides on connections which arrive."""
    current = backend.current(netns_path)
    return {line.name: line.packets for line in current if line.hook is Hook.INBOUND}


def kernel_release():
    """Major and minor number."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


@contextmanager
def sysctl(netns_path, name, value):
    """A setting of a namespace that is put back afterwards."""
    before = netns.run_in(netns_path, Path("/proc/sys", name).read_text)
    set_sysctl(netns_path, name, value)
    try:
        yield
    finally:
        set_sysctl(netns_path, name, before)


@pytest.mark.parametrize("version", [4, 6])
class TestBothFamilies:
    def test_outbound_goes_to_the_sidecar_which_learns_what_was_dialled(self, redirected, version):
        address = redirected.peer_address(version)
        landed = landing(redirected.pod, address, APP)
        assert (landed.server, landed.port) == ("pod", OUTBOUND)
        assert landed.original == (address, APP)
        assert landed.client == redirected.pod_address(version)

    def test_inbound_goes_to_the_sidecar_which_learns_what_was_dialled(self, redirected, version):
        address = redirected.pod_address(version)
        landed = landing(redirected.peer, address, APP)
        assert (landed.server, landed.port) == ("pod", INBOUND)
        assert landed.original == (address, APP)
        assert landed.client == redirected.peer_address(version)

    def test_from_outside_the_outbound_listener_cannot_be_reached(self, redirected, version):
        landed = landing(redirected.peer, redirected.pod_address(version), OUTBOUND)
        assert (landed.server, landed.port) == ("pod", INBOUND)

    def test_from_outside_the_inbound_listener_is_reached_as_it_is(
        self, redirected, backend, version
    ):
        landed = landing(redirected.peer, redirected.pod_address(version), INBOUND)
        assert (landed.server, landed.port) == ("pod", INBOUND)
        assert inbound_lines(backend, redirected.pod)["inbound-listener"] >= 1

    def test_the_sidecars_own_connections_go_where_it_dials(self, redirected, version):
        out = landing(redirected.pod, redirected.peer_address(version), APP, uid=PROXY_UID)
        assert (out.server, out.port) == ("peer", APP)
        own = landing(redirected.pod, redirected.pod_address(version), APP, uid=PROXY_UID)
        assert (own.server, own.port) == ("pod", APP)

    def test_a_call_to_the_pods_own_address_stays_inside_and_is_not_redirected(
        self, redirected, version
    ):
        for port in (APP, INBOUND):
            landed = landing(redirected.pod, redirected.pod_address(version), port)
            assert (landed.server, landed.port) == ("pod", port)

    def test_one_source_port_may_be_used_towards_several_redirected_ports(
        self, redirected, version
    ):
        with ExitStack() as stack:
            if kernel_release() < CLASH_FREE:
                stack.enter_context(sysctl(redirected.pod, "net/ipv4/tcp_early_demux", "0"))
            first, landed = dial(redirected.peer, redirected.pod_address(version), APP)
            stack.enter_context(first)
            source = first.getsockname()[1]
            second, other = dial(
                redirected.peer, redirected.pod_address(version), OTHER, source_port=source
            )
            stack.enter_context(second)
            assert second.getsockname()[1] == source
            assert (landed.port, other.port) == (INBOUND, INBOUND)
            assert (landed.original[1], other.original[1]) == (APP, OTHER)
            assert echoes(first)
            assert echoes(second)


def test_open_connections_live_through_a_change_of_the_policy(redirected, backend):
    with ExitStack() as stack:
        out, landed = dial(redirected.pod, redirected.peer_ipv4, APP)
        stack.enter_context(out)
        into, _ = dial(redirected.peer, redirected.pod_ipv6, APP)
        stack.enter_context(into)
        assert (landed.server, landed.port) == ("pod", OUTBOUND)
        changed = Policy(outbound=Outbound(exclude_ports=ports(APP), exclude_uids=(IdRange(1, 2),)))
        assert apply(redirected.pod, changed, backend) is Change.REPLACED
        assert echoes(out)
        assert echoes(into)
        assert landing(redirected.pod, redirected.peer_ipv4, APP).server == "peer"
        assert apply(redirected.pod, DEFAULT, backend) is Change.REPLACED
        assert echoes(out)
        assert echoes(into)
        assert landing(redirected.pod, redirected.peer_ipv4, APP).server == "pod"


@pytest.mark.parametrize("version", [4, 6])
def test_connections_that_are_older_than_the_first_rules_live_on(lab, backend, version):
    with ExitStack() as stack:
        out, _ = dial(lab.pod, lab.peer_address(version), APP)
        stack.enter_context(out)
        into, _ = dial(lab.peer, lab.pod_address(version), APP)
        stack.enter_context(into)
        assert apply(lab.pod, DEFAULT, backend) is Change.CREATED
        stack.callback(backend.remove, lab.pod)
        for _ in range(3):
            assert echoes(out)
            assert echoes(into)
        assert landing(lab.pod, lab.peer_address(version), APP).server == "pod"


@pytest.mark.parametrize("version", [4, 6])
def test_rules_that_come_back_know_nothing_of_connections_from_before(lab, backend, version):
    address, port = lab.peer_address(version), 40_001
    apply(lab.pod, DEFAULT, backend)
    before, landed = dial(lab.pod, address, APP, source_port=port)
    assert landed.server == "pod"
    before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    before.close()
    backend.remove(lab.pod)
    direct, landed = dial(lab.pod, address, APP, source_port=port)
    with direct:
        assert landed.server == "peer"
        assert apply(lab.pod, DEFAULT, backend) is Change.CREATED
        try:
            for _ in range(3):
                assert echoes(direct)
        finally:
            backend.remove(lab.pod)


def test_a_family_that_comes_back_knows_nothing_of_connections_from_before(lab, backend):
    port = 40_002
    apply(lab.pod, DEFAULT, backend)
    with ExitStack() as stack:
        stack.callback(backend.remove, lab.pod)
        kept, _ = dial(lab.pod, lab.peer_ipv4, APP)
        stack.enter_context(kept)
        before, landed = dial(lab.pod, lab.peer_ipv6, APP, source_port=port)
        assert landed.server == "pod"
        before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        apply(lab.pod, IPV4_ONLY, backend)
        before.close()
        direct, landed = dial(lab.pod, lab.peer_ipv6, APP, source_port=port)
        stack.enter_context(direct)
        assert landed.server == "peer"
        assert apply(lab.pod, DEFAULT, backend) is Change.REPLACED
        for connection in (direct, kept):
            assert echoes(connection)


@pytest.mark.parametrize("families", [(Family.IPV4, Family.IPV6), (Family.IPV4,), (Family.IPV6,)])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_everything_that_a_policy_can_say_the_kernel_takes_and_keeps(
    new_namespace, families, backend
):
    pod = new_namespace()
    with cgroup(f"tg-every-{os.getpid()}", "sidecar") as path:
        for policy in policies_that_say_everything(path).values():
            rules = rules_for(msgspec.structs.replace(policy, families=families))
            assert backend.apply(pod, rules) in (Change.CREATED, Change.REPLACED)
            assert backend.check(pod, rules) == ()
            assert backend.apply(pod, rules) is Change.UNCHANGED
            installed = {(line.hook, line.name) for line in backend.current(pod)}
            assert installed == {(hook, line.name) for hook, found in rules.lists for line in found}
