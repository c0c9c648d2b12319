"""Addresses, as they are shown."""

from tidegate.addresses import endpoint


def test_an_ipv6_address_is_told_from_the_port_behind_it():
    assert endpoint("10.1.2.3", 443) == "10.1.2.3:443"
    assert endpoint("fd00::1", 443) == "[fd00::1]:443"
    assert endpoint("::", 1) == "[::]:1"
