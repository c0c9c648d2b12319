"""What a request to the embedded server says, in Consul's forms: token, tenancy, waiting, bodies.

Keys of bodies are taken as Go's encoding/json takes them: in any case, and null is as if it were not said.
Raises aiohttp's HTTP errors, with Consul's texts where it has one.
"""

import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from tidegate import durations
from tidegate.catalog.registration import Node, Service
from tidegate.errors import InputError
from tidegate.intent.entries import Entry, Kind, from_consul, make_kind
from tidegate.intent.fields import folded, is_name
from tidegate.model import DEFAULT_TENANT

DEFAULT_WAIT_S = 300.0
MAX_WAIT_S = 600.0
JITTER = 16
"""Consul's blocking queries: api-docs/features/blocking. Up to 1/16 is added to the wait."""

ALL = "*"

T = TypeVar("T")

_LONGEST_NAME = 512


class Tenancy(NamedTuple):
    """Which namespaces and partitions a query is about; "*" is all of them."""

    namespace: str
    partition: str

    def has(self, namespace: str, partition: str) -> bool:
        return self.namespace in (ALL, namespace) and self.partition in (ALL, partition)


def secret_of(request: web.Request) -> str:
    """The token that a request bears, "" for none; where it looks, and in which order, is Consul's."""
    asked = request.query.get("token") or request.headers.get("X-Consul-Token")
    if asked:
        return asked
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def tenancy_of(request: web.Request) -> Tenancy:
    """Namespace and partition of a query: parameters before headers, default where neither says one."""
    return Tenancy(
        _tenant(request, "ns", "X-Consul-Namespace") or DEFAULT_TENANT,
        _tenant(request, "partition", "X-Consul-Partition") or DEFAULT_TENANT,
    )


def one_tenancy(request: web.Request) -> Tenancy:
    """The same where "*" is no answer: for what exists in one namespace of one partition."""
    tenancy = tenancy_of(request)
    if tenancy.partition == ALL or tenancy.namespace == ALL:
        raise web.HTTPBadRequest(text="Invalid query: a wildcard is not possible here")
    return tenancy


def _tenant(request: web.Request, parameter: str, header: str) -> str:
    text = request.query.get(parameter, "") or request.headers.get(header, "")
    if text not in ("", ALL) and not is_name(text):
        raise web.HTTPBadRequest(text=f'Invalid query parameter: "{parameter}" - {text[:80]!r}')
    return text


def kind_of(request: web.Request) -> Kind:
    try:
        return make_kind(request.match_info["kind"])
    except InputError as error:
        raise web.HTTPBadRequest(text=error.problem) from error


def cas_of(request: web.Request) -> int | None:
    text = request.query.get("cas", "")
    if not text:
        return None
    if not re.fullmatch(r"\d{1,19}", text):
        raise web.HTTPBadRequest(text=f"Bad cas value: {text[:40]!r}")
    return int(text)


def waiting_of(request: web.Request) -> tuple[int, float]:
    """The index to wait beyond (0: do not wait), and for how long at most, in seconds, jitter included."""
    asked = request.query.get("index", "0")
    if not re.fullmatch(r"\d{1,19}", asked):
        raise web.HTTPBadRequest(text="Invalid index")
    wait_s = DEFAULT_WAIT_S
    if "wait" in request.query:
        said = durations.parse(request.query["wait"])
        if said is None:
            raise web.HTTPBadRequest(text="Invalid wait time")
        wait_s = min(said or DEFAULT_WAIT_S, MAX_WAIT_S)
    return int(asked), wait_s + random.uniform(0.0, wait_s / JITTER)  # noqa: S311 - no secret


async def entry_of(request: web.Request) -> Entry:
    """The config entry in a body. What it says of its tenancy has to agree with the query."""
    raw = await _object(request)
    try:
        entry = from_consul(in_tenancy(raw, said_tenancy(request)))
    except InputError as error:
        raise web.HTTPBadRequest(text=f"Request decoding failed: {error}") from error
    return entry


def said_tenancy(request: web.Request) -> dict[str, str]:
    """Namespace and partition by their field's name, as far as the query says them."""
    said = {
        "Namespace": _tenant(request, "ns", "X-Consul-Namespace"),
        "Partition": _tenant(request, "partition", "X-Consul-Partition"),
    }
    return {field: tenant for field, tenant in said.items() if tenant}


def in_tenancy(raw: dict[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """An entry with the tenancy that was said beside it. InputError when it says another itself."""
    for field, tenant in said.items():
        key = next((key for key in raw if folded(key) == folded(field)), field)
        if raw.get(key) not in (None, "", tenant):
            raise InputError(
                f"{field} is {str(raw[key])[:80]!r} in the body and {tenant!r} in the query"
            )
        raw = raw | {key: tenant}
    return raw


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """Consul's api.CatalogRegistration."""

    node: Node
    service: Service | None
    skip_node_update: bool
    """The node is left as it is when it exists."""


async def registration_of(request: web.Request, datacenter: str) -> Registration:
    """The node, and a service on it, in a body."""
    body = await _folded_object(request)
    check_datacenter(str(body.get("datacenter", "")), datacenter)
    said = said_tenancy(request)
    if body.get("check") or body.get("checks"):
        raise web.HTTPBadRequest(
            text="Health checks are not supported: every service that is registered counts as passing"
        )
    skip = body.get("skipnodeupdate") is True
    partition = body.get("partition") or said.get("Partition", DEFAULT_TENANT)
    node = _converted(
        {
            "Node": body.get("node", ""),
            "Address": body.get("address", ""),
            "Partition": partition,
            "TaggedAddresses": body.get("taggedaddresses", {}),
            "Meta": body.get("nodemeta", {}),
        },
        Node,
    )
    _named(node.node, "Node")
    if not skip or node.address:
        _named(node.address, "Address")
    service = None
    if "service" in body:
        namespace = said.get("Namespace", DEFAULT_TENANT)
        service = _service_of(body["service"], namespace, partition)
    return Registration(node=node, service=service, skip_node_update=skip)


_SERVICE_FIELDS = {
    folded(name): name
    for name in ("ID", "Service", "Namespace", "Kind", "Tags", "Address", "Port", "Meta", "Proxy")
}


def _service_of(raw: Any, namespace: str, partition: str) -> Service:
    given = _folded(raw)
    form: dict[str, Any] = {"Namespace": namespace, "Partition": partition}
    form |= {name: given[key] for key, name in _SERVICE_FIELDS.items() if key in given}
    tagged = given.get("taggedaddresses", {})
    if isinstance(tagged, dict):
        form["TaggedAddresses"] = {
            tag: {key.capitalize(): value for key, value in _folded(one).items()}
            for tag, one in tagged.items()
        }
    if "Service" not in form:
        raise web.HTTPBadRequest(text="Request decoding failed: Service.Service is missing")
    service = _converted(form, Service)
    _named(service.service, "Service.Service")
    if not is_name(service.namespace):
        raise web.HTTPBadRequest(text=f"Invalid Service.Namespace {service.namespace[:80]!r}")
    service = msgspec.structs.replace(service, id=service.id or service.service)
    _named(service.id, "Service.ID")
    if not 0 <= service.port <= 65535:
        raise web.HTTPBadRequest(text=f"Invalid Service.Port {service.port}")
    return service


class Deregistration(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    service_id: str | None
    """None: the node, with all that is on it."""
    tenancy: Tenancy
    nothing: bool
    """Only a health check is meant, of which there are none."""


async def deregistration_of(request: web.Request, datacenter: str) -> Deregistration:
    """What a body of Consul's api.CatalogDeregistration takes out of the catalog."""
    body = await _folded_object(request)
    check_datacenter(str(body.get("datacenter", "")), datacenter)
    said = said_tenancy(request)
    texts = {key: body.get(key) or "" for key in ("node", "serviceid", "checkid")}
    texts["namespace"] = body.get("namespace") or said.get("Namespace", DEFAULT_TENANT)
    texts["partition"] = body.get("partition") or said.get("Partition", DEFAULT_TENANT)
    for key, text in texts.items():
        if not isinstance(text, str):
            raise web.HTTPBadRequest(text=f"Request decoding failed: {key} is no text")
    return Deregistration(
        node=_named(texts["node"], "Node"),
        service_id=texts["serviceid"] or None,
        tenancy=Tenancy(texts["namespace"], texts["partition"]),
        nothing=bool(texts["checkid"]) and not texts["serviceid"],
    )


def check_datacenter(asked: str, own: str) -> None:
    """Refuses what is for another datacenter, as a Consul server does that knows no way there."""
    if asked and asked != own:
        raise web.HTTPInternalServerError(text="No path to datacenter")


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"Request decoding failed: {error}") from error


async def _folded_object(request: web.Request) -> dict[str, Any]:
    return _folded(await _object(request))


def _folded(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise web.HTTPBadRequest(text="Request decoding failed: expected an object")
    return {folded(key): value for key, value in raw.items() if value is not None}


def _converted(form: dict[str, Any], shape: type[T]) -> T:
    try:
        return msgspec.convert(form, type=shape)
    except msgspec.ValidationError as error:
        raise web.HTTPBadRequest(text=f"Request decoding failed: {error}") from error


def _named(text: str, field: str) -> str:
    if not 0 < len(text) <= _LONGEST_NAME or not text.isprintable():
        raise web.HTTPBadRequest(text=f"Must provide {field}: 1 to {_LONGEST_NAME} characters")
    return text
