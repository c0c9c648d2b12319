"""The site on which the behaviour matrix is measured, and the model of where a connection lands there.

A pod with two interfaces towards its node (peer) and one towards a guest that it forwards for; servers on every
port that matters, in all three; clients of every kind. One loop opens many connections at once and serves them
itself: no threads. `expected` says where each should land, from explain and from who owns which address here.
"""

import ctypes
import errno
import itertools
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from namespaces import DEADLINE_S, namespace, on_the_wire, original_destination, set_sysctl
from pyroute2 import IPRoute

from tidegate.enforce.redirect.rules import (
    Connection,
    Decision,
    Drop,
    Leave,
    Redirect,
    Rules,
    Tproxy,
    Tracked,
    Translate,
    Zone,
    explain,
)
from tidegate.intent.policy import Mode, Protocol
from tidegate.kernel import links, netns, rawtcp
from tidegate.model import Direction

CGROUP_ROOT = Path("/sys/fs/cgroup/unified")
CGROUP = f"tg-matrix-{os.getpid()}"

INBOUND, OUTBOUND, OTHER_INBOUND, OTHER_OUTBOUND, DNS_PROXY = 20000, 15001, 21000, 16001, 8600
APPS = (443, 5432, 8080, 8081, 9090)
NO_SERVER = 7
SIDECAR = (INBOUND, OUTBOUND, OTHER_INBOUND, OTHER_OUTBOUND)
TCP_PORTS = {
    "pod": (53, *APPS, *SIDECAR),
    "peer": (53, DNS_PROXY, *APPS, *SIDECAR),
    "guest": (53, *APPS, OUTBOUND),
}

ADDRESSES = {
    "pod": ("10.77.0.2", "fd77::2"),
    "pod-net1": ("10.78.0.2", "fd78::2"),
    "pod-guest0": ("10.79.0.1", "fd79::1"),
    "pod-bare0": ("10.80.0.2", "fd80::2"),
    "peer": ("10.77.0.1", "fd77::1"),
    "stranger": ("10.77.0.9", "fd77::9"),
    "peer-net1": ("10.78.0.1", "fd78::1"),
    "peer-bare0": ("10.80.0.1", "fd80::1"),
    "far": ("192.0.2.10", "2001:db8:1::10"),
    "farther": ("198.51.100.10", "2001:db8:2::10"),
    "metadata": ("169.254.169.254", None),
    "link-local-peer": (None, "fe80::77:1%eth0"),
    "link-local-pod": (None, "fe80::77:2%host0"),
    "guest": ("10.79.0.2", "fd79::2"),
    "loopback": ("127.0.0.1", "::1"),
    "loopback-53": ("127.0.0.53", None),
    "loopback-3": ("127.3.2.1", None),
    "own-call": ("127.0.0.6", "::6"),
}
"""Every address of the site, IPv4 and IPv6, by the name that dials call it; None where there is none."""

_LOOPBACK = ("loopback", "loopback-53", "loopback-3", "own-call")
_OWNERS = {
    "pod": ("pod", "pod-net1", "pod-guest0", "pod-bare0", "link-local-pod"),
    "peer": (
        *("peer", "stranger", "peer-net1", "peer-bare0"),
        *("far", "farther", "metadata", "link-local-peer"),
    ),
    "guest": ("guest",),
}
_OWNER = {name: owner for owner, names in _OWNERS.items() for name in names}
_POD_INTERFACE = {"peer-net1": "net1", "guest": "guest0"}
"""Where the pod's routes send what does not go to eth0 or stay on lo."""
_ARRIVES_ON = {"pod-net1": "net1", "pod-bare0": "bare0"}


@dataclass(frozen=True)
class User:
    """Who opens a connection."""

    uid: int = 1000
    gid: int = 1000
    mark: int = 0
    cgroup: str = ""


PROXY_UID, SECOND_PROXY_UID, PROXY_GID, TENANT_UID, TENANT_GID = 5995, 101, 6000, 2000, 3000
MARK = 0x539
USERS = {
    "root": User(0, 0),
    "app": User(),
    "proxy": User(PROXY_UID),
    "second-proxy": User(SECOND_PROXY_UID),
    "proxy-group": User(gid=PROXY_GID),
    "marked": User(mark=MARK),
    "marked-more": User(mark=MARK | 0x10000),
    "in-cgroup": User(cgroup=f"{CGROUP}/sidecar"),
    "below-cgroup": User(cgroup=f"{CGROUP}/sidecar/worker"),
    "beside-cgroup": User(cgroup=f"{CGROUP}/sidecar2"),
    "tenant": User(TENANT_UID),
    "tenant-group": User(gid=TENANT_GID),
    "clerk": User(1005),
}


@dataclass(frozen=True)
class Dial:
    """One connection of the battery; addresses by their names in ADDRESSES."""

    at: str
    """The namespace that dials."""
    to: str
    port: int
    user: str = "app"
    protocol: Protocol = Protocol.TCP
    source: str = ""
    mapped: bool = False
    """Whether an IPv6 socket dials, towards an IPv4 address."""
    shares: str = ""
    """Dials of one battery that share a name here use one source port."""

    @property
    def name(self) -> str:
        by = self.user if self.at == "pod" else self.at
        parts = [f"{by} to {self.to}:{self.port}"]
        parts += [self.protocol.value] if self.protocol is Protocol.UDP else []
        parts += [f"from {self.source}"] if self.source else []
        parts += ["mapped"] if self.mapped else []
        parts += [f"sharing {self.shares}"] if self.shares else []
        return " ".join(parts)

    @property
    def can_be_missed(self) -> bool:
        """Whether an entry of connection tracking can be made for its addresses and ports (Site.open_missed)."""
        return self.protocol is Protocol.TCP and "link-local" not in f"{self.to} {self.source}"

    def possible(self, version: int) -> bool:
        """Whether the addresses exist in this IP version."""
        names = (self.to, self.source) if self.source else (self.to,)
        return all(address(name, version) for name in names) and not (self.mapped and version == 6)


def address(name: str, version: int) -> str | None:
    """An address of the site, with its zone where it needs one to be dialled."""
    return ADDRESSES[name][0 if version == 4 else 1]


@dataclass(frozen=True)
class Landed:
    """Where a connection landed, told by the server; addresses as on the wire."""

    server: str
    port: int
    """Of the listener that took it."""
    original: tuple[str, int]
    """What the client dialled, as the server can find out."""
    client: tuple[str, int]
    serial: int = field(default=-1, compare=False)


REFUSED, SILENT = "refused", "silent"
Outcome = Landed | str
"""Where it landed, or how the attempt failed."""


def expected(
    rules: Rules,
    dial: Dial,
    version: int,
    client: tuple[str, int],
    tracked: Tracked = Tracked.NEW,
) -> Outcome:
    """Where a connection must land. `client` is what its socket calls itself."""
    decision = decide(rules, dial, version, tracked)
    action = Leave() if decision is None else decision.action
    dialled = (bare(address(dial.to, version)), dial.port)
    match action:
        case Leave():
            return _at(owner(dial), dial.protocol, dialled, dialled, client)
        case Redirect(port) | Tproxy(port):
            return _at("pod", dial.protocol, (dialled[0], port), dialled, client)
        case Translate(to, port):
            name = next(n for n in ADDRESSES if to in ADDRESSES[n])
            there = "pod" if name in _LOOPBACK else _OWNER[name]
            original = dialled if there == "pod" and dial.protocol is Protocol.TCP else (to, port)
            return _at(there, dial.protocol, (to, port), original, client)
        case Drop():
            return SILENT
        case Zone():
            raise AssertionError(f"{action} decides on no connection")


def decide(
    rules: Rules, dial: Dial, version: int, tracked: Tracked = Tracked.NEW
) -> Decision | None:
    """What explain says of a dial; None when it does not touch the pod."""
    connection = connection_of(dial, version, tracked)
    return None if connection is None else explain(rules, connection)


def connection_of(dial: Dial, version: int, tracked: Tracked = Tracked.NEW) -> Connection | None:
    """The dial in the words of the evaluator; None when the pod sees nothing of it."""
    user = USERS[dial.user]
    destination = bare(address(dial.to, version))
    source = _source(dial, version)
    if dial.at == "pod":
        stays = dial.to in _LOOPBACK or _OWNER[dial.to] == "pod"
        return Connection(
            direction=Direction.OUTBOUND,
            destination=destination if not dial.mapped else f"::ffff:{destination}",
            port=dial.port,
            source=source,
            interface="lo" if stays else _POD_INTERFACE.get(dial.to, "eth0"),
            uid=user.uid,
            gid=user.gid,
            mark=user.mark,
            cgroup=user.cgroup,
            protocol=dial.protocol,
            tracked=tracked,
        )
    return Connection(
        direction=Direction.INBOUND,
        destination=destination,
        port=dial.port,
        source=source,
        interface="guest0" if dial.at == "guest" else _ARRIVES_ON.get(dial.to, "eth0"),
        protocol=dial.protocol,
        tracked=tracked,
        forwarded=_OWNER[dial.to] != "pod",
    )


def owner(dial: Dial) -> str:
    """The namespace that has the address that is dialled."""
    return dial.at if dial.to in _LOOPBACK else _OWNER[dial.to]


def bare(text: str) -> str:
    """An address as on the wire: without a zone, IPv4-mapped ones as IPv4."""
    return str(on_the_wire(text))


def _source(dial: Dial, version: int) -> str:
    if dial.source:
        return bare(address(dial.source, version))
    if dial.at == "guest":
        return address("guest", version)
    if dial.at == "peer":
        near = {
            "pod-net1": "peer-net1",
            "pod-bare0": "peer-bare0",
            "link-local-pod": "link-local-peer",
        }
        return bare(address(near.get(dial.to, "peer"), version))
    if dial.to in _LOOPBACK:
        return address("loopback", version)
    if _OWNER[dial.to] == "pod":
        return address(dial.to, version)
    near = {"peer-net1": "pod-net1", "guest": "pod-guest0", "link-local-peer": "link-local-pod"}
    return bare(address(near.get(dial.to, "pod"), version))


def _at(
    server: str,
    protocol: Protocol,
    destination: tuple[str, int],
    original: tuple[str, int],
    client: tuple[str, int],
) -> Outcome:
    listening = (
        destination[1] in TCP_PORTS[server] or (server == "pod" and _is_dns_proxy(destination))
        if protocol is Protocol.TCP
        else destination in udp_servers()[server]
    )
    return Landed(server, destination[1], original, client) if listening else REFUSED


def _is_dns_proxy(destination: tuple[str, int]) -> bool:
    return destination[1] == DNS_PROXY and destination[0] in ADDRESSES["loopback"]


def udp_servers() -> dict[str, set[tuple[str, int]]]:
    """Where UDP is answered: each server has one address, so that it answers from there."""
    servers = {
        there: {
            (bare(found), 53) for name in names for found in ADDRESSES[name] if found is not None
        }
        for there, names in _OWNERS.items()
    }
    servers["peer"] |= {(bare(found), DNS_PROXY) for found, _ in servers["peer"]}
    servers["pod"] |= {(found, DNS_PROXY) for found in ADDRESSES["loopback"]}
    servers["pod"].add((ADDRESSES["loopback-53"][0], 53))
    return servers


class _Maker:
    """A child process in a namespace and a cgroup, which opens sockets as any user and hands them over."""

    def __init__(self, netns_path: str, cgroup: str) -> None:
        self._asking, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._asking.close()
                self._work(netns_path, cgroup, answering)
            finally:
                os._exit(1)
        answering.close()
        assert self._asking.recv(16) == b"ready"

    def sockets(self, wanted: Sequence[tuple[int, int, int, int]]) -> list[socket.socket]:
        """One socket for each (family, type, uid, gid)."""
        made: list[socket.socket] = []
        for start in range(0, len(wanted), 200):
            self._asking.send(json.dumps(wanted[start : start + 200]).encode())
            _, descriptors, _, _ = socket.recv_fds(self._asking, 16, 253)
            made += [socket.socket(fileno=descriptor) for descriptor in descriptors]
            # A socket that the child had open too would not be closed when it is closed here.
            assert self._asking.recv(16) == b"yours"
        assert len(made) == len(wanted)
        return made

    def close(self) -> None:
        self._asking.close()
        os.waitpid(self._pid, 0)

    @staticmethod
    def _work(netns_path: str, cgroup: str, answering: socket.socket) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if cgroup:
            (CGROUP_ROOT / cgroup / "cgroup.procs").write_text("0")
        with open(netns_path) as namespace_file:  # noqa: PTH123
            clone_newnet = 0x40000000  # linux/sched.h
            assert libc.setns(namespace_file.fileno(), clone_newnet) == 0
        answering.send(b"ready")
        while request := answering.recv(65536):
            made = []
            for family, kind, uid, gid in json.loads(request):
                # The kernel asks for the file system ids with which a socket was opened.
                libc.setfsgid(gid)
                libc.setfsuid(uid)
                made.append(socket.socket(family, kind))
            libc.setfsuid(0)
            libc.setfsgid(0)
            socket.send_fds(answering, [b"made"], [one.fileno() for one in made])
            for one in made:
                one.close()
            answering.send(b"yours")
        os._exit(0)


SOURCE_PORTS = range(30_000, 60_000)
"""Of the clients, one after the other."""


class Site:
    """The namespaces, servers and clients. Connections that a battery leaves are closed by it."""

    def __init__(self, paths: dict[str, str], stack: ExitStack) -> None:
        self.paths = paths
        self._source_ports = itertools.cycle(SOURCE_PORTS)
        self._serials = itertools.count()
        self._accepted: dict[int, socket.socket] = {}
        self._selector = stack.enter_context(selectors.DefaultSelector())
        cgroups = {user.cgroup for user in USERS.values()}
        self._makers = {}
        for at, cgroup in [(at, "") for at in paths] + [("pod", c) for c in cgroups if c]:
            self._makers[at, cgroup] = _Maker(paths[at], cgroup)
            stack.callback(self._makers[at, cgroup].close)
        self._stack = stack
        self._listeners: dict[tuple[str, int], socket.socket] = {}
        for server, ports in TCP_PORTS.items():
            for port in ports:
                self.listen(server, port)
        for loopback in ADDRESSES["loopback"]:
            self._serve_tcp("pod", loopback, DNS_PROXY)
        for server, addresses in udp_servers().items():
            for at, port in sorted(addresses):
                self._serve_udp(server, at, port)
        stack.callback(self.hang_up)

    @property
    def pod(self) -> str:
        return self.paths["pod"]

    def prepare(self, mode: Mode) -> None:
        """Have the sidecar's inbound listeners be what a mode needs: transparent for tproxy, and only then.

        Connections that a transparent listener took are not redirected well: one that reuses their source port
        towards another port would be handed to them (tcp_early_demux, nf_nat_ipv4_local_in).
        """
        for port in (INBOUND, OTHER_INBOUND):
            listener = self._listeners["pod", port]
            listener.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, mode is Mode.TPROXY)

    def listen(self, server: str, port: int) -> None:
        """Serve a port on all addresses of both families."""
        self._listeners[server, port] = self._serve_tcp(server, "::", port)

    def stop_listening(self, server: str, port: int) -> None:
        """Refuse connections to a port."""
        listener = self._listeners.pop((server, port))
        self._selector.unregister(listener)
        listener.close()

    def sockets(
        self, at: str, wanted: Sequence[tuple[int, int, int, int]], cgroup: str = ""
    ) -> list[socket.socket]:
        """Sockets of a namespace, one for each (family, type, uid, gid)."""
        return self._makers[at, cgroup].sockets(wanted)

    def serve_until(self, done: Callable[[], bool], what: str) -> None:
        """Let the servers work until a condition holds; fails when it never does."""
        end = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < end, f"waited in vain for {what}"
            for key, _ in self._selector.select(0.01):
                key.data()

    def open(
        self,
        dials: Sequence[tuple[Dial, int]],
        *,
        deadline_s: float = DEADLINE_S,
        source_port: int | None = None,
        before: Tracked = Tracked.NEW,
    ) -> list["Attempt"]:
        """Open all at once, each for an IP version, and wait until every one has landed or failed.

        With a `source_port` all of them use it. `before` is for what connection tracking in the pod takes each of
        them, because of what was on the wire before.
        """
        attempts = self._sockets(dials)
        shared: dict[tuple[str, int], int] = {}
        waiting: set[socket.socket] = set()
        for attempt in attempts:
            key = (attempt.dial.shares, attempt.version)
            port = source_port or next(self._source_ports)
            if attempt.dial.shares:
                port = shared.setdefault(key, port)
            self._misled(attempt, port, before)
            if attempt.start(port):
                waiting.add(attempt.socket)
                self._selector.register(attempt.socket, selectors.EVENT_READ, attempt)
        end = time.monotonic() + deadline_s
        while waiting and (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if isinstance(key.data, Attempt):
                    if key.data.read():
                        self._selector.unregister(key.data.socket)
                        waiting.remove(key.data.socket)
                else:
                    key.data()
        for connection in waiting:
            self._selector.unregister(connection)
        return attempts

    def open_missed(
        self, rules: Rules, dials: Sequence[tuple[Dial, int]], tracked: Tracked
    ) -> list[tuple["Attempt", Outcome]]:
        """Open connections that nat misses, and say where each should land; the original destination is not told.

        Those that should be dropped are not waited for: by then they have been, or are on their way round.
        """
        wanted = [(dial, expected(rules, *dial, ("", 0), tracked)) for dial in dials]
        landing = [dial for dial, want in wanted if want != SILENT]
        dropped = [dial for dial, want in wanted if want == SILENT]
        attempts = self.open(landing, before=tracked)
        attempts += self.open(dropped, before=tracked, deadline_s=0.05)
        outcomes = dict(wanted)
        return [(attempt, outcomes[attempt.dial, attempt.version]) for attempt in attempts]

    def echoes(self, attempt: "Attempt") -> bool:
        """Whether an open connection still carries bytes, both ways."""
        server = self._accepted[attempt.outcome.serial]
        try:
            for sender, receiver in ((attempt.socket, server), (server, attempt.socket)):
                sender.settimeout(DEADLINE_S)
                receiver.settimeout(DEADLINE_S)
                sender.sendall(b"tide")
                if receiver.recv(16) != b"tide":
                    return False
        except OSError:
            return False
        return True

    def speak(self, attempt: "Attempt", who: str) -> None:
        """Have one end of an open connection, "client" or "server", send something that the other takes."""
        ends = [attempt.socket, self._accepted[attempt.outcome.serial]]
        sender, receiver = ends if who == "client" else reversed(ends)
        receiver.settimeout(DEADLINE_S)
        sender.sendall(b"tide")
        assert receiver.recv(16) == b"tide"

    def reset(self, attempt: "Attempt", who: str) -> None:
        """Have one end of an open connection reset it; the other one learns that, and closes too."""
        ends = [attempt.socket, self._accepted.pop(attempt.outcome.serial)]
        first, second = ends if who == "client" else reversed(ends)
        first.close()
        second.settimeout(DEADLINE_S)
        with suppress(ConnectionResetError):
            second.recv(16)
        second.close()

    def hang_up(self, attempts: Sequence["Attempt"] | None = None) -> None:
        """Close connections, at both ends; without arguments all that servers have."""
        for attempt in attempts or ():
            attempt.socket.close()
            if isinstance(attempt.outcome, Landed):
                server = self._accepted.pop(attempt.outcome.serial, None)
                if server is not None:
                    server.close()
        if attempts is None:
            for server in self._accepted.values():
                server.close()
            self._accepted.clear()

    def _misled(self, attempt: "Attempt", source_port: int, tracked: Tracked) -> None:
        """Have connection tracking hold a connection that is in the way of the attempt."""
        if tracked is Tracked.NEW:
            return
        dial = attempt.dial
        client = (_source(dial, attempt.version), source_port)
        server = (bare(address(dial.to, attempt.version)), dial.port)
        if tracked is Tracked.KNOWN:
            netns.run_in(self.paths[dial.at], send_unanswered, client, server)
        else:
            netns.run_in(self.paths[owner(dial)], send_unanswered, server, client)

    def _sockets(self, dials: Sequence[tuple[Dial, int]]) -> list["Attempt"]:
        wanted: dict[tuple[str, str], list[tuple[int, tuple[int, int, int, int]]]] = {}
        for number, (dial, version) in enumerate(dials):
            user = USERS[dial.user]
            family = socket.AF_INET6 if version == 6 or dial.mapped else socket.AF_INET
            kind = socket.SOCK_STREAM if dial.protocol is Protocol.TCP else socket.SOCK_DGRAM
            cgroup = user.cgroup if dial.at == "pod" else ""
            wanted.setdefault((dial.at, cgroup), []).append(
                (number, (family, kind, user.uid, user.gid))
            )
        attempts: list[Attempt | None] = [None] * len(dials)
        for key, asked in wanted.items():
            made = self.sockets(key[0], [spec for _, spec in asked], key[1])
            for (number, _), one in zip(asked, made, strict=True):
                attempts[number] = Attempt(*dials[number], one)
        return attempts

    def _serve_tcp(self, server: str, at: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in at else socket.AF_INET
        (listener,) = self.sockets(server, [(family, socket.SOCK_STREAM, 0, 0)])
        self._stack.callback(listener.close)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A server that closes leaves nothing behind that the next case could meet.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, at != "::")
        listener.bind((at, port))
        listener.listen(1024)
        self._selector.register(
            listener, selectors.EVENT_READ, lambda: self._accept(server, port, listener)
        )
        return listener

    def _accept(self, server: str, port: int, listener: socket.socket) -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            serial = next(self._serials)
            self._accepted[serial] = connection
            client = (bare(peer[0]), peer[1])
            try:
                original, original_port = original_destination(connection)
                said = [server, port, [str(original), original_port], client, serial]
                connection.sendall(json.dumps(said).encode() + b"\n")
            except OSError:
                # The client has gone already.
                self._accepted.pop(serial).close()

    def _serve_udp(self, server: str, at: str, port: int) -> None:
        zone = next((a for pair in ADDRESSES.values() for a in pair if a and at == bare(a)), at)
        family = socket.AF_INET6 if ":" in at else socket.AF_INET
        (one,) = self.sockets(server, [(family, socket.SOCK_DGRAM, 0, 0)])
        self._stack.callback(one.close)
        one.setblocking(False)
        if "%" in zone:
            # Names the interface by the dialling side's; here it is the other end.
            interface = {"host0": b"eth0", "eth0": b"host0"}[zone.partition("%")[2]]
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface)
        one.bind((at, port))
        self._selector.register(
            one, selectors.EVENT_READ, lambda: self._answer(server, at, port, one)
        )

    def _answer(self, server: str, at: str, port: int, one: socket.socket) -> None:
        while True:
            try:
                query, peer = one.recvfrom(512)
            except BlockingIOError:
                return
            client = (bare(peer[0]), peer[1])
            said = [server, port, [at, port], client, -1, query.decode()]
            one.sendto(json.dumps(said).encode() + b"\n", peer)


def send_unanswered(
    source: tuple[str, int], destination: tuple[str, int], flags: int = rawtcp.ACK
) -> None:
    """Send a segment that belongs to no connection, but which no kernel answers with a reset.

    It is signed (RFC 2385), and nobody has agreed on a key. An address of another host may be the source.
    """
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    level, any_source = {
        socket.AF_INET: (socket.SOL_IP, socket.IP_TRANSPARENT),
        socket.AF_INET6: (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT),
    }[family]
    signature = bytes((_MD5_SIGNATURE, 18, *range(16), _NO_OPERATION, _NO_OPERATION))
    words = 5 + len(signature) // 4
    addresses = b"".join(socket.inet_pton(family, host) for host, _ in (source, destination))
    pseudo_header = addresses + struct.pack("!II", 4 * words, socket.IPPROTO_TCP)

    def segment(checksum: int) -> bytes:
        ports = (source[1], destination[1])
        return struct.pack("!HHIIBBHHH", *ports, 1, 7, words << 4, flags, 65535, checksum, 0)

    total = sum(
        struct.unpack(
            f"!{(len(pseudo_header) + 4 * words) // 2}H", pseudo_header + segment(0) + signature
        )
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.setsockopt(level, any_source, 1)
        raw.bind((source[0], 0))
        raw.sendto(segment(~total & 0xFFFF) + signature, (destination[0], 0))


# linux/in6.h, linux/tcp.h
_IPV6_TRANSPARENT = 75
_NO_OPERATION, _MD5_SIGNATURE = 1, 19


class Attempt:
    """One dial under way, and what became of it."""

    def __init__(self, dial: Dial, version: int, unconnected: socket.socket) -> None:
        self.dial = dial
        self.version = version
        self.socket = unconnected
        self.outcome: Outcome = SILENT
        self.client = ("", 0)
        self._heard = b""

    def start(self, source_port: int) -> bool:
        """Send the first packet from this port; False when it has failed already."""
        dial, one = self.dial, self.socket
        one.setblocking(False)
        if dial.protocol is Protocol.TCP:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if mark := USERS[dial.user].mark:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        source = _source(dial, self.version)
        if source.startswith("fe80:"):
            source = ""
        one.bind((f"::ffff:{source}" if dial.mapped else source, source_port))
        to, _, zone = address(dial.to, self.version).partition("%")
        destination: tuple[object, ...] = (f"::ffff:{to}" if dial.mapped else to, dial.port)
        if zone:
            destination = (to, dial.port, 0, _LINK_INDEX[dial.at])
        failed = one.connect_ex(destination)
        if failed not in (0, errno.EINPROGRESS):
            self._fail(failed)
            return False
        own = one.getsockname()
        self.client = (bare(own[0]), own[1])
        if dial.protocol is Protocol.UDP:
            one.send(dial.name.encode())
        return True

    def ask_again(self) -> None:
        """Send the same query from the same socket."""
        self._heard = b""
        self.outcome = SILENT
        self.socket.send(self.dial.name.encode())

    def read(self) -> bool:
        """Take in what is there; whether it is decided now."""
        try:
            heard = self.socket.recv(1024)
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(error.errno)
            return True
        self._heard += heard
        if not heard:
            self._fail(errno.ECONNRESET)
            return True
        if not self._heard.endswith(b"\n"):
            return False
        server, port, original, client, serial, *query = json.loads(self._heard)
        assert query in ([], [self.dial.name]), "an answer to somebody else's query"
        self.outcome = Landed(server, port, tuple(original), tuple(client), serial)
        return True

    def _fail(self, number: int) -> None:
        known = {errno.ECONNREFUSED: REFUSED}
        self.outcome = known.get(number) or errno.errorcode[number]


_LINK_INDEX: dict[str, int] = {}
"""Index of the interface between pod and peer, in each."""


@contextmanager
def site() -> Iterator[Site]:
    """A site without rules."""
    with ExitStack() as stack:
        paths = {name: stack.enter_context(namespace()) for name in ("pod", "peer", "guest")}
        for path in paths.values():
            for setting in ("conf/all/rp_filter", "conf/default/rp_filter", "icmp_ratelimit"):
                set_sysctl(path, f"net/ipv4/{setting}", "0")
            set_sysctl(path, "net/ipv6/icmp/ratelimit", "0")
            # A source port that comes round again, or that somebody else was given, would be translated to another.
            set_sysctl(path, "net/ipv4/ip_local_port_range", f"{SOURCE_PORTS.stop} 65535")
            for state in ("time_wait", "last_ack", "close"):
                set_sysctl(path, f"net/netfilter/nf_conntrack_tcp_timeout_{state}", "2")

        def add(at: str, interface: str, found: str | None, width: int) -> None:
            if found and not found.startswith("127."):
                prefix = (128 if ":" in found else 32) if interface == "lo" else width
                links.add_address(paths[at], interface, f"{bare(found)}/{prefix}")

        for pod_end, other, other_end in (
            ("eth0", "peer", "host0"),
            ("net1", "peer", "host1"),
            ("bare0", "peer", "host2"),
            ("guest0", "guest", "eth0"),
        ):
            links.create_veth(paths["pod"], pod_end, paths[other], other_end)
            if pod_end == "bare0":
                # It has no address at all, and so nothing that a redirection to "here" could mean.
                set_sysctl(paths["pod"], "net/ipv6/conf/bare0/addr_gen_mode", "1")
            links.set_up(paths["pod"], pod_end)
            links.set_up(paths[other], other_end)
        for at, interface, names in (
            ("pod", "eth0", ("pod", "link-local-pod")),
            ("pod", "net1", ("pod-net1",)),
            ("pod", "guest0", ("pod-guest0",)),
            ("pod", "lo", ("own-call", "pod-bare0")),
            ("peer", "host0", ("peer", "stranger", "link-local-peer")),
            ("peer", "host1", ("peer-net1",)),
            ("peer", "host2", ("peer-bare0",)),
            ("peer", "lo", ("far", "farther", "metadata")),
            ("guest", "eth0", ("guest",)),
        ):
            # A host sends from the first IPv4 address of an interface, and from the last IPv6 address.
            for name in names:
                add(at, interface, ADDRESSES[name][0], 24)
            for name in reversed(names):
                add(at, interface, ADDRESSES[name][1], 64)
        # Nobody on bare0 answers for an IPv6 address that another interface has.
        there = netns.run_in(paths["pod"], _link_address, "bare0")
        netns.run_in(paths["peer"], _add_neighbour, "host2", address("pod-bare0", 6), there)
        for at, gateway in (("pod", "peer"), ("guest", "pod-guest0")):
            for network, version in (("0.0.0.0/0", 4), ("::/0", 6)):
                links.add_route(paths[at], network, gateway=address(gateway, version))
        for network, version in (("10.79.0.0/24", 4), ("fd79::/64", 6)):
            links.add_route(paths["peer"], network, gateway=address("pod", version))
        set_sysctl(paths["pod"], "net/ipv4/ip_forward", "1")
        set_sysctl(paths["pod"], "net/ipv6/conf/all/forwarding", "1")
        for at, interface in (("pod", "eth0"), ("peer", "host0")):
            _LINK_INDEX[at] = netns.run_in(paths[at], socket.if_nametoindex, interface)
        stack.enter_context(_cgroups())
        yield Site(paths, stack)


def _link_address(interface: str) -> str:
    with IPRoute() as route:
        (link,) = route.link("get", ifname=interface)
        return link.get_attr("IFLA_ADDRESS")


def _add_neighbour(interface: str, neighbour: str, link_address: str) -> None:
    with IPRoute() as route:
        index = socket.if_nametoindex(interface)
        route.neigh("add", dst=neighbour, lladdr=link_address, ifindex=index, state="permanent")


@contextmanager
def _cgroups() -> Iterator[None]:
    made = sorted({user.cgroup for user in USERS.values() if user.cgroup} | {CGROUP})
    try:
        for cgroup in made:
            (CGROUP_ROOT / cgroup).mkdir()
        yield
    finally:
        for cgroup in reversed(made):
            (CGROUP_ROOT / cgroup).rmdir()
