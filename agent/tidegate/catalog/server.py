"""The embedded server: Consul's HTTP API for config entries, the catalog and leaf certificates.

Every path, status and error body is Consul's (facts: Consul agent/http_register.go, api-docs); what Consul
has no words for is under /v1/tidegate/. Listens on a unix socket (0600), or on a loopback TCP address, where
it hands out no keys, because there is nothing that tells one local user from another. Knows HTTP; what may
be written and what it means is decided in `intent` and `catalog.store`.
"""

import asyncio
import contextlib
import enum
import errno
import fcntl
import ipaddress
import logging
import os
import re
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from tidegate import durations
from tidegate.catalog.registration import Node, Service, TaggedAddress, info_of
from tidegate.catalog.store import Record, Store, StoreError, Topic
from tidegate.errors import InputError, TidegateError
from tidegate.identity import spiffe
from tidegate.identity.ca import Leaf, MeshCA
from tidegate.intent.entries import Kind, from_consul, make_kind, to_consul
from tidegate.intent.fields import is_name

MAX_BODY = 512 << 10
"""Largest request body in bytes, Consul's limit for a config entry."""

DEFAULT_WAIT_S = 300.0
MAX_WAIT_S = 600.0
"""Consul's blocking queries: api-docs/features/blocking."""

MIN_LEAF_TTL_S = 1.0
MAX_LEAF_TTL_S = 72 * 3600.0

SHUTDOWN_S = 2.0
"""How long requests in flight may take when the server is told to stop."""

_LONGEST_NAME = 512

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CertificateAuthority(Protocol):
    """What the server needs of a mesh CA (identity.ca.MeshCA)."""

    trust_domain: str
    roots_pem: str

    def issue(self, spiffe_uri: str, lifetime_s: float) -> Leaf: ...


class IntentionPolicy(enum.StrEnum):
    """What holds between services for which there is no intention (Consul's agent option)."""

    ALLOW = "allow"
    DENY = "deny"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of `tidegate server`."""

    state_dir: Path
    """Directory of the store and the CA, made 0700 if it is missing."""
    listen: str = "unix:///run/tidegate/server.sock"
    """unix:///path, or http://ADDRESS:PORT with a loopback address."""
    trust_domain: str
    datacenter: str = "dc1"
    default_intention_policy: IntentionPolicy = IntentionPolicy.DENY
    leaf_lifetime: float | str = "1h"
    """Lifetime of a leaf where a request names none: seconds, or Go's notation such as "1h30m"."""

    @property
    def leaf_lifetime_s(self) -> float:
        """The lifetime in seconds; 0 when `leaf_lifetime` is no duration."""
        if isinstance(self.leaf_lifetime, str):
            return durations.parse(self.leaf_lifetime) or 0.0
        return float(self.leaf_lifetime)


def _decode_path(kind: type[object], text: object) -> object:
    if kind is Path and isinstance(text, str):
        return Path(text)
    raise TypeError(f"expected text, got {type(text).__name__}")


def load_config(path: Path) -> ServerConfig:
    """Reads a YAML or JSON file; raises InputError with file and field."""
    source = str(path)
    try:
        config = msgspec.yaml.decode(path.read_bytes(), type=ServerConfig, dec_hook=_decode_path)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", source=source, expected="a server configuration"
        ) from error
    except msgspec.DecodeError as error:
        raise InputError(" ".join(str(error).split()), source=source) from error
    try:
        spiffe.trust_domain(config.trust_domain)
        spiffe.label(config.datacenter, "datacenter")
        _address_of(config.listen)
    except InputError as error:
        raise InputError(
            error.problem, source=source, field=error.field, expected=error.expected
        ) from error
    if not MIN_LEAF_TTL_S <= config.leaf_lifetime_s <= MAX_LEAF_TTL_S:
        raise InputError(
            f"{config.leaf_lifetime!r} is no lifetime of a leaf certificate",
            source=source,
            field="leaf_lifetime",
            expected='seconds or a duration such as "1h", from 1s to 72h',
        )
    return config


def make_app(
    store: Store,
    ca: CertificateAuthority,
    *,
    default_allow: bool,
    datacenter: str,
    leaf_lifetime_s: float,
) -> web.Application:
    """The application, to be served on any socket. Blocked queries end when it shuts down."""
    server = _Server(store, ca, default_allow, datacenter, leaf_lifetime_s)
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_refusals])
    app.on_shutdown.append(server.stop_waiting)
    app.add_routes(
        [
            web.put("/v1/config", server.put_config),
            web.get("/v1/config/{kind}", server.list_config),
            web.get("/v1/config/{kind}/{name}", server.get_config),
            web.delete("/v1/config/{kind}/{name}", server.delete_config),
            web.put("/v1/catalog/register", server.register),
            web.put("/v1/catalog/deregister", server.deregister),
            web.get("/v1/catalog/nodes", server.list_nodes),
            web.get("/v1/catalog/services", server.list_services),
            web.get("/v1/catalog/service/{name}", server.get_service),
            web.get("/v1/health/service/{name}", server.health_of_service),
            web.get("/v1/status/leader", server.leader),
            web.get("/v1/connect/ca/roots", server.roots),
            web.get("/v1/agent/connect/ca/leaf/{service}", server.leaf),
            web.get("/v1/tidegate/snapshot", server.snapshot),
            web.get("/v1/tidegate/index", server.index),
        ]
    )
    return app


async def serve(config: ServerConfig) -> None:
    """Runs the server until SIGTERM or SIGINT. Raises TidegateError when it cannot start."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config):
        await stop.wait()


@contextlib.asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[None]:
    """The server, as long as the block runs. Raises TidegateError when it cannot start."""
    with _state(config) as (store, ca), _bound(_address_of(config.listen)) as listener:
        app = make_app(
            store,
            ca,
            default_allow=config.default_intention_policy is IntentionPolicy.ALLOW,
            datacenter=config.datacenter,
            leaf_lifetime_s=config.leaf_lifetime_s,
        )
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            _log.info("listening on %s", config.listen)
            yield
        finally:
            await runner.cleanup()


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


class _Server:
    """The handlers. Answers are JSON; errors are text, as Consul's."""

    def __init__(
        self,
        store: Store,
        ca: CertificateAuthority,
        default_allow: bool,
        datacenter: str,
        leaf_lifetime_s: float,
    ) -> None:
        self._store = store
        self._ca = ca
        self._default_allow = default_allow
        self._datacenter = datacenter
        self._leaf_lifetime_s = leaf_lifetime_s
        self._changes = _Changes(store)
        self._store_id = store.id

    async def stop_waiting(self, _: web.Application) -> None:
        await self._changes.stop()

    # Config entries.

    async def put_config(self, request: web.Request) -> web.Response:
        raw = await _body(request, dict[str, Any])
        try:
            entry = from_consul(raw)
        except InputError as error:
            raise web.HTTPBadRequest(text=f"Request decoding failed: {error}") from error
        return _json(await self._write(self._store.write_entry, entry, _cas(request)))

    async def list_config(self, request: web.Request) -> web.Response:
        kind = _kind(request)
        if "filter" in request.query:
            raise web.HTTPBadRequest(text=f"filtering not supported for config entry kind={kind}")
        return await self._query(
            request, Topic.CONFIG, lambda: [to_consul(e) for e in self._store.entries(kind)]
        )

    async def get_config(self, request: web.Request) -> web.Response:
        kind, name = _kind(request), request.match_info["name"]

        def find() -> dict[str, Any]:
            entry = self._store.entry(kind, name)
            if entry is None:
                raise web.HTTPNotFound(text=f'Config entry not found for "{kind}" / "{name}"')
            return to_consul(entry)

        return await self._query(request, Topic.CONFIG, find)

    async def delete_config(self, request: web.Request) -> web.Response:
        kind, name, cas = _kind(request), request.match_info["name"], _cas(request)
        if cas == 0:
            raise web.HTTPBadRequest(text="Bad cas value: expected a ModifyIndex above 0")
        deleted = await self._write(self._store.delete_entry, kind, name, cas)
        return _json({} if cas is None else deleted)

    # Catalog.

    async def register(self, request: web.Request) -> web.Response:
        body = await _body(request, _Registration)
        node = Node(
            node=_named(body.node, "Node"),
            address=_named(body.address, "Address"),
            tagged_addresses=body.tagged_addresses or {},
            meta=body.node_meta or {},
        )
        service = body.service
        if service is not None:
            _named(service.service, "Service.Service")
            service = msgspec.structs.replace(service, id=service.id or service.service)
            _named(service.id, "Service.ID")
            if not 0 <= service.port <= 65535:
                raise web.HTTPBadRequest(text=f"Invalid Service.Port {service.port}")
        await self._write(self._store.register, node, service)
        return _json(True)

    async def deregister(self, request: web.Request) -> web.Response:
        body = await _body(request, _Deregistration)
        await self._write(
            self._store.deregister, _named(body.node, "Node"), body.service_id or None
        )
        return _json(True)

    async def list_nodes(self, request: web.Request) -> web.Response:
        return await self._query(
            request,
            Topic.CATALOG,
            lambda: [
                self._node(record.node)
                | {"CreateIndex": record.create_index, "ModifyIndex": record.modify_index}
                for record in self._store.nodes()
            ],
        )

    async def list_services(self, request: web.Request) -> web.Response:
        def tags_by_name() -> dict[str, list[str]]:
            tags: dict[str, set[str]] = {}
            for record in self._store.services():
                tags.setdefault(record.service.service, set()).update(record.service.tags)
            return {name: sorted(found) for name, found in tags.items()}

        return await self._query(request, Topic.CATALOG, tags_by_name)

    async def get_service(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return await self._query(
            request,
            Topic.CATALOG,
            lambda: [self._catalog_service(record) for record in self._store.services(name)],
        )

    async def health_of_service(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return await self._query(
            request,
            Topic.CATALOG,
            lambda: [
                {
                    "Node": self._node(record.node),
                    "Service": _agent_service(record),
                    "Checks": [],
                }
                for record in self._store.services(name)
            ],
        )

    async def leader(self, _: web.Request) -> web.Response:
        return _json("127.0.0.1:8300")

    # Certificates.

    async def roots(self, _: web.Request) -> web.Response:
        return _json(
            {
                "ActiveRootID": "tidegate",
                "TrustDomain": self._ca.trust_domain,
                "Roots": [
                    {
                        "ID": "tidegate",
                        "Name": "tidegate mesh root",
                        "RootCert": self._ca.roots_pem,
                        "Active": True,
                    }
                ],
            }
        )

    async def leaf(self, request: web.Request) -> web.Response:
        if not _is_unix(request):
            raise web.HTTPForbidden(
                text="Permission denied: keys are handed out on the unix socket only"
            )
        service = request.match_info["service"]
        if not is_name(service):
            raise web.HTTPBadRequest(text=f"Invalid service name {service[:80]!r}")
        ttl = self._leaf_lifetime_s
        if "ttl" in request.query:
            ttl = durations.parse(request.query["ttl"]) or 0.0
            if not MIN_LEAF_TTL_S <= ttl <= MAX_LEAF_TTL_S:
                raise web.HTTPBadRequest(text="Invalid ttl: expected 1s to 72h")
        uri = spiffe.service_id(self._ca.trust_domain, service, datacenter=self._datacenter)
        leaf = await asyncio.to_thread(self._ca.issue, uri, ttl)
        return _json(
            {
                "SerialNumber": leaf.serial,
                "CertPEM": leaf.certificate_pem,
                "PrivateKeyPEM": leaf.key_pem,
                "Service": service,
                "ServiceURI": uri,
                "ValidAfter": _rfc3339(leaf.not_before),
                "ValidBefore": _rfc3339(leaf.not_after),
            }
        )

    # What Consul has no words for.

    async def snapshot(self, request: web.Request) -> web.Response:
        """Everything at one index, or 304 when the client has that already (ETag)."""
        tag = f'"{self._store_id}-{self._changes.index()}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag})
        contents = await asyncio.to_thread(self._store.contents)
        return web.json_response(
            body=msgspec.json.encode(
                {
                    "Index": contents.index,
                    "Datacenter": self._datacenter,
                    "TrustDomain": self._ca.trust_domain,
                    "DefaultAllow": self._default_allow,
                    "Entries": [to_consul(entry) for entry in contents.entries],
                    "Nodes": [info_of(node) for node in contents.nodes],
                    "Instances": contents.instances,
                }
            ),
            headers={"ETag": f'"{self._store_id}-{contents.index}"'},
        )

    async def index(self, request: web.Request) -> web.Response:
        """Index of the last change of anything; a blocking query."""
        return await self._query(request, None, lambda: {"Index": self._changes.index()})

    # Helpers.

    async def _query(
        self, request: web.Request, topic: Topic | None, read: Callable[[], Any]
    ) -> web.Response:
        """Answers a query, after waiting where the client asks for it (index, wait)."""
        asked = request.query.get("index", "0")
        if not re.fullmatch(r"\d{1,19}", asked):
            raise web.HTTPBadRequest(text="Invalid index")
        wait_s = DEFAULT_WAIT_S
        if "wait" in request.query:
            asked_s = durations.parse(request.query["wait"])
            if asked_s is None:
                raise web.HTTPBadRequest(text="Invalid wait time")
            wait_s = asked_s
        if int(asked) > 0:
            await self._changes.wait_beyond(int(asked), topic, min(wait_s, MAX_WAIT_S))
        headers = {
            "X-Consul-Index": str(self._changes.index(topic)),
            "X-Consul-KnownLeader": "true",
            "X-Consul-LastContact": "0",
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

    def _node(self, node: Node) -> dict[str, Any]:
        return {
            "ID": "",
            "Node": node.node,
            "Address": node.address,
            "Datacenter": self._datacenter,
            "TaggedAddresses": node.tagged_addresses,
            "Meta": node.meta,
        }

    def _catalog_service(self, record: Record) -> dict[str, Any]:
        node, service = record.node, record.service
        return {
            "ID": "",
            "Node": node.node,
            "Address": node.address,
            "Datacenter": self._datacenter,
            "TaggedAddresses": node.tagged_addresses,
            "NodeMeta": node.meta,
            "ServiceKind": service.kind,
            "ServiceID": service.id,
            "ServiceName": service.service,
            "ServiceTags": service.tags,
            "ServiceAddress": service.address,
            "ServiceTaggedAddresses": _tagged(service.tagged_addresses),
            "ServiceMeta": service.meta,
            "ServicePort": service.port,
            "ServiceProxy": service.proxy,
            "CreateIndex": record.create_index,
            "ModifyIndex": record.modify_index,
        }


class _Registration(msgspec.Struct, kw_only=True, rename="pascal"):
    """Consul's api.CatalogRegistration, as far as it is read."""

    node: str = ""
    address: str = ""
    tagged_addresses: dict[str, str] | None = None
    node_meta: dict[str, str] | None = None
    service: Service | None = None


class _Deregistration(msgspec.Struct, kw_only=True, rename="pascal"):
    node: str = ""
    service_id: str = msgspec.field(default="", name="ServiceID")


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What Consul does with an error of the state store: status 500 and its text."""
    try:
        return await handler(request)
    except TidegateError as error:
        if isinstance(error, StoreError):
            _log.error("%s", error)
        return web.Response(status=500, text=str(error))


async def _body(request: web.Request, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"Request decoding failed: {error}") from error


def _json(value: Any, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(body=msgspec.json.encode(value), headers=headers)


def _kind(request: web.Request) -> Kind:
    try:
        return make_kind(request.match_info["kind"])
    except InputError as error:
        raise web.HTTPBadRequest(text=error.problem) from error


def _cas(request: web.Request) -> int | None:
    text = request.query.get("cas", "")
    if not text:
        return None
    if not re.fullmatch(r"\d{1,19}", text):
        raise web.HTTPBadRequest(text=f"Bad cas value: {text[:40]!r}")
    return int(text)


def _named(text: str, field: str) -> str:
    if not 0 < len(text) <= _LONGEST_NAME or not text.isprintable():
        raise web.HTTPBadRequest(text=f"Must provide {field}: 1 to {_LONGEST_NAME} characters")
    return text


def _is_unix(request: web.Request) -> bool:
    peer = request.transport.get_extra_info("socket") if request.transport else None
    return peer is not None and peer.family == socket.AF_UNIX


def _agent_service(record: Record) -> dict[str, Any]:
    service = record.service
    return {
        "Kind": service.kind,
        "ID": service.id,
        "Service": service.service,
        "Tags": service.tags,
        "Address": service.address,
        "TaggedAddresses": _tagged(service.tagged_addresses),
        "Meta": service.meta,
        "Port": service.port,
        "Proxy": service.proxy,
        "CreateIndex": record.create_index,
        "ModifyIndex": record.modify_index,
    }


def _tagged(addresses: dict[str, TaggedAddress]) -> dict[str, dict[str, Any]]:
    return {
        tag: {"Address": tagged.address, "Port": tagged.port} for tag, tagged in addresses.items()
    }


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# Starting.


def _address_of(listen: str) -> Path | tuple[str, int]:
    """The socket's path, or address and port. Raises InputError."""
    if listen.startswith("unix://"):
        path = Path(listen.removeprefix("unix://"))
        if path.is_absolute() and len(os.fsencode(path)) < 108:
            return path
    else:
        with contextlib.suppress(ValueError):
            url = urlsplit(listen)
            address = ipaddress.ip_address(url.hostname or "")
            if url.scheme == "http" and url.port and address.is_loopback:
                return str(address), url.port
    raise InputError(
        f"{listen!r} is no address to listen on",
        field="listen",
        expected="unix:///path (at most 107 characters) or http://ADDRESS:PORT with a loopback"
        " address, because there is no access control over TCP",
    )


@contextlib.contextmanager
def _state(config: ServerConfig) -> Iterator[tuple[Store, MeshCA]]:
    """The state directory, locked against a second server, with the store and the CA in it."""
    directory = config.state_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TidegateError(f"{directory}: cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TidegateError(f"{directory}: another tidegate server uses it") from error
        authority = directory / "ca"
        ca = (
            MeshCA.load(authority)
            if authority.exists()
            else MeshCA.create(authority, config.trust_domain)
        )
        if ca.trust_domain != config.trust_domain:
            raise InputError(
                f"{config.trust_domain!r} is not the trust domain of the CA in {authority}",
                field="trust_domain",
                expected=ca.trust_domain,
            )
        with contextlib.closing(Store(directory / "catalog.db")) as store:
            yield store, ca
    finally:
        os.close(lock)


@contextlib.contextmanager
def _bound(address: Path | tuple[str, int]) -> Iterator[socket.socket]:
    """A socket bound to `address`; that of a server that is gone is replaced."""
    if isinstance(address, tuple):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(address)
            except OSError as error:
                where = f"{address[0]}:{address[1]}"
                raise TidegateError(f"cannot listen on {where}: {error.strerror}") from error
            yield listener
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            address.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _remove_stale(address)
            before = os.umask(0o177)
            try:
                listener.bind(str(address))
            finally:
                os.umask(before)
            mine = address.stat().st_ino
        except OSError as error:
            raise TidegateError(f"cannot listen on {address}: {error.strerror}") from error
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                if address.stat().st_ino == mine:
                    address.unlink()


def _remove_stale(path: Path) -> None:
    """Removes the socket of a server that is gone. Raises TidegateError when one answers there."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise TidegateError(f"{path} is there and is no socket; remove it or listen elsewhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        problem = probe.connect_ex(str(path))
    if problem != errno.ECONNREFUSED:
        raise TidegateError(f"another server listens on {path}; stop it or listen elsewhere")
    path.unlink()
