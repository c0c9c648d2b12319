"""Flips between strict and permissive under load: not one request fails.

A short run by default; `make soak` runs 200 flips under 1,000 requests per second.
"""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, tell
from sidecars import API, DOMAIN, PORT, calling_api, sidecar, until

from tidegate.identity.ca import MeshCA
from tidegate.kernel import netns
from tidegate.model import MutualTLSMode

SOAK = bool(os.environ.get("TIDEGATE_SOAK"))
FLIPS = 200 if SOAK else 20
RATE = 1100 if SOAK else 200
"""Requests per second; a busy machine has some less than it is asked for."""

ANEW = 0.1
"""Share of the requests that come over connections of their own."""

CONNECTIONS = 40
REQUEST = b"hello, application\n"


@pytest.fixture
def ca(state: Path) -> MeshCA:
    return MeshCA.create(state / "ca", DOMAIN)


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Load:
    """Requests at a steady pace, over connections that stay open and over new ones, and who answers them.

    Both in one event loop: with a thread for each they would wait for each other's turns.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.outcomes: Counter[str] = Counter()
        """How many requests ended how; all should be `ok`."""
        self._addresses = addresses
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self, of: str, to: str) -> Iterator[None]:
        """Requests come from inside the namespace `of` meanwhile, and are answered inside `to`."""
        listener = netns.run_in(
            to,
            lambda: socket.create_server(
                ("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            ),
        )
        thread = threading.Thread(
            target=netns.run_in, args=(of, lambda: asyncio.run(self._run(listener)))
        )
        thread.start()
        try:
            until(lambda: self.outcomes["ok"] > CONNECTIONS, "requests are answered")
            yield
        finally:
            self._stop.set()
            thread.join()

    async def _run(self, listener: socket.socket) -> None:
        server = await asyncio.get_running_loop().create_server(Echo, sock=listener)
        async with server, asyncio.TaskGroup() as tasks:
            for number in range(CONNECTIONS):
                address = self._addresses[number % len(self._addresses)]
                tasks.create_task(self._over_one(address, CONNECTIONS / (RATE * (1 - ANEW))))
            for address in self._addresses:
                pause = len(self._addresses) / (RATE * ANEW)
                tasks.create_task(self._over_new_ones(address, pause))

    async def _over_one(self, address: str, pause: float) -> None:
        reader, writer = await asyncio.open_connection(address, PORT)
        async for _ in self._paced(pause):
            if not await self._request(reader, writer):
                break
        writer.close()

    async def _over_new_ones(self, address: str, pause: float) -> None:
        async for _ in self._paced(pause):
            try:
                reader, writer = await asyncio.open_connection(address, PORT)
            except OSError as error:
                self.outcomes[f"no connection: {error}"] += 1
                continue
            await self._request(reader, writer)
            writer.close()

    async def _paced(self, pause: float):
        at = time.monotonic()
        while not self._stop.is_set():
            yield
            at += pause
            await asyncio.sleep(max(0.0, at - time.monotonic()))

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            writer.write(REQUEST)
            answer = await reader.readexactly(len(REQUEST))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.outcomes[f"no answer: {error!r}"] += 1
            return False
        self.outcomes["ok" if answer == REQUEST else f"a wrong answer: {answer!r}"] += 1
        return True


def test_flips_under_load_lose_no_request_and_reset_no_connection(
    state: Path, ca: MeshCA, pair: Pair, pytestconfig: pytest.Config
) -> None:
    load = Load((pair.pod_ipv4, pair.pod_ipv6))
    modes = (MutualTLSMode.STRICT, MutualTLSMode.PERMISSIVE)
    with (
        sidecar(state, ca, API, pair.pod) as api,
        sidecar(state, ca, calling_api(pair), pair.peer),
    ):
        with load.running(pair.peer, pair.pod):
            began, before = time.monotonic(), load.outcomes.total()
            for flip in range(FLIPS):
                seen = load.outcomes.total()
                api.apply(msgspec.structs.replace(API, mode=modes[flip % 2]))
                until(
                    lambda seen=seen: load.outcomes.total() > seen + RATE // 20,
                    "requests are answered after the flip",
                )
            rate = (load.outcomes.total() - before) / (time.monotonic() - began)
        updates = api.admin.stats(["listener_manager.listener_in_place_updated"])
        stats = api.admin.sidecar_stats()
    assert set(load.outcomes) == {"ok"}, load.outcomes
    assert list(updates.values()) == [FLIPS]
    assert stats.permissive_connections == stats.tls_handshake_failures == 0
    tell(pytestconfig, f"{FLIPS} flips under {rate:.0f} requests per second")
