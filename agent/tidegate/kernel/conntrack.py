"""Connection tracking of the current network namespace, over ctnetlink. Knows nothing of what was tracked."""

import os
import socket

from pyroute2 import NetlinkError, NFCTSocket

from tidegate.kernel.errors import KernelError


def flush() -> None:
    """Forget all connections of the namespace that the calling thread is in. KernelError when it is refused.

    Open connections are taken up again with their next packet, without any translation that they had.
    """
    try:
        with NFCTSocket(nfgen_family=socket.AF_UNSPEC) as conntrack:
            conntrack.flush()
    except NetlinkError as error:
        reason = os.strerror(error.code)
        raise KernelError(f"cannot flush connection tracking: {reason}", error.code) from error
