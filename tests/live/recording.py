"""Writes down what passes an interface: a capture for others to read, and which connections were opened, in order.

Uses a packet socket and knows just enough of TCP to see a SYN. Nothing of the classifier's.
"""

import contextlib
import ipaddress
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

# linux/if_ether.h, linux/if_packet.h
_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_RCVBUFFORCE = 33
_LONGEST = 1 << 17
_SYN, _ACK = 0x02, 0x10
QUIET_S = 0.2
"""For how long nothing may have come before what was sent is taken to be here."""
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Connection:
    """One TCP connection by its ends, written as tidegate writes them."""

    client: str
    server: str


@dataclass
class Recording:
    """What is being written down."""

    file: Path
    opened: list[Connection] = field(default_factory=list)
    """Connections in the order of their first SYN."""
    packets: int = 0
    last: float = 0.0
    """When the last packet came, by time.monotonic()."""

    def settle(self) -> None:
        """Waits until nothing has come for a while."""
        deadline = time.monotonic() + DEADLINE_S
        since = time.monotonic()
        while (left := max(self.last, since) + QUIET_S - time.monotonic()) > 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"packets still come after {DEADLINE_S:.0f} s")
            time.sleep(left)


@contextlib.contextmanager
def recording(interface: str, file: Path) -> Iterator[Recording]:
    """Records an interface of the calling thread's network namespace. The file is whole when it ends."""
    made = Recording(file)
    stop, stopped = socket.socketpair()
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as packets,
        file.open("wb") as output,
        stop,
        stopped,
    ):
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        packets.bind((interface, _ETH_P_ALL))
        # pcap: magic, version, time zone, accuracy, longest packet, Ethernet.
        output.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LONGEST, 1))
        thread = threading.Thread(target=_record, args=(made, packets, stopped, output))
        thread.start()
        try:
            yield made
        finally:
            stop.send(b"stop")
            thread.join()
            _, dropped = struct.unpack("II", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    if dropped:
        raise RuntimeError(f"the recording lacks {dropped} packets")


def _record(
    made: Recording, packets: socket.socket, stopped: socket.socket, output: BinaryIO
) -> None:
    while True:
        ready, _, _ = select.select([packets, stopped], [], [])
        if packets not in ready:
            return
        frame = packets.recv(_LONGEST)
        now = time.time_ns()
        seconds, microseconds = now // 1_000_000_000, now // 1000 % 1_000_000
        output.write(struct.pack("<IIII", seconds, microseconds, len(frame), len(frame)))
        output.write(frame)
        connection = _opened_by(frame)
        if connection and connection not in made.opened:
            made.opened.append(connection)
        made.packets += 1
        made.last = time.monotonic()


def _opened_by(frame: bytes) -> Connection | None:
    """The connection whose first packet a frame is; Linux's own SYNs have no IPv6 extension headers."""
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    if ethertype == _ETH_P_IP and frame[23] == socket.IPPROTO_TCP:
        addresses, tcp = (frame[26:30], frame[30:34]), 14 + 4 * (frame[14] & 0x0F)
    elif ethertype == _ETH_P_IPV6 and frame[20] == socket.IPPROTO_TCP:
        addresses, tcp = (frame[22:38], frame[38:54]), 54
    else:
        return None
    if frame[tcp + 13] & (_SYN | _ACK) != _SYN:
        return None
    ports = struct.unpack_from("!HH", frame, tcp)
    client, server = (
        endpoint(str(ipaddress.ip_address(address)), port)
        for address, port in zip(addresses, ports, strict=True)
    )
    return Connection(client, server)


def endpoint(address: str, port: int) -> str:
    """address:port, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
