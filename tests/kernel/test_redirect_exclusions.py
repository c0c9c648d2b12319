"""Exclusions of a policy are tried one by one: they hold, fail by name, or are named as not tried."""

import msgspec
import pytest
from verifying import (
    BACKENDS,
    DNS,
    FAILED,
    INBOUND,
    OUTBOUND,
    PASSED,
    SKIPPED,
    SOME_RESOLVERS,
    TEST_NETS,
    applied,
    details,
    listening,
    only,
    outcomes,
    state,
)

from tidegate.enforce.redirect.verify import verify
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
    Protocol,
    UserPorts,
)
from tidegate.kernel import links, tun

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
        of_resolvers = SOME_RESOLVERS
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
