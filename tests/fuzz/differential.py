"""Plays streams to the programs in the kernel and compares what they say with the reference.

Many connections are in the flow map at once and are read together; so are the edges, whose sums must be those of
the reference. Every difference names the aspect, what the reference says and what the kernel says.
"""

import contextlib
import enum
import functools
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from classifying import Bench
from packets import IPV4, IPV6, Packet, Talk

from tidegate.model import Direction
from tidegate.observe import abi
from tidegate.observe.classifier import Classifier, FlowRecord, HelloChunk, MeshProfile

from .reference import Connection, Flag, Segment
from .streams import PROFILE, PROXY_PORT, SERVER_PORT, Stream

BATCH = 500
"""Connections at once: fewer than the prefix map holds, or those that wait would lose their bytes."""
_FIRST_PORT = 30_000
_MOST_PAYLOAD = 3000
"""BPF_PROG_TEST_RUN takes no more than a page, with what goes in front and behind."""


class Aspect(enum.StrEnum):
    """What is compared."""

    CLASS = "class"
    HINT = "hint"
    FLAGS = "flags"
    BYTES = "bytes"
    HELLOS = "hellos"
    """Where the programs report them: whether their parts are the client's bytes, in order and without a gap."""
    EDGES = "edges"


@dataclass(frozen=True)
class Difference:
    """What the two say about one stream, or about the sums of a batch (then without a stream)."""

    aspect: Aspect
    reference: str
    kernel: str
    stream: Stream | None = None

    def is_like(self, other: "Difference") -> bool:
        """Whether it is the same about another stream; how many bytes there are does not matter."""
        if self.aspect is Aspect.BYTES:
            return other.aspect is Aspect.BYTES
        return (self.aspect, self.reference, self.kernel) == (
            other.aspect,
            other.reference,
            other.kernel,
        )

    def __str__(self) -> str:
        return f"{self.aspect}: the reference says {self.reference}, the kernel {self.kernel}"


def mesh_profile() -> MeshProfile:
    """The reference's profile as the classifier takes it."""
    return MeshProfile(
        name="fuzz",
        sni_suffixes=tuple(suffix.decode() for suffix in PROFILE.sni_suffixes),
        alpn=tuple(name.decode() for name in PROFILE.alpn),
        proxy_ports=PROFILE.proxy_ports,
    )


class Differential:
    """A classifier of its own, and what it takes to compare it with the reference."""

    def __init__(self, bench: Bench, aspects: Sequence[Aspect] = tuple(Aspect)) -> None:
        self._bench = bench
        self._aspects = frozenset(aspects)
        self._hellos: dict[bytes, list[HelloChunk]] = defaultdict(list)
        """What was reported, by the flow's key."""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, aspects: Sequence[Aspect] = tuple(Aspect), *, report: bool = False
    ) -> Iterator["Differential"]:
        """With programs of its own, which go with it; with `report` they also send ClientHellos."""
        with contextlib.closing(Classifier.private(report=report)) as classifier:
            classifier.set_profile(mesh_profile())
            yield cls(Bench(classifier), aspects)

    def compare(self, streams: Sequence[Stream]) -> list[Difference]:
        """Plays these (at most BATCH) and tells where the two disagree.

        All of them are in the middle at the same time: first comes one half of each, then the other.
        """
        bench = self._bench
        bench.begin(service_ports=(SERVER_PORT, PROXY_PORT))
        halves = []
        for number, stream in enumerate(streams):
            packets = _packets(stream, _FIRST_PORT + number)
            direction = Direction.OUTBOUND if stream.outbound else Direction.INBOUND
            self._play(packets[: len(packets) // 2], direction)
            halves.append((packets[len(packets) // 2 :], direction))
        for packets, direction in halves:
            self._play(packets, direction)
        expected = [_expect(stream) for stream in streams]
        records = {_client_port(record): record for record in bench.flows()}
        differences = [
            found
            for number, (stream, connection) in enumerate(zip(streams, expected, strict=True))
            for found in self._differences(stream, connection, records.get(_FIRST_PORT + number))
        ]
        if Aspect.EDGES in self._aspects and not differences:
            differences += self._sums(expected)
        bench.evict_flows()
        bench.classifier.forget_edges(bench.workload)
        self._hellos.clear()
        return differences

    def _play(self, packets: list[Packet], direction: Direction) -> None:
        self._bench.play(packets, direction)
        for chunk in self._bench.classifier.hellos():
            self._hellos[chunk.key].append(chunk)

    def minimised(self, difference: Difference, stream: Stream) -> Stream:
        """The stream with the fewest segments that make the same difference: some dropped, others joined."""

        def still_differs(segments: tuple[Segment, ...]) -> bool:
            found = self.compare([replace(stream, segments=segments)])
            return any(each.is_like(difference) for each in found)

        segments = stream.segments
        for shorten in (_dropped, _joined):
            size = len(segments)
            while size:
                at = 0
                while at < len(segments):
                    shorter = shorten(segments, at, size)
                    if len(shorter) < len(segments) and still_differs(shorter):
                        segments = shorter
                    else:
                        at += size
                size //= 2
        return replace(stream, segments=segments)

    def _differences(
        self, stream: Stream, expected: Connection, found: FlowRecord | None
    ) -> Iterator[Difference]:
        if found is None:
            if expected.counts:
                yield Difference(Aspect.CLASS, expected.flow_class, "no flow", stream)
            return
        for aspect in self._aspects - {Aspect.EDGES, Aspect.HELLOS}:
            wanted, have = _said(aspect, expected, found)
            if wanted != have:
                yield Difference(aspect, wanted, have, stream)
        if Aspect.HELLOS in self._aspects:
            yield from self._reported(stream, expected, found)

    def _reported(
        self, stream: Stream, expected: Connection, found: FlowRecord
    ) -> Iterator[Difference]:
        hello = b""
        for chunk in self._hellos[found.key]:
            if chunk.position != len(hello):
                here, there = f"a part at {len(hello)}", f"one at {chunk.position}"
                yield Difference(Aspect.HELLOS, here, there, stream)
            hello += chunk.bytes
        if not expected.may_tell_overlap and not expected.hello.startswith(hello):
            yield Difference(Aspect.HELLOS, expected.hello.hex(), hello.hex(), stream)

    def _sums(self, expected: Sequence[Connection]) -> Iterator[Difference]:
        wanted, have = Counter[str](), Counter[str]()
        for connection in filter(lambda each: each.counts, expected):
            wanted[f"{connection.flow_class} connections"] += 1
            wanted[f"{connection.flow_class} bytes to the server"] += connection.bytes_to_server
            wanted[f"{connection.flow_class} bytes to the client"] += connection.bytes_to_client
        for edge in self._bench.edges():
            have[f"{edge.key.flow_class} connections"] += edge.count.connections
            have[f"{edge.key.flow_class} bytes to the server"] += edge.count.bytes_to_server
            have[f"{edge.key.flow_class} bytes to the client"] += edge.count.bytes_to_client
        for name in sorted(wanted | have):
            if wanted[name] != have[name]:
                yield Difference(Aspect.EDGES, f"{wanted[name]} {name}", str(have[name]))


def _dropped(segments: tuple[Segment, ...], at: int, size: int) -> tuple[Segment, ...]:
    return segments[:at] + segments[at + size :]


def _joined(segments: tuple[Segment, ...], at: int, size: int) -> tuple[Segment, ...]:
    """With what follows `at`, up to `size` segments further, in one, as far as it goes on from there."""
    first, *rest = segments[at : at + size + 1]
    for following in rest:
        if (first.from_client, first.flags, first.position + len(first.payload)) != (
            following.from_client,
            following.flags,
            following.position,
        ) or len(first.payload) + len(following.payload) > _MOST_PAYLOAD:
            break
        first = following._replace(
            position=first.position, payload=first.payload + following.payload
        )
        segments = (*segments[:at], first, *segments[at + 2 :])
    return segments


def _said(aspect: Aspect, expected: Connection, found: FlowRecord) -> tuple[str, str]:
    """What the reference says, and what the kernel does."""
    match aspect:
        case Aspect.CLASS:
            return expected.flow_class, found.flow_class
        case Aspect.HINT:
            return str(expected.hint), str(found.hint)
        case Aspect.BYTES:
            return (
                f"{expected.bytes_to_server} and {expected.bytes_to_client}",
                f"{found.bytes_to_server} and {found.bytes_to_client}",
            )
        case Aspect.FLAGS:
            return _flags(expected, found)
        case Aspect.EDGES | Aspect.HELLOS:
            raise ValueError(f"{aspect} are not told by a flow")


def _flags(expected: Connection, found: FlowRecord) -> tuple[str, str]:
    kernel = Flag(0)
    for flag in Flag:
        assert flag.name is not None
        if abi.FlowFlag[flag.name] in found.flags:
            kernel |= flag
    wanted = expected.flags
    if expected.must_tell_overlap or (Flag.OVERLAP in kernel and expected.may_tell_overlap):
        wanted |= Flag.OVERLAP
    return str(wanted), str(kernel)


def _expect(stream: Stream) -> Connection:
    connection = Connection(PROFILE, stream.server_port)
    for segment in stream.segments:
        connection.feed(segment)
    return connection


def _client_port(record: FlowRecord) -> int:
    return record.peer_port if record.direction is Direction.INBOUND else record.local_port


@functools.cache
def _headers(version: int, from_client: bool) -> bytes:
    """All headers of a segment, for `_packets` to fill in what differs."""
    client, server = IPV4 if version == 4 else IPV6
    talk = Talk(client=(client, 0), server=(server, 0))
    return (talk.up if from_client else talk.down)(0, b"").frame


_LENGTH = {4: 16, 6: 18}
"""Where the length is, of the packet in IPv4 and of its payload in IPv6, behind an Ethernet header."""


def _packets(stream: Stream, client_port: int) -> list[Packet]:
    """Frames of a stream. Made from two templates: packet by packet with a Talk takes longer than playing."""
    packets = []
    at = _LENGTH[stream.version]
    for segment in stream.segments:
        mine, other = stream.client_isn, stream.server_isn
        if not segment.from_client:
            mine, other = other, mine
        opens = segment.flags & 0x02
        headers = bytearray(_headers(stream.version, segment.from_client))
        tcp = len(headers) - 20
        length = int.from_bytes(headers[at : at + 2], "big") + len(segment.payload)
        headers[at : at + 2] = length.to_bytes(2, "big")
        ports = (client_port, stream.server_port)
        struct.pack_into("!HH", headers, tcp, *(ports if segment.from_client else ports[::-1]))
        acknowledges = segment.flags & 0x10
        struct.pack_into(
            "!IIBB",
            headers,
            tcp + 4,
            (mine + segment.position + (0 if opens else 1)) & 0xFFFFFFFF,
            (other + segment.acked + 1) & 0xFFFFFFFF if acknowledges else 0,
            5 << 4,
            segment.flags,
        )
        packets.append(Packet(segment.from_client, bytes(headers) + segment.payload))
    return packets
