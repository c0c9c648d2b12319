"""What others call the address families that policies speak of."""

import socket

from tidegate.intent.policy import Family

LABEL = {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}
"""For people."""
VERSION = {Family.IPV4: 4, Family.IPV6: 6}
"""Of the internet protocol."""
NUMBER = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
HEADER = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""What nft calls the header, and the tables that only packets of the family come to."""


def family_of(address: str) -> Family:
    """The family of an address, or of a network."""
    return Family.IPV6 if ":" in address else Family.IPV4
