"""The agents of a mesh among each other, over the network: mTLS by certificates of the mesh, both ends.

Agents of one machine reach each other by their unix sockets; those of several have this. An agent shows a leaf of the
service AGENT_SERVICE, which the intent server gives to whoever may get leaves, and speaks only to who shows the same.
Leaves are renewed like those of sidecars; connections go on by the one they began with.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from typing import cast

from aiohttp import web

from tidegate.addresses import Endpoint
from tidegate.catalog.client import CatalogClient, LeafMaterial, leaf_is_due
from tidegate.errors import TidegateError
from tidegate.identity import spiffe
from tidegate.identity.spiffe import AGENT_SERVICE
from tidegate.node.config import AgentConfig
from tidegate.node.events import first_of
from tidegate.node.intent import IntentSource
from tidegate.node.log import Log
from tidegate.node.problems import Problems

LOOK_S = 1.0
"""How often it is asked whether it has to be renewed, and how soon a failure is tried again."""
HANDSHAKE_S = 5.0
MAX_HANDSHAKES = 64
"""Of connections that have not shown yet that they are an agent's; further ones are closed."""

log = Log("peers")


class Peers:
    """This agent's certificate, the place where others reach it, and how it reaches them."""

    def __init__(
        self,
        config: AgentConfig,
        catalog: CatalogClient,
        intent: IntentSource,
        problems: Problems,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._intent = intent
        self._problems = problems
        self._id = spiffe.service_id(config.trust_domain, AGENT_SERVICE, config.datacenter)
        self._leaf: LeafMaterial | None = None
        self._leaf_from = 0.0
        self._root_id = ""
        """Of the root that the leaf was issued by."""
        self._towards: ssl.SSLContext | None = None
        self._from: ssl.SSLContext | None = None
        """How they are answered."""
        self._handshakes: set[asyncio.Task[None]] = set()

    def towards(self) -> ssl.SSLContext:
        """How agents of other machines are spoken to. TidegateError while this one has no certificate."""
        if self._towards is None:
            why = "" if self._config.peers else ": its configuration has no `peers`"
            raise TidegateError(f"this agent has no certificate for other machines' agents{why}")
        return self._towards

    async def run(self, app: web.Application, stop: asyncio.Event) -> None:
        """Until `stop`: keeps the certificate good, and has others answered by `app` where the configuration says."""
        if not self._config.peers:
            return
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        answering: asyncio.Task[None] | None = None
        try:
            while not stop.is_set():
                with self._problems.defects_told("peers", "", "what other machines' agents ask"):
                    await self._look()
                    if self._from is not None and (answering is None or answering.done()):
                        answering = asyncio.create_task(self._answer(runner))
                await first_of(LOOK_S, stop)
        finally:
            for task in (answering, *self._handshakes):
                if task is not None:
                    task.cancel()
            await runner.cleanup()

    async def _look(self) -> None:
        try:
            # Before the server has answered nobody knows which root issues.
            if self._intent.known and self._is_due():
                await self._renew()
        except (TidegateError, OSError) as error:
            told = f"agents of other machines cannot ask, or be asked: {error}"
            self._problems.tell("certificate for peers", told)
        else:
            self._problems.clear("certificate for peers")

    def _is_due(self) -> bool:
        leaf = self._leaf
        if leaf is None or self._intent.current().root_id not in ("", self._root_id):
            return True
        return leaf_is_due(time.time(), self._leaf_from, leaf.not_after)

    async def _renew(self) -> None:
        root_id = self._intent.current().root_id
        roots = await self._catalog.roots()
        leaf = await self._catalog.leaf(AGENT_SERVICE, self._config.leaf_lifetime)
        self._towards = self._context(ssl.PROTOCOL_TLS_CLIENT, leaf, roots)
        self._from = self._context(ssl.PROTOCOL_TLS_SERVER, leaf, roots)
        self._leaf, self._leaf_from, self._root_id = leaf, time.time(), root_id
        log.info("certificate for other machines' agents", serial=leaf.serial)

    async def _answer(self, runner: web.AppRunner) -> None:
        """Takes connections, each by the certificate of its moment, until the socket fails."""
        place = Endpoint.of(self._config.peers)
        family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
        loop = asyncio.get_running_loop()
        try:
            with socket.create_server((place.address, place.port), family=family) as listener:
                listener.setblocking(False)
                self._problems.clear("listener for peers")
                while True:
                    connection, _ = await loop.sock_accept(listener)
                    if len(self._handshakes) >= MAX_HANDSHAKES:
                        connection.close()
                        continue
                    task = asyncio.create_task(self._take(runner, connection))
                    self._handshakes.add(task)
                    task.add_done_callback(self._handshakes.discard)
        except OSError as error:
            told = f"other machines' agents are not answered at {place}: {os.strerror(error.errno or 0)}"
            self._problems.tell("listener for peers", told)

    async def _take(self, runner: web.AppRunner, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                cast("web.Server", runner.server),
                connection,
                ssl=self._from,
                ssl_handshake_timeout=HANDSHAKE_S,
            )
        except OSError:
            # Who is no agent, or gave up, has been told so by TLS; the socket is closed with it.
            connection.close()

    def _context(self, side: ssl._SSLMethod, leaf: LeafMaterial, roots_pem: str) -> ssl.SSLContext:
        """For connections to which the other end has to be an agent of this mesh."""
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Names in the mesh are SPIFFE URIs, which are looked at when the handshake is over.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=roots_pem)
        context.sslobject_class = _towards_an_agent(self._id)
        with _in_memory(leaf.certificate_pem + leaf.key_pem) as path:
            context.load_cert_chain(path)
        return context


def _towards_an_agent(spiffe_id: str) -> type[ssl.SSLObject]:
    """Connections whose handshake fails unless the other end's certificate has this URI."""

    class TowardsAnAgent(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            shown = (self.getpeercert() or {}).get("subjectAltName", ())
            if ("URI", spiffe_id) not in shown:
                raise ssl.SSLCertVerificationError("the other end is no agent of this mesh")

    return TowardsAnAgent


@contextlib.contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """The path of a file that has no name and no disk: OpenSSL loads keys from files only."""
    descriptor = os.memfd_create("certificate")
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(text.encode())
        yield f"/proc/self/fd/{descriptor}"
