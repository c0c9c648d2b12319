"""What connection tracking has to forget when redirect rules go or change, for every backend.

The kernel decides on each connection once and remembers the answer as a translation, which outlives the rules for
days. With the next rules it would come to life again, and reset a new connection that has the ports of an old one.
And a redirected connection goes on without its translation: what the application writes then leaves the workload in
plaintext, to a peer that has never heard of the connection. So it is ended.

Works on the network namespace of the calling thread, in that thread.
"""

import contextlib
import ipaddress
import itertools
import socket
import time
from collections.abc import Iterable, Iterator, Mapping

from tidegate.enforce.redirect.families import NUMBER, family_of
from tidegate.enforce.redirect.rules import DNS_ZONE, Rules, Translate
from tidegate.intent.policy import Family
from tidegate.kernel import conntrack, sockets
from tidegate.kernel.conntrack import Endpoint, Translated
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import Enough

_MOST_S = 2.0
"""How long connections may be looked through: of those that a hostile workload has opened there is no end."""
_MOST_QUERIES = 50_000
"""How many queries are forgotten at most."""


def end(families: Iterable[Family]) -> None:
    """End the TCP connections of these families that are translated to this namespace.

    To be called right before rules go: as long as they are there, the sidecar is told as well, and nothing that the
    application writes slips through. Connections that are translated to other hosts stay. A kernel without
    CONFIG_INET_DIAG_DESTROY leaves all of them to be reset by the other end; where they cannot be looked through in
    two seconds, so are the rest. KernelError when the kernel refuses.
    """
    concerned = frozenset(families)
    if not concerned:
        return
    until = time.monotonic() + _MOST_S
    try:
        with sockets.ender() as ender:
            for connection in _translated(socket.IPPROTO_TCP):
                if family_of(connection.original.destination) in concerned:
                    ender.end(*_ends(connection))
                if time.monotonic() > until:
                    return
    except KernelError as error:
        if error.errno not in sockets.CANNOT_END:
            raise


def forget(families: Iterable[Family]) -> None:
    """Forget the connections of families of which none is translated any more; `end` those that are still open.

    To be called after the rules are gone. KernelError when the kernel refuses; connections are forgotten all the same
    when it only refuses to end them.
    """
    going = tuple(families)
    if not going:
        return
    numbers = [NUMBER[family] for family in going]
    try:
        end(going)
    finally:
        for number in numbers if len(going) < len(NUMBER) else (socket.AF_UNSPEC,):
            conntrack.flush(number)


def forget_queries(keep: Mapping[Family, tuple[str, int]]) -> None:
    """Forget redirected queries that are answered from elsewhere than from these addresses and ports.

    The next query from the same socket then goes where the rules say. Those that go to the right place stay, answers
    on their way included; of a family that has none, all are forgotten. Those that cannot be looked through in two
    seconds stay until their sockets are silent for a while. KernelError when the kernel refuses.
    """
    astray = (
        query
        for query in _translated(socket.IPPROTO_UDP)
        if query.zone == DNS_ZONE
        and _pair(query.answers_from) != keep.get(family_of(query.original.destination))
    )
    conntrack.forget(list(itertools.islice(astray, _MOST_QUERIES)))


def resolvers(rules: Rules) -> dict[Family, tuple[str, int]]:
    """Where these rules send queries to, as `forget_queries` takes it."""
    actions = [line.action for _, lines in rules.lists for line in lines]
    return {
        family_of(action.address): (action.address, action.port)
        for action in actions
        if isinstance(action, Translate)
    }


def _translated(protocol: int) -> Iterator[Translated]:
    """The translated connections, as many as can be had in time."""
    with contextlib.suppress(Enough):
        yield from conntrack.translated(protocol, _MOST_S)


def _ends(connection: Translated) -> tuple[tuple[str, int], tuple[str, int]]:
    """The ends of the socket that is to go, its own first.

    What is redirected on its way out goes to loopback, and the application's end is dialled from. All else comes from
    outside, and this end is the sidecar's; there is none when it goes to another host.
    """
    original = connection.original
    if ipaddress.ip_address(connection.answers_from.address).is_loopback:
        own = (original.source, original.source_port)
        return own, (original.destination, original.destination_port)
    return _pair(connection.answers_from), _pair(connection.answers_to)


def _pair(endpoint: Endpoint) -> tuple[str, int]:
    return endpoint.address, endpoint.port
