"""The store when things go wrong: killed and racing writers, full disks, old files; and a model in plain dicts."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tidegate.catalog.registration import Node, Service, services_of
from tidegate.catalog.store import FIRST_INDEX, Store, StoreError, Topic, held_alone
from tidegate.errors import InputError
from tidegate.intent.entries import EntryKey, Kind, Mesh, ServiceDefaults, to_consul
from tidegate.model import Instance, MutualTLSMode

PERMISSIVE = MutualTLSMode.PERMISSIVE
API = EntryKey(Kind.SERVICE_DEFAULTS, "api")


# Killed.

WRITER = """
import sys
from pathlib import Path
from tidegate.catalog.registration import Node, Service
from tidegate.catalog.store import Store
from tidegate.intent.entries import ServiceDefaults
store = Store(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    name = f"s{number}"
    store.write_entry(ServiceDefaults(name=name, meta={"twice": name}))
    store.register(Node(node=name, address="10.0.0.1"), Service(id=name, service=name, port=1))
    print(number, flush=True)
    number += 1
"""


def test_a_writer_that_is_killed_again_and_again_loses_nothing_and_leaves_nothing_half_written(
    tmp_path,
):
    path = tmp_path / "catalog.db"
    chance = random.Random(5)
    acknowledged = -1
    index = 0
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(acknowledged + 1)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            acknowledged = int(writer.stdout.readline())
            pause(chance.uniform(0.0, 0.05))
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        store = Store(path)
        entries = {entry.name: entry.meta for entry in store.entries()}
        assert {f"s{number}" for number in range(acknowledged + 1)} <= set(entries)
        assert all(meta == {"twice": name} for name, meta in entries.items())
        nodes = {record.node.node for record in store.nodes()}
        assert {record.service.id for record in store.services()} == nodes
        assert {one.id for one in store.instances()} == nodes
        assert store.index() == FIRST_INDEX + len(entries) + len(nodes)
        assert store.index() >= index
        assert store.index() == max(store.index(topic) for topic in Topic)
        index = store.index()
        store.close()


def pause(seconds):
    """A random moment to be killed at; nothing is waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_log_is_synced_at_each_commit(tmp_path):
    store = Store(tmp_path / "catalog.db")
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    store.close()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_write_is_acknowledged_after_the_medium_has_it(tmp_path):
    code = WRITER.replace("while True", "for number in range(3)")
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-e", "trace=fdatasync,fsync,write", "-o", str(trace),
         sys.executable, "-c", code, str(tmp_path / "catalog.db"), "0"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        check=True, capture_output=True,
    )  # fmt: skip
    told = 'write(1, "'
    lines = trace.read_text().splitlines()
    calls = [line for line in lines if "sync(" in line or told in line]
    first, second, third = (at for at, line in enumerate(calls) if told in line)
    for before, after in ((first, second), (second, third)):
        assert sum("sync(" in line for line in calls[before:after]) >= 2, (
            "one for each of two writes"
        )


# Racing.


def racer(path, barrier, rounds, results, me):
    store = Store(path)
    wins = 0
    for number in range(rounds):
        index = store.entry(API).modify_index
        barrier.wait(60)
        wins += store.write_entry(
            ServiceDefaults(name="api", meta={"by": f"{me} in {number}"}), cas=index
        )
        barrier.wait(60)
    results.put(wins)
    store.close()


def test_of_several_processes_that_race_with_compare_and_set_exactly_one_wins_each_round(tmp_path):
    path = tmp_path / "catalog.db"
    store = Store(path)
    store.write_entry(ServiceDefaults(name="api"))
    rounds, racers = 15, 3
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(racers), context.Queue()
    processes = [
        context.Process(target=racer, args=(path, barrier, rounds, results, me))
        for me in range(racers)
    ]
    for process in processes:
        process.start()
    assert sum(results.get(timeout=120) for _ in processes) == rounds
    for process in processes:
        process.join(60)
    assert store.index() == FIRST_INDEX + 1 + rounds
    store.close()


def test_who_holds_a_store_alone_is_told_to_whoever_tries(tmp_path):
    path = tmp_path / "catalog.db"
    with (
        held_alone(path, "a tidegate server"),
        pytest.raises(StoreError, match=rf"a tidegate server \(process {os.getpid()}\) uses"),
        held_alone(path, "another"),
    ):
        raise AssertionError("both have it")
    with held_alone(path, "another"):
        pass
    with (
        pytest.raises(StoreError, match="No such file or directory"),
        held_alone(tmp_path / "nowhere" / "catalog.db", "nobody"),
    ):
        raise AssertionError("it is held")


# Full.

FILLING = """
import os, subprocess, sys
from pathlib import Path
from tidegate.catalog.store import Store, StoreError
from tidegate.intent.entries import EntryKey, Kind, ServiceDefaults

place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], check=True)
store = Store(place / "catalog.db")
written = []
refusals = []
for number in range(2000):
    entry = ServiceDefaults(name=f"s{number}", meta={"x": "y" * 300})
    try:
        store.write_entry(entry)
    except StoreError as error:
        refusals.append(str(error))
        if len(refusals) == 3:
            break
    else:
        assert not refusals, "a write was taken after one was refused"
        written.append(entry.name)
assert len(refusals) == 3, "the disk was never full"
assert refusals[0] == f"{place}/catalog.db: database or disk is full", refusals[0]
assert sorted(entry.name for entry in store.entries()) == sorted(written)
index = store.index()
store.close()
again = Store(place / "catalog.db")
assert sorted(entry.name for entry in again.entries()) == sorted(written)
assert again.index() == index == 1 + len(written)
subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True)
assert again.write_entry(ServiceDefaults(name="after"))
print(len(written))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_is_full_refuses_in_one_sentence_and_loses_nothing(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    found = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", FILLING, str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 10


# Old.

FORMAT_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (topic TEXT PRIMARY KEY, modified INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    kind TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL, modified INTEGER NOT NULL, PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE TABLE nodes (
    node TEXT PRIMARY KEY, body BLOB NOT NULL,
    created INTEGER NOT NULL, modified INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE services (
    node TEXT NOT NULL REFERENCES nodes (node), id TEXT NOT NULL, name TEXT NOT NULL,
    body BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL,
    PRIMARY KEY (node, id)
) WITHOUT ROWID;
CREATE INDEX services_by_name ON services (name);
CREATE TABLE spans (
    span INTEGER PRIMARY KEY, node TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    seen_from REAL NOT NULL, seen_until REAL NOT NULL
);
CREATE INDEX spans_by_instance ON spans (node, id) WHERE seen_until = 0;
CREATE INDEX spans_by_end ON spans (seen_until) WHERE seen_until > 0;
CREATE TABLE holdings (
    address TEXT NOT NULL, span INTEGER NOT NULL, PRIMARY KEY (address, span)
) WITHOUT ROWID;
INSERT INTO meta VALUES ('id', 'abc'), ('index', 9);
INSERT INTO topics VALUES ('config', 5), ('catalog', 9);
INSERT INTO entries VALUES ('service-defaults', 'api',
    CAST('{"Kind":"service-defaults","Name":"api","MutualTLSMode":"permissive"}' AS BLOB), 2, 5);
INSERT INTO nodes VALUES ('n1', CAST('{"Node":"n1","Address":"10.0.0.1"}' AS BLOB), 6, 6);
INSERT INTO services VALUES ('n1', 'p', 'api',
    CAST('{"ID":"p","Service":"api","Address":"10.1.0.1","Port":80,
          "Meta":{"tidegate-name":"pod","tidegate-address-000":"10.1.0.1"}}' AS BLOB), 7, 7);
INSERT INTO services VALUES ('n1', 'p-sidecar-proxy', 'api-sidecar-proxy',
    CAST('{"ID":"p-sidecar-proxy","Service":"api-sidecar-proxy","Kind":"connect-proxy","Port":20000,
          "Proxy":{"DestinationServiceID":"p","MutualTLSMode":"permissive"}}' AS BLOB), 8, 8);
INSERT INTO spans VALUES (1, 'n1', 'gone',
    CAST('{"instance":{"id":"gone","name":"gone","service":"api","node":"n1"},
          "claimed":["10.1.0.1"],"held":["10.1.0.1"]}' AS BLOB), 100.0, 200.0);
INSERT INTO spans VALUES (2, 'n1', 'p',
    CAST('{"instance":{"id":"p","name":"pod","service":"api","node":"n1","addresses":["10.1.0.1"],
          "port":80,"meshed":true,"mode":"permissive"},
          "claimed":["10.1.0.1"],"held":["10.1.0.1"]}' AS BLOB), 300.0, 0);
INSERT INTO holdings VALUES ('10.1.0.1', 2);
PRAGMA user_version = 1;
"""


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "catalog.db"
    made = sqlite3.connect(path)
    made.executescript(FORMAT_1)
    made.close()
    return path


def test_a_file_of_the_format_before_is_taken_over_without_loss(old):
    for _ in range(2):
        store = Store(old, clock=lambda: 400.0)
        (entry,) = store.entries()
        assert (entry.key, entry.mutual_tls_mode) == (API, PERMISSIVE)
        assert (entry.create_index, entry.modify_index) == (2, 5)
        assert (store.id, store.index(), store.index(Topic.CONFIG)) == ("abc", 9, 5)
        assert [
            (one.id, one.addresses, one.seen_from, one.seen_until) for one in store.instances()
        ] == [("gone", ("10.1.0.1",), 100.0, 200.0), ("p", ("10.1.0.1",), 300.0, 0.0)]
        assert [record.service.id for record in store.services()] == ["p", "p-sidecar-proxy"]
        store.close()


def test_what_was_taken_over_goes_on_as_it_was(old):
    store = Store(old, clock=lambda: 400.0)
    store.deregister("n1", "p-sidecar-proxy")
    (plain,) = [one for one in store.instances() if not one.seen_until]
    assert (plain.id, plain.meshed) == ("p", False)
    store.deregister("n1", "p")
    assert [one.seen_until for one in store.instances()] == [200.0, 400.0]
    assert store.write_entry(ServiceDefaults(name="api", protocol="tcp"), cas=5)
    store.deregister("n1")
    assert store.nodes() == ()
    store.close()


def test_a_file_whose_taking_over_fails_is_left_as_it_was(old):
    made = sqlite3.connect(old)
    made.execute("UPDATE services SET body = CAST('no JSON' AS BLOB) WHERE id = 'p'")
    made.commit()
    made.close()
    with pytest.raises(StoreError, match=r"catalog\.db: "):
        Store(old)
    made = sqlite3.connect(old)
    assert made.execute("PRAGMA user_version").fetchone() == (1,)
    assert made.execute("SELECT count(*) FROM services").fetchone() == (2,)
    made.close()


# Tenancy.


def test_entries_of_the_same_name_in_other_namespaces_and_partitions_are_others(tmp_path):
    store = Store(tmp_path / "catalog.db")
    mine = ServiceDefaults(name="api", protocol="tcp")
    theirs = ServiceDefaults(name="api", namespace="billing", partition="east", protocol="http")
    assert store.write_entry(mine, cas=0)
    assert store.write_entry(theirs, cas=0)
    assert store.entry(API).protocol == "tcp"
    assert store.entry(theirs.key).protocol == "http"
    assert store.delete_entry(API)
    assert [entry.key for entry in store.entries()] == [theirs.key]
    store.close()


def test_the_permissive_gate_is_that_of_the_entrys_partition(tmp_path):
    store = Store(tmp_path / "catalog.db")
    store.write_entry(Mesh(partition="east", allow_enabling_permissive_mutual_tls=True))
    store.write_entry(
        ServiceDefaults(name="api", partition="east", namespace="b", mutual_tls_mode=PERMISSIVE)
    )
    with pytest.raises(InputError, match="AllowEnablingPermissiveMutualTLS=false"):
        store.write_entry(ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE))
    store.close()


def test_services_of_the_same_id_in_other_namespaces_and_partitions_are_other_instances(tmp_path):
    store = Store(tmp_path / "catalog.db")
    store.register(
        Node(node="n", address="10.0.0.1"), Service(id="w", service="web", address="10.1.0.1")
    )
    store.register(
        Node(node="n", address="10.0.0.1"),
        Service(id="w", service="web", namespace="b", address="10.1.0.2"),
    )
    store.register(
        Node(node="n", address="10.0.0.1", partition="east"),
        Service(id="w", service="web", partition="east", address="10.1.0.3"),
    )
    assert [one.service for one in store.instances()] == ["web", "b/web", "east/default/web"]
    store.deregister("n", "w", namespace="b")
    store.deregister("n", partition="east")
    assert [one.service for one in store.instances() if not one.seen_until] == ["web"]
    store.close()


def test_what_an_agent_and_a_person_register_of_one_workload_shares_its_address(tmp_path):
    store = Store(tmp_path / "catalog.db")
    node = Node(node="n", address="10.0.0.1")
    pod = Instance(id="p", name="pod", service="web", node="n", addresses=("10.1.0.1",), port=80)
    store.register(node, services_of(pod)[0])
    store.register(node, Service(id="web-1", service="web", address="10.1.0.1", port=80))
    assert [(one.id, one.addresses) for one in store.instances()] == [
        ("p", ("10.1.0.1",)),
        ("web-1", ("10.1.0.1",)),
    ]
    store.register(node, Service(id="db-1", service="db", address="10.1.0.1", port=80))
    living = {one.id: one.addresses for one in store.instances() if not one.seen_until}
    assert living == {"p": (), "web-1": (), "db-1": ("10.1.0.1",)}
    store.close()


# A model.

services = st.sampled_from(["api", "web", "db"])
tenants = st.sampled_from(["default", "billing"])
modes = st.sampled_from([None, MutualTLSMode.STRICT, PERMISSIVE])


class StoreAgainstModel(RuleBasedStateMachine):
    """The store does what a dict with one counter does; closing and opening it changes nothing."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "catalog.db"
        self.store = Store(self.path)
        self.model = {}
        self.nodes = {}
        self.services = {}
        self.index = FIRST_INDEX

    def teardown(self):
        self.store.close()
        self.directory.cleanup()

    def write(self, entry, cas):
        key = entry.key
        before = self.model.get(key)
        mesh = self.model.get(EntryKey(Kind.MESH, "mesh", "default", key.partition))
        closed = mesh is None or not mesh[0].allow_enabling_permissive_mutual_tls
        becomes = (
            isinstance(entry, ServiceDefaults)
            and entry.mutual_tls_mode is PERMISSIVE
            and (before is None or before[0].mutual_tls_mode is not PERMISSIVE)
        )
        if cas is not None and cas != (before[2] if before else 0):
            assert self.store.write_entry(entry, cas) is False
        elif becomes and closed:
            with pytest.raises(InputError):
                self.store.write_entry(entry, cas)
        else:
            assert self.store.write_entry(entry, cas) is True
            if before is None or before[0] != entry:
                self.index += 1
                self.model[key] = (entry, before[1] if before else self.index, self.index)

    @rule(name=services, namespace=tenants, partition=tenants, mode=modes, right=st.booleans())
    def write_service_defaults(self, name, namespace, partition, mode, right):
        entry = ServiceDefaults(
            name=name, namespace=namespace, partition=partition, mutual_tls_mode=mode
        )
        known = self.model.get(entry.key)
        self.write(entry, None if right else (known[2] if known else 0) + self.index % 2)

    @rule(partition=tenants, allow=st.booleans())
    def write_mesh(self, partition, allow):
        self.write(Mesh(partition=partition, allow_enabling_permissive_mutual_tls=allow), None)

    @rule(name=services, namespace=tenants, partition=tenants, offset=st.sampled_from([None, 0, 1]))
    def delete(self, name, namespace, partition, offset):
        key = EntryKey(Kind.SERVICE_DEFAULTS, name, namespace, partition)
        known = self.model.get(key)
        cas = None if offset is None else (known[2] if known else 0) + offset
        done = cas is None or (known is not None and cas == known[2])
        assert self.store.delete_entry(key, cas) is done
        if done and known:
            self.index += 1
            del self.model[key]

    @rule(
        node=st.sampled_from(["n1", "n2"]),
        partition=tenants,
        namespace=tenants,
        name=services,
        last=st.integers(1, 3),
    )
    def register(self, node, partition, namespace, name, last):
        place = Node(node=node, address="10.0.0.1", partition=partition)
        service = Service(
            id=name,
            service=name,
            namespace=namespace,
            partition=partition,
            address=f"10.1.0.{last}",
        )
        self.store.register(place, service)
        before = (
            self.nodes.get((partition, node)),
            self.services.get((partition, node, namespace, name)),
        )
        if before != (place, service):
            self.index += 1
            self.nodes[partition, node] = place
            self.services[partition, node, namespace, name] = service

    @rule(node=st.sampled_from(["n1", "n2"]), partition=tenants, namespace=tenants, name=services)
    def deregister_service(self, node, partition, namespace, name):
        self.store.deregister(node, name, namespace=namespace, partition=partition)
        if self.services.pop((partition, node, namespace, name), None):
            self.index += 1

    @rule(node=st.sampled_from(["n1", "n2"]), partition=tenants)
    def deregister_node(self, node, partition):
        self.store.deregister(node, partition=partition)
        if self.nodes.pop((partition, node), None):
            self.index += 1
            for key in [key for key in self.services if key[:2] == (partition, node)]:
                del self.services[key]

    @rule()
    def open_again(self):
        self.store.close()
        self.store = Store(self.path)

    @invariant()
    def agrees(self):
        found = {entry.key: to_consul(entry) for entry in self.store.entries()}
        assert found == {
            key: to_consul(
                msgspec.structs.replace(entry, create_index=created, modify_index=modified)
            )
            for key, (entry, created, modified) in self.model.items()
        }
        assert self.store.index() == self.index
        for key in self.model:
            assert self.store.entry(key).key == key

    @invariant()
    def the_catalog_agrees(self):
        assert {(one.node.partition, one.node.node) for one in self.store.nodes()} == set(
            self.nodes
        )
        assert {
            (one.node.partition, one.node.node, one.service.namespace, one.service.id): one.service
            for one in self.store.services()
        } == self.services
        living = [one for one in self.store.instances() if not one.seen_until]
        assert len(living) == len(self.services)
        held = [address for one in living for address in one.addresses]
        assert len(held) == len(set(held)), "an address is one workload's at a time"
        assert set(held) <= {service.address for service in self.services.values()}


StoreAgainstModel.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None
)
TestStoreAgainstModel = StoreAgainstModel.TestCase
