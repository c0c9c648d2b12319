"""Onboarding over an agent's API: questions and changes, with a catalog of this test's own behind a real socket."""

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from tidegate.catalog.client import Snapshot
from tidegate.intent.entries import (
    EntryKey,
    Kind,
    Mesh,
    ProxyDefaults,
    ServiceDefaults,
    ServiceIntentions,
    parse_entries,
)
from tidegate.model import Direction, FlowClass, Instance, Interval, MutualTLSMode, ServicePort
from tidegate.node import api, modes
from tidegate.node.client import AgentClient, AgentRefused
from tidegate.node.config import AgentConfig
from tidegate.node.flows import OUTSIDE_SIDECARS, THROUGH_SIDECAR, NamedEdge, Party
from tidegate.node.mesh import LocalEvidence, MeshView, NodeEvidence, NodeFlows
from tidegate.node.onboarding import outbound_calls
from tidegate.node.pulse import Pulse
from tidegate.verdict.evidence import EdgeEvidence, InstanceEvidence, WitnessReading

PERMISSIVE = MutualTLSMode.PERMISSIVE
API, LEGACY, WEB = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def instance(name, address, *, meshed=True, **fields):
    return Instance(
        id=f"id-{name}",
        name=f"{name}-1",
        service=name,
        node="n1",
        addresses=(address,),
        port=8080,
        meshed=meshed,
        seen_from=1.0,
        **fields,
    )


class Catalog:
    """Entries with compare-and-set; every sidecar follows at once."""

    outdated = ""
    is_of_cluster = False

    def __init__(self, *entries, instances=()):
        self.index = 0
        self.entries = {}
        for entry in entries:
            self.put(entry)
        self.instances = instances

    def put(self, entry):
        self.index += 1
        self.entries[entry.key] = msgspec.structs.replace(entry, modify_index=self.index)

    async def read_entries(self, kind):
        return tuple(entry for entry in self.entries.values() if entry.kind is kind)

    async def write_entry(self, entry, cas):
        present = self.entries.get(entry.key)
        if cas != (present.modify_index if present else 0):
            return False
        self.put(entry)
        return True

    async def refresh(self):
        return self.current()

    def current(self):
        own = self.entries.get(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
        mode = (own.mutual_tls_mode if own else None) or MutualTLSMode.STRICT
        return Snapshot(
            index=self.index,
            entries=tuple(self.entries.values()),
            instances=tuple(
                msgspec.structs.replace(one, mode=mode, applied_index=self.index)
                for one in self.instances
            ),
        )


def called(by, flow_class=FlowClass.PLAINTEXT, port=8080, connections=3):
    now = time.time()
    return EdgeEvidence(
        peer=by,
        port=port,
        flow_class=flow_class,
        connections=connections,
        first_seen=now - 5,
        last_seen=now,
    )


class Agent:
    """One node's agent without the rest: `edges` by service, `rows` of flows."""

    def __init__(self, directory: Path, catalog, edges=None, rows=(), problem=""):
        self.path = directory / "agent.sock"
        self.catalog = catalog
        self.edges = edges or {}
        self.rows = rows
        self.problem = problem
        config = AgentConfig(
            node="n1", server="unix:///s", workloads=Path("/w"), trust_domain="mesh.consul"
        )
        self.local = LocalEvidence(self.evidence, self.flows)
        self.mesh = MeshView(config, catalog, catalog, self.local)

    async def evidence(self, service, window_s):
        now = time.time()
        return NodeEvidence(
            instances=tuple(
                InstanceEvidence(
                    instance=one,
                    created_at=1.0,
                    inbound_redirected=one.meshed,
                    coverage=(Interval(now - 2 * window_s, now + 60),),
                    edges=tuple(self.edges.get(service, ())),
                    witness=WitnessReading(agrees=True),
                    sidecar_problem=self.problem if one.meshed else "",
                )
                for one in self.catalog.current().instances
                if service == one.service or service in [each.service for each in one.more_ports]
            )
        )

    async def flows(self, _window_s):
        return NodeFlows(node="n1", observed=("api-1",), flows=self.rows)

    @contextlib.asynccontextmanager
    async def serving(self):
        async def status():
            return {}

        async def exposition():
            return b""

        runner = web.AppRunner(
            api.make_app(self.mesh, self.local, None, status, exposition, Pulse()),
            shutdown_timeout=0.1,
        )
        await runner.setup()
        await web.SockSite(runner, api.listen(self.path)).start()
        try:
            async with AgentClient(f"unix://{self.path}") as client:
                yield client
        finally:
            await runner.cleanup()

    def get(self, path, **query):
        async def one():
            async with self.serving() as client:
                return await client.get(path, **query)

        return asyncio.run(asyncio.wait_for(one(), 20))

    def post(self, path, **body):
        async def every():
            async with self.serving() as client:
                return [event async for event in client.stream(path, body)]

        return asyncio.run(asyncio.wait_for(every(), 20))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(modes, "POLL_S", 0.005)


def a_mesh(*entries):
    return Catalog(
        *entries,
        instances=(
            instance("api", API),
            instance("legacy", LEGACY, meshed=False),
            instance("web", WEB),
        ),
    )


GATE = Mesh(allow_enabling_permissive_mutual_tls=True)
API_PERMISSIVE = ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE)


def calls():
    """As of now: a verdict's window ends when it is asked for."""
    return {"api": (called(LEGACY), called(WEB, FlowClass.MESH, 20000))}


def test_the_status_names_callers_modes_and_the_next_steps(tmp_path):
    agent = Agent(tmp_path, a_mesh(GATE, API_PERMISSIVE), calls())
    answer = agent.get("/v1/onboard/status", window="60")
    api_ = next(one for one in answer["services"] if one["service"] == "api")
    assert (api_["mode"], api_["mode_source"]) == ("permissive", "service-defaults")
    assert (api_["mesh_share"], api_["blocking"]) == (0.5, ["legacy"])
    assert {one["name"]: one["permission"] for one in api_["downstreams"]} == {
        "legacy": "missing",
        "web": "missing",
    }
    assert answer["next_steps"][0]["subject"] == "legacy"
    assert answer["problems"] == []


def test_the_mode_may_come_from_proxy_defaults_or_a_registration_or_nowhere(tmp_path):
    def source(catalog):
        answer = Agent(tmp_path, catalog).get("/v1/onboard/status", window="60")
        [one] = [one for one in answer["services"] if one["service"] == "api"]
        return one["mode"], one["mode_source"]

    assert source(a_mesh()) == ("strict", "default")
    assert source(a_mesh(ProxyDefaults(mutual_tls_mode=PERMISSIVE))) == (
        "permissive",
        "proxy-defaults",
    )
    registered = Catalog(instances=(instance("api", API, registered_mode=PERMISSIVE),))
    assert source(registered) == ("permissive", "registration")


def test_envoys_rejection_is_shown_where_the_user_looks(tmp_path):
    agent = Agent(tmp_path, a_mesh(GATE), problem="refuses its configuration: bad filter")
    answer = agent.get("/v1/onboard/status", window="60")
    api_ = next(one for one in answer["services"] if one["service"] == "api")
    [problem] = api_["sidecar_problems"]
    assert problem["problem"] == "refuses its configuration: bad filter"


def test_a_plan_of_several_services_comes_in_order_and_an_unknown_one_is_refused(tmp_path):
    agent = Agent(tmp_path, a_mesh(GATE), calls())
    answer = agent.get("/v1/onboard/plan", services="api,legacy", window="60")
    assert [one["service"] for one in answer["services"]] == ["legacy", "api"]
    with pytest.raises(AgentRefused, match="did you mean legacy") as caught:
        agent.get("/v1/onboard/plan", services="legacyy")
    assert caught.value.exit_code == 2


def test_suggestions_are_added_to_what_is_there_and_written_once(tmp_path):
    [present] = parse_entries(
        'Kind = "service-intentions" Name = "api" Sources = [{ Name = "shop" Action = "deny" }]',
        "-",
    )
    catalog = a_mesh(GATE, API_PERMISSIVE, present)
    agent = Agent(tmp_path, catalog, calls())
    [mesh_only] = agent.get("/v1/intentions/suggest", window="60")["suggestions"]
    assert [one["Name"] for one in mesh_only["entry"]["Sources"]] == ["shop", "web"]
    [done] = agent.post("/v1/intentions", service="api", window_s=60.0, all_callers=True)
    assert [one["written"] for one in done["suggestions"]] == [True]
    entry = catalog.entries[EntryKey(Kind.SERVICE_INTENTIONS, "api")]
    assert isinstance(entry, ServiceIntentions)
    assert {one.name: str(one.action) for one in entry.sources} == {
        "shop": "deny",
        "web": "allow",
        "legacy": "allow",
    }
    assert agent.get("/v1/intentions/suggest", window="60", callers="all")["suggestions"] == []


@pytest.mark.parametrize("query", [{"callers": "some"}, {"window": "0"}, {"service": "API"}])
def test_a_bad_question_for_suggestions_is_refused(tmp_path, query):
    with pytest.raises(AgentRefused) as caught:
        Agent(tmp_path, a_mesh()).get("/v1/intentions/suggest", **query)
    assert caught.value.exit_code == 2


def test_a_service_becomes_permissive_over_the_api_and_not_behind_a_closed_gate(tmp_path):
    [refused] = Agent(tmp_path, a_mesh()).post("/v1/permissive", service="api")
    assert refused["exit_code"] == 1
    assert "tidegate config write -` opens it" in refused["message"]
    events = Agent(tmp_path, a_mesh(GATE)).post("/v1/permissive", service="api")
    assert [one["event"] for one in events] == ["written", "warning", "enforced"]


def test_an_unknown_service_is_refused_before_anything_is_streamed(tmp_path):
    for path, body in (
        ("/v1/permissive", {"service": "apj"}),
        ("/v1/permissive", {"servic": "api"}),
    ):
        with pytest.raises(AgentRefused) as caught:
            Agent(tmp_path, a_mesh(GATE)).post(path, **body)
        assert caught.value.exit_code == 2


def test_re_securing_goes_over_the_api_and_proves_itself(tmp_path):
    catalog = a_mesh(GATE)
    events = Agent(tmp_path, catalog).post("/v1/resecure", window_s=60.0)
    assert [one["event"] for one in events] == ["checked", "written", "proved"]
    assert catalog.entries[EntryKey(Kind.MESH, "mesh")].transparent_proxy.mesh_destinations_only


# Flows


def edge(caller, server, **fields):
    whole = {
        "port": 8080,
        "flow_class": FlowClass.PLAINTEXT,
        "path": THROUGH_SIDECAR,
        "observed_at": Direction.OUTBOUND,
        "connections": 1,
        "bytes_to_server": 1,
        "bytes_to_client": 1,
        "first_seen": 1.0,
        "last_seen": 2.0,
        **fields,
    }
    return NamedEdge(caller=caller, server=server, **whole)


def party(name, address, *, meshed=True):
    return Party(
        address=address, addresses=(address,), workload=f"{name}-1" if name else "",
        service=name, node="n1" if name else "", meshed=meshed,
    )  # fmt: skip


LIVING = (instance("api", API), instance("legacy", LEGACY, meshed=False), instance("web", WEB))
WEB_END, OUT = party("web", WEB), party("", "192.0.2.1", meshed=False)


def test_flows_say_which_connections_intentions_would_refuse(tmp_path):
    rows = (
        edge(
            party("legacy", LEGACY, meshed=False), party("api", API), observed_at=Direction.INBOUND
        ),
        edge(WEB_END, party("api", API), observed_at=Direction.INBOUND, flow_class=FlowClass.TLS),
        edge(
            party("cron", "10.0.0.9"), party("api", API), observed_at=Direction.INBOUND, port=20000
        ),
    )
    [allowed] = parse_entries(
        'Kind = "service-intentions" Name = "api" Sources = [{ Name = "web" Action = "allow" }]',
        "-",
    )
    agent = Agent(tmp_path, a_mesh(GATE, API_PERMISSIVE, allowed), rows=rows)
    told = agent.get("/v1/flows")["flows"]
    assert {(one["caller"]["service"], one["port"]): one["would_be_denied"] for one in told} == {
        ("legacy", 8080): True,
        ("web", 8080): False,
        ("cron", 20000): False,
    }
    strict = Agent(tmp_path, a_mesh(GATE), rows=rows).get("/v1/flows")["flows"]
    assert not any(one["would_be_denied"] for one in strict), "strict mode lets nobody in anyway"


@pytest.mark.parametrize(
    ("row", "destination"),
    [
        (edge(WEB_END, OUT), "192.0.2.1"),
        (edge(WEB_END, party("legacy", LEGACY, meshed=False)), "legacy"),
        (edge(WEB_END, party("api", API)), "api"),
        (edge(WEB_END, OUT, path=OUTSIDE_SIDECARS), None),
        (edge(WEB_END, OUT, flow_class=FlowClass.EMPTY), None),
        (edge(party("legacy", LEGACY, meshed=False), OUT), None),
        (edge(WEB_END, party("api", API), port=20000, flow_class=FlowClass.MESH), None),
        (edge(WEB_END, OUT, observed_at=Direction.INBOUND), None),
        (edge(WEB_END, OUT, connections=0, bytes_to_server=0, bytes_to_client=0), None),
    ],
)
def test_what_a_sidecar_passes_on_as_it_is_would_be_cut_off(row, destination):
    found = outbound_calls([row], LIVING)
    assert [one.destination or one.address for one in found] == (
        [destination] if destination else []
    )


def test_a_destination_that_is_reached_with_mtls_since_is_not_cut_off():
    before = edge(WEB_END, party("api", API), last_seen=5.0)
    after = edge(
        WEB_END,
        party("api", API),
        port=20000,
        flow_class=FlowClass.MESH,
        first_seen=6.0,
        last_seen=9.0,
    )
    assert outbound_calls([before, after], LIVING) == ()
    still = msgspec.structs.replace(before, last_seen=7.0)
    assert len(outbound_calls([still, after], LIVING)) == 1


def test_a_workload_with_two_services_is_judged_for_each_by_its_own_port(tmp_path):
    two = instance("api", API, more_ports=(ServicePort(service="admin", port=9090),))
    catalog = Catalog(
        GATE, API_PERMISSIVE, instances=(two, instance("legacy", LEGACY, meshed=False))
    )
    both = (called(LEGACY, port=8080), called(LEGACY, port=9090, connections=7))
    agent = Agent(tmp_path, catalog, {"api": both, "admin": both})
    answer = agent.get("/v1/onboard/status", window="60")
    seen = {one["service"]: one["connections"] for one in answer["services"]}
    assert (seen["api"], seen["admin"]) == (3, 7)
