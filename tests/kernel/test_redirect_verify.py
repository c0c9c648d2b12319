"""Live probes prove that redirection works, or name what does not, and leave the namespace as it was."""

import gc
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from namespaces import DEADLINE_S, dial, echoes, open_descriptors, serving, set_sysctl
from verifying import (
    APP,
    BACKENDS,
    DNS,
    FAILED,
    INBOUND,
    OUTBOUND,
    PASSED,
    SKIPPED,
    SOME_RESOLVERS,
    TEST_NETS,
    TPROXY,
    applied,
    details,
    listening,
    nft,
    only,
    outcomes,
    state,
)

from tidegate.enforce.redirect.block import block
from tidegate.enforce.redirect.families import LABEL
from tidegate.enforce.redirect.nftables_rules import TABLE
from tidegate.enforce.redirect.probing.place import INTERFACE
from tidegate.enforce.redirect.verify import verify
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    IdRange,
    Inbound,
    Mark,
    Outbound,
    Policy,
    PortRange,
    Proxy,
)
from tidegate.kernel import links, netns, nf_tables, tun
from tidegate.kernel.errors import KernelError

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
    "dns of some resolvers": SOME_RESOLVERS,
    "dns to elsewhere": Policy(
        dns=Dns(enabled=True, addresses=("10.77.0.1", "fd77::1"), port=5353)
    ),
    "only some networks": ONLY_ELSEWHERE,
    "some users": Policy(outbound=Outbound(exclude_uids=(IdRange(0, 70000),))),
    "sources": Policy(inbound=Inbound(exclude_cidrs=("198.51.100.0/24", "2001:db8::/32"))),
    "drop invalid": Policy(drop_invalid=True),
    "tproxy": TPROXY,
}
ROUTER = """table ip router {
    chain a { type filter hook prerouting priority 0; ip daddr 10.90.0.0/16 counter comment "arrived"
    }
    chain f { type filter hook forward priority 0; counter comment "forwarded"
    }
}"""


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
                "dns-tcp": "redirected to LOOPBACK port 8600; nobody listens there yet",
                "dns-udp": "redirected to LOOPBACK port 8600; nobody listens there yet",
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
            assert passed[f"dns-udp-{family}"].endswith("port 8600; a listener answered")

    def test_nobody_although_the_port_is_open(self, pair):
        with applied(pair.pod, DNS), self.resolvers(pair.pod):
            passed = details(verify(pair.pod, DNS), PASSED)
        for family in Family:
            assert passed[f"dns-udp-{family}"].endswith("port 8600; nobody answered")

    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_nobody_because_the_port_is_closed(self, pair, backend):
        with applied(pair.pod, DNS, backend):
            passed = details(verify(pair.pod, DNS), PASSED)
        for family in Family:
            assert passed[f"dns-udp-{family}"].endswith("port 8600; nobody listens there yet")


class TestPortsThatAreServed:
    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_are_tried_each_and_get_no_connection(self, pair, backend):
        policy = Policy(inbound=Inbound(exclude_ports=only(9000)))
        with (
            applied(pair.pod, policy, backend),
            listening(pair.pod, INBOUND, APP, 9000, 9090) as listeners,
        ):
            probes = verify(pair.pod, policy)
            for listener in listeners:
                with pytest.raises(BlockingIOError):
                    listener.accept()
        for family in Family:
            assert details(probes, PASSED)[f"served-ports-{family}"] == (
                "ports 8080, 9090: redirected to port 20000; a listener answered; "
                "port 9000: left alone, as the policy says"
            )

    def test_are_those_that_can_be_reached_from_outside(self, pair):
        def listen():
            return socket.create_server(("127.0.0.1", APP))

        with applied(pair.pod, DEFAULT), netns.run_in(pair.pod, listen):
            assert "served-ports-ipv4" not in outcomes(verify(pair.pod, DEFAULT))

    def test_that_another_programs_rule_takes_elsewhere_fail_alone(self, pair):
        table = """table inet thief {
            chain c { type nat hook prerouting priority -150; tcp dport 8080 redirect to :9090
            }
        }"""
        with applied(pair.pod, DEFAULT), listening(pair.pod, APP, 9090, 9091):
            nft(pair.pod, table)
            failed = details(verify(pair.pod, DEFAULT), FAILED)
        assert set(failed) == {"served-ports-ipv4", "served-ports-ipv6"}
        assert failed["served-ports-ipv4"] == (
            "port 8080: it landed on FAR port 9090, not on port 20000"
        )

    def test_that_another_programs_rule_keeps_from_the_sidecar_fail_alone(self, pair):
        table = """table inet thief {
            chain c { type filter hook prerouting priority -300; tcp dport 8080 notrack
            }
            chain d { type filter hook output priority -300; tcp sport 8080 notrack
            }
        }"""
        policy = Policy(families=(Family.IPV4,))
        with applied(pair.pod, policy), listening(pair.pod, APP, 9090):
            nft(pair.pod, table)
            failed = details(verify(pair.pod, policy), FAILED)
        assert set(failed) == {"served-ports-ipv4"}

    def test_are_not_tried_without_end(self, pair):
        ports = range(9001, 9013)
        with applied(pair.pod, DEFAULT), listening(pair.pod, *ports):
            passed = details(verify(pair.pod, DEFAULT), PASSED)
        assert passed["served-ports-ipv6"] == (
            "ports 9001, 9002, 9003, 9004, 9005, 9006, 9007, 9008: redirected to port 20000; "
            "nobody listens there yet; 4 more are not tried"
        )

    @pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
    def test_tell_nothing_with_tproxy_but_what_drops_them(self, pair, backend):
        table = """table inet wall {
            chain c { type filter hook prerouting priority -300; tcp dport 8080 drop
            }
        }"""
        with (
            applied(pair.pod, TPROXY, backend),
            listening(pair.pod, INBOUND, transparent=True),
            listening(pair.pod, APP),
        ):
            skipped = details(verify(pair.pod, TPROXY), SKIPPED)
            nft(pair.pod, table)
            failed = details(verify(pair.pod, TPROXY), FAILED)
        for family in Family:
            name = f"served-ports-{family}"
            assert skipped[name] == (
                "port 8080: the port has a listener of its own: an answer tells nothing"
            )
            assert failed[name] == "port 8080: the listener on port 20000 did not get it"


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
        assert failed["inbound-ipv6"] == ("the listener on port 20000 is not transparent")

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
            "the port has a listener of its own: an answer tells nothing"
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
        set_sysctl(pair.peer, "net/ipv4/ip_forward", "1")
        links.add_route(pair.peer, "10.90.0.0/16", gateway=pair.pod_ipv4)
        nft(pair.peer, ROUTER)
        policy = Policy(outbound=Outbound(include_cidrs=("10.90.0.0/16",)))
        assert details(verify(pair.pod, policy), FAILED)["outbound-ipv4"] == f"{LEFT} by eth0"
        counts = {
            rule.comment: rule.packets
            for rule in netns.run_in(pair.peer, nf_tables.rules, "ip", "router")
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
            f"inbound-{family}": f"the workload has no {LABEL[family]} address" for family in Family
        }

    def test_ipv6_is_switched_off_in_the_namespace(self, pair):
        set_sysctl(pair.pod, "net/ipv6/conf/all/disable_ipv6", "1")
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
            set_sysctl(pair.pod, "net/netfilter/nf_conntrack_events", "0")
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
