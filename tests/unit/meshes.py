"""Meshes for the tests of onboarding: services, who calls them and how, written down as facts."""

from tidegate.model import (
    FlowClass,
    Instance,
    IntentionRule,
    Interval,
    MutualTLSMode,
    ServiceIntent,
)
from tidegate.verdict.evidence import (
    EdgeEvidence,
    InstanceEvidence,
    ServiceEvidence,
    WitnessReading,
)
from tidegate.verdict.onboarding import GlobalSettings, MeshFacts, ModeSource, ServiceFacts
from tidegate.verdict.readiness import judge
from tidegate.verdict.steps import Environment, Place

NOW = 1_700_000_000.0
WINDOW = 60.0
STRICT, PERMISSIVE = MutualTLSMode.STRICT, MutualTLSMode.PERMISSIVE
OPEN = GlobalSettings(gate_open=True, entry={"Kind": "mesh"})


class Service:
    """A service of one instance, and who calls it: see `plain`, `tls` and `mesh`."""

    def __init__(
        self,
        name,
        *callers,
        meshed=True,
        mode=STRICT,
        allow=(),
        deny=(),
        default_allow=False,
        excluded=False,
        problem="",
        source=ModeSource.SERVICE_DEFAULTS,
    ):
        self.name = name
        self.callers = callers
        self.meshed = meshed
        self.mode = mode
        self.rules = tuple(
            IntentionRule(source=one, allow=allowed)
            for allowed, names in ((True, allow), (False, deny))
            for one in names
        )
        self.default_allow = default_allow
        self.excluded = excluded
        self.problem = problem
        self.source = source


def facts(*services, settings=(OPEN,), outbound=(), problems=(), **fields):
    """The facts of these services. Each has the address 10.0.0.N by its place in the list, from 1."""
    addresses = {one.name: f"10.0.0.{number}" for number, one in enumerate(services, 1)}
    instances = {
        one.name: Instance(
            id=f"id-{one.name}",
            name=f"{one.name.rpartition('/')[2]}-1",
            service=one.name,
            node="n1",
            addresses=(addresses[one.name],),
            port=8080,
            meshed=one.meshed,
            mode=one.mode,
            seen_from=1.0,
        )
        for one in services
    }
    return MeshFacts(
        services=tuple(_facts(one, instances, addresses) for one in services),
        settings=settings,
        outbound=outbound,
        problems=problems,
        window_s=WINDOW,
        at=NOW,
        place=fields.pop("place", Place(environment=Environment.LAB)),
        **fields,
    )


def _facts(one, instances, addresses):
    own = instances[one.name]
    intent = ServiceIntent(
        service=one.name, mode=one.mode, intentions=one.rules, default_allow=one.default_allow
    )
    evidence = InstanceEvidence(
        instance=own,
        created_at=1.0,
        inbound_redirected=one.meshed,
        excluded_inbound_ports=((8080, 8080),) if one.excluded else (),
        coverage=(Interval(NOW - 1000, NOW),),
        edges=tuple(_edge(caller, addresses) for caller in one.callers),
        witness=WitnessReading(agrees=True),
        sidecar_problem=one.problem,
    )
    verdict = judge(
        intent,
        ServiceEvidence(service=one.name, instances=(evidence,)),
        known=tuple(instances.values()),
        window_s=WINDOW,
        now=NOW,
    )
    return ServiceFacts(intent=intent, mode_source=one.source, verdict=verdict, instances=(own,))


def _edge(caller, addresses):
    name, flow_class, connections = caller
    return EdgeEvidence(
        peer=addresses.get(name, name),
        port=20000 if flow_class is FlowClass.MESH else 8080,
        flow_class=flow_class,
        connections=connections,
        first_seen=NOW - 10,
        last_seen=NOW - 1,
    )


def plain(name, connections=1):
    return (name, FlowClass.PLAINTEXT, connections)


def tls(name, connections=1):
    return (name, FlowClass.TLS, connections)


def mesh(name, connections=1):
    return (name, FlowClass.MESH, connections)
