"""Interfaces, addresses and routes of network namespaces, over rtnetlink.

Each function names the namespace that it works in and enters it for one short netlink conversation.
A veth pair is made where its ends belong: no third namespace ever sees it. Addresses are canonical
text.
"""

import errno
import ipaddress
from socket import AF_INET, AF_INET6
from typing import Any, NamedTuple

from pyroute2 import NetlinkError

from tidegate.kernel import netns, rtnetlink
from tidegate.kernel.errors import KernelError

# linux/rtnetlink.h, linux/if_addr.h
_RT_SCOPE_UNIVERSE = 0
_RTN_UNICAST = 1
_IFA_F_NODAD = 0x02
_IFA_F_DADFAILED = 0x08

_IP_VERSIONS = {int(AF_INET): 4, int(AF_INET6): 6}


def host_ifindex(netns_path: str, interface: str) -> int | None:
    """Interface index, in the caller's namespace, of the other end of a veth in `netns_path`.

    None when there is no such interface, when it is not a veth, or when its other end is in a third
    namespace.
    """
    with netns.opened() as here:
        return netns.run_in(netns_path, _peer_index, interface, here)


def addresses(netns_path: str, interface: str) -> tuple[str, ...]:
    """Global addresses of an interface, IPv4 first; () when there is no such interface."""
    return netns.run_in(netns_path, _addresses, interface)


class Reach(NamedTuple):
    """Which address families a namespace speaks to others."""

    addresses: tuple[str, ...]
    """Global addresses of all its interfaces, IPv4 first."""
    default_routes: tuple[int, ...]
    """IP versions, 4 and 6, that have a default route."""


def reach(netns_path: str) -> Reach:
    """Which address families the namespace speaks to others. KernelError when it is gone."""
    return netns.run_in(netns_path, _reach)


def create_veth(netns_a: str, name_a: str, netns_b: str, name_b: str) -> None:
    """Make a veth pair, one end in each namespace, both down. KernelError if a name is taken."""
    with netns.opened(netns_b) as peer_netns:
        netns.run_in(netns_a, _create_veth, name_a, name_b, peer_netns)


def delete_link(netns_path: str, interface: str) -> None:
    """Take an interface away, if it is there; the other end of a veth goes with it."""
    netns.run_in(netns_path, _delete_link, interface)


def set_up(netns_path: str, interface: str) -> None:
    """Bring an interface up."""
    netns.run_in(netns_path, _set_up, interface)


def add_address(netns_path: str, interface: str, address: str) -> None:
    """Give an interface an address with its prefix, such as 10.1.0.2/24 or fd00::2/64.

    An IPv6 address is usable at once: its uniqueness is not probed (IFA_F_NODAD).
    """
    netns.run_in(netns_path, _add_address, interface, ipaddress.ip_interface(address))


def add_route(
    netns_path: str, destination: str, *, gateway: str | None = None, interface: str | None = None
) -> None:
    """Route a network, such as 10.2.0.0/16 or ::/0, to a gateway, an interface, or both."""
    network = ipaddress.ip_network(destination)
    netns.run_in(netns_path, _add_route, network, gateway, interface)


def _index(socket: Any, interface: str) -> int:
    found = socket.link_lookup(ifname=interface)
    if not found:
        raise KernelError(f"there is no interface {interface}", errno.ENODEV)
    return int(found[0])


def _peer_index(interface: str, caller_netns: int) -> int | None:
    with rtnetlink.opened(f"read interface {interface}") as socket:
        for index in socket.link_lookup(ifname=interface):
            (link,) = socket.get_links(index)
            if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "veth":
                return None
            netnsid = socket.get_netnsid(fd=caller_netns)["nsid"]
            if link.get("IFLA_LINK_NETNSID") == netnsid:
                return int(link.get("IFLA_LINK"))
    return None


def _addresses(interface: str) -> tuple[str, ...]:
    with rtnetlink.opened(f"read the addresses of {interface}") as socket:
        found = {
            ipaddress.ip_address(message.get("IFA_ADDRESS"))
            for index in socket.link_lookup(ifname=interface)
            for message in socket.get_addr(index=index)
            if _is_global(message)
        }
    return tuple(str(address) for address in sorted(found, key=lambda a: (a.version, int(a))))


def _reach() -> Reach:
    with rtnetlink.opened("read the addresses and routes of the namespace") as socket:
        found = {
            ipaddress.ip_address(message.get("IFA_LOCAL") or message.get("IFA_ADDRESS"))
            for message in socket.get_addr()
            if _is_global(message)
        }
        routed = {
            _IP_VERSIONS[message["family"]]
            for message in socket.get_routes()
            if message["family"] in _IP_VERSIONS
            and message["type"] == _RTN_UNICAST
            and message["dst_len"] == 0
        }
    ordered = sorted(found, key=lambda a: (a.version, int(a)))
    return Reach(tuple(str(address) for address in ordered), tuple(sorted(routed)))


def _is_global(address: Any) -> bool:
    usable = not (address.get("IFA_FLAGS") or 0) & _IFA_F_DADFAILED
    return bool(address["scope"] == _RT_SCOPE_UNIVERSE and usable)


def _create_veth(name: str, peer_name: str, peer_netns: int) -> None:
    with rtnetlink.opened(f"make the veth pair {name} and {peer_name}") as socket:
        peer = {"ifname": peer_name, "net_ns_fd": peer_netns}
        socket.link("add", ifname=name, kind="veth", peer=peer)


def _delete_link(interface: str) -> None:
    with rtnetlink.opened(f"delete interface {interface}") as socket:
        for index in socket.link_lookup(ifname=interface):
            try:
                socket.link("del", index=index)
            except NetlinkError as error:
                # It went by itself meanwhile, with its other end.
                if error.code != errno.ENODEV:
                    raise


def _set_up(interface: str) -> None:
    with rtnetlink.opened(f"bring interface {interface} up") as socket:
        socket.link("set", index=_index(socket, interface), state="up")


def _add_address(
    interface: str, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface
) -> None:
    with rtnetlink.opened(f"give {interface} the address {address}") as socket:
        flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
        socket.addr(
            "add",
            index=_index(socket, interface),
            address=str(address.ip),
            prefixlen=address.network.prefixlen,
            **flags,
        )


def _add_route(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
    gateway: str | None,
    interface: str | None,
) -> None:
    with rtnetlink.opened(f"route {network} to {gateway or interface}") as socket:
        via: dict[str, str | int] = {}
        if gateway is not None:
            via["gateway"] = gateway
        if interface is not None:
            via["oif"] = _index(socket, interface)
        socket.route("add", dst=str(network), **via)
