"""Intent with and without its server: what an agent goes by, and what it says about that."""

import asyncio

import msgspec
import pytest

from tidegate.catalog.client import CatalogUnreachable, Snapshot
from tidegate.catalog.registration import NodeInfo
from tidegate.intent.entries import Action, Mesh, ServiceDefaults, ServiceIntentions, Source
from tidegate.intent.resolve import resolve
from tidegate.model import Instance, MutualTLSMode
from tidegate.node import intent as intent_module
from tidegate.node.intent import IntentSource

API = Instance(
    id="a", name="a", service="api", node="n1", addresses=("10.0.0.1",), port=80, meshed=True
)
SNAPSHOT = Snapshot(
    index=12,
    entries=(
        Mesh(allow_enabling_permissive_mutual_tls=True, modify_index=3),
        ServiceDefaults(name="api", mutual_tls_mode=MutualTLSMode.PERMISSIVE, modify_index=12),
        ServiceIntentions(
            name="api",
            sources=(Source(name="web", action=Action.ALLOW, precedence=9),),
            modify_index=4,
        ),
    ),
    instances=(API,),
    nodes=(NodeInfo(name="n1", address="10.0.0.254"),),
    default_allow=True,
    trust_domain="mesh.consul",
    datacenter="dc1",
)
LATER = msgspec.structs.replace(SNAPSHOT, index=13, instances=())


class Server:
    """Answers with `snapshot`; is away while that is None."""

    def __init__(self, snapshot=None):
        self.now = snapshot

    def remember(self, known):
        self.known = known

    async def snapshot(self):
        if self.now is None:
            raise CatalogUnreachable("no server answers at unix:///run/s.sock (not there)")
        return self.now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "intent.json"


class Cluster:
    """Custom resources of a cluster: these entries; not known while they are None."""

    def __init__(self, *entries):
        self.entries = entries
        self.outdated = ""
        self.told = ()

    def overlay(self, snapshot):
        if self.entries is None:
            raise CatalogUnreachable("config entries are not known: it has not answered yet")
        return msgspec.structs.replace(snapshot, entries=self.entries)

    def problems(self):
        return self.told


def refreshed(source):
    return asyncio.run(source.refresh())


def test_an_agent_that_never_had_an_answer_knows_nothing_and_says_why(path):
    source = IntentSource(Server(), path)
    assert not source.known
    assert refreshed(source) == Snapshot() == source.current()
    assert not source.known
    assert source.problems() == ("no server answers at unix:///run/s.sock (not there)",)
    assert not path.exists()


def test_an_answer_is_known_and_no_problem(path):
    source = IntentSource(Server(SNAPSHOT), path)
    assert refreshed(source) == SNAPSHOT == source.current()
    assert source.known
    assert source.problems() == ()


def test_a_server_that_goes_away_changes_nothing_but_shows(path):
    server = Server(SNAPSHOT)
    source = IntentSource(server, path)
    refreshed(source)
    server.now = None
    assert refreshed(source) == SNAPSHOT
    [problem] = source.problems()
    assert problem.startswith("no server answers")
    assert "intent is 0 s old" in problem


def test_a_server_that_returns_is_followed_again(path):
    server = Server(SNAPSHOT)
    source = IntentSource(server, path)
    refreshed(source)
    server.now = None
    refreshed(source)
    server.now = LATER
    assert refreshed(source) == LATER
    assert source.problems() == ()


def test_the_next_agent_goes_by_what_the_former_one_kept(path):
    refreshed(IntentSource(Server(SNAPSHOT), path))
    source = IntentSource(Server(), path)
    assert source.known
    assert source.current() == SNAPSHOT
    assert refreshed(source) == SNAPSHOT
    assert source.problems() != ()


def test_what_was_kept_resolves_to_the_same_intent(path):
    refreshed(IntentSource(Server(SNAPSHOT), path))
    kept = IntentSource(Server(), path).current()
    before = resolve(SNAPSHOT.entries, ["api"], SNAPSHOT.default_allow)["api"]
    assert resolve(kept.entries, ["api"], kept.default_allow)["api"] == before
    assert before.mode is MutualTLSMode.PERMISSIVE
    assert before.index == 12


def test_the_server_has_the_last_word_over_what_was_kept(path):
    refreshed(IntentSource(Server(SNAPSHOT), path))
    source = IntentSource(Server(LATER), path)
    assert refreshed(source) == LATER
    assert IntentSource(Server(), path).current() == LATER


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"at": 1.0}',
        b"\xff\xfe\x00",
        b'{"at":1.0,"index":1,"entries":[{"Kind":"\xff"}],"instances":[],"nodes":[],'
        b'"default_allow":false,"trust_domain":"","datacenter":""}',
        b'{"at":1.0,"index":1,"entries":[{"Kind":"nonsense","Name":"x"}],"instances":[],"nodes":[],'
        b'"default_allow":false,"trust_domain":"","datacenter":""}',
    ],
)
def test_a_damaged_file_is_as_none(path, content):
    path.write_bytes(content)
    source = IntentSource(Server(), path)
    assert not source.known
    assert source.current() == Snapshot()
    assert refreshed(IntentSource(Server(SNAPSHOT), path)) == SNAPSHOT
    assert IntentSource(Server(), path).current() == SNAPSHOT, "the next answer replaces it"


def test_a_path_that_cannot_be_read_is_as_none(path):
    path.mkdir()
    assert not IntentSource(Server(), path).known


def test_the_file_is_for_root_only_and_written_only_for_news(path):
    source = IntentSource(Server(SNAPSHOT), path)
    refreshed(source)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.stat().st_ino
    refreshed(source)
    assert path.stat().st_ino == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_and_intent_followed_all_the_same(path, monkeypatch):
    write = intent_module.write_atomically

    def full(_path, _content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(intent_module, "write_atomically", full)
    source = IntentSource(Server(SNAPSHOT), path)
    assert refreshed(source) == SNAPSHOT
    assert source.problems() == (f"{path} cannot be written: No space left on device",)
    monkeypatch.setattr(intent_module, "write_atomically", write)
    refreshed(source)
    assert source.problems() == ()
    assert IntentSource(Server(), path).current() == SNAPSHOT


def test_entries_of_a_cluster_take_the_place_of_the_servers_and_are_kept(path):
    entry = ServiceDefaults(name="web", mutual_tls_mode=MutualTLSMode.PERMISSIVE, modify_index=99)
    cluster = Cluster(entry)
    source = IntentSource(Server(SNAPSHOT), path, cluster)
    found = refreshed(source)
    assert found.entries == (entry,)
    assert found.instances == SNAPSHOT.instances
    assert source.outdated == ""
    cluster.outdated, cluster.told = "no Kubernetes", ("no Kubernetes", "web is wrong")
    assert source.outdated == "no Kubernetes", "nobody can vouch for them"
    assert source.problems() == cluster.told
    assert IntentSource(Server(), path).current().entries == (entry,)


def test_until_the_entries_of_a_cluster_are_known_the_last_ones_stay(path):
    refreshed(IntentSource(Server(SNAPSHOT), path))
    source = IntentSource(Server(LATER), path, Cluster())
    source._resources.entries = None
    assert refreshed(source) == SNAPSHOT
    assert "config entries are not known" in source.outdated
