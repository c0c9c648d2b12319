"""What is around a Node: a host that its pods call and that calls them, and a look at the packets between."""

import contextlib
import ipaddress
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from containers import SUBNET
from namespaces import namespace, serving
from nodes import Node

from tidegate.kernel import links, netns

ADDRESS, NODE_ADDRESS = "10.80.0.1", "10.80.0.2"
PORT = 8080
"""Where the host of the world serves."""

# linux/if_ether.h
_ETH_P_ALL = 3
_ETH_P_IP = 0x0800
_TCP = 6
_SYN, _ACK = 0x02, 0x10
_PODS = ipaddress.ip_network(SUBNET)


@dataclass(frozen=True)
class World:
    """A host with a route to the pods of a node, which serves on PORT."""

    netns: str


@contextlib.contextmanager
def world(node: Node) -> Iterator[World]:
    """Joined to the node by a cable of its own."""
    with namespace() as host:
        links.create_veth(host, "eth0", node.netns, "world0")
        for path, interface, address in (
            (host, "eth0", ADDRESS),
            (node.netns, "world0", NODE_ADDRESS),
        ):
            links.set_up(path, interface)
            links.add_address(path, interface, f"{address}/24")
        links.add_route(host, SUBNET, gateway=NODE_ADDRESS)
        with serving(host, "world", [PORT]):
            yield World(host)


class Wire:
    """Counts, while it is open, the connections that are begun over an interface of a node."""

    def __init__(self, node: Node, interface: str = "world0") -> None:
        self._syns: Counter[tuple[str, str, int]] = Counter()
        self._socket = netns.run_in(node.netns, _listen, interface)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Wire":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.close()
        self._thread.join()
        self._socket.close()
        self._woken.close()

    def begun_by_pods(self) -> list[tuple[str, str, int]]:
        """Source, destination and port of each connection that a pod began and whose first packet came by here."""
        return [key for key in self._syns if ipaddress.ip_address(key[0]) in _PODS]

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            is_open = True
            while is_open:
                ready = {key.fileobj for key, _ in selector.select()}
                # What had come before the end is still read.
                is_open = self._woken not in ready
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._note(self._socket.recv(128))

    def _note(self, frame: bytes) -> None:
        if len(frame) < 54 or struct.unpack_from("!H", frame, 12)[0] != _ETH_P_IP:
            return
        transport = 14 + (frame[14] & 0xF) * 4
        if frame[23] != _TCP or frame[transport + 13] & (_SYN | _ACK) != _SYN:
            return
        source, destination = (str(ipaddress.IPv4Address(frame[at : at + 4])) for at in (26, 30))
        self._syns[source, destination, struct.unpack_from("!H", frame, transport + 2)[0]] += 1


def _listen(interface: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    raw.setblocking(False)
    raw.bind((interface, 0))
    return raw
