"""Live probes prove that redirection works, or name what does not, and leave the namespace as it was."""

import gc
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
from namespaces import DEADLINE_S, dial, echoes, open_descriptors, serving

from tidegate.enforce.redirect.block import block
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import TABLE, NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.enforce.redirect.verify import INTERFACE, Outcome, verify
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    IdRange,
    Inbound,
    Mark,
    Mode,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Proxy,
    UserPorts,
)
from tidegate.kernel import links, netns, nftables, tun
from tidegate.kernel.errors import KernelError

PASSED, FAILED, SKIPPED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED
INBOUND, OUTBOUND, APP = 20000, 15001, 8080
# linux/in6.h
IPV6_TRANSPARENT = 75
FAR = re.compile(r"\b(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d+|\b(?:2001:db8|3fff):[0-9a-f:]+")

KILLED = """
import sys, time
from tidegate.enforce.redirect import verify as verification
from tidegate.intent.policy import DEFAULT
probes = verification._probes
def half_way(place):
    found = list(probes(place))
    print("half-way", flush=True)
    time.sleep(60)
verification._probes = half_way
verification.verify(sys.argv[1], DEFAULT)
"""
TEST_NETS = (
    "192.0.2.0/24",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "2001:db8::/32",
    "3fff::/20",
)

DNS = Policy(dns=Dns(enabled=True))
TPROXY = Policy(mode=Mode.TPROXY)
ELSEWHERE = Policy(
    inbound=Inbound(port=21000, include_ports=(PortRange(9000, 9000),)),
    outbound=Outbound(
        port=16001,
        exclude_ports=(PortRange(1, 16000), PortRange(16003, 20999), PortRange(21001, 65535)),
    ),
    proxy=Proxy(uids=(0, 1000, 65534), gids=(7, 65534), mark=Mark(5)),
)
ONLY_ELSEWHERE = Policy(
    outbound=Outbound(include_cidrs=("10.77.0.0/24", "10.90.1.7/32", "fd99::/64"))
)
POLICIES = {
    "default": DEFAULT,
    "other ids and ports": ELSEWHERE,
    "dns": DNS,
    "dns of some resolvers": Policy(dns=Dns(enabled=True, resolvers=("10.96.0.10", "fd96::a"))),
    "dns to elsewhere": Policy(
        dns=Dns(enabled=True, addresses=("10.77.0.1", "fd77::1"), port=5353)
    ),
    "only some networks": ONLY_ELSEWHERE,
    "some users": Policy(outbound=Outbound(exclude_uids=(IdRange(0, 70000),))),
    "sources": Policy(inbound=Inbound(exclude_cidrs=("198.51.100.0/24", "2001:db8::/32"))),
    "drop invalid": Policy(drop_invalid=True),
    "tproxy": TPROXY,
}
BACKENDS = {"nftables": NftablesBackend, "iptables": IptablesBackend}


@contextmanager
def applied(netns_path, policy, backend=NftablesBackend):
    made = backend()
    made.apply(netns_path, rules_for(policy))
    yield
    made.remove(netns_path)


def outcomes(probes):
    return {probe.name: probe.outcome for probe in probes}


def details(probes, outcome):
    """What probes of one outcome say; addresses by chance are called FAR."""
    return {
        probe.name: FAR.sub("FAR", probe.detail) for probe in probes if probe.outcome is outcome
    }


def nft(netns_path, text):
    netns.run_in(netns_path, nftables.load, text)


def state(netns_path):
    """All that a verification could leave behind: interfaces, addresses, routes, rules of either kind."""
    commands = (
        ["ip", "-brief", "link"],
        ["ip", "-brief", "address"],
        ["ip", "route", "show", "table", "all"],
        ["ip", "-6", "route", "show", "table", "all"],
        ["ip", "rule"],
        ["ip", "-6", "rule"],
        ["nft", "-s", "list", "ruleset"],
    )
    shown = []
    for command in commands:
        process = netns.spawn(netns_path, command, stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        shown.append(output.decode())
    return shown


@contextmanager
def listening(netns_path, *ports, transparent=False):
    """Listeners that accept nothing; `transparent` ones as a sidecar has them in tproxy mode."""

    def listen(port):
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if transparent:
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1)
        listener.bind(("::", port))
        listener.listen()
        listener.setblocking(False)
        return listener

    with ExitStack() as stack:
        yield [stack.enter_context(netns.run_in(netns_path, listen, port)) for port in ports]


ROUTER = """table ip router {
    chain a { type filter hook prerouting priority 0; ip daddr 10.90.0.0/16 counter comment "arrived"
    }
    chain f { type filter hook forward priority 0; counter comment "forwarded"
    }
}"""


def rules_of(listed):
    return [item["rule"] for item in listed if "rule" in item]


class TestRulesThatAreRight:
    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    @pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
    def test_pass_before_anybody_listens(self, pair, policy, backend):
        with applied(pair.pod, policy, backend):
            probes = verify(pair.pod, policy)
        assert details(probes, FAILED) == {}
        for family in Family:
            assert outcomes(probes)[f"outbound-{family}"] is PASSED
        wanted = SKIPPED if policy is TPROXY else PASSED
        assert outcomes(probes)["inbound-ipv4"] is outcomes(probes)["inbound-ipv6"] is wanted

    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_pass_with_listeners_that_never_get_a_connection(self, pair, backend):
        with applied(pair.pod, DEFAULT, backend), listening(pair.pod, INBOUND, OUTBOUND) as sidecar:
            for _ in range(3):
                probes = verify(pair.pod, DEFAULT)
                assert set(outcomes(probes).values()) == {PASSED}
                assert details(probes, PASSED)["inbound-ipv6"] == (
                    "redirected to port 20000; a listener answered"
                )
            for listener in sidecar:
                with pytest.raises(BlockingIOError):
                    listener.accept()

    def test_are_tried_in_both_directions_and_families(self, pair):
        with applied(pair.pod, DNS):
            probes = verify(pair.pod, DNS)
        assert details(probes, PASSED) == {
            f"{name}-{family}": detail.replace("LOOPBACK", loopback)
            for family, loopback in (("ipv4", "127.0.0.1"), ("ipv6", "::1"))
            for name, detail in {
                "outbound": "redirected to port 15001; nobody listens there yet",
                "sidecar": "left alone as user 5995",
                "inbound": "redirected to port 20000; nobody listens there yet",
                "outbound-port": "redirected to port 20000; nobody listens there yet",
                "dns-tcp": "it went to LOOPBACK port 8600 instead of FAR port 53; nobody listens there yet",
                "dns-udp": "it went to LOOPBACK port 8600 instead of FAR port 53; nobody listens there yet",
            }.items()
        }

    def test_pass_without_any_route_out(self, new_namespace):
        path = new_namespace()
        links.create_veth(path, "eth0", path, "eth1")
        links.set_up(path, "eth0")
        links.set_up(path, "eth1")
        links.add_address(path, "eth0", "10.77.0.2/32")
        links.add_address(path, "eth0", "fd77::2/128")
        with applied(path, DEFAULT):
            assert set(outcomes(verify(path, DEFAULT)).values()) == {PASSED}

    def test_pass_for_every_way_to_tell_the_sidecar_apart(self, pair):
        with applied(pair.pod, ELSEWHERE):
            probes = verify(pair.pod, ELSEWHERE)
        assert details(probes, PASSED)["sidecar-ipv6"] == (
            "left alone as user 0, user 1000, user 65534, group 7, group 65534, mark 0x5"
        )

    def test_of_a_policy_that_redirects_nothing_say_so(self, pair):
        nothing = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
        for policy in (nothing, Policy(families=())):
            assert outcomes(verify(pair.pod, policy)) == {
                f"{name}-{family}": PASSED
                for family in Family
                for name in ("outbound", "inbound", "dns-udp")
            }
            assert set(details(verify(pair.pod, policy), PASSED).values()) == {
                "left alone, as the policy says"
            }

    def test_of_one_family_leave_the_other_alone(self, pair):
        policy = Policy(families=(Family.IPV6,))
        with applied(pair.pod, policy):
            passed = details(verify(pair.pod, policy), PASSED)
        assert passed["outbound-ipv4"] == passed["inbound-ipv4"] == "left alone, as the policy says"
        assert "redirected to port 15001" in passed["outbound-ipv6"]
        assert "sidecar-ipv4" not in passed

    def test_disturb_no_open_connection(self, pair):
        with applied(pair.pod, DEFAULT), serving(pair.pod, "pod", [INBOUND, OUTBOUND]):
            out, _ = dial(pair.pod, pair.peer_ipv4, APP)
            into, _ = dial(pair.peer, pair.pod_ipv6, APP)
            with out, into:
                verify(pair.pod, DEFAULT)
                assert echoes(out)
                assert echoes(into)


def only(port):
    return (PortRange(port, port),)


ANY_PORT = (PortRange(1, 65535),)
NODES = ("192.0.2.9/32", "198.51.100.9/32", "2001:db8::9/128")
EXCLUSIONS = {
    "excluded-port": Policy(
        outbound=Outbound(exclude_ports=(PortRange(443, 445), PortRange(9000, 9010)))
    ),
    "excluded-user": Policy(outbound=Outbound(exclude_uids=(IdRange(0, 3), IdRange(1000, 1009)))),
    "excluded-group": Policy(outbound=Outbound(exclude_gids=(IdRange(7, 7),))),
    "excluded-user-port": Policy(
        outbound=Outbound(
            exclude_user_ports=(
                UserPorts((Protocol.TCP,), only(5432), (IdRange(1000, 1009),)),
                UserPorts((Protocol.TCP,), ANY_PORT, (IdRange(2000, 2000),)),
            )
        )
    ),
    "excluded-network": Policy(
        outbound=Outbound(exclude_cidrs=("10.0.0.0/8", TEST_NETS[0], TEST_NETS[3]))
    ),
    "not-included": Policy(outbound=Outbound(include_cidrs=("10.77.0.0/24", "fd77::/64"))),
    "not-included-interface": Policy(outbound=Outbound(include_interfaces=("eth0",))),
    "inbound-excluded-port": Policy(
        inbound=Inbound(exclude_ports=(PortRange(22, 22), PortRange(9000, 9010)))
    ),
    "inbound-excluded-source": Policy(
        inbound=Inbound(exclude_cidrs=("10.0.0.0/8", TEST_NETS[1], TEST_NETS[4]))
    ),
    "direct-probe": Policy(inbound=Inbound(direct_probes=True, node_addresses=NODES)),
    "inbound-not-included": Policy(inbound=Inbound(include_ports=only(9000))),
    "inbound-not-included-interface": Policy(inbound=Inbound(include_interfaces=("eth0",))),
}
SOME_OF = ("excluded-network", "inbound-excluded-source")
TOLD = {
    "excluded-port": "port 443, port 9010",
    "excluded-user": "user 0, user 1009",
    "excluded-group": "group 7",
    "excluded-user-port": "user 2000 port 1, user 2000 port 65535, "
    "user 1000 port 5432, user 1009 port 5432",
    "inbound-excluded-port": "port 22, port 9010",
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
class TestExclusions:
    @pytest.mark.parametrize("name", EXCLUSIONS)
    def test_that_hold_pass(self, pair, name, backend):
        policy = EXCLUSIONS[name]
        with applied(pair.pod, policy, backend):
            probes = verify(pair.pod, policy)
        assert details(probes, FAILED) == {}
        passed = details(probes, PASSED)
        assert passed[f"{name}-ipv4"].startswith("left alone")
        assert passed[f"{name}-ipv6"].startswith("left alone")
        if name in TOLD:
            assert passed[f"{name}-ipv4"] == passed[f"{name}-ipv6"] == f"left alone: {TOLD[name]}"
        untried = details(probes, SKIPPED).get("exclusions-not-tried", "")
        assert f"{name}-ipv4" in untried if name in SOME_OF else untried == ""

    @pytest.mark.parametrize("name", EXCLUSIONS)
    def test_that_the_rules_do_not_know_fail_by_name(self, pair, name, backend):
        with applied(pair.pod, DEFAULT, backend):
            failed = details(verify(pair.pod, EXCLUSIONS[name]), FAILED)
        assert set(failed) == {f"{name}-ipv4", f"{name}-ipv6"}
        port = INBOUND if name.startswith(("inbound", "direct")) else OUTBOUND
        assert all(
            detail.endswith(f" port {port}, and should be left alone") for detail in failed.values()
        )

    def test_of_which_only_the_last_is_not_known_fail(self, pair, backend):
        known = Policy(outbound=Outbound(exclude_ports=(PortRange(443, 445),)))
        with applied(pair.pod, known, backend):
            failed = details(verify(pair.pod, EXCLUSIONS["excluded-port"]), FAILED)
        assert failed["excluded-port-ipv4"] == (
            "port 9010: it landed on 127.0.0.1 port 15001, and should be left alone"
        )

    @pytest.mark.parametrize("listens", [False, True], ids=["alone", "with the sidecar"])
    def test_of_ports_hold_or_fail_with_tproxy_too(self, pair, backend, listens):
        ipv4 = Policy(mode=Mode.TPROXY, families=(Family.IPV4,))
        policy = msgspec.structs.replace(ipv4, inbound=Inbound(exclude_ports=only(9000)))
        ports = (INBOUND,) if listens else ()
        name = "inbound-excluded-port-ipv4"
        with listening(pair.pod, *ports, transparent=True):
            with applied(pair.pod, policy, backend):
                assert outcomes(verify(pair.pod, policy))[name] is PASSED
            with applied(pair.pod, ipv4, backend):
                assert outcomes(verify(pair.pod, policy))[name] is FAILED

    def test_of_queries_hold_or_fail(self, pair, backend):
        of_port = Policy(dns=Dns(enabled=True), outbound=Outbound(exclude_ports=only(53)))
        of_resolvers = POLICIES["dns of some resolvers"]
        contradicted = {
            DEFAULT: {"dns-udp"},
            of_port: {"dns-udp", "dns-tcp", "excluded-port"},
            of_resolvers: {"dns-other-udp"},
        }
        for policy, names in contradicted.items():
            wanted = {f"{name}-{family}" for name in names for family in Family}
            with applied(pair.pod, policy, backend):
                probes = verify(pair.pod, policy)
                assert details(probes, FAILED) == {}
                assert set(details(probes, PASSED)) >= wanted
            with applied(pair.pod, DNS, backend):
                assert set(details(verify(pair.pod, policy), FAILED)) == wanted


class TestExclusionsThatAreNotTried:
    def test_are_told_in_one_line(self, pair):
        policy = Policy(
            outbound=Outbound(exclude_cidrs=("10.0.0.0/8",), exclude_interfaces=("eth1",)),
            inbound=Inbound(
                exclude_cidrs=("10.0.0.0/8", "fd00::/8"),
                direct_probes=True,
                node_addresses=("10.77.0.1/32",),
            ),
        )
        with applied(pair.pod, policy):
            probes = verify(pair.pod, policy)
        assert details(probes, FAILED) == {}
        assert details(probes, SKIPPED) == {
            "exclusions-not-tried": "excluded-network-ipv4, direct-probe-ipv4, "
            "inbound-excluded-source-ipv4, inbound-excluded-source-ipv6 "
            "(somebody may live at the addresses); excluded-interface-ipv4, excluded-interface-ipv6 "
            "(only what the workload really sends or gets goes by the interface)"
        }

    def test_have_another_that_covers_them(self, pair):
        policy = Policy(
            outbound=Outbound(exclude_uids=(IdRange(5995, 5995),), exclude_ports=only(443))
        )
        with applied(pair.pod, policy):
            probes = verify(pair.pod, policy)
        assert details(probes, SKIPPED) == {
            "exclusions-not-tried": "excluded-user-ipv4, excluded-user-ipv6 "
            "(it is not all that keeps a connection that can be tried from the sidecar)"
        }
        assert outcomes(probes)["excluded-port-ipv4"] is PASSED

    def test_would_not_be_redirected_anyway(self, pair):
        policy = Policy(
            outbound=Outbound(include_cidrs=("10.77.0.0/24", "fd77::/64"), exclude_ports=only(443))
        )
        with applied(pair.pod, policy):
            skipped = details(verify(pair.pod, policy), SKIPPED)
        assert skipped["exclusions-not-tried"].startswith("excluded-port-ipv4, excluded-port-ipv6")

    def test_have_no_tun(self, pair, monkeypatch):
        monkeypatch.setattr(tun, "DEVICE", "/dev/net/none")
        policy = EXCLUSIONS["excluded-port"]
        with applied(pair.pod, policy):
            skipped = details(verify(pair.pod, policy), SKIPPED)
        assert skipped["exclusions-not-tried"] == (
            "excluded-port-ipv4, excluded-port-ipv6 (there is no TUN interface to try it with)"
        )

    def test_are_of_addresses_that_the_workload_has_itself_or_a_route_to(self, pair):
        links.add_address(pair.pod, "eth0", "192.0.2.1/32")
        links.add_route(pair.pod, "192.0.2.2/32", gateway=pair.peer_ipv4)
        policy = Policy(outbound=Outbound(exclude_cidrs=("192.0.2.1/32", "192.0.2.2/32")))
        with applied(pair.pod, policy):
            before = state(pair.pod)
            skipped = details(verify(pair.pod, policy), SKIPPED)
            assert state(pair.pod) == before
        assert skipped["exclusions-not-tried"].startswith("excluded-network-ipv4 (somebody")


class TestWhoAnswersAQuery:
    @contextmanager
    def resolvers(self, netns_path):
        def listen(family, address):
            server = socket.socket(family, socket.SOCK_DGRAM)
            server.bind((address, 8600))
            server.settimeout(DEADLINE_S)
            return server

        with (
            netns.run_in(netns_path, listen, socket.AF_INET, "127.0.0.1") as ipv4,
            netns.run_in(netns_path, listen, socket.AF_INET6, "::1") as ipv6,
        ):
            yield ipv4, ipv6

    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_a_resolver(self, pair, backend):
        def answer(server):
            query, client = server.recvfrom(512)
            server.sendto(query, client)

        with (
            applied(pair.pod, DNS, backend),
            self.resolvers(pair.pod) as servers,
            ThreadPoolExecutor(2) as threads,
        ):
            answered = [threads.submit(answer, server) for server in servers]
            passed = details(verify(pair.pod, DNS), PASSED)
            for answering in answered:
                answering.result()
        for family in Family:
            assert passed[f"dns-udp-{family}"].endswith("of FAR port 53; a listener answered")

    def test_nobody_although_the_port_is_open(self, pair):
        with applied(pair.pod, DNS), self.resolvers(pair.pod):
            passed = details(verify(pair.pod, DNS), PASSED)
        for family in Family:
            assert passed[f"dns-udp-{family}"].endswith("of FAR port 53; nobody answered")

    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_nobody_because_the_port_is_closed(self, pair, backend):
        with applied(pair.pod, DNS, backend):
            passed = details(verify(pair.pod, DNS), PASSED)
        for family in Family:
            assert passed[f"dns-udp-{family}"].endswith("53; nobody listens there yet")


class TestTproxy:
    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_passes_when_the_transparent_listener_answers(self, pair, backend):
        with (
            applied(pair.pod, TPROXY, backend),
            listening(pair.pod, INBOUND, transparent=True) as (listener,),
        ):
            probes = verify(pair.pod, TPROXY)
            assert set(outcomes(probes).values()) == {PASSED}
            assert details(probes, PASSED)["inbound-ipv4"] == (
                "handed to the listener on port 20000, which answered"
            )
            with pytest.raises(BlockingIOError):
                listener.accept()

    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_fails_when_the_listener_is_not_transparent(self, pair, backend):
        with applied(pair.pod, TPROXY, backend), listening(pair.pod, INBOUND):
            failed = details(verify(pair.pod, TPROXY), FAILED)
        assert failed["inbound-ipv6"] == (
            "the listener on port 20000 did not get it, or is not transparent"
        )

    def test_fails_when_the_rules_are_missing(self, pair):
        with listening(pair.pod, INBOUND, transparent=True):
            failed = details(verify(pair.pod, TPROXY), FAILED)
        assert set(failed) >= {"inbound-ipv4", "inbound-ipv6", "outbound-port-ipv4"}

    def test_cannot_tell_about_a_port_that_has_a_listener_itself(self, pair):
        with (
            applied(pair.pod, TPROXY),
            listening(pair.pod, INBOUND, OUTBOUND, transparent=True),
        ):
            probes = verify(pair.pod, TPROXY)
        assert details(probes, SKIPPED)["outbound-port-ipv4"] == (
            "port 15001 has a listener of its own: an answer tells nothing"
        )
        assert outcomes(probes)["inbound-ipv4"] is PASSED


LEFT = "not redirected to port 15001: it left the namespace"
REACHED = "not redirected to port 20000: it reached port"


class TestWhatIsBroken:
    def test_no_rules_at_all(self, pair):
        failed = details(verify(pair.pod, DNS), FAILED)
        assert set(failed) == {
            f"{name}-{family}"
            for family in Family
            for name in ("outbound", "inbound", "outbound-port", "dns-tcp", "dns-udp")
        }
        assert failed["outbound-ipv4"] == failed["outbound-ipv6"] == LEFT
        assert failed["inbound-ipv6"].startswith(REACHED)
        assert "left the namespace" in failed["dns-udp-ipv4"]
        assert "left the namespace" in failed["dns-tcp-ipv6"]

    def test_outbound_only(self, pair):
        with applied(pair.pod, Policy(outbound=Outbound(enabled=False))):
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert failed == {"outbound-ipv4": LEFT, "outbound-ipv6": LEFT}

    def test_inbound_only(self, pair):
        with applied(pair.pod, Policy(inbound=Inbound(enabled=False))):
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert set(failed) == {"inbound-ipv4", "inbound-ipv6"}
        assert failed["inbound-ipv4"].startswith(REACHED)

    def test_one_family(self, pair):
        with applied(pair.pod, Policy(families=(Family.IPV4,))):
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert set(failed) == {"outbound-ipv6", "inbound-ipv6", "outbound-port-ipv6"}

    def test_flushed_by_somebody_else(self, pair):
        with applied(pair.pod, DEFAULT):
            netns.spawn(pair.pod, ["nft", "flush", "ruleset"]).wait(DEADLINE_S)
            assert len(details(verify(pair.pod, DEFAULT), FAILED)) == 6

    def test_other_ports(self, pair):
        other = Policy(inbound=Inbound(port=20001), outbound=Outbound(port=15002))
        with applied(pair.pod, other):
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert failed["outbound-ipv4"] == "it landed on 127.0.0.1 port 15002, not on port 15001"
        assert failed["inbound-ipv4"].endswith("port 20001, not on port 20000")

    def test_dns_left_out(self, pair):
        with applied(pair.pod, DEFAULT):
            probes = verify(pair.pod, DNS)
        failed = details(probes, FAILED)
        assert set(failed) == {f"dns-{way}-{family}" for family in Family for way in ("tcp", "udp")}
        assert "landed on 127.0.0.1 port 15001" in failed["dns-tcp-ipv4"]
        assert failed["dns-udp-ipv6"] == "not redirected to ::1 port 8600: it left the namespace"

    def test_the_sidecars_own_connections_go_round_in_circles(self, pair):
        with applied(pair.pod, Policy(proxy=Proxy(uids=(1337,)))):
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert failed["sidecar-ipv4"] == (
            "as user 5995: it landed on 127.0.0.1 port 15001, and should be left alone"
        )
        assert set(failed) == {"sidecar-ipv4", "sidecar-ipv6"}

    def test_the_outbound_listener_can_be_reached_from_outside(self, pair):
        with applied(pair.pod, DEFAULT):
            nft(pair.pod, f"insert rule inet {TABLE} inbound tcp dport 15001 return")
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert set(failed) == {"outbound-port-ipv4", "outbound-port-ipv6"}
        assert failed["outbound-port-ipv4"] == (
            "not redirected to port 20000: it reached port 15001 itself"
        )

    def test_rules_of_another_program_take_it_elsewhere(self, pair):
        table = """table ip thief {
            chain c { type nat hook output priority -150; tcp dport != 22 dnat to 10.77.0.1:15001
            }
        }"""
        with applied(pair.pod, DEFAULT):
            nft(pair.pod, table)
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert (
            failed["outbound-ipv4"]
            == "it landed on 10.77.0.1 port 15001, not on an address of the workload"
        )

    def test_something_drops_it_after_it_was_redirected(self, pair):
        table = """table inet wall {
            chain c { type filter hook input priority 0; tcp dport 20000 drop
            }
        }"""
        with applied(pair.pod, DEFAULT):
            nft(pair.pod, table)
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert failed["inbound-ipv4"] == ("no answer came back from port 20000: something drops it")

    def test_a_workload_that_is_blocked(self, pair):
        with applied(pair.pod, DEFAULT):
            block(pair.pod)
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert "outbound-ipv4" in failed
        assert "inbound-ipv6" in failed

    def test_rules_that_are_left_over(self, pair):
        nothing = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
        with applied(pair.pod, DEFAULT):
            failed = details(verify(pair.pod, nothing), FAILED)
        assert failed["outbound-ipv6"] == ("it landed on ::1 port 15001, and should be left alone")
        assert set(failed) == {
            f"{way}-{family}" for family in Family for way in ("outbound", "inbound")
        }


class TestWhatCannotBeTried:
    def test_every_address_in_which_nobody_lives_is_excluded(self, pair):
        policy = Policy(outbound=Outbound(exclude_cidrs=TEST_NETS))
        with applied(pair.pod, policy):
            skipped = details(verify(pair.pod, policy), SKIPPED)
        assert skipped == dict.fromkeys(
            ("outbound-ipv4", "outbound-ipv6"),
            "no address and port that can be tried is redirected",
        )

    def test_some_of_them_are_excluded(self, pair):
        policy = Policy(outbound=Outbound(exclude_cidrs=(*TEST_NETS[:2], TEST_NETS[3])))
        with applied(pair.pod, policy):
            assert set(outcomes(verify(pair.pod, policy)).values()) == {PASSED}

    def test_only_some_networks_go_to_the_sidecar_and_a_probe_takes_the_real_way(self, pair):
        with applied(pair.pod, ONLY_ELSEWHERE):
            probes = verify(pair.pod, ONLY_ELSEWHERE)
            assert outcomes(probes)["outbound-ipv4"] is outcomes(probes)["outbound-ipv6"] is PASSED
            assert "would really leave" in details(probes, SKIPPED)["sidecar-ipv4"]
        failed = details(verify(pair.pod, ONLY_ELSEWHERE), FAILED)
        assert failed["outbound-ipv4"] == f"{LEFT} by eth0"
        assert failed["outbound-ipv6"] == f"{LEFT} by eth0"

    def test_a_probe_that_takes_the_real_way_crosses_no_router(self, pair):
        """Forwarded packets would pass the peer's hook of this name."""
        links.set_sysctl(pair.peer, "net/ipv4/ip_forward", "1")
        links.add_route(pair.peer, "10.90.0.0/16", gateway=pair.pod_ipv4)
        nft(pair.peer, ROUTER)
        policy = Policy(outbound=Outbound(include_cidrs=("10.90.0.0/16",)))
        assert details(verify(pair.pod, policy), FAILED)["outbound-ipv4"] == f"{LEFT} by eth0"
        listed = netns.run_in(pair.peer, nftables.list_table, "ip", "router")
        counts = {
            rule["comment"]: rule["expr"][-1]["counter"]["packets"] for rule in rules_of(listed)
        }
        assert counts == {"arrived": 1, "forwarded": 0}

    def test_only_some_interfaces_are_concerned(self, pair):
        policy = Policy(
            inbound=Inbound(include_interfaces=("eth0",)),
            outbound=Outbound(include_interfaces=("eth0",)),
        )
        with applied(pair.pod, policy):
            probes = verify(pair.pod, policy)
        assert outcomes(probes)["outbound-ipv4"] is outcomes(probes)["outbound-ipv6"] is PASSED
        assert details(probes, SKIPPED)["inbound-ipv4"] == (
            "it is redirected on eth0, where nothing can be made to arrive"
        )

    def test_no_address_of_a_family(self, new_namespace):
        path = new_namespace()
        with applied(path, DEFAULT):
            skipped = details(verify(path, DEFAULT), SKIPPED)
        assert skipped == {
            f"inbound-{family}": f"the workload has no {family} address" for family in Family
        }

    def test_ipv6_is_switched_off_in_the_namespace(self, pair):
        links.set_sysctl(pair.pod, "net/ipv6/conf/all/disable_ipv6", "1")
        with applied(pair.pod, DEFAULT):
            probes = verify(pair.pod, DEFAULT)
        assert details(probes, FAILED) == {}
        assert outcomes(probes)["outbound-ipv4"] is PASSED

    def test_a_machine_without_tun_shows_what_can_be_shown(self, pair, monkeypatch):
        monkeypatch.setattr(tun, "DEVICE", "/dev/net/none")
        with applied(pair.pod, DNS):
            probes = verify(pair.pod, DNS)
        assert details(probes, FAILED) == {}
        assert set(details(probes, PASSED)) == {
            f"{name}-{family}" for family in Family for name in ("outbound", "dns-tcp", "dns-udp")
        }
        assert "no TUN interface" in details(probes, SKIPPED)["inbound-ipv4"]

    def test_connection_tracking_tells_no_beginnings(self, pair):
        with applied(pair.pod, DEFAULT):
            links.set_sysctl(pair.pod, "net/netfilter/nf_conntrack_events", "0")
            probes = verify(pair.pod, DEFAULT)
            assert "does not tell where it went" in details(probes, SKIPPED)["outbound-ipv4"]
            assert details(probes, FAILED) == {}
            # Connections that are answered are still there to be looked up.
            with listening(pair.pod, INBOUND, OUTBOUND):
                assert set(outcomes(verify(pair.pod, DEFAULT)).values()) == {PASSED}


class TestTheNamespaceAfterwards:
    def test_is_what_it_was(self, pair):
        with applied(pair.pod, DNS):
            before = state(pair.pod)
            verify(pair.pod, DNS)
            assert state(pair.pod) == before

    def test_is_what_it_was_when_the_verification_was_killed(self, pair):
        with applied(pair.pod, DEFAULT):
            before = state(pair.pod)
            process = subprocess.Popen(
                [sys.executable, "-c", KILLED, pair.pod], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout.readline() == "half-way\n"
            assert state(pair.pod) != before
            assert INTERFACE in state(pair.pod)[0]
            process.kill()
            process.communicate(timeout=DEADLINE_S)
            assert state(pair.pod) == before
            assert set(outcomes(verify(pair.pod, DEFAULT)).values()) == {PASSED}
            assert state(pair.pod) == before

    def test_has_no_half_open_connection(self, pair):
        with applied(pair.pod, DEFAULT), listening(pair.pod, INBOUND, OUTBOUND):
            verify(pair.pod, DEFAULT)
            command = ["ss", "-Htan", "state", "syn-recv"]
            process = netns.spawn(pair.pod, command, stdout=subprocess.PIPE)
            assert process.communicate(timeout=DEADLINE_S)[0] == b""


def test_two_verifications_of_one_namespace_take_turns(pair):
    with applied(pair.pod, DEFAULT), ThreadPoolExecutor(4) as threads:
        for probes in threads.map(verify, [pair.pod] * 8, [DEFAULT] * 8):
            assert set(outcomes(probes).values()) == {PASSED}


def test_no_descriptor_is_left_behind(pair):
    with applied(pair.pod, DNS):
        verify(pair.pod, DNS)
        gc.collect()
        before = open_descriptors()
        for _ in range(5):
            verify(pair.pod, DNS)
        gc.collect()
        assert open_descriptors() == before


def test_a_namespace_that_is_not_there_is_a_kernel_error():
    with pytest.raises(KernelError, match="no network namespace at /run/netns/tg-none"):
        verify("/run/netns/tg-none", DEFAULT)
