"""Becoming permissive and re-securing, against a server of this test's own; entries that change in one thing only."""

import asyncio

import msgspec
import pytest

from tidegate.catalog.client import Snapshot
from tidegate.errors import InputError
from tidegate.intent.changes import allowing, mesh_entry_of, partitions, secured, written_by_hand
from tidegate.intent.entries import (
    EntryKey,
    Kind,
    Mesh,
    MeshTransparentProxy,
    ProxyDefaults,
    ServiceDefaults,
    ServiceIntentions,
    parse_entries,
)
from tidegate.model import FlowClass, Instance, MutualTLSMode
from tidegate.node import changes, modes
from tidegate.node.mesh import ChangedMeanwhile
from tidegate.verdict.onboarding import MeshFacts, OutboundCall

STRICT, PERMISSIVE = MutualTLSMode.STRICT, MutualTLSMode.PERMISSIVE
OPEN = Mesh(allow_enabling_permissive_mutual_tls=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(modes, "POLL_S", 0.005)
    monkeypatch.setattr(modes, "ENFORCE_DEADLINE_S", 0.2)


class FakeMesh:
    """Entries by key, two sidecars of `api` that follow, unless told otherwise."""

    outdated = ""

    def __init__(self, *entries, meshed=True, **fields):
        self.index = 10
        self.entries = {}
        for entry in entries:
            self.put(entry)
        self.follows = True
        self.meshed = meshed
        self.fields = fields
        self.races = 0

    def put(self, entry):
        self.index += 1
        self.entries[entry.key] = msgspec.structs.replace(entry, modify_index=self.index)

    async def snapshot(self):
        return Snapshot(
            index=self.index,
            entries=tuple(self.entries.values()),
            instances=await self.instances(None),
        )

    async def instances(self, service):
        own = self.entries.get(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
        mode = (own.mutual_tls_mode if own else None) or STRICT
        return tuple(
            Instance(
                id=f"id-{number}",
                name=f"api-{number}",
                service="api",
                node="n1",
                meshed=self.meshed,
                mode=mode if self.follows else STRICT,
                applied_index=self.index if self.follows else 0,
                **self.fields,
            )
            for number in range(2)
            if service in (None, "api")
        )

    async def read_entry(self, key):
        return self.entries.get(key)

    async def write_entry(self, entry):
        if self.races:
            self.races -= 1
            raise ChangedMeanwhile("changed")
        self.put(entry)
        return self.index

    async def sidecar_problems(self, service):
        return ("the sidecar of api-0 refuses its configuration: port in use",)

    async def opens_gate(self, service):
        mesh = self.entries.get(EntryKey(Kind.MESH, "mesh"))
        allowed = mesh is not None and mesh.allow_enabling_permissive_mutual_tls
        return "" if allowed else "open the gate"


def told(events):
    async def every():
        return [event async for event in events]

    found = asyncio.run(every())
    assert [one.exit_code is not None for one in found] == [False] * (len(found) - 1) + [True]
    return found


def permissive(mesh, service="api", *, force=False):
    return told(changes.permissive(mesh, service, force=force))


class Onboarding:
    """Gives these calls out of the mesh."""

    def __init__(self, *outbound, problems=()):
        self.given = MeshFacts(
            services=(), outbound=outbound, problems=problems, window_s=60.0, at=100.0
        )

    async def facts(self, _window_s):
        return self.given


CALL = OutboundCall(
    caller="web-1",
    caller_service="web",
    node="n1",
    address="192.0.2.1",
    port=443,
    flow_class=FlowClass.TLS,
    connections=1,
    last_seen=99.0,
)


def resecure(mesh, *outbound, force=False, problems=()):
    onboarding = Onboarding(*outbound, problems=problems)
    return told(changes.resecure(mesh, onboarding, None, force=force))


def names(events):
    return [one.event for one in events]


# Permissive


def test_a_service_becomes_permissive_and_every_sidecar_is_waited_for():
    mesh = FakeMesh(OPEN, ServiceDefaults(name="api", protocol="http"))
    events = permissive(mesh)
    assert names(events) == ["written", "warning", "enforced"]
    assert events[-1].message == "api: 2 of 2 sidecars run permissive mode"
    own = mesh.entries[EntryKey(Kind.SERVICE_DEFAULTS, "api")]
    assert (own.mutual_tls_mode, own.protocol) == (PERMISSIVE, "http"), "the rest stays"


def test_a_closed_gate_refuses_with_the_command_that_opens_it():
    for entries in ((), (Mesh(),)):
        mesh = FakeMesh(*entries)
        [event] = permissive(mesh)
        assert (event.event, event.exit_code) == ("refused", 1)
        assert "AllowEnablingPermissiveMutualTLS is false" in event.message
        assert "`open the gate` opens it" in event.message
        assert EntryKey(Kind.SERVICE_DEFAULTS, "api") not in mesh.entries


def test_a_service_that_is_permissive_stays_so_behind_a_closed_gate():
    mesh = FakeMesh(ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE))
    assert names(permissive(mesh)) == ["unchanged", "enforced"]


def test_sidecars_that_do_not_follow_are_named():
    mesh = FakeMesh(OPEN)
    mesh.follows = False
    events = permissive(mesh)
    assert (events[-1].event, events[-1].exit_code) == ("behind", 1)
    assert "api-0, api-1" in events[-1].message
    assert "refuses its configuration: port in use" in events[-1].message


def test_a_service_without_a_sidecar_is_permissive_before_it_gets_one():
    events = permissive(FakeMesh(OPEN, meshed=False))
    assert (events[-1].event, events[-1].exit_code) == ("waiting-for-sidecar", 0)


def test_an_unknown_service_is_answered_with_the_one_that_was_meant():
    with pytest.raises(InputError, match="did you mean api"):
        permissive(FakeMesh(OPEN), "apl")
    assert permissive(FakeMesh(OPEN), "new", force=True)[-1].exit_code == 0


def test_a_registration_that_says_strict_wins_and_is_named():
    [event] = permissive(FakeMesh(OPEN, registered_mode=STRICT))
    assert (event.event, event.exit_code) == ("refused", 2)
    assert "api-0, api-1" in event.message


def test_an_entry_that_somebody_else_changes_is_read_and_written_again():
    mesh = FakeMesh(OPEN)
    mesh.races = modes.WRITES - 1
    assert permissive(mesh)[-1].event == "enforced"


# Re-securing


def test_a_mesh_in_which_nothing_would_break_is_closed_and_proved():
    mesh = FakeMesh(OPEN, ServiceDefaults(name="api", mutual_tls_mode=STRICT))
    events = resecure(mesh)
    assert names(events) == ["checked", "written", "proved"]
    assert events[-1].exit_code == 0
    entry = mesh.entries[EntryKey(Kind.MESH, "mesh")]
    assert not entry.allow_enabling_permissive_mutual_tls
    assert entry.transparent_proxy.mesh_destinations_only
    assert all(one.holds for one in events[-1].proofs)
    assert names(resecure(mesh)) == ["checked", "unchanged", "proved"], "twice is as good"


@pytest.mark.parametrize(
    ("entries", "outbound"),
    [
        ((ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE),), ()),
        ((ProxyDefaults(mutual_tls_mode=PERMISSIVE, partition="east"),), ()),
        ((), (CALL,)),
    ],
    ids=["service", "proxy-defaults", "call"],
)
def test_what_would_break_or_stay_open_refuses_it_unless_forced(entries, outbound):
    mesh = FakeMesh(OPEN, *entries)
    events = resecure(mesh, *outbound)
    assert names(events) == ["checked", "refused"]
    assert events[-1].exit_code == 1
    assert len(events[-1].breakages) == 1
    assert mesh.entries[EntryKey(Kind.MESH, "mesh")].allow_enabling_permissive_mutual_tls
    last = resecure(mesh, *outbound, force=True)[-1]
    assert last.event == ("unproved" if entries else "proved"), "what is permissive stays so"
    assert last.exit_code == (1 if entries else 0)


def test_what_could_not_be_looked_at_is_unknown():
    assert resecure(FakeMesh(OPEN), problems=("n2 does not answer",))[-1].exit_code == 2


def test_every_partition_is_closed_also_one_without_a_mesh_entry():
    mesh = FakeMesh(OPEN, ServiceDefaults(name="pay", partition="east", namespace="billing"))
    events = resecure(mesh)
    assert names(events) == ["checked", "written", "written", "proved"]
    assert mesh.entries[
        EntryKey(Kind.MESH, "mesh", partition="east")
    ].transparent_proxy.mesh_destinations_only
    assert {(one.partition, one.namespace) for one in events[-1].proofs} >= {("east", "billing")}


def test_sidecars_that_do_not_run_it_leave_it_unproved():
    mesh = FakeMesh(OPEN)
    mesh.follows = False
    last = resecure(mesh)[-1]
    assert (last.event, last.exit_code) == ("unproved", 1)
    assert "not yet: api-0 and api-1" in last.proofs[-1].message


def test_a_mesh_entry_that_changes_meanwhile_is_not_overwritten():
    mesh = FakeMesh(OPEN)
    mesh.races = 1
    events = resecure(mesh)
    assert (events[-1].event, events[-1].exit_code) == ("failed", 1)


# Entries


def test_sources_are_added_to_an_entry_and_nothing_of_it_is_lost():
    [existing] = parse_entries(
        'Kind = "service-intentions" Name = "api" Meta { owner = "me" } Sources = ['
        '{ Name = "web" Action = "deny" Description = "on purpose" }, { Name = "*" Action = "deny" }]',
        "-",
    )
    entry = allowing(existing, "api", ["web", "shop", "billing/pay"])
    assert [(one.name, one.namespace, str(one.action)) for one in entry.sources] == [
        ("pay", "billing", "allow"),
        ("shop", "default", "allow"),
        ("web", "default", "deny"),
        ("*", "default", "deny"),
    ]
    assert entry.meta == {"owner": "me"}
    assert entry.sources[2].description == "on purpose"


@pytest.mark.parametrize("destination", ["api", "billing/api", "east/billing/api"])
def test_an_entry_written_by_hand_reads_back_as_it_was(destination):
    entry = allowing(None, destination, ["web", "billing/web", "east/billing/shop"])
    raw = written_by_hand(entry)
    assert "Precedence" not in raw["Sources"][0]
    [again] = parse_entries(msgspec.json.encode(raw).decode(), "-")
    assert again == entry
    assert isinstance(again, ServiceIntentions)


def test_securing_changes_two_fields_of_the_mesh_entry():
    [entry] = parse_entries(
        'Kind = "mesh" AllowEnablingPermissiveMutualTLS = true TLS { Incoming { TLSMinVersion = "TLSv1_3" } }',
        "-",
    )
    closed = secured(entry)
    assert closed.tls == entry.tls
    assert closed.transparent_proxy == MeshTransparentProxy(mesh_destinations_only=True)
    assert not closed.allow_enabling_permissive_mutual_tls
    assert mesh_entry_of([entry], "default") == entry
    assert mesh_entry_of([entry], "east") == Mesh(partition="east")


def test_the_default_partition_counts_also_where_nothing_is_in_it():
    assert partitions([], ["east/x/api"]) == ("default", "east")
