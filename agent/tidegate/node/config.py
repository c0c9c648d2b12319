"""Configuration of one agent: a YAML file, checked as a whole before anything is touched."""

import enum
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tidegate.addresses import Endpoint, endpoint
from tidegate.catalog.access import ACCESS_FOR_ALL, Access
from tidegate.catalog.settings import ServerConfig, check_config
from tidegate.enforce.redirect.engine import BackendChoice
from tidegate.errors import InputError
from tidegate.identity import spiffe
from tidegate.intent.documents import read_documents
from tidegate.intent.network_text import canonical_network
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.intent.policy_documents import policy_from_fields
from tidegate.node.users import group_id, user_id
from tidegate.verdict.steps import Environment
from tidegate.workloads import cni
from tidegate.workloads.cni import CniConfig
from tidegate.workloads.kubernetes import settings as kubernetes
from tidegate.workloads.kubernetes.settings import KubernetesConfig
from tidegate.workloads.processes import settings as processes
from tidegate.workloads.processes.settings import ProcessConfig

DEFAULT_CONFIG = Path("/etc/tidegate/agent.yaml")
"""Where commands look for it that are not told."""
MAX_DURATION_S = 366 * 86400.0
NODE = "TIDEGATE_NODE"
"""Environment variable with Kubernetes' name of this node (spec.nodeName)."""
NODE_ADDRESSES = "TIDEGATE_NODE_ADDRESSES"
"""Environment variable with the node's own addresses (status.hostIPs)."""
ADDRESS = "TIDEGATE_ADDRESS"
"""Environment variable with the address of the agent's own pod (status.podIP), for `advertise`."""
LONGEST_SOCKET_PATH = 107
"""Bytes, without the closing 0 (linux/un.h, UNIX_PATH_MAX)."""
_SERVER = re.compile(r"unix:///.+|https?://[^/]+/?")


class OnFailure(enum.StrEnum):
    """What becomes of a meshed workload whose rules cannot be applied."""

    LEAVE = "leave"
    """Its traffic goes as it goes without rules."""
    BLOCK = "block"
    """Nothing of it passes but loopback."""


class Profile(enum.StrEnum):
    """Whose mTLS is the mesh's, and how it is recognised."""

    CONSUL = "consul"
    """By server names of the trust domain; sidecars dial a port of the sidecar's own."""
    ISTIO = "istio"
    """By Istio's ALPN names; sidecars dial the service's own port."""
    KUMA = "kuma"
    """By Kuma's ALPN name; as Istio's."""


class RedirectConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How workloads are redirected on this node."""

    backend: BackendChoice = BackendChoice.AUTO
    adopt: bool = False
    """Whether rules that Consul left are replaced; otherwise they are only reported."""
    on_failure: OnFailure = OnFailure.LEAVE
    policy: Policy = DEFAULT
    """What annotations of namespaces and workloads change. Knows the node's addresses."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent needs to know. Durations are seconds."""

    node: str
    """Name of this node, unique in the mesh."""
    server: str
    """Intent server: unix:///path, or http://host:port or https://host:port, of tidegate or of Consul."""
    consul: Access = ACCESS_FOR_ALL
    """How to speak to the intent server: token, TLS, and what of a Consul server is meant."""
    embedded_server: ServerConfig | None = None
    """The intent server, where this agent runs it too: the only node, or the one that others ask."""
    workloads: Path | None = None
    """Directory of workload files, one JSON object (model.Workload) each."""
    kubernetes: KubernetesConfig | None = None
    """How the pods of this node are known, where it is a node of a Kubernetes cluster."""
    cni: CniConfig | None = None
    """Where the CNI plugin of this node finds the agent."""
    processes: tuple[ProcessConfig, ...] = ()
    """Services of this machine."""
    metrics: str = ""
    """Address and port, such as 0.0.0.0:20200, at which everybody may ask for /metrics, /healthz and /readyz."""
    peers: str = ""
    """Address and port, such as 0.0.0.0:20201, at which agents of other machines may ask for this one's evidence."""
    advertise: str = ""
    """Address at which they reach it; the first of `node_addresses` where that is not said."""
    node_addresses: tuple[str, ...] = ()
    """The node's own addresses: connections from them are probes."""
    run_dir: Path = Path("/run/tidegate")
    """Sidecar directories and pid files: gone after a reboot, as the sidecars are."""
    state_dir: Path = Path("/var/lib/tidegate")
    """Ledger and last known intent."""
    socket: Path = Path("/run/tidegate/agent.sock")
    bpffs: Path = Path("/sys/fs/bpf/tidegate")
    """Directory on a bpf file system below which maps, programs and links are pinned."""
    trust_domain: str
    profile: Profile = Profile.CONSUL
    datacenter: str = "dc1"
    window: float = 86400.0
    """Observation window of a verdict where a request names none."""
    leaf_lifetime: float = 3600.0
    drain_time: float = 30.0
    """How long plaintext connections may go on that are open when their service goes strict. A sidecar that runs
    keeps the one that it was started with."""
    redirect: RedirectConfig = RedirectConfig()
    environment: Environment = Environment.VM
    lab: str = ""
    """Name of the lab that this agent is part of, for the commands in its advice."""

    @property
    def agent_api(self) -> str:
        """Where this agent tells others that it answers."""
        if not self.peers:
            return f"unix://{self.socket}"
        address = self.advertise or self.node_addresses[0]
        return f"https://{endpoint(address, Endpoint.of(self.peers).port)}"


def _decode_path(kind: type[object], text: object) -> object:
    if kind is Path and isinstance(text, str):
        return Path(text)
    raise TypeError(f"expected text, got {type(text).__name__}")


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> AgentConfig:
    """Reads an agent's configuration; raises InputError with file and field.

    What differs from node to node may come from the environment, where the file does not say it: so one file serves
    all nodes of a cluster.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", source=str(path), expected="an agent configuration"
        ) from error
    try:
        raw = msgspec.yaml.decode(text)
        says_policy = _pop_policy(raw)
        _fill(raw, environment)
        config = msgspec.convert(raw, type=AgentConfig, dec_hook=_decode_path)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # PyYAML's messages have several lines.
        raise InputError(" ".join(str(error).split()), source=str(path)) from error
    for field, check in _CHECKS.items():
        try:
            check(getattr(config, field))
        except InputError as error:
            raise InputError(
                error.problem,
                source=str(path),
                field=_within(field, error.field),
                expected=error.expected,
            ) from error
    _check_embedded(config, str(path))
    _check_host_network(config, str(path))
    _check_sources(config, str(path))
    _check_peers(config, str(path))
    policy = _base_policy(config.node_addresses)
    if says_policy:
        policy = _policy_of(text, str(path), policy)
    replace = msgspec.structs.replace
    return replace(config, redirect=replace(config.redirect, policy=policy))


def _check_embedded(config: AgentConfig, source: str) -> None:
    server = config.embedded_server
    if server is None:
        return
    try:
        check_config(server)
    except InputError as error:
        field = f"embedded_server.{error.field}"
        raise InputError(
            error.problem, source=source, field=field, expected=error.expected
        ) from error
    for field, here, there in (
        ("trust_domain", config.trust_domain, server.trust_domain),
        ("datacenter", config.datacenter, server.datacenter),
    ):
        if here != there:
            raise InputError(
                f"{there!r} is not the agent's",
                source=source,
                field=f"embedded_server.{field}",
                expected=here,
            )
    if config.server not in server.listens:
        raise InputError(
            f"{config.server!r} is not where the embedded server listens",
            source=source,
            field="server",
            expected=" or ".join(server.listens),
        )


def _check_host_network(config: AgentConfig, source: str) -> None:
    """What blocks a workload whose rules cannot be applied would cut the host off."""
    for number, one in enumerate(config.processes):
        if one.host_network is not None and config.redirect.on_failure is OnFailure.BLOCK:
            raise InputError(
                "while its rules cannot be applied nothing of the host would pass",
                source=source,
                field=f"processes[{number}].host_network",
                expected=f"redirect.on_failure: {OnFailure.LEAVE}",
            )


def _check_sources(config: AgentConfig, source: str) -> None:
    if not (config.workloads or config.kubernetes or config.cni or config.processes):
        raise InputError(
            "no source of workloads is there",
            source=source,
            expected="one or more of workloads, kubernetes, cni and processes",
        )


def _check_peers(config: AgentConfig, source: str) -> None:
    if config.peers and not (config.advertise or config.node_addresses):
        raise InputError(
            "others are not told where this agent can be reached",
            source=source,
            field="peers",
            expected="node_addresses, or advertise, as well",
        )


def _within(field: str, inner: str) -> str:
    """A field of a section; of a list of sections, `inner` begins with its number, as [0]."""
    return f"{field}{inner}" if inner.startswith("[") or not inner else f"{field}.{inner}"


def _fill(raw: Any, environment: Mapping[str, str]) -> None:
    """Puts into a configuration what the environment knows of this node and the file does not say."""
    if not isinstance(raw, dict):
        return
    name = environment.get(NODE, "")
    if name:
        # Kubernetes' names of nodes may have dots, names in the mesh may not.
        raw.setdefault("node", name.replace(".", "-"))
        if isinstance(raw.get("kubernetes"), dict):
            raw["kubernetes"].setdefault("node", name)
    addresses = environment.get(NODE_ADDRESSES, "").replace(",", " ").split()
    if addresses:
        raw.setdefault("node_addresses", addresses)
    if environment.get(ADDRESS):
        raw.setdefault("advertise", environment[ADDRESS])


def _pop_policy(raw: Any) -> bool:
    """Takes `redirect.policy` out of a configuration: it is written in a language of its own."""
    redirect = raw.get("redirect") if isinstance(raw, dict) else None
    return isinstance(redirect, dict) and redirect.pop("policy", None) is not None


def _base_policy(node_addresses: Iterable[str]) -> Policy:
    # A zone says on which link an address is; packets do not bear it.
    addresses = (canonical_network(address.partition("%")[0]) for address in node_addresses)
    inbound = msgspec.structs.replace(DEFAULT.inbound, node_addresses=tuple(addresses))
    return msgspec.structs.replace(DEFAULT, inbound=inbound)


def _policy_of(text: bytes, source: str, base: Policy) -> Policy:
    """The policy in a configuration, read with the lines it stands on. InputErrors with all its faults."""
    (document,) = read_documents(text.decode(), source)
    policy = document["redirect"]["policy"]
    path = "redirect.policy"
    return policy_from_fields(policy, source, path, base=base, users=user_id, groups=group_id)


def _name(text: str) -> None:
    spiffe.label(text, "")


def _server(text: str) -> None:
    if not _SERVER.fullmatch(text):
        raise InputError(
            f"{text!r} is no server address", expected="unix:///path or http://host:port"
        )


def _access(access: Access) -> None:
    access.secret()
    access.tls()


def _addresses(texts: tuple[str, ...]) -> None:
    for text in texts:
        _address(text)


def _address(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError as error:
        raise InputError(f"{text!r} is no IP address", expected="IPv4 or IPv6") from error


def _absolute(path: Path) -> None:
    if not path.is_absolute():
        raise InputError(f"{str(path)!r} depends on where the agent is started", expected="/...")


def _socket(path: Path) -> None:
    _absolute(path)
    if len(bytes(path)) > LONGEST_SOCKET_PATH:
        raise InputError(
            f"{str(path)!r} is too long for a unix socket",
            expected=f"at most {LONGEST_SOCKET_PATH} bytes",
        )


def _listener(text: str) -> None:
    if text:
        Endpoint.of(text)


def _advertised(text: str) -> None:
    if text:
        _address(text)


def _if_said(check: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda value: value is None or check(value)


def _duration(seconds: float) -> None:
    if not 0 < seconds <= MAX_DURATION_S:
        raise InputError(
            f"{seconds} is no duration", expected="seconds, more than 0 and at most a year"
        )


_CHECKS: dict[str, Callable[..., object]] = {
    "node": _name,
    "server": _server,
    "consul": _access,
    "workloads": _if_said(_absolute),
    "kubernetes": _if_said(kubernetes.check),
    "cni": _if_said(cni.check),
    "processes": processes.check,
    "metrics": _listener,
    "peers": _listener,
    "advertise": _advertised,
    "node_addresses": _addresses,
    "run_dir": _absolute,
    "state_dir": _absolute,
    "socket": _socket,
    "bpffs": _absolute,
    "trust_domain": spiffe.trust_domain,
    "datacenter": _name,
    "window": _duration,
    "leaf_lifetime": _duration,
    "drain_time": _duration,
}
