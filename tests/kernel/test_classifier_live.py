"""The classifier on real interfaces: real clients, real OpenSSL, agents that come and go."""

import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from classifying import bpffs
from namespaces import DEADLINE_S, Pair, eventually, landing, pair_of, serving
from packets import hello, with_extension
from watching import (
    ANSWER,
    CLOSED_PORT,
    MESH_SNI,
    PORT,
    REQUEST,
    TLS_PORT,
    TRUST_DOMAIN,
    answering,
    ask,
    ask_tls,
    connect,
    listen,
    server_context,
)

from tidegate.kernel import links, netns
from tidegate.kernel.bpf import Map
from tidegate.kernel.bpf_object import Object
from tidegate.kernel.errors import KernelError
from tidegate.model import Direction, Edge, FlowClass
from tidegate.observe import abi
from tidegate.observe.classifier import Attachment, Classifier, Side, consul_profile
from tidegate.observe.ledger import Ledger

WORKLOAD = 0xFEDCBA9876543210


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with bpffs(tmp_path / "bpf") as directory:
        yield directory


@pytest.fixture
def classifier(pins: Path) -> Iterator[Classifier]:
    opened = Classifier.open(pins)
    opened.set_profile(consul_profile(TRUST_DOMAIN))
    yield opened
    opened.remove()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_context(tmp_path_factory.mktemp("certificate"))


def observe(
    classifier: Classifier, pair: Pair, side: Side = Side.HOST, workload: int = WORKLOAD
) -> Attachment:
    where, interface = (pair.peer, "host0") if side is Side.HOST else (pair.pod, "eth0")
    ifindex = netns.run_in(where, socket.if_nametoindex, interface)
    return netns.run_in(where, classifier.attach, workload, ifindex, side, (PORT, TLS_PORT))


def counts(classifier: Classifier, workload: int = WORKLOAD) -> Counter[FlowClass]:
    connections: Counter[FlowClass] = Counter()
    for edge in classifier.edges():
        if edge.key.workload == workload:
            connections[edge.key.flow_class] += edge.count.connections
    return +connections


def the_edge(classifier: Classifier) -> Edge:
    (edge,) = [edge for edge in classifier.edges() if edge.count.connections]
    return edge


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("side", Side)
def test_calls_to_a_pod_are_classified_on_either_side_of_its_interface(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext, side: Side, version: int
) -> None:
    observe(classifier, pair, side)
    address = pair.pod_address(version)
    with answering(pair.pod, certificate):
        ask(connect(pair.peer, address, PORT))
        ask_tls(connect(pair.peer, address, TLS_PORT), MESH_SNI)
        ask_tls(connect(pair.peer, address, TLS_PORT), "pay.example.org", ["h2"])
        ask_tls(connect(pair.peer, address, TLS_PORT), None)
        connect(pair.peer, address, PORT).close()
        with pytest.raises(ConnectionRefusedError):
            connect(pair.peer, address, CLOSED_PORT)
    assert counts(classifier) == {
        FlowClass.PLAINTEXT: 1,
        FlowClass.MESH: 1,
        FlowClass.TLS: 2,
        FlowClass.EMPTY: 2,
    }
    for edge in classifier.edges():
        assert edge.key.direction is Direction.INBOUND
        assert edge.key.peer == pair.peer_address(version)
    assert classifier.losses().lost == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("side", Side)
def test_calls_from_a_pod_are_classified_on_either_side_of_its_interface(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext, side: Side, version: int
) -> None:
    observe(classifier, pair, side)
    with answering(pair.peer, certificate):
        ask_tls(connect(pair.pod, pair.peer_address(version), TLS_PORT), MESH_SNI)
    edge = the_edge(classifier)
    assert edge.key.flow_class is FlowClass.MESH
    assert (edge.key.direction, edge.key.peer, edge.key.port) == (
        Direction.OUTBOUND,
        pair.peer_address(version),
        TLS_PORT,
    )


@pytest.mark.parametrize("side", Side)
def test_bytes_are_those_of_the_stream_also_in_super_segments(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext, side: Side
) -> None:
    observe(classifier, pair, side)
    with answering(pair.pod, certificate):
        assert ask(connect(pair.peer, pair.pod_ipv6, PORT)) == len(ANSWER)
    count = the_edge(classifier).count
    assert (count.bytes_to_server, count.bytes_to_client) == (len(REQUEST), len(ANSWER))


def test_a_hello_sent_byte_by_byte_is_classified(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext
) -> None:
    observe(classifier, pair)
    outgoing, incoming = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=MESH_SNI).do_handshake()
    with (
        answering(pair.pod, certificate),
        connect(pair.peer, pair.pod_ipv4, TLS_PORT) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in outgoing.read():
            connection.send(bytes([byte]))
        assert connection.recv(1)
    assert the_edge(classifier).key.flow_class is FlowClass.MESH
    assert classifier.losses().lost == 0


@pytest.mark.parametrize("side", Side)
def test_a_hello_of_twenty_kilobytes_in_one_super_segment_is_classified(
    classifier: Classifier, pair: Pair, side: Side
) -> None:
    """The mesh's name stands behind all that."""
    observe(classifier, pair, side)
    data = with_extension(hello(MESH_SNI), 0xFE00, bytes(20_000))
    route = ["ip", "route", "replace", f"{pair.pod_ipv4}/32", "dev", "host0", "initcwnd", "40"]
    netns.run_in(pair.peer, partial(subprocess.run, route, check=True))
    everything = socket.htons(3)  # ETH_P_ALL
    raw = netns.run_in(pair.peer, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, everything)
    listener = netns.run_in(pair.pod, listen, PORT)
    with raw, listener, connect(pair.peer, pair.pod_ipv4, PORT) as connection:
        raw.settimeout(DEADLINE_S)
        connection.sendall(data)
        while len(raw.recv(1 << 17)) < len(data):
            pass
        eventually(lambda: counts(classifier) == {FlowClass.MESH: 1})
    assert the_edge(classifier).count.bytes_to_server == len(data)
    assert classifier.losses().lost == 0


def test_a_server_that_greets_first_is_told_apart(classifier: Classifier, pair: Pair) -> None:
    observe(classifier, pair)
    with serving(pair.pod, "pod", [PORT]):
        landing(pair.peer, pair.pod_ipv4, PORT)
    assert counts(classifier) == {FlowClass.SERVER_FIRST: 1}


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command")
def test_openssl_s_client_is_seen_as_what_it_is_told_to_be(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext
) -> None:
    observe(classifier, pair)
    command = ["openssl", "s_client", "-connect", f"{pair.pod_ipv4}:{TLS_PORT}", "-servername"]
    with answering(pair.pod, certificate):
        for name in (MESH_SNI, "other.example"):
            process = netns.run_in(
                pair.peer,
                subprocess.Popen,
                [*command, name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            process.wait(DEADLINE_S)
    assert counts(classifier) == {FlowClass.MESH: 1, FlowClass.TLS: 1}


def test_many_connections_at_once_add_up(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext
) -> None:
    observe(classifier, pair)

    def call(number: int) -> None:
        address = pair.pod_address(4 if number % 2 else 6)
        if number % 3 == 0:
            with connect(pair.peer, address, PORT) as connection:
                connection.sendall(REQUEST)
                connection.recv(100)
        elif number % 3 == 1:
            connect(pair.peer, address, PORT).close()
        else:
            connection = connect(pair.peer, address, TLS_PORT)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.wrap_socket(connection, server_hostname=MESH_SNI).close()

    with answering(pair.pod, certificate), ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(150)))
    assert counts(classifier) == {
        FlowClass.PLAINTEXT: 50,
        FlowClass.EMPTY: 50,
        FlowClass.MESH: 50,
    }
    assert classifier.losses().lost == 0


def test_the_next_agent_finds_everything_and_no_connection_in_between_is_lost(
    pins: Path, pair: Pair, certificate: ssl.SSLContext
) -> None:
    first = Classifier.open(pins)
    first.set_profile(consul_profile(TRUST_DOMAIN))
    attached = observe(first, pair)
    with answering(pair.pod, certificate):
        ask(connect(pair.peer, pair.pod_ipv4, PORT))
        lasting = connect(pair.peer, pair.pod_ipv4, PORT)
        lasting.sendall(REQUEST[:5])
        first.close()
        ask_tls(connect(pair.peer, pair.pod_ipv4, TLS_PORT), MESH_SNI)
        second = Classifier.open(pins)
        try:
            (found,) = second.attachments()
            again = observe(second, pair)
            ask(connect(pair.peer, pair.pod_ipv4, PORT))
            lasting.sendall(REQUEST[5:])
            assert lasting.recv(10)
            lasting.close()
            assert counts(second) == {FlowClass.PLAINTEXT: 3, FlowClass.MESH: 1}
        finally:
            second.remove()
    for other in (found, again):
        assert other.attached_at == pytest.approx(attached.attached_at, abs=0.1)
        assert (other.workload_key, other.ifindex, other.side) == (
            WORKLOAD,
            attached.ifindex,
            Side.HOST,
        )


def test_a_ledger_that_saw_a_connection_undecided_sees_it_decided(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext, tmp_path: Path
) -> None:
    observe(classifier, pair)
    ledger = Ledger.open(tmp_path / "ledger.sqlite")

    def told() -> dict[FlowClass, int]:
        ledger.record(time.time(), classifier.generation, classifier.changed_edges(), {})
        edges = ledger.window([WORKLOAD], None, 0.0, time.time() + 1)
        return {each.key.flow_class: n for each in edges if (n := each.count.connections)}

    with answering(pair.pod, certificate), connect(pair.peer, pair.pod_ipv4, PORT) as connection:
        assert told() == {FlowClass.EMPTY: 1}
        connection.sendall(b"\x16")
        eventually(lambda: told() == {FlowClass.UNKNOWN: 1})
        connection.sendall(REQUEST)
        eventually(lambda: told() == {FlowClass.PLAINTEXT: 1})
    ledger.close()


@pytest.mark.parametrize("lost", ["edges", "flows", "attachments", "counters"])
def test_where_a_map_is_gone_observation_begins_anew_and_says_since_when(
    pins: Path, pair: Pair, certificate: ssl.SSLContext, lost: str
) -> None:
    first = Classifier.open(pins)
    before, generation = observe(first, pair), first.generation
    first.close()
    (pins / "classifier" / "maps" / lost).unlink()
    second = Classifier.open(pins)
    try:
        assert second.attachments() == [], "programs that count into a lost map observe nothing"
        assert second.generation != generation
        again = observe(second, pair)
        assert again.attached_at > before.attached_at
        with answering(pair.pod, certificate):
            ask(connect(pair.peer, pair.pod_ipv4, PORT))
        assert counts(second) == {FlowClass.PLAINTEXT: 1}
    finally:
        second.remove()


@pytest.mark.parametrize("side", Side)
def test_attaching_again_changes_nothing_but_the_ports(
    classifier: Classifier, pair: Pair, side: Side
) -> None:
    first = observe(classifier, pair, side)
    assert observe(classifier, pair, side) == first
    assert classifier.attachments() == [first]


@pytest.mark.parametrize("side", Side)
def test_an_interface_that_was_made_anew_is_attached_anew(
    classifier: Classifier, pair: Pair, side: Side
) -> None:
    first = observe(classifier, pair, side)
    links.delete_link(pair.pod, "eth0")
    assert classifier.attachments() == []
    links.create_veth(pair.pod, "eth0", pair.peer, "host0")
    second = observe(classifier, pair, side)
    assert second.attached_at > first.attached_at
    assert classifier.attachments() == [second]


def test_what_went_away_while_no_agent_ran_is_not_observed_any_more(pins: Path, pair: Pair) -> None:
    first = Classifier.open(pins)
    observe(first, pair)
    first.close()
    links.delete_link(pair.pod, "eth0")
    second = Classifier.open(pins)
    try:
        assert second.attachments() == []
        assert list((pins / "classifier" / "links").iterdir()) == []
    finally:
        second.remove()


def test_two_pods_whose_interfaces_have_the_same_index_are_kept_apart(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext
) -> None:
    with pair_of() as other:
        first = observe(classifier, pair, Side.INSIDE, 1)
        second = observe(classifier, other, Side.INSIDE, 2)
        assert first.ifindex == second.ifindex
        with answering(pair.pod, certificate), answering(other.pod, certificate):
            ask(connect(pair.peer, pair.pod_ipv4, PORT))
            ask_tls(connect(other.peer, other.pod_ipv4, TLS_PORT), MESH_SNI)
        assert counts(classifier, 1) == {FlowClass.PLAINTEXT: 1}
        assert counts(classifier, 2) == {FlowClass.MESH: 1}
        assert classifier.losses().lost == 0


def test_both_ends_of_a_connection_are_two_edges(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext
) -> None:
    observe(classifier, pair, Side.INSIDE, 1)
    peer = Pair(pair.peer, pair.pod)
    ifindex = netns.run_in(peer.pod, socket.if_nametoindex, "host0")
    netns.run_in(peer.pod, classifier.attach, 2, ifindex, Side.INSIDE, ())
    with answering(pair.pod, certificate):
        ask(connect(pair.peer, pair.pod_ipv4, PORT))
    assert {(edge.key.workload, edge.key.direction) for edge in classifier.edges()} == {
        (1, Direction.INBOUND),
        (2, Direction.OUTBOUND),
    }


def test_other_programs_on_the_interface_go_on(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext, tmp_path: Path
) -> None:
    with bpffs(tmp_path / "other") as elsewhere:
        other = Classifier.open(elsewhere)
        observe(classifier, pair)
        observe(other, pair)
        with answering(pair.pod, certificate):
            ask(connect(pair.peer, pair.pod_ipv4, PORT))
        assert counts(classifier) == counts(other) == {FlowClass.PLAINTEXT: 1}
        other.remove()


def test_after_detaching_nothing_is_counted_and_edges_stay_until_they_are_forgotten(
    classifier: Classifier, pair: Pair, certificate: ssl.SSLContext
) -> None:
    observe(classifier, pair)
    with answering(pair.pod, certificate):
        ask(connect(pair.peer, pair.pod_ipv4, PORT))
        classifier.detach(WORKLOAD)
        ask(connect(pair.peer, pair.pod_ipv4, PORT))
    assert classifier.attachments() == []
    assert counts(classifier) == {FlowClass.PLAINTEXT: 1}
    assert classifier.losses().lost == 0
    classifier.forget_edges(WORKLOAD)
    assert classifier.edges() == []


def test_a_connection_that_was_open_before_stays_unknown(
    classifier: Classifier, pair: Pair
) -> None:
    with serving(pair.pod, "pod", [PORT]), connect(pair.peer, pair.pod_ipv4, PORT) as connection:
        assert connection.recv(100)
        observe(classifier, pair)
        connection.sendall(b"ping\n")
        assert connection.recv(100)
    edge = the_edge(classifier)
    assert (edge.key.flow_class, edge.key.direction) == (FlowClass.UNKNOWN, Direction.INBOUND)
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (5, 5)


def test_removing_leaves_nothing(pins: Path, pair: Pair) -> None:
    classifier = Classifier.open(pins)
    observe(classifier, pair)
    classifier.remove()
    assert not (pins / "classifier").exists()
    again = Classifier.open(pins)
    try:
        assert again.attachments() == []
        assert again.edges() == []
    finally:
        again.remove()


def test_an_interface_that_is_not_there_is_refused_and_nothing_stays_behind(
    classifier: Classifier, pins: Path
) -> None:
    with pytest.raises(KernelError, match="interface 4000000"):
        classifier.attach(WORKLOAD, 4_000_000, Side.HOST, ())
    assert classifier.attachments() == []
    assert list((pins / "classifier" / "links").iterdir()) == []


def test_a_full_edge_map_shows_what_it_could_not_hold(
    classifier: Classifier, pins: Path, pair: Pair, certificate: ssl.SSLContext
) -> None:
    observe(classifier, pair)
    with Map.open_pinned(pins / "classifier" / "maps" / "edge_pool") as taken:
        taken.update(bytes(4), struct.pack("=I", abi.EDGES_MAX))
    with answering(pair.pod, certificate):
        ask(connect(pair.peer, pair.pod_ipv4, PORT))
        ask_tls(connect(pair.peer, pair.pod_ipv4, TLS_PORT), MESH_SNI)
        connect(pair.peer, pair.pod_ipv6, PORT).close()
    losses = classifier.losses()
    assert losses.overflow == {
        FlowClass.PLAINTEXT: 1,
        FlowClass.MESH: 1,
        FlowClass.EMPTY: 1,
    }
    assert losses.lost == 3 + losses.edge_not_stored
    assert losses.edge_not_stored >= 3
    assert counts(classifier) == {}


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
def test_what_the_verifier_refuses_is_told_with_its_reason_and_line(tmp_path: Path) -> None:
    source = tmp_path / "wrong.bpf.c"
    source.write_text(
        '__attribute__((section("tc"), used)) int walks_off(void *context)\n'
        "{\n\treturn *(volatile int *)(context + 4096);\n}\n"
        'char terms[] __attribute__((section("license"), used)) = "Dual BSD/GPL";\n'
    )
    wrong = tmp_path / "wrong.bpf.o"
    subprocess.run(["clang", "-O2", "-g", "-target", "bpf", "-c", source, "-o", wrong], check=True)
    with Object.open(wrong) as compiled, pytest.raises(KernelError) as refused:
        compiled.load()
    message = str(refused.value)
    assert "wrong.bpf.o" in message
    assert "the verifier rejects walks_off: invalid bpf_context access off=4096" in message
    assert "at instruction 0: " in message
    assert "source: return *(volatile int *)(context + 4096)" in message
    assert "\n" not in message


def test_a_file_that_is_no_object_is_refused_in_one_sentence(tmp_path: Path, pins: Path) -> None:
    wrong = tmp_path / "wrong.bpf.o"
    wrong.write_text("not an object")
    with pytest.raises(KernelError, match="is not a file of BPF programs"):
        Classifier.open(pins, wrong)
    with pytest.raises(KernelError, match="no such file"):
        Classifier.open(pins, tmp_path / "missing.bpf.o")
