"""Flipping to strict under guard, against a mesh of this test's own: what is told, written and kept, step by step."""

import asyncio
import itertools
import time

import msgspec
import pytest

from tidegate.catalog.client import CatalogRefused, CatalogUnreachable
from tidegate.errors import TidegateError
from tidegate.intent.entries import EntryKey, Kind, ServiceDefaults
from tidegate.model import FlowClass, Instance, MutualTLSMode
from tidegate.node import guard as guard_module
from tidegate.node import modes
from tidegate.node.guard import Event, Flip, Guard, refused_callers
from tidegate.verdict.evidence import Caller, CallerKind, ChainTotals
from tidegate.verdict.permission import Permission
from tidegate.verdict.readiness import (
    Answer,
    CallerFlow,
    Coverage,
    Effect,
    InstanceWitness,
    Reason,
    ReasonKind,
    Verdict,
)

STRICT, PERMISSIVE = MutualTLSMode.STRICT, MutualTLSMode.PERMISSIVE
SOON = 0.05
"""Seconds under guard."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(guard_module, "POLL_S", 0.005)
    monkeypatch.setattr(modes, "POLL_S", 0.005)
    monkeypatch.setattr(modes, "ENFORCE_DEADLINE_S", 0.3)
    monkeypatch.setattr(guard_module, "BLIND_GRACE_S", 0.2)


def blocked(workload="nightly", kind=CallerKind.WORKLOAD, connections=1, **fields):
    return Reason(
        kind=fields.pop("reason", ReasonKind.BLOCKING_FLOW),
        message=f"{workload} calls api in plaintext",
        caller=Caller(address="10.0.0.9", workload=workload, kind=kind),
        connections=connections,
        **fields,
    )


class FakeMesh:
    """One service, `api`, its entry and its sidecars; `refused` is what the evidence shows since the flip."""

    def __init__(self, own=PERMISSIVE, inherited=STRICT, instances=2, meshed=2):
        self.entry = ServiceDefaults(name="api", mutual_tls_mode=own, protocol="http")
        self.index = 7
        self.inherited = inherited
        self.meshed = [number < meshed for number in range(instances)]
        self.follows = True
        self.answer = Answer.READY
        self.before = ()
        self.refused = ()
        self.complete = True
        self.verdict_errors = []
        self.write_errors = []
        self.read_errors = []
        self.written = []
        self.windows = []
        self.on_write = lambda: None
        self.gate_command = ""
        self.flows = ()
        self.flows_before = ()
        self.open_plaintext = [0]
        self.registered = None

    @property
    def mode(self):
        return self.entry.mutual_tls_mode or self.inherited

    async def verdict(self, service, window_s):
        if window_s is not None:
            self.windows.append(window_s)
            if self.verdict_errors:
                raise self.verdict_errors.pop(0)
        reasons = self.before if window_s is None else tuple(self.refused)
        answer = self.answer if window_s is None else Answer.READY
        return Verdict(
            service=service,
            verdict=answer,
            mode=self.mode,
            window_s=window_s or 60.0,
            at=time.time(),
            reasons=reasons,
            callers=self.flows_before if window_s is None else self.flows,
            callers_omitted=0,
            coverage=Coverage(complete=self.complete, since=0.0, share=1.0),
            witness=(witness(self._open_now(window_s)),),
        )

    def _open_now(self, window_s):
        """Plaintext connections that are open: one reading after the other, the last for ever."""
        if window_s is None or len(self.open_plaintext) == 1:
            return self.open_plaintext[-1] if window_s else 0
        return self.open_plaintext.pop(0)

    async def sidecar_problems(self, service):
        assert service == "api"
        return ("the sidecar of api-1 refuses its configuration: port in use",)

    async def opens_gate(self, service):
        assert service == "api"
        return self.gate_command

    async def read_entry(self, key):
        assert key == EntryKey(Kind.SERVICE_DEFAULTS, "api")
        if self.read_errors:
            raise self.read_errors.pop(0)
        return msgspec.structs.replace(self.entry, modify_index=self.index)

    async def write_entry(self, entry):
        self.on_write()
        error = self.write_errors.pop(0) if self.write_errors else None
        if error is None or isinstance(error, LostAnswer):
            self.index += 1
            self.entry = entry
            self.written.append(entry.mutual_tls_mode)
        if error is not None:
            raise error
        return self.index

    async def instances(self, service):
        return tuple(
            Instance(
                id=f"id-{number}",
                name=f"{service}-{number}",
                service=service,
                node="n1",
                meshed=meshed,
                mode=self.mode if self.follows else PERMISSIVE,
                registered_mode=self.registered,
                applied_index=self.index if self.follows else 0,
            )
            for number, meshed in enumerate(self.meshed)
        )


def witness(permissive_open):
    totals = ChainTotals()
    return InstanceWitness(
        workload="api-0",
        node="n1",
        agrees=True,
        detail="",
        sidecar=totals,
        least=totals,
        most=totals,
        permissive_active=0,
        permissive_open=permissive_open,
        since=0.0,
    )


def mtls(workload, permission=Permission.MISSING, **fields):
    """Connections with the mesh's mTLS, of which intentions say so."""
    whole = {"kind": CallerKind.WORKLOAD, "connections": 2, **fields}
    return CallerFlow(
        caller=Caller(address="10.0.0.8", workload=workload, kind=whole["kind"]),
        flow_class=FlowClass.MESH,
        port=20000,
        connections=whole["connections"],
        bytes_to_server=1,
        bytes_to_client=1,
        first_seen=1.0,
        last_seen=2.0,
        effect=Effect.MESH,
        unprotected=False,
        permission=permission,
        hints=(),
        note="",
    )


class LostAnswer(CatalogUnreachable):
    """The server did what it was asked, and the answer was lost."""


async def drained(queue):
    events = []
    while (event := await asyncio.wait_for(queue.get(), 10)) is not None:
        events.append(event)
    return events


def flipped(mesh, directory, guard_s=SOON, *, force=False, drain_s=30.0):
    """Every event of one flip, heartbeats left out; checks that just the last one has an exit code."""

    async def scenario():
        guard = Guard(mesh, directory, drain_s)
        guard.resume()
        return await drained(guard.strict("api", guard_s, force=force))

    events = asyncio.run(scenario())
    assert [event.exit_code is not None for event in events] == [False] * (len(events) - 1) + [True]
    return [event for event in events if event.event != "guarding"]


def resumed(mesh, directory, *, until=None):
    """A new agent on the files of a former one, until its flips are over (or `until` says so)."""

    async def scenario():
        guard = Guard(mesh, directory)
        guard.resume()
        deadline = time.monotonic() + 10
        while guard._running and not (until and until()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.002)
        await guard.stop()

    asyncio.run(scenario())


def names(events):
    return [event.event for event in events]


def kept(directory):
    path = directory / "api.json"
    return msgspec.json.decode(path.read_bytes(), type=Flip) if path.exists() else None


def leave(directory, **fields):
    """The file of a flip that an agent left."""
    flip = Flip(
        **{
            "service": "api",
            "guard_s": SOON,
            "former_entry_mode": PERMISSIVE,
            "former_mode": PERMISSIVE,
            "flipped_at": time.time() - 100,
            **fields,
        }
    )
    (directory / "api.json").write_bytes(msgspec.json.encode(flip))


# Whether to flip at all


def test_a_ready_service_is_flipped_guarded_and_kept(tmp_path):
    mesh = FakeMesh()
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "enforced", "kept"]
    assert events[1].message == "api: 2 of 2 sidecars run strict mode"
    assert events[-1].exit_code == 0
    assert mesh.written == [STRICT]
    assert mesh.entry.protocol == "http", "the rest of the entry stays"
    assert kept(tmp_path) is None


@pytest.mark.parametrize(("answer", "code"), [(Answer.NOT_READY, 1), (Answer.UNKNOWN, 2)])
def test_a_service_that_is_not_ready_is_refused_with_its_reasons(tmp_path, answer, code):
    mesh = FakeMesh()
    mesh.answer, mesh.before = answer, (blocked(),)
    [event] = flipped(mesh, tmp_path)
    assert (event.event, event.exit_code, event.reasons) == ("refused", code, mesh.before)
    assert mesh.written == []
    assert kept(tmp_path) is None


def test_force_flips_a_service_that_is_not_ready(tmp_path):
    mesh = FakeMesh()
    mesh.answer, mesh.before = Answer.NOT_READY, (blocked(),)
    assert names(flipped(mesh, tmp_path, force=True)) == ["written", "enforced", "kept"]


def test_a_strict_service_is_left_as_it_is(tmp_path):
    mesh = FakeMesh(own=STRICT)
    [event] = flipped(mesh, tmp_path)
    assert (event.event, event.exit_code) == ("unchanged", 0)
    assert mesh.written == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("own", [STRICT, PERMISSIVE, None])
def test_a_service_that_the_catalog_does_not_know_is_refused(tmp_path, own, force):
    mesh = FakeMesh(own=own, instances=0)
    [event] = flipped(mesh, tmp_path, force=force)
    assert (event.event, event.exit_code) == ("refused", 2)
    assert event.message == "the catalog knows no instance of api: not flipped"
    assert mesh.written == []


@pytest.mark.parametrize("force", [False, True])
def test_a_service_without_a_single_sidecar_is_refused(tmp_path, force):
    mesh = FakeMesh(meshed=0)
    [event] = flipped(mesh, tmp_path, force=force)
    assert (event.event, event.exit_code) == ("refused", 2)
    assert event.message == "none of the instances of api has a sidecar: not flipped"
    assert mesh.written == []


def test_instances_without_a_sidecar_are_not_counted_as_enforcing(tmp_path):
    events = flipped(FakeMesh(instances=3, meshed=2), tmp_path, force=True)
    assert events[1].message == "api: 2 of 2 sidecars run strict mode"


def test_a_second_flip_of_a_service_is_refused_while_the_first_is_under_guard(tmp_path):
    async def scenario():
        guard = Guard(FakeMesh(), tmp_path)
        first = guard.strict("api", SOON, force=False)
        with pytest.raises(TidegateError, match="under guard already"):
            guard.strict("api", SOON, force=False)
        assert names(await drained(first))[-1] == "kept"
        again = await drained(guard.strict("api", SOON, force=False))
        assert names(again) == ["unchanged"]

    asyncio.run(scenario())


def test_a_flip_that_another_agent_just_wrote_is_not_taken_over(tmp_path):
    mesh = FakeMesh(own=STRICT)
    first = mesh.verdict

    async def behind(service, window_s):
        return msgspec.structs.replace(await first(service, window_s), mode=PERMISSIVE)

    mesh.verdict = behind
    [event] = flipped(mesh, tmp_path)
    assert (event.event, event.exit_code) == ("failed", 1)
    assert kept(tmp_path) is None


# The guard


def test_a_known_caller_that_is_refused_brings_the_former_mode_back(tmp_path):
    mesh = FakeMesh()
    mesh.on_write = lambda: mesh.refused or setattr(mesh, "refused", (blocked(),))
    events = flipped(mesh, tmp_path, guard_s=60)
    assert names(events) == ["written", "enforced", "rolling-back", "rolled-back"]
    assert events[-1].exit_code == 1
    assert events[-1].message == "api is permissive again, because nightly was refused"
    assert events[-1].reasons == mesh.refused
    assert mesh.written == [STRICT, PERMISSIVE]
    assert kept(tmp_path) is None


def test_rolling_back_restores_an_entry_that_only_inherited(tmp_path):
    mesh = FakeMesh(own=None, inherited=PERMISSIVE)
    mesh.refused = (blocked("nightly"), blocked("batch"), blocked("nightly"))
    events = flipped(mesh, tmp_path)
    assert mesh.written == [STRICT, None]
    assert mesh.mode is PERMISSIVE
    assert events[-1].message == "api is permissive again, because nightly, batch were refused"


@pytest.mark.parametrize(
    "reason",
    [
        blocked("", kind=CallerKind.OUTSIDE),
        blocked(kind=CallerKind.PROBE),
        blocked(connections=0),
        blocked(reason=ReasonKind.UNKNOWN_FLOW),
        Reason(kind=ReasonKind.BLOCKING_FLOW, message="", connections=3),
    ],
    ids=["outside", "probe", "opened before", "beginning not seen", "nobody"],
)
def test_whoever_is_no_refused_known_caller_does_not_end_the_guard(tmp_path, reason):
    mesh = FakeMesh()
    mesh.refused = (reason,)
    assert names(flipped(mesh, tmp_path)) == ["written", "enforced", "kept"]


def test_only_known_callers_with_new_connections_count_as_refused(tmp_path):
    mesh = FakeMesh()
    mesh.refused = (blocked("", kind=CallerKind.OUTSIDE), blocked("legacy"), blocked(connections=0))
    verdict = asyncio.run(mesh.verdict("api", 1.0))
    assert refused_callers(verdict) == (mesh.refused[1],)


def test_the_guard_asks_for_everything_since_just_before_the_entry_was_written(tmp_path):
    mesh = FakeMesh()
    began = time.time()
    flipped(mesh, tmp_path)
    assert mesh.windows == sorted(mesh.windows)
    assert mesh.windows[-1] >= SOON
    assert mesh.windows[-1] <= time.time() - began


def test_a_clock_that_is_set_back_does_not_widen_the_window_to_before_the_flip(
    tmp_path, monkeypatch
):
    mesh = FakeMesh()
    clock = itertools.count(1000.0, 0.001)
    monkeypatch.setattr(time, "time", lambda: next(clock))

    def set_back():
        nonlocal clock
        clock = itertools.count(900.0, 0.001)

    mesh.on_write = set_back
    assert names(flipped(mesh, tmp_path))[-1] == "kept"
    assert all(0 < window < 1 for window in mesh.windows)


def test_sidecars_that_do_not_follow_make_it_roll_back_and_are_named(tmp_path):
    mesh = FakeMesh()
    mesh.follows = False
    mesh.on_write = lambda: setattr(mesh, "follows", len(mesh.written) > 0)
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "rolling-back", "rolled-back"]
    assert "api-0, api-1" in events[-1].message
    assert "refuses its configuration: port in use" in events[-1].message
    assert mesh.written == [STRICT, PERMISSIVE]


def test_sidecars_that_all_vanish_are_not_reported_as_strict(tmp_path):
    mesh = FakeMesh()
    mesh.on_write = lambda: setattr(mesh, "meshed", [False, False])
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "rolling-back", "rolled-back"]
    assert mesh.written == [STRICT, PERMISSIVE], "the entry is restored all the same"
    assert kept(tmp_path) is None


def test_a_mode_that_a_person_changes_under_guard_ends_the_guard(tmp_path):
    mesh = FakeMesh()

    async def scenario():
        guard = Guard(mesh, tmp_path)
        queue = guard.strict("api", 60, force=False)
        while (event := await asyncio.wait_for(queue.get(), 10)).event != "guarding":
            pass
        mesh.entry = msgspec.structs.replace(mesh.entry, mutual_tls_mode=PERMISSIVE)
        mesh.refused = (blocked(),)
        return [event, *await drained(queue)]

    events = asyncio.run(scenario())
    assert (events[-1].event, events[-1].exit_code) == ("ended", 1)
    assert mesh.written == [STRICT], "what the person wrote stays"
    assert kept(tmp_path) is None


def test_a_caller_that_intentions_newly_deny_brings_the_former_mode_back(tmp_path):
    mesh = FakeMesh()
    mesh.flows = (mtls("batch"), mtls("web", Permission.ALLOWED))
    events = flipped(mesh, tmp_path, guard_s=60)
    assert names(events) == ["written", "enforced", "rolling-back", "rolled-back"]
    assert events[-1].message == "api is permissive again, because batch was denied"
    assert [reason.kind for reason in events[-1].reasons] == [ReasonKind.DENIED]
    assert mesh.written == [STRICT, PERMISSIVE]


@pytest.mark.parametrize(
    ("before", "since"),
    [
        ((mtls("batch"),), mtls("batch")),
        ((), mtls("batch", connections=0)),
        ((), mtls("", kind=CallerKind.OUTSIDE)),
        ((), mtls("batch", Permission.BY_DEFAULT)),
    ],
    ids=["denied before", "opened before", "outside", "allowed"],
)
def test_whoever_was_denied_before_or_is_nobody_known_does_not_end_the_guard(
    tmp_path, before, since
):
    mesh = FakeMesh()
    mesh.flows_before, mesh.flows = before, (since,)
    assert names(flipped(mesh, tmp_path))[-1] == "kept"


def test_who_was_denied_before_the_flip_is_known_to_the_next_agent(tmp_path):
    mesh = FakeMesh(own=STRICT)
    mesh.flows = (mtls("batch"),)
    leave(tmp_path, enforced_at=time.time() - 1, denied_before=("batch",))
    resumed(mesh, tmp_path)
    assert mesh.written == []


def test_plaintext_connections_are_counted_down_until_none_is_left(tmp_path):
    mesh = FakeMesh()
    mesh.open_plaintext = [3, 3, 1, 1, 0]
    events = flipped(mesh, tmp_path, guard_s=0.001)
    assert names(events) == ["written", "enforced", "draining", "draining", "drained", "kept"]
    assert "3 plaintext connections are still open" in events[2].message
    assert "1 plaintext connection is still open" in events[3].message
    assert events[-1].message == "api is strict; no known caller was refused"


def test_plaintext_that_never_closes_does_not_hold_the_guard_for_ever(tmp_path):
    mesh = FakeMesh()
    mesh.open_plaintext = [2]
    events = flipped(mesh, tmp_path, guard_s=0.001, drain_s=0.03)
    assert names(events) == ["written", "enforced", "draining", "kept"]
    assert events[-1].message.endswith("; 2 plaintext connections are still open")


def test_a_flip_that_could_not_be_rolled_back_is_refused_with_the_command_for_it(tmp_path):
    mesh = FakeMesh()
    mesh.gate_command = "open the gate"
    [event] = flipped(mesh, tmp_path)
    assert (event.event, event.exit_code) == ("refused", 1)
    assert "`open the gate` opens it" in event.message
    assert mesh.written == []
    assert names(flipped(mesh, tmp_path, force=True))[0] == "no-way-back"


def test_a_mode_that_was_only_inherited_has_a_way_back_behind_a_closed_gate(tmp_path):
    mesh = FakeMesh(own=None, inherited=PERMISSIVE)
    mesh.gate_command = "open the gate"
    assert names(flipped(mesh, tmp_path)) == ["written", "enforced", "kept"]


def test_a_registration_that_says_permissive_wins_and_is_named(tmp_path):
    mesh = FakeMesh()
    mesh.registered = PERMISSIVE
    [event] = flipped(mesh, tmp_path, force=True)
    assert (event.event, event.exit_code) == ("refused", 2)
    assert "api-0, api-1" in event.message
    assert mesh.written == []


# Evidence and server that are away


def test_a_verdict_that_cannot_be_had_is_asked_for_again(tmp_path):
    mesh = FakeMesh()
    mesh.verdict_errors = [TidegateError("history cannot be read")] * 3
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "enforced", "blind", "kept"]
    assert "history cannot be read" in events[2].message


def test_a_guard_that_was_blind_at_its_end_looks_once_more(tmp_path):
    mesh = FakeMesh()
    mesh.verdict_errors = [TidegateError("history cannot be read")] * 12
    mesh.refused = (blocked(),)
    assert names(flipped(mesh, tmp_path, guard_s=0.001))[-1] == "rolled-back"


def test_a_guard_that_never_saw_everything_does_not_say_that_nobody_was_refused(tmp_path):
    mesh = FakeMesh()
    mesh.complete = False
    mesh.refused = (Reason(kind=ReasonKind.EVIDENCE_MISSING, message="node n2 could not be read"),)
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "enforced", "blind", "unwatched"]
    assert events[-1].exit_code == 2
    assert "node n2 could not be read" in events[-1].message
    assert mesh.written == [STRICT], "the service stays strict"


def test_a_write_whose_answer_is_lost_is_taken_back(tmp_path):
    mesh = FakeMesh()
    mesh.write_errors = [LostAnswer("no server answers")]
    events = flipped(mesh, tmp_path)
    assert names(events) == ["rolling-back", "rolled-back"]
    assert mesh.written == [STRICT, PERMISSIVE]


def test_a_write_that_the_server_refuses_changes_nothing(tmp_path):
    mesh = FakeMesh()
    mesh.write_errors = [CatalogRefused(400, "no")]
    events = flipped(mesh, tmp_path)
    assert events[-1].exit_code == 1
    assert mesh.written == []
    assert kept(tmp_path) is None


@pytest.mark.parametrize(
    "error", [CatalogUnreachable("no server answers"), CatalogRefused(500, "no leader")]
)
def test_rolling_back_waits_for_a_server_that_is_away(tmp_path, error):
    mesh = FakeMesh()
    mesh.refused = (blocked(),)
    mesh.write_errors = [None, error, error]
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "enforced", "rolling-back", "waiting", "rolled-back"]
    assert mesh.written == [STRICT, PERMISSIVE]


def test_rolling_back_that_the_server_forbids_is_told_and_kept_for_the_next_agent(tmp_path):
    mesh = FakeMesh()
    mesh.refused = (blocked(),)
    mesh.on_write = lambda: (
        mesh.written and mesh.write_errors.append(CatalogRefused(400, "the gate is closed"))
    )
    events = flipped(mesh, tmp_path)
    assert (events[-1].event, events[-1].exit_code) == ("failed", 1)
    assert "the gate is closed" in events[-1].message
    assert kept(tmp_path).back_because == "nightly was refused"
    mesh.on_write = lambda: None
    resumed(mesh, tmp_path)
    assert mesh.written == [STRICT, PERMISSIVE]


def test_an_unreachable_server_before_the_flip_changes_nothing(tmp_path):
    mesh = FakeMesh()
    mesh.read_errors = [CatalogUnreachable("no server answers")]
    [event] = flipped(mesh, tmp_path)
    assert (event.event, event.message, event.exit_code) == ("failed", "no server answers", 1)
    assert kept(tmp_path) is None


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(5, "I/O"), KeyError("x")])
def test_an_error_of_any_kind_ends_the_events_and_keeps_the_file(tmp_path, error):
    mesh = FakeMesh()
    mesh.verdict_errors = [error]
    events = flipped(mesh, tmp_path)
    assert names(events) == ["written", "enforced", "failed"]
    assert events[-1].exit_code == 1
    assert kept(tmp_path).enforced_at is not None


def test_a_flip_that_cannot_be_recorded_is_not_begun(tmp_path):
    mesh = FakeMesh()

    async def scenario():
        return await drained(Guard(mesh, tmp_path / "missing").strict("api", SOON, force=False))

    [event] = asyncio.run(scenario())
    assert (event.event, event.exit_code) == ("failed", 1)
    assert mesh.written == []


def test_a_full_disk_does_not_keep_a_flip_from_being_rolled_back(tmp_path, monkeypatch):
    mesh = FakeMesh()
    mesh.refused = (blocked(),)
    write = guard_module.write_atomically

    def full(path, content):
        if mesh.written:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(guard_module, "write_atomically", full)
    assert names(flipped(mesh, tmp_path))[-1] == "rolled-back"
    assert mesh.written == [STRICT, PERMISSIVE]


def test_heartbeats_that_nobody_reads_do_not_pile_up(tmp_path):
    mesh = FakeMesh()

    async def scenario():
        queue = Guard(mesh, tmp_path).strict("api", 0.3, force=False)
        deadline = time.monotonic() + 10
        while len(mesh.windows) < 20:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        assert queue.qsize() <= 3
        return await drained(queue)

    assert names(asyncio.run(scenario()))[-1] == "kept"


# An agent that is killed meanwhile


def test_the_file_is_there_before_the_entry_is_written(tmp_path):
    mesh = FakeMesh(own=None, inherited=PERMISSIVE)
    seen = []
    mesh.on_write = lambda: seen.append(kept(tmp_path))
    flipped(mesh, tmp_path)
    [flip] = seen
    assert (flip.former_entry_mode, flip.former_mode) == (None, PERMISSIVE)
    assert flip.enforced_at is None
    assert (tmp_path / "api.json").exists() is False


def test_the_file_is_for_root_only(tmp_path):
    mesh = FakeMesh()
    modes = []
    mesh.on_write = lambda: modes.append((tmp_path / "api.json").stat().st_mode & 0o777)
    flipped(mesh, tmp_path)
    assert modes == [0o600]


def test_an_agent_killed_before_the_entry_was_written_flips_nothing_when_it_returns(tmp_path):
    mesh = FakeMesh()
    leave(tmp_path)
    resumed(mesh, tmp_path)
    assert mesh.written == []
    assert kept(tmp_path) is None


def test_an_agent_killed_before_all_sidecars_followed_waits_for_them_and_guards(tmp_path):
    mesh = FakeMesh(own=STRICT)
    leave(tmp_path, guard_s=60)
    resumed(mesh, tmp_path, until=lambda: mesh.windows)
    assert mesh.written == [], "the entry is there already"
    assert kept(tmp_path).enforced_at is not None


def test_an_agent_that_returns_after_the_time_of_the_guard_still_looks_at_all_since_the_flip(
    tmp_path,
):
    mesh = FakeMesh(own=STRICT)
    mesh.refused = (blocked(),)
    leave(tmp_path, guard_s=10, enforced_at=time.time() - 99)
    resumed(mesh, tmp_path)
    assert 100 <= mesh.windows[0] < 200
    assert mesh.written == [PERMISSIVE]
    assert kept(tmp_path) is None


def test_an_agent_that_returns_after_the_time_of_the_guard_waits_until_it_can_see(tmp_path):
    mesh = FakeMesh(own=STRICT)
    mesh.refused = (blocked(),)
    mesh.verdict_errors = [TidegateError("the agent has not looked around yet")] * 3
    leave(tmp_path, guard_s=99.9, enforced_at=time.time() - 100)
    resumed(mesh, tmp_path)
    assert mesh.written == [PERMISSIVE]


def test_an_agent_killed_while_rolling_back_goes_on_rolling_back(tmp_path):
    mesh = FakeMesh(own=STRICT)
    leave(tmp_path, back_because="nightly was refused", former_entry_mode=None)
    mesh.inherited = PERMISSIVE
    resumed(mesh, tmp_path)
    assert mesh.written == [None]
    assert kept(tmp_path) is None


def test_an_agent_killed_after_it_rolled_back_writes_nothing_again(tmp_path):
    mesh = FakeMesh()
    leave(tmp_path, back_because="nightly was refused")
    resumed(mesh, tmp_path)
    assert mesh.written == []
    assert kept(tmp_path) is None


def test_a_mode_that_a_person_changed_while_the_agent_was_away_stays(tmp_path):
    mesh = FakeMesh(own=PERMISSIVE)
    mesh.refused = (blocked(),)
    leave(tmp_path, enforced_at=time.time() - 50)
    resumed(mesh, tmp_path)
    assert mesh.written == []
    assert kept(tmp_path) is None


def test_a_returning_agent_waits_for_the_server_before_it_decides(tmp_path):
    mesh = FakeMesh(own=STRICT)
    mesh.refused = (blocked(),)
    mesh.read_errors = [CatalogUnreachable("no server answers")] * 3
    leave(tmp_path, enforced_at=time.time() - 99)
    resumed(mesh, tmp_path)
    assert mesh.written == [PERMISSIVE]


def test_stopping_leaves_the_flip_for_the_next_agent(tmp_path):
    mesh = FakeMesh()

    async def scenario():
        guard = Guard(mesh, tmp_path)
        queue = guard.strict("api", 60, force=False)
        while (await asyncio.wait_for(queue.get(), 10)).event != "guarding":
            pass
        await guard.stop()
        return await drained(queue)

    assert all(event.exit_code is None for event in asyncio.run(scenario()))
    assert kept(tmp_path).enforced_at is not None
    mesh.refused = (blocked(),)
    resumed(mesh, tmp_path)
    assert mesh.written == [STRICT, PERMISSIVE]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"service": 3}', b"\xff\xfe"])
def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path, content):
    mesh = FakeMesh(own=STRICT)
    mesh.refused = (blocked(),)
    (tmp_path / "aaa.json").write_bytes(content)
    leave(tmp_path, enforced_at=time.time() - 99)
    resumed(mesh, tmp_path)
    assert mesh.written == [PERMISSIVE]
    assert (tmp_path / "aaa.json").read_bytes() == content


def test_an_event_leaves_out_what_it_does_not_have():
    event = Event(event="written", message="done", service="api")
    assert msgspec.json.decode(msgspec.json.encode(event)) == {
        "event": "written",
        "message": "done",
        "service": "api",
    }
