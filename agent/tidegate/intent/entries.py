"""Consul's config entries: mesh, proxy-defaults, service-defaults, service-intentions.

Reads them in HCL, JSON and YAML (Consul's form and the shape of the Kubernetes CRDs), validates,
writes them back in Consul's JSON, and holds the rule about what may be written (the permissive
gate). Field names and semantics: Consul's agent/structs/config_entry*.go. Knows nothing of stores,
nor of what entries lead to.
"""

import enum
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from tidegate.errors import InputError
from tidegate.intent.documents import read_documents
from tidegate.intent.fields import (
    Choice,
    Field,
    Flag,
    Name,
    NameOrWildcard,
    Number,
    Object,
    Objects,
    OnlyDefault,
    OnlyName,
    Opaque,
    Place,
    Shape,
    Text,
    TextMap,
    Word,
    Words,
    as_object,
    described,
    folded,
    line_of,
    nearest,
)
from tidegate.intent.hcl import Block
from tidegate.model import MutualTLSMode

MESH_NAME = "mesh"
PROXY_DEFAULTS_NAME = "global"
WILDCARD = "*"

CRD_API_VERSION = "consul.hashicorp.com/v1alpha1"

MAX_INDEX = (1 << 63) - 1


class Kind(enum.StrEnum):
    """Kinds of config entries that tidegate knows."""

    MESH = "mesh"
    PROXY_DEFAULTS = "proxy-defaults"
    SERVICE_DEFAULTS = "service-defaults"
    SERVICE_INTENTIONS = "service-intentions"


class Action(enum.StrEnum):
    """What an intention does with a connection."""

    ALLOW = "allow"
    DENY = "deny"


class MeshTransparentProxy(msgspec.Struct, frozen=True, kw_only=True):
    mesh_destinations_only: bool = False


class DirectionalTLS(msgspec.Struct, frozen=True, kw_only=True):
    tls_min_version: str = ""
    tls_max_version: str = ""
    cipher_suites: tuple[str, ...] = ()


class MeshTLS(msgspec.Struct, frozen=True, kw_only=True):
    incoming: DirectionalTLS = DirectionalTLS()
    outgoing: DirectionalTLS = DirectionalTLS()


class _Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What every entry has. `kind` tells entries apart, in msgspec's JSON too."""

    meta: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0
    """Index of the last change, 0 for an entry that is not from a store."""


class Mesh(_Entry, frozen=True, kw_only=True, tag=str(Kind.MESH)):
    """The settings of the whole mesh. There is one, named "mesh"."""

    kind: ClassVar[Kind] = Kind.MESH
    allow_enabling_permissive_mutual_tls: bool = False
    transparent_proxy: MeshTransparentProxy = MeshTransparentProxy()
    tls: MeshTLS = MeshTLS()

    @property
    def name(self) -> str:
        return MESH_NAME


class TransparentProxy(msgspec.Struct, frozen=True, kw_only=True):
    outbound_listener_port: int = 0
    """0: the default port."""
    dialed_directly: bool = False


class ProxyDefaults(_Entry, frozen=True, kw_only=True, tag=str(Kind.PROXY_DEFAULTS)):
    """Defaults for every proxy. There is one, named "global"."""

    kind: ClassVar[Kind] = Kind.PROXY_DEFAULTS
    mode: str = ""
    transparent_proxy: TransparentProxy = TransparentProxy()
    mutual_tls_mode: MutualTLSMode | None = None
    """None says nothing (Consul: "")."""
    config: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return PROXY_DEFAULTS_NAME


class ServiceDefaults(_Entry, frozen=True, kw_only=True, tag=str(Kind.SERVICE_DEFAULTS)):
    """Settings of one service, over those of proxy-defaults."""

    kind: ClassVar[Kind] = Kind.SERVICE_DEFAULTS
    name: str = ""
    protocol: str = ""
    mode: str = ""
    transparent_proxy: TransparentProxy = TransparentProxy()
    mutual_tls_mode: MutualTLSMode | None = None
    """None inherits (Consul: "")."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Who an intention is about, and what happens to them."""

    name: str = ""
    """Service name or "*"."""
    action: Action | None = None
    """None only while an entry is being read: an entry that has been read says which."""
    precedence: int = 0
    description: str = ""


class ServiceIntentions(_Entry, frozen=True, kw_only=True, tag=str(Kind.SERVICE_INTENTIONS)):
    """Who may connect to one service, or, named "*", to all. Sources are sorted by precedence."""

    kind: ClassVar[Kind] = Kind.SERVICE_INTENTIONS
    name: str = ""
    sources: tuple[Source, ...] = ()


Entry = Mesh | ProxyDefaults | ServiceDefaults | ServiceIntentions
ModeEntry = ProxyDefaults | ServiceDefaults


_LATER_KINDS = (
    "api-gateway",
    "bound-api-gateway",
    "control-plane-request-limit",
    "exported-services",
    "file-system-certificate",
    "http-route",
    "ingress-gateway",
    "inline-certificate",
    "jwt-provider",
    "rate-limit",
    "sameness-group",
    "service-resolver",
    "service-router",
    "service-splitter",
    "tcp-route",
    "terminating-gateway",
)

_CRD_KINDS = {
    "Mesh": Kind.MESH,
    "ProxyDefaults": Kind.PROXY_DEFAULTS,
    "ServiceDefaults": Kind.SERVICE_DEFAULTS,
    "ServiceIntentions": Kind.SERVICE_INTENTIONS,
}

_TLS_VERSIONS = ("TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3")
_TLS_AUTO = "TLS_AUTO"

_CIPHER_SUITES = (
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
)
"""Consul types/tls.go: the suites that Envoy takes up to TLS 1.2."""

_MUTUAL_TLS_MODE = Choice(
    MutualTLSMode, 'Invalid MutualTLSMode "{}". Must be one of "", "strict", or "permissive".'
)
_ACTION = Choice(Action, 'Invalid Action "{}". Must be "allow" or "deny".')
_PROXY_MODE = Word(("transparent",), later=("direct",))

_TENANCY = (Field("Namespace", "", OnlyDefault()), Field("Partition", "", OnlyDefault()))
_BOOKKEEPING = (
    Field("Meta", "meta", TextMap()),
    Field("CreateIndex", "create_index", Number(0, MAX_INDEX), always=True),
    Field("ModifyIndex", "modify_index", Number(0, MAX_INDEX), always=True),
)

_DIRECTIONAL_TLS = Shape(
    DirectionalTLS,
    (
        Field("TLSMinVersion", "tls_min_version", Word((*_TLS_VERSIONS, _TLS_AUTO))),
        Field("TLSMaxVersion", "tls_max_version", Word((*_TLS_VERSIONS, _TLS_AUTO))),
        Field("CipherSuites", "cipher_suites", Words(_CIPHER_SUITES)),
    ),
    later=("ECDHCurves",),
)
_MESH_TLS = Shape(
    MeshTLS,
    (
        Field("Incoming", "incoming", Object(_DIRECTIONAL_TLS)),
        Field("Outgoing", "outgoing", Object(_DIRECTIONAL_TLS)),
    ),
)
_MESH_TRANSPARENT_PROXY = Shape(
    MeshTransparentProxy,
    (Field("MeshDestinationsOnly", "mesh_destinations_only", Flag(), always=True),),
)
_TRANSPARENT_PROXY = Shape(
    TransparentProxy,
    (
        Field("OutboundListenerPort", "outbound_listener_port", Number(0, 65535)),
        Field("DialedDirectly", "dialed_directly", Flag()),
    ),
)
_SOURCE = Shape(
    Source,
    (
        Field("Name", "name", NameOrWildcard()),
        Field("Action", "action", _ACTION),
        Field("Precedence", "precedence", Number(0, 9)),
        Field("Type", "", Word(("consul",))),
        Field("Description", "description", Text()),
        *_TENANCY,
    ),
    later=("Peer", "SamenessGroup", "Permissions"),
    derived=("LegacyID", "LegacyMeta", "LegacyCreateTime", "LegacyUpdateTime"),
)

_SHAPES: dict[Kind, Shape[Any]] = {
    Kind.MESH: Shape(
        Mesh,
        (
            Field("Name", "", OnlyName(MESH_NAME)),
            *_TENANCY,
            Field(
                "TransparentProxy",
                "transparent_proxy",
                Object(_MESH_TRANSPARENT_PROXY),
                always=True,
            ),
            Field(
                "AllowEnablingPermissiveMutualTLS", "allow_enabling_permissive_mutual_tls", Flag()
            ),
            Field("TLS", "tls", Object(_MESH_TLS)),
            *_BOOKKEEPING,
        ),
        later=("ValidateClusters", "HTTP", "Peering"),
        derived=("Hash",),
    ),
    Kind.PROXY_DEFAULTS: Shape(
        ProxyDefaults,
        (
            Field("Name", "", OnlyName(PROXY_DEFAULTS_NAME)),
            *_TENANCY,
            Field("Config", "config", Opaque()),
            Field("Mode", "mode", _PROXY_MODE),
            Field("TransparentProxy", "transparent_proxy", Object(_TRANSPARENT_PROXY), always=True),
            Field("MutualTLSMode", "mutual_tls_mode", _MUTUAL_TLS_MODE, always=True),
            *_BOOKKEEPING,
        ),
        later=(
            "MeshGateway",
            "Expose",
            "AccessLogs",
            "EnvoyExtensions",
            "FailoverPolicy",
            "PrioritizeByLocality",
        ),
        derived=("Hash",),
    ),
    Kind.SERVICE_DEFAULTS: Shape(
        ServiceDefaults,
        (
            Field("Name", "name", Name(), always=True),
            *_TENANCY,
            Field("Protocol", "protocol", Word(("tcp", "http", "http2", "grpc"))),
            Field("Mode", "mode", _PROXY_MODE),
            Field("TransparentProxy", "transparent_proxy", Object(_TRANSPARENT_PROXY), always=True),
            Field("MutualTLSMode", "mutual_tls_mode", _MUTUAL_TLS_MODE, always=True),
            *_BOOKKEEPING,
        ),
        later=(
            "MeshGateway",
            "Expose",
            "ExternalSNI",
            "UpstreamConfig",
            "Destination",
            "MaxInboundConnections",
            "LocalConnectTimeoutMs",
            "LocalRequestTimeoutMs",
            "BalanceInboundConnections",
            "RateLimits",
            "EnvoyExtensions",
        ),
        derived=("Hash",),
    ),
    Kind.SERVICE_INTENTIONS: Shape(
        ServiceIntentions,
        (
            Field("Name", "name", NameOrWildcard(), always=True),
            *_TENANCY,
            Field("Sources", "sources", Objects(_SOURCE), always=True),
            *_BOOKKEEPING,
        ),
        later=("JWT",),
        derived=("Hash",),
    ),
}


def parse_entries(text: str, source: str) -> tuple[Entry, ...]:
    """Every config entry in a text in HCL, JSON or YAML, in order.

    `source` is the file's name or "-", for messages. Raises InputError with line or field, or
    InputErrors when several things are wrong.
    """
    documents = read_documents(text, source)
    place = Place([], source)
    if not documents:
        place.fault("no config entry", 'an entry such as `Kind = "mesh"`')
    entries = []
    for index, document in enumerate(documents):
        known_lines = any(document.lines.values())
        prefix = f"[{index}]" if len(documents) > 1 and not known_lines else ""
        entries.append(_decode(document, place._replace(path=prefix)))
    place.raise_faults()
    return tuple(entry for entry in entries if entry is not None)


def from_consul(raw: Mapping[str, Any], source: str = "") -> Entry:
    """One config entry from an object in Consul's JSON (or of the CRD shape).

    Raises InputError or InputErrors.
    """
    place = Place([], source)
    entry = _decode(raw, place)
    place.raise_faults()
    if entry is None:
        raise AssertionError("an entry that could not be read has a fault")
    return entry


def to_consul(entry: Entry) -> dict[str, Any]:
    """The entry as Consul's HTTP API writes it."""
    head = {"Kind": str(entry.kind)}
    if not isinstance(entry, Mesh):
        head["Name"] = entry.name
    return head | _SHAPES[entry.kind].encode(entry)


def make_kind(word: str) -> Kind:
    """The kind of that name; raises InputError as Consul words it for any other."""
    try:
        return Kind(word)
    except ValueError:
        known = "not supported yet" if word in _LATER_KINDS else nearest(word, Kind)
        raise InputError(f"invalid config entry kind: {word}", expected=known) from None


def precedence(destination: str, source: str) -> int:
    """Precedence of an intention: the higher wins (Consul's Intention.UpdatePrecedence)."""
    most = 6 if destination == WILDCARD else 9
    return most - 1 if source == WILDCARD else most


def check_write(existing: Entry | None, proposed: Entry, mesh_entry: Mesh | None) -> None:
    """Raises InputError unless `proposed` may replace `existing`: Consul's permissive gate.

    An entry may *become* permissive only while the mesh entry allows it; one that is may stay so.
    """
    if not isinstance(proposed, ModeEntry):
        return
    before = existing.mutual_tls_mode if isinstance(existing, ModeEntry) else None
    if (
        proposed.mutual_tls_mode is not MutualTLSMode.PERMISSIVE
        or before is proposed.mutual_tls_mode
    ):
        return
    if mesh_entry is None or not mesh_entry.allow_enabling_permissive_mutual_tls:
        raise InputError(
            "cannot set MutualTLSMode=permissive because AllowEnablingPermissiveMutualTLS=false "
            "in the mesh config entry"
        )


_HOW_TO_LIST = "`tidegate config list -kind service-defaults`"


def warning_for(entry: Entry) -> str | None:
    """What to warn of after this entry was written, None when there is nothing."""
    match entry:
        case ServiceDefaults(mutual_tls_mode=MutualTLSMode.PERMISSIVE):
            return (
                "MutualTLSMode=permissive is insecure. Plaintext connections to this service "
                "bypass intentions until it is `strict`; "
                f"`tidegate ready {entry.name}` says when that is safe."
            )
        case ProxyDefaults(mutual_tls_mode=MutualTLSMode.PERMISSIVE):
            return (
                "MutualTLSMode=permissive is insecure. It holds for every service without a mode "
                "of its own; prefer `strict` here, and `permissive` in service-defaults where "
                "needed. "
                f"Services with settings of their own: {_HOW_TO_LIST}."
            )
        case Mesh(allow_enabling_permissive_mutual_tls=True):
            return (
                "AllowEnablingPermissiveMutualTLS=true allows insecure MutualTLSMode=permissive "
                "in proxy-defaults and service-defaults. Setting it back to false stops more "
                "services from becoming permissive and changes none that is. "
                f"Look among {_HOW_TO_LIST} for those that are."
            )
    return None


def _decode(raw: Mapping[str, Any], place: Place) -> Entry | None:
    keys = {folded(key): key for key in raw}
    converted = _from_crd(raw, place) if "apiversion" in keys else _from_plain(raw, keys, place)
    if converted is None:
        return None
    kind, fields = converted
    entry: Entry = _SHAPES[kind].decode(fields, place)
    _check_required(kind, fields, place)
    return _finished(entry, place)


def _from_plain(
    raw: Mapping[str, Any], keys: Mapping[str, str], place: Place
) -> tuple[Kind, Mapping[str, Any]] | None:
    key = keys.get("kind")
    if key is None:
        place.fault(
            "Payload does not contain a kind/Kind key at the top level", 'such as Kind = "mesh"'
        )
        return None
    kind = _kind(raw[key], Kind, place.inside("Kind", line_of(raw, key)))
    return (kind, _without(raw, key)) if kind else None


def _kind(raw: Any, known: Any, place: Place) -> Any:
    """The kind by one of the `known` names (an enum, or a mapping from a name to the enum)."""
    if not isinstance(raw, str):
        place.fault("Kind value in payload is not a string", nearest("", known))
        return None
    if raw in list(known):
        return Kind(raw) if known is Kind else known[raw]
    if raw in _LATER_KINDS:
        place.fault(f"kind {raw!r} is not supported yet", nearest("", known))
    else:
        place.fault(f"invalid config entry kind: {described(raw)}", nearest(raw, known))
    return None


def _from_crd(raw: Mapping[str, Any], place: Place) -> tuple[Kind, Mapping[str, Any]] | None:
    for key in raw:
        if key not in ("apiVersion", "kind", "metadata", "spec", "status"):
            place.inside(key, line_of(raw, key)).fault(
                "is not a field here", "apiVersion, kind, metadata, spec"
            )
    if raw.get("apiVersion") != CRD_API_VERSION:
        place.inside("apiVersion", line_of(raw, "apiVersion")).fault(
            f"{described(raw.get('apiVersion'))} is not known", CRD_API_VERSION
        )
    kind = _kind(raw.get("kind"), _CRD_KINDS, place.inside("kind", line_of(raw, "kind")))
    metadata = as_object(
        raw.get("metadata", {}), place.inside("metadata", line_of(raw, "metadata"))
    )
    spec_place = place.inside("spec", line_of(raw, "spec"))
    spec = as_object(raw.get("spec") or {}, spec_place)
    if kind is None:
        return None
    fields = _without(spec, "destination")
    name, name_line = metadata.get("name"), line_of(metadata, "name")
    if kind is Kind.SERVICE_INTENTIONS:
        destination = as_object(
            spec.get("destination", {}),
            spec_place.inside("destination", line_of(spec, "destination")),
        )
        name, name_line = destination.get("name"), line_of(destination, "name")
        for key in destination:
            if key not in ("name", "namespace"):
                spec_place.inside("destination").inside(key).fault(
                    "is not a field here", "name, namespace"
                )
        if "namespace" in destination:
            fields.put("Namespace", destination["namespace"], line_of(destination, "namespace"))
    elif "destination" in spec:
        fields.put("destination", spec["destination"], line_of(spec, "destination"))
    if name is not None:
        fields.put("Name", name, name_line)
    return kind, fields


def _without(raw: Mapping[str, Any], key: str) -> Block:
    rest = Block()
    for other, value in raw.items():
        if other != key:
            rest.put(other, value, line_of(raw, other))
    return rest


def _check_required(kind: Kind, fields: Mapping[str, Any], place: Place) -> None:
    """proxy-defaults must be named, as in Consul; service entries cannot be without a name."""
    if kind is Kind.MESH:
        return
    name = next((value for key, value in fields.items() if folded(key) == "name"), None)
    if name in (None, ""):
        expected = f'"{PROXY_DEFAULTS_NAME}"' if kind is Kind.PROXY_DEFAULTS else "a service name"
        place.inside("Name").fault("is missing", expected)


def _finished(entry: Entry, place: Place) -> Entry:
    """The entry with what follows from it filled in, and what contradicts itself reported."""
    match entry:
        case ServiceIntentions():
            return _finished_intentions(entry, place)
        case Mesh():
            _check_tls(entry.tls.incoming, place.inside("TLS").inside("Incoming"))
            _check_tls(entry.tls.outgoing, place.inside("TLS").inside("Outgoing"))
    return entry


def _finished_intentions(entry: ServiceIntentions, place: Place) -> ServiceIntentions:
    if not entry.sources:
        place.inside("Sources").fault("is empty", "at least one source")
    seen: set[str] = set()
    for index, source in enumerate(entry.sources):
        at = place.inside("Sources").element(index)
        if not source.name:
            at.inside("Name").fault("is missing", 'a service name or "*"')
        elif source.name in seen:
            at.inside("Name").fault(f"{source.name} is there twice", "one action for each source")
        seen.add(source.name)
        if source.action is None and not place.faults:
            at.inside("Action").fault("is missing", '"allow" or "deny"')
    ranked = (
        msgspec.structs.replace(source, precedence=precedence(entry.name, source.name))
        for source in entry.sources
    )
    return msgspec.structs.replace(
        entry, sources=tuple(sorted(ranked, key=lambda source: (-source.precedence, source.name)))
    )


def _check_tls(tls: DirectionalTLS, place: Place) -> None:
    low, high = tls.tls_min_version, tls.tls_max_version
    both = low in _TLS_VERSIONS and high in _TLS_VERSIONS
    if both and _TLS_VERSIONS.index(high) < _TLS_VERSIONS.index(low):
        place.inside("TLSMaxVersion").fault(
            f"{high} is less than TLSMinVersion {low}", f"{low} or higher"
        )
    if tls.cipher_suites and low == "TLSv1_3":
        place.inside("CipherSuites").fault(
            "cannot be chosen for TLS 1.3", "TLSMinVersion of TLSv1_2 or lower"
        )
