"""Sending one packet with a token, and waiting for what becomes of it.

Nothing is opened: a SYN is answered (by a SYN-ACK, or by an RST when nobody listens) with the token plus one, which
nobody else can know, and is taken back by an RST. Who may not send segments by hand opens connections in their place:
the kernel chooses the token then, and whoever listens sees a connection that ends at once.
"""

import enum
import ipaddress
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable

import msgspec

from tidegate.enforce.redirect.probing.place import Place, Target
from tidegate.intent.policy import MAX_PORT
from tidegate.kernel import rawtcp, tun
from tidegate.kernel.conntrack import Endpoint, Original
from tidegate.kernel.rawtcp import ACK, RST, SYN, Segment, Sender

_DEADLINE_S = 0.3
"""How long one answer may take. It never leaves the kernel."""
FIRST_PORT = 1024
_TYPE_A = 1
_CLASS_IN = 1


class Answer(enum.Enum):
    """What came back from where a probe went."""

    LISTENER = enum.auto()
    NOBODY = enum.auto()


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a probe."""

    landed: Endpoint | None
    """Where it went, as tracked; None when it is not tracked."""
    answer: Answer | None = None
    left: bool = False
    """Whether it left as it was."""


def send_syn(place: Place, target: Target, sender: Sender) -> Fate:
    destination, port = target.connection.destination, target.connection.port
    with (
        rawtcp.reserved_port(ipaddress.ip_address(destination).version) as source_port,
        rawtcp.open_raw(destination, sender, hops=1) as raw,
    ):
        syn = Segment(
            source=raw.getsockname()[0],
            source_port=source_port,
            destination=destination,
            destination_port=port,
            sequence=secrets.randbits(32),
            flags=SYN,
        )
        raw.send(rawtcp.pack(syn))
        landed = place.landed(_original(syn))
        if not place.would_see(target) and place.is_untouched(landed, target):
            return Fate(landed=landed, left=True)

        def fate() -> Fate | None:
            if any(segment == syn for segment in place.came_out()):
                return Fate(landed=landed, left=True)
            answer = _answer(syn, rawtcp.received(raw))
            return Fate(landed=landed, answer=answer) if answer is not None else None

        return _awaited(fate, place, raw) or Fate(landed=landed)


def connect(place: Place, target: Target, sender: Sender) -> Fate:
    """As `send_syn`, by a connection that is opened, and reset."""
    destination, port = target.connection.destination, target.connection.port
    with rawtcp.open_tcp(destination, port, sender, hops=1) as tcp:
        source, source_port, *_ = tcp.getsockname()
        syn = Segment(
            source=source,
            source_port=source_port,
            destination=destination,
            destination_port=port,
            sequence=0,
            flags=SYN,
        )
        landed = place.landed(_original(syn))
        if not place.would_see(target) and place.is_untouched(landed, target):
            return Fate(landed=landed, left=True)

        def fate() -> Fate | None:
            if any(_original(segment) == _original(syn) for segment in place.came_out()):
                return Fate(landed=landed, left=True)
            connected = rawtcp.connected(tcp)
            if connected is None:
                return None
            return Fate(landed=landed, answer=Answer.LISTENER if connected else Answer.NOBODY)

        return _awaited(fate, place, tcp) or Fate(landed=landed)


def send_query(place: Place, target: Target, sender: Sender) -> Fate:
    """Ask a DNS question that nobody will pass on: recursion is not desired, the name is invalid (RFC 6761)."""
    destination, port = target.connection.destination, target.connection.port
    question = _question(secrets.token_hex(8))
    with rawtcp.open_udp(destination, port, sender, hops=1) as udp:
        udp.send(question)
        source, source_port, *_ = udp.getsockname()
        landed = place.landed(
            Original(
                protocol=socket.IPPROTO_UDP,
                source=source,
                source_port=source_port,
                destination=destination,
                destination_port=port,
            )
        )
        if not place.would_see(target) and place.is_untouched(landed, target):
            return Fate(landed=landed, left=True)

        def fate() -> Fate | None:
            if any(packet.endswith(question) for packet in place.packets()):
                return Fate(landed=landed, left=True)
            answered = rawtcp.answered(udp)
            if answered is None:
                return None
            return Fate(landed=landed, answer=Answer.LISTENER if answered else Answer.NOBODY)

        return _awaited(fate, place, udp) or Fate(landed=landed)


def let_arrive(place: Place, device: tun.Device, target: Target) -> Fate:
    connection = target.connection
    syn = Segment(
        source=connection.source,
        source_port=FIRST_PORT + secrets.randbelow(MAX_PORT - FIRST_PORT),
        destination=connection.destination,
        destination_port=connection.port,
        sequence=secrets.randbits(32),
        flags=SYN,
    )
    device.write(rawtcp.pack_packet(syn))
    landed = place.landed(_original(syn))

    def fate() -> Fate | None:
        answer = _answer(syn, place.came_out())
        return Fate(landed=landed, answer=answer) if answer is not None else None

    found = _awaited(fate, place) or Fate(landed=landed)
    if found.answer is Answer.LISTENER:
        reset = msgspec.structs.replace(syn, sequence=_next(syn.sequence), flags=RST)
        device.write(rawtcp.pack_packet(reset))
    return found


def _answer(syn: Segment, heard: Iterable[Segment]) -> Answer | None:
    """The answer to a SYN, told by its token."""
    for segment in heard:
        here = (segment.source, segment.source_port, segment.destination_port)
        if here != (syn.destination, syn.destination_port, syn.source_port):
            continue
        if segment.acknowledged == _next(syn.sequence):
            if segment.flags & RST:
                return Answer.NOBODY
            if segment.flags & (SYN | ACK) == SYN | ACK:
                return Answer.LISTENER
    return None


def _awaited(
    fate: Callable[[], Fate | None], place: Place, sender: socket.socket | None = None
) -> Fate | None:
    """What becomes of a probe, as soon as that is known; None when it is not in time."""
    poll = select.poll()
    for readable in (place.device, sender):
        if readable is not None:
            poll.register(readable.fileno(), select.POLLIN)
    if sender is not None and sender.type is socket.SOCK_STREAM:
        poll.modify(sender.fileno(), select.POLLOUT)
    deadline = time.monotonic() + _DEADLINE_S
    while (found := fate()) is None and (rest := deadline - time.monotonic()) > 0:
        poll.poll(rest * 1000)
    return found


def _original(syn: Segment) -> Original:
    return Original(
        protocol=socket.IPPROTO_TCP,
        source=syn.source,
        source_port=syn.source_port,
        destination=syn.destination,
        destination_port=syn.destination_port,
    )


def _next(sequence: int) -> int:
    return (sequence + 1) & 0xFFFFFFFF


def _question(token: str) -> bytes:
    """A query for the address of a name that does not exist (RFC 1035, 4.1)."""
    labels = (token.encode(), b"tidegate", b"invalid")
    name = b"".join(bytes([len(label)]) + label for label in labels)
    header = struct.pack("!HHHHHH", secrets.randbits(16), 0, 1, 0, 0, 0)
    return header + name + struct.pack("!BHH", 0, _TYPE_A, _CLASS_IN)
