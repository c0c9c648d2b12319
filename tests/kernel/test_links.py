"""Interfaces, addresses and routes in namespaces."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from namespaces import DEADLINE_S, open_descriptors, set_sysctl

from tidegate.kernel import links, netns
from tidegate.kernel.errors import KernelError


def index_of(netns_path, interface):
    return netns.run_in(netns_path, socket.if_nametoindex, interface)


def test_the_host_end_of_a_pods_interface_is_found_from_the_namespace_that_has_it(pair):
    found = netns.run_in(pair.peer, links.host_ifindex, pair.pod, "eth0")
    assert found == index_of(pair.peer, "host0")


def test_the_host_end_is_none_where_it_is_not(pair, new_namespace):
    elsewhere = new_namespace()
    # Gives the third namespace an id in the pod's, so that ids have to be compared.
    links.create_veth(pair.pod, "eth1", elsewhere, "eth1")
    assert netns.run_in(elsewhere, links.host_ifindex, pair.pod, "eth0") is None
    assert netns.run_in(pair.peer, links.host_ifindex, pair.pod, "eth1") is None
    assert links.host_ifindex(pair.pod, "eth0") is None


def test_what_is_no_veth_has_no_host_end(pair):
    for command in (
        ["ip", "link", "add", "mac0", "link", "host0", "type", "macvlan"],
        ["ip", "link", "set", "mac0", "netns", Path(pair.pod).name],
    ):
        assert netns.spawn(pair.peer, command).wait(DEADLINE_S) == 0
    assert netns.run_in(pair.peer, links.host_ifindex, pair.pod, "mac0") is None
    assert netns.run_in(pair.peer, links.host_ifindex, pair.pod, "lo") is None
    assert netns.run_in(pair.peer, links.host_ifindex, pair.pod, "nothing0") is None


def test_addresses_are_the_global_ones_of_both_families_ipv4_first(pair):
    assert links.addresses(pair.pod, "eth0") == (pair.pod_ipv4, pair.pod_ipv6)
    links.add_address(pair.pod, "eth0", "10.9.0.1/32")
    assert links.addresses(pair.pod, "eth0") == ("10.9.0.1", pair.pod_ipv4, pair.pod_ipv6)
    assert links.addresses(pair.pod, "lo") == ()
    assert links.addresses(pair.pod, "nothing0") == ()


def ip(netns_path, *arguments):
    assert netns.spawn(netns_path, ["ip", *arguments]).wait(DEADLINE_S) == 0


def test_of_an_address_with_a_peer_the_own_one_is_told(pair):
    ip(pair.pod, "address", "add", "10.9.0.1", "peer", "10.9.0.2", "dev", "eth0")
    ip(pair.pod, "address", "add", "fd09::1", "peer", "fd09::2", "dev", "eth0", "nodad")
    assert {"10.9.0.1", "fd09::1"} < set(links.addresses(pair.pod, "eth0"))
    assert {"10.9.0.1", "fd09::1"} < set(links.reach(pair.pod).addresses)


def test_a_name_that_no_interface_can_have_is_none(pair):
    for name in ("", "eth0" * 4, "e" * 200, "\udcff"):
        assert links.addresses(pair.pod, name) == ()
        assert links.host_ifindex(pair.pod, name) is None


def test_a_namespace_reaches_the_families_that_have_a_default_route(pair):
    own = (pair.pod_ipv4, pair.pod_ipv6)
    assert links.reach(pair.pod) == (own, (4, 6))
    ip(pair.pod, "route", "replace", "unreachable", "default", "metric", "7")
    ip(pair.pod, "-6", "route", "delete", "default")
    assert links.reach(pair.pod) == (own, (4,))
    ip(pair.pod, "-4", "route", "delete", "default", "via", pair.peer_ipv4)
    assert links.reach(pair.pod) == (own, ())


def test_addresses_of_all_interfaces_are_reached_but_no_local_ones(pair):
    ip(pair.pod, "address", "add", "10.9.0.1/32", "dev", "lo")
    ip(pair.pod, "address", "add", "10.9.0.2/32", "dev", "eth0", "scope", "link")
    assert links.reach(pair.pod).addresses == ("10.9.0.1", pair.pod_ipv4, pair.pod_ipv6)


def test_an_ipv6_address_that_somebody_else_has_is_none(pair):
    set_sysctl(pair.pod, "net/ipv6/conf/eth0/accept_dad", "1")
    ip(pair.pod, "address", "add", f"{pair.peer_ipv6}/64", "dev", "eth0")
    shown = ["ip", "-6", "address", "show", "dev", "eth0", "dadfailed"]
    deadline = time.monotonic() + DEADLINE_S
    while not netns.run_in(pair.pod, subprocess.check_output, shown):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert links.addresses(pair.pod, "eth0") == (pair.pod_ipv4, pair.pod_ipv6)


def test_the_agent_reads_interfaces_without_the_library_that_changes_them():
    program = (
        "import sys, tidegate.cli.agent\n"
        "from tidegate.kernel import links, netns\n"
        "links.addresses(netns.CURRENT, 'lo')\n"
        "links.host_ifindex(netns.CURRENT, 'lo')\n"
        "links.reach(netns.CURRENT)\n"
        "sys.exit('pyroute2' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_deleted_interface_is_gone_at_both_ends_and_may_be_deleted_again(pair):
    links.delete_link(pair.pod, "eth0")
    assert links.addresses(pair.peer, "host0") == ()
    links.delete_link(pair.pod, "eth0")


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (lambda pair: links.set_up(pair.pod, "nothing0"), "no interface nothing0"),
        (lambda pair: links.add_address(pair.pod, "eth0", "10.77.0.2/24"), "File exists"),
        (lambda pair: links.add_route(pair.pod, "10.3.0.0/16", gateway="10.99.0.1"), "unreachable"),
        (lambda pair: links.create_veth(pair.pod, "eth0", pair.peer, "x0"), "File exists"),
        (lambda pair: links.create_veth(pair.pod, "x0", "/run/netns/none", "x0"), "netns/none"),
    ],
)
def test_a_refusal_says_what_was_tried_and_why_not(pair, attempt, reason):
    with pytest.raises(KernelError, match=reason):
        attempt(pair)


def test_reading_leaves_no_descriptor_open(pair):
    links.addresses(pair.pod, "eth0")
    before = open_descriptors()
    for _ in range(50):
        links.addresses(pair.pod, "eth0")
        links.host_ifindex(pair.pod, "eth0")
    assert open_descriptors() == before
