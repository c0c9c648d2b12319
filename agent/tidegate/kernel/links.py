"""Interfaces, addresses and routes of network namespaces, over rtnetlink.

Each function names the namespace that it works in and enters it for one short netlink conversation.
A veth pair is made where its ends belong: no third namespace ever sees it. Addresses are canonical
text. What is read is read by hand (netlink.py), what is changed is changed by pyroute2 (rtnetlink.py).
"""

import errno
import ipaddress
import struct
from collections.abc import Iterable
from socket import AF_INET, AF_INET6, AF_UNSPEC
from typing import Any, NamedTuple

from tidegate.kernel import netns, rtnetlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    NETLINK_ROUTE,
    Netlink,
    attribute,
    attributes_in,
    text_of,
    undisturbed,
)

# linux/rtnetlink.h
_RTM_GETLINK, _RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNSID = 18, 22, 26, 90
_RT_SCOPE_UNIVERSE = 0
_RTN_UNICAST = 1
_RTGENMSG = struct.Struct("=Bxxx")
"""struct rtgenmsg: family"""
_IFINFOMSG = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change"""
_RTMSG = struct.Struct("=BBxxxxxBI")
"""struct rtmsg: family, dst_len, type, flags"""

# linux/if_link.h, linux/net_namespace.h
_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_LINK_NETNSID = 3, 5, 18, 37
_IFLA_INFO_KIND = 1
_NETNSA_NSID, _NETNSA_FD = 1, 3
_NAME_BYTES = 15
"""IFNAMSIZ of linux/if.h, without the closing 0."""

# linux/if_addr.h
_IFADDRMSG = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefixlen, flags, scope, index"""
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD = 0x02
_IFA_F_DADFAILED = 0x08

_IP_VERSIONS = {int(AF_INET): 4, int(AF_INET6): 6}

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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


class _Link(NamedTuple):
    ifindex: int
    attributes: dict[int, bytes]


def _link(netlink: Netlink, interface: str) -> _Link | None:
    name = interface.encode(errors="surrogateescape")
    if len(name) > _NAME_BYTES:
        return None
    try:
        asked = _IFINFOMSG.pack(AF_UNSPEC, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name + b"\0")
        answer = netlink.ask(_RTM_GETLINK, asked)
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    _, _, ifindex, _, _ = _IFINFOMSG.unpack_from(answer)
    return _Link(ifindex, dict(attributes_in(answer[_IFINFOMSG.size :])))


def _peer_index(interface: str, caller_netns: int) -> int | None:
    with Netlink(NETLINK_ROUTE, f"read interface {interface}") as netlink:
        link = _link(netlink, interface)
        if link is None or _kind(link) != "veth" or _IFLA_LINK_NETNSID not in link.attributes:
            return None
        caller = attribute(_NETNSA_FD, struct.pack("=I", caller_netns))
        answer = netlink.ask(_RTM_GETNSID, _RTGENMSG.pack(AF_UNSPEC) + caller)
    namespace = dict(attributes_in(answer[_RTGENMSG.size :]))[_NETNSA_NSID]
    if link.attributes[_IFLA_LINK_NETNSID] != namespace:
        return None
    (index,) = struct.unpack("=I", link.attributes[_IFLA_LINK])
    return int(index)


def _kind(link: _Link) -> str:
    information = dict(attributes_in(link.attributes.get(_IFLA_LINKINFO, b"")))
    return text_of(information.get(_IFLA_INFO_KIND, b""))


def _addresses(interface: str) -> tuple[str, ...]:
    what = f"read the addresses of {interface}"
    with Netlink(NETLINK_ROUTE, what) as netlink:
        link = _link(netlink, interface)
    if link is None:
        return ()
    found = undisturbed(_global_addresses, what)
    return _ordered(address for index, address in found if index == link.ifindex)


def _reach() -> Reach:
    what = "read the addresses and routes of the namespace"
    found = undisturbed(_global_addresses, what)
    routed = tuple(
        version
        for family, version in _IP_VERSIONS.items()
        if undisturbed(_has_default_route, what, family)
    )
    return Reach(_ordered(address for _, address in found), routed)


def _global_addresses(what: str) -> list[tuple[int, _Address]]:
    """Interfaces by index and their addresses, of the whole namespace."""
    found = []
    with Netlink(NETLINK_ROUTE, what) as netlink:
        for body in netlink.dump(_RTM_GETADDR, _IFADDRMSG.pack(AF_UNSPEC, 0, 0, 0, 0)):
            family, _, flags, scope, index = _IFADDRMSG.unpack_from(body)
            attributes = dict(attributes_in(body[_IFADDRMSG.size :]))
            if _IFA_FLAGS in attributes:
                (flags,) = struct.unpack("=I", attributes[_IFA_FLAGS])
            usable = scope == _RT_SCOPE_UNIVERSE and not flags & _IFA_F_DADFAILED
            if family in _IP_VERSIONS and usable:
                # Where there is a peer, IFA_ADDRESS is the peer's.
                packed = attributes.get(_IFA_LOCAL) or attributes[_IFA_ADDRESS]
                found.append((index, ipaddress.ip_address(packed)))
    return found


def _has_default_route(what: str, family: int) -> bool:
    """The listing ends where it is found: a router's tables are long."""
    with Netlink(NETLINK_ROUTE, what) as netlink:
        for body in netlink.dump(_RTM_GETROUTE, _RTMSG.pack(family, 0, 0, 0)):
            answered, length, kind, _ = _RTMSG.unpack_from(body)
            if (answered, length, kind) == (family, 0, _RTN_UNICAST):
                return True
    return False


def _ordered(found: Iterable[_Address]) -> tuple[str, ...]:
    ordered = sorted(set(found), key=lambda address: (address.version, int(address)))
    return tuple(str(address) for address in ordered)


def _index(socket: Any, interface: str) -> int:
    found = socket.link_lookup(ifname=interface)
    if not found:
        raise KernelError(f"there is no interface {interface}", errno.ENODEV)
    return int(found[0])


def _create_veth(name: str, peer_name: str, peer_netns: int) -> None:
    with rtnetlink.opened(f"make the veth pair {name} and {peer_name}") as socket:
        peer = {"ifname": peer_name, "net_ns_fd": peer_netns}
        socket.link("add", ifname=name, kind="veth", peer=peer)


def _delete_link(interface: str) -> None:
    try:
        with rtnetlink.opened(f"delete interface {interface}") as socket:
            for index in socket.link_lookup(ifname=interface):
                socket.link("del", index=index)
    except KernelError as error:
        # It went by itself meanwhile, with its other end.
        if error.errno != errno.ENODEV:
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
