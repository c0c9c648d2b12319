"""The lab file: what a person wrote about nodes, pods, applications and config entries, checked completely.

Turns YAML text into a frozen LabSpec or into one InputErrors with every fault: file, line, field and what
would be right. Knows the shape of the file and which names refer to which; knows nothing of namespaces,
processes or addresses, and leaves the meaning of config entries to `tidegate.intent`.
"""

import difflib
import enum
import json
import re
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from tidegate import durations, model
from tidegate.errors import InputError, InputErrors
from tidegate.intent.annotations import advised
from tidegate.model import ServicePort

MAX_NODES = 16
MAX_PODS = 200
MAX_FILE_BYTES = 1 << 20
MAX_YAML_VALUES = 50_000
MAX_CALLS_PER_POD = 32
MAX_PORTS_PER_POD = 8

OUTSIDE = "outside"
"""Name of the lab's own outside world: the network that joins the nodes and is none of them."""

_RESERVED_NAMES = frozenset({OUTSIDE, "localhost"})
_SIDECAR_PORTS = frozenset({model.DEFAULT_INBOUND_PORT, model.DEFAULT_OUTBOUND_PORT})

_LAB_NAME = re.compile(r"[a-z0-9]{1,16}")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"(?=.{1,40}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*"
)

_LAB_NAME_SHAPE = "1 to 16 of a-z and 0-9"
_DNS_LABEL_SHAPE = "a DNS label: 1 to 63 of a-z, 0-9 and -, no - at either end"
_NAME_SHAPE = "a DNS label: 1 to 40 of a-z, 0-9 and -, no - at either end"

DEFAULT_LAB_NAME = "demo"
DEFAULT_TRUST_DOMAIN = "tidegate.test"
DEFAULT_DATACENTER = "dc1"
DEFAULT_LEAF_LIFETIME_S = 3600.0
DEFAULT_WINDOW_S = 86400.0
DEFAULT_CALL_TIMEOUT_S = 5.0

_Value = TypeVar("_Value")


class AppKind(enum.StrEnum):
    """What the application of a pod is."""

    HTTP = "http"
    """Serves HTTP/1.1 in plaintext."""
    TLS = "tls"
    """Serves HTTP/1.1 over TLS of its own, with a self-signed certificate."""
    TCP = "tcp"
    """Serves a small line-based database."""
    CALLER = "caller"
    """Serves nothing, only calls."""
    NONE = "none"
    """No application is started."""

    @property
    def serves(self) -> bool:
        return self in (AppKind.HTTP, AppKind.TLS, AppKind.TCP)


class CallKind(enum.StrEnum):
    """Which protocol a caller speaks."""

    HTTP = "http"
    TLS = "tls"
    TCP = "tcp"


class IntentionPolicy(enum.StrEnum):
    """What holds between two services without an intention."""

    ALLOW = "allow"
    DENY = "deny"


class CallSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of requests to a pod or to all pods of a service."""

    target: str
    port: int
    kind: CallKind
    every_s: float | None = 1.0
    """Seconds between two requests; None: only when told to."""
    keepalive: int = 1
    """Requests per connection."""
    timeout_s: float = DEFAULT_CALL_TIMEOUT_S


class AppSpec(msgspec.Struct, frozen=True, kw_only=True):
    kind: AppKind = AppKind.NONE
    calls: tuple[CallSpec, ...] = ()


class PodSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    node: str
    service: str
    port: int = 0
    more_ports: tuple[ServicePort, ...] = ()
    """Further services of the pod, on which its application answers too."""
    mesh: bool = False
    app: AppSpec = AppSpec()
    annotations: dict[str, str] = {}

    @property
    def ports(self) -> dict[str, int]:
        """The port of each of its services; 0 for a pod that only calls."""
        return {self.service: self.port} | {one.service: one.port for one in self.more_ports}

    @property
    def names(self) -> tuple[str, ...]:
        """What it can be called by: its own name, and its services."""
        return tuple(dict.fromkeys((self.name, *self.ports)))

    def port_of(self, target: str) -> int:
        """The port that a call to `target`, one of its names, goes to."""
        return self.ports.get(target, self.port)


class ConfigText(msgspec.Struct, frozen=True, kw_only=True):
    """One config entry as written (HCL, or JSON for an entry written as a mapping) and where it stands."""

    source: str
    text: str


class LabSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    datacenter: str = DEFAULT_DATACENTER
    leaf_lifetime_s: float = DEFAULT_LEAF_LIFETIME_S
    window_s: float = DEFAULT_WINDOW_S
    default_intention_policy: IntentionPolicy = IntentionPolicy.DENY
    nodes: tuple[str, ...] = ()
    pods: tuple[PodSpec, ...] = ()
    config: tuple[ConfigText, ...] = ()

    def pod(self, name: str) -> PodSpec | None:
        return next((pod for pod in self.pods if pod.name == name), None)

    def pods_of(self, target: str) -> tuple[PodSpec, ...]:
        """The pods that a name stands for: the pod of that name, else all pods of that service."""
        pod = self.pod(target)
        if pod is not None:
            return (pod,)
        return tuple(pod for pod in self.pods if target in pod.ports)


def load(path: Path, *, name: str | None = None) -> LabSpec:
    """Read a lab file. `name` replaces the lab's name. Raises InputError or InputErrors."""
    source = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror})", source=source, expected="a readable lab file"
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise InputError("is too large", source=source, expected=f"at most {MAX_FILE_BYTES} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text (byte {error.start})", source=source, expected="YAML in UTF-8"
        ) from error
    return parse(text, source=source, name=name)


def parse(text: str, *, source: str, name: str | None = None) -> LabSpec:
    """Check the text of a lab file completely. Raises InputErrors with every fault."""
    document = _Document(source)
    root = document.read(text)
    document.refuse_faults()
    spec = _lab(document, root, name)
    document.refuse_faults()
    return spec


def check_lab_name(name: str, *, source: str) -> str:
    """Return `name` if a lab may have it. Raises InputError."""
    if not _LAB_NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a lab", source=source, expected=_LAB_NAME_SHAPE)
    return name


class _Document:
    """A YAML document as plain values with the line of every path, and the faults found in it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.faults: list[InputError] = []
        self._lines: dict[str, int] = {}
        self._values = 0

    def read(self, text: str) -> Any:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            return {} if node is None else self._build(loader, node, "")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self._refuse_now(f"{error.problem or 'not YAML'}", f"line {line}")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self._refuse_now(str(error).splitlines()[0] if str(error) else "not YAML", "")
        finally:
            loader.dispose()
        return None

    def fault(self, path: str, problem: str, expected: str) -> None:
        line = self._line(path)
        field = f"{path} (line {line})" if line else path
        self.faults.append(InputError(problem, source=self.source, field=field, expected=expected))

    def refuse_faults(self) -> None:
        if self.faults:
            raise InputErrors(tuple(self.faults))

    def where(self, path: str) -> str:
        """The place of a path in words that fit `source` of later errors."""
        line = self._line(path)
        return f"{self.source}: {path} (line {line})" if line else f"{self.source}: {path}"

    def _line(self, path: str) -> int:
        while path and path not in self._lines:
            path = re.sub(r"(\.[^.\[\]]*|\[[^\]]*\]|^[^.\[\]]+)$", "", path)
        return self._lines.get(path, 0)

    def _refuse_now(self, problem: str, field: str) -> None:
        fault = InputError(problem, source=self.source, field=field, expected="a YAML lab file")
        self.faults.append(fault)

    def _build(self, loader: yaml.SafeLoader, node: yaml.Node, path: str) -> Any:
        self._values += 1
        if self._values > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES} values")
        self._lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(loader, node, path)
        if isinstance(node, yaml.SequenceNode):
            return [
                self._build(loader, item, f"{path}[{index}]")
                for index, item in enumerate(node.value)
            ]
        return loader.construct_object(node)

    def _build_mapping(
        self, loader: yaml.SafeLoader, node: yaml.MappingNode, path: str
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            if not isinstance(key, Hashable) or not isinstance(key, str):
                self._lines[path] = key_node.start_mark.line + 1
                self.fault(path or "file", f"{key!r} is not a field name", "a text as field name")
                continue
            field = f"{path}.{key}" if path else key
            if key in values:
                self._lines[field] = key_node.start_mark.line + 1
                self.fault(field, "is written twice", "each field once")
                continue
            values[key] = self._build(loader, value_node, field)
            self._lines[field] = key_node.start_mark.line + 1
        return values


class _Fields:
    """A mapping of the file, read field by field; what is left over at the end is unknown."""

    def __init__(
        self, document: _Document, value: Any, path: str, known: Iterable[str], what: str
    ) -> None:
        self.document = document
        self.path = path
        self._values: dict[str, Any] = value if isinstance(value, dict) else {}
        names = tuple(known)
        if not isinstance(value, dict):
            document.fault(path or "file", f"is {_kind(value)}", f"{what} with {', '.join(names)}")
        for name in self._values:
            if name not in names:
                document.fault(self.at(name), "is not a known field", _nearest(name, names))

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def fault(self, name: str, problem: str, expected: str) -> None:
        self.document.fault(self.at(name), problem, expected)

    def take(
        self,
        name: str,
        check: Callable[[Any], _Value | None],
        expected: str,
        default: _Value | None = None,
    ) -> _Value | None:
        """The checked value of a field. A field without default is needed; None after a fault."""
        if name not in self._values:
            if default is None:
                self.fault(name, "is missing", expected)
            return default
        value = check(self._values[name])
        if value is None:
            self.fault(name, f"{_shown(self._values[name])} is not right", expected)
        return value

    def items(self, name: str, what: str, limit: int) -> list[Any]:
        """The items of a list field, [] if it is not there."""
        value = self._values.get(name, [])
        if not isinstance(value, list):
            self.fault(name, f"is {_kind(value)}", f"a list of {what}")
            return []
        if len(value) > limit:
            self.fault(name, f"has {len(value)} items", f"at most {limit}")
            return value[:limit]
        return value


def _lab(document: _Document, root: Any, name: str | None) -> LabSpec:
    fields = _Fields(
        document,
        root,
        "",
        (
            "lab",
            "trust_domain",
            "datacenter",
            "leaf_lifetime",
            "window",
            "default_intention_policy",
            "nodes",
            "pods",
            "config",
        ),
        "a mapping",
    )
    lab_name = fields.take("lab", _matching(_LAB_NAME), _LAB_NAME_SHAPE, DEFAULT_LAB_NAME)
    trust_domain = fields.take(
        "trust_domain", _matching(_DNS_NAME), "a DNS name in lower case", DEFAULT_TRUST_DOMAIN
    )
    datacenter = fields.take(
        "datacenter", _matching(_DNS_LABEL), _DNS_LABEL_SHAPE, DEFAULT_DATACENTER
    )
    leaf_lifetime = fields.take(
        "leaf_lifetime",
        _duration(1.0, 72 * 3600.0),
        f"{durations.SHAPE}, from 1s to 72h",
        DEFAULT_LEAF_LIFETIME_S,
    )
    window = fields.take(
        "window",
        _duration(0.5, 366 * 86400.0),
        f"{durations.SHAPE}, from 500ms to 366d",
        DEFAULT_WINDOW_S,
    )
    policy = fields.take(
        "default_intention_policy",
        _member(IntentionPolicy),
        _one_of(IntentionPolicy),
        IntentionPolicy.DENY,
    )
    nodes = _nodes(fields)
    pods = _pods(fields, nodes)
    config = _config(fields)
    return LabSpec(
        name=name or lab_name or DEFAULT_LAB_NAME,
        trust_domain=trust_domain or DEFAULT_TRUST_DOMAIN,
        datacenter=datacenter or DEFAULT_DATACENTER,
        leaf_lifetime_s=leaf_lifetime or DEFAULT_LEAF_LIFETIME_S,
        window_s=window or DEFAULT_WINDOW_S,
        default_intention_policy=policy or IntentionPolicy.DENY,
        nodes=nodes,
        pods=pods,
        config=config,
    )


def _nodes(fields: _Fields) -> tuple[str, ...]:
    nodes: list[str] = []
    if not fields.has("nodes"):
        fields.fault("nodes", "is missing", "a list of node names")
    for index, item in enumerate(fields.items("nodes", "node names", MAX_NODES)):
        name = _matching(_NAME)(item)
        if name is None:
            fields.fault(f"nodes[{index}]", f"{_shown(item)} cannot name a node", _NAME_SHAPE)
        elif name in _RESERVED_NAMES:
            fields.fault(f"nodes[{index}]", f"{name} is reserved", "another name")
        elif name in nodes:
            fields.fault(f"nodes[{index}]", f"{name} is named twice", "each node once")
        else:
            nodes.append(name)
    if fields.has("nodes") and fields.raw("nodes") == []:
        fields.fault("nodes", "is empty", "at least one node")
    return tuple(nodes)


class _PodDraft(msgspec.Struct):
    """A pod whose calls still wait until all pods are known."""

    path: str
    spec: PodSpec
    app: _Fields | None


def _pods(fields: _Fields, nodes: tuple[str, ...]) -> tuple[PodSpec, ...]:
    document = fields.document
    drafts: list[_PodDraft] = []
    for index, item in enumerate(fields.items("pods", "pods", MAX_PODS)):
        draft = _pod(document, item, f"pods[{index}]", nodes)
        if draft is not None:
            drafts.append(draft)
    _refuse_ambiguous_names(document, drafts, nodes)
    lab = LabSpec(name=DEFAULT_LAB_NAME, pods=tuple(draft.spec for draft in drafts))
    return tuple(
        msgspec.structs.replace(
            draft.spec,
            app=AppSpec(kind=draft.spec.app.kind, calls=_calls(draft.app, lab)),
        )
        for draft in drafts
    )


def _pod(document: _Document, item: Any, path: str, nodes: tuple[str, ...]) -> _PodDraft | None:
    fields = _Fields(
        document,
        item,
        path,
        ("name", "node", "service", "port", "more_ports", "mesh", "app", "annotations"),
        "a pod",
    )
    if not isinstance(item, dict):
        return None
    name = fields.take("name", _matching(_NAME), _NAME_SHAPE)
    node = fields.take("node", _text, _listed(nodes, "one of the lab's nodes"))
    if node is not None and nodes and node not in nodes:
        fields.fault("node", f"there is no node {node}", _nearest(node, nodes))
    service = fields.take("service", _matching(_NAME), _NAME_SHAPE, name or "-")
    port = fields.take("port", _port, _PORT_SHAPE, 0)
    mesh = fields.take("mesh", _truth, "true or false", False)
    app = None
    kind: AppKind | None = AppKind.NONE
    if fields.has("app"):
        app = _Fields(document, fields.raw("app"), fields.at("app"), ("kind", "calls"), "an app")
        kind = app.take("kind", _member(AppKind), _one_of(AppKind))
    if kind is not None and kind.serves and not fields.has("port"):
        fields.fault("port", f"is missing, and app {kind} serves", _PORT_SHAPE)
    more_ports = _more_ports(fields, service, port)
    annotations = _annotations(fields)
    if name is None or node is None or service is None:
        return None
    spec = PodSpec(
        name=name,
        node=node,
        service=service,
        port=_FAULTY_PORT if port is None else port,
        more_ports=more_ports,
        mesh=bool(mesh),
        app=AppSpec(kind=kind or AppKind.NONE),
        annotations=annotations,
    )
    return _PodDraft(path=path, spec=spec, app=app)


def _more_ports(pod: _Fields, service: str | None, port: int | None) -> tuple[ServicePort, ...]:
    if pod.has("more_ports") and not port:
        pod.fault("more_ports", "are further ports, and the pod has no port", "port")
    services, ports = {service}, {port}
    found = []
    for index, item in enumerate(pod.items("more_ports", "ports", MAX_PORTS_PER_POD)):
        path = pod.at(f"more_ports[{index}]")
        fields = _Fields(pod.document, item, path, ("service", "port"), "a port")
        if not isinstance(item, dict):
            continue
        another = fields.take("service", _matching(_NAME), _NAME_SHAPE)
        number = fields.take("port", _port, _PORT_SHAPE)
        if another is None or number is None:
            continue
        if another in services:
            fields.fault("service", f"{another} is there twice", "another service")
        if number in ports:
            fields.fault("port", f"{number} is there twice", "another port")
        services.add(another)
        ports.add(number)
        found.append(ServicePort(service=another, port=number))
    return tuple(found)


def _refuse_ambiguous_names(
    document: _Document, drafts: list[_PodDraft], nodes: tuple[str, ...]
) -> None:
    first: dict[str, str] = {}
    services = {service: draft.path for draft in reversed(drafts) for service in draft.spec.ports}
    for draft in drafts:
        name, path = draft.spec.name, f"{draft.path}.name"
        if name in _RESERVED_NAMES:
            document.fault(path, f"{name} is reserved", "another name")
        elif name in nodes:
            document.fault(path, f"{name} is already the name of a node", "another name")
        elif name in first:
            document.fault(path, f"{name} is already the name of {first[name]}", "another name")
        elif name in services and name not in draft.spec.ports:
            document.fault(
                path,
                f"{name} is also the service of {services[name]}, but this pod's service is "
                f"{draft.spec.service}",
                "a pod named like a service belongs to that service",
            )
        first.setdefault(name, draft.path)
        for service in draft.spec.ports:
            if service != name and (service in _RESERVED_NAMES or service in nodes):
                document.fault(f"{draft.path}.service", f"{service} is taken", "another name")


def _calls(app: _Fields | None, lab: LabSpec) -> tuple[CallSpec, ...]:
    if app is None:
        return ()
    if app.raw("kind") == AppKind.NONE and app.has("calls"):
        app.fault("calls", "an app of kind none calls nobody", f"kind {AppKind.CALLER}")
    calls = []
    for index, item in enumerate(app.items("calls", "calls", MAX_CALLS_PER_POD)):
        call = _call(app.document, item, app.at(f"calls[{index}]"), lab)
        if call is not None:
            calls.append(call)
    if app.raw("kind") == AppKind.CALLER and not app.raw("calls"):
        app.fault("calls", "is missing, and an app of kind caller only calls", "a list of calls")
    return tuple(calls)


def _call(document: _Document, item: Any, path: str, lab: LabSpec) -> CallSpec | None:
    fields = _Fields(
        document, item, path, ("target", "port", "kind", "every", "keepalive", "timeout"), "a call"
    )
    if not isinstance(item, dict):
        return None
    names = sorted({name for pod in lab.pods for name in pod.names})
    target = fields.take("target", _text, "the name of a pod or service")
    pods = lab.pods_of(target) if target is not None else ()
    if target is not None and not pods:
        fields.fault("target", f"there is no pod or service {target}", _nearest(target, names))
    ports = {pod.port_of(target) for pod in pods if target is not None} - {0}
    kinds = {pod.app.kind for pod in pods if pod.app.kind.serves}
    port = fields.take("port", _port, _PORT_SHAPE, next(iter(ports)) if len(ports) == 1 else 0)
    if port == 0 and pods:
        fields.fault("port", f"is missing, and {target} does not have exactly one", _PORT_SHAPE)
    kind = fields.take(
        "kind",
        _member(CallKind),
        _one_of(CallKind),
        CallKind(next(iter(kinds)).value) if len(kinds) == 1 else CallKind.HTTP,
    )
    every = 1.0 if not fields.has("every") else None
    if fields.has("every") and fields.raw("every") != "manual":
        every = fields.take(
            "every", _duration(0.005, 86400.0), f"manual, or {durations.SHAPE}, from 5ms to 1d"
        )
    keepalive = fields.take("keepalive", _count(1_000_000), "requests per connection, from 1", 1)
    timeout = fields.take(
        "timeout",
        _duration(0.01, 3600.0),
        f"{durations.SHAPE}, from 10ms to 1h",
        DEFAULT_CALL_TIMEOUT_S,
    )
    if not pods or target is None:
        return None
    return CallSpec(
        target=target,
        port=port or 0,
        kind=kind or CallKind.HTTP,
        every_s=every,
        keepalive=keepalive or 1,
        timeout_s=timeout or DEFAULT_CALL_TIMEOUT_S,
    )


def _annotations(fields: _Fields) -> dict[str, str]:
    value = fields.raw("annotations")
    if value is None:
        return {}
    if not isinstance(value, dict):
        fields.fault("annotations", f"is {_kind(value)}", "a mapping of names to texts")
        return {}
    annotations: dict[str, str] = {}
    for name, text in value.items():
        if isinstance(text, str):
            annotations[name] = text
        else:
            fields.fault(
                f"annotations.{name}",
                f"{_shown(text)} is {_kind(text)}",
                advised(text),
            )
    return annotations


def _config(fields: _Fields) -> tuple[ConfigText, ...]:
    texts = []
    for index, item in enumerate(fields.items("config", "config entries", 1000)):
        path = fields.at(f"config[{index}]")
        source = fields.document.where(path)
        if isinstance(item, str):
            texts.append(ConfigText(source=source, text=item))
        elif isinstance(item, dict):
            try:
                texts.append(ConfigText(source=source, text=json.dumps(item)))
            except TypeError as error:
                fields.document.fault(path, str(error), "texts, numbers, lists and mappings")
        else:
            fields.document.fault(path, f"is {_kind(item)}", "an entry as mapping or HCL text")
    return tuple(texts)


_FAULTY_PORT = -1
"""Port of a pod whose port is a fault already: calls to it are not blamed once more."""

_PORT_SHAPE = "a port from 1 to 65535, other than the sidecar's " + " and ".join(
    str(port) for port in sorted(_SIDECAR_PORTS)
)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _port(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 1 <= value <= 65535 and value not in _SIDECAR_PORTS else None


def _count(limit: int) -> Callable[[Any], int | None]:
    def check(value: Any) -> int | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        return value if 1 <= value <= limit else None

    return check


def _duration(least: float, most: float) -> Callable[[Any], float | None]:
    def check(value: Any) -> float | None:
        seconds = durations.parse(value) if isinstance(value, str) else None
        return seconds if seconds is not None and least <= seconds <= most else None

    return check


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return value if isinstance(value, str) and pattern.fullmatch(value) else None

    return check


_Choice = TypeVar("_Choice", bound=enum.StrEnum)


def _member(choices: type[_Choice]) -> Callable[[Any], _Choice | None]:
    def check(value: Any) -> _Choice | None:
        return next((choice for choice in choices if choice.value == value), None)

    return check


def _one_of(choices: type[enum.StrEnum]) -> str:
    return "one of " + ", ".join(choice.value for choice in choices)


def _listed(names: Iterable[str], otherwise: str) -> str:
    joined = ", ".join(names)
    return f"one of {joined}" if joined else otherwise


def _nearest(name: str, known: Iterable[str]) -> str:
    names = tuple(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else _listed(names, "another name")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return "true or false"
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
