"""What systemd is told of a service (sd_notify(3)): datagrams to the socket that NOTIFY_SOCKET names.

Without that variable nobody listens, and nothing happens. That a message cannot be sent is logged, once for each
reason, and never stops what the message is about.
"""

import os
import socket
import time
from pathlib import Path

from tidegate.node.log import Log

SENT_WITHIN_S = 1.0
"""How long a message may wait for room in the receiver's queue."""
FED_PER_INTERVAL = 4
"""How often the watchdog is fed at most in the time in which it has to be fed once."""

log = Log("notify")
_told: set[str] = set()
_fed_at = float("-inf")


def ready() -> None:
    """The service does its work: after its start, and after a reload."""
    _send("READY=1")


def reloading() -> None:
    """It reads its configuration anew; `ready` ends that."""
    _send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """It has begun to end."""
    _send("STOPPING=1")


def status(text: str) -> None:
    """One line for people, as `systemctl status` shows it."""
    _send(f"STATUS={' '.join(text.split())}")


def watchdog() -> None:
    """It is alive. To be called whenever a piece of work is done, however often that is."""
    global _fed_at
    interval = watchdog_interval()
    now = time.monotonic()
    if interval is not None and now - _fed_at >= interval / FED_PER_INTERVAL:
        _fed_at = now
        _send("WATCHDOG=1")


def watchdog_interval() -> float | None:
    """Within how many seconds `watchdog` has to be called for the service not to be killed; None for no such limit."""
    pid, text = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if pid not in ("", str(os.getpid())) or not text.isdecimal() or not int(text):
        return None
    return int(text) / 1_000_000


def _send(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SENT_WITHIN_S)
            sender.sendto("\n".join(lines).encode(), _place(address))
    except (OSError, ValueError) as error:
        reason = f"{address}: {error}"
        if reason not in _told:
            _told.add(reason)
            log.warning("systemd cannot be told how the service is doing", reason=reason)


def _place(address: str) -> str:
    """The path of a socket, or its abstract name, which begins with a NUL and is written with an @ (unix(7))."""
    if address.startswith("@"):
        return f"\0{address[1:]}"
    if not Path(address).is_absolute():
        raise ValueError("is neither a path nor an abstract name")
    return address
