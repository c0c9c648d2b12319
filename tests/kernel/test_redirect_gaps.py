"""What is told of rules, settings and listeners that leave a way around the sidecar; and what is not told."""

import functools
import socket

import consul_rules
import pytest
from namespaces import landing, pair_of, serving, set_sysctl

from tidegate.enforce.redirect import block, gaps
from tidegate.enforce.redirect.backend import BackendName
from tidegate.enforce.redirect.engine import Engine
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    Inbound,
    Mark,
    Mode,
    Outbound,
    Policy,
    Proxy,
)
from tidegate.kernel import chains, effects, netns, sockets
from tidegate.kernel.netlink import Netlink

INBOUND, OUTBOUND, APP, OTHER = 20000, 15001, 8080, 9000
PORTS = (INBOUND, OUTBOUND, APP, OTHER)
WITH_DNS = Policy(dns=Dns(enabled=True))
WITH_MARK = Policy(proxy=Proxy(mark=Mark(7)))
TPROXY = Policy(mode=Mode.TPROXY)
IPV4_ONLY = Policy(families=(Family.IPV4,))
NOTHING = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))

EARLIER = "is asked before tidegate's rules: it decides first"
AS_EARLY = "is asked at the same priority as tidegate's rules: it may decide first"
OPENED = "translates connections that the workload opens, and"
ARRIVING = "translates connections that arrive, and"
SENT_UNTRACKED = (
    "keeps packets that the workload sends from connection tracking: "
    "connections that would be redirected are dropped"
)
ARRIVING_UNTRACKED = (
    "keeps packets that arrive from connection tracking: "
    "connections that would be redirected are dropped"
)
HANDED_OVER = "hands over packets that arrive (tproxy, queue): they may not come to the sidecar"
MARKED = (
    "sets marks, and the policy tells the sidecar apart by a mark: "
    "connections of others may pass for the sidecar's"
)
REWRITTEN = "rewrites packets that arrive before tidegate's rules see them"


def dropped(hook):
    return (
        f"drops what its rules do not accept ({hook}): "
        "connections to the sidecar's ports (15001, 20000) have to be accepted there"
    )


def table(*chains_, family="inet"):
    """A table of nft with these chains, the first of which may be led to by the others."""
    return f"nft 'table {family} theirs {{ {' '.join(f'chain {chain};' for chain in chains_)} }}'"


def on(hook, rules, kind="filter", priority=0, policy="accept"):
    head = f"type {kind} hook {hook} priority {priority}; policy {policy};"
    return f"{hook.split()[0]}s {{ {head} {rules}; }}"


def of(chain, place="nftables table inet theirs"):
    return f"chain {chain} of the {place}"


TOLD = {
    "translated earlier": (
        table(
            on("output", "tcp dport 9 dnat ip to 10.0.0.9:9", "nat", -101),
            on("prerouting", "tcp dport 9 redirect to :8", "nat", -101),
        ),
        DEFAULT,
        [f"{of('outputs')} {OPENED} {EARLIER}", f"{of('preroutings')} {ARRIVING} {EARLIER}"],
    ),
    "translated at the same priority": (
        table(on("output", "meta l4proto tcp redirect to :8", "nat", -100)),
        DEFAULT,
        [f"{of('outputs')} {OPENED} {AS_EARLY}"],
    ),
    "translated later": (
        table(
            on("output", "meta l4proto tcp redirect to :8", "nat", -99),
            on("postrouting", "masquerade", "nat", -150),
            on("prerouting", "meta l4proto tcp redirect to :8", "nat", 0),
        ),
        DEFAULT,
        [],
    ),
    "translated in a chain that is jumped to": (
        table(
            "two { tcp dport 9 redirect to :8; }",
            "one { goto two; }",
            on("output", "udp dport 9 jump one", "nat", -100),
        ),
        DEFAULT,
        [f"{of('outputs')} {OPENED} {AS_EARLY}"],
    ),
    "translated in a chain that a map leads to": (
        table(
            "one { tcp dport 9 redirect to :8; }",
            on("output", "tcp dport vmap { 9 : jump one }", "nat", -100),
        ),
        DEFAULT,
        [f"{of('outputs')} {OPENED} {AS_EARLY}"],
    ),
    "only accepted earlier": (
        table(on("output", "accept", "nat", -101), on("prerouting", "accept", "nat", -101)),
        DEFAULT,
        [],
    ),
    "inbound translated in mode tproxy": (
        table(on("prerouting", "tcp dport 9 redirect to :8", "nat", -101)),
        TPROXY,
        [],
    ),
    "untracked": (
        table(on("output", "notrack", priority=-300), on("prerouting", "notrack", priority=-300)),
        DEFAULT,
        [f"{of('outputs')} {SENT_UNTRACKED}", f"{of('preroutings')} {ARRIVING_UNTRACKED}"],
    ),
    "arriving untracked, in mode tproxy": (
        table(on("prerouting", "notrack", priority=-300)),
        TPROXY,
        [],
    ),
    "untracked when it is tracked already": (
        table(on("output", "notrack", priority=-150)),
        DEFAULT,
        [],
    ),
    "marked where marks mean something": (
        table(on("output", "meta mark set 0x7", "route", -150)),
        WITH_MARK,
        [f"{of('outputs')} {MARKED}"],
    ),
    "marked where marks mean nothing": (
        table(on("output", "meta mark set 0x7", "route", -150)),
        DEFAULT,
        [],
    ),
    "marks only looked at": (table(on("output", "meta mark 0x7 counter")), WITH_MARK, []),
    "handed over": (
        table(on("prerouting", "tcp dport 9 tproxy ip to :8", priority=0)),
        DEFAULT,
        [f"{of('preroutings')} {HANDED_OVER}"],
    ),
    "handed over before, in mode tproxy": (
        table(on("prerouting", "tcp dport 9 tproxy ip to :8", priority=-160)),
        TPROXY,
        [f"{of('preroutings')} {HANDED_OVER}"],
    ),
    "handed over afterwards, in mode tproxy": (
        table(on("prerouting", "tcp dport 9 tproxy ip to :8", priority=-140)),
        TPROXY,
        [],
    ),
    "rewritten": (
        table(on("prerouting", "tcp dport 9 tcp dport set 8", priority=-300)),
        DEFAULT,
        [f"{of('preroutings')} {REWRITTEN}"],
    ),
    "given another class of service": (
        table(on("prerouting", "ip dscp set af11", priority=-300)),
        DEFAULT,
        [],
    ),
    "dropped by policy": (
        table(
            on("input", "tcp dport 9 accept", policy="drop"), on("output", "accept", policy="drop")
        ),
        DEFAULT,
        [f"{of('inputs')} {dropped('input')}", f"{of('outputs')} {dropped('output')}"],
    ),
    "dropped by a rule, as by any firewall": (table(on("input", "tcp dport 9 drop")), DEFAULT, []),
    "forwarded and sent by others": (
        table(on("forward", "drop", policy="drop"), on("postrouting", "drop", policy="drop")),
        DEFAULT,
        [],
    ),
    "at a device": (
        table(
            on("ingress device lo", "tcp dport 9 tcp dport set 8"),
            on("egress device lo", "tcp dport 9 drop"),
            family="netdev",
        ),
        DEFAULT,
        [
            f"{of('ingresss', 'nftables table netdev theirs')} "
            "rewrites packets that arrive, before tidegate's rules see them",
            f"{of('egresss', 'nftables table netdev theirs')} "
            "drops packets that leave, after tidegate's rules see them",
        ],
    ),
    "counted at a device": (
        table(on("ingress device lo", "counter"), family="netdev"),
        DEFAULT,
        [],
    ),
    "a family that is off": (
        table(on("output", "tcp dport 9 redirect to :8", "nat", -100), family="ip6"),
        IPV4_ONLY,
        [],
    ),
    "nothing is redirected": (
        table(on("output", "notrack", priority=-300, policy="drop")),
        NOTHING,
        [
            "inbound redirection is off in the policy: "
            "connections to the workload go around the sidecar",
            "outbound redirection is off in the policy: "
            "connections of the workload go around the sidecar",
        ],
    ),
    "empty chains of iptables": (
        "; ".join(
            f"{program} -t {name} -L -n >/dev/null"
            for program in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy")
            for name in ("nat", "mangle", "raw", "filter")
        ),
        DEFAULT,
        [],
    ),
    "untracked by iptables": (
        "iptables-nft -t raw -A OUTPUT -j CT --notrack; "
        "ip6tables-legacy -t raw -A PREROUTING -j NOTRACK; "
        "iptables-legacy -t raw -A PREROUTING -j CT --notrack; "
        "iptables-legacy -t raw -A OUTPUT -j CT --zone 5",
        DEFAULT,
        [
            f"{of('OUTPUT', 'nftables table ip raw')} {SENT_UNTRACKED}",
            f"{of('PREROUTING', 'legacy table ip raw')} {ARRIVING_UNTRACKED}",
            f"{of('PREROUTING', 'legacy table ip6 raw')} {ARRIVING_UNTRACKED}",
        ],
    ),
    "marked and handed over by iptables": (
        "iptables-legacy -t mangle -A OUTPUT -j MARK --set-mark 7; "
        "iptables-legacy -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 8",
        WITH_MARK,
        [
            f"{of('PREROUTING', 'legacy table ip mangle')} {HANDED_OVER}",
            f"{of('OUTPUT', 'legacy table ip mangle')} {MARKED}",
        ],
    ),
    "dropped by iptables' policy": (
        "ip6tables-legacy -P INPUT DROP; iptables-nft -P INPUT DROP",
        DEFAULT,
        [
            f"{of('INPUT', 'nftables table ip filter')} {dropped('input')}",
            f"{of('INPUT', 'legacy table ip6 filter')} {dropped('input')}",
        ],
    ),
}


@pytest.fixture
def pod(new_namespace):
    return new_namespace()


@pytest.fixture(scope="module")
def lab():
    """A pair with servers on all ports of both ends; each test cleans the pod."""
    with pair_of() as pair, serving(pair.pod, "pod", PORTS), serving(pair.peer, "peer", PORTS):
        yield pair


@pytest.fixture(params=tuple(BackendName))
def redirecting(request):
    """An engine of each backend."""
    return Engine(request.param)


def told(redirecting, pod, policy=DEFAULT):
    """The gaps, each of them fit for a terminal."""
    found = redirecting.gaps(pod, policy)
    assert all(gap.isprintable() for gap in found)
    return list(found)


def of_others(pod, commands):
    consul_rules.run(pod, "sh", "-e", text=commands)


@pytest.mark.parametrize("case", TOLD)
def test_what_others_rules_can_take_away_is_told_and_nothing_else(redirecting, pod, case):
    commands, policy, expected = TOLD[case]
    of_others(pod, commands)
    redirecting.apply(pod, policy)
    assert sorted(told(redirecting, pod, policy)) == sorted(expected)


DOCKER = """
{0} -t nat -N DOCKER_OUTPUT
{0} -t nat -N DOCKER_POSTROUTING
{0} -t nat -A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT
{0} -t nat -A DOCKER_OUTPUT -d 127.0.0.11/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination 127.0.0.11:41234
{0} -t nat -A DOCKER_OUTPUT -d 127.0.0.11/32 -p udp -m udp --dport 53 -j DNAT --to-destination 127.0.0.11:41235
{0} -t nat -A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING
{0} -t nat -A DOCKER_POSTROUTING -s 127.0.0.11/32 -p tcp -m tcp --sport 41234 -j SNAT --to-source :53
"""
"""What Docker has in a container for its resolver (libnetwork, resolver_unix.go)."""


@pytest.mark.parametrize(
    ("program", "place"),
    [
        ("iptables-nft", "nftables table ip nat"),
        ("iptables-legacy", "legacy table ip nat"),
    ],
)
def test_dockers_resolver_is_told_only_where_queries_are_redirected(pod, program, place):
    redirecting = Engine("nftables")
    of_others(pod, DOCKER.format(program))
    redirecting.apply(pod, WITH_DNS)
    assert told(redirecting, pod) == []
    assert told(redirecting, pod, WITH_DNS) == [f"{of('OUTPUT', place)} {OPENED} {AS_EARLY}"]


def test_legacy_rules_behind_tidegates_jump_take_nothing_away(pod):
    redirecting = Engine("iptables")
    redirecting.apply(pod, DEFAULT)
    of_others(
        pod, "iptables-legacy -t nat -A OUTPUT -p tcp --dport 9 -j DNAT --to-destination 10.0.0.9"
    )
    assert told(redirecting, pod) == []
    of_others(
        pod, "iptables-legacy -t nat -I OUTPUT -p tcp --dport 9 -j DNAT --to-destination 10.0.0.9"
    )
    assert told(redirecting, pod) == [f"{of('OUTPUT', 'legacy table ip nat')} {OPENED} {AS_EARLY}"]


@pytest.mark.parametrize("left_by", consul_rules.LEFT_BY)
def test_a_known_mesh_is_a_difference_and_no_gap(redirecting, pod, left_by):
    consul_rules.LEFT_BY[left_by](pod)
    redirecting.apply(pod, WITH_DNS)
    found = redirecting.check(pod, WITH_DNS)
    assert found
    assert all(difference.startswith("Consul redirects in ") for difference in found), found
    assert told(redirecting, pod, WITH_DNS) == []


def test_rules_of_a_mesh_do_not_hide_those_of_others_next_to_them(pod):
    redirecting = Engine("nftables")
    consul_rules.with_iptables_nft(pod)
    of_others(pod, "iptables-nft -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 9")
    assert f"{of('OUTPUT', 'nftables table ip nat')} {OPENED} {AS_EARLY}" in told(redirecting, pod)


def test_tidegates_own_rules_and_block_are_no_gap(redirecting, pod):
    for policy in (DEFAULT, TPROXY, WITH_DNS, WITH_MARK):
        redirecting.apply(pod, policy)
        block.block(pod)
        assert told(redirecting, pod, policy) == []


class TestUnderTraffic:
    def test_a_nat_chain_that_only_accepts_earlier_takes_nothing_away(self, redirecting, lab):
        of_others(
            lab.pod,
            table(on("output", "accept", "nat", -150), on("prerouting", "accept", "nat", -150)),
        )
        redirecting.apply(lab.pod, DEFAULT)
        try:
            assert told(redirecting, lab.pod) == []
            assert landing(lab.pod, lab.peer_ipv4, APP).port == OUTBOUND
            assert landing(lab.peer, lab.pod_ipv6, APP).port == INBOUND
        finally:
            redirecting.remove(lab.pod)
            of_others(lab.pod, "nft delete table inet theirs")

    def test_one_that_translates_earlier_takes_connections_away(self, redirecting, lab):
        of_others(
            lab.pod, table(on("output", f"tcp dport {APP} redirect to :{OTHER}", "nat", -101))
        )
        redirecting.apply(lab.pod, DEFAULT)
        try:
            assert told(redirecting, lab.pod) == [f"{of('outputs')} {OPENED} {EARLIER}"]
            assert landing(lab.pod, lab.peer_ipv4, APP).port == OTHER
        finally:
            redirecting.remove(lab.pod)
            of_others(lab.pod, "nft delete table inet theirs")


class TestBounds:
    def test_more_chains_than_are_looked_at_are_a_gap_and_no_difference(self, redirecting, pod):
        names = "".join(f"chain c{n} {{ }}\n" for n in range(chains.MOST + 1))
        consul_rules.run(pod, "nft", "-f", "-", text=f"table inet many {{\n{names}}}\n")
        redirecting.apply(pod, DEFAULT)
        assert redirecting.check(pod, DEFAULT) == ()
        (gap,) = told(redirecting, pod)
        assert gap.startswith("rules of others may be there that nobody sees: there are more than")

    def test_a_legacy_table_that_is_too_large_is_a_gap_and_no_difference(self, pod):
        redirecting = Engine("nftables")
        rules = "-A OUTPUT -p tcp -m comment --comment x -j ACCEPT\n" * 3000
        consul_rules.run(pod, "iptables-legacy-restore", text=f"*raw\n{rules}COMMIT\n")
        redirecting.apply(pod, DEFAULT)
        assert redirecting.check(pod, DEFAULT) == ()
        (gap,) = told(redirecting, pod)
        assert "nobody sees: the legacy table raw of ip is too large: " in gap

    def test_a_chain_of_many_rules_is_looked_at_in_part_and_that_is_told(self, redirecting, pod):
        counters = "counter; " * (effects.MOST_RULES - 1)
        rules = f"notrack; {counters} jump one; meta mark set 7;"
        base = f"chain theirs {{ type filter hook output priority -300; {rules} }}"
        consul_rules.run(
            pod, "nft", "-f", "-", text=f"table inet theirs {{ chain one {{ }}; {base}; }}"
        )
        redirecting.apply(pod, DEFAULT)
        assert told(redirecting, pod) == [
            f"{of('theirs')} (output) was not looked at to its end: "
            "its rules may come before tidegate's",
            f"{of('theirs')} {SENT_UNTRACKED}",
        ]

    def test_chains_that_lead_to_each_other_many_times_over_are_looked_at_once(self, pod):
        levels = 14
        script = "".join(
            f"chain c{n} {{ {f'jump c{n - 1}; ' * 3 if n else 'counter; notrack;'} }}\n"
            for n in range(levels)
        )
        base = f"chain theirs {{ type filter hook output priority -300; jump c{levels - 1}; }}"
        consul_rules.run(pod, "nft", "-f", "-", text=f"table inet theirs {{ {script} {base}\n}}")
        assert told(Engine("nftables"), pod) == [f"{of('theirs')} {SENT_UNTRACKED}"]

    def test_of_many_chains_some_are_told_and_the_rest_is_counted(self, redirecting, pod):
        made = effects.MOST_CHAINS + 10
        script = "".join(
            f"chain c{n} {{ type filter hook output priority -300; notrack; }}\n"
            for n in range(made)
        )
        consul_rules.run(pod, "nft", "-f", "-", text=f"table inet theirs {{ {script} }}")
        redirecting.apply(pod, DEFAULT)
        found = told(redirecting, pod)
        assert len(found) == gaps.MOST_TOLD + 1
        assert found[-1] == (
            f"{made - gaps.MOST_TOLD} more rules of other programs may come before tidegate's"
        )


class TestSettings:
    def test_strict_tracking_ends_older_connections_where_what_is_invalid_is_dropped(
        self, redirecting, pod
    ):
        policy = Policy(drop_invalid=True)
        redirecting.apply(pod, policy)
        assert told(redirecting, pod, policy) == []
        set_sysctl(pod, "net/netfilter/nf_conntrack_tcp_loose", "0")
        (gap,) = told(redirecting, pod, policy)
        assert gap.startswith("connections that are older than the rules end: ")
        assert told(redirecting, pod, DEFAULT) == []

    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
    @pytest.mark.parametrize(
        ("policy", "transparent", "gap"),
        [
            (DEFAULT, True, f"a listener on port {INBOUND} is transparent: in mode redirect "),
            (TPROXY, False, f"a listener on port {INBOUND} is not transparent: in mode tproxy "),
            (DEFAULT, False, None),
            (TPROXY, True, None),
        ],
    )
    def test_a_listener_that_does_not_fit_the_mode_is_told(
        self, pod, policy, transparent, gap, family
    ):
        with netns.run_in(pod, listener, family, transparent):
            found = told(Engine("nftables"), pod, policy)
        assert [one[: len(gap or "")] for one in found] == ([gap] if gap else [])
        assert told(Engine("nftables"), pod, policy) == []

    def test_more_listeners_than_are_looked_at_are_told_and_no_error(self, pod, monkeypatch):
        monkeypatch.setattr(sockets, "Netlink", functools.partial(Netlink, most=1))
        with netns.run_in(pod, listener, socket.AF_INET, True):
            (found,) = told(Engine("nftables"), pod, DEFAULT)
        assert found.startswith("more sockets listen than are looked at: who listens on port ")


def listener(family, transparent):
    made = socket.socket(family, socket.SOCK_STREAM)
    level, option = {  # linux/in.h, linux/in6.h: IP_TRANSPARENT, IPV6_TRANSPARENT
        socket.AF_INET: (socket.IPPROTO_IP, 19),
        socket.AF_INET6: (socket.IPPROTO_IPV6, 75),
    }[family]
    made.setsockopt(level, option, int(transparent))
    made.bind(("", INBOUND))
    made.listen()
    return made
