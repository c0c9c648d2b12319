"""A pod's JSON to what is kept of it, and from that to how it is treated: pure.

A pod is its users' to write, so nothing of it is trusted: names go into paths, texts into messages. What is kept is
small, whatever the pod's size. docs/kubernetes.md has the rules as a table.
"""

import datetime
import enum
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from tidegate.errors import TidegateError
from tidegate.intent.annotations import MESH, PORT, SERVICE, meant_by
from tidegate.kubeapi.errors import UNREADABLE
from tidegate.model import DEFAULT_TENANT, ServiceName, ServicePort, Sidecar
from tidegate.workloads.kubernetes.settings import Enrolment, KubernetesConfig
from tidegate.workloads.source import Treatment

# consul-k8s control-plane/connect-inject/constants/annotations_and_labels.go
_CONSUL = "consul.hashicorp.com/"
_CONSUL_INJECTED = (f"{_CONSUL}connect-inject-status", f"{_CONSUL}mesh-inject-status")
_CONSUL_TRANSPARENT = f"{_CONSUL}transparent-proxy-status"
_CONSUL_CONFIG = f"{_CONSUL}redirect-traffic-config"
_CONSUL_SERVICE, _CONSUL_PORT = f"{_CONSUL}connect-service", f"{_CONSUL}connect-service-port"
_CONSUL_NAMESPACE = f"{_CONSUL}consul-namespace"

# istio.io/api annotation/annotations.yaml
_ISTIO_STATUS = "sidecar.istio.io/status"
_ISTIO_AMBIENT = "ambient.istio.io/redirection"
_ISTIO_INIT = "istio-init"

# k8s.io/kubernetes pkg/kubelet/types/pod_update.go
_MIRROR, _HASH = "kubernetes.io/config.mirror", "kubernetes.io/config.hash"

_NAMING_LABELS = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app", "k8s-app")
_TEMPLATE_HASH = "pod-template-hash"

_KEPT = ("tidegate.io/", _CONSUL, "traffic.sidecar.istio.io/", "sidecar.istio.io/", "istio.io/")
"""How the annotations begin that anybody here reads; those with a mistyped domain are told."""
_OF_NO_USE = frozenset({_ISTIO_STATUS, f"{_CONSUL}original-pod"})
"""Of those, what is long and says nothing of redirection."""
MAX_ANNOTATION_BYTES = 16 << 10
"""Of all annotations of a pod that are kept; Kubernetes allows 256 KB of all together."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_UID = re.compile(r"[A-Za-z0-9-]{1,64}")
_STATIC_UID = re.compile(r"[0-9a-f]{32}")
"""What the kubelet has for the UID of a pod from a file: never of the form of those that an API server gives."""
_CRON_TIME = re.compile(r"-\d{8,}$")
"""How the name of a CronJob's job ends: its minute since the epoch."""
_MAX_LABEL = 63
_MAX_SHOWN = 60


class Mesh(enum.StrEnum):
    """Whose sidecar, or other proxy, a pod has."""

    CONSUL = "Consul"
    ISTIO = "Istio"
    AMBIENT = "Istio's ambient mode"
    LINKERD = "Linkerd"
    KUMA = "Kuma"


_PROXIES: Mapping[Mesh, tuple[str, ...]] = {
    # A pod of several ports has one for each service: consul-dataplane-web.
    Mesh.CONSUL: ("consul-dataplane", "envoy-sidecar"),
    Mesh.ISTIO: ("istio-proxy",),
    Mesh.LINKERD: ("linkerd-proxy",),
    Mesh.KUMA: ("kuma-sidecar",),
}
"""How the names of proxy containers begin."""


class Key(NamedTuple):
    """What a pod is called; at one time one has it."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Pod(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept of a pod."""

    uid: str
    """By which the node's kubelet knows it: of a static pod that is not its UID in the API."""
    namespace: str
    name: str
    node: str
    service: str
    port: int = 0
    more_ports: tuple[ServicePort, ...] = ()
    addresses: tuple[str, ...] = ()
    annotations: dict[str, str] = {}
    """Those that anybody here reads."""
    started_at: float = 0.0
    meshes: tuple[Mesh, ...] = ()
    """Whose proxies it has."""
    is_injected_by_consul: bool = False
    is_injected_by_istio: bool = False
    redirects_itself: bool = False
    """Whether Istio's init container does."""
    is_host_network: bool = False
    has_own_users: bool = False
    """Whether it is in a user namespace of its own (hostUsers: false)."""
    is_finished: bool = False
    is_terminating: bool = False
    """Whether it was deleted, and is given time to end."""
    has_sandbox: bool = False
    """Whether the kubelet has said so; it says so late."""
    faults: tuple[str, ...] = ()
    """What its annotations say wrongly."""

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)


class Unclear(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that cannot be understood."""

    key: Key | None
    """What it is called, as far as that can be read."""
    problem: str
    """One sentence."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """How a pod is treated that is looked after: observed, and perhaps redirected."""

    sidecar: Sidecar | None
    """Whose sidecar it is redirected to, None for not at all."""
    reason: str
    problem: str = ""


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """How a pod is treated that is not looked after."""

    treatment: Treatment
    reason: str


Treated: TypeAlias = Kept | Left


class _Owner(msgspec.Struct):
    kind: str = ""
    name: str = ""
    controller: bool | None = None


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    uid: str
    namespace: str = "default"
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    owner_references: tuple[_Owner, ...] | None = None


class _Port(msgspec.Struct, rename="camel"):
    container_port: int
    name: str = ""
    protocol: str = "TCP"


class _Container(msgspec.Struct, rename="camel"):
    name: str
    ports: tuple[_Port, ...] | None = None
    restart_policy: str | None = None
    """Of an init container: Always makes it a sidecar."""


class _Spec(msgspec.Struct, rename="camel"):
    node_name: str = ""
    host_network: bool | None = None
    host_users: bool | None = None
    containers: tuple[_Container, ...] | None = None
    init_containers: tuple[_Container, ...] | None = None


class _PodIP(msgspec.Struct):
    ip: str = ""


class _ContainerStatus(msgspec.Struct):
    container_id: str | None = msgspec.field(name="containerID", default=None)


class _Status(msgspec.Struct, rename="camel"):
    phase: str = ""
    pod_ip: str | None = msgspec.field(name="podIP", default=None)
    pod_ips: tuple[_PodIP, ...] | None = msgspec.field(name="podIPs", default=None)
    start_time: str | None = None
    container_statuses: tuple[_ContainerStatus, ...] | None = None
    init_container_statuses: tuple[_ContainerStatus, ...] | None = None


class _Document(msgspec.Struct):
    """core/v1 Pod, as much of it as is read."""

    metadata: _Metadata
    spec: _Spec
    status: _Status = msgspec.field(default_factory=_Status)


class _UnusableError(TidegateError):
    """What a pod says cannot be so; the message goes after the pod's name."""


_DOCUMENT = msgspec.json.Decoder(_Document)


def read_pod(content: bytes, *, mirror_namespaces: bool = False) -> Pod | Unclear:
    """What is kept of a pod, from its JSON. Never raises, whatever the content."""
    try:
        document = _DOCUMENT.decode(content)
        return _pod(document, mirror_namespaces)
    except (*UNREADABLE, _UnusableError) as error:
        key = _key_in(content)
        called = f"pod {key}" if key else "a pod without a name"
        return Unclear(key=key, problem=f"{called} cannot be understood: {_plain(str(error))}")


def _key_in(content: bytes) -> Key | None:
    """What a pod is called of which something else is wrong."""
    try:
        found = msgspec.json.decode(content, type=_Called).metadata
    except UNREADABLE:
        return None
    if _NAME.fullmatch(found.name) and _NAME.fullmatch(found.namespace):
        return Key(found.namespace, found.name)
    return None


class _CalledMetadata(msgspec.Struct):
    name: str
    namespace: str = "default"


class _Called(msgspec.Struct):
    metadata: _CalledMetadata


def _pod(document: _Document, mirror_namespaces: bool) -> Pod:
    """Raises _UnusableError."""
    metadata, spec, status = document.metadata, document.spec, document.status
    for what, text in (("name", metadata.name), ("namespace", metadata.namespace)):
        if not _NAME.fullmatch(text):
            raise _UnusableError(f"its {what} is {_shown(text)}")
    annotations = metadata.annotations or {}
    uid = _uid(metadata.uid, annotations)
    containers = tuple(spec.containers or ())
    sidecars = [one for one in spec.init_containers or () if one.restart_policy == "Always"]
    meshes = tuple(_meshes((*containers, *sidecars), annotations))
    applications = [one for one in containers if _mesh_of(one) is None]
    kept = _kept(annotations)
    service, more, faults = _services(metadata, kept, applications, mirror_namespaces)
    return Pod(
        uid=uid,
        namespace=metadata.namespace,
        name=metadata.name,
        node=spec.node_name,
        service=service.service,
        port=service.port,
        more_ports=more,
        addresses=_addresses(status),
        annotations=kept,
        started_at=_time(status.start_time) or _time(metadata.creation_timestamp),
        meshes=meshes,
        is_injected_by_consul=any(annotations.get(name) for name in _CONSUL_INJECTED),
        # A pod that is nothing but its proxy is a gateway.
        is_injected_by_istio=bool(
            Mesh.ISTIO in meshes and applications and annotations.get(_ISTIO_STATUS)
        ),
        redirects_itself=any(one.name == _ISTIO_INIT for one in spec.init_containers or ()),
        is_host_network=bool(spec.host_network),
        has_own_users=spec.host_users is False,
        is_finished=status.phase in ("Succeeded", "Failed"),
        is_terminating=metadata.deletion_timestamp is not None,
        has_sandbox=bool(
            status.phase == "Running"
            or status.pod_ip
            or any(
                one.container_id
                for one in (
                    *(status.container_statuses or ()),
                    *(status.init_container_statuses or ()),
                )
            )
        ),
        faults=faults,
    )


def _uid(uid: str, annotations: Mapping[str, str]) -> str:
    """The kubelet calls a static pod, its cgroup and its sandbox by a hash of its own; the API has only its mirror."""
    static = annotations.get(_HASH, "")
    if _MIRROR in annotations and _STATIC_UID.fullmatch(static):
        return static
    if not _UID.fullmatch(uid):
        raise _UnusableError(f"its uid is {_shown(uid)}")
    return uid


def _meshes(containers: Iterable[_Container], annotations: Mapping[str, str]) -> Iterator[Mesh]:
    found = {_mesh_of(one) for one in containers}
    yield from (mesh for mesh in _PROXIES if mesh in found)
    if annotations.get(_ISTIO_AMBIENT) == "enabled":
        yield Mesh.AMBIENT


def _mesh_of(container: _Container) -> Mesh | None:
    for mesh, names in _PROXIES.items():
        if any(container.name == name or container.name.startswith(f"{name}-") for name in names):
            return mesh
    return None


def _kept(annotations: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in annotations.items()
        if (name.startswith(_KEPT) and name not in _OF_NO_USE) or meant_by(name)
    }
    size = sum(len(name) + len(value) for name, value in kept.items())
    if size > MAX_ANNOTATION_BYTES:
        raise _UnusableError(
            f"its annotations for meshes have {size} characters; expected at most {MAX_ANNOTATION_BYTES}"
        )
    return kept


def _addresses(status: _Status) -> tuple[str, ...]:
    texts = [one.ip for one in status.pod_ips or ()] or [status.pod_ip or ""]
    try:
        return tuple(dict.fromkeys(str(ipaddress.ip_address(text)) for text in texts if text))
    except ValueError as error:
        raise _UnusableError(str(error)) from error


def _time(text: str | None) -> float:
    """Seconds since the epoch of an RFC 3339 time; 0 for none."""
    if not text:
        return 0.0
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise _UnusableError(f"{_shown(text)} is no time") from error


def _services(
    metadata: _Metadata,
    annotations: Mapping[str, str],
    applications: Sequence[_Container],
    mirror_namespaces: bool,
) -> tuple[ServicePort, tuple[ServicePort, ...], tuple[str, ...]]:
    """The pod's first service with its port, 0 for none; further ones; what is wrong with what it says of them."""
    faults: list[str] = []
    namespace = _namespace(metadata, annotations, mirror_namespaces)
    named = _annotated(annotations, SERVICE, _CONSUL_SERVICE)
    names = [_label(name) for name in named[1]] or [_label(_called(metadata))]
    source, texts = _annotated(annotations, PORT, _CONSUL_PORT)
    ports = []
    for text in texts:
        port = _port(text, applications)
        if port is None:
            problem = f"{_shown(text)} is neither a port nor the name of a container's port"
            faults.append(f"{source}: {problem}; expected 1 to 65535 or such a name")
        ports.append(port or 0)
    if not texts and len(names) == 1:
        ports = [_first_port(applications)]
    if len(ports) != len(names):
        faults.append(
            f"{source or PORT}: {len(ports)} ports for {len(names)} services; expected one for each"
        )
        names, ports = names[:1], (ports or [0])[:1]
    made = [
        ServicePort(service=str(ServiceName(name, namespace)), port=port)
        for name, port in zip(names, ports, strict=True)
    ]
    return made[0], tuple(one for one in made[1:] if one.port), tuple(faults)


def _annotated(annotations: Mapping[str, str], *names: str) -> tuple[str, list[str]]:
    """The first annotation that says anything, and its list."""
    for name in names:
        items = [item.strip() for item in annotations.get(name, "").split(",")]
        if any(items):
            return name, [item for item in items if item]
    return "", []


def _namespace(metadata: _Metadata, annotations: Mapping[str, str], mirror_namespaces: bool) -> str:
    """The Consul namespace: what Consul's webhook wrote, which it does where there are namespaces."""
    said = annotations.get(_CONSUL_NAMESPACE, "").strip()
    if said:
        return _label(said)
    return metadata.namespace if mirror_namespaces else DEFAULT_TENANT


def _called(metadata: _Metadata) -> str:
    """What the application is called: by its labels, else as who made the pod is called."""
    labels = metadata.labels or {}
    for label in _NAMING_LABELS:
        if labels.get(label):
            return labels[label]
    for owner in metadata.owner_references or ():
        if owner.controller and owner.name and owner.kind != "Node":
            name = _CRON_TIME.sub("", owner.name) if owner.kind == "Job" else owner.name
            return name.removesuffix(f"-{labels.get(_TEMPLATE_HASH, '')}")
    return metadata.name


def _label(text: str) -> str:
    """A name that mesh identities can have, out of any."""
    label = re.sub(r"[^a-z0-9-]+", "-", text.lower()[: 4 * _MAX_LABEL]).strip("-")
    return label[:_MAX_LABEL].strip("-") or "unnamed"


def _port(text: str, containers: Iterable[_Container]) -> int | None:
    """A port, by number or by its name in a container."""
    if text.isascii() and text.isdecimal():
        number = int(text[:6])
        return number if 0 < number < 1 << 16 else None
    for port in _tcp_ports(containers):
        if port.name == text:
            return port.container_port
    return None


def _first_port(containers: Iterable[_Container]) -> int:
    return next((port.container_port for port in _tcp_ports(containers)), 0)


def _tcp_ports(containers: Iterable[_Container]) -> Iterator[_Port]:
    for container in containers:
        for port in container.ports or ():
            if port.protocol == "TCP" and 0 < port.container_port < 1 << 16:
                yield port


def treat(pod: Pod, config: KubernetesConfig) -> Treated:
    """How this node's agent treats a pod."""
    if pod.namespace in config.exclude_namespaces:
        return Left(
            treatment=Treatment.EXCLUDED,
            reason=f"pods of namespace {pod.namespace} are left alone by configuration",
        )
    if pod.is_host_network:
        return Left(
            treatment=Treatment.HOST_NETWORK, reason="it shares the node's network namespace"
        )
    if pod.is_finished:
        return Left(treatment=Treatment.FINISHED, reason="its containers have ended for good")
    return _enrolled(pod, config.enrolments)


def _enrolled(pod: Pod, rules: Sequence[Enrolment]) -> Kept:
    word = pod.annotations.get(MESH, "").strip()
    if word == "false":
        return _observed(f'{MESH} is "false"')
    if word and Enrolment.ANNOTATED in rules:
        return _annotated_enrolment(pod, word)
    if pod.is_injected_by_consul and Enrolment.CONSUL in rules:
        return _consul_enrolment(pod)
    if pod.is_injected_by_istio and Enrolment.ISTIO in rules:
        if pod.redirects_itself:
            return _observed("Istio's init container redirects it")
        return Kept(sidecar=Sidecar.OWN, reason="Istio injected its sidecar")
    by = " and ".join(rules) or "nothing"
    if word:
        return _observed(f"{MESH} is {_shown(word)}, but pods are enrolled by {by}")
    if pod.meshes:
        return _observed(f"it has a proxy of {' and '.join(pod.meshes)}; pods are enrolled by {by}")
    return _observed("it has no sidecar")


def _observed(reason: str, problem: str = "") -> Kept:
    return Kept(sidecar=None, reason=reason, problem=problem)


def _annotated_enrolment(pod: Pod, word: str) -> Kept:
    match word:
        case "own":
            return Kept(sidecar=Sidecar.OWN, reason=f'{MESH} is "own"')
        case "true" if pod.meshes:
            has = f"it has a proxy of {' and '.join(pod.meshes)}"
            return _observed(
                f'{MESH} is "true", but {has}',
                f'{MESH} is "true", which starts a sidecar, but {has}; expected "own"',
            )
        case "true" if pod.has_own_users:
            # The user of a sidecar that the agent starts is none in there, so its own connections would be redirected.
            has = "its users are its own (hostUsers: false)"
            return _observed(
                f'{MESH} is "true", but {has}',
                f'{MESH} is "true", which starts a sidecar from outside, but {has}; expected "own"',
            )
        case "true":
            return Kept(sidecar=Sidecar.TIDEGATE, reason=f'{MESH} is "true"')
        case _:
            problem = f"{MESH} is {_shown(word)}"
            return _observed(problem, f'{problem}; expected "true", "own" or "false"')


def _consul_enrolment(pod: Pod) -> Kept:
    """As consul-cni decides (control-plane/cni/main.go, skipTrafficRedirection), save for what has no configuration:
    consul-cni refuses that pod; Consul without its plugin leaves it to an init container."""
    if not pod.annotations.get(_CONSUL_TRANSPARENT):
        return _observed("Consul injected its sidecar without a transparent proxy")
    if not pod.annotations.get(_CONSUL_CONFIG):
        return _observed(
            f"Consul's init container redirects it: it has no annotation {_CONSUL_CONFIG}"
        )
    return Kept(sidecar=Sidecar.OWN, reason="Consul injected its sidecar, with a transparent proxy")


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")


def _plain(text: str) -> str:
    return ascii(text[: 4 * _MAX_SHOWN])[1:-1]
