"""Consul's config entries: mesh, proxy-defaults, service-defaults, service-intentions.

Reads them in HCL, JSON and YAML (Consul's form and the shape of the Kubernetes CRDs), validates,
writes them back in Consul's JSON, and holds the rule about what may be written (the permissive
gate). Field names and semantics: Consul's agent/structs/config_entry*.go. Knows nothing of stores,
nor of what entries lead to.
"""

import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import msgspec

from tidegate.errors import InputError
from tidegate.intent.documents import read_documents
from tidegate.intent.fields import (
    KEPT,
    Choice,
    Duration,
    Field,
    Flag,
    ListOf,
    Name,
    NameOrWildcard,
    Number,
    Object,
    OnlyDefault,
    OnlyName,
    Place,
    Record,
    Shape,
    Tenant,
    TenantOrWildcard,
    Text,
    TextMap,
    Word,
    as_object,
    described,
    folded,
    line_of,
    nearest,
)
from tidegate.intent.filtering import shapes as filtering
from tidegate.intent.hcl import Block
from tidegate.intent.proxy_fields import (
    EXPOSE,
    MESH_GATEWAY,
    MUTUAL_TLS_MODE,
    NO_ESCAPE,
    NO_EXTENSIONS,
    NO_HTTP,
    NO_LIMITS,
    NO_PEERS,
    OF_NAMESPACE,
    PARTITION,
    PROXY_CONFIG,
    PROXY_MODE,
    TRANSPARENT_PROXY,
    TransparentProxy,
)
from tidegate.model import DEFAULT_TENANT, MutualTLSMode, ServiceName

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


class EntryKey(NamedTuple):
    """What makes an entry the one and no other. There is at most one entry of each key."""

    kind: Kind
    name: str
    namespace: str = DEFAULT_TENANT
    partition: str = DEFAULT_TENANT


class Action(enum.StrEnum):
    """What an intention does with a connection."""

    ALLOW = "allow"
    DENY = "deny"


class MeshTransparentProxy(msgspec.Struct, frozen=True, kw_only=True):
    mesh_destinations_only: bool = False
    rest: dict[str, Any] = {}


class DirectionalTLS(msgspec.Struct, frozen=True, kw_only=True):
    tls_min_version: str = ""
    tls_max_version: str = ""
    cipher_suites: tuple[str, ...] = ()
    rest: dict[str, Any] = {}


class MeshTLS(msgspec.Struct, frozen=True, kw_only=True):
    incoming: DirectionalTLS = DirectionalTLS()
    outgoing: DirectionalTLS = DirectionalTLS()
    rest: dict[str, Any] = {}


class _Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What every entry has. `kind` tells entries apart, in msgspec's JSON too."""

    namespace: str = DEFAULT_TENANT
    """Always the default for mesh and proxy-defaults, which hold for a whole partition."""
    partition: str = DEFAULT_TENANT
    meta: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0
    """Index of the last change, 0 for an entry that is not from a store."""
    rest: dict[str, Any] = {}
    """What Consul has for this kind and tidegate only keeps, in Consul's JSON."""

    @property
    def key(self) -> EntryKey:
        entry = cast("Entry", self)
        return EntryKey(entry.kind, entry.name, entry.namespace, entry.partition)


class Mesh(_Entry, frozen=True, kw_only=True, tag=str(Kind.MESH)):
    """The settings of the whole mesh. There is one, named "mesh"."""

    kind: ClassVar[Kind] = Kind.MESH
    allow_enabling_permissive_mutual_tls: bool = False
    transparent_proxy: MeshTransparentProxy = MeshTransparentProxy()
    tls: MeshTLS = MeshTLS()

    @property
    def name(self) -> str:
        return MESH_NAME


class AccessLogs(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = False
    rest: dict[str, Any] = {}


class ProxyDefaults(_Entry, frozen=True, kw_only=True, tag=str(Kind.PROXY_DEFAULTS)):
    """Defaults for every proxy. There is one, named "global"."""

    kind: ClassVar[Kind] = Kind.PROXY_DEFAULTS
    mode: str = ""
    transparent_proxy: TransparentProxy = TransparentProxy()
    mutual_tls_mode: MutualTLSMode | None = None
    """None says nothing (Consul: "")."""
    access_logs: AccessLogs = AccessLogs()
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

    @property
    def service(self) -> ServiceName:
        return ServiceName(self.name, self.namespace, self.partition)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Who an intention is about, and what happens to them."""

    name: str = ""
    """Service name or "*"."""
    namespace: str = DEFAULT_TENANT
    """Name of a namespace or "*". Where a source says none, it is the entry's, or the default if that is "*"."""
    partition: str = DEFAULT_TENANT
    """As namespace, but never "*"."""
    action: Action | None = None
    """None only while an entry is being read: an entry that has been read says which."""
    precedence: int = 0
    type: str = "consul"
    """There is no other."""
    description: str = ""
    rest: dict[str, Any] = {}
    """What only Consul itself can act on, such as Permissions: there only where a Consul server has it."""

    @property
    def service(self) -> ServiceName:
        """Whom it is about; name, or namespace and name, may be "*"."""
        return ServiceName(self.name, self.namespace, self.partition)


class ServiceIntentions(_Entry, frozen=True, kw_only=True, tag=str(Kind.SERVICE_INTENTIONS)):
    """Who may connect to one service, or, named "*", to all of a namespace, or, its namespace "*" too, to all.

    Sources are sorted by precedence.
    """

    kind: ClassVar[Kind] = Kind.SERVICE_INTENTIONS
    name: str = ""
    sources: tuple[Source, ...] = ()

    @property
    def service(self) -> ServiceName:
        """The destination; name, or namespace and name, may be "*"."""
        return ServiceName(self.name, self.namespace, self.partition)


Entry = Mesh | ProxyDefaults | ServiceDefaults | ServiceIntentions
ModeEntry = ProxyDefaults | ServiceDefaults


_OTHER_KINDS = (
    "api-gateway",
    "bound-api-gateway",
    "control-plane-request-limit",
    "exported-services",
    "file-system-certificate",
    "http-route",
    "ingress-gateway",
    "inline-certificate",
    "jwt-provider",
    "sameness-group",
    "service-resolver",
    "service-router",
    "service-splitter",
    "tcp-route",
    "terminating-gateway",
)
"""What Consul knows and tidegate does nothing with."""

_CRD_KINDS = {
    "Mesh": Kind.MESH,
    "ProxyDefaults": Kind.PROXY_DEFAULTS,
    "ServiceDefaults": Kind.SERVICE_DEFAULTS,
    "ServiceIntentions": Kind.SERVICE_INTENTIONS,
}
_OTHER_CRD_KINDS = (
    "ControlPlaneRequestLimit",
    "ExportedServices",
    "GatewayPolicy",
    "IngressGateway",
    "JWTProvider",
    "PeeringAcceptor",
    "PeeringDialer",
    "RouteAuthFilter",
    "RouteRetryFilter",
    "RouteTimeoutFilter",
    "SamenessGroup",
    "ServiceResolver",
    "ServiceRouter",
    "ServiceSplitter",
    "TerminatingGateway",
)

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

_ACTION = Choice(Action, 'Invalid Action "{}". Must be "allow" or "deny".')
_OF_PARTITION = (PARTITION, Field("Namespace", "namespace", OnlyDefault(), always=True))
_OF_ANY_NAMESPACE = (PARTITION, Field("Namespace", "namespace", TenantOrWildcard(), always=True))
_BOOKKEEPING = (
    Field("Meta", "meta", TextMap()),
    Field("CreateIndex", "create_index", Number(0, MAX_INDEX), always=True),
    Field("ModifyIndex", "modify_index", Number(0, MAX_INDEX), always=True),
)

_COUNT = Number(0, (1 << 31) - 1)
_PROTOCOL = Word(("tcp", "http", "http2", "grpc"))
"""Sidecars treat every protocol as tcp."""

_UPSTREAM = Record(
    ("Name", NameOrWildcard()),
    ("Partition", Tenant()),
    ("Namespace", Tenant()),
    ("Protocol", _PROTOCOL),
    ("ConnectTimeoutMs", _COUNT),
    ("MeshGateway", MESH_GATEWAY),
    ("BalanceOutboundConnections", Word(("exact_balance",))),
    (
        "PassiveHealthCheck",
        Record(
            ("Interval", Duration()),
            ("MaxFailures", _COUNT),
            ("EnforcingConsecutive5xx", Number(0, 100)),
            ("MaxEjectionPercent", Number(0, 100)),
            ("BaseEjectionTime", Duration()),
        ),
    ),
    refused={
        "Limits": NO_LIMITS,
        "EnvoyListenerJSON": NO_ESCAPE,
        "EnvoyClusterJSON": NO_ESCAPE,
    },
)
_UPSTREAM_CONFIG = Record(("Defaults", _UPSTREAM), ("Overrides", ListOf(_UPSTREAM)))
_ONE_LOG = "tidegate's sidecars log plaintext connections to a file of their own"
_ACCESS_LOGS = Shape(
    AccessLogs,
    (Field("Enabled", "enabled", Flag()), Field("DisableListenerLogs", KEPT, Flag())),
    refused={
        "Type": _ONE_LOG,
        "Path": _ONE_LOG,
        "JSONFormat": _ONE_LOG,
        "TextFormat": _ONE_LOG,
    },
)
_FAILOVER_POLICY = Record(
    ("Mode", Word(("sequential", "order-by-locality"))), ("Regions", ListOf[str](Text()))
)

_DIRECTIONAL_TLS = Shape(
    DirectionalTLS,
    (
        Field("TLSMinVersion", "tls_min_version", Word((*_TLS_VERSIONS, _TLS_AUTO))),
        Field("TLSMaxVersion", "tls_max_version", Word((*_TLS_VERSIONS, _TLS_AUTO))),
        Field("CipherSuites", "cipher_suites", ListOf[str](Word(_CIPHER_SUITES))),
    ),
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
_SOURCE = Shape(
    functools.partial(Source, namespace="", partition=""),
    (
        Field("Name", "name", NameOrWildcard(), always=True),
        *_OF_ANY_NAMESPACE,
        Field("Action", "action", _ACTION),
        Field("Precedence", "precedence", Number(0, 9)),
        Field("Type", "type", Word(("consul",))),
        Field("Description", "description", Text()),
    ),
    required={"Name": 'a service name or "*"', "Action": '"allow" or "deny"'},
    refused={
        "Permissions": NO_HTTP,
        "Peer": NO_PEERS,
        "SamenessGroup": NO_PEERS,
        "LegacyMeta": "Consul refuses it in new entries too",
    },
    derived=("LegacyID", "LegacyCreateTime", "LegacyUpdateTime"),
)

_SHAPES: dict[Kind, Shape[Any]] = {
    Kind.MESH: Shape(
        Mesh,
        (
            Field("Name", "", OnlyName(MESH_NAME)),
            *_OF_PARTITION,
            Field(
                "TransparentProxy",
                "transparent_proxy",
                Object(_MESH_TRANSPARENT_PROXY),
                always=True,
            ),
            Field(
                "AllowEnablingPermissiveMutualTLS", "allow_enabling_permissive_mutual_tls", Flag()
            ),
            Field("ValidateClusters", KEPT, Flag()),
            Field("TLS", "tls", Object(_MESH_TLS)),
            Field("Peering", KEPT, Record(("PeerThroughMeshGateways", Flag()))),
            *_BOOKKEEPING,
        ),
        refused={"HTTP": NO_HTTP},
        derived=("Hash",),
    ),
    Kind.PROXY_DEFAULTS: Shape(
        ProxyDefaults,
        (
            Field("Name", "", OnlyName(PROXY_DEFAULTS_NAME)),
            *_OF_PARTITION,
            Field("Mode", "mode", PROXY_MODE),
            Field("TransparentProxy", "transparent_proxy", TRANSPARENT_PROXY, always=True),
            Field("MutualTLSMode", "mutual_tls_mode", MUTUAL_TLS_MODE, always=True),
            Field("Config", "config", PROXY_CONFIG),
            Field("MeshGateway", KEPT, MESH_GATEWAY, always=True),
            Field("Expose", KEPT, EXPOSE, always=True),
            Field("AccessLogs", "access_logs", Object(_ACCESS_LOGS), always=True),
            Field("FailoverPolicy", KEPT, _FAILOVER_POLICY),
            Field("PrioritizeByLocality", KEPT, Record(("Mode", Word(("none", "failover"))))),
            *_BOOKKEEPING,
        ),
        required={"Name": f'"{PROXY_DEFAULTS_NAME}"'},
        refused={"EnvoyExtensions": NO_EXTENSIONS},
        derived=("Hash",),
    ),
    Kind.SERVICE_DEFAULTS: Shape(
        ServiceDefaults,
        (
            Field("Name", "name", Name(), always=True),
            *OF_NAMESPACE,
            Field("Protocol", "protocol", _PROTOCOL),
            Field("Mode", "mode", PROXY_MODE),
            Field("TransparentProxy", "transparent_proxy", TRANSPARENT_PROXY, always=True),
            Field("MutualTLSMode", "mutual_tls_mode", MUTUAL_TLS_MODE, always=True),
            Field("MeshGateway", KEPT, MESH_GATEWAY, always=True),
            Field("Expose", KEPT, EXPOSE, always=True),
            Field("UpstreamConfig", KEPT, _UPSTREAM_CONFIG),
            Field("LocalConnectTimeoutMs", KEPT, _COUNT),
            Field("LocalRequestTimeoutMs", KEPT, _COUNT),
            Field("BalanceInboundConnections", KEPT, Word(("exact_balance",))),
            *_BOOKKEEPING,
        ),
        required={"Name": "a service name"},
        refused={
            "ExternalSNI": "tidegate's sidecars call services by the names of their mesh",
            "Destination": "what is outside the mesh is reached directly, or not at all with MeshDestinationsOnly",
            "MaxInboundConnections": NO_LIMITS,
            "RateLimits": NO_LIMITS,
            "EnvoyExtensions": NO_EXTENSIONS,
        },
        derived=("Hash",),
    ),
    Kind.SERVICE_INTENTIONS: Shape(
        ServiceIntentions,
        (
            Field("Name", "name", NameOrWildcard(), always=True),
            *_OF_ANY_NAMESPACE,
            Field("Sources", "sources", ListOf[Source](Object(_SOURCE)), always=True),
            *_BOOKKEEPING,
        ),
        required={"Name": 'a service name or "*"', "Sources": "at least one source"},
        refused={"JWT": NO_HTTP},
        derived=("Hash",),
    ),
}


def parse_entries(text: str, source: str) -> tuple[Entry, ...]:
    """Every config entry in a text in HCL, JSON or YAML, in order.

    `source` is the file's name or "-", for messages. Raises InputError with line and field, or
    InputErrors when several things are wrong.
    """
    documents = _without_lists(read_documents(text, source))
    place = Place([], source)
    if not documents:
        place.fault("no config entry", 'an entry such as `Kind = "mesh"`')
    entries = [_decode(document, place._replace(line=document.line)) for document in documents]
    place.raise_faults()
    return tuple(entry for entry in entries if entry is not None)


def from_consul(raw: Mapping[str, Any], source: str = "") -> Entry:
    """One config entry that somebody wrote, from an object in Consul's JSON (or of the CRD shape).

    Raises InputError or InputErrors.
    """
    return _read(raw, Place([], source))


def from_server(raw: Mapping[str, Any], source: str = "") -> Entry:
    """One config entry that a Consul server has, which may say more than tidegate supports or knows: that is kept.

    Raises InputError or InputErrors for what is no entry of a known kind.
    """
    return _read(raw, Place([], source, lenient=True))


def _read(raw: Mapping[str, Any], place: Place) -> Entry:
    entry = _decode(raw, place)
    place.raise_faults()
    if entry is None:
        raise AssertionError("an entry that could not be read has a fault")
    return entry


def _without_lists(documents: tuple[Block, ...]) -> tuple[Block, ...]:
    """The documents, a `List` of kubectl's being its items."""
    found: list[Block] = []
    for document in documents:
        items = document.get("items")
        is_list = document.get("apiVersion") == "v1" and document.get("kind") == "List"
        if is_list and isinstance(items, list) and all(isinstance(one, Block) for one in items):
            found += items
        else:
            found.append(document)
    return tuple(found)


def to_consul(entry: Entry) -> dict[str, Any]:
    """The entry as Consul's HTTP API writes it."""
    head = {"Kind": str(entry.kind)}
    if not isinstance(entry, Mesh):
        head["Name"] = entry.name
    return head | _SHAPES[entry.kind].encode(entry)


def to_request(entry: Entry) -> dict[str, Any]:
    """The entry as a body that every Consul server takes.

    The community edition has no tenancy and refuses its keys (validateUnusedKeys in config_entry.go), old servers
    refuse fields that they do not know: so a default tenancy, and objects that say nothing, are left out.
    """
    full = to_consul(entry)
    body = {name: value for name, value in without_default_tenancy(full).items() if value != {}}
    if isinstance(entry, ServiceIntentions) and entry.service[1:] == (
        DEFAULT_TENANT,
        DEFAULT_TENANT,
    ):
        body["Sources"] = [without_default_tenancy(source) for source in full["Sources"]]
    return body


def without_default_tenancy(raw: Mapping[str, Any]) -> dict[str, Any]:
    """An object in Consul's JSON without a Namespace and a Partition that are the default."""
    return {
        name: value
        for name, value in raw.items()
        if name not in ("Namespace", "Partition") or value != DEFAULT_TENANT
    }


def filter_shape(kind: Kind) -> filtering.Shape:
    """What a filter expression can ask of the entries of a kind, as `to_consul` writes them."""
    return filtering.shape_of({"Kind": str, "Name": str} | _SHAPES[kind].holds)


def make_kind(word: str) -> Kind:
    """The kind of that name; raises InputError as Consul words it for any other."""
    try:
        return Kind(word)
    except ValueError:
        if word in _OTHER_KINDS:
            raise InputError(
                f"config entry kind {word} is not supported: tidegate does nothing with it",
                expected=nearest("", Kind),
            ) from None
        raise InputError(
            f"invalid config entry kind: {word}", expected=nearest(word, Kind)
        ) from None


def precedence(destination: ServiceName, source: ServiceName) -> int:
    """Precedence of an intention: the higher wins (Consul's Intention.UpdatePrecedence)."""
    return 3 + 3 * _exact(destination) - (2 - _exact(source))


def _exact(name: ServiceName) -> int:
    """How many of namespace and name are exact; an exact name cannot follow a wildcard."""
    if name.namespace == WILDCARD:
        return 0
    return 1 if name.name == WILDCARD else 2


def check_write(existing: Entry | None, proposed: Entry, mesh_entry: Mesh | None) -> None:
    """Raises InputError unless `proposed` may replace `existing`: Consul's permissive gate.

    An entry may *become* permissive only while the mesh entry of its partition allows it; one that is may stay so.
    """
    if not isinstance(proposed, ModeEntry):
        return
    before = existing.mutual_tls_mode if isinstance(existing, ModeEntry) else None
    after = proposed.mutual_tls_mode
    if after is not MutualTLSMode.PERMISSIVE or before is after:
        return
    if mesh_entry is None or not mesh_entry.allow_enabling_permissive_mutual_tls:
        raise InputError(
            "cannot set MutualTLSMode=permissive because AllowEnablingPermissiveMutualTLS=false "
            "in the mesh config entry"
        )


_HOW_TO_LIST = (
    "tidegate config list -kind service-defaults -filter 'MutualTLSMode == \"permissive\"'"
)


def warning_for(entry: Entry) -> str | None:
    """What to warn of after this entry was written, None when there is nothing."""
    match entry:
        case ServiceDefaults(mutual_tls_mode=MutualTLSMode.PERMISSIVE):
            return (
                "MutualTLSMode=permissive is insecure. Plaintext connections to this service "
                "bypass intentions until it is `strict`; "
                f"`tidegate ready {entry.service}` says when that is safe."
            )
        case ProxyDefaults(mutual_tls_mode=MutualTLSMode.PERMISSIVE):
            return (
                "MutualTLSMode=permissive is insecure. It holds for every service without a mode "
                "of its own; prefer `strict` here, and `permissive` in service-defaults where "
                "needed. "
                f"Services that are permissive by themselves: `{_HOW_TO_LIST}`."
            )
        case Mesh(allow_enabling_permissive_mutual_tls=True):
            return (
                "AllowEnablingPermissiveMutualTLS=true allows insecure MutualTLSMode=permissive "
                "in proxy-defaults and service-defaults. Setting it back to false stops more "
                "services from becoming permissive and changes none that is. "
                f"Those that are: `{_HOW_TO_LIST}`, and all without a mode of their own if proxy-defaults are."
            )
    return None


def _decode(raw: Mapping[str, Any], place: Place) -> Entry | None:
    keys = {folded(key): key for key in raw}
    converted = _from_crd(raw, place) if "apiversion" in keys else _from_plain(raw, keys, place)
    if converted is None:
        return None
    kind, fields = converted
    entry: Entry = _SHAPES[kind].decode(fields, place)
    return _finished(entry, fields, place)


def _from_plain(
    raw: Mapping[str, Any], keys: Mapping[str, str], place: Place
) -> tuple[Kind, Mapping[str, Any]] | None:
    key = keys.get("kind")
    if key is None:
        place.fault(
            "Payload does not contain a kind/Kind key at the top level", 'such as Kind = "mesh"'
        )
        return None
    if len(others := [one for one in raw if folded(one) == "kind"]) > 1:
        at = place.inside("Kind", line_of(raw, key))
        at.fault(f"is set twice, as {others[0]} and as {others[1]}", "one value")
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
    if raw in (*_OTHER_KINDS, *_OTHER_CRD_KINDS):
        place.fault(
            f"kind {raw!r} is not supported: tidegate does nothing with it", nearest("", known)
        )
    else:
        place.fault(f"invalid config entry kind: {described(raw)}", nearest(raw, known))
    return None


def _from_crd(raw: Mapping[str, Any], place: Place) -> tuple[Kind, Mapping[str, Any]] | None:
    """Kind and fields of a custom resource, named as it is, or, for intentions, as its destination.

    Its namespace is one of Kubernetes, which says nothing of Consul's: as with consul-k8s when it does not mirror
    namespaces, everything is in the default one, but for what `spec` names itself.
    """
    faults = len(place.faults)
    for key in raw:
        if key not in ("apiVersion", "kind", "metadata", "spec", "status"):
            place.inside(key, line_of(raw, key)).fault(
                "is not a field here", "apiVersion, kind, metadata, spec"
            )
    if raw.get("apiVersion", CRD_API_VERSION) != CRD_API_VERSION:
        place.inside("apiVersion", line_of(raw, "apiVersion")).fault(
            f"{described(raw['apiVersion'])} is not known", CRD_API_VERSION
        )
    kind = _kind(raw.get("kind"), _CRD_KINDS, place.inside("kind", line_of(raw, "kind")))
    metadata = as_object(
        raw.get("metadata", {}), place.inside("metadata", line_of(raw, "metadata"))
    )
    spec_place = place.inside("spec", line_of(raw, "spec"))
    spec = as_object(raw.get("spec") or {}, spec_place)
    destination_place = spec_place.inside("destination", line_of(spec, "destination"))
    destination: Mapping[str, Any] = {}
    if kind is Kind.SERVICE_INTENTIONS:
        destination = as_object(spec.get("destination", {}), destination_place)
    if kind is None or len(place.faults) > faults:
        return None
    fields = _without(spec, "destination")
    name, name_line = metadata.get("name"), line_of(metadata, "name")
    if kind is Kind.SERVICE_INTENTIONS:
        name, name_line = destination.get("name"), line_of(destination, "name")
        for key in destination:
            if key not in ("name", "namespace"):
                destination_place.inside(key, line_of(destination, key)).fault(
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


def _finished(entry: Entry, fields: Mapping[str, Any], place: Place) -> Entry:
    """The entry with what follows from it filled in, and what contradicts itself reported."""
    match entry:
        case ServiceIntentions():
            return _finished_intentions(entry, fields, place)
        case Mesh():
            for name, tls in (("Incoming", entry.tls.incoming), ("Outgoing", entry.tls.outgoing)):
                _check_tls(tls, functools.partial(place.of, fields, "TLS", name))
    return entry


def _finished_intentions(
    entry: ServiceIntentions, fields: Mapping[str, Any], place: Place
) -> ServiceIntentions:
    if not entry.sources and not place.faults:
        place.of(fields, "Sources").fault("is empty", "at least one source")
    _check_wildcards(entry, place.of(fields, "Name"))
    sources = [_finished_source(source, entry) for source in entry.sources]
    seen: set[ServiceName] = set()
    for index, source in enumerate(sources):
        at = place.of(fields, "Sources", index, "Name")
        _check_wildcards(source, at)
        if source.name and source.service in seen and not place.lenient:
            at.fault(f"{source.service} is there twice", "one action for each source")
        seen.add(source.service)
    return msgspec.structs.replace(
        entry, sources=tuple(sorted(sources, key=lambda one: -one.precedence))
    )


def _finished_source(source: Source, entry: ServiceIntentions) -> Source:
    """The source in full: Consul's SourceIntention.MergeNoWildcard and computeIntentionPrecedence."""
    inherited = DEFAULT_TENANT if entry.namespace == WILDCARD else entry.namespace
    source = msgspec.structs.replace(
        source,
        namespace=source.namespace or inherited,
        partition=source.partition or entry.partition,
    )
    return msgspec.structs.replace(source, precedence=precedence(entry.service, source.service))


def _check_wildcards(named: ServiceIntentions | Source, place: Place) -> None:
    if named.namespace == WILDCARD and named.name not in ("", WILDCARD):
        place.fault(
            f'{named.name} is one service, and Namespace is "*"', 'Name "*", or one namespace'
        )


def _check_tls(tls: DirectionalTLS, place: Callable[[str], Place]) -> None:
    """`place` tells where a field of these settings is."""
    low, high = tls.tls_min_version, tls.tls_max_version
    both = low in _TLS_VERSIONS and high in _TLS_VERSIONS
    if both and _TLS_VERSIONS.index(high) < _TLS_VERSIONS.index(low):
        place("TLSMaxVersion").fault(f"{high} is less than TLSMinVersion {low}", f"{low} or higher")
    if tls.cipher_suites and low == "TLSv1_3":
        place("CipherSuites").fault(
            "cannot be chosen for TLS 1.3", "TLSMinVersion of TLSv1_2 or lower"
        )
