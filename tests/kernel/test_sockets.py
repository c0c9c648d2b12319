"""Sockets of a namespace are listed with what they may do, and ended one by one."""

import socket

import pytest
from namespaces import DEADLINE_S, dial, echoes, serving
from verifying import listening

from tidegate.kernel import netns, sockets
from tidegate.kernel.sockets import Listener, listeners

APP = 8080


def listen(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family)


def listen_mapped(address, port):
    """As programs do that use IPv6 sockets for IPv4 too."""
    return socket.create_server((address, port), family=socket.AF_INET6, dualstack_ipv6=True)


def end(path, local, remote):
    def ended():
        with sockets.ender() as ender:
            return ender.end(local, remote)

    return netns.run_in(path, ended)


def test_listeners_of_the_namespace_are_listed_and_nobody_elses(pair):
    with (
        netns.run_in(pair.pod, listen, "127.0.0.1", 7001),
        netns.run_in(pair.pod, listen, "::", 7002),
        netns.run_in(pair.peer, listen, "0.0.0.0", 7003),
        netns.run_in(pair.peer, listen_mapped, "::ffff:127.0.0.1", 7004),
    ):
        assert netns.run_in(pair.pod, listeners) == (
            Listener("127.0.0.1", 7001, False),
            Listener("::", 7002, False),
        )
        assert netns.run_in(pair.peer, listeners) == (
            Listener("0.0.0.0", 7003, False),
            Listener("127.0.0.1", 7004, False),
        )


def test_a_transparent_listener_is_told_apart(pair):
    with listening(pair.pod, 7001, transparent=True), listening(pair.pod, 7002):
        assert netns.run_in(pair.pod, listeners) == (
            Listener("::", 7001, True),
            Listener("::", 7002, False),
        )


def test_thousands_of_listeners_are_listed(pair):
    def listen_all():
        return [listen("127.0.0.1", port) for port in range(10_000, 12_000)]

    opened = netns.run_in(pair.pod, listen_all)
    assert len(netns.run_in(pair.pod, listeners)) == len(opened)
    for one in opened:
        one.close()


@pytest.mark.parametrize("version", [4, 6])
class TestEnding:
    def test_a_connection_at_the_client_tells_both_ends(self, pair, version):
        address = pair.peer_address(version)
        with netns.run_in(pair.peer, listen, address, APP) as listener:
            connection = netns.run_in(pair.pod, socket.create_connection, (address, APP))
            accepted, _ = listener.accept()
            accepted.settimeout(DEADLINE_S)
            with connection, accepted:
                assert end(pair.pod, connection.getsockname()[:2], (address, APP))
                with pytest.raises(ConnectionAbortedError):
                    connection.recv(1)
                with pytest.raises(ConnectionResetError):
                    accepted.recv(1)

    def test_a_connection_at_a_server_of_both_families(self, pair, version):
        """What it accepts by IPv4 are IPv6 sockets."""
        address = pair.pod_address(version)
        with serving(pair.pod, "pod", [APP]):
            other, _ = dial(pair.peer, address, APP)
            connection, _ = dial(pair.peer, address, APP)
            with connection, other:
                assert end(pair.pod, (address, APP), connection.getsockname()[:2])
                with pytest.raises(ConnectionResetError):
                    echoes(connection)
                assert echoes(other)

    def test_nothing_where_there_is_no_connection_leaves_the_listener(self, pair, version):
        address = pair.pod_address(version)
        with serving(pair.pod, "pod", [APP]):
            assert not end(pair.pod, (address, APP), (pair.peer_address(version), 7))
            connection, _ = dial(pair.peer, address, APP)
            with connection:
                assert echoes(connection)
            assert not end(pair.pod, (address, 7), (pair.peer_address(version), 7))
