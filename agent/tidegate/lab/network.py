"""The lab's network: a namespace per pod and node, and an outside that joins the nodes.

        pod eth0 ---- tgp<n> node fab0 ---- tgn<n> outside tgn<m> ---- fab0 node ...

Everything is routed, nothing is bridged, and both address families work at once (no duplicate
address detection). Addresses follow from the lab's name and the numbers in the Layout. veth pairs
are made inside the namespaces: the machine's own network is never touched. Knows no processes.
"""

import contextlib
import errno
import hashlib
import ipaddress
import os
from collections.abc import Iterable

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from tidegate.kernel import netns
from tidegate.kernel.door import Door
from tidegate.kernel.errors import KernelError
from tidegate.lab.spec import OUTSIDE, LabSpec

POD_INTERFACE = "eth0"
FABRIC_INTERFACE = "fab0"

_GATEWAY4 = "169.254.1.1"
_GATEWAY6 = "fe80::1"

_ROUTER_SYSCTLS = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
}
_SYSCTLS = {
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
    "ipv6/conf/all/disable_ipv6": "0",
    "ipv6/conf/default/disable_ipv6": "0",
    "ipv6/conf/all/accept_dad": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/all/accept_ra": "0",
    "ipv6/conf/default/accept_ra": "0",
}


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Which number each node and pod has. Numbers start at 1 and stay while their owner stays."""

    lab: str
    nodes: dict[str, int] = {}
    pods: dict[str, int] = {}
    places: dict[str, str] = {}
    """Node of each pod."""

    def node_addresses(self, node: str) -> tuple[str, ...]:
        """The addresses of the node itself, IPv4 then IPv6."""
        number = self.nodes[node]
        return f"{self._prefix4}.0.{number}", self._ipv6(0, number)

    def fabric_addresses(self, node: str) -> tuple[str, ...]:
        """The node's addresses on its link to the outside."""
        number = self.nodes[node]
        return f"{self._prefix4}.255.{4 * number + 2}", self._ipv6(0xF00 + number, 2)

    def gateway_addresses(self, node: str) -> tuple[str, ...]:
        """The outside's addresses on the link to a node."""
        number = self.nodes[node]
        return f"{self._prefix4}.255.{4 * number + 1}", self._ipv6(0xF00 + number, 1)

    def outside_addresses(self) -> tuple[str, ...]:
        return f"{self._prefix4}.0.254", self._ipv6(0, 254)

    def pod_addresses(self, pod: str) -> tuple[str, ...]:
        """The addresses of a pod, IPv4 then IPv6."""
        node, number = self.nodes[self.places[pod]], self.pods[pod]
        return f"{self._prefix4}.{node}.{number}", self._ipv6(node, number)

    def pod_networks(self, node: str) -> tuple[str, ...]:
        """The networks that all pods of a node are in."""
        number = self.nodes[node]
        return f"{self._prefix4}.{number}.0/24", f"{self._ipv6(number, 0)}/64"

    @property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.lab.encode()).digest()

    @property
    def _prefix4(self) -> str:
        return f"10.{self._digest[0]}"

    def _ipv6(self, subnet: int, host: int) -> str:
        """An address in the lab's unique local /48 (RFC 4193)."""
        number = (0xFD << 120) | (int.from_bytes(self._digest[:5], "big") << 80)
        return str(ipaddress.IPv6Address(number | (subnet << 64) | host))


def plan(spec: LabSpec, previous: Layout | None) -> Layout:
    """Number the nodes and pods of a lab; what `previous` has keeps its number."""
    before = previous or Layout(lab=spec.name)
    return Layout(
        lab=spec.name,
        nodes=_numbered(spec.nodes, before.nodes),
        pods=_numbered((pod.name for pod in spec.pods), before.pods),
        places={pod.name: pod.node for pod in spec.pods},
    )


def namespace(lab: str, name: str) -> str:
    """Name of the network namespace of a node, a pod or the outside."""
    return f"tg-{lab}-{name}"


def namespaces(lab: str) -> tuple[str, ...]:
    """Names of all network namespaces of a lab that exist right now."""
    return tuple(name for name in netns.names() if name.startswith(f"tg-{lab}-"))


def stale(layout: Layout) -> tuple[str, ...]:
    """Namespaces of the lab that no node or pod of the layout has, or has at these addresses."""
    wanted = {namespace(layout.lab, name) for name in (OUTSIDE, *layout.nodes, *layout.pods)}
    moved = (namespace(layout.lab, pod) for pod in layout.pods if _has_moved(layout, pod))
    return tuple(sorted({name for name in namespaces(layout.lab) if name not in wanted} | {*moved}))


def missing(layout: Layout) -> tuple[str, ...]:
    """Nodes and pods of the layout that have no namespace yet."""
    return tuple(
        name
        for name in (*layout.nodes, *layout.pods)
        if not _is_namespace(namespace(layout.lab, name))
    )


def ensure(layout: Layout) -> None:
    """Make the network be as the layout says; what is there and right stays as it is.

    KernelError when the kernel refuses something.
    """
    for name in (OUTSIDE, *layout.nodes, *layout.pods):
        _ensure_namespace(namespace(layout.lab, name))
    try:
        with Door(netns.path(namespace(layout.lab, OUTSIDE))) as outside:
            _ensure_outside(layout, outside)
            for node in layout.nodes:
                _ensure_node(layout, node, outside)
    except NetlinkError as error:
        message = f"cannot build the network of lab {layout.lab}: {error}"
        raise KernelError(message, error.code) from error


def delete(name: str) -> None:
    """Delete one namespace of a lab with its link. Its processes must be gone already."""
    if _is_namespace(name):
        # Somebody else may take it away at this moment.
        with contextlib.suppress(FileNotFoundError), Door(netns.path(name)) as door:
            door.delete_link(POD_INTERFACE)
            door.delete_link(FABRIC_INTERFACE)
    netns.delete(name)


def _numbered(names: Iterable[str], before: dict[str, int]) -> dict[str, int]:
    wanted = tuple(names)
    kept = {name: before[name] for name in wanted if name in before}
    free = (
        number for number in range(1, len(wanted) + len(kept) + 1) if number not in kept.values()
    )
    return {name: kept[name] if name in kept else next(free) for name in wanted}


def _has_moved(layout: Layout, pod: str) -> bool:
    name = namespace(layout.lab, pod)
    if not _is_namespace(name):
        return False
    with Door(netns.path(name)) as door:
        found = door.global_addresses(POD_INTERFACE)
    return bool(found) and found != {*layout.pod_addresses(pod)}


def _ensure_namespace(name: str) -> None:
    if not _is_namespace(name):
        netns.delete(name)
        netns.create(name)


def _is_namespace(name: str) -> bool:
    """Whether the name leads to a namespace: a crash may leave a name that leads nowhere."""
    try:
        netns.run_in(netns.path(name), os.getpid)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            return False
        raise
    return True


def _ensure_outside(layout: Layout, outside: Door) -> None:
    outside.sysctls(_SYSCTLS | _ROUTER_SYSCTLS)
    outside.up("lo")
    outside.addresses("lo", layout.outside_addresses())


def _ensure_node(layout: Layout, node: str, outside: Door) -> None:
    gateways, addresses = layout.gateway_addresses(node), layout.node_addresses(node)
    fabric = layout.fabric_addresses(node)
    with Door(netns.path(namespace(layout.lab, node))) as door:
        door.sysctls(_SYSCTLS | _ROUTER_SYSCTLS)
        door.up("lo")
        door.addresses("lo", addresses)
        uplink = f"tgn{layout.nodes[node]}"
        door.ensure_veth(FABRIC_INTERFACE, outside, uplink)
        door.addresses(FABRIC_INTERFACE, fabric, lengths=(30, 64))
        outside.addresses(uplink, gateways, lengths=(30, 64))
        for gateway, address in zip(gateways, addresses, strict=True):
            door.route("default", FABRIC_INTERFACE, via=gateway, source=address)
        for networks, via, source in zip(
            zip(layout.pod_networks(node), addresses, strict=True),
            fabric,
            layout.outside_addresses(),
            strict=True,
        ):
            for network in networks:
                outside.route(network, uplink, via=via, source=source)
        for pod, place in layout.places.items():
            if place == node:
                _ensure_pod(layout, pod, door, addresses)


def _ensure_pod(layout: Layout, pod: str, node: Door, node_addresses: tuple[str, ...]) -> None:
    link = f"tgp{layout.pods[pod]}"
    with Door(netns.path(namespace(layout.lab, pod))) as door:
        door.sysctls(_SYSCTLS)
        door.up("lo")
        door.ensure_veth(POD_INTERFACE, node, link)
        node.addresses(link, (_GATEWAY4, _GATEWAY6), lengths=(32, 64))
        door.addresses(POD_INTERFACE, layout.pod_addresses(pod))
        for address, source in zip(layout.pod_addresses(pod), node_addresses, strict=True):
            node.route(address, link, source=source)
        for gateway in (_GATEWAY4, _GATEWAY6):
            door.route("default", POD_INTERFACE, via=gateway, onlink=gateway == _GATEWAY4)
