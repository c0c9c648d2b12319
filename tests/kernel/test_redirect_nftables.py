"""Redirection by nftables: real connections in real namespaces land where the policy says."""

import json
import socket
import struct
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from namespaces import (
    DEADLINE_S,
    Pair,
    dial,
    echoes,
    landing,
    namespace,
    open_descriptors,
    pair_of,
    serving,
)

from tidegate.enforce.redirect import nftables as redirect
from tidegate.enforce.redirect.nftables import Change
from tidegate.enforce.redirect.rules import Action, Connection, explain, rules_for
from tidegate.intent.policy import (
    DEFAULT,
    Family,
    Inbound,
    Outbound,
    Policy,
    Proxy,
    policy_from_annotations,
)
from tidegate.kernel import netns, nftables
from tidegate.kernel.errors import KernelError
from tidegate.model import Direction

INBOUND, OUTBOUND, APP, OTHER = 20000, 15001, 8080, 5432
PORTS = (INBOUND, OUTBOUND, APP, OTHER)
PROXY_UID = 5995
PYTHON = "/usr/bin/python3"
"""One that every user may run, wherever the repository lies."""

EXCLUDING = policy_from_annotations(
    {
        "tidegate.io/exclude-inbound-ports": "5000-5500,9999",
        "tidegate.io/exclude-outbound-ports": "5432",
        "tidegate.io/exclude-uids": "1000,1001",
    }
)
EXCLUDING_PEER = policy_from_annotations(
    {"tidegate.io/exclude-outbound-cidrs": "10.77.0.0/24,192.0.2.0/24,fd77::1"}
)


@pytest.fixture(scope="module")
def lab():
    """A pair with servers on all ports of both ends; each test applies a policy of its own."""
    with pair_of() as pair, serving(pair.pod, "pod", PORTS), serving(pair.peer, "peer", PORTS):
        yield pair


@pytest.fixture
def redirected(lab):
    assert redirect.apply(lab.pod, DEFAULT) is Change.CREATED
    yield lab
    redirect.remove(lab.pod)


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces, for tests without traffic."""
    return new_namespace()


def tables(netns_path):
    listed = nft(netns_path, "-j", "list", "ruleset")
    return [item for item in json.loads(listed)["nftables"] if "metainfo" not in item]


def nft(netns_path, *arguments):
    process = netns.spawn(
        netns_path, ["nft", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, problem = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, problem
    return output.decode()


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

    def test_from_outside_the_inbound_listener_is_reached_as_it_is(self, redirected, version):
        landed = landing(redirected.peer, redirected.pod_address(version), INBOUND)
        assert (landed.server, landed.port) == ("pod", INBOUND)
        assert lines(redirected.pod)["inbound-listener"] >= 1

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


def lines(netns_path):
    return {line.name: line.connections for line in redirect.current(netns_path)}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_is_left_alone_over_its_whole_range(redirected, address):
    landed = landing(redirected.pod, address, APP)
    assert (landed.server, landed.port) == ("pod", APP)


def test_an_ipv6_socket_that_speaks_ipv4_is_redirected_as_ipv4(redirected):
    landed = landing(redirected.pod, f"::ffff:{redirected.peer_ipv4}", APP)
    assert (landed.server, landed.port) == ("pod", OUTBOUND)
    assert landed.original == (redirected.peer_ipv4, APP)
    inside = landing(redirected.pod, "::ffff:127.0.0.1", APP)
    assert (inside.server, inside.port) == ("pod", APP)


def test_a_link_local_ipv6_destination_is_reached_directly(redirected):
    address = link_local(redirected.peer, "host0")
    landed = landing(redirected.pod, f"{address}%eth0", APP)
    assert (landed.server, landed.port) == ("peer", APP)


def link_local(netns_path, interface):
    process = netns.spawn(
        netns_path, ["ip", "-j", "-6", "address", "show", interface], stdout=subprocess.PIPE
    )
    output, _ = process.communicate(timeout=DEADLINE_S)
    (link,) = json.loads(output)
    return next(info["local"] for info in link["addr_info"] if info["scope"] == "link")


def test_a_process_of_the_sidecars_user_is_left_alone(redirected):
    # The other tests change the user of one thread; Envoy is a process.
    client = textwrap.dedent(f"""
        import socket
        with socket.create_connection(("{redirected.peer_ipv4}", {APP}), {DEADLINE_S}) as s:
            print(s.recv(256).decode().split()[0])
    """)
    seen = {}
    for uid in (PROXY_UID, 1234):
        process = netns.spawn(
            redirected.pod, [PYTHON, "-c", client], user=uid, group=uid, cwd="/",
            stdout=subprocess.PIPE, env={},
        )  # fmt: skip
        seen[uid] = process.communicate(timeout=DEADLINE_S)[0].decode().strip()
    assert seen == {PROXY_UID: "peer", 1234: "pod"}


POLICIES = {
    "default": DEFAULT,
    "excluding": EXCLUDING,
    "excluding the peer": EXCLUDING_PEER,
    "excluding everything": policy_from_annotations(
        {"tidegate.io/exclude-outbound-cidrs": "0.0.0.0/0,::/0"}
    ),
    "IPv4 only": Policy(families=(Family.IPV4,)),
    "IPv6 only": Policy(families=(Family.IPV6,)),
    "inbound only": Policy(outbound=Outbound(enabled=False)),
    "outbound only": Policy(inbound=Inbound(enabled=False)),
    "two proxies": Policy(proxy=Proxy(uids=(1000, PROXY_UID))),
    "nothing": policy_from_annotations({"consul.hashicorp.com/transparent-proxy": "false"}),
}


def connections(pair: Pair):
    """Every kind of connection, with the namespace that dials and whether it stays in the pod."""
    for version in (4, 6):
        pod, peer = pair.pod_address(version), pair.peer_address(version)
        for port in PORTS:
            yield pair.peer, Connection(direction=Direction.INBOUND, destination=pod, port=port)
            for uid in (0, 1000, PROXY_UID):
                yield (
                    pair.pod,
                    Connection(direction=Direction.OUTBOUND, destination=peer, port=port, uid=uid),
                )
                yield (
                    pair.pod,
                    Connection(
                        direction=Direction.OUTBOUND,
                        destination=pod,
                        port=port,
                        uid=uid,
                        interface="lo",
                    ),
                )
    for loopback in ("127.0.0.1", "127.3.2.1", "::1"):
        yield (
            pair.pod,
            Connection(
                direction=Direction.OUTBOUND, destination=loopback, port=APP, uid=0, interface="lo"
            ),
        )


@pytest.mark.parametrize("name", POLICIES)
def test_the_kernel_does_what_the_evaluator_says(lab, name):
    policy = POLICIES[name]
    redirect.apply(lab.pod, policy)
    try:
        for dialler, connection in connections(lab):
            decision = explain(rules_for(policy), connection)
            landed = landing(
                dialler, connection.destination, connection.port, uid=connection.uid or 0
            )
            if decision.action is Action.REDIRECT:
                expected = ("pod", decision.port)
            else:
                at_peer = connection.destination in (lab.peer_ipv4, lab.peer_ipv6)
                expected = ("peer" if at_peer else "pod", connection.port)
            assert (landed.server, landed.port) == expected, (connection, decision)
            assert landed.original == (connection.destination, connection.port)
    finally:
        redirect.remove(lab.pod)


def test_the_line_that_decides_in_the_kernel_is_the_line_that_explain_names(redirected):
    before = lines(redirected.pod)
    landing(redirected.pod, redirected.peer_ipv4, APP, uid=PROXY_UID)
    landing(redirected.pod, redirected.peer_ipv4, APP)
    landing(redirected.pod, redirected.pod_ipv4, APP)
    landing(redirected.peer, redirected.pod_ipv4, APP)
    after = lines(redirected.pod)
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {
        "proxy": 1,
        "to-outbound-listener": 1,
        "own-address": 1,
        "to-inbound-listener": 1,
    }


def test_an_unchanged_policy_changes_nothing_in_the_kernel(pod):
    redirect.apply(pod, EXCLUDING)
    before = tables(pod)
    assert redirect.apply(pod, EXCLUDING) is Change.UNCHANGED
    assert tables(pod) == before


def test_open_connections_live_through_a_change_of_the_policy(redirected):
    with ExitStack() as stack:
        out, landed = dial(redirected.pod, redirected.peer_ipv4, APP)
        stack.enter_context(out)
        into, _ = dial(redirected.peer, redirected.pod_ipv6, APP)
        stack.enter_context(into)
        assert (landed.server, landed.port) == ("pod", OUTBOUND)
        changed = policy_from_annotations(
            {"tidegate.io/exclude-outbound-ports": str(APP), "tidegate.io/exclude-uids": "1,2"}
        )
        assert redirect.apply(redirected.pod, changed) is Change.REPLACED
        assert echoes(out)
        assert echoes(into)
        assert landing(redirected.pod, redirected.peer_ipv4, APP).server == "peer"
        assert redirect.apply(redirected.pod, DEFAULT) is Change.REPLACED
        assert echoes(out)
        assert echoes(into)
        assert landing(redirected.pod, redirected.peer_ipv4, APP).server == "pod"


@pytest.mark.parametrize("version", [4, 6])
def test_connections_that_are_older_than_the_first_rules_live_on(lab, version):
    with ExitStack() as stack:
        out, _ = dial(lab.pod, lab.peer_address(version), APP)
        stack.enter_context(out)
        into, _ = dial(lab.peer, lab.pod_address(version), APP)
        stack.enter_context(into)
        assert redirect.apply(lab.pod, DEFAULT) is Change.CREATED
        stack.callback(redirect.remove, lab.pod)
        for _ in range(3):
            assert echoes(out)
            assert echoes(into)
        assert landing(lab.pod, lab.peer_address(version), APP).server == "pod"


@pytest.mark.parametrize("version", [4, 6])
def test_rules_that_come_back_know_nothing_of_connections_from_before(lab, version):
    address, port = lab.peer_address(version), 40_001
    redirect.apply(lab.pod, DEFAULT)
    before, landed = dial(lab.pod, address, APP, source_port=port)
    assert landed.server == "pod"
    before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    before.close()
    redirect.remove(lab.pod)
    direct, landed = dial(lab.pod, address, APP, source_port=port)
    with direct:
        assert landed.server == "peer"
        assert redirect.apply(lab.pod, DEFAULT) is Change.CREATED
        try:
            for _ in range(3):
                assert echoes(direct)
        finally:
            redirect.remove(lab.pod)


DRIFTS = {
    "add rule inet tidegate output tcp dport 1 accept": "should not be",
    "insert rule inet tidegate output tcp dport 1 accept comment \"proxy\"": "proxy",
    "flush chain inet tidegate prerouting": "to-inbound-listener of chain prerouting is missing",
    "add element inet tidegate outbound-excluded-uid { 0 }": "outbound-excluded-uid",
    "delete element inet tidegate inbound-excluded-port { 9999 }": "inbound-excluded-port",
    "add chain inet tidegate extra": "chain extra",
    "add set inet tidegate extra { type inet_service; }": "set extra",
    "add table inet tidegate { flags dormant; }": "table tidegate",
    "delete table inet tidegate": "table tidegate is missing",
    "flush ruleset": "table tidegate is missing",
    "add chain inet tidegate output { policy drop; }": "chain output",
}  # fmt: skip


@pytest.mark.parametrize("command", DRIFTS)
def test_drift_is_named_and_repaired(pod, command):
    redirect.apply(pod, EXCLUDING)
    nft(pod, command)
    differences = redirect.check(pod, EXCLUDING)
    assert any(DRIFTS[command] in difference for difference in differences), differences
    assert redirect.apply(pod, EXCLUDING) in (Change.REPLACED, Change.CREATED)
    assert redirect.check(pod, EXCLUDING) == ()


def test_a_table_with_flags_is_told_by_its_flags_alone(pod):
    redirect.apply(pod, DEFAULT)
    nft(pod, "add table inet tidegate { flags dormant; }")
    listed = netns.run_in(pod, nftables.list_table, "inet", "tidegate")
    assert listed == [{"table": {"family": "inet", "name": "tidegate", "flags": 1}}]


def test_lines_in_another_order_are_drift(pod):
    redirect.apply(pod, DEFAULT)
    moved = next(
        item["rule"]
        for item in netns.run_in(pod, nftables.list_table, "inet", "tidegate")
        if "rule" in item and item["rule"].get("comment") == "loopback-ipv4"
    )
    again = {key: value for key, value in moved.items() if key != "handle"}
    netns.run_in(pod, nftables.run, [{"delete": {"rule": moved}}, {"insert": {"rule": again}}])
    assert redirect.check(pod, DEFAULT) == ("the lines are in another order",)
    assert redirect.apply(pod, DEFAULT) is Change.REPLACED


def test_counters_are_no_drift(redirected):
    landing(redirected.pod, redirected.peer_ipv4, APP)
    assert redirect.check(redirected.pod, DEFAULT) == ()
    assert redirect.apply(redirected.pod, DEFAULT) is Change.UNCHANGED


def test_other_tables_are_never_touched_and_nothing_of_ours_stays(pod):
    nft(pod, "add table inet other { chain output { type nat hook output priority -100; }; }")
    nft(pod, "add table ip tidegate { set s { type inet_service; elements = { 1, 2 }; }; }")
    before = tables(pod)
    assert redirect.apply(pod, EXCLUDING) is Change.CREATED
    assert redirect.apply(pod, DEFAULT) is Change.REPLACED
    assert redirect.remove(pod) is Change.REMOVED
    assert tables(pod) == before
    assert redirect.remove(pod) is Change.UNCHANGED
    assert redirect.current(pod) is None


def test_a_policy_that_redirects_nothing_takes_the_table_away(pod):
    nothing = POLICIES["nothing"]
    assert redirect.apply(pod, nothing) is Change.UNCHANGED
    redirect.apply(pod, DEFAULT)
    assert redirect.check(pod, nothing)
    assert redirect.apply(pod, nothing) is Change.REMOVED
    assert tables(pod) == []


def test_a_refused_transaction_leaves_the_old_rules(pod, monkeypatch):
    redirect.apply(pod, DEFAULT)
    before = tables(pod)
    render = redirect.render
    bad = {"add": {"element": {"family": "inet", "table": "tidegate", "name": "no", "elem": [1]}}}
    monkeypatch.setattr(redirect, "render", lambda rules: [*render(rules), bad])
    with pytest.raises(KernelError, match="No such file"):
        redirect.apply(pod, EXCLUDING)
    monkeypatch.undo()
    assert tables(pod) == before
    assert redirect.check(pod, DEFAULT) == ()


def test_a_namespace_that_is_gone_is_an_error_that_names_it():
    with namespace() as path:
        pass
    for attempt in (
        lambda: redirect.apply(path, DEFAULT),
        lambda: redirect.check(path, DEFAULT),
        lambda: redirect.current(path),
        lambda: redirect.remove(path),
    ):
        with pytest.raises(KernelError, match=path):
            attempt()


def test_thirty_namespaces_at_once_get_each_their_own_rules():
    with ExitStack() as stack:
        pods = [stack.enter_context(namespace()) for _ in range(30)]
        policies = [
            policy_from_annotations({"tidegate.io/exclude-outbound-ports": str(5000 + number)})
            for number in range(len(pods))
        ]
        with ThreadPoolExecutor(30) as pool:
            changes = list(pool.map(redirect.apply, pods, policies))
        assert changes == [Change.CREATED] * len(pods)
        for path, policy in zip(pods, policies, strict=True):
            assert redirect.check(path, policy) == ()


def test_two_hundred_cycles_leave_no_descriptor_open(pod):
    redirect.apply(pod, DEFAULT)
    redirect.remove(pod)
    before = open_descriptors()
    for _ in range(200):
        assert redirect.apply(pod, DEFAULT) is Change.CREATED
        assert redirect.remove(pod) is Change.REMOVED
    assert open_descriptors() == before


def test_a_thousand_exclusions_fit_into_one_line(pod):
    ports = ",".join(str(port) for port in range(1, 2001, 2))
    policy = policy_from_annotations({"tidegate.io/exclude-outbound-ports": ports})
    assert redirect.apply(pod, policy) is Change.CREATED
    assert redirect.apply(pod, policy) is Change.UNCHANGED
    without = rules_for(DEFAULT)
    assert len(redirect.current(pod)) == len(without.outbound) + len(without.inbound) + 1


networks = st.one_of(
    st.ip_addresses(v=4).flatmap(lambda a: st.integers(0, 32).map(lambda n: f"{a}/{n}")),
    st.ip_addresses(v=6).flatmap(lambda a: st.integers(0, 128).map(lambda n: f"{a}/{n}")),
)
ranges = st.integers(1, 14000).flatmap(
    lambda first: st.sampled_from([f"{first}", f"{first}-{first + 1}", f"{first}-{first + 999}"])
)
annotations = st.fixed_dictionaries(
    {},
    optional={
        "tidegate.io/exclude-inbound-ports": st.lists(ranges, max_size=6).map(",".join),
        "tidegate.io/exclude-outbound-ports": st.lists(ranges, max_size=6).map(",".join),
        "tidegate.io/exclude-outbound-cidrs": st.lists(networks, max_size=6).map(",".join),
        "tidegate.io/exclude-uids": st.lists(st.integers(0, 2**32 - 2).map(str), max_size=4).map(
            ",".join
        ),
        "tidegate.io/redirect": st.sampled_from(["true", "false"]),
    },
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(written=annotations)
def test_whatever_the_policy_the_kernel_lists_it_as_it_was_rendered(pod, written):
    policy = policy_from_annotations(written)
    redirect.apply(pod, policy)
    assert redirect.check(pod, policy) == ()
    assert redirect.apply(pod, policy) is Change.UNCHANGED
