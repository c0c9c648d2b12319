"""When redirect rules go, the connections end that they redirected; when the DNS address changes, queries follow."""

import errno
import socket
from contextlib import contextmanager

import pytest
from namespaces import DEADLINE_S, dial, echoes, serving
from verifying import APP, BACKENDS, INBOUND, OUTBOUND, nft

from tidegate.enforce.redirect import translations
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import DEFAULT, Dns, Family, Inbound, Outbound, Policy, PortRange
from tidegate.kernel import conntrack, netns, sockets
from tidegate.kernel.errors import KernelError

PROXY = 5995
SECRET, MARKER = b"what the application says", b"that was all"
ETH_P_ALL = 3
"""linux/if_ether.h"""

backends = pytest.mark.parametrize("backend", [made() for made in BACKENDS.values()], ids=BACKENDS)
versions = pytest.mark.parametrize("version", [4, 6])


@contextmanager
def outside(pair):
    """A function that tells whether what the application says has left the pod until now."""

    def listen():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        tap.bind(("host0", 0))
        tap.settimeout(DEADLINE_S)
        return tap

    def mark():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(MARKER, (pair.peer_ipv4, APP))

    with netns.run_in(pair.peer, listen) as tap:

        def was_heard():
            netns.run_in(pair.pod, mark)
            heard = False
            while MARKER not in (packet := tap.recv(65535)):
                heard = heard or SECRET in packet
            return heard

        yield was_heard


def opened_to(path, port):
    def listen():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    listener = netns.run_in(path, listen)
    listener.settimeout(DEADLINE_S)
    return listener


def connected(path, address, port):
    return netns.run_in(path, socket.create_connection, (address, port), DEADLINE_S)


def translated(path):
    return netns.run_in(path, lambda: list(conntrack.translated(socket.IPPROTO_TCP, DEADLINE_S)))


@pytest.fixture
def without_destroying(monkeypatch):
    """A kernel that is built without CONFIG_INET_DIAG_DESTROY."""

    def refuse(*_):
        raise KernelError("cannot end a connection: Operation not supported", errno.EOPNOTSUPP)

    monkeypatch.setattr(sockets.Ender, "end", refuse)


@versions
class TestRemoval:
    @backends
    def test_lets_nothing_out_that_the_application_goes_on_to_say(self, pair, backend, version):
        backend.apply(pair.pod, rules_for(DEFAULT))
        with opened_to(pair.pod, OUTBOUND) as sidecar, outside(pair) as was_heard:
            connection = connected(pair.pod, pair.peer_address(version), APP)
            accepted, _ = sidecar.accept()
            accepted.settimeout(DEADLINE_S)
            with connection, accepted:
                backend.remove(pair.pod)
                with pytest.raises(ConnectionAbortedError):
                    connection.recv(1)
                with pytest.raises(BrokenPipeError):
                    connection.sendall(SECRET)
                with pytest.raises(ConnectionResetError):
                    accepted.recv(1)
                assert not was_heard()
        assert translated(pair.pod) == []

    def test_leaves_it_to_the_other_end_where_the_kernel_cannot_end_them(
        self, pair, version, without_destroying
    ):
        backend = NftablesBackend()
        backend.apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [OUTBOUND]), outside(pair) as was_heard:
            connection, _ = dial(pair.pod, pair.peer_address(version), APP)
            with connection:
                backend.remove(pair.pod)
                connection.sendall(SECRET)
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
                assert was_heard()

    @backends
    def test_tells_clients_of_the_workload_at_once(self, pair, backend, version):
        backend.apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [INBOUND]):
            connection, landed = dial(pair.peer, pair.pod_address(version), APP)
            with connection:
                assert landed.port == INBOUND
                backend.remove(pair.pod)
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)

    @backends
    def test_leaves_connections_alone_that_were_not_redirected(self, pair, backend, version):
        backend.apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [INBOUND, OUTBOUND]), serving(pair.peer, "peer", [APP]):
            of_sidecar, _ = dial(pair.pod, pair.peer_address(version), APP, uid=PROXY)
            to_listener, _ = dial(pair.peer, pair.pod_address(version), INBOUND)
            with of_sidecar, to_listener:
                backend.remove(pair.pod)
                assert echoes(of_sidecar)
                assert echoes(to_listener)

    @backends
    def test_of_one_family_leaves_the_other_alone(self, pair, backend, version):
        other = 10 - version
        policy = Policy(families=(Family.IPV4 if other == 4 else Family.IPV6,))
        backend.apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [OUTBOUND]):
            connection, _ = dial(pair.pod, pair.peer_address(version), APP)
            of_other, _ = dial(pair.pod, pair.peer_address(other), APP)
            with connection, of_other:
                backend.apply(pair.pod, rules_for(policy))
                with pytest.raises(ConnectionAbortedError):
                    connection.recv(1)
                assert echoes(of_other)

    def test_leaves_what_somebody_else_sends_to_other_hosts(self, pair, version):
        family, address = ("ip", pair.peer_ipv4) if version == 4 else ("ip6", f"[{pair.peer_ipv6}]")
        nft(
            pair.pod,
            f"""table {family} service {{
                chain c {{ type nat hook output priority -150; tcp dport 80 dnat to {address}:{APP}
                }}
            }}""",
        )
        backend = NftablesBackend()
        backend.apply(pair.pod, rules_for(Policy(outbound=Outbound(enabled=False))))
        with serving(pair.peer, "peer", [APP]):
            connection, landed = dial(pair.pod, pair.peer_address(version), 80)
            with connection:
                assert landed.port == APP
                backend.remove(pair.pod)
                assert echoes(connection)


class TestWhatIsForgotten:
    def test_is_forgotten_although_there_is_no_time_to_end_it(self, pair, monkeypatch):
        monkeypatch.setattr(translations, "_MOST_S", 0)
        backend = NftablesBackend()
        backend.apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [OUTBOUND]):
            opened = [dial(pair.pod, pair.peer_ipv4, APP)[0] for _ in range(3)]
            assert len(translated(pair.pod)) == len(opened)
            backend.remove(pair.pod)
            assert translated(pair.pod) == []
            for connection in opened:
                connection.close()

    def test_is_forgotten_although_it_may_not_be_ended(self, pair, monkeypatch):
        def refuse(*_):
            raise KernelError("cannot end a connection: Operation not permitted", errno.EPERM)

        NftablesBackend().apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [OUTBOUND]):
            connection, _ = dial(pair.pod, pair.peer_ipv4, APP)
            monkeypatch.setattr(sockets.Ender, "end", refuse)
            with connection, pytest.raises(KernelError, match="not permitted"):
                netns.run_in(pair.pod, translations.forget, Family)
            assert translated(pair.pod) == []

    def test_is_nothing_when_no_family_goes(self, pair):
        NftablesBackend().apply(pair.pod, rules_for(DEFAULT))
        with serving(pair.pod, "pod", [OUTBOUND]):
            connection, _ = dial(pair.pod, pair.peer_ipv4, APP)
            with connection:
                netns.run_in(pair.pod, translations.forget, ())
                assert echoes(connection)


def test_datagrams_that_somebody_else_translates_are_no_queries(pair):
    def ask():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"query", (pair.peer_ipv4, 53))
        translations.forget_queries({})
        return list(conntrack.translated(socket.IPPROTO_UDP, DEADLINE_S))

    nft(
        pair.pod,
        f"""table ip resolver {{
            chain c {{ type nat hook output priority -150; udp dport 53 dnat to {pair.peer_ipv4}:5353
            }}
        }}""",
    )
    (left,) = netns.run_in(pair.pod, ask)
    assert left.answers_from.port == 5353


def to_port(port, *, excluded=0):
    """Queries go to this port of loopback; connections from outside to the excluded one to the application."""
    ports = (PortRange(excluded, excluded),) if excluded else ()
    return rules_for(Policy(dns=Dns(enabled=True, port=port), inbound=Inbound(exclude_ports=ports)))


@backends
@versions
class TestAnOldSocketThatGoesOnAsking:
    @contextmanager
    def resolvers(self, path, version, *ports):
        here = "127.0.0.1" if version == 4 else "::1"
        servers = [self.bound(path, version, here, port) for port in ports]
        try:
            yield servers
        finally:
            for server in servers:
                server.close()

    def bound(self, path, version, address, port):
        def bind():
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            server = socket.socket(family, socket.SOCK_DGRAM)
            server.bind((address, port))
            server.settimeout(DEADLINE_S)
            return server

        return netns.run_in(path, bind)

    def asking(self, pair, version):
        asking = self.bound(pair.pod, version, pair.pod_address(version), 0)
        asking.connect((pair.peer_address(version), 53))
        return asking

    def test_gets_its_answers_from_the_new_address(self, pair, backend, version):
        backend.apply(pair.pod, to_port(8600))
        with (
            self.resolvers(pair.pod, version, 8600, 8601) as (old, new),
            self.asking(pair, version) as client,
        ):
            client.send(b"first")
            assert old.recv(16) == b"first"
            backend.apply(pair.pod, to_port(8601))
            client.send(b"second")
            query, asker = new.recvfrom(16)
            assert query == b"second"
            new.sendto(b"answer", asker)
            assert client.recv(16) == b"answer"

    def test_gets_the_answer_to_a_query_from_before_another_change(self, pair, backend, version):
        backend.apply(pair.pod, to_port(8600))
        with (
            self.resolvers(pair.pod, version, 8600) as (resolver,),
            self.asking(pair, version) as client,
        ):
            client.send(b"query")
            _, asker = resolver.recvfrom(16)
            rules = to_port(8600, excluded=22)
            backend.apply(pair.pod, rules)
            netns.run_in(pair.pod, translations.forget_queries, translations.resolvers(rules))
            resolver.sendto(b"answer", asker)
            assert client.recv(16) == b"answer"

    def test_asks_its_own_resolver_when_queries_are_left_alone(self, pair, backend, version):
        backend.apply(pair.pod, to_port(8600))
        with (
            self.resolvers(pair.pod, version, 8600) as (resolver,),
            self.bound(pair.peer, version, pair.peer_address(version), 53) as real,
            self.asking(pair, version) as client,
        ):
            client.send(b"first")
            assert resolver.recv(16) == b"first"
            backend.apply(pair.pod, rules_for(DEFAULT))
            client.send(b"second")
            query, asker = real.recvfrom(16)
            assert query == b"second"
            real.sendto(b"answer", asker)
            assert client.recv(16) == b"answer"
