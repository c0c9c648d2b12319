"""Client of the intent and catalog API: typed values in and out, Consul's HTTP in between.

Speaks to tidegate's own server, and to Consul's: what that has no snapshot of is followed by `consul.ConsulView`. Every
request has a time limit and every answer a size limit. Remembers the last snapshot, so that asking again costs one
small request, or none, while nothing changes. Knows no files: what to do when the server is unreachable is its
user's decision.
"""

import calendar
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from tidegate.catalog.access import ACCESS_FOR_ALL, Access
from tidegate.catalog.consul import ConsulView, Snapshot
from tidegate.catalog.registration import (
    NodeInfo,
    Service,
    further_id,
    is_published,
    node_of,
    proxy_id,
    services_of,
)
from tidegate.catalog.transport import (
    TIMEOUT_S,
    Answer,
    CatalogRefused,
    CatalogUnreachable,
    Transport,
    not_understood,
)
from tidegate.intent.entries import Entry, EntryKey, Kind, from_server, to_request
from tidegate.model import DEFAULT_TENANT, Instance, ServiceName

__all__ = [
    "Access",
    "CatalogClient",
    "CatalogRefused",
    "CatalogUnreachable",
    "LeafMaterial",
    "NodeInfo",
    "Root",
    "Snapshot",
]

_ALL = "*"

T = TypeVar("T")


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


RENEW_AT = 0.66
"""A leaf is renewed when this share of its life is over..."""
WRONG_CLOCK_S = 30.0
"""...and this long after it was fetched where it had ended by then, by a clock that is ahead of the server's."""


def leaf_is_due(now: float, fetched_at: float, not_after: float) -> bool:
    """Whether a leaf is to be renewed; all by this machine's clock, which may have been set since.

    One that was fetched in the future was fetched by a clock that has been set back: its life is not what it seemed.
    """
    life = not_after - fetched_at
    waits = RENEW_AT * life if life > 0 else WRONG_CLOCK_S
    return not fetched_at <= now < fetched_at + waits


class Root(msgspec.Struct, frozen=True, rename="pascal"):
    """A root certificate of the mesh, as the server lists it."""

    id: str = msgspec.field(name="ID")
    """Its SHA-1 fingerprint, in hexadecimal with colons."""
    root_cert: str
    """PEM."""
    active: bool
    """Whether leaves are issued by it; the others are trusted until theirs have ended."""


class CatalogClient:
    """Speaks to one server. `address` is unix:///path, http://host:port or https://host:port.

    Methods raise CatalogUnreachable and CatalogRefused. Belongs to the event loop of its first request.
    """

    def __init__(self, address: str, access: Access = ACCESS_FOR_ALL) -> None:
        """Raises InputError for an address of another form, and for files that `access` names and that are wrong."""
        self.address = address
        self._access = access
        self._known: tuple[Instance, ...] = ()
        self._transport = Transport(address, access)
        self._last: tuple[str, Snapshot] | None = None
        self._said: dict[bytes, Instance] = {}
        """The instances, by a digest of what the server said of each."""
        self._consul: ConsulView | None = None
        self._is_tidegate: bool | None = None

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
        if self._consul is not None:
            await self._consul.close()
            self._consul = None
        await self._transport.close()

    def remember(self, known: Iterable[Instance]) -> None:
        """Takes in who was there before, by a snapshot of an earlier client: Consul tells only who is there now.

        To be called before the first snapshot is asked for.
        """
        self._known = tuple(known)

    # Config entries.

    async def read_entries(self, kind: Kind | None = None) -> tuple[Entry, ...]:
        """All entries, or those of a kind, of all namespaces that can be read, sorted by kind and name."""
        found: list[Entry] = []
        for each in (kind,) if kind else sorted(Kind):
            query = await self._everywhere(each)
            raw = await self._get(f"/v1/config/{each}", list[dict[str, Any]], query)
            found += [from_server(entry, self.address) for entry in raw]
        return tuple(found)

    async def list_entries(
        self, kind: Kind, expression: str = "", *, namespace: str = "", partition: str = ""
    ) -> tuple[Entry, ...]:
        """The entries of a kind in one namespace, or in all ("*"), that a filter expression is true of."""
        query = tenancy_for(kind, namespace, partition)
        query |= {"filter": expression} if expression else {}
        raw = await self._get(f"/v1/config/{kind}", list[dict[str, Any]], query)
        return tuple(from_server(entry, self.address) for entry in raw)

    async def read_entry(self, key: EntryKey) -> Entry:
        """One entry; CatalogRefused with status 404 when there is none."""
        query = _tenancy_of(key)
        raw = await self._get(_path(key), dict[str, Any], query)
        return from_server(raw, self.address)

    async def write_entry(
        self, entry: Entry, cas: int | None = None, *, namespace: str = "", partition: str = ""
    ) -> bool:
        """Writes an entry; False when `cas` is not its ModifyIndex (0: it must not exist).

        `namespace` and `partition` are for what is in the default ones by itself.
        """
        query = tenancy_for(entry.kind, namespace, partition)
        return await self._put("/v1/config", to_request(entry), cas, query)

    async def delete_entry(self, key: EntryKey, cas: int | None = None) -> bool:
        """Deletes an entry; False when `cas` is not its ModifyIndex."""
        query = _tenancy_of(key) | ({} if cas is None else {"cas": str(cas)})
        answer = await self._transport.ask("DELETE", _path(key), query=query)
        return True if cas is None else answer.decoded(bool)

    # Catalog.

    async def register(
        self, node: NodeInfo, instances: Sequence[Instance], known: Snapshot | None = None
    ) -> None:
        """Publishes a node and instances on it, as far as the catalog does not have them already.

        `known` is what the caller has just been told that the catalog has; without it, it is asked for.
        """
        if known is None:
            known = await self.snapshot()
        living = known.living()
        if node not in known.nodes:
            await self._put("/v1/catalog/register", _node_body(node))
        for instance in instances:
            if is_published(instance, living):
                continue
            for service in services_of(instance):
                body = _node_body(node, service.partition)
                await self._put("/v1/catalog/register", body | {"Service": service})
            before = living.get(instance.id)
            if before is not None:
                still = _parts(instance)
                gone = {key: name for key, name in _parts(before).items() if key not in still}
                await self._withdraw(node.name, before, gone)

    async def register_service(self, node: str, address: str, service: Service) -> None:
        """Registers one service. Without an `address` the node has to be known, and stays as it is."""
        body = {"Node": node, "Address": address, "Service": service}
        body |= {} if address else {"SkipNodeUpdate": True}
        body |= {} if service.partition == DEFAULT_TENANT else {"Partition": service.partition}
        await self._put("/v1/catalog/register", body)

    async def deregister_service(self, node: str, service: Service) -> None:
        """Takes one service out of the catalog; what is not there is no error."""
        body = {"Node": node, "ServiceID": service.id} | _said_tenancy(service)
        await self._put("/v1/catalog/deregister", body)

    async def deregister(self, node: str, instance_id: str, known: Snapshot | None = None) -> None:
        """Takes an instance out of the catalog, and remembers that it was there. `known` as of `register`."""
        if known is None:
            known = await self.snapshot()
        found = known.living().get(instance_id)
        if found is None:
            found = Instance(id=instance_id, name=instance_id, service="", node=node, meshed=True)
        await self._withdraw(node, found, {instance_id: found.service} | _parts(found))

    async def instances(self) -> tuple[Instance, ...]:
        """Living and recently departed instances (`seen_until` above 0), with their times."""
        return (await self.snapshot()).instances

    async def nodes(self) -> tuple[NodeInfo, ...]:
        """All nodes, sorted by name."""
        return (await self.snapshot()).nodes

    # Certificates.

    async def leaf(self, service: str, ttl: float) -> LeafMaterial:
        """A fresh leaf for `service` (text of a ServiceName), valid for `ttl` seconds; Consul decides how long."""
        name = ServiceName.of(service)
        path = f"/v1/agent/connect/ca/leaf/{quote(name.name, safe='')}"
        query = {"ttl": f"{ttl:.3f}"} | _tenancy_of(EntryKey(Kind.SERVICE_DEFAULTS, *name))
        raw = await self._get(path, _Leaf, query)
        return LeafMaterial(
            service=service,
            spiffe_uri=raw.service_uri,
            certificate_pem=raw.cert_pem,
            key_pem=raw.private_key_pem,
            not_before=self._time(raw.valid_after),
            not_after=self._time(raw.valid_before),
            serial=raw.serial_number,
        )

    async def roots(self) -> str:
        """The trust bundle, PEM: what leaves of the mesh may chain to."""
        return "".join(root.root_cert.strip() + "\n" for root in await self.list_roots())

    async def list_roots(self) -> tuple[Root, ...]:
        """The roots of the mesh."""
        return (await self._get("/v1/connect/ca/roots", _Roots)).roots

    async def clock(self) -> float | None:
        """The server's time, in whole seconds since the Unix epoch; None where it does not say."""
        answer = await self._transport.ask("GET", "/v1/connect/ca/roots")
        try:
            return parsedate_to_datetime(answer.date).timestamp()
        except ValueError:
            return None

    async def rotate_root(self, keep_s: float) -> tuple[Root, ...]:
        """Has leaves issued by a new root; the present one stays trusted for `keep_s` seconds. The roots afterwards."""
        query = {"keep": f"{keep_s:.0f}s"}
        answer = await self._transport.ask("PUT", "/v1/tidegate/ca/rotate", query=query)
        return answer.decoded(_Roots).roots

    # Everything.

    async def snapshot(self) -> Snapshot:
        """Everything at one index, in one request; nothing is sent again that has not changed."""
        if self._consul is not None:
            return await self._consul.snapshot()
        headers = {"If-None-Match": self._last[0]} if self._last else {}
        try:
            answer = await self._transport.ask("GET", "/v1/tidegate/snapshot", headers=headers)
        except CatalogRefused as error:
            if error.status != 404:
                raise
            self._is_tidegate = False
            self._consul = ConsulView(self._transport, self._known)
            return await self._consul.snapshot()
        self._is_tidegate = True
        if answer.status == 304 and self._last:
            return self._last[1]
        raw = answer.decoded(_Snapshot)
        snapshot = Snapshot(
            index=raw.index,
            entries=tuple(from_server(entry, self.address) for entry in raw.entries),
            instances=self._instances(raw.instances),
            nodes=raw.nodes,
            default_allow=raw.default_allow,
            trust_domain=raw.trust_domain,
            root_id=raw.root_id,
            datacenter=raw.datacenter,
        )
        self._last = (answer.tag, snapshot)
        return snapshot

    def _instances(self, told: Iterable[msgspec.Raw]) -> tuple[Instance, ...]:
        """What is said in the same words is the same object: most have departed, and never change any more."""
        before, self._said = self._said, {}
        for one in told:
            words = hashlib.sha256(one).digest()
            try:
                known = before.get(words) or msgspec.json.decode(one, type=Instance)
            except msgspec.DecodeError as error:
                raise not_understood(self.address, str(error)) from error
            self._said[words] = known
        return tuple(self._said.values())

    async def wait(self, index: int, timeout: float) -> int:  # noqa: ASYNC109 - the server waits
        """Returns the server's index as soon as it is not `index`, or after `timeout` seconds."""
        if self._consul is not None:
            return await self._consul.wait(index, timeout)
        answer = await self._get(
            "/v1/tidegate/index",
            dict[str, int],
            {"index": str(max(1, index)), "wait": f"{int(timeout * 1000)}ms"},
            limit_s=timeout * 17 / 16 + TIMEOUT_S,
        )
        return answer.get("Index", 0)

    # HTTP.

    async def _everywhere(self, kind: Kind) -> dict[str, str]:
        """The parameters that ask for all namespaces: Consul's community edition refuses to be asked."""
        if self._is_tidegate is None:
            try:
                await self._transport.ask("GET", "/v1/tidegate/index")
            except CatalogRefused as error:
                self._is_tidegate = error.status != 404
            else:
                self._is_tidegate = True
        if self._is_tidegate:
            return {"ns": _ALL, "partition": _ALL} | self._access.query
        return tenancy_for(kind, self._access.namespace, "")

    async def _get(
        self,
        path: str,
        shape: type[T],
        query: dict[str, str] | None = None,
        limit_s: float = TIMEOUT_S,
    ) -> T:
        answer = await self._transport.ask("GET", path, query=query, limit_s=limit_s)
        return answer.decoded(shape)

    async def _put(
        self,
        path: str,
        body: dict[str, Any],
        cas: int | None = None,
        query: Mapping[str, str] | None = None,
    ) -> bool:
        query = dict(query or {}) | ({} if cas is None else {"cas": str(cas)})
        answer: Answer = await self._transport.ask("PUT", path, query=query, body=body)
        return answer.decoded(bool)

    async def _withdraw(self, node: str, instance: Instance, gone: dict[str, str]) -> None:
        """Takes services, by id with the text of their name, out of the catalog."""
        partition = ServiceName.of(instance.service).partition
        for service_id, text in gone.items():
            name = ServiceName.of(text)
            service = Service(
                id=service_id, service=name.name, namespace=name.namespace, partition=partition
            )
            await self.deregister_service(node, service)

    def _time(self, text: str) -> float:
        try:
            return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
        except ValueError as error:
            raise not_understood(self.address, f"{text!r} is no time") from error


def _path(key: EntryKey) -> str:
    return f"/v1/config/{key.kind}/{quote(key.name, safe='')}"


def tenancy_for(kind: Kind, namespace: str, partition: str) -> dict[str, str]:
    """The parameters that say where an entry of a kind is, as far as that is said."""
    of_partition = kind in (Kind.MESH, Kind.PROXY_DEFAULTS)
    said = {"ns": "" if of_partition else namespace, "partition": partition}
    return {name: value for name, value in said.items() if value}


def _tenancy_of(key: EntryKey) -> dict[str, str]:
    """What is default goes unsaid: Consul's community edition refuses to be told."""
    if key.namespace == key.partition == DEFAULT_TENANT:
        return {}
    return tenancy_for(key.kind, key.namespace, key.partition)


def _said_tenancy(service: Service) -> dict[str, str]:
    said = {"Namespace": service.namespace, "Partition": service.partition}
    return {field: tenant for field, tenant in said.items() if tenant != DEFAULT_TENANT}


def _parts(instance: Instance) -> dict[str, str]:
    """Ids, with the texts of their names, of the services that an instance has beside its application."""
    if instance.of_another:
        return {}
    parts = {further_id(instance.id, one): one.service for one in instance.more_ports}
    if instance.meshed:
        parts[proxy_id(instance.id)] = instance.service
    return parts


class _Leaf(msgspec.Struct, rename="pascal"):
    serial_number: str
    service: str
    valid_after: str
    valid_before: str
    cert_pem: str = msgspec.field(name="CertPEM")
    private_key_pem: str = msgspec.field(name="PrivateKeyPEM")
    service_uri: str = msgspec.field(name="ServiceURI")


class _Roots(msgspec.Struct, rename="pascal"):
    roots: tuple[Root, ...]


class _Snapshot(msgspec.Struct, rename="pascal"):
    index: int
    datacenter: str
    trust_domain: str
    default_allow: bool
    entries: list[dict[str, Any]]
    nodes: tuple[NodeInfo, ...]
    instances: tuple[msgspec.Raw, ...]
    root_id: str = msgspec.field(default="", name="ActiveRootID")


def _node_body(node: NodeInfo, partition: str = DEFAULT_TENANT) -> dict[str, Any]:
    form = node_of(node)
    body = {
        "Node": form.node,
        "Address": form.address,
        "TaggedAddresses": form.tagged_addresses,
        "NodeMeta": form.meta,
    }
    return body if partition == DEFAULT_TENANT else body | {"Partition": partition}
