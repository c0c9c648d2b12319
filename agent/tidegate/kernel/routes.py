"""Which way a network namespace sends packets, asked over rtnetlink: its own decision, not a guess from its tables."""

import errno

from tidegate.kernel import netns, rtnetlink
from tidegate.kernel.errors import KernelError

_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES)
"""What RTM_GETROUTE answers for no route and for routes of type unreachable, blackhole and prohibit."""


def outgoing_interface(netns_path: str, destination: str) -> str | None:
    """Name of the interface that packets to an address leave by; lo for the namespace's own addresses.

    None when nothing leads there. KernelError when the namespace is gone.
    """
    return netns.run_in(netns_path, _outgoing_interface, destination)


def _outgoing_interface(destination: str) -> str | None:
    try:
        with rtnetlink.opened(f"find the route to {destination}") as netlink:
            (route,) = netlink.route("get", dst=destination)
            (link,) = netlink.get_links(route.get("RTA_OIF"))
            return str(link.get("IFLA_IFNAME"))
    except KernelError as error:
        if error.errno in _UNREACHABLE:
            return None
        raise
