"""`tidegate classify`: what it says of a capture is what `observe` said while the capture was taken."""

import io
import json
import re
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, pair_of
from packets import IPV4, IPV6, ip, tcp
from watching import (
    ANSWER,
    REQUEST,
    answering,
    call_in_every_way,
    capturing,
    observing,
    pcap,
    run,
    server_context,
)

from tidegate.cli.profiles import KNOWN
from tidegate.observe import capture, replay

SYN, ACK, FIN, RST = 0x02, 0x10, 0x01, 0x04


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with pair_of() as made:
        yield made


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_context(tmp_path_factory.mktemp("certificate"))


def classify(*captures: bytes):
    """What the command says of captures, played one behind the other, without a process of its own for it."""
    with replay.replaying(KNOWN["consul"]) as played:
        for raw in captures:
            for packet in capture.packets(io.BytesIO(raw), "a capture"):
                played.play(packet)
        return msgspec.to_builtins(played.report(), order="deterministic")


def lost(seen):
    return {name: number for name, number in seen["counters"].items() if number}


class Conversation:
    """The frames of one TCP connection, client first."""

    def __init__(self, hosts=IPV4, client_port=40_000, first=1_000, port=8080):
        self._hosts = hosts
        self._ports = (client_port, port)
        self.at = [first, 5_000]
        self.frames: list[bytes] = []

    def send(self, sender: int, payload: bytes = b"", flags: int = ACK, options: bytes = b""):
        ends = slice(None, None, -1 if sender else 1)
        segment = tcp(
            *self._ports[ends],
            self.at[sender] % 2**32,
            self.at[1 - sender] % 2**32,
            flags,
            payload,
            options,
        )
        self.frames.append(bytes(12) + ip(*self._hosts[ends], segment))
        self.at[sender] += len(payload) + bool(flags & SYN) + bool(flags & FIN)
        return self

    def open(self, mss: int | None = None):
        options = b"" if mss is None else struct.pack("!BBH", 2, 4, mss)
        return (
            self.send(0, flags=SYN, options=options)
            .send(1, flags=SYN | ACK, options=options)
            .send(0)
        )

    def ask(self, request: bytes = REQUEST, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n"):
        return self.send(0, request).send(1, answer).send(0)

    def close(self):
        return self.send(0, flags=FIN | ACK).send(1, flags=FIN | ACK).send(0)


@pytest.mark.parametrize("version", [4, 6])
def test_a_capture_says_what_the_interface_said(pair, tls, version):
    with (
        answering(pair.peer, tls),
        capturing(pair.pod, "eth0") as frames,
        observing("--interface", "eth0", inside=pair.pod) as observer,
    ):
        call_in_every_way(pair, version)
        live = observer.end()
    done = run("classify", "-", "--json", stdin=pcap(frames))
    assert (done.returncode, done.stderr) == (0, b"")
    played = json.loads(done.stdout)
    assert played["flows"] == live["flows"]
    assert played["edges"] == live["edges"]
    assert lost(played) == lost(live) == {}
    assert {flow["class"] for flow in played["flows"]} == {"plaintext", "mesh", "tls", "empty"}
    assert max(map(len, frames)) > 4096, "there were super-segments"


def test_super_segments_count_in_full_and_as_the_packets_that_they_were():
    talk = Conversation().open(mss=1000).send(0, REQUEST).send(1, ANSWER[:20_500])
    (flow,) = classify(pcap(talk.frames))["flows"]
    assert (flow["bytes_to_server"], flow["bytes_to_client"]) == (len(REQUEST), 20_500)
    assert flow["segments"] == 3 + 1 + 21


@pytest.mark.parametrize("hosts", [IPV4, IPV6], ids=["ipv4", "ipv6"])
def test_what_was_cut_off_is_counted_and_nothing_is_made_up(hosts):
    talk = Conversation(hosts).open().send(0, b"GET /" + b"a" * 500).send(1, b"b" * 700).close()
    kept = 14 + (40 if hosts is IPV6 else 20) + 20 + 5
    seen = classify(pcap(talk.frames, snap_length=kept))
    (flow,) = seen["flows"]
    assert flow["class"] == "plaintext"
    assert (flow["bytes_to_server"], flow["bytes_to_client"]) == (505, 700)
    (edge,) = seen["edges"]
    assert (edge["bytes_to_server"], edge["bytes_to_client"]) == (505, 700)
    assert seen["counters"]["packet_truncated"] == 2


def test_a_hello_that_was_cut_off_is_never_called_something_else():
    out = ssl.MemoryBIO()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="pay.example").do_handshake()
    hello, answer = out.read(), b"\x16\x03\x03\x00\x01"
    whole, cut, gone = (
        Conversation(client_port=port).open().send(0, hello).send(1, answer).send(0).frames
        for port in (40_001, 40_002, 40_003)
    )
    seen = classify(pcap(whole), pcap(cut, snap_length=70), pcap(gone, snap_length=40))
    told = [(flow["client"], flow["class"], flow["sni"]) for flow in seen["flows"]]
    assert told[0] == ("10.1.0.9:40001", "tls", "pay.example")
    assert told[1][:2] == ("10.1.0.9:40002", "unknown")
    assert len(told) == 2
    assert seen["counters"]["packet_truncated"] == 1 + len(gone)


def link_header(link: capture.LinkType, ethertype: bytes) -> bytes | None:
    """What is in front of a packet on a link; None where there are none of that kind."""
    ipv6 = ethertype == b"\x86\xdd"
    family = 10 if ipv6 else 2
    match link:
        case capture.LinkType.ETHERNET:
            return bytes(12) + ethertype
        case capture.LinkType.NULL:
            return struct.pack("<I", family)
        case capture.LinkType.LOOP:
            return struct.pack(">I", family)
        case capture.LinkType.LINUX_SLL:
            return bytes(14) + ethertype
        case capture.LinkType.LINUX_SLL2:
            return ethertype + bytes(18)
        case capture.LinkType.IPV4:
            return None if ipv6 else b""
        case capture.LinkType.IPV6:
            return b"" if ipv6 else None
        case _:
            return b""


def test_every_kind_of_link_gives_the_same_answer():
    captures = []
    for link in capture.LinkType:
        for hosts in (IPV4, IPV6):
            talk = Conversation(hosts, client_port=10_000 + len(captures)).open().ask().close()
            header = link_header(link, talk.frames[0][12:14])
            if header is not None:
                frames = [header + frame[14:] for frame in talk.frames]
                captures.append(pcap(frames, link_type=link))
    flows = classify(*captures)["flows"]
    assert len(flows) == len(captures) == 2 * len(capture.LinkType) - 2
    for flow in flows:
        assert (flow["direction"], flow["class"]) == ("outbound", "plaintext"), flow
        assert (flow["bytes_to_server"], flow["segments"]) == (len(REQUEST), 9), flow


def test_the_local_end_is_the_sender_of_the_first_packet():
    called = Conversation(client_port=1_000, port=50_000).open().ask()
    answered = Conversation(client_port=1_001, port=50_000).open().ask()
    both = classify(pcap(called.frames), pcap(answered.frames[1:]))["flows"]
    assert [(flow["direction"], flow["syn_seen"]) for flow in both] == [
        ("outbound", True),
        ("outbound", False),
    ]


def test_endpoints_that_are_used_again_are_another_flow():
    first = Conversation().open().ask().close()
    again = Conversation(first=900_000).open().send(0, b"\x16\x03\x01").send(0, flags=RST | ACK)
    seen = classify(pcap(first.frames + first.frames[:1] + again.frames))
    assert [flow["bytes_to_server"] for flow in seen["flows"]] == [len(REQUEST), 3]
    assert seen["flows_not_listed"] == 0


def test_more_flows_than_the_map_holds_are_all_told_and_go_on_where_they_were(monkeypatch):
    monkeypatch.setattr(replay, "FLOWS", 64)
    talks = [Conversation(client_port=10_000 + number) for number in range(300)]
    with replay.replaying(KNOWN["consul"]) as played:
        for step in (
            lambda talk: talk.open().send(0, REQUEST[:4]),
            lambda talk: talk.send(0, REQUEST[4:]).send(1, b"HTTP/1.1 200 OK\r\n\r\n"),
            lambda talk: talk.close(),
        ):
            for talk in talks:
                talk.frames.clear()
                for frame in step(talk).frames:
                    played.play(capture.Packet(1, frame, len(frame), 0))
        report = played.report()
    assert [flow.flow_class for flow in report.flows] == ["plaintext"] * 300
    assert {flow.bytes_to_server for flow in report.flows} == {len(REQUEST)}
    assert report.flows_not_listed == 0
    assert not any(report.counters.values()), report.counters


def test_what_is_not_tcp_is_ignored_and_what_cannot_be_read_is_counted():
    udp = bytes(12) + b"\x08\x00" + bytes([0x45, 0, 0, 28]) + bytes(5) + b"\x11" + bytes(18)
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    fragment = bytearray(Conversation().open().frames[0])
    fragment[20] |= 0x20
    seen = classify(pcap([udp, arp, bytes(fragment), udp + bytes(9_000)]))
    assert seen["ignored"] == {"not_ip": 1, "not_tcp": 2}
    assert lost(seen) == {"tcp_fragment": 1}


def test_packets_of_links_that_are_not_read_are_counted():
    from_section = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    wireless = struct.pack("<IIHHII", 1, 20, 105, 0, 0, 20)
    packet = struct.pack("<IIIIIII", 6, 96, 0, 0, 0, 64, 64) + bytes(64) + struct.pack("<I", 96)
    assert lost(classify(from_section + wireless + packet)) == {"link_type_unknown": 1}


def test_a_table_is_printed_for_people(tmp_path):
    file = tmp_path / "talk.pcap"
    file.write_bytes(pcap(Conversation().open().ask().close().frames))
    done = run("classify", str(file))
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert "10.1.0.9:40000" in text
    assert "connections: plaintext 1" in text
    assert "nothing was lost" in text


def test_the_example_is_what_its_page_says():
    docs = Path(__file__).parents[2] / "docs"
    done = run("classify", str(docs / "example.pcap"))
    assert done.returncode == 0, done.stderr
    (block,) = re.findall("```text\n(.*?)```", (docs / "observe.md").read_text(), re.DOTALL)
    assert done.stdout.decode().endswith(block)


def test_of_a_capture_that_ends_in_the_middle_of_a_packet_all_before_is_told(tmp_path):
    file = tmp_path / "cut.pcap"
    whole = pcap(Conversation().open().ask().close().frames)
    file.write_bytes(whole[:-3])
    done = run("classify", str(file), "--json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [flow["class"] for flow in seen["flows"]] == ["plaintext"]
    assert lost(seen) == {"packet_truncated": 1}
    (note,) = seen["notes"]
    assert f"byte {len(whole) - 3}: ends in the middle of a packet" in note
    assert done.stderr.decode() == f"tidegate: {note}\n"


def test_a_broken_file_is_told_in_one_sentence(tmp_path):
    file = tmp_path / "broken.pcap"
    file.write_bytes(pcap(Conversation().open().frames)[:50])
    done = run("classify", str(file))
    assert (done.returncode, done.stdout) == (2, b"")
    (said,) = done.stderr.decode().splitlines()
    assert said.startswith(f"tidegate: {file}: byte ")
    assert "ends in the middle of a packet" in said
    assert b"cannot be read" in run("classify", str(tmp_path / "none.pcap")).stderr
