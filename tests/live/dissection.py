"""What tshark says of a capture: an independent witness, which shares no code with tidegate."""

import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from place import Place
from recording import Connection, endpoint

_FIELDS = (
    "ip.src",
    "ipv6.src",
    "tcp.srcport",
    "ip.dst",
    "ipv6.dst",
    "tcp.dstport",
    "tcp.len",
    "tls.handshake.type",
    "tls.handshake.extensions_server_name",
    "tls.handshake.extensions_alpn_str",
)
_CLIENT_HELLO = "1"


@dataclass
class Dissected:
    """One connection as tshark understands it."""

    tls: bool = False
    """Whether the client sent a ClientHello."""
    sni: str | None = None
    alpn: tuple[str, ...] = ()
    first: str | None = None
    """Who sent the first payload: client or server."""


def dissect(place: Place, capture: Path, opened: list[Connection]) -> dict[Connection, Dissected]:
    """What became of these connections. Nothing is told to tshark about ports that it does not know by itself."""
    home = place.directory / "tshark"
    home.mkdir()
    environment = place.packages.environment | {"HOME": str(home)}
    data = place.packages.root / "usr/share/wireshark"
    if data.exists():
        environment["WIRESHARK_DATA_DIR"] = str(data)
    done = subprocess.run(
        [
            *(
                place.packages.program("tshark"),
                "-n",
                "-r",
                str(capture),
                "-Y",
                "tcp",
                "-T",
                "fields",
            ),
            *("-E", "separator=/t", "-E", "aggregator=,"),
            *(part for each in _FIELDS for part in ("-e", each)),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    found: dict[Connection, Dissected] = defaultdict(Dissected)
    known = set(opened)
    for line in done.stdout.splitlines():
        row = dict(zip(_FIELDS, line.split("\t"), strict=True))
        source = endpoint(row["ip.src"] or row["ipv6.src"], int(row["tcp.srcport"]))
        target = endpoint(row["ip.dst"] or row["ipv6.dst"], int(row["tcp.dstport"]))
        from_client = Connection(source, target) in known
        one = found[Connection(source, target) if from_client else Connection(target, source)]
        if one.first is None and int(row["tcp.len"]) > 0:
            one.first = "client" if from_client else "server"
        if from_client and _CLIENT_HELLO in row["tls.handshake.type"].split(","):
            one.tls = True
            one.sni = row["tls.handshake.extensions_server_name"] or None
            one.alpn = tuple(filter(None, row["tls.handshake.extensions_alpn_str"].split(",")))
    return found
