"""What connection tracking says of traced connections: where a connect really went, what an accept's client dialled.

Asks in the network namespace of the connection, soon after it was told, and so much at a time; what could not be asked
stays unknown.
"""

import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tidegate.kernel import conntrack, netns
from tidegate.kernel.conntrack import Original
from tidegate.kernel.errors import KernelError
from tidegate.observe.trace.records import Connection, End, Endpoint, Tracked

ASKING_S = 0.2
"""How long one round asks in one network namespace."""


class Translations:
    """Asks connection tracking of network namespaces."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        """`paths` of network namespaces by inode number; others are found by their names or their processes."""
        self._paths = dict(paths)
        self.refused: dict[int, str] = {}
        """Why a network namespace could not be asked, by its number."""

    def of(self, connections: Iterable[Connection]) -> list[tuple[Connection, Endpoint | Tracked]]:
        """Each connection with what is tracked of it, in the same order."""
        asked = list(connections)
        answers: dict[int, Endpoint | Tracked] = {}
        for number in dict.fromkeys(one.netns for one in asked):
            own = {index: one for index, one in enumerate(asked) if one.netns == number}
            path = self._path(number, own.values())
            if path is None:
                continue
            try:
                answers |= netns.run_in(path, _ask, own)
            except KernelError as error:
                self.refused[number] = str(error)
        return [(one, answers.get(index, Tracked.NOT_ASKED)) for index, one in enumerate(asked)]

    def _path(self, number: int, connections: Iterable[Connection]) -> str | None:
        """A path of the namespace with a number; None when it is gone, or nobody is known to be in it."""
        path = self._paths.get(number)
        if path is None or not _is(path, number):
            named = (netns.path(name) for name in netns.names())
            of_processes = (f"/proc/{one.process.pid}/ns/net" for one in connections)
            path = next((one for one in (*named, *of_processes) if _is(one, number)), None)
            if path is not None:
                self._paths[number] = path
        return path

    def name(self, number: int) -> str:
        """What a person calls a network namespace: its name if it has one."""
        path = self._paths.get(number, "")
        if Path(path).parent == netns.DIRECTORY:
            return Path(path).name
        return f"net:[{number}]"


def _is(path: str, number: int) -> bool:
    try:
        return netns.identity(path).inode == number
    except KernelError:
        return False


def _ask(connections: Mapping[int, Connection]) -> dict[int, Endpoint | Tracked]:
    """Answers for as many as there is time for. To be called inside the namespace."""
    deadline = time.monotonic() + ASKING_S
    answers: dict[int, Endpoint | Tracked] = {}
    for index, connection in connections.items():
        if time.monotonic() >= deadline:
            break
        answers[index] = _tracked(connection)
    return answers


def _tracked(connection: Connection) -> Endpoint | Tracked:
    if not connection.local.port:
        return Tracked.NOT
    match connection.end:
        case End.CONNECT:
            found = conntrack.destination_of(_original(connection.local, connection.peer))
            return Tracked.NOT if found is None else Endpoint(found.address, found.port)
        case End.ACCEPT:
            server = conntrack.Endpoint(connection.local.address, connection.local.port)
            client = conntrack.Endpoint(connection.peer.address, connection.peer.port)
            dialled = conntrack.original_of(socket.IPPROTO_TCP, server, client)
            if dialled is None:
                return Tracked.NOT
            return Endpoint(dialled.destination, dialled.destination_port)


def _original(client: Endpoint, server: Endpoint) -> Original:
    return Original(
        protocol=socket.IPPROTO_TCP,
        source=client.address,
        source_port=client.port,
        destination=server.address,
        destination_port=server.port,
    )
