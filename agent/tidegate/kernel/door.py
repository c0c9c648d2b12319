"""The network of a namespace, built up: links between namespaces, addresses, routes.

What is built is left alone where it is there already. Knows nothing of what a namespace is for.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError

# linux/if_addr.h, linux/rtnetlink.h
_IFA_F_NODAD = 0x02
_RTNH_F_ONLINK = 4


def _rtnetlink() -> int:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE).detach()


class Door:
    """One network namespace, changed through one netlink socket. Every change may be repeated.

    FileNotFoundError when there is none at the path; KernelError and pyroute2's NetlinkError for what is refused.
    """

    def __init__(self, netns_path: str) -> None:
        self._path = netns_path
        # Given a path, pyroute2 would open the socket in a child, and give up when that takes longer than 2 seconds.
        try:
            descriptor = netns.run_in(netns_path, _rtnetlink)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                raise FileNotFoundError(error.errno, str(error), netns_path) from error
            raise
        self._netlink = IPRoute(fileno=descriptor)
        self._indexes: dict[str, int] = {}

    def __enter__(self) -> "Door":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._netlink.close()

    def sysctls(self, values: dict[str, str]) -> None:
        def write() -> None:
            for name, value in values.items():
                Path("/proc/sys/net", name).write_text(value)

        netns.run_in(self._path, write)

    def up(self, name: str) -> None:
        self._netlink.link("set", index=self._index(name), state="up")

    def addresses(
        self, name: str, addresses: Iterable[str], lengths: tuple[int, int] = (32, 128)
    ) -> None:
        """Give an interface addresses, with the prefix lengths for IPv4 and IPv6."""
        for address in addresses:
            self._netlink.addr(
                "replace",
                index=self._index(name),
                address=address,
                prefixlen=lengths[0] if "." in address else lengths[1],
                flags=_IFA_F_NODAD if ":" in address else 0,
            )

    def route(
        self, to: str, name: str, *, via: str = "", source: str = "", onlink: bool = False
    ) -> None:
        """Route a network, an address or "default" (in the family of `via`) over an interface.

        `onlink` for a gateway that no address of the interface leads to.
        """
        options: dict[str, Any] = {"dst": to, "oif": self._index(name)}
        family = via or to
        options["family"] = 10 if ":" in family else 2
        if via:
            options |= {"gateway": via}
            if onlink:
                options |= {"flags": _RTNH_F_ONLINK}
        if source:
            options |= {"prefsrc": source}
        self._netlink.route("replace", **options)

    def ensure_veth(self, name: str, peer: "Door", peer_name: str) -> None:
        """Join two namespaces with a veth pair that is up; a pair that already does stays."""
        mine, other = self._link(name), peer._link(peer_name)
        joined = (
            mine is not None
            and other is not None
            and mine.get_attr("IFLA_LINK") == other["index"]
            and other.get_attr("IFLA_LINK") == mine["index"]
        )
        if not joined:
            self.delete_link(name)
            peer.delete_link(peer_name)
            descriptor = os.open(peer._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._netlink.link(
                    "add",
                    ifname=name,
                    kind="veth",
                    peer={"ifname": peer_name, "net_ns_fd": descriptor},
                )
            finally:
                os.close(descriptor)
        self.up(name)
        peer.up(peer_name)

    def delete_link(self, name: str) -> None:
        """Delete an interface and its peer, if it is there."""
        self._indexes.pop(name, None)
        link = self._link(name)
        if link is None:
            return
        try:
            self._netlink.link("del", index=link["index"])
        except NetlinkError as error:
            # It goes with its peer, whose namespace the kernel tears down in its own time.
            if error.code != errno.ENODEV:
                raise

    def global_addresses(self, name: str) -> set[str]:
        """Addresses of an interface that are not link-local; none when it is not there."""
        link = self._link(name)
        if link is None:
            return set()
        found = (
            entry.get_attr("IFA_ADDRESS") for entry in self._netlink.get_addr(index=link["index"])
        )
        return {text for text in found if not ipaddress.ip_address(text).is_link_local}

    def _index(self, name: str) -> int:
        if name not in self._indexes:
            link = self._link(name)
            if link is None:
                raise KernelError(f"no interface {name} in {self._path}", errno.ENODEV)
            self._indexes[name] = link["index"]
        return self._indexes[name]

    def _link(self, name: str) -> Any:
        """The interface as netlink shows it, None when there is none."""
        try:
            return next(iter(self._netlink.link("get", ifname=name)), None)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise
