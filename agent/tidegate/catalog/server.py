"""The embedded server: Consul's HTTP API for config entries, the catalog and leaf certificates.

Every path, status and error body is Consul's (facts: Consul agent/http_register.go, api-docs); what Consul
has no words for is under /v1/tidegate/. Knows HTTP; what may be written and what it means is decided in `intent`
and `catalog.store`, who may do it in `catalog.rights`.
"""

import asyncio
import contextlib
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from aiohttp import web

from tidegate import durations
from tidegate.catalog import answers
from tidegate.catalog.listening import bound, held_state, tls_context
from tidegate.catalog.registration import destination_name, info_of
from tidegate.catalog.requests import (
    Tenancy,
    cas_of,
    check_datacenter,
    deregistration_of,
    entry_of,
    kind_of,
    one_tenancy,
    registration_of,
    secret_of,
    tenancy_of,
    waiting_of,
)
from tidegate.catalog.rights import Right, Tokens
from tidegate.catalog.settings import (
    MAX_LEAF_TTL_S,
    MIN_LEAF_TTL_S,
    IntentionPolicy,
    ServerConfig,
    load_tokens,
)
from tidegate.catalog.store import NodeRecord, Record, Store, StoreError, Topic
from tidegate.errors import TidegateError
from tidegate.identity import spiffe
from tidegate.identity.ca import Leaf
from tidegate.intent.entries import EntryKey, Kind, filter_shape, to_consul
from tidegate.intent.fields import is_name
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.shapes import Shape
from tidegate.model import DEFAULT_TENANT, ServiceName

MAX_BODY = 512 << 10
"""Largest request body in bytes, Consul's limit for a config entry."""

SHUTDOWN_S = 2.0
"""How long requests in flight may take when the server is told to stop."""

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CertificateAuthority(Protocol):
    """What the server needs of a mesh CA (identity.ca.MeshCA)."""

    trust_domain: str

    @property
    def roots_pem(self) -> str: ...

    def issue(self, spiffe_uri: str, lifetime_s: float) -> Leaf: ...

    def rotate(self, keep_s: float) -> "CertificateAuthority": ...


class Server(NamedTuple):
    """What an application answers from."""

    store: Store
    ca: CertificateAuthority
    datacenter: str
    default_policy: IntentionPolicy
    leaf_lifetime_s: float
    tokens: Tokens = Tokens()
    address: str = "127.0.0.1:8300"
    """What is told as the address of the leader, which every server of one is."""


def make_app(server: Server) -> web.Application:
    """The application, to be served on any socket. Blocked queries end when it shuts down."""
    handlers = _Handlers(server)
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_refusals, handlers.in_general])
    app.on_shutdown.append(handlers.stop_waiting)
    for method, path, rights, handler in handlers.routes():
        app.router.add_route(method, path, handlers.guarded(handler, rights))
    return app


async def serve(config: ServerConfig, on_ready: Callable[[], None] = lambda: None) -> None:
    """Runs the server until SIGTERM or SIGINT; calls `on_ready` once it answers.

    Raises TidegateError when it cannot start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config):
        on_ready()
        await stop.wait()


@contextlib.asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[None]:
    """The server, as long as the block runs. Raises TidegateError when it cannot start."""
    tokens = Tokens(load_tokens(config.tokens))
    tls = tls_context(config.tls) if config.tls else None
    with contextlib.ExitStack() as stack:
        store, ca = stack.enter_context(held_state(config))
        listeners = [
            (stack.enter_context(bound(address)), None if isinstance(address, Path) else address)
            for address in config.addresses
        ]
        server = Server(
            store=store,
            ca=ca,
            datacenter=config.datacenter,
            default_policy=config.default_intention_policy,
            leaf_lifetime_s=config.leaf_lifetime_s,
            tokens=tokens,
            address=_leader(config),
        )
        runner = web.AppRunner(
            make_app(server),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_S,
        )
        await runner.setup()
        try:
            for listener, address in listeners:
                context = tls if address and address.tls else None
                await web.SockSite(runner, listener, ssl_context=context).start()
            _log.info("listening on %s", config.listen)
            yield
        finally:
            await runner.cleanup()


def _leader(config: ServerConfig) -> str:
    """The first address over TCP, or else the socket."""
    for address in config.addresses:
        if not isinstance(address, Path):
            host = f"[{address.host}]" if ":" in address.host else address.host
            return f"{host}:{address.port}"
    return f"unix://{config.addresses[0]}"


class _Changes:
    """Index of the last change by topic, and a bell that rings when it moves."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bell = asyncio.Condition()
        self._last = 0
        self._by_topic: dict[Topic, int] = {}
        self._stopped = False
        self._read()

    def index(self, topic: Topic | None = None) -> int:
        return self._last if topic is None else self._by_topic[topic]

    async def ring(self) -> None:
        """Takes up a change of the store."""
        await asyncio.to_thread(self._read)
        async with self._bell:
            self._bell.notify_all()

    async def wait_beyond(self, index: int, topic: Topic | None, timeout_s: float) -> None:
        """Returns when the topic's index is above `index`, when that is from another store, or late."""

        def is_due() -> bool:
            return self._stopped or self.index(topic) > index or index > self._last

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._bell:
                await self._bell.wait_for(is_due)

    async def stop(self) -> None:
        self._stopped = True
        async with self._bell:
            self._bell.notify_all()

    def _read(self) -> None:
        self._by_topic = {topic: self._store.index(topic) for topic in Topic}
        self._last = self._store.index()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Route = tuple[str, str, tuple[Right, ...], Handler]


class _Handlers:
    """The handlers. Answers are JSON; errors are text, as Consul's."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._store = server.store
        self._ca = server.ca
        self._datacenter = server.datacenter
        self._changes = _Changes(server.store)
        self._store_id = server.store.id
        self._rotating = asyncio.Lock()

    def routes(self) -> tuple[Route, ...]:
        """Method, path, the rights that it takes, and who answers."""
        config_read, config_write = (Right.CONFIG_READ,), (Right.CONFIG_WRITE,)
        read, write = (Right.CATALOG_READ,), (Right.CATALOG_WRITE,)
        return (
            ("PUT", "/v1/config", config_write, self.put_config),
            ("GET", "/v1/config/{kind}", config_read, self.list_config),
            ("GET", "/v1/config/{kind}/{name:.+}", config_read, self.get_config),
            ("DELETE", "/v1/config/{kind}/{name:.+}", config_write, self.delete_config),
            ("PUT", "/v1/catalog/register", write, self.register),
            ("PUT", "/v1/catalog/deregister", write, self.deregister),
            ("GET", "/v1/catalog/datacenters", (), self.datacenters),
            ("GET", "/v1/catalog/nodes", read, self.list_nodes),
            ("GET", "/v1/catalog/services", read, self.list_services),
            ("GET", "/v1/catalog/service/{name}", read, self.get_service),
            ("GET", "/v1/catalog/connect/{name}", read, self.get_connect),
            ("GET", "/v1/catalog/node/{node}", read, self.get_node),
            ("GET", "/v1/catalog/node-services/{node}", read, self.list_node_services),
            ("GET", "/v1/health/service/{name}", read, self.health_of_service),
            ("GET", "/v1/health/connect/{name}", read, self.health_of_connect),
            ("GET", "/v1/status/leader", (), self.leader),
            ("GET", "/v1/status/peers", (), self.peers),
            ("GET", "/v1/connect/ca/roots", (), self.roots),
            ("GET", "/v1/agent/connect/ca/roots", (), self.roots),
            ("GET", "/v1/agent/connect/ca/leaf/{service}", (Right.IDENTITY_WRITE,), self.leaf),
            ("PUT", "/v1/tidegate/ca/rotate", (Right.OPERATOR_WRITE,), self.rotate),
            ("GET", "/v1/tidegate/snapshot", config_read + read, self.snapshot),
            ("GET", "/v1/tidegate/index", read, self.index),
        )

    async def stop_waiting(self, _: web.Application) -> None:
        await self._changes.stop()

    def guarded(self, handler: Handler, rights: Iterable[Right]) -> Handler:
        """The handler for those who have the rights; the others are told which they lack."""

        async def answer(request: web.Request) -> web.StreamResponse:
            for right in rights:
                secret, local = secret_of(request), _is_unix(request)
                refusal = self._server.tokens.refusal(right, secret, local=local)
                if refusal:
                    raise web.HTTPForbidden(text=refusal)
            return await handler(request)

        return answer

    @property
    def in_general(self) -> Any:
        """What holds for every request: datacenter, consistency, headers, ?pretty."""

        @web.middleware
        async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
            check_datacenter(request.query.get("dc", ""), self._datacenter)
            if "stale" in request.query and "consistent" in request.query:
                raise web.HTTPBadRequest(
                    text="Cannot specify ?stale with ?consistent, conflicting semantics."
                )
            response = await handler(request)
            response.headers["X-Consul-Default-Acl-Policy"] = str(self._server.default_policy)
            if "pretty" in request.query and isinstance(response, web.Response):
                _indent(response)
            return response

        return answer

    # Config entries.

    async def put_config(self, request: web.Request) -> web.Response:
        entry, cas = await entry_of(request), cas_of(request)
        return _json(await self._write(self._store.write_entry, entry, cas))

    async def list_config(self, request: web.Request) -> web.Response:
        kind, tenancy = kind_of(request), tenancy_of(request)

        def find() -> list[dict[str, Any]]:
            return [
                to_consul(entry)
                for entry in self._store.entries(kind)
                if _is_in(entry.key, tenancy)
            ]

        find_selected = _filtering(request, find, filter_shape(kind))
        return await self._query(request, Topic.CONFIG, find_selected)

    async def get_config(self, request: web.Request) -> web.Response:
        key = _entry_key(request)

        def find() -> dict[str, Any]:
            entry = self._store.entry(key)
            if entry is None:
                raise web.HTTPNotFound(text=answers.not_found(key))
            return to_consul(entry)

        return await self._query(request, Topic.CONFIG, find)

    async def delete_config(self, request: web.Request) -> web.Response:
        key, cas = _entry_key(request), cas_of(request)
        deleted = await self._write(self._store.delete_entry, key, cas)
        return _json({} if cas is None else deleted)

    # Catalog.

    async def register(self, request: web.Request) -> web.Response:
        asked = await registration_of(request, self._datacenter)
        node = asked.node
        if asked.skip_node_update:
            known = [record.node for record in await asyncio.to_thread(self._store.nodes)]
            place = (node.partition, node.node)
            node = next((one for one in known if (one.partition, one.node) == place), node)
            if not node.address:
                raise web.HTTPBadRequest(text="Must provide Address: the node is not known yet")
        await self._write(self._store.register, node, asked.service)
        return _json(True)

    async def deregister(self, request: web.Request) -> web.Response:
        asked = await deregistration_of(request, self._datacenter)

        def take_out() -> None:
            self._store.deregister(asked.node, asked.service_id, **asked.tenancy._asdict())

        if not asked.nothing:
            await self._write(take_out)
        return _json(True)

    async def datacenters(self, _: web.Request) -> web.Response:
        return _json([self._datacenter])

    async def list_nodes(self, request: web.Request) -> web.Response:
        find = _filtering(
            request,
            lambda: [
                answers.node_record(record, self._datacenter)
                for record in self._nodes(tenancy_of(request))
                if _has_meta(request, record.node.meta)
            ],
            answers.NODE_SHAPE,
        )
        return await self._query(request, Topic.CATALOG, find)

    async def list_services(self, request: web.Request) -> web.Response:
        find = _filtering(
            request,
            lambda: [
                answers.catalog_service(record, self._datacenter)
                for record in self._wanted(request, self._store.services())
            ],
            answers.CATALOG_SERVICE_SHAPE,
        )
        return await self._query(request, Topic.CATALOG, lambda: answers.tags_by_name(find()))

    async def get_service(self, request: web.Request) -> web.Response:
        return await self._list_catalog(request, self._named(request))

    async def get_connect(self, request: web.Request) -> web.Response:
        return await self._list_catalog(request, self._proxies(request))

    async def _list_catalog(
        self, request: web.Request, read: Callable[[], list[Record]]
    ) -> web.Response:
        find = _filtering(
            request,
            lambda: [answers.catalog_service(record, self._datacenter) for record in read()],
            answers.CATALOG_SERVICE_SHAPE,
        )
        return await self._query(request, Topic.CATALOG, find)

    async def get_node(self, request: web.Request) -> web.Response:
        def find() -> dict[str, Any] | None:
            node, services = self._on_node(request)
            if node is None:
                return None
            return {"Node": node, "Services": {service["ID"]: service for service in services}}

        return await self._query(request, Topic.CATALOG, find)

    async def list_node_services(self, request: web.Request) -> web.Response:
        def find() -> dict[str, Any]:
            node, services = self._on_node(request)
            return {"Node": node, "Services": services}

        return await self._query(request, Topic.CATALOG, find)

    async def health_of_service(self, request: web.Request) -> web.Response:
        return await self._list_health(request, self._named(request))

    async def health_of_connect(self, request: web.Request) -> web.Response:
        return await self._list_health(request, self._proxies(request))

    async def _list_health(
        self, request: web.Request, read: Callable[[], list[Record]]
    ) -> web.Response:
        find = _filtering(
            request,
            lambda: [answers.health(record, self._datacenter) for record in read()],
            answers.HEALTH_SHAPE,
        )
        return await self._query(request, Topic.CATALOG, find)

    async def leader(self, _: web.Request) -> web.Response:
        return _json(self._server.address)

    async def peers(self, _: web.Request) -> web.Response:
        return _json([self._server.address])

    # Certificates.

    async def roots(self, _: web.Request) -> web.Response:
        certificates = _CERTIFICATE.findall(self._ca.roots_pem)
        return _json(answers.roots(self._ca.trust_domain, certificates))

    async def leaf(self, request: web.Request) -> web.Response:
        service, tenancy = request.match_info["service"], one_tenancy(request)
        if not is_name(service):
            raise web.HTTPBadRequest(text=f"Invalid service name {service[:80]!r}")
        ttl = self._server.leaf_lifetime_s
        if "ttl" in request.query:
            ttl = durations.parse(request.query["ttl"]) or 0.0
            if not MIN_LEAF_TTL_S <= ttl <= MAX_LEAF_TTL_S:
                raise web.HTTPBadRequest(text="Invalid ttl: expected 1s to 72h")
        name = ServiceName(service, tenancy.namespace, tenancy.partition)
        uri = spiffe.service_id(self._ca.trust_domain, str(name), datacenter=self._datacenter)
        leaf = await asyncio.to_thread(self._ca.issue, uri, ttl)
        return _json(
            {
                "SerialNumber": leaf.serial,
                "CertPEM": leaf.certificate_pem,
                "PrivateKeyPEM": leaf.key_pem,
                "Service": service,
                "ServiceURI": uri,
                "Namespace": name.namespace,
                "Partition": name.partition,
                "ValidAfter": answers.time_text(leaf.not_before),
                "ValidBefore": answers.time_text(leaf.not_after),
            }
        )

    # What Consul has no words for.

    async def rotate(self, request: web.Request) -> web.Response:
        """A new root for the mesh; the former stays trusted for `keep`, so that its leaves can be replaced."""
        keep_s = MAX_LEAF_TTL_S
        if "keep" in request.query:
            said = durations.parse(request.query["keep"])
            if said is None:
                raise web.HTTPBadRequest(text=f"Invalid keep: expected {durations.SHAPE}")
            keep_s = said
        async with self._rotating:
            self._ca = await asyncio.to_thread(self._ca.rotate, keep_s)
        return await self.roots(request)

    async def snapshot(self, request: web.Request) -> web.Response:
        """Everything at one index, or 304 when the client has that already (ETag)."""
        root_id = answers.fingerprint(_CERTIFICATE.findall(self._ca.roots_pem)[0])
        tag = self._tag(self._changes.index(), root_id)
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag})
        contents = await asyncio.to_thread(self._store.contents)
        nodes = {node.node: info_of(node) for node in contents.nodes}
        return web.json_response(
            body=msgspec.json.encode(
                {
                    "Index": contents.index,
                    "Datacenter": self._datacenter,
                    "TrustDomain": self._ca.trust_domain,
                    "ActiveRootID": root_id,
                    "DefaultAllow": self._server.default_policy is IntentionPolicy.ALLOW,
                    "Entries": [to_consul(entry) for entry in contents.entries],
                    "Nodes": list(nodes.values()),
                    "Instances": contents.instances,
                }
            ),
            headers={"ETag": self._tag(contents.index, root_id)},
        )

    def _tag(self, index: int, root_id: str) -> str:
        return f'"{self._store_id}-{index}-{root_id}"'

    async def index(self, request: web.Request) -> web.Response:
        """Index of the last change of anything; a blocking query."""
        return await self._query(request, None, lambda: {"Index": self._changes.index()})

    # Helpers.

    async def _query(
        self, request: web.Request, topic: Topic | None, read: Callable[[], Any]
    ) -> web.Response:
        """Answers a query, after waiting where the client asks for it (index, wait)."""
        asked, wait_s = waiting_of(request)
        if asked > 0:
            await self._changes.wait_beyond(asked, topic, wait_s)
        headers = {
            "X-Consul-Index": str(self._changes.index(topic)),
            "X-Consul-KnownLeader": "true",
            "X-Consul-LastContact": "0",
            "X-Consul-Effective-Consistency": "leader",
        }
        try:
            answer = await asyncio.to_thread(read)
        except web.HTTPNotFound as missing:
            missing.headers.update(headers)
            raise
        return _json(answer, headers)

    async def _write(self, write: Callable[..., T], *args: Any) -> T:
        result = await asyncio.to_thread(write, *args)
        await self._changes.ring()
        return result

    def _nodes(self, tenancy: Tenancy) -> list[NodeRecord]:
        nodes = self._store.nodes()
        return [one for one in nodes if tenancy.partition in ("*", one.node.partition)]

    def _named(self, request: web.Request) -> Callable[[], list[Record]]:
        """The services of the name in the path."""
        name = request.match_info["name"]
        return lambda: self._wanted(request, self._store.services(name))

    def _proxies(self, request: web.Request) -> Callable[[], list[Record]]:
        """What callers of the service of that name connect to with mTLS."""
        name = request.match_info["name"]
        return lambda: self._wanted(
            request,
            (one for one in self._store.services() if destination_name(one.service) == name),
        )

    def _wanted(self, request: web.Request, records: Iterable[Record]) -> list[Record]:
        """Those that the query is about by tenancy, tags and the nodes' Meta."""
        tenancy, tags = tenancy_of(request), set(request.query.getall("tag", []))
        return [
            record
            for record in records
            if tenancy.has(record.service.namespace, record.service.partition)
            and tags <= set(record.service.tags)
            and _has_meta(request, record.node.meta)
        ]

    def _on_node(self, request: web.Request) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """A node and the services on it, filtered; None and nothing where there is no such node."""
        name, tenancy = request.match_info["node"], tenancy_of(request)
        for record in self._nodes(tenancy):
            if record.node.node == name:
                services = [
                    answers.agent_service(one, self._datacenter)
                    for one in self._store.services()
                    if one.node.node == name
                    and tenancy.has(one.service.namespace, one.service.partition)
                ]
                expression = request.query.get("filter", "")
                return answers.node_record(record, self._datacenter), answers.selected(
                    services, expression, answers.AGENT_SERVICE_SHAPE
                )
        return None, []


def _is_in(key: EntryKey, tenancy: Tenancy) -> bool:
    if key.kind in (Kind.MESH, Kind.PROXY_DEFAULTS):
        return tenancy.partition in ("*", key.partition)
    return tenancy.has(key.namespace, key.partition)


def _entry_key(request: web.Request) -> EntryKey:
    kind = kind_of(request)
    tenancy = tenancy_of(request) if kind is Kind.SERVICE_INTENTIONS else one_tenancy(request)
    namespace = tenancy.namespace
    if kind in (Kind.MESH, Kind.PROXY_DEFAULTS):
        namespace = DEFAULT_TENANT
    return EntryKey(kind, request.match_info["name"], namespace, tenancy.partition)


def _filtering(
    request: web.Request, find: Callable[[], list[dict[str, Any]]], shape: Shape
) -> Callable[[], list[dict[str, Any]]]:
    return lambda: answers.selected(find(), request.query.get("filter", ""), shape)


def _has_meta(request: web.Request, meta: dict[str, str]) -> bool:
    """Whether a node has what ?node-meta=key:value asks for, all of it."""
    asked = (text.partition(":") for text in request.query.getall("node-meta", []))
    return all(meta.get(key) == value for key, _, value in asked)


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What Consul does with an error of the state store: status 500 and its text."""
    try:
        return await handler(request)
    except FilterError as error:
        return web.Response(status=400, text=f"Failed to create filter: {error}")
    except TidegateError as error:
        if isinstance(error, StoreError):
            _log.error("%s", error)
        return web.Response(status=500, text=str(error))
    except web.HTTPMethodNotAllowed as error:
        error.text = f"method {request.method} not allowed"
        raise
    except web.HTTPNotFound as error:
        if error.text == f"{error.status}: {error.reason}":
            error.text = "Invalid URL path: not a recognized HTTP API endpoint"
        raise


def _json(value: Any, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(body=msgspec.json.encode(value), headers=headers)


def _indent(response: web.Response) -> None:
    if isinstance(response.body, bytes) and response.content_type == "application/json":
        response.body = msgspec.json.format(response.body, indent=4) + b"\n"


def _is_unix(request: web.Request) -> bool:
    peer = request.transport.get_extra_info("socket") if request.transport else None
    return peer is not None and peer.family == socket.AF_UNIX
