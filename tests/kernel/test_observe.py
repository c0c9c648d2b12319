"""`tidegate observe` on real interfaces: what it tells of real clients, and how it begins and ends."""

import json
import signal
import socket
import ssl
from collections.abc import Iterator

import pytest
from namespaces import Pair, namespace, pair_of
from watching import (
    ANSWER,
    CLOSED_PORT,
    MESH_SNI,
    PORT,
    REQUEST,
    TLS_PORT,
    answering,
    ask,
    call_in_every_way,
    connect,
    observing,
    run,
    server_context,
)

from tidegate.cli.main import main
from tidegate.cli.profiles import KNOWN
from tidegate.kernel import links, netns
from tidegate.observe import session


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with pair_of() as made:
        yield made


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_context(tmp_path_factory.mktemp("certificate"))


def by_class(seen, key="class"):
    return {flow[key]: flow for flow in seen["flows"]}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("inside", [False, True], ids=["host", "inside"])
def test_every_connection_is_told_with_its_names_and_its_bytes(pair, tls, version, inside):
    where = {"inside": pair.pod} if inside else {"inside": pair.peer}
    options = () if inside else ("--netns", pair.pod)
    with answering(pair.peer, tls), observing(*options, **where) as observer:
        call_in_every_way(pair, version)
        seen = observer.end()
    flows = by_class(seen)
    assert set(flows) == {"plaintext", "mesh", "tls", "empty"}
    assert len(seen["flows"]) == 4
    address = pair.peer_address(version)
    server = f"[{address}]" if version == 6 else address
    plain = flows["plaintext"]
    assert (plain["direction"], plain["server"]) == ("outbound", f"{server}:{PORT}")
    assert (plain["syn_seen"], plain["first_byte_seen"]) == (True, True)
    assert (plain["bytes_to_server"], plain["bytes_to_client"]) == (len(REQUEST), len(ANSWER))
    assert plain["hint"] == "http1"
    assert plain["segments"] > len(ANSWER) // 1500
    assert (plain["sni"], plain["alpn"]) == (None, [])
    assert (flows["mesh"]["sni"], flows["mesh"]["alpn"]) == (MESH_SNI, [])
    assert (flows["tls"]["sni"], flows["tls"]["alpn"]) == ("pay.example.org", ["h2", "http/1.1"])
    assert flows["empty"]["server"] == f"{server}:{CLOSED_PORT}"
    assert flows["empty"]["first_byte_seen"] is False
    assert set(seen["counters"].values()) == {0}, seen["counters"]
    assert seen["flows_not_listed"] == 0
    edges = {(edge["class"], edge["port"]): edge for edge in seen["edges"]}
    assert {key: edge["connections"] for key, edge in edges.items()} == {
        ("plaintext", PORT): 1,
        ("mesh", TLS_PORT): 1,
        ("tls", TLS_PORT): 1,
        ("empty", CLOSED_PORT): 1,
    }
    assert edges["plaintext", PORT]["bytes_to_client"] == len(ANSWER)


def test_a_connection_that_was_open_before_is_unknown_and_counted(pair, tls):
    with answering(pair.peer, tls):
        early = connect(pair.pod, pair.peer_ipv4, PORT)
        with observing("--netns", pair.pod, inside=pair.peer) as observer:
            ask(early)
            seen = observer.end()
    (flow,) = seen["flows"]
    assert (flow["class"], flow["syn_seen"]) == ("unknown", False)
    assert seen["counters"]["joined_midstream"] == 1


def test_the_ports_that_are_listened_on_tell_who_called_before(pair):
    with netns.run_in(pair.pod, socket.create_server, ("", 50_000)) as listener:
        client = netns.run_in(
            pair.peer,
            lambda: socket.create_connection((pair.pod_ipv4, 50_000), 5, ("", 40_000)),
        )
        with (
            client,
            listener.accept()[0] as accepted,
            observing("--netns", pair.pod, inside=pair.peer) as observer,
        ):
            client.sendall(b"more")
            assert accepted.recv(4) == b"more"
            seen = observer.end()
    assert [flow["direction"] for flow in seen["flows"]] == ["inbound"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to(pair, number):
    with observing("--netns", pair.pod, inside=pair.peer) as observer:
        assert observer.end(number)["flows"] == []
    assert observer.errors == ""


def test_a_signal_while_it_attaches_ends_it_and_its_answer_is_whole(pair, monkeypatch, capsys):
    watching = session.watching

    def told_meanwhile(*arguments):
        signal.raise_signal(signal.SIGINT)
        return watching(*arguments)

    monkeypatch.setattr(session, "watching", told_meanwhile)
    assert main(["observe", "--netns", pair.pod, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flows"] == []


def test_it_ends_when_its_time_is_over(pair):
    with observing("--netns", pair.pod, "--for", "200ms", inside=pair.peer) as observer:
        assert observer.seen()["flows"] == []


def test_an_interface_that_goes_ends_it_and_what_was_seen_is_told(tls):
    with (
        pair_of() as pair,
        answering(pair.peer, tls),
        observing("--netns", pair.pod, inside=pair.peer) as observer,
    ):
        ask(connect(pair.pod, pair.peer_ipv4, PORT))
        links.delete_link(pair.pod, "eth0")
        seen = observer.seen()
    assert [flow["class"] for flow in seen["flows"]] == ["plaintext"]
    (note,) = seen["notes"]
    assert "eth0 has gone" in note
    assert note in observer.errors


def test_flows_beyond_those_that_are_listed_are_told_by_their_number(pair, tls, monkeypatch):
    monkeypatch.setattr(session, "LISTED_MAX", 2)

    def watch():
        place = session.choose(pair.pod, "eth0")
        with session.watching(place, KNOWN["consul"]) as watched:
            for _ in range(5):
                ask(connect(pair.pod, pair.peer_ipv4, PORT))
            return watched.finish()

    with answering(pair.peer, tls):
        report = netns.run_in(pair.peer, watch)
    assert len(report.flows) == 2
    assert report.flows_not_listed == 3
    assert sum(edge.connections for edge in report.edges) == 5


def refused(*options, inside=netns.CURRENT):
    done = netns.run_in(inside, run, "observe", *options)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert done.stdout == b""
    assert text.count("\n") == 1
    return text


def test_what_is_not_there_is_answered_with_what_is(pair):
    name = pair.pod.rpartition("/")[2]
    assert name in refused("--netns", f"{name}x")
    assert "one of eth0 (and 1 other)" in refused("--netns", pair.pod, "--interface", "eth9")
    assert "one of lo, eth0" in refused("--netns", pair.pod, "--interface", "wan")
    assert "--pid: 'abc' is not the number of a process; see" in refused("--pid", "abc")
    assert "consul, istio, kuma" in refused("--profile", "consl")
    assert "--lab: says whom to ask, and there is nothing to ask" in refused("--lab", "any")


def test_without_a_name_the_interface_is_the_one_that_is_probably_meant():
    with namespace() as one, namespace() as other:
        assert session.choose(one, None).interface == "lo"
        links.create_veth(one, "first", other, "second")
        assert session.choose(one, None).interface == "first"
        links.create_veth(one, "third", other, "fourth")
        assert "expected one of lo, " in refused("--netns", one)
        links.set_up(one, "third")
        links.set_up(other, "fourth")
        links.add_address(one, "third", "10.88.0.2/24")
        links.add_route(one, "0.0.0.0/0", gateway="10.88.0.1")
        assert session.choose(one, None).interface == "third"
        links.create_veth(one, "eth0", other, "fifth")
        assert session.choose(one, None).interface == "eth0"


def test_a_profile_file_with_a_fault_is_refused(tmp_path):
    profile = tmp_path / "mesh.yaml"
    for text, problem in (
        ("alpn: 3", "alpn"),
        ("{}", "recognises nothing"),
        ("proxy_ports: [70000]", "70000 is no port"),
        ("aplns: [x]", "aplns"),
        ("alpn: [x, ", "mesh.yaml: line "),
        ('alpn = ["x"', "mesh.yaml: line 1"),
        ('{"alpn": ["x"}', "mesh.yaml: line 1"),
        ("alpn: [x]\n---\nalpn: [y]\n", "mesh.yaml: holds 2 profiles"),
        ("", "recognises nothing"),
    ):
        profile.write_text(text)
        told = refused("--profile", str(profile))
        assert problem in told
        assert "mesh.yaml: " in told


def test_a_profile_of_ones_own_says_what_the_mesh_is(pair, tls, tmp_path):
    profile = tmp_path / "mesh.yaml"
    profile.write_text("alpn: [h2]\n")
    with (
        answering(pair.peer, tls),
        observing("--netns", pair.pod, "--profile", str(profile), inside=pair.peer) as observer,
    ):
        call_in_every_way(pair, 4)
        seen = observer.end()
    assert by_class(seen, "sni")["pay.example.org"]["class"] == "mesh"
    assert by_class(seen, "sni")[MESH_SNI]["class"] == "tls"
