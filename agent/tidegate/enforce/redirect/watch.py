"""Wakes whoever keeps redirection right when somebody changes nftables in one of many namespaces.

One socket per namespace, which the kernel tells of every change there, and one epoll object over all of them. Which
table was changed and by whom is not looked at: the receiver compares. Legacy tables tell nobody of their changes.

A namespace that was told of rests for a moment, so that one that changes all the time cannot keep the receiver busy.
"""

import errno
import os
import select
import socket
from typing import NamedTuple

from tidegate.kernel import netns, nf_tables, timers
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netns import Identity

REST_S = 0.1
"""At most how long after a change that follows on another one the receiver is woken."""

_AT_ONCE = 1024
"""How many namespaces one call tells of at most; the others wake the receiver again."""
_READS = 1024
"""How many events one call reads from a namespace: more than its socket has room for."""
_READ_BYTES = 16
"""What an event says does not matter: it may be cut off."""


class _Watched(NamedTuple):
    identity: Identity
    monitor: socket.socket


class Watcher:
    """The namespaces that are watched, by path.

    Not for several threads at a time. A watched namespace cannot die: one whose path is gone or names another one
    has to be forgotten, or watched again, see `stale`.
    """

    def __init__(self) -> None:
        self._timer = timers.open_timer()
        self._epoll = select.epoll()
        self._epoll.register(self._timer, select.EPOLLIN)
        self._watched: dict[str, _Watched] = {}
        self._paths: dict[int, str] = {}
        self._resting: set[int] = set()

    def fileno(self) -> int:
        """A descriptor that is readable when `changed` should be called; for select or asyncio's add_reader."""
        return self._epoll.fileno()

    def watch(self, netns_path: str) -> None:
        """Watch the namespace at a path from now on; nothing changes when it is watched already.

        KernelError when there is none, or when its changes cannot be listened to; it is not watched then.
        """
        watched = self._watched.get(netns_path)
        if watched is not None and _identity(netns_path) == watched.identity:
            return
        self.forget(netns_path)
        watched = netns.run_in(netns_path, _listen)
        descriptor = watched.monitor.fileno()
        self._epoll.register(descriptor, select.EPOLLIN)
        self._watched[netns_path] = watched
        self._paths[descriptor] = netns_path

    def forget(self, netns_path: str) -> None:
        """Watch it no longer, and let go of the namespace at once."""
        watched = self._watched.pop(netns_path, None)
        if watched is not None:
            descriptor = watched.monitor.fileno()
            del self._paths[descriptor]
            if descriptor in self._resting:
                self._resting.remove(descriptor)
            else:
                self._epoll.unregister(descriptor)
            watched.monitor.close()

    def changed(self) -> tuple[str, ...]:
        """The paths of the namespaces that have changed since they were told last, sorted. Never waits."""
        if timers.take(self._timer):
            for descriptor in self._resting:
                self._epoll.register(descriptor, select.EPOLLIN)
            self._resting.clear()
        ready = [number for number, _ in self._epoll.poll(0, _AT_ONCE) if number in self._paths]
        for descriptor in ready:
            _drain(self._watched[self._paths[descriptor]].monitor)
            # Without any event in its mask it would still wake for an error, which lost events are.
            self._epoll.unregister(descriptor)
        if ready and not self._resting:
            timers.start(self._timer, REST_S)
        self._resting.update(ready)
        return tuple(sorted(self._paths[descriptor] for descriptor in ready))

    def stale(self) -> tuple[str, ...]:
        """Watched paths that are gone or name another namespace by now, sorted. One stat(2) for each."""
        return tuple(
            sorted(
                path
                for path, watched in self._watched.items()
                if _identity(path) != watched.identity
            )
        )

    def close(self) -> None:
        """Forget all of them. `fileno` is no descriptor any more."""
        for path in tuple(self._watched):
            self.forget(path)
        self._epoll.close()
        os.close(self._timer)


def _listen() -> _Watched:
    return _Watched(netns.identity(netns.CURRENT), nf_tables.open_monitor())


def _identity(netns_path: str) -> Identity | None:
    try:
        return netns.identity(netns_path)
    except KernelError:
        return None


def _drain(monitor: socket.socket) -> None:
    for _ in range(_READS):
        try:
            monitor.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
