"""Interfaces, addresses and routes in namespaces."""

import socket
from pathlib import Path

import pytest
from namespaces import DEADLINE_S, open_descriptors

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
