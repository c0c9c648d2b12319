"""Client of the intent and catalog API: typed values in and out, Consul's HTTP in between.

Every request has a time limit and every answer a size limit. Remembers the last snapshot, so that asking
again costs one small request while nothing changes. Knows no files: what to do when the server is
unreachable is its user's decision.
"""

import calendar
import re
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from tidegate.catalog.registration import (
    NodeInfo,
    is_published,
    node_of,
    proxy_id,
    services_of,
)
from tidegate.errors import InputError, TidegateError
from tidegate.intent.entries import Entry, Kind, from_consul, to_consul
from tidegate.model import Instance

__all__ = [
    "CatalogClient",
    "CatalogRefused",
    "CatalogUnreachable",
    "LeafMaterial",
    "NodeInfo",
    "Snapshot",
]

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_TEXT = 2000

T = TypeVar("T")


class CatalogUnreachable(TidegateError):
    """No server answers at the address, or not in time."""


class CatalogRefused(TidegateError):
    """The server answered and said no: `status` is HTTP's, `text` the server's words."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text
        super().__init__(f"Unexpected response code: {status} ({text})")


class LeafMaterial(msgspec.Struct, frozen=True, kw_only=True):
    """A leaf certificate and its key, PEM. Times are seconds since the epoch."""

    service: str
    spiffe_uri: str
    certificate_pem: str
    key_pem: str
    not_before: float
    not_after: float
    serial: str

    def __repr__(self) -> str:
        return f"LeafMaterial({self.spiffe_uri!r}, serial={self.serial!r})"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the server has, at one index; empty before the first answer."""

    index: int = 0
    entries: tuple[Entry, ...] = ()
    instances: tuple[Instance, ...] = ()
    """Living (seen_until 0) and recently departed."""
    nodes: tuple[NodeInfo, ...] = ()
    default_allow: bool = False
    trust_domain: str = ""
    datacenter: str = ""

    def living(self) -> dict[str, Instance]:
        """The living instances by id."""
        return {instance.id: instance for instance in self.instances if not instance.seen_until}


class CatalogClient:
    """Speaks to one server. `address` is unix:///path or http://host:port.

    Methods raise CatalogUnreachable and CatalogRefused. Belongs to the event loop of its first request.
    """

    def __init__(self, address: str) -> None:
        """Raises InputError for an address of another form."""
        if not re.fullmatch(r"unix:///.+|https?://[^/]+/?", address):
            raise InputError(
                f"{address!r} is no server address", expected="unix:///path or http://host:port"
            )
        self.address = address
        self._session: aiohttp.ClientSession | None = None
        self._last: tuple[str, Snapshot] | None = None

    async def __aenter__(self) -> "CatalogClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; the client can be used again afterwards."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # Config entries.

    async def read_entries(self, kind: Kind | None = None) -> tuple[Entry, ...]:
        """All entries, or those of a kind, sorted by kind and name."""
        found: list[Entry] = []
        for each in (kind,) if kind else sorted(Kind):
            raw = await self._get(f"/v1/config/{each}", list[dict[str, Any]])
            found += [from_consul(entry, self.address) for entry in raw]
        return tuple(found)

    async def read_entry(self, kind: Kind, name: str) -> Entry:
        """One entry; CatalogRefused with status 404 when there is none."""
        raw = await self._get(f"/v1/config/{kind}/{quote(name, safe='')}", dict[str, Any])
        return from_consul(raw, self.address)

    async def write_entry(self, entry: Entry, cas: int | None = None) -> bool:
        """Writes an entry; False when `cas` is not its ModifyIndex (0: it must not exist)."""
        return await self._put("/v1/config", to_consul(entry), cas)

    async def delete_entry(self, kind: Kind, name: str, cas: int | None = None) -> bool:
        """Deletes an entry; False when `cas` is not its ModifyIndex."""
        query = {} if cas is None else {"cas": str(cas)}
        path = f"/v1/config/{kind}/{quote(name, safe='')}"
        answer = await self._ask("DELETE", path, query=query)
        return True if cas is None else self._decoded(answer, bool)

    # Catalog.

    async def register(self, node: NodeInfo, instances: Sequence[Instance]) -> None:
        """Publishes a node and instances on it, as far as the catalog does not have them already."""
        snapshot = await self.snapshot()
        living = snapshot.living()
        body = _node_body(node)
        if node not in snapshot.nodes:
            await self._put("/v1/catalog/register", body)
        for instance in instances:
            if is_published(instance, living):
                continue
            for service in services_of(instance):
                await self._put("/v1/catalog/register", body | {"Service": service})
            known = living.get(instance.id)
            if known is not None and known.meshed and not instance.meshed:
                await self._deregister(node.name, proxy_id(instance.id))

    async def deregister(self, node: str, instance_id: str) -> None:
        """Takes an instance out of the catalog, and remembers that it was there."""
        await self._deregister(node, instance_id)
        await self._deregister(node, proxy_id(instance_id))

    async def instances(self) -> tuple[Instance, ...]:
        """Living and recently departed instances (`seen_until` above 0), with their times."""
        return (await self.snapshot()).instances

    async def nodes(self) -> tuple[NodeInfo, ...]:
        """All nodes, sorted by name."""
        return (await self.snapshot()).nodes

    # Certificates.

    async def leaf(self, service: str, ttl: float) -> LeafMaterial:
        """A fresh leaf for `service`, valid for `ttl` seconds. Only over a unix socket."""
        path = f"/v1/agent/connect/ca/leaf/{quote(service, safe='')}"
        raw = await self._get(path, _Leaf, {"ttl": f"{ttl:.3f}"})
        return LeafMaterial(
            service=raw.service,
            spiffe_uri=raw.service_uri,
            certificate_pem=raw.cert_pem,
            key_pem=raw.private_key_pem,
            not_before=self._time(raw.valid_after),
            not_after=self._time(raw.valid_before),
            serial=raw.serial_number,
        )

    async def roots(self) -> str:
        """The trust bundle, PEM: what leaves of the mesh may chain to."""
        answer = await self._get("/v1/connect/ca/roots", _Roots)
        return "".join(root.root_cert for root in answer.roots)

    # Everything.

    async def snapshot(self) -> Snapshot:
        """Everything at one index, in one request; nothing is sent again that has not changed."""
        headers = {"If-None-Match": self._last[0]} if self._last else {}
        answer = await self._ask("GET", "/v1/tidegate/snapshot", headers=headers)
        if answer.status == 304 and self._last:
            return self._last[1]
        raw = self._decoded(answer, _Snapshot)
        snapshot = Snapshot(
            index=raw.index,
            entries=tuple(from_consul(entry, self.address) for entry in raw.entries),
            instances=raw.instances,
            nodes=raw.nodes,
            default_allow=raw.default_allow,
            trust_domain=raw.trust_domain,
            datacenter=raw.datacenter,
        )
        self._last = (answer.tag, snapshot)
        return snapshot

    async def wait(self, index: int, timeout: float) -> int:  # noqa: ASYNC109 - the server waits
        """Returns the server's index as soon as it is not `index`, or after `timeout` seconds."""
        answer = await self._get(
            "/v1/tidegate/index",
            dict[str, int],
            {"index": str(max(1, index)), "wait": f"{int(timeout * 1000)}ms"},
            limit_s=timeout + TIMEOUT_S,
        )
        return answer.get("Index", 0)

    # HTTP.

    async def _get(
        self,
        path: str,
        shape: type[T],
        query: dict[str, str] | None = None,
        limit_s: float = TIMEOUT_S,
    ) -> T:
        return self._decoded(await self._ask("GET", path, query=query, limit_s=limit_s), shape)

    async def _put(self, path: str, body: dict[str, Any], cas: int | None = None) -> bool:
        query = {} if cas is None else {"cas": str(cas)}
        return self._decoded(await self._ask("PUT", path, query=query, body=body), bool)

    async def _deregister(self, node: str, service_id: str) -> None:
        await self._put("/v1/catalog/deregister", {"Node": node, "ServiceID": service_id})

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        limit_s: float = TIMEOUT_S,
    ) -> "_Answer":
        try:
            async with self._open_session().request(
                method,
                self._base() + path,
                params=query,
                data=None if body is None else msgspec.json.encode(body),
                headers={"Content-Type": "application/json", **(headers or {})},
                timeout=aiohttp.ClientTimeout(total=limit_s),
                allow_redirects=False,
            ) as response:
                answer = _Answer(
                    status=response.status,
                    tag=response.headers.get("ETag", ""),
                    body=await _bounded(response.content),
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CatalogUnreachable(
                f"no server answers at {self.address} ({_reason(error, limit_s)})"
            ) from error
        if answer.status not in (200, 304):
            text = answer.body[:_MAX_ERROR_TEXT].decode(errors="replace").strip()
            raise CatalogRefused(answer.status, text)
        return answer

    def _base(self) -> str:
        return "http://server" if self.address.startswith("unix://") else self.address.rstrip("/")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self.address.startswith("unix://"):
                connector = aiohttp.UnixConnector(self.address.removeprefix("unix://"))
            else:
                connector = aiohttp.TCPConnector()
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    def _decoded(self, answer: "_Answer", shape: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.body, type=shape)
        except msgspec.DecodeError as error:
            raise self._not_understood(str(error)) from error

    def _time(self, text: str) -> float:
        try:
            return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
        except ValueError as error:
            raise self._not_understood(f"{text!r} is no time") from error

    def _not_understood(self, detail: str) -> CatalogRefused:
        return CatalogRefused(200, f"{self.address} answers something else than expected: {detail}")


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    tag: str
    body: bytes


class _Leaf(msgspec.Struct, rename="pascal"):
    serial_number: str
    service: str
    valid_after: str
    valid_before: str
    cert_pem: str = msgspec.field(name="CertPEM")
    private_key_pem: str = msgspec.field(name="PrivateKeyPEM")
    service_uri: str = msgspec.field(name="ServiceURI")


class _Root(msgspec.Struct, rename="pascal"):
    root_cert: str


class _Roots(msgspec.Struct, rename="pascal"):
    roots: list[_Root]


class _Snapshot(msgspec.Struct, rename="pascal"):
    index: int
    datacenter: str
    trust_domain: str
    default_allow: bool
    entries: list[dict[str, Any]]
    nodes: tuple[NodeInfo, ...]
    instances: tuple[Instance, ...]


def _node_body(node: NodeInfo) -> dict[str, Any]:
    form = node_of(node)
    return {
        "Node": form.node,
        "Address": form.address,
        "TaggedAddresses": form.tagged_addresses,
        "NodeMeta": form.meta,
    }


def _reason(error: Exception, limit_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"not within {limit_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or str(error.os_error)
    return str(error) or type(error).__name__


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    chunks = []
    size = 0
    async for chunk in content.iter_any():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
