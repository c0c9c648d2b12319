"""Streams as small files: every one that ever made a difference stays in cases/ and is replayed by the tests."""

from pathlib import Path

import msgspec

from .reference import Segment
from .streams import SERVER_PORT, Stream

DIRECTORY = Path(__file__).parent / "cases"


class _Case(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    note: str
    """What the difference was."""
    outbound: bool
    version: int
    client_isn: int
    server_isn: int
    server_port: int = SERVER_PORT
    segments: list[tuple[str, int, str, int, int]]
    """Who, position, payload in hexadecimal, TCP flags, acknowledged."""


def write(path: Path, stream: Stream, note: str) -> None:
    case = _Case(
        note=note,
        outbound=stream.outbound,
        version=stream.version,
        client_isn=stream.client_isn,
        server_isn=stream.server_isn,
        server_port=stream.server_port,
        segments=[
            (
                "client" if each.from_client else "server",
                each.position,
                each.payload.hex(),
                each.flags,
                each.acked,
            )
            for each in stream.segments
        ],
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(case), indent=1) + b"\n")


def read(path: Path) -> Stream:
    case = msgspec.json.decode(path.read_bytes(), type=_Case)
    return Stream(
        segments=tuple(
            Segment(who == "client", position, bytes.fromhex(payload), flags, acked)
            for who, position, payload, flags, acked in case.segments
        ),
        outbound=case.outbound,
        version=case.version,
        client_isn=case.client_isn,
        server_isn=case.server_isn,
        server_port=case.server_port,
        kind=path.stem,
    )
