"""rtnetlink by pyroute2, in the calling thread's namespace."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tidegate.kernel.errors import KernelError


@contextmanager
def opened(what: str) -> Iterator[Any]:
    """An IPRoute that hears the kernel alone (netlink.connected); pyroute2 does not look at who sends.

    What the kernel refuses within becomes a KernelError, which says by `what` what cannot be done.
    """
    # Takes 10 MB, and an agent, which lives long, only reads (links.py).
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as netlink:
            netlink.asyncore.socket.connect((0, 0))
            yield netlink
    except NetlinkError as error:
        raise KernelError(f"cannot {what}: {os.strerror(error.code)}", error.code) from error
