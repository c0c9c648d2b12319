"""Redirection by nftables: real connections in real namespaces, drift, races, and what the kernel is not asked for.

Where each kind of connection lands under each policy is in test_redirect_matrix.py, for all backends.
"""

import ctypes
import errno
import json
import os
import socket
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgspec
import pytest
from hostile import chains, crowd, owned_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from namespaces import (
    DEADLINE_S,
    dial,
    echoes,
    landing,
    namespace,
    open_descriptors,
    pair_of,
    serving,
)
from pyroute2 import NFCTSocket
from redirecting import (
    APP,
    INBOUND,
    IPV4_ONLY,
    IPV6_ONLY,
    NOTHING,
    OUTBOUND,
    PORTS,
    PROXY_UID,
    cgroup,
    excluding_ports,
    pair_with_servers,
    policies_that_say_everything,
    ports,
)

from tidegate.enforce.redirect import block, translations
from tidegate.enforce.redirect.backend import Change
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import Hook, rules_for
from tidegate.intent.network_text import canonical_network
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    IdRange,
    Inbound,
    Mode,
    Outbound,
    Policy,
    PortRange,
    Proxy,
)
from tidegate.kernel import cgroups, isolation, links, netns, nf_tables, nf_transaction, nftables
from tidegate.kernel.errors import KernelError

PYTHON = "/usr/bin/python3"
"""One that every user may run, wherever the repository lies."""
EXCLUDING = Policy(
    inbound=Inbound(exclude_ports=(PortRange(5000, 5500), PortRange(9999, 9999))),
    outbound=Outbound(
        exclude_ports=ports(5432), exclude_uids=(IdRange(1000, 1000), IdRange(1002, 1002))
    ),
)


def apply(netns_path, policy, backend=None):
    return (backend or NftablesBackend()).apply(netns_path, rules_for(policy))


def check(netns_path, policy):
    """As by an agent that has just started and remembers nothing."""
    return NftablesBackend().check(netns_path, rules_for(policy))


def remove(netns_path):
    return NftablesBackend().remove(netns_path)


@pytest.fixture(scope="module")
def lab():
    with pair_with_servers() as pair:
        yield pair


@pytest.fixture
def redirected(lab):
    assert apply(lab.pod, DEFAULT) is Change.CREATED
    yield lab
    remove(lab.pod)


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces, for tests without traffic."""
    return new_namespace()


@pytest.fixture
def backend():
    return NftablesBackend()


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


CLOSING = (Hook.INVALID, Hook.INVALID_OUTBOUND)
"""Lists that ask again what another list asks, of packets that it did not get."""


def lines(netns_path):
    current = NftablesBackend().current(netns_path)
    return {line.name: line.packets for line in current if line.hook not in CLOSING}


@pytest.mark.parametrize("version", [4, 6])
def test_inbound_over_an_interface_without_an_address_goes_to_the_sidecar(version):
    address = {4: "10.88.0.2", 6: "fd88::2"}[version]
    with pair_of() as pair, serving(pair.pod, "pod", PORTS):
        links.add_address(pair.pod, "lo", f"{address}/{32 if version == 4 else 128}")
        links.add_route(pair.peer, address, gateway=pair.pod_address(version))
        back = "10.77.0.0/24" if version == 4 else "fd77::/64"
        # The address of the interface goes when the way to it is known.
        assert landing(pair.peer, address, APP).port == APP
        for command in (
            ["ip", f"-{version}", "address", "flush", "dev", "eth0", "scope", "global"],
            ["ip", f"-{version}", "route", "replace", back, "dev", "eth0", "src", address],
        ):
            assert netns.spawn(pair.pod, command).wait(DEADLINE_S) == 0
        apply(pair.pod, DEFAULT)
        landed = landing(pair.peer, address, APP)
        assert (landed.server, landed.port) == ("pod", INBOUND)
        assert landed.original == (address, APP)


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
    apply(pod, EXCLUDING)
    before = tables(pod)
    assert apply(pod, EXCLUDING) is Change.UNCHANGED
    assert tables(pod) == before


DRIFTS = {
    "add rule inet tidegate outbound tcp dport 1 accept":
        "rule 'tcp dport 1 accept' of chain outbound is there and should not be",
    'insert rule inet tidegate outbound tcp dport 1 accept comment "proxy"':
        "line proxy of chain outbound is tcp dport 1 accept, should be meta skuid 5995 counter return",
    "flush chain inet tidegate inbound": "line to-inbound-listener of chain inbound is missing",
    "add element inet tidegate outbound-excluded-uid { 0 }":
        "set outbound-excluded-uid is type uid flags interval elements = { 0, 1000, 1002 }, "
        "should be type uid flags interval elements = { 1000, 1002 }",
    "delete element inet tidegate inbound-excluded-port { 9999 }": "set inbound-excluded-port is",
    "add chain inet tidegate extra": "chain extra is there and should not be",
    "add set inet tidegate extra { type inet_service; }":
        "set extra is there and should not be",
    "add counter inet tidegate extra": "counter extra is there and should not be",
    "add map inet tidegate extra { type inet_service : verdict; }":
        "map extra is there and should not be",
    "add table inet tidegate { flags dormant; }":
        "table inet tidegate has the flags 1 (dormant), should have none",
    "delete table inet tidegate": "table inet tidegate is missing",
    "flush ruleset": "table inet tidegate is missing",
    "add chain inet tidegate outbound { policy drop; }":
        "chain outbound is type nat hook output priority -100; policy drop;, should be "
        "type nat hook output priority -100; policy accept;",
    "add table ip tidegate": "table ip tidegate is there and should not be",
    "add table ip6 tidegate; delete table inet tidegate":
        "table ip6 tidegate is there and should not be",
    "delete table inet tidegate; add table inet tidegate": "chain inbound is missing",
}  # fmt: skip


@pytest.mark.parametrize("command", DRIFTS)
def test_drift_is_named_and_repaired(pod, backend, command):
    apply(pod, EXCLUDING, backend)
    nft(pod, command)
    for looking in (backend, NftablesBackend()):
        differences = looking.check(pod, rules_for(EXCLUDING))
        assert any(one.startswith(DRIFTS[command]) for one in differences), differences
    assert apply(pod, EXCLUDING, backend) in (Change.REPLACED, Change.CREATED)
    assert check(pod, EXCLUDING) == ()
    assert {item["table"]["family"] for item in tables(pod) if "table" in item} == {"inet"}


def test_an_object_that_is_missing_or_too_much_stands_for_what_is_in_it(pod, backend):
    apply(pod, DEFAULT, backend)
    nft(pod, "add chain inet tidegate extra; add rule inet tidegate extra tcp dport 1 accept")
    nft(pod, "delete chain inet tidegate inbound")
    assert backend.check(pod, rules_for(DEFAULT)) == (
        "chain inbound is missing",
        "chain extra is there and should not be",
    )


def test_lines_in_another_order_are_drift(pod, backend):
    apply(pod, DEFAULT, backend)
    nft(pod, "flush chain inet tidegate outbound")
    chain = backend.render(rules_for(DEFAULT)).split("chain outbound {\n")[1].split("\t}")[0]
    _head, *rules = chain.strip().splitlines()
    for rule in (rules[1], rules[0], *rules[2:]):
        nft(pod, f"add rule inet tidegate outbound {rule.strip()}")
    assert backend.check(pod, rules_for(DEFAULT)) == ("the lines are in another order",)
    assert apply(pod, DEFAULT, backend) is Change.REPLACED
    assert apply(pod, DEFAULT) is Change.UNCHANGED


def test_counters_are_no_drift(redirected):
    landing(redirected.pod, redirected.peer_ipv4, APP)
    assert lines(redirected.pod)["to-outbound-listener"] >= 1
    assert check(redirected.pod, DEFAULT) == ()
    assert apply(redirected.pod, DEFAULT) is Change.UNCHANGED


def test_what_a_listing_does_not_show_is_a_difference_all_the_same(pod, backend, monkeypatch):
    apply(pod, DEFAULT)
    listing = netns.run_in(pod, nftables.list_text, "inet", "tidegate")
    nft(pod, "insert rule inet tidegate outbound accept")
    # The work of a child is this process's code as it is now.
    monkeypatch.setattr(nftables, "list_text", lambda family, name: listing)
    assert backend.check(pod, rules_for(DEFAULT)) == (
        "table inet tidegate differs in something that its listing does not show",
    )


def test_other_tables_are_never_touched_and_nothing_of_ours_stays(pod):
    nft(pod, "add table inet other { chain output { type nat hook output priority -100; }; }")
    nft(pod, "add table arp tidegate { set s { type inet_service; elements = { 1, 2 }; }; }")
    before = tables(pod)
    assert apply(pod, EXCLUDING) is Change.CREATED
    assert apply(pod, DEFAULT) is Change.REPLACED
    assert apply(pod, IPV4_ONLY) is Change.REPLACED
    assert remove(pod) is Change.REMOVED
    assert tables(pod) == before
    assert remove(pod) is Change.UNCHANGED
    assert NftablesBackend().current(pod) is None


@pytest.mark.parametrize("policy", [NOTHING, Policy(families=())])
def test_a_policy_that_redirects_nothing_takes_the_table_away(pod, backend, policy):
    assert apply(pod, policy, backend) is Change.UNCHANGED
    assert check(pod, policy) == ()
    apply(pod, DEFAULT, backend)
    assert check(pod, policy) == ("table inet tidegate is there and should not be",)
    assert apply(pod, policy, backend) is Change.REMOVED
    assert tables(pod) == []
    assert check(pod, policy) == ()


class TestOneFamily:
    @pytest.mark.parametrize(
        ("policy", "tracked", "table"), [(IPV4_ONLY, {4}, "ip"), (IPV6_ONLY, {6}, "ip6")]
    )
    def test_connections_of_the_other_family_are_not_even_tracked(
        self, lab, policy, tracked, table
    ):
        assert apply(lab.pod, policy) is Change.CREATED
        try:
            landed = {}
            for version in (4, 6):
                landed[version] = landing(lab.pod, lab.peer_address(version), APP).server
                landing(lab.peer, lab.pod_address(version), APP)
            assert {version for version, server in landed.items() if server == "pod"} == tracked
            assert netns.run_in(lab.pod, tracked_families) == tracked
            assert netns.run_in(lab.pod, nf_tables.table_flags, table, "tidegate") == 0
        finally:
            remove(lab.pod)

    def test_a_table_of_other_families_goes_in_the_step_in_which_the_new_one_comes(self, pod):
        generations = []
        for policy in (DEFAULT, IPV4_ONLY, IPV6_ONLY, DEFAULT):
            apply(pod, policy)
            generations.append(netns.run_in(pod, nf_tables.generation))
            assert sum("table" in item for item in tables(pod)) == 1
        assert generations == [2, 3, 4, 5]


def tracked_families():
    with NFCTSocket(nfgen_family=socket.AF_UNSPEC) as conntrack:
        return {4 if entry["nfgen_family"] == socket.AF_INET else 6 for entry in conntrack.dump()}


@pytest.fixture
def every_policy():
    with cgroup(f"tg-nft-{os.getpid()}", "sidecar") as path:
        yield policies_that_say_everything(path)


def test_a_family_is_not_asked_for_lines_of_the_other(pod, every_policy):
    for policy in every_policy.values():
        text = NftablesBackend().render(
            rules_for(msgspec.structs.replace(policy, families=(Family.IPV4,)))
        )
        assert "ip6" not in text
        assert "::" not in text


class TestCgroups:
    def test_a_cgroup_that_is_made_anew_under_its_name_is_a_difference(self, pod, backend):
        name = f"tg-nft-{os.getpid()}-anew"
        policy = Policy(proxy=Proxy(uids=(), cgroup=name))
        with cgroup(name):
            apply(pod, policy, backend)
            assert backend.check(pod, rules_for(policy)) == ()
        with cgroup(name):
            differences = backend.check(pod, rules_for(policy))
            assert [difference.partition(" is ")[0] for difference in differences] == [
                f"line proxy-cgroup of chain {hook}"
                for hook in (Hook.OUTBOUND, Hook.INVALID_OUTBOUND)
            ]
            assert apply(pod, policy, backend) is Change.REPLACED
            assert check(pod, policy) == ()

    def test_a_cgroup_that_is_not_there_is_refused_and_the_rules_stay(self, pod, backend):
        apply(pod, DEFAULT)
        policy = Policy(proxy=Proxy(uids=(), cgroup="tg-nft-nowhere"))
        for attempt in (backend.apply, backend.check):
            with pytest.raises(KernelError, match="there is no cgroup tg-nft-nowhere"):
                attempt(pod, rules_for(policy))
        assert check(pod, DEFAULT) == ()

    def test_a_process_in_the_cgroup_is_left_alone_and_so_is_one_below_it(self, lab):
        name = f"tg-nft-{os.getpid()}-sidecar"
        with cgroup(name, "below"):
            apply(lab.pod, Policy(proxy=Proxy(uids=(), cgroup=name)))
            try:
                seen = [server_seen_from(lab, place) for place in (None, name, f"{name}/below")]
            finally:
                remove(lab.pod)
        assert seen == ["pod", "peer", "peer"]


def server_seen_from(pair, path):
    """Which server a process in a cgroup reaches at the peer's address."""
    join = ""
    if path:
        procs = cgroups.mounted_at() / path / "cgroup.procs"
        join = f"open('{procs}', 'w').write(str(os.getpid()))"
    client = textwrap.dedent(f"""
        import os, socket
        {join}
        with socket.create_connection(("{pair.peer_ipv6}", {APP}), {DEADLINE_S}) as s:
            print(s.recv(256).decode().split()[0])
    """)
    process = netns.spawn(pair.pod, [PYTHON, "-c", client], stdout=subprocess.PIPE, env={})
    return process.communicate(timeout=DEADLINE_S)[0].decode().strip()


def test_a_refused_transaction_leaves_the_old_rules(pod, backend, monkeypatch):
    apply(pod, DEFAULT)
    before = tables(pod)
    run = nf_transaction.run
    wrong = nf_transaction.chain_flush("inet", "tidegate", "nowhere")
    monkeypatch.setattr(nf_transaction, "run", lambda steps, *rest: run([*steps, wrong], *rest))
    with pytest.raises(KernelError, match="flush chain nowhere of table inet tidegate: No such"):
        apply(pod, EXCLUDING, backend)
    monkeypatch.undo()
    assert tables(pod) == before
    assert check(pod, DEFAULT) == ()


def test_apply_loads_what_render_says(new_namespace, backend):
    for policy in (DEFAULT, EXCLUDING, IPV4_ONLY):
        by_program, by_apply = new_namespace(), new_namespace()
        text = backend.render(rules_for(policy))
        netns.run_in(by_program, nftables.load, text)
        apply(by_apply, policy, backend)
        listed = nft(by_program, "list", "ruleset")
        assert nft(by_apply, "list", "ruleset") == listed


def test_a_list_that_asks_again_shares_the_sets(backend):
    many = excluding_ports(*range(1, 200, 2))
    text = backend.render(rules_for(many))
    assert text.count("elements = ") == 1
    assert text.count("th dport @outbound-excluded-port") == 2


def test_sets_of_more_than_a_message_holds_are_applied_whole(pod, backend):
    policy = excluding_ports(*range(1, 8191, 2))
    assert apply(pod, policy, backend) is Change.CREATED
    assert check(pod, policy) == ()
    listed = nft(pod, "-j", "list", "set", "inet", "tidegate", "outbound-excluded-port")
    (found,) = (item["set"] for item in json.loads(listed)["nftables"] if "set" in item)
    assert found["elem"] == list(range(1, 8191, 2))
    assert apply(pod, DEFAULT, backend) is Change.REPLACED
    assert apply(pod, policy, backend) is Change.REPLACED
    assert check(pod, policy) == ()


class Asked(Exception):
    """Something was asked that need not be."""


def refuse(*_args, **_kwargs):
    raise Asked


class TestNothingIsAskedTwice:
    def test_unchanged_rules_are_neither_listed_nor_compared(self, pod, backend, monkeypatch):
        rules = rules_for(EXCLUDING)
        backend.apply(pod, rules)
        for module, name in (
            (nf_transaction, "run"),
            (nftables, "load"),
            (nftables, "list_text"),
            (nf_tables, "contents"),
            (nf_tables, "table_flags"),
            (isolation, "run_in"),
            (netns, "run_in_new"),
        ):
            monkeypatch.setattr(module, name, refuse)
        assert backend.apply(pod, rules) is Change.UNCHANGED
        assert backend.check(pod, rules) == ()
        with pytest.raises(Asked):
            NftablesBackend().check(pod, rules)

    def test_a_difference_is_looked_at_once_more_for_its_words_and_not_again(
        self, pod, backend, monkeypatch
    ):
        apply(pod, DEFAULT)
        nft(pod, "flush chain inet tidegate outbound")
        contents = nf_tables.contents
        read = []

        def contents_and_tell(*arguments):
            read.append(in_namespace(pod))
            return contents(*arguments)

        monkeypatch.setattr(nf_tables, "contents", contents_and_tell)
        assert backend.check(pod, rules_for(DEFAULT))
        assert sum(read) == 2

    def test_what_a_comparison_found_is_remembered(self, pod, backend, monkeypatch):
        apply(pod, DEFAULT)
        assert backend.check(pod, rules_for(DEFAULT)) == ()
        monkeypatch.setattr(nf_tables, "contents", refuse)
        assert apply(pod, DEFAULT, backend) is Change.UNCHANGED

    def test_a_change_of_another_table_makes_it_look_again(self, pod, backend, monkeypatch):
        apply(pod, DEFAULT, backend)
        nft(pod, "add table inet other")
        with monkeypatch.context() as looking:
            looking.setattr(nf_tables, "contents", refuse)
            with pytest.raises(Asked):
                apply(pod, DEFAULT, backend)
        assert apply(pod, DEFAULT, backend) is Change.UNCHANGED

    def test_one_twin_serves_all_namespaces(self, new_namespace, backend, monkeypatch):
        pods = [new_namespace() for _ in range(3)]
        for path in pods:
            apply(path, EXCLUDING)
        made = []
        make = netns.run_in_new
        monkeypatch.setattr(
            netns, "run_in_new", lambda *arguments: (made.append(1), make(*arguments))[1]
        )
        assert [backend.check(path, rules_for(EXCLUDING)) for path in pods] == [()] * 3
        assert len(made) == 1

    def test_a_namespace_that_is_made_anew_under_its_name_is_a_new_one(self, backend):
        name = f"tg-nft-{os.getpid()}-again"
        for _ in range(2):
            path = netns.create(name)
            try:
                assert apply(path, DEFAULT, backend) is Change.CREATED
                assert check(path, DEFAULT) == ()
            finally:
                netns.delete(name)


def in_namespace(path):
    """Whether the calling thread is in it."""
    return netns.identity(netns.CURRENT) == netns.identity(path)


class TestRaces:
    def test_a_change_between_reading_and_remembering_is_seen(self, pod, backend, monkeypatch):
        apply(pod, DEFAULT)
        contents = nf_tables.contents

        def contents_then_change(*arguments):
            read = contents(*arguments)
            if in_namespace(pod):
                monkeypatch.undo()
                nft(pod, "add rule inet tidegate outbound accept")
            return read

        monkeypatch.setattr(nf_tables, "contents", contents_then_change)
        assert backend.check(pod, rules_for(DEFAULT)) == ()
        assert len(backend.check(pod, rules_for(DEFAULT))) == 1
        assert apply(pod, DEFAULT, backend) is Change.REPLACED

    def test_a_change_between_loading_and_remembering_is_seen(self, pod, backend, monkeypatch):
        run = nf_transaction.run

        def run_then_change(steps, generation=None):
            run(steps, generation)
            nft(pod, "add rule inet tidegate outbound accept")

        with monkeypatch.context() as racing:
            racing.setattr(nf_transaction, "run", run_then_change)
            apply(pod, DEFAULT, backend)
        assert len(backend.check(pod, rules_for(DEFAULT))) == 1
        assert apply(pod, DEFAULT, backend) is Change.REPLACED
        assert check(pod, DEFAULT) == ()

    @pytest.mark.parametrize(
        "meanwhile",
        [
            "add table inet tidegate { chain x { }; }",
            "delete table inet tidegate",
            "add table inet other",
        ],
    )
    @pytest.mark.parametrize("times", [1, 1000])
    def test_what_comes_between_a_look_and_a_load_is_looked_at_again(
        self, pod, backend, monkeypatch, meanwhile, times
    ):
        if meanwhile.startswith("delete"):
            apply(pod, EXCLUDING)
        run = nf_transaction.run
        refused = []

        def change_then_run(steps, generation=None):
            if generation is not None and len(refused) < times:
                netns.run_in(pod, change)
                refused.append(generation)
            run(steps, generation)

        def change():
            there = nf_tables.table_flags("inet", "tidegate") is not None
            nftables.load("add table inet uninvolved { chain x { }; }")
            if there or not meanwhile.startswith("delete"):
                nftables.load(meanwhile)

        monkeypatch.setattr(nf_transaction, "run", change_then_run)
        assert apply(pod, DEFAULT, backend) in (Change.CREATED, Change.REPLACED)
        assert refused
        monkeypatch.undo()
        assert check(pod, DEFAULT) == ()
        others = {item["table"]["name"] for item in tables(pod) if "table" in item}
        assert others >= {"tidegate", "uninvolved"}
        with monkeypatch.context() as racing:
            racing.setattr(nf_transaction, "run", change_then_run)
            refused.clear()
            gone = meanwhile.startswith("delete")
            assert backend.withdraw(pod) is (Change.UNCHANGED if gone else Change.REMOVED)
        assert check(pod, NOTHING) == ()

    def test_where_others_change_something_all_the_time_rules_are_compared_all_the_same(
        self, pod, backend, monkeypatch
    ):
        apply(pod, DEFAULT)
        contents = nf_tables.contents

        def contents_then_change(*arguments):
            read = contents(*arguments)
            if in_namespace(pod):
                nftables.load("add table inet other\ndelete table inet other\n")
            return read

        monkeypatch.setattr(nf_tables, "contents", contents_then_change)
        assert backend.check(pod, rules_for(DEFAULT)) == ()
        assert apply(pod, DEFAULT, backend) is Change.UNCHANGED
        (difference,) = backend.check(pod, rules_for(NOTHING))
        assert difference == "table inet tidegate is there and should not be"
        nft(pod, "flush chain inet tidegate inbound")
        assert backend.check(pod, rules_for(DEFAULT))

    def test_rules_that_cannot_be_read_for_changes_are_written_anew(
        self, pod, backend, monkeypatch
    ):
        apply(pod, DEFAULT)
        contents = nf_tables.contents

        def disturbed(*arguments):
            if in_namespace(pod):
                raise KernelError("the nftables rules change faster than can be", errno.EAGAIN)
            return contents(*arguments)

        monkeypatch.setattr(nf_tables, "contents", disturbed)
        with pytest.raises(KernelError, match="change faster"):
            backend.check(pod, rules_for(DEFAULT))
        assert apply(pod, DEFAULT, backend) is Change.REPLACED
        monkeypatch.undo()
        assert check(pod, DEFAULT) == ()

    def test_two_processes_that_apply_at_once_end_in_the_rules_of_one(self, pod):
        policies = (DEFAULT, EXCLUDING)
        for _ in range(5):
            remove(pod)
            ready, go = os.pipe()
            racers = [start_racer(ready, go, pod, policy) for policy in policies]
            os.close(ready)
            os.close(go)
            assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers] == [0, 0]
            assert () in [check(pod, policy) for policy in policies]


def start_racer(ready, go, netns_path, policy):
    """A process that applies a policy a few times, from when nobody has `go` open any more."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.close(go)
        os.read(ready, 1)
        backend = NftablesBackend()
        for _ in range(10):
            backend.apply(netns_path, rules_for(policy))
        os._exit(0)
    finally:
        os._exit(1)


class TestWhatOthersPutThere:
    def test_the_library_is_never_called_in_a_workloads_namespace(self, pod, backend, monkeypatch):
        call = nftables._call

        def call_elsewhere(*arguments):
            assert not in_namespace(pod)
            return call(*arguments)

        monkeypatch.setattr(nftables, "_call", call_elsewhere)
        monkeypatch.setattr(isolation, "run_in", refuse)
        assert apply(pod, DEFAULT, backend) is Change.CREATED
        nft(pod, "add table inet other")
        assert backend.check(pod, rules_for(DEFAULT)) == ()
        assert apply(pod, EXCLUDING, backend) is Change.REPLACED
        assert apply(pod, EXCLUDING) is Change.UNCHANGED
        assert block.block(pod) is Change.CREATED
        assert block.is_blocked(pod)
        assert block.unblock(pod) is Change.REMOVED
        assert backend.current(pod)
        assert backend.withdraw(pod) is Change.REMOVED
        assert apply(pod, IPV4_ONLY, backend) is Change.CREATED
        assert backend.remove(pod) is Change.REMOVED

    def test_a_thousand_tables_stop_nothing(self, pod, backend):
        apply(pod, EXCLUDING, backend)
        netns.run_in(pod, crowd, 1000)
        nft(pod, "flush chain inet tidegate outbound")
        assert backend.check(pod, rules_for(EXCLUDING))
        assert apply(pod, EXCLUDING, backend) is Change.REPLACED
        assert check(pod, EXCLUDING) == ()
        assert block.block(pod) is Change.CREATED
        assert block.is_blocked(pod)
        assert block.unblock(pod) is Change.REMOVED
        assert backend.remove(pod) is Change.REMOVED
        assert len(tables(pod)) == 1000

    def test_a_listing_that_crashes_is_a_difference(self, pod, backend, monkeypatch):
        apply(pod, DEFAULT)
        nft(pod, "add chain inet tidegate extra")
        redirect_rules = rules_for(DEFAULT)
        backend.check(pod, redirect_rules)
        monkeypatch.setattr(nftables, "list_text", lambda *_: ctypes.string_at(0))
        (difference,) = backend.check(pod, redirect_rules)
        assert difference.startswith("table inet tidegate is another one, and cannot be listed:")

    def test_a_hundred_thousand_elements_are_a_difference_and_are_repaired(self, pod, backend):
        apply(pod, EXCLUDING, backend)
        nft(pod, "add set inet tidegate huge { type ipv4_addr; }")
        elements = ",".join(
            f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(100_000)
        )
        netns.run_in(pod, nftables.load, f"add element inet tidegate huge {{ {elements} }}\n")
        differences = backend.check(pod, rules_for(EXCLUDING))
        assert differences
        assert all(len(difference) < 1000 for difference in differences)
        assert apply(pod, EXCLUDING, backend) is Change.REPLACED
        assert check(pod, EXCLUDING) == ()

    def test_many_foreign_rules_are_told_in_a_few_sentences(self, pod, backend):
        apply(pod, DEFAULT, backend)
        netns.run_in(pod, nftables.load, "add rule inet tidegate outbound accept\n" * 1000)
        assert 2 <= len(backend.check(pod, rules_for(DEFAULT))) <= 41
        assert lines(pod).keys() - {
            line.name for _, found in rules_for(DEFAULT).lists for line in found
        } == {""}

    @pytest.mark.parametrize(
        "comment", ["\x1b[31mred", "two\n\t\tlines", "a\n\tchain outbound {", "ä" * 60, "proxy"]
    )
    def test_comments_of_others_cannot_do_harm(self, pod, backend, comment):
        apply(pod, DEFAULT, backend)
        netns.run_in(
            pod, nftables.load, f'add rule inet tidegate inbound counter comment "{comment}"\n'
        )
        differences = backend.check(pod, rules_for(DEFAULT))
        assert differences
        assert all(difference.isprintable() for difference in differences)
        *_, theirs = (line for line in backend.current(pod) if line.hook is Hook.INBOUND)
        assert theirs.name == comment.replace("\x1b", "\\x1b").replace("\n", "\\n").replace(
            "\t", "\\t"
        )
        assert apply(pod, DEFAULT, backend) is Change.REPLACED

    def test_names_of_others_cannot_do_harm(self, pod, backend):
        apply(pod, DEFAULT, backend)
        names = [b"\x1b[31mred", b"two\nlines", b"a {\n\tchain b {", b"\xff\xfe", b'"', b"}" * 120]
        netns.run_in(pod, chains, "tidegate", names)
        differences = backend.check(pod, rules_for(DEFAULT))
        assert differences
        assert all(one.isprintable() and len(one) < 1000 for one in differences)
        assert backend.current(pod)
        assert apply(pod, DEFAULT, backend) is Change.REPLACED
        assert check(pod, DEFAULT) == ()

    def test_a_table_that_another_program_owns_is_refused_by_name(self, pod, backend):
        with netns.run_in(pod, owned_table, "tidegate"):
            for attempt in (lambda: apply(pod, DEFAULT, backend), lambda: backend.remove(pod)):
                with pytest.raises(
                    KernelError,
                    match="not permitted, because table inet tidegate belongs to "
                    rf"process {os.getpid()} \(.+\), and only that may change it",
                ):
                    attempt()
            (difference,) = backend.check(pod, rules_for(DEFAULT))
            assert difference.startswith("table inet tidegate has the flags 2 (owner)")
        assert apply(pod, DEFAULT, backend) is Change.CREATED


class TestWithoutScratchNamespaces:
    @pytest.fixture(autouse=True)
    def _not_permitted(self, monkeypatch):
        def refuse(*_):
            raise KernelError("cannot make a network namespace: Operation not permitted", 1)

        monkeypatch.setattr(netns, "run_in_new", refuse)

    def test_a_difference_cannot_be_told(self, pod, backend):
        netns.run_in(pod, nftables.load, backend.render(rules_for(DEFAULT)))
        with pytest.raises(KernelError, match="cannot make a network namespace"):
            backend.check(pod, rules_for(DEFAULT))

    def test_rules_cannot_be_applied_and_the_old_ones_stay(self, pod, backend, monkeypatch):
        netns.run_in(pod, nftables.load, backend.render(rules_for(DEFAULT)))
        with pytest.raises(KernelError, match="cannot make a network namespace"):
            apply(pod, EXCLUDING, backend)
        monkeypatch.undo()
        assert check(pod, DEFAULT) == ()

    def test_rules_are_taken_away(self, pod, backend):
        netns.run_in(pod, nftables.load, backend.render(rules_for(DEFAULT)))
        assert backend.remove(pod) is Change.REMOVED


def test_no_program_is_started(pod, backend, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert apply(pod, DEFAULT, backend) is Change.CREATED
    assert backend.check(pod, rules_for(DEFAULT)) == ()
    assert apply(pod, EXCLUDING, backend) is Change.REPLACED
    assert backend.remove(pod) is Change.REMOVED


class TestWhatIsForgotten:
    @pytest.fixture
    def told(self, monkeypatch):
        """What is done to the kernel, in order, and to what."""
        told = []
        run = nf_transaction.run

        def tell(name):
            monkeypatch.setattr(
                translations,
                name,
                lambda of: told.append((name, dict(of) if name.endswith("queries") else [*of])),
            )

        def run_and_tell(*arguments):
            run(*arguments)
            told.append(("run", None))

        for name in ("end", "forget", "forget_queries"):
            tell(name)
        monkeypatch.setattr(nf_transaction, "run", run_and_tell)
        return told

    def test_connections_are_ended_before_the_rules_go_and_forgotten_after(self, pod, told):
        both = list(Family)
        apply(pod, DEFAULT)
        told.clear()
        remove(pod)
        assert told == [("end", both), ("run", None), ("forget", both)]
        told.clear()
        remove(pod)
        assert told == []

    def test_so_are_those_of_a_family_that_goes(self, pod, told):
        apply(pod, DEFAULT)
        told.clear()
        apply(pod, IPV6_ONLY)
        ended, *_, forgotten = told
        assert (ended, forgotten) == (("end", [Family.IPV4]), ("forget", [Family.IPV4]))
        told.clear()
        apply(pod, DEFAULT)
        assert [item for item in told if item[0] != "run"] == [("end", [])]

    def test_queries_are_forgotten_where_they_may_go_elsewhere_than_before(
        self, pod, told, backend
    ):
        def queries():
            forgotten = [of for name, of in told if name == "forget_queries"]
            told.clear()
            return forgotten

        first, second = (
            Dns(enabled=True, addresses=(address,)) for address in ("127.0.0.1", "127.0.0.5")
        )
        apply(pod, Policy(dns=first), backend)
        assert queries() == []
        apply(pod, Policy(dns=first, proxy=Proxy(uids=(7,))), backend)
        assert queries() == []
        apply(pod, Policy(dns=second), backend)
        assert queries() == [{Family.IPV4: ("127.0.0.5", second.port)}]
        apply(pod, Policy(dns=second, proxy=Proxy(uids=(7,))))
        assert queries() == [{Family.IPV4: ("127.0.0.5", second.port)}]
        apply(pod, DEFAULT, backend)
        assert queries() == [{}]
        apply(pod, Policy(dns=first), backend)
        assert queries() == []


def test_redirected_connections_go_on_when_others_rules_have_taken_over(redirected, backend):
    connection, landed = dial(redirected.pod, redirected.peer_ipv4, APP)
    with connection:
        assert landed.server == "pod"
        # Connection tracking, and with it translation, lasts as long as a rule that translates.
        chain = "chain x { type nat hook output priority -99; tcp dport 1 redirect to :2; }"
        nft(redirected.pod, f"add table inet other {{ {chain}; }}")
        try:
            assert backend.withdraw(redirected.pod) is Change.REMOVED
            assert echoes(connection)
            assert landing(redirected.pod, redirected.peer_ipv4, APP).server == "peer"
            assert backend.withdraw(redirected.pod) is Change.UNCHANGED
        finally:
            nft(redirected.pod, "delete table inet other")


def test_a_namespace_that_is_gone_is_an_error_that_names_it(backend):
    with namespace() as path:
        pass
    for attempt in (
        lambda: apply(path, DEFAULT, backend),
        lambda: apply(path, NOTHING, backend),
        lambda: backend.check(path, rules_for(DEFAULT)),
        lambda: backend.current(path),
        lambda: backend.withdraw(path),
        lambda: backend.remove(path),
    ):
        with pytest.raises(KernelError, match=path):
            attempt()


def test_thirty_namespaces_at_once_get_each_their_own_rules(backend):
    with ExitStack() as stack:
        pods = [stack.enter_context(namespace()) for _ in range(30)]
        policies = [excluding_ports(5000 + number) for number in range(len(pods))]
        for path in pods[::3]:
            nft(path, "add table inet other")
        with ThreadPoolExecutor(30) as pool:
            changes = list(
                pool.map(lambda path, policy: apply(path, policy, backend), pods, policies)
            )
            assert changes == [Change.CREATED] * len(pods)
            changes = list(pool.map(lambda path: apply(path, DEFAULT, backend), pods))
            assert changes == [Change.REPLACED] * len(pods)
        for path in pods:
            assert check(path, DEFAULT) == ()


def test_cycles_leave_no_descriptor_open(pod, backend):
    apply(pod, DEFAULT, backend)
    nft(pod, "add table inet other")
    remove(pod)
    before = open_descriptors()
    for _ in range(60):
        assert apply(pod, DEFAULT, backend) is Change.CREATED
        assert backend.remove(pod) is Change.REMOVED
    assert open_descriptors() == before


def test_a_thousand_exclusions_fit_into_one_line(pod, backend):
    policy = excluding_ports(*range(1, 2001, 2))
    assert apply(pod, policy, backend) is Change.CREATED
    assert apply(pod, policy) is Change.UNCHANGED
    listed = rules_for(policy).lists
    assert [(line.hook, line.name) for line in backend.current(pod)] == [
        (hook, line.name) for hook, found in listed for line in found
    ]
    assert "excluded-port" in lines(pod)


networks = st.one_of(
    st.ip_addresses(v=4).flatmap(lambda a: st.integers(0, 32).map(lambda n: (a, n))),
    st.ip_addresses(v=6)
    .filter(lambda address: address.ipv4_mapped is None)
    .flatmap(lambda a: st.integers(0, 128).map(lambda n: (a, n))),
).map(lambda pair: canonical_network(f"{pair[0]}/{pair[1]}"))
port_ranges = st.integers(1, 14000).flatmap(
    lambda first: st.sampled_from(
        [PortRange(first, last) for last in (first, first + 1, first + 999)]
    )
)
id_ranges = st.integers(0, 2**32 - 1001).flatmap(
    lambda first: st.sampled_from(
        [IdRange(first, last) for last in (first, first + 1, first + 999)]
    )
)
interfaces = st.lists(st.from_regex(r"[a-z][a-z0-9.@_-]{0,14}", fullmatch=True), max_size=3)


def some(strategy, most=6):
    return st.lists(strategy, max_size=most, unique=True).map(tuple)


policies = st.builds(
    Policy,
    inbound=st.builds(
        Inbound,
        enabled=st.booleans(),
        exclude_ports=some(port_ranges),
        exclude_cidrs=some(networks),
        exclude_interfaces=interfaces.map(lambda names: tuple(sorted(set(names)))),
    ),
    outbound=st.builds(
        Outbound,
        enabled=st.booleans(),
        exclude_ports=some(port_ranges),
        exclude_cidrs=some(networks),
        exclude_uids=some(id_ranges),
        exclude_gids=some(id_ranges),
    ),
    dns=st.builds(Dns, enabled=st.booleans()),
    families=st.sampled_from([(Family.IPV4, Family.IPV6), (Family.IPV4,), (Family.IPV6,)]),
    mode=st.sampled_from(Mode),
    drop_invalid=st.booleans(),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(policy=policies)
def test_whatever_the_policy_the_kernel_has_it_as_it_was_rendered(pod, policy):
    NftablesBackend().apply(pod, rules_for(policy))
    assert check(pod, policy) == ()
    assert apply(pod, policy) is Change.UNCHANGED
