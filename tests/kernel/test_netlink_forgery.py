"""Only the kernel's answers count, whatever another process of the namespace sends to the sockets that ask it."""

import errno
import os
import socket
import struct
import subprocess
import sys

import hostile
import pytest
from namespaces import serving

from tidegate.kernel import (
    conntrack,
    ipset,
    links,
    netlink,
    netns,
    nf_tables,
    nf_transaction,
    nfnetlink,
    nftables,
    rtnetlink,
    sockets,
)
from tidegate.kernel.conntrack import Endpoint, Original
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import attribute, text_attribute

NAME = "tg-netlink"
FORGER = """
import socket, sys
for line in sys.stdin:
    protocol, datagram, port, groups = line.split()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, int(protocol)) as forger:
        try:
            forger.sendto(bytes.fromhex(datagram), (int(port), int(groups)))
        except OSError as error:
            print(error.errno, flush=True)
        else:
            print(0, flush=True)
"""


@pytest.fixture
def pod(new_namespace):
    """A namespace with a table, a set, a listener and a connection that is translated."""
    path = new_namespace()
    links.set_up(path, "lo")

    def fill():
        nftables.load(
            f"""table ip {NAME} {{
                chain c {{ type nat hook output priority -100; udp dport 4002 redirect to :4003
                }}
            }}"""
        )
        ipset.create([ipset.Set(NAME, ipset.Kind.PORTS, ("1-3",))])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind(("127.0.0.1", 4001))
            client.sendto(b"", ("127.0.0.1", 4002))

    netns.run_in(path, fill)
    with serving(path, "pod", [4004]):
        yield path


@pytest.fixture
def send(pod):
    """Has another process of the namespace send a datagram; gives the number of the error that it gets, or 0."""

    def start():
        words = [sys.executable, "-SEc", FORGER]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with netns.run_in(pod, start) as forger:

        def sent(protocol, datagram, port=0, groups=0):
            forger.stdin.write(f"{protocol} {datagram.hex()} {port} {groups}\n")
            forger.stdin.flush()
            return int(forger.stdout.readline())

        yield sent
        forger.stdin.close()


def message(kind, body, flags=0, sequence=1):
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


ERROR, DONE = 2, 3
OF_IPV4 = struct.pack("=BBH", socket.AF_INET, 0, 0)
FORGED = {
    "a byte": b"\0",
    "a refusal": message(ERROR, struct.pack("=i", -errno.EPERM) + bytes(16)),
    "a success": message(ERROR, bytes(20)),
    "an end": message(DONE, bytes(4), flags=2),
    "an answer": message(
        nfnetlink.SUBSYSTEM_NFTABLES << 8 | 15, OF_IPV4 + attribute(1, b"\0\0\0c")
    ),
}


def only_bound(protocol):
    """A socket in the moment between becoming known and being connected."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    made.bind((0, 0))
    return made


CONNECTED = netlink.connected


@pytest.fixture(params=[CONNECTED, only_bound], ids=["connected", "only bound"])
def forgeries(request, monkeypatch, send):
    """For each of FORGED in turn: every socket that asks the kernel hears it first, if it listens to others."""
    refused = errno.ECONNREFUSED if request.param is CONNECTED else 0

    def each():
        for datagram in FORGED.values():

            def connected(protocol, datagram=datagram):
                made = request.param(protocol)
                assert send(protocol, datagram, made.getsockname()[0]) == refused
                return made

            monkeypatch.setattr(netlink, "connected", connected)
            yield
            monkeypatch.setattr(netlink, "connected", CONNECTED)

    return each()


DIALLED = Original(
    protocol=socket.IPPROTO_UDP,
    source="127.0.0.1",
    source_port=4001,
    destination="127.0.0.1",
    destination_port=4002,
)


READ = {
    "generation": nf_tables.generation,
    "contents": lambda: nf_tables.contents("ip", NAME, ["c"], 2**20),
    "set": lambda: (found := ipset.find([NAME]), ipset.content(found[NAME], 9)),
    "listeners": sockets.listeners,
    "connection": lambda: conntrack.destination_of(DIALLED),
    "translated": lambda: list(conntrack.translated(socket.IPPROTO_UDP, 9)),
}


@pytest.mark.parametrize("read", READ)
def test_what_is_read_is_what_the_kernel_says(pod, forgeries, read):
    should = netns.run_in(pod, READ[read])
    assert should
    for _ in forgeries:
        assert netns.run_in(pod, READ[read]) == should


def test_what_the_kernel_has_done_is_done(pod, forgeries):
    for number, _ in enumerate(forgeries):
        made = ipset.Set(f"tg-{number}", ipset.Kind.PORTS, ())
        netns.run_in(pod, nf_transaction.run, [hostile.table(f"tg-{number}")])
        netns.run_in(pod, ipset.create, [made])
        netns.run_in(pod, conntrack.flush)
    assert number == len(FORGED) - 1
    assert netns.run_in(pod, nf_tables.table_flags, "inet", f"tg-{number}") == 0
    assert len(netns.run_in(pod, ipset.found, "tg-")) == 1 + len(FORGED)


def test_what_the_kernel_refuses_is_refused(pod, forgeries):
    for _ in forgeries:
        for refused in (
            lambda: nf_transaction.run([nf_transaction.deletion("ip", "nowhere")]),
            lambda: ipset.swap("nowhere", "nothing"),
        ):
            with pytest.raises(KernelError, match="No such file"):
                netns.run_in(pod, refused)


def test_a_beginning_is_heard_from_the_kernel_alone(pod, send):
    def ends(source, source_port, destination, destination_port):
        packed = map(socket.inet_aton, (source, destination))
        addresses = b"".join(attribute(kind, one) for kind, one in zip((1, 2), packed, strict=True))
        ports = attribute(1, bytes([socket.IPPROTO_UDP]))
        ports += attribute(2, struct.pack("!H", source_port))
        ports += attribute(3, struct.pack("!H", destination_port))
        return attribute(1, addresses) + attribute(2, ports)

    elsewhere = message(
        nfnetlink.SUBSYSTEM_CONNTRACK << 8,
        OF_IPV4
        + attribute(1, ends("127.0.0.1", 4001, "127.0.0.1", 4002))
        + attribute(2, ends("192.0.2.1", 9, "127.0.0.1", 4001)),
    )

    def hear():
        conntrack.flush()
        with conntrack.beginnings() as beginnings:
            for forged in (b"\0", elsewhere):
                assert send(netlink.NETLINK_NETFILTER, forged, groups=1) == 0
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.bind(("127.0.0.1", 4001))
                client.sendto(b"", ("127.0.0.1", 4002))
            return beginnings.destination_of(DIALLED), beginnings.complete

    assert netns.run_in(pod, hear) == (Endpoint("127.0.0.1", 4003), True)


def test_sockets_of_rtnetlink_hear_the_kernel_alone(pod, send):
    def ask():
        with rtnetlink.opened("ask") as kernel:
            port, _ = kernel.asyncore.socket.getsockname()
            assert port
            refused = send(socket.NETLINK_ROUTE, b"\0", port)
            return refused, [one.get("IFLA_IFNAME") for one in kernel.get_links()]

    assert netns.run_in(pod, ask) == (errno.ECONNREFUSED, ["lo"])


def test_who_owns_a_table_is_not_searched_without_end(new_namespace, monkeypatch):
    monkeypatch.setattr(nfnetlink, "_MOST_SEARCHED_S", 0)

    def find():
        with CONNECTED(netlink.NETLINK_NETFILTER) as one:
            return nfnetlink.holder(one.getsockname()[0])

    pod = new_namespace()
    assert netns.run_in(pod, find) is None
    monkeypatch.undo()
    assert netns.run_in(pod, find).startswith(f"process {os.getpid()} (")


def test_listings_end_at_their_bounds(pod):
    def listed(**bounds):
        with nfnetlink.Conversation(
            nfnetlink.SUBSYSTEM_NFTABLES, 0, "list chains", **bounds
        ) as kernel:
            return list(kernel.dump(4, text_attribute(1, NAME)))

    assert len(netns.run_in(pod, listed)) == 1
    for bounds in ({"most": 99}, {"seconds": 0}):
        with pytest.raises(netlink.Enough, match="cannot list chains: there is more than"):
            netns.run_in(pod, lambda bounds=bounds: listed(**bounds))
