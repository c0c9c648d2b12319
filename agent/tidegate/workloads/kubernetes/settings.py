"""What an agent is told about Kubernetes: where its API is, and which pods are redirected."""

import enum
import re
from pathlib import Path

import msgspec

from tidegate.errors import InputError
from tidegate.kubeapi.access import SERVICE_ACCOUNT, ApiAccess, check_server

_NODE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Enrolment(enum.StrEnum):
    """A rule by which pods are redirected to a sidecar; docs/kubernetes.md has them in full."""

    CONSUL = "consul"
    """Those that Consul injected its sidecar into, with a transparent proxy: the test of consul-cni."""
    ISTIO = "istio"
    """Those that Istio injected its sidecar into, without an init container that redirects."""
    ANNOTATED = "annotated"
    """Those that say so by the annotation tidegate.io/mesh."""

    @property
    def injection(self) -> str:
        """What a pod's template says to be given a sidecar by the mesh's own injector; empty where there is none."""
        match self:
            case Enrolment.CONSUL:
                return 'the annotation consul.hashicorp.com/connect-inject: "true"'
            case Enrolment.ISTIO:
                return 'the label sidecar.istio.io/inject: "true"'
            case Enrolment.ANNOTATED:
                return ""


class KubernetesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an agent knows the pods of its node."""

    server: str = ""
    """https://host:port of the API server; empty: as the agent's own pod is told it."""
    token_file: Path = SERVICE_ACCOUNT / "token"
    """Replaced by Kubernetes before it expires, and read before each request."""
    ca_file: Path = SERVICE_ACCOUNT / "ca.crt"
    node: str = ""
    """Name of this node in Kubernetes; empty: the agent's `node`."""
    enrol: Enrolment | tuple[Enrolment, ...] = (Enrolment.ANNOTATED,)
    """Which pods are redirected; none of them: all are only observed."""
    exclude_namespaces: tuple[str, ...] = ()
    """Namespaces whose pods are neither redirected nor observed."""
    mirror_namespaces: bool = False
    """Whether a pod's namespace is the Consul namespace of its service (consul-k8s: enableK8SNSMirroring)."""
    config_entries: bool = False
    """Whether config entries are Consul's custom resources in the cluster, not what the intent server has."""
    cgroups: Path = Path("/sys/fs/cgroup")
    """Where the node's cgroups are seen: pods that the CNI plugin has not told of are found by theirs."""

    @property
    def enrolments(self) -> tuple[Enrolment, ...]:
        return (self.enrol,) if isinstance(self.enrol, Enrolment) else self.enrol

    @property
    def access(self) -> ApiAccess:
        return ApiAccess(server=self.server, token_file=self.token_file, ca_file=self.ca_file)


def check(config: KubernetesConfig) -> None:
    """InputError, with a field relative to the section, for what cannot be meant."""
    check_server(config.server)
    for field, path in (
        ("token_file", config.token_file),
        ("ca_file", config.ca_file),
        ("cgroups", config.cgroups),
    ):
        if not path.is_absolute():
            raise InputError(
                f"{str(path)!r} depends on where the agent is started",
                field=field,
                expected="/...",
            )
    if config.node and not _NODE.fullmatch(config.node):
        raise InputError(
            f"{config.node!r} is no name of a node",
            field="node",
            expected="the metadata.name of this node",
        )
    for name in config.exclude_namespaces:
        if not _NAMESPACE.fullmatch(name):
            raise InputError(
                f"{name!r} is no name of a namespace",
                field="exclude_namespaces",
                expected="1 to 63 of a-z, 0-9 and -",
            )
