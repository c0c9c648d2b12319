"""What the behaviour matrix and its neighbours share: networks, backends, and how outcomes and packets are counted."""

from collections import Counter

from matrix import INBOUND, Landed

from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.intent.policy import IdRange, PortRange, Protocol

TCP, UDP = Protocol.TCP, Protocol.UDP


def ports(*items):
    return tuple(
        PortRange(*item) if isinstance(item, tuple) else PortRange(item, item) for item in items
    )


def ids(*items):
    return tuple(
        IdRange(*item) if isinstance(item, tuple) else IdRange(item, item) for item in items
    )


FAR = ("192.0.2.0/24", "2001:db8:1::/48")
PEER = ("10.77.0.1/32", "fd77::1/128")
STRANGER = ("10.77.0.9/32", "fd77::9/128")
PEER_APP, INTO = "peer:8080", f"pod:{INBOUND}"

BACKENDS = {"nftables": NftablesBackend, "iptables": IptablesBackend}
UNCOUNTED = frozenset({"other-protocol", "older", "not-tcp"})
"""Lines on which packets that are not the battery's are decided too, such as neighbour discovery."""


def dials_of(battery):
    return [(dial, version) for dial in battery for version in (4, 6) if dial.possible(version)]


def shown(outcome):
    return f"{outcome.server}:{outcome.port}" if isinstance(outcome, Landed) else outcome


def counts(backend, netns_path):
    return Counter(
        {(line.hook, line.name): line.packets for line in backend.current(netns_path) or ()}
    )


def decided_by(grown, hook):
    """How many connections each line of a list decided on."""
    return Counter(
        {name: n for (at, name), n in grown.items() if at is hook and n and name not in UNCOUNTED}
    )
