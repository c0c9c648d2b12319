"""The agent's metrics in the text format of Prometheus: what happened since it runs, and how things are now.

What happened is counted where it happens, by the methods of `Metrics`, from any thread. How things are is read when
somebody asks, from a `NodeState`. Every metric has the same labels for good, so that a rate is never interrupted;
names of workloads stand in one metric only, of a bounded number of series. docs/operations.md says what each means.
"""

import contextlib
import enum
import importlib.metadata
import itertools
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate.model import Direction, FlowClass, MutualTLSMode, Sidecar
from tidegate.node.status import RedirectState, Status, WorkloadStatus
from tidegate.workloads.source import Treatment, WatchState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_NAMED = 200
"""How many workloads with a problem are named; `tidegate_workload_problems` counts them all."""
CNI_COMMANDS = ("ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION")
_OTHER = "other"

_APPLY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_CNI_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0)
_ROUND_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class CniResult(enum.StrEnum):
    """What became of one call of the CNI plugin."""

    OK = "ok"
    """Done, and proven where that was asked."""
    LEFT_ALONE = "left-alone"
    """Answered without touching the container: it is not to be redirected."""
    REFUSED = "refused"
    """The call itself cannot be understood, or is not allowed."""
    FAILED = "failed"
    """The runtime was told that it went wrong."""


class Traffic(msgspec.Struct, frozen=True):
    """What workloads were seen to send and receive in one direction and class, since the agent runs."""

    direction: Direction
    flow_class: FlowClass
    connections: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What the node's observation says of itself and of the traffic."""

    traffic: tuple[Traffic, ...] = ()
    lost: Mapping[str, int] = {}
    """What was lost, by observe.classifier.Losses.lost_by_name, since the kernel's maps were made."""
    coverage: tuple[float, ...] = ()
    """For each workload, the share (0 to 1) of the window in which it was observed, counted since it is there."""
    edges: Mapping[FlowClass, int] = {}
    """How many edges the kernel counts, by class."""
    room: int = 0
    """How many it can count."""


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """How things are at the moment of a question."""

    status: Status
    observed: Observed = Observed()
    backend: str = ""
    """That rules go through; empty where that is not known."""
    intent_at: float = 0.0
    """When the intent server last answered; 0 for never."""
    watch: WatchState | None = None
    """None where Kubernetes is not a source."""


class Metrics:
    """One agent's metrics. Methods may be called from any thread."""

    def __init__(self) -> None:
        # Whoever scrapes sees by process_start_time_seconds when counting began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._applies = Histogram(
            "tidegate_redirect_apply_duration_seconds",
            "How long it took to make a network namespace follow its policy",
            ("result",),
            buckets=_APPLY_BUCKETS,
            registry=self._registry,
        )
        self._repairs = Counter(
            "tidegate_redirect_repairs_total",
            "Redirections that somebody else had changed and that were repaired",
            registry=self._registry,
        )
        self._cni = Histogram(
            "tidegate_cni_request_duration_seconds",
            "How long calls of the CNI plugin took in the agent",
            ("command", "result"),
            buckets=_CNI_BUCKETS,
            registry=self._registry,
        )
        self._rounds = Histogram(
            "tidegate_round_duration_seconds",
            "How long rounds of the reconcile loop took",
            ("result",),
            buckets=_ROUND_BUCKETS,
            registry=self._registry,
        )
        for result in ("ok", "failed"):
            self._applies.labels(result)
            self._rounds.labels(result)
        for command, outcome in itertools.product(CNI_COMMANDS, CniResult):
            self._cni.labels(command, outcome)
        self._version = importlib.metadata.version("tidegate")
        self._highest: dict[tuple[str, ...], int] = {}

    @contextlib.contextmanager
    def applying(self) -> Iterator[None]:
        """Times one apply of a policy in a namespace; it failed if an exception comes out."""
        with _timed(self._applies):
            yield

    def repaired(self) -> None:
        """A redirection was not as it should be, and is again."""
        self._repairs.inc()

    def cni_call(self, command: str, result: CniResult, seconds: float) -> None:
        """A call of the CNI plugin was answered after so many seconds."""
        known = command if command in CNI_COMMANDS else _OTHER
        self._cni.labels(known, result).observe(seconds)

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Times one round of the reconcile loop; it failed if an exception comes out."""
        with _timed(self._rounds):
            yield

    def exposition(self, state: NodeState) -> bytes:
        """All metrics, as a scrape is answered."""
        return generate_latest(self._registry) + generate_latest(_Families(self._families(state)))

    def _families(self, state: NodeState) -> Iterator[Metric]:
        status = state.status
        yield _gauge(
            "tidegate_build_info",
            "Always 1; what runs here",
            {("version", "backend"): {(self._version, state.backend): 1}},
        )
        yield _plain(
            "tidegate_last_round_timestamp_seconds",
            "When the last round of the reconcile loop was completed; 0 before the first",
            status.round_at,
        )
        yield _plain(
            "tidegate_intent_answered_timestamp_seconds",
            "When the intent server last answered; 0 for never",
            state.intent_at,
        )
        yield from _workload_families(status)
        yield from self._observation_families(state.observed)
        yield from _watch_families(state.watch)

    def _observation_families(self, observed: Observed) -> Iterator[Metric]:
        connections = CounterMetricFamily(
            "tidegate_observed_connections_total",
            "TCP connections seen at workloads' interfaces",
            labels=("direction", "class"),
        )
        volume = CounterMetricFamily(
            "tidegate_observed_bytes_total",
            "TCP payload seen at workloads' interfaces",
            labels=("direction", "class", "to"),
        )
        told = {(one.direction, one.flow_class): one for one in observed.traffic}
        for direction, flow_class in itertools.product(Direction, FlowClass):
            one = told.get((direction, flow_class)) or Traffic(direction, flow_class)
            labels = (direction.value, flow_class.value)
            connections.add_metric(labels, self._up("connections", labels, one.connections))
            volume.add_metric((*labels, "server"), self._up("server", labels, one.bytes_to_server))
            volume.add_metric((*labels, "client"), self._up("client", labels, one.bytes_to_client))
        yield connections
        yield volume
        overflow, losses = _split(observed.lost)
        yield _counter(
            "tidegate_observation_losses_total",
            "What observation lost, since the kernel's maps were made",
            "what",
            losses,
        )
        yield _counter(
            "tidegate_edge_overflow_total",
            "Connections whose edge found no room in the kernel, since its maps were made",
            "class",
            {each.value: 0 for each in FlowClass} | overflow,
        )
        yield _gauge(
            "tidegate_edges",
            "Edges that the kernel counts",
            {("class",): {(each.value,): observed.edges.get(each, 0) for each in FlowClass}},
        )
        yield _plain("tidegate_edges_limit", "Edges that the kernel can count", observed.room)
        shares = observed.coverage or (1.0,)
        yield _plain(
            "tidegate_coverage_ratio",
            "Share of the observation window in which workloads were observed, their mean",
            sum(shares) / len(shares),
        )
        yield _plain(
            "tidegate_coverage_lowest_ratio",
            "Share of the observation window in which the workload was observed that was observed least",
            min(shares),
        )

    def _up(self, what: str, labels: tuple[str, ...], count: int) -> int:
        """A count that never goes down: a connection whose class changes is counted anew there, and the class that it
        left counts on when it has made up for it.
        """
        highest = max(self._highest.get((what, *labels), 0), count)
        self._highest[what, *labels] = highest
        return highest


class _Families(Collector):
    """Metrics that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


@contextlib.contextmanager
def _timed(histogram: Histogram) -> Iterator[None]:
    began = time.monotonic()
    result = "failed"
    try:
        yield
        result = "ok"
    finally:
        histogram.labels(result).observe(time.monotonic() - began)


def _workload_families(status: Status) -> Iterator[Metric]:
    redirected = Tally(
        (one.redirect.value, one.sidecar.value if one.wanted_in_mesh else "none")
        for one in status.workloads
    )
    kinds = itertools.product(RedirectState, (*Sidecar, "none"))
    yield _gauge(
        "tidegate_workloads",
        "Workloads of this node by the state of their redirection and by whose sidecar they have",
        {
            ("redirect", "sidecar"): {
                (str(state), str(sidecar)): redirected[str(state), str(sidecar)]
                for state, sidecar in kinds
            }
        },
    )
    modes = Tally(one.mode for one in status.workloads)
    yield _gauge(
        "tidegate_workloads_by_mode",
        "Workloads of this node whose sidecar is known to enforce a mode of mTLS",
        {("mode",): {(mode.value,): modes[mode.value] for mode in MutualTLSMode}},
    )
    yield _plain(
        "tidegate_workloads_observed",
        "Workloads of this node whose interface is observed",
        sum(one.observed_since > 0 for one in status.workloads),
    )
    treated = Tally(one.treatment for one in status.left_alone)
    yield _gauge(
        "tidegate_workloads_left_alone",
        "What runs on this node and is not looked after, by reason",
        {("treatment",): {(each.value,): treated[each] for each in Treatment}},
    )
    named = _with_problems(status)
    yield _plain(
        "tidegate_workload_problems", "Workloads of this node that have a problem", len(named)
    )
    yield _gauge(
        "tidegate_workload_problem",
        f"Always 1; a workload that has a problem (the first {MOST_NAMED} by name)",
        {("namespace", "workload"): dict.fromkeys(named[:MOST_NAMED], 1)},
    )
    yield _plain("tidegate_problems", "Problems of the agent as a whole", len(status.problems))


def _with_problems(status: Status) -> list[tuple[str, str]]:
    """Namespace and name of every workload with a problem, in order; what runs and was not found is one too."""
    found = {(one.namespace, one.name) for one in status.workloads if has_problem(one)}
    found |= {
        (one.namespace, one.name)
        for one in status.left_alone
        if one.treatment is Treatment.NOT_FOUND
    }
    return sorted(found)


def has_problem(one: WorkloadStatus) -> bool:
    """Whether a workload is not as it should be."""
    return bool(one.problem) or one.redirect in (
        RedirectState.DRIFTED,
        RedirectState.BLOCKED,
        RedirectState.FAILED,
    )


def _watch_families(watch: WatchState | None) -> Iterator[Metric]:
    """None at all where Kubernetes is not a source: 0 would say that its watch is broken."""
    if watch is None:
        return
    yield _plain(
        "tidegate_kubernetes_watch_connected",
        "Whether the watch of this node's pods is connected to the Kubernetes API",
        watch.is_connected,
    )
    yield _plain(
        "tidegate_kubernetes_answered_timestamp_seconds",
        "When the Kubernetes API last said anything; 0 for never",
        watch.answered_at,
    )
    failures = CounterMetricFamily(
        "tidegate_kubernetes_failures_total", "Lists and watches of the Kubernetes API that failed"
    )
    failures.add_metric((), watch.failures)
    yield failures
    yield _plain("tidegate_kubernetes_pods", "Pods of this node that are known", watch.pods)


def _split(lost: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Overflows by class, and everything else that was lost by its name."""
    prefix = "overflow_"
    overflow = {name.removeprefix(prefix): n for name, n in lost.items() if name.startswith(prefix)}
    return overflow, {name: n for name, n in lost.items() if not name.startswith(prefix)}


def _plain(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _gauge(
    name: str, text: str, values: Mapping[tuple[str, ...], Mapping[tuple[str, ...], float]]
) -> Metric:
    """`values`: by the names of the labels, the value for each combination of them."""
    ((labels, by_labels),) = values.items()
    family = GaugeMetricFamily(name, text, labels=labels)
    for each, value in by_labels.items():
        family.add_metric(each, value)
    return family


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for each, value in sorted(values.items()):
        family.add_metric((each,), value)
    return family
