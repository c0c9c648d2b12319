"""The sources of workloads that an agent's configuration names, and the CNI server beside them.

What a node does without is not imported: it takes memory.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import TidegateError
from tidegate.intent.policy import Policy
from tidegate.kernel import netns
from tidegate.node.config import AgentConfig
from tidegate.node.metrics import Metrics
from tidegate.workloads.files import FileSource
from tidegate.workloads.source import Source, WatchState

if TYPE_CHECKING:
    from tidegate.node.cni import CniServer
    from tidegate.workloads.attachments import Attachments
    from tidegate.workloads.kubernetes.source import KubernetesSource


class Sources:
    """Of one agent."""

    def __init__(self, config: AgentConfig) -> None:
        """TidegateError when what a source keeps on disk cannot be used."""
        self._config = config
        self._attachments = _attachments(config) if config.cni else None
        self.kubernetes = _kubernetes(config, self._attachments) if config.kubernetes else None
        """The pods of this node; the only source that has something to do in the background."""
        self.by_name: Mapping[str, Source] = {
            name: source
            for name, source in (
                ("the workload files", FileSource(config.workloads) if config.workloads else None),
                ("Kubernetes", self.kubernetes),
                ("the services of this machine", _processes(config) if config.processes else None),
                ("CNI", self._attachments),
            )
            if source is not None
        }

    def cni_server(
        self,
        engine: Engine,
        *,
        wake: Callable[[], None],
        is_ready: Callable[[], bool],
        policy_in_force: Callable[[str], Policy | None],
        metrics: Metrics,
    ) -> "CniServer | None":
        """Who answers the node's CNI plugin; None where none is configured."""
        if self._config.cni is None or self._attachments is None:
            return None
        from tidegate.node.cni import CniServer

        return CniServer(
            self._config.cni,
            self._config.redirect,
            engine,
            self._attachments,
            pods=self.kubernetes,
            wake=wake,
            is_ready=is_ready,
            policy_in_force=policy_in_force,
            metrics=metrics,
        )

    def is_leaving(self, place: netns.Identity) -> bool:
        """Whether CNI says that the container of a network namespace ends, whatever other sources tell."""
        return self._attachments is not None and self._attachments.is_leaving(place)

    @property
    def watch(self) -> WatchState | None:
        """How the watch of the Kubernetes API is doing; None where Kubernetes is not a source."""
        return self.kubernetes.watch if self.kubernetes else None


def _attachments(config: AgentConfig) -> "Attachments":
    from tidegate.workloads.attachments import Attachments

    directory = config.run_dir / "attachments"
    try:
        return Attachments(directory)
    except OSError as error:
        raise TidegateError(f"{directory} cannot be used: {error.strerror}") from error


def _kubernetes(config: AgentConfig, attachments: "Attachments | None") -> "KubernetesSource":
    from tidegate.workloads.kubernetes.source import KubernetesSource

    assert config.kubernetes is not None  # noqa: S101 - asked for only then
    find = attachments.find if attachments is not None else _found_nowhere
    return KubernetesSource(config.kubernetes, config.node, find, config.state_dir / "pods.json")


def _found_nowhere(_uid: str, _namespace: str, _name: str) -> str | None:
    return None


def _processes(config: AgentConfig) -> Source:
    from tidegate.workloads.processes.source import ProcessSource

    return ProcessSource(config.processes, config.node)
