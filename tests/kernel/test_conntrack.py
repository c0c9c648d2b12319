"""Where connections go is read from connection tracking, also of those that have ended."""

import socket

import pytest
from namespaces import DEADLINE_S, dial, serving, set_sysctl

from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import DEFAULT
from tidegate.kernel import conntrack, netns
from tidegate.kernel.conntrack import Endpoint, Original
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import Enough, Netlink

APP, OUTBOUND, PROXY = 8080, 15001, 5995


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
def test_what_was_dialled_is_found_by_the_ends_of_the_socket_that_accepted(redirected, version):
    address = redirected.peer_address(version)
    here = Endpoint("127.0.0.1" if version == 4 else "::1", OUTBOUND)
    with serving(redirected.pod, "pod", [OUTBOUND]):
        connection, _ = dial(redirected.pod, address, APP)
        with connection:
            client = Endpoint(*connection.getsockname()[:2])
            asked = (conntrack.original_of, socket.IPPROTO_TCP, here, client)
            assert netns.run_in(redirected.pod, *asked) == original(connection, address, APP)
            netns.run_in(redirected.pod, conntrack.flush)
            assert netns.run_in(redirected.pod, *asked) is None


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
    set_sysctl(redirected.pod, "net/netfilter/nf_conntrack_events", "0")
    assert heard_after(redirected, 1) == (None, False)


def test_without_a_namespace_there_is_nothing_to_read():
    with pytest.raises(KernelError, match="no network namespace"):
        netns.run_in("/run/netns/tg-none", conntrack.flush)


def translated(path, protocol=socket.IPPROTO_TCP):
    return netns.run_in(path, lambda: list(conntrack.translated(protocol, DEADLINE_S)))


@pytest.mark.parametrize("version", [4, 6])
def test_translated_connections_are_listed_with_their_ends_and_no_others(redirected, version):
    address, own = redirected.peer_address(version), redirected.pod_address(version)
    here = "127.0.0.1" if version == 4 else "::1"
    with serving(redirected.pod, "pod", [OUTBOUND]), serving(redirected.peer, "peer", [APP]):
        straight, _ = dial(redirected.pod, address, APP, uid=PROXY)
        assert translated(redirected.pod) == []
        connection, _ = dial(redirected.pod, address, APP)
        with straight, connection:
            port = connection.getsockname()[1]
            (found,) = translated(redirected.pod)
            assert found.original == original(connection, address, APP)
            assert (found.answers_from, found.answers_to) == (
                Endpoint(here, OUTBOUND),
                Endpoint(own, port),
            )
            assert found.zone == conntrack.DEFAULT_ZONE
            assert translated(redirected.pod, socket.IPPROTO_UDP) == []


def test_one_connection_is_forgotten_and_no_other(redirected):
    with serving(redirected.pod, "pod", [OUTBOUND]):
        connections = [dial(redirected.pod, redirected.peer_ipv4, APP)[0] for _ in range(3)]
        one, *others = translated(redirected.pod)
        netns.run_in(redirected.pod, conntrack.forget, [one])
        assert {found.key for found in translated(redirected.pod)} == {
            other.key for other in others
        }
        # It is known no more.
        netns.run_in(redirected.pod, conntrack.forget, [one])
        for connection in connections:
            connection.close()


def test_a_listing_ends_in_time(redirected):
    def in_no_time():
        return list(conntrack.translated(socket.IPPROTO_TCP, 0))

    with serving(redirected.pod, "pod", [OUTBOUND]):
        connection, _ = dial(redirected.pod, redirected.peer_ipv4, APP)
        with connection, pytest.raises(Enough):
            netns.run_in(redirected.pod, in_no_time)


def test_a_namespace_without_connections_is_not_listed(pair, monkeypatch):
    monkeypatch.delattr(Netlink, "dump")
    assert translated(pair.pod) == []
