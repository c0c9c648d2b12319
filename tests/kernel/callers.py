"""Clients that open one connection after the other, and keep book of where each landed."""

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from namespaces import DEADLINE_S, Pair

from tidegate.kernel import netns

_MOST = 200_000
"""A caller that nobody stops ends by itself after so many connections."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that closes with a reset, so that no port is kept waiting."""


class Caller:
    """One client thread in a namespace."""

    def __init__(self, netns_path: str, address: str, port: int) -> None:
        self.landed: Counter[tuple[str, int]] = Counter()
        """How many connections each (server, port) accepted."""
        self.failures: list[str] = []
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=netns.run_in, args=(netns_path, self._call, address, port)
        )
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def wait_for(self, more: int) -> None:
        """Return when `more` connections have been begun and have landed from now on."""
        with self._changed:
            goal = self.landed.total() + len(self.failures) + more + 1
            reached = self._changed.wait_for(
                lambda: self.landed.total() + len(self.failures) >= goal, DEADLINE_S
            )
        assert reached, "no more connections"

    def _call(self, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for _ in range(_MOST):
            if self._stopped.is_set():
                return
            try:
                place, failure = _landing(family, address, port), ""
            except OSError as error:
                place, failure = None, repr(error)
            with self._changed:
                if place:
                    self.landed[place] += 1
                else:
                    self.failures.append(failure)
                self._changed.notify_all()


@contextmanager
def calling_both_ways(pair: Pair, port: int) -> Iterator[dict[str, Caller]]:
    """Callers of both families out of the pod and into it, by name."""
    with ExitStack() as stack:
        callers = {}
        for version in (4, 6):
            for name, caller_netns, address in (
                (f"outbound-{version}", pair.pod, pair.peer_address(version)),
                (f"inbound-{version}", pair.peer, pair.pod_address(version)),
            ):
                callers[name] = caller = Caller(caller_netns, address, port)
                stack.callback(caller.stop)
        yield callers


def _landing(family: socket.AddressFamily, address: str, port: int) -> tuple[str, int]:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.connect((address, port))
        greeting = b""
        while not greeting.endswith(b"\n"):
            received = connection.recv(256)
            if not received:
                raise ConnectionResetError("closed before the greeting")
            greeting += received
    with contextlib.suppress(ValueError):
        server, accepted_by, *_ = greeting.decode().split()
        return server, int(accepted_by)
    raise ConnectionResetError(f"a greeting of {greeting!r}")
