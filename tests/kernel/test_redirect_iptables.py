"""Redirection by the legacy tables: what is loaded, what counts as drift, and what is never touched.

Where each kind of connection lands under each policy is in test_redirect_matrix.py, for all backends.
"""

import fcntl
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil
import pytest
from legacy import lock_of_its_own, run, saved, set_names, sh
from namespaces import (
    DEADLINE_S,
    dial,
    echoes,
    landing,
    namespace,
    open_descriptors,
    serving,
    set_sysctl,
)
from redirecting import (
    APP,
    INBOUND,
    IPV4_ONLY,
    IPV6_ONLY,
    NOTHING,
    OTHER,
    PORTS,
    PROXY_UID,
    WITH_ALL_TABLES,
    cgroup,
    excluding_ports,
    pair_with_servers,
    policies_that_say_everything,
    ports,
)

from tidegate.enforce.redirect import iptables, translations
from tidegate.enforce.redirect.backend import Change
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import (
    Hook,
    Line,
    OfProtocol,
    Rules,
    ToPort,
    Tproxy,
    Zone,
    rules_for,
)
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    Mode,
    Outbound,
    Policy,
    Protocol,
    Proxy,
)
from tidegate.kernel import ipset, legacy_tables, netns, xtables
from tidegate.kernel.errors import KernelError

MANY_PORTS = tuple(range(1, 2001, 2))
MANY = Policy(
    outbound=Outbound(
        exclude_ports=ports(*MANY_PORTS, APP),
        exclude_cidrs=("192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32", "2001:db9::1/128"),
    )
)
BACKENDS = [IptablesBackend(with_sets=True), IptablesBackend(with_sets=False)]
WITH_AND_WITHOUT_SETS = pytest.mark.parametrize(
    "backend", BACKENDS, ids=["with sets", "without sets"]
)


def apply(netns_path, policy, backend=None):
    return (backend or IptablesBackend()).apply(netns_path, rules_for(policy))


def check(netns_path, policy, backend=None):
    return (backend or IptablesBackend()).check(netns_path, rules_for(policy))


def remove(netns_path):
    return IptablesBackend().remove(netns_path)


def lines(netns_path):
    """The packets of the lines that decide on connections; those that drop SYNs bear the same names."""
    return {
        line.name: line.packets
        for line in IptablesBackend().current(netns_path)
        if line.hook in (Hook.OUTBOUND, Hook.INBOUND, Hook.INBOUND_TPROXY)
    }


def ruleset(netns_path):
    return saved(netns_path), saved(netns_path, "ip6"), set_names(netns_path)


def tables(netns_path):
    """The legacy tables that exist."""
    return {
        family.value: netns.run_in(netns_path, legacy_tables.existing, family)
        for family in legacy_tables.Family
    }


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


@pytest.mark.parametrize("version", [4, 6])
@WITH_AND_WITHOUT_SETS
def test_excluded_ports_and_networks_are_left_alone_with_sets_and_without(lab, version, backend):
    peer = lab.peer_address(version)
    networks = (f"{peer}/{32 if version == 4 else 128}", "192.0.2.0/24", "2001:db8::/32")
    by_network = Policy(outbound=Outbound(exclude_cidrs=networks))
    seen = []
    try:
        for policy in (MANY, by_network):
            apply(lab.pod, policy, backend)
            seen += [landing(lab.pod, peer, port).server for port in (APP, OTHER)]
    finally:
        remove(lab.pod)
    assert seen == ["peer", "pod", "peer", "peer"]


@pytest.fixture
def every_policy():
    with cgroup(f"tg-xt-{os.getpid()}") as path:
        yield policies_that_say_everything(path)


@WITH_AND_WITHOUT_SETS
def test_what_is_loaded_is_what_the_programs_make_of_the_text(new_namespace, every_policy, backend):
    for policy in every_policy.values():
        mine, theirs = new_namespace(), new_namespace()
        backend.apply(mine, rules_for(policy))
        sections = re.split(r"^# (sets|ip6?)$", backend.render(rules_for(policy)), flags=re.M)
        for name, section in zip(sections[1::2], sections[2::2], strict=True):
            if name == "sets":
                run(theirs, "ipset", "restore", text=section)
            else:
                run(theirs, f"{name}tables-legacy-restore", "--noflush", text=section)
        assert ruleset(mine) == ruleset(theirs)


def test_what_arrives_where_no_address_of_its_family_is_goes_to_the_sidecar_all_the_same(pair):
    elsewhere = "10.78.0.9"
    sh(pair.pod, f"ip addr add {elsewhere}/32 dev lo; ip addr del {pair.pod_ipv4}/24 dev eth0")
    sh(pair.pod, f"ip route add {pair.peer_ipv4} dev eth0")
    set_sysctl(pair.pod, "net/ipv4/conf/all/arp_ignore", "0")
    sh(pair.peer, f"ip route add {elsewhere} dev host0")
    with serving(pair.pod, "pod", PORTS):
        apply(pair.pod, DEFAULT)
        landed = landing(pair.peer, elsewhere, APP)
    assert (landed.server, landed.port) == ("pod", INBOUND)
    assert landed.original == (elsewhere, APP)


def test_lines_are_told_in_the_order_of_the_policy_with_the_packets_of_both_families(redirected):
    before = lines(redirected.pod)
    for version in (4, 6):
        landing(redirected.pod, redirected.peer_address(version), APP, uid=PROXY_UID)
        landing(redirected.pod, redirected.peer_address(version), APP)
        landing(redirected.pod, redirected.pod_address(version), APP)
        landing(redirected.peer, redirected.pod_address(version), APP)
    after = lines(redirected.pod)
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {
        "proxy": 2,
        "to-outbound-listener": 2,
        "own-address": 2,
        "to-inbound-listener": 2,
    }
    wanted = [line.name for _, listed in rules_for(DEFAULT).lists for line in listed]
    assert [line.name for line in IptablesBackend().current(redirected.pod)] == wanted


def test_a_rule_that_only_leads_on_to_the_rest_of_the_list_counts_for_no_line(lab):
    apply(lab.pod, WITH_ALL_TABLES)
    try:
        before = lines(lab.pod)
        for version in (4, 6):
            landing(lab.pod, lab.peer_address(version), APP)
        after = lines(lab.pod)
    finally:
        remove(lab.pod)
    assert after["to-outbound-listener"] - before["to-outbound-listener"] == 2
    assert after["other-protocol"] == before["other-protocol"]


def test_an_unchanged_policy_changes_nothing_and_keeps_the_counters(redirected):
    landing(redirected.pod, redirected.peer_ipv4, APP)
    before = run(redirected.pod, "iptables-legacy-save", "-c", "-t", "nat").splitlines()[1:-1]
    assert any(re.match(r"\[[1-9].* to-outbound-listener", row) for row in before)
    assert apply(redirected.pod, DEFAULT) is Change.UNCHANGED
    assert check(redirected.pod, DEFAULT) == ()
    after = run(redirected.pod, "iptables-legacy-save", "-c", "-t", "nat").splitlines()[1:-1]
    assert after == before


OUR_SET = "$(ipset list -n | grep excluded-port)"
DRIFTS = {
    "iptables-legacy -t nat -A TIDEGATE_OUTBOUND -p tcp --dport 1 -j ACCEPT":
        "rule '-p tcp -m tcp --dport 1 -j ACCEPT' of chain TIDEGATE_OUTBOUND in table nat of ip is "
        "there and should not be",
    "ip6tables-legacy -t nat -I TIDEGATE_INBOUND -p tcp -m comment --comment not-tcp -j ACCEPT":
        "line not-tcp of chain TIDEGATE_INBOUND in table nat of ip6 is "
        "'-p tcp -m comment --comment not-tcp -j ACCEPT', "
        "should be '! -p tcp -m comment --comment not-tcp -j RETURN'",
    "iptables-legacy -t nat -F TIDEGATE_INBOUND":
        "line to-inbound-listener of chain TIDEGATE_INBOUND in table nat of ip is missing",
    "iptables-legacy -t nat -R TIDEGATE_OUTBOUND 3 -m owner --uid-owner 1 -m comment --comment proxy -j RETURN":
        "line proxy of chain TIDEGATE_OUTBOUND in table nat of ip is "
        "'-m owner --uid-owner 1 -m comment --comment proxy -j RETURN', "
        "should be '-m owner --uid-owner 5995 -m comment --comment proxy -j RETURN'",
    "iptables-legacy -t nat -R TIDEGATE_OUTBOUND 4 -p tcp -m set ! --match-set $(ipset list -n | grep excluded-port) "
    "dst -m comment --comment excluded-port -j RETURN":
        "line excluded-port of chain TIDEGATE_OUTBOUND in table nat of ip is '-p tcp -m set ! --match-set tidegate-",
    "iptables-legacy -t nat -D OUTPUT -j TIDEGATE_OUTBOUND":
        "rule 1 of OUTPUT in table nat of ip is not '-j TIDEGATE_OUTBOUND'",
    "iptables-legacy -t nat -I OUTPUT -j ACCEPT":
        "rule 2 of OUTPUT in table nat of ip is '-j TIDEGATE_OUTBOUND' and should not be",
    "iptables-legacy -t nat -R OUTPUT 1 -p udp -j TIDEGATE_OUTBOUND":
        "rule 1 of OUTPUT in table nat of ip is '-p udp -j TIDEGATE_OUTBOUND' and should not be",
    "iptables-legacy -t nat -A PREROUTING -j TIDEGATE_INBOUND":
        "rule 2 of PREROUTING in table nat of ip is '-j TIDEGATE_INBOUND' and should not be",
    "iptables-legacy -t nat -N TIDEGATE_OUTBOUND_7":
        "chain TIDEGATE_OUTBOUND_7 in table nat of ip is there and should not be",
    "iptables-legacy -t mangle -N TIDEGATE_TPROXY":
        "chain TIDEGATE_TPROXY in table mangle of ip is there and should not be",
    "iptables-legacy -t nat -F; iptables-legacy -t nat -X":
        "chain TIDEGATE_OUTBOUND in table nat of ip is missing",
    "ipset add $(ipset list -n | grep excluded-port) 65000": "set tidegate-",
    "ipset del $(ipset list -n | grep excluded-port) 1": "set tidegate-",
    "ipset flush": "set tidegate-",
    "ipset create tidegate-left hash:ip": "set tidegate-left is there and should not be",
}  # fmt: skip


@pytest.mark.parametrize("command", DRIFTS)
def test_drift_is_named_and_repaired(pod, command):
    apply(pod, MANY)
    before = ruleset(pod)
    sh(pod, command)
    differences = check(pod, MANY)
    assert any(one.startswith(DRIFTS[command]) for one in differences), differences
    assert apply(pod, MANY) is Change.REPLACED
    assert check(pod, MANY) == ()
    ours = [[row for row in rows if "TIDEGATE" in row] for rows in before[:2]]
    assert [[row for row in rows if "TIDEGATE" in row] for rows in ruleset(pod)[:2]] == ours
    assert set_names(pod) == before[2]


def test_a_chain_that_is_missing_stands_for_its_lines_and_the_jump_to_it(pod):
    apply(pod, IPV4_ONLY)
    sh(pod, "iptables-legacy -t nat -F; iptables-legacy -t nat -X")
    assert check(pod, IPV4_ONLY) == (
        "chain TIDEGATE_OUTBOUND in table nat of ip is missing",
        "chain TIDEGATE_INBOUND in table nat of ip is missing",
    )


def test_drift_of_a_set_is_told_by_its_entries(pod):
    apply(pod, MANY)
    name = next(name for name in set_names(pod) if name.endswith("excluded-port"))
    sh(pod, f"ipset add {name} 65000; ipset del {name} 1999")
    assert check(pod, MANY) == (
        f"set {name} holds 65000 and should not",
        f"set {name} does not hold 1999",
    )


def test_lines_in_another_order_are_drift(pod):
    apply(pod, DEFAULT)
    rows = saved(pod, table="nat")
    first, second = (row for row in rows if re.search("comment (proxy|own-address)", row))
    sh(pod, f"iptables-legacy -t nat {first.replace('-A', '-D', 1)}")
    at = 1 + [row for row in saved(pod) if row.startswith("-A TIDEGATE_OUTBOUND ")].index(second)
    words = first.removeprefix("-A TIDEGATE_OUTBOUND ")
    sh(pod, f"iptables-legacy -t nat -I TIDEGATE_OUTBOUND {at + 1} {words}")
    assert check(pod, DEFAULT) == (
        "the lines of chain TIDEGATE_OUTBOUND in table nat of ip are in another order",
    )
    assert apply(pod, DEFAULT) is Change.REPLACED
    assert check(pod, DEFAULT) == ()


def test_invalid_packets_are_dropped_before_a_proxy_can_take_them(pod):
    apply(pod, Policy(mode=Mode.TPROXY, drop_invalid=True))
    jumps = [row for row in saved(pod) if row.startswith("-A PREROUTING")]
    assert jumps == ["-A PREROUTING -j TIDEGATE_INVALID", "-A PREROUTING -j TIDEGATE_TPROXY"]


def test_rules_chains_and_sets_of_others_stay_as_they_are_with_their_counters(pod):
    for family in ("ip", "ip6"):
        sh(
            pod,
            f"""{family}tables-legacy -t nat -N TIDEGATE_OTHER; {family}tables-legacy -t nat -N MINE
            {family}tables-legacy -t nat -A OUTPUT -c 7 8 -m owner --uid-owner 5 -j MINE
            {family}tables-legacy -t nat -A PREROUTING -p tcp --dport 99 -m comment --comment proxy -j ACCEPT
            {family}tables-legacy -t nat -A MINE -c 3 4 -j TIDEGATE_OTHER
            {family}tables-legacy -t filter -P INPUT DROP
            {family}tables-legacy -t filter -A OUTPUT -j DROP
            {family}tables-legacy -t mangle -A PREROUTING -j MARK --set-mark 3""",
        )
    sh(pod, "ipset create other hash:ip; ipset add other 192.0.2.1")

    def everything():
        kept = [run(pod, f"{family}tables-legacy-save", "-c") for family in ("ip", "ip6")]
        rows = [row for text in kept for row in text.splitlines() if not row.startswith("#")]
        return rows, run(pod, "ipset", "save")

    sh(pod, "iptables-legacy -t raw -S; ip6tables-legacy -t raw -S")
    before = everything()
    assert apply(pod, MANY) is Change.CREATED
    assert apply(pod, WITH_ALL_TABLES) is Change.REPLACED
    assert apply(pod, IPV4_ONLY) is Change.REPLACED
    assert apply(pod, Policy(mode=Mode.TPROXY)) is Change.REPLACED
    assert remove(pod) is Change.REMOVED
    assert everything() == before
    assert remove(pod) is Change.UNCHANGED
    assert IptablesBackend().current(pod) is None


def test_what_the_programs_of_nf_tables_wrote_is_not_touched(pod):
    sh(
        pod,
        "iptables-nft -t nat -N TIDEGATE_OUTBOUND; iptables-nft -t nat -A OUTPUT -j TIDEGATE_OUTBOUND",
    )
    before = run(pod, "nft", "list", "ruleset")
    assert apply(pod, MANY) is Change.CREATED
    assert remove(pod) is Change.REMOVED
    assert run(pod, "nft", "list", "ruleset") == before


@pytest.mark.parametrize("policy", [NOTHING, Policy(families=())])
def test_a_policy_that_redirects_nothing_takes_everything_away(pod, policy):
    assert apply(pod, policy) is Change.UNCHANGED
    assert tables(pod) == {"ip": set(), "ip6": set()}
    apply(pod, MANY)
    assert "chain TIDEGATE_OUTBOUND in table nat of ip is there and should not be" in check(
        pod, policy
    )
    assert apply(pod, policy) is Change.REMOVED
    assert check(pod, policy) == ()
    assert set_names(pod) == []
    assert not any("TIDEGATE" in row for rows in ruleset(pod) for row in rows)


def test_redirected_connections_go_on_when_another_backend_has_taken_over(redirected):
    # By itself the kernel tracks connections only as long as some rule needs it.
    with ExitStack() as stack:
        out = stack.enter_context(dial(redirected.pod, redirected.peer_ipv4, APP)[0])
        stack.callback(NftablesBackend().remove, redirected.pod)
        NftablesBackend().apply(redirected.pod, rules_for(DEFAULT))
        assert IptablesBackend().withdraw(redirected.pod) is Change.REMOVED
        assert IptablesBackend().withdraw(redirected.pod) is Change.UNCHANGED
        assert echoes(out)


class TestOneFamily:
    @pytest.mark.parametrize(("policy", "touched"), [(IPV4_ONLY, "ip"), (IPV6_ONLY, "ip6")])
    def test_a_family_that_is_off_gets_no_table(self, pod, policy, touched):
        for _ in range(2):
            assert apply(pod, policy) is Change.CREATED
            assert apply(pod, policy) is Change.UNCHANGED
            assert check(pod, policy) == ()
            assert IptablesBackend().current(pod)
            assert remove(pod) is Change.REMOVED
        assert tables(pod) == {"ip": set(), "ip6": set(), touched: {"mangle", "nat"}}

    def test_looking_and_removing_make_no_table(self, pod):
        assert check(pod, DEFAULT)
        assert IptablesBackend().current(pod) is None
        assert remove(pod) is Change.UNCHANGED
        assert tables(pod) == {"ip": set(), "ip6": set()}

    def test_a_family_that_is_switched_off_loses_its_rules(self, lab):
        apply(lab.pod, DEFAULT)
        try:
            assert apply(lab.pod, IPV4_ONLY) is Change.REPLACED
            assert landing(lab.pod, lab.peer_ipv4, APP).server == "pod"
            assert landing(lab.pod, lab.peer_ipv6, APP).server == "peer"
        finally:
            remove(lab.pod)


class TestSets:
    def test_a_thousand_excluded_ports_are_one_rule(self, pod):
        assert apply(pod, excluding_ports(*MANY_PORTS)) is Change.CREATED
        rows = [row for row in saved(pod, table="nat") if "--comment excluded-port" in row]
        assert len(rows) == 1
        assert apply(pod, excluding_ports(*MANY_PORTS)) is Change.UNCHANGED
        assert len(set_names(pod)) == 1

    def test_without_sets_they_are_as_few_rules_as_multiport_takes(self, pod):
        backend = IptablesBackend(with_sets=False)
        assert apply(pod, excluding_ports(*MANY_PORTS), backend) is Change.CREATED
        rows = [row for row in saved(pod, table="nat") if "--comment excluded-port" in row]
        assert len(rows) == 67
        assert set_names(pod) == []
        assert check(pod, excluding_ports(*MANY_PORTS), backend) == ()

    def test_a_change_of_a_list_leaves_no_old_set(self, pod):
        apply(pod, excluding_ports(*MANY_PORTS))
        before = set_names(pod)
        assert apply(pod, excluding_ports(*MANY_PORTS[1:])) is Change.REPLACED
        assert len(set_names(pod)) == 1
        assert set_names(pod) != before

    def test_a_set_is_repaired_in_place_and_the_rules_are_not_touched(self, pod):
        apply(pod, MANY)
        sh(
            pod,
            f"ipset flush {OUR_SET}; iptables-legacy -t nat -Z; ipset create tidegate-spare hash:ip",
        )
        before = saved(pod)
        assert apply(pod, MANY) is Change.REPLACED
        assert saved(pod) == before
        assert check(pod, MANY) == ()

    def test_what_a_crash_left_goes_with_the_next_call(self, pod):
        netns.run_in(pod, ipset.create, [ipset.Set("tidegate-left", ipset.Kind.PORTS, ("1",))])
        assert apply(pod, DEFAULT) is Change.REPLACED
        assert set_names(pod) == []
        netns.run_in(pod, ipset.create, [ipset.Set("tidegate-left", ipset.Kind.PORTS, ())])
        assert remove(pod) is Change.REMOVED
        assert set_names(pod) == []

    def test_a_set_that_the_kernel_refuses_leaves_none_of_the_others(self, pod, monkeypatch):
        apply(pod, WITH_ALL_TABLES)
        before = ruleset(pod)
        create = ipset.create

        def refuse_networks(wanted):
            for one in wanted:
                refused = one.kind is ipset.Kind.IPV6_NETWORKS
                create([msgspec.structs.replace(one, entries=()) if refused else one])
                if refused:
                    raise KernelError("too many")

        monkeypatch.setattr(ipset, "create", refuse_networks)
        with pytest.raises(KernelError, match="too many"):
            apply(pod, MANY)
        assert ruleset(pod) == before


def our_set(netns_path, suffix=""):
    (name,) = (name for name in set_names(netns_path) if name.endswith(f"excluded-port{suffix}"))
    return name


def in_use(name):
    """A rule of somebody else that asks a set."""
    return f"iptables-legacy -t filter -A FORWARD -m set --match-set {name} dst -j ACCEPT"


class TestSetsOfOthersWithOurNames:
    MANY = excluding_ports(*MANY_PORTS)

    @pytest.fixture
    def name(self, pod):
        """The name of the set that the policy needs, which is not there."""
        apply(pod, self.MANY)
        name = our_set(pod)
        remove(pod)
        return name

    def test_go_a_few_with_each_call_and_are_not_read(self, pod, name, monkeypatch):
        strays = [f"tidegate-{number}" for number in range(120)]
        run(pod, "ipset", "restore", text="".join(f"create {one} hash:ip\n" for one in strays))
        read = []
        content = ipset.content
        monkeypatch.setattr(
            ipset, "content", lambda one, most: (read.append(one.name), content(one, most))[1]
        )
        monkeypatch.setattr(iptables, "_STRAYS_S", 0)
        left = []
        for change in (Change.REPLACED, Change.REPLACED, Change.REPLACED, Change.UNCHANGED):
            assert apply(pod, self.MANY) is change
            left.append(len(set_names(pod)) - 1)
        assert left == [70, 20, 0, 0]
        assert set(read) == {name}

    @pytest.mark.parametrize(
        "kind", ["hash:ip", "hash:net family inet6", "bitmap:ip range 10.0.0.0/24"]
    )
    def test_of_another_kind_that_nobody_uses_make_room(self, lab, kind):
        apply(lab.pod, MANY)
        name = our_set(lab.pod)
        remove(lab.pod)
        sh(lab.pod, f"ipset create {name} {kind}")
        try:
            assert apply(lab.pod, MANY) is Change.CREATED
            assert check(lab.pod, MANY) == ()
            assert apply(lab.pod, MANY) is Change.UNCHANGED
            assert landing(lab.pod, lab.peer_ipv4, APP).server == "peer"
            assert landing(lab.pod, lab.peer_ipv4, OTHER).server == "pod"
        finally:
            remove(lab.pod)
        assert set_names(lab.pod) == []

    def test_that_are_used_stay_and_stand_in_the_way_of_nothing(self, pod, name):
        other = f"{name[:29]}.1"
        for squatted in (name, other):
            sh(pod, f"ipset create {squatted} hash:ip; {in_use(squatted)}")
        for _ in range(2):
            assert apply(pod, self.MANY) is Change.CREATED
            assert check(pod, self.MANY) == ()
            assert apply(pod, self.MANY) is Change.UNCHANGED
            third = f"{name[:29]}.2"
            assert sorted(set_names(pod)) == sorted((name, other, third))
            sh(pod, f"ipset add {third} 60001")
            assert check(pod, self.MANY) == (f"set {third} holds 60001 and should not",)
            assert apply(pod, self.MANY) is Change.REPLACED
            assert check(pod, self.MANY) == ()
            assert remove(pod) is Change.REMOVED
            assert remove(pod) is Change.UNCHANGED
            assert sorted(set_names(pod)) == sorted((name, other))

    def test_of_which_all_names_are_taken_are_an_error_and_nothing_is_changed(self, pod, name):
        for squatted in (name, *(f"{name[:29]}.{number}" for number in range(1, 9))):
            sh(pod, f"ipset create {squatted} hash:ip; {in_use(squatted)}")
        apply(pod, DEFAULT)
        before = ruleset(pod)
        for attempt in (apply, check):
            with pytest.raises(KernelError, match=f"the names for the set {name} all belong to"):
                attempt(pod, self.MANY)
        assert ruleset(pod) == before
        assert remove(pod) is Change.REMOVED

    def test_of_our_kind_are_made_ours_also_where_a_rule_asks_them(self, pod, name):
        sh(
            pod,
            f"ipset create {name} bitmap:port range 1-5 timeout 900; ipset add {name} 4; {in_use(name)}",
        )
        assert check(pod, self.MANY)
        assert apply(pod, self.MANY) is Change.REPLACED
        assert check(pod, self.MANY) == ()
        assert set_names(pod) == [name]
        assert remove(pod) is Change.REMOVED
        assert set_names(pod) == [name]

    def test_an_exception_in_a_set_is_drift(self, pod):
        apply(pod, MANY)
        networks = sh(pod, "ipset save | awk '/add .* 192.0.2.0/ {print $2}'").strip()
        sh(pod, f"ipset del {networks} 192.0.2.0/24; ipset add {networks} 192.0.2.0/24 nomatch")
        assert check(pod, MANY) == (
            f"set {networks} does not hold the 2 entries it should and nothing else",
        )
        assert apply(pod, MANY) is Change.REPLACED
        assert check(pod, MANY) == ()

    def test_a_repair_that_is_refused_leaves_nothing(self, pod, monkeypatch):
        apply(pod, self.MANY)
        name = our_set(pod)
        sh(pod, f"ipset add {name} 60001")

        def refuse(*_):
            raise KernelError("no swap")

        monkeypatch.setattr(ipset, "swap", refuse)
        with pytest.raises(KernelError, match="no swap"):
            apply(pod, self.MANY)
        assert set_names(pod) == [name]


class TestTablesOfOthers:
    def test_one_that_is_too_large_is_told_and_not_worked_on(self, pod):
        apply(pod, IPV4_ONLY)
        rows = "-A POSTROUTING -j RETURN\n" * xtables.MOST_RULES
        run(pod, "iptables-legacy-restore", "--noflush", text=f"*nat\n{rows}COMMIT\n")
        before = ruleset(pod)
        backend = IptablesBackend()
        problem = "table nat of ip is too large"
        for attempt in (
            lambda: apply(pod, DEFAULT),
            lambda: check(pod, DEFAULT),
            lambda: remove(pod),
            lambda: backend.current(pod),
            lambda: backend.withdraw(pod),
        ):
            with pytest.raises(KernelError, match=problem):
                attempt()
        assert ruleset(pod) == before

    def test_what_is_told_of_what_others_wrote_has_a_bound(self, pod):
        apply(pod, IPV4_ONLY)
        rows = "-A OUTPUT -j TIDEGATE_OUTBOUND\n" * 500
        run(pod, "iptables-legacy-restore", "--noflush", text=f"*nat\n{rows}COMMIT\n")
        differences = check(pod, IPV4_ONLY)
        assert len(differences) == 101
        assert differences[-1] == "there are more differences than these 100"
        assert apply(pod, IPV4_ONLY) is Change.REPLACED
        assert check(pod, IPV4_ONLY) == ()


class TestWhatConnectionTrackingForgets:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What is done to translations and to tables, in order."""
        calls = []
        for name in ("end", "forget", "forget_queries"):
            monkeypatch.setattr(
                translations, name, lambda what, name=name: calls.append((name, what))
            )
        replace = xtables.replace

        def recording(family, table, *arguments):
            calls.append("replace")
            replace(family, table, *arguments)

        monkeypatch.setattr(xtables, "replace", recording)
        return calls

    def test_connections_end_before_the_rules_go_and_are_forgotten_after(self, pod, calls):
        both = tuple(Family)
        apply(pod, DEFAULT)
        assert set(calls) == {"replace"}
        calls.clear()
        apply(pod, IPV4_ONLY)
        assert calls == [("end", (Family.IPV6,)), *["replace"] * 2, ("forget", (Family.IPV6,))]
        calls.clear()
        remove(pod)
        assert calls == [("end", both), *["replace"] * 2, ("forget", both)]
        calls.clear()
        assert remove(pod) is Change.UNCHANGED
        assert calls == []

    def test_a_list_comes_before_the_one_that_it_takes_the_place_of_goes(self, pod, monkeypatch):
        tables = []
        replace = xtables.replace

        def recording(family, table, *arguments):
            tables.append(table)
            replace(family, table, *arguments)

        monkeypatch.setattr(xtables, "replace", recording)
        tproxy = msgspec.structs.replace(IPV4_ONLY, mode=Mode.TPROXY)
        for policy, order in (
            (IPV4_ONLY, ["mangle", "nat"]),
            (tproxy, ["mangle", "nat"]),
            (IPV4_ONLY, ["nat", "mangle"]),
        ):
            tables.clear()
            apply(pod, policy)
            assert tables == order

    def test_nothing_is_forgotten_when_another_backend_has_taken_over(self, pod, calls):
        apply(pod, DEFAULT)
        IptablesBackend().withdraw(pod)
        assert set(calls) == {"replace"}

    def test_queries_are_forgotten_when_they_go_elsewhere(self, pod, calls):
        def forgotten(policy):
            calls.clear()
            apply(pod, policy)
            return [call for call in calls if call != "replace"]

        dns = Policy(dns=Dns(enabled=True), families=(Family.IPV4,))
        other = msgspec.structs.replace(dns, dns=Dns(enabled=True, port=8601))
        also = msgspec.structs.replace(other, outbound=Outbound(exclude_ports=ports(9)))
        assert forgotten(IPV4_ONLY) == []
        assert forgotten(dns) == []
        assert forgotten(other) == [("forget_queries", {Family.IPV4: ("127.0.0.1", 8601)})]
        assert forgotten(also) == []
        assert forgotten(IPV4_ONLY) == [("forget_queries", {})]


TCP, UDP = OfProtocol((Protocol.TCP,)), OfProtocol((Protocol.UDP,))
REFUSED_LATE = Rules(
    families=(Family.IPV4, Family.IPV6),
    lists=(
        # TPROXY is for the table mangle: nat refuses it, when raw is loaded already.
        (Hook.OUTBOUND, (Line("bad", (TCP, ToPort(ports(*range(1, 99, 2)))), Tproxy(1)),)),
        (Hook.DNS_ZONE, (Line("good", (UDP,), Zone(3)),)),
    ),
)


@pytest.mark.parametrize("policy", [MANY, WITH_ALL_TABLES, NOTHING])
def test_a_table_that_the_kernel_refuses_leaves_the_old_rules_everywhere(pod, policy):
    apply(pod, policy)
    for family in ("ip", "ip6"):
        sh(pod, f"for table in raw mangle nat; do {family}tables-legacy -t $table -S; done")
    before = ruleset(pod)
    with pytest.raises(
        KernelError, match="cannot change the legacy table nat of ip: Invalid argument"
    ):
        IptablesBackend().apply(pod, REFUSED_LATE)
    assert ruleset(pod) == before
    assert check(pod, policy) == ()


def test_a_table_that_cannot_be_taken_back_either_is_told(pod, monkeypatch):
    replace = xtables.replace
    loaded = []

    def refuse_the_second_time(*arguments):
        place = arguments[:2]
        if place in loaded:
            raise KernelError("no more")
        loaded.append(place)
        replace(*arguments)

    monkeypatch.setattr(xtables, "replace", refuse_the_second_time)
    with pytest.raises(KernelError, match=r"Invalid argument; and what was .* taken back: no more"):
        IptablesBackend().apply(pod, REFUSED_LATE)


def test_what_is_added_comes_before_what_goes(pod, monkeypatch):
    replace = xtables.replace
    order = []

    def recording(family, table, *arguments):
        order.append(f"{family} {table}")
        replace(family, table, *arguments)

    monkeypatch.setattr(xtables, "replace", recording)

    def steps(policy):
        order.clear()
        apply(pod, msgspec.structs.replace(policy, families=(Family.IPV4,)))
        return order[:]

    assert steps(WITH_ALL_TABLES) == ["ip raw", "ip mangle", "ip nat"]
    assert steps(Policy(mode=Mode.TPROXY, drop_invalid=True)) == ["ip mangle", "ip nat", "ip raw"]
    assert steps(Policy(drop_invalid=True)) == ["ip nat", "ip mangle"]
    assert steps(NOTHING) == ["ip nat", "ip mangle"]


class TestOtherProgramsAtTheSameTime:
    def test_the_lock_is_waited_for(self, pod, monkeypatch):
        with lock_of_its_own(monkeypatch) as lock, ThreadPoolExecutor(1) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = threading.Event()
            wait_for = xtables._wait_for
            monkeypatch.setattr(
                xtables, "_wait_for", lambda *arguments: (waiting.set(), wait_for(*arguments))
            )
            applied = pool.submit(apply, pod, DEFAULT)
            assert waiting.wait(DEADLINE_S)
            assert IptablesBackend().current(pod) is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert applied.result(DEADLINE_S) is Change.CREATED

    def test_a_lock_that_is_held_too_long_is_named_and_nothing_is_changed(self, pod, monkeypatch):
        apply(pod, DEFAULT)
        with lock_of_its_own(monkeypatch) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            monkeypatch.setattr(xtables, "LOCK_WAIT_S", 0.05)
            problem = f"holds the xtables lock {re.escape(lock.name)} for 0.05 s"
            with pytest.raises(KernelError, match=problem):
                apply(pod, MANY)
            # What changes nothing needs no lock.
            assert apply(pod, DEFAULT) is Change.UNCHANGED
        assert check(pod, DEFAULT) == ()
        assert set_names(pod) == []

    def test_appliers_that_race_end_with_the_rules_of_one_of_them(self, pod):
        policies = [MANY, DEFAULT, WITH_ALL_TABLES, excluding_ports(*MANY_PORTS[1:])]
        with ThreadPoolExecutor(len(policies)) as pool:
            list(pool.map(apply, [pod] * 40, policies * 10))
        left = [policy for policy in policies if check(pod, policy) == ()]
        assert len(left) == 1

    def test_a_jump_from_somebody_elses_chain_is_told_and_goes_and_the_chain_stays(self, pod):
        apply(pod, IPV4_ONLY)
        sh(
            pod,
            "iptables-legacy -t nat -N MINE; iptables-legacy -t nat -A MINE -j TIDEGATE_OUTBOUND",
        )
        assert check(pod, IPV4_ONLY) != ()
        assert remove(pod) is Change.REMOVED
        assert "-N MINE" in sh(pod, "iptables-legacy -t nat -S")


def test_a_cgroup_that_is_made_anew_under_its_name_is_a_difference(pod):
    name = f"tg-xt-{os.getpid()}-anew"
    policy = Policy(proxy=Proxy(uids=(), cgroup=name), families=(Family.IPV4,))
    with cgroup(name):
        apply(pod, policy)
        assert check(pod, policy) == ()
    with cgroup(name):
        differences = check(pod, policy)
        for place in (
            "TIDEGATE_INVALID_OUTBOUND in table mangle",
            "TIDEGATE_OUTBOUND in table nat",
        ):
            said = f"line proxy-cgroup of chain {place} of ip is"
            assert any(one.startswith(said) for one in differences)
        assert len(differences) == 2
        assert apply(pod, policy) is Change.REPLACED
        assert check(pod, policy) == ()
    for attempt in (apply, check):
        with pytest.raises(KernelError, match=f"there is no cgroup {name}"):
            attempt(pod, policy)


def test_a_namespace_that_is_gone_is_an_error_that_names_it():
    with namespace() as path:
        pass
    for attempt in (
        lambda: apply(path, DEFAULT),
        lambda: check(path, DEFAULT),
        lambda: IptablesBackend().current(path),
        lambda: IptablesBackend().withdraw(path),
        lambda: remove(path),
    ):
        with pytest.raises(KernelError, match=path):
            attempt()


ALONE = """
import os, subprocess, sys
import _posixsubprocess

def refuse(*arguments, **keywords):
    raise SystemExit("a program was started")

_posixsubprocess.fork_exec = os.posix_spawn = os.execve = os.system = refuse
subprocess._fork_exec = refuse
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import DEFAULT, Outbound, Policy, PortRange

many = Policy(outbound=Outbound(exclude_ports=tuple(PortRange(n, n) for n in range(1, 99, 2))))
backend = IptablesBackend()
for policy in (DEFAULT, many):
    print(backend.apply(sys.argv[1], rules_for(policy)), backend.check(sys.argv[1], rules_for(policy)))
print(len(backend.check(sys.argv[1], rules_for(DEFAULT))) > 0, backend.remove(sys.argv[1]))
"""


def test_no_program_is_needed_and_none_is_started(pod):
    process = subprocess.run(
        [sys.executable, "-c", ALONE, pod],
        env={"PATH": "/nonexistent"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.stderr == ""
    assert process.stdout.splitlines() == ["created ()", "replaced ()", "True removed"]


def test_only_the_first_rules_of_their_kind_take_a_process(pod, monkeypatch):
    apply(pod, MANY)
    remove(pod)
    monkeypatch.setattr(os, "fork", None)
    assert apply(pod, MANY) is Change.CREATED
    assert apply(pod, MANY) is Change.UNCHANGED
    assert check(pod, MANY) == ()
    assert remove(pod) is Change.REMOVED


def test_twenty_namespaces_at_once_get_each_their_own_rules():
    with ExitStack() as stack:
        pods = [stack.enter_context(namespace()) for _ in range(20)]
        policies = [excluding_ports(*range(number, 6000, 60)) for number in range(1, len(pods) + 1)]
        with ThreadPoolExecutor(20) as pool:
            changes = list(pool.map(apply, pods, policies))
        assert changes == [Change.CREATED] * len(pods)
        for path, policy in zip(pods, policies, strict=True):
            assert check(path, policy) == ()


def test_three_hundred_cycles_leave_nothing_in_this_process(pod):
    def cycles(count):
        for _ in range(count):
            assert apply(pod, MANY) is Change.CREATED
            assert remove(pod) is Change.REMOVED

    cycles(20)
    before, resident_before = held(), resident_bytes()
    cycles(300)
    assert held() == before
    assert resident_bytes() - resident_before < 4 * 2**20


def held():
    """Descriptors, threads and children that this process has."""
    children = {child.pid for child in psutil.Process().children()}
    return open_descriptors(), threading.active_count(), children


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
