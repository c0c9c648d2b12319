"""Where connections go is read from connection tracking, also of those that have ended."""

import socket

import pytest
from namespaces import dial, serving

from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import DEFAULT
from tidegate.kernel import conntrack, links, netns
from tidegate.kernel.conntrack import Endpoint, Original
from tidegate.kernel.errors import KernelError
from tidegate.kernel.sockets import Listener, listeners

APP, INBOUND, OUTBOUND = 8080, 20000, 15001


@pytest.fixture
def redirected(pair):
    NftablesBackend().apply(pair.pod, rules_for(DEFAULT))
    return pair


def original(connection, destination, port):
    source, source_port, *_ = connection.getsockname()
    return Original(
        protocol=socket.IPPROTO_TCP,
        source=source,
        source_port=source_port,
        destination=destination,
        destination_port=port,
    )


@pytest.mark.parametrize("version", [4, 6])
def test_an_open_connection_is_found_by_what_was_dialled(redirected, version):
    address = redirected.peer_address(version)
    with serving(redirected.pod, "pod", [OUTBOUND]):
        connection, _ = dial(redirected.pod, address, APP)
        with connection:
            dialled = original(connection, address, APP)
            here = "127.0.0.1" if version == 4 else "::1"
            found = netns.run_in(redirected.pod, conntrack.destination_of, dialled)
            assert found == Endpoint(here, OUTBOUND)
            netns.run_in(redirected.pod, conntrack.flush)
            assert netns.run_in(redirected.pod, conntrack.destination_of, dialled) is None


@pytest.mark.parametrize("version", [4, 6])
def test_the_beginning_of_a_connection_that_is_refused_is_heard(redirected, version):
    address = redirected.peer_address(version)

    def refused():
        with conntrack.beginnings() as beginnings:
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            with socket.socket(family, socket.SOCK_STREAM) as connection:
                connection.bind(("", 0))
                with pytest.raises(ConnectionRefusedError):
                    connection.connect((address, APP))
                port = connection.getsockname()[1]
            dialled = Original(
                protocol=socket.IPPROTO_TCP,
                source=redirected.pod_address(version),
                source_port=port,
                destination=address,
                destination_port=APP,
            )
            assert conntrack.destination_of(dialled) is None
            return beginnings.destination_of(dialled)

    here = "127.0.0.1" if version == 4 else "::1"
    assert netns.run_in(redirected.pod, refused) == Endpoint(here, OUTBOUND)


def heard_after(redirected, count):
    """The destination of the last of some connections, and whether all beginnings were heard."""
    address = redirected.peer_ipv4

    def begin():
        with (
            conntrack.beginnings() as beginnings,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise,
        ):
            noise.bind((redirected.pod_ipv4, 0))
            for port in range(1, count + 1):
                noise.sendto(b"", (address, port))
            last = Original(
                protocol=socket.IPPROTO_UDP,
                source=redirected.pod_ipv4,
                source_port=noise.getsockname()[1],
                destination=address,
                destination_port=count,
            )
            return beginnings.destination_of(last), beginnings.complete

    return netns.run_in(redirected.pod, begin)


def test_one_connection_is_found_among_thousands(redirected):
    assert heard_after(redirected, 3000) == (Endpoint(redirected.peer_ipv4, 3000), True)


def test_more_connections_than_can_be_heard_are_known_to_be_lost(redirected):
    assert heard_after(redirected, 30_000) == (None, False)


def test_a_kernel_that_tells_nothing_is_known(redirected):
    links.set_sysctl(redirected.pod, "net/netfilter/nf_conntrack_events", "0")
    assert heard_after(redirected, 1) == (None, False)


def test_without_a_namespace_there_is_nothing_to_read():
    with pytest.raises(KernelError, match="no network namespace"):
        netns.run_in("/run/netns/tg-none", conntrack.flush)


def test_listeners_of_the_namespace_are_listed_and_nobody_elses(pair):
    def listen(address, port):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family)

    with (
        netns.run_in(pair.pod, listen, "127.0.0.1", 7001),
        netns.run_in(pair.pod, listen, "::", 7002),
        netns.run_in(pair.peer, listen, "0.0.0.0", 7003),
    ):
        assert netns.run_in(pair.pod, listeners) == (
            Listener("127.0.0.1", 7001),
            Listener("::", 7002),
        )
        assert netns.run_in(pair.peer, listeners) == (Listener("0.0.0.0", 7003),)
