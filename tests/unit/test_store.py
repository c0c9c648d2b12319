"""The embedded store: one index, compare-and-set, who had which address when, and no lost write."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.catalog import store as store_module
from tidegate.catalog.registration import (
    Node,
    NodeInfo,
    Service,
    info_of,
    instance_of,
    is_published,
    node_of,
    proxy_id,
    services_of,
)
from tidegate.catalog.store import FIRST_INDEX, Store, StoreError, Topic
from tidegate.errors import InputError
from tidegate.intent.entries import EntryKey, Kind, Mesh, ServiceDefaults
from tidegate.model import Instance, MutualTLSMode

PERMISSIVE = MutualTLSMode.PERMISSIVE
NODE = Node(node="n1", address="10.0.0.1")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    opened = Store(tmp_path / "catalog.db", clock=clock)
    yield opened
    opened.close()


def pod(name, *addresses, meshed=False, **more):
    return Instance(
        id=f"id-{name}",
        name=name,
        service="api",
        node="n1",
        addresses=addresses,
        port=80,
        meshed=meshed,
        **more,
    )


def publish(store, instance, node=NODE):
    for service in services_of(instance):
        store.register(node, service)


def seen(store):
    return {(one.name, one.addresses, one.seen_from, one.seen_until) for one in store.instances()}


# Config entries.


def test_an_entry_is_there_with_the_indexes_of_its_writes(store):
    assert store.write_entry(ServiceDefaults(name="api"))
    first = store.entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
    assert store.write_entry(ServiceDefaults(name="api", protocol="http"))
    second = store.entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
    assert (first.create_index, first.modify_index) == (FIRST_INDEX + 1, FIRST_INDEX + 1)
    assert (second.create_index, second.modify_index) == (FIRST_INDEX + 1, FIRST_INDEX + 2)
    assert store.entries() == (second,)
    assert store.index(Topic.CONFIG) == store.index() == FIRST_INDEX + 2


def test_a_write_that_changes_nothing_leaves_the_index_alone(store):
    store.write_entry(ServiceDefaults(name="api"))
    before = store.index()
    assert store.write_entry(ServiceDefaults(name="api", modify_index=77))
    publish(store, pod("a", "10.1.0.1", meshed=True))
    after = store.index()
    publish(store, pod("a", "10.1.0.1", meshed=True))
    assert store.index() == after > before


def test_compare_and_set_writes_only_over_what_was_read(store):
    entry = ServiceDefaults(name="api")
    assert not store.write_entry(entry, cas=5)
    assert store.write_entry(entry, cas=0)
    assert not store.write_entry(ServiceDefaults(name="api", protocol="http"), cas=0)
    index = store.entry(EntryKey(Kind.SERVICE_DEFAULTS, "api")).modify_index
    assert not store.delete_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"), cas=index + 1)
    assert store.write_entry(ServiceDefaults(name="api", protocol="http"), cas=index)
    assert not store.delete_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"), cas=index)
    assert store.delete_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"), cas=index + 1)
    assert not store.delete_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"), cas=index + 1)
    assert store.delete_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
    assert store.entries() == ()


def test_of_two_writers_that_race_with_compare_and_set_exactly_one_wins_each_round(tmp_path):
    path = tmp_path / "catalog.db"
    stores = [Store(path), Store(path)]
    stores[0].write_entry(ServiceDefaults(name="api"))
    rounds = 25
    barrier = threading.Barrier(2)
    wins = [[], []]

    def race(me):
        for number in range(rounds):
            index = stores[me].entry(EntryKey(Kind.SERVICE_DEFAULTS, "api")).modify_index
            barrier.wait(30)
            proposal = ServiceDefaults(name="api", meta={"round": f"{number} by {me}"})
            wins[me].append(stores[me].write_entry(proposal, cas=index))
            barrier.wait(30)

    threads = [threading.Thread(target=race, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [a + b for a, b in zip(*wins, strict=True)] == [1] * rounds
    assert stores[1].index() == FIRST_INDEX + 1 + rounds
    for one in stores:
        one.close()


def test_the_permissive_gate_is_held_inside_the_store(store):
    permissive = ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE)
    with pytest.raises(InputError):
        store.write_entry(permissive)
    assert store.entries() == ()
    store.write_entry(Mesh(allow_enabling_permissive_mutual_tls=True))
    assert store.write_entry(permissive)
    store.delete_entry(EntryKey(Kind.MESH, "mesh"))
    assert store.write_entry(
        ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE, protocol="tcp")
    )
    assert store.write_entry(ServiceDefaults(name="api"))
    with pytest.raises(InputError):
        store.write_entry(permissive)


# The catalog.


def test_an_instance_lives_from_its_registration_to_its_deregistration(store, clock):
    publish(store, pod("a", "10.1.0.1", "fd00::1", meshed=True))
    clock.now = 1010.0
    assert seen(store) == {("a", ("10.1.0.1", "fd00::1"), 1000.0, 0.0)}
    store.deregister("n1", "id-a")
    clock.now = 1020.0
    store.deregister("n1", proxy_id("id-a"))
    assert seen(store) == {("a", ("10.1.0.1", "fd00::1"), 1000.0, 1010.0)}
    assert store.instances()[0].meshed


def test_becoming_meshed_changes_the_instance_and_not_since_when_it_is_known(store, clock):
    publish(store, pod("a", "10.1.0.1"))
    clock.now = 1010.0
    publish(store, pod("a", "10.1.0.1", meshed=True, mode=PERMISSIVE, applied_index=7))
    (instance,) = store.instances()
    assert (instance.meshed, instance.mode, instance.applied_index) == (True, PERMISSIVE, 7)
    assert instance.seen_from == 1000.0
    store.deregister("n1", proxy_id("id-a"))
    (instance,) = store.instances()
    assert not instance.meshed
    assert not instance.seen_until


def test_an_address_that_is_used_again_belongs_to_each_workload_in_its_time(store, clock):
    publish(store, pod("a", "10.1.0.1"))
    clock.now = 1010.0
    store.deregister("n1", "id-a")
    clock.now = 1020.0
    publish(store, pod("b", "10.1.0.1"))
    assert seen(store) == {
        ("a", ("10.1.0.1",), 1000.0, 1010.0),
        ("b", ("10.1.0.1",), 1020.0, 0.0),
    }


def test_who_claims_an_address_takes_it_from_who_held_it_before(store, clock):
    publish(store, pod("a", "10.1.0.1", "fd00::1"))
    clock.now = 1010.0
    publish(store, pod("b", "10.1.0.1"))
    expected = {
        ("a", ("10.1.0.1", "fd00::1"), 1000.0, 1010.0),
        ("a", ("fd00::1",), 1010.0, 0.0),
        ("b", ("10.1.0.1",), 1010.0, 0.0),
    }
    assert seen(store) == expected
    clock.now = 1020.0
    publish(store, pod("a", "10.1.0.1", "fd00::1", meshed=True))
    assert seen(store) == expected


def test_a_late_registration_counts_from_when_the_agent_saw_the_workload(store, clock):
    publish(store, pod("a", "10.1.0.1", seen_from=900.0))
    clock.now = 1100.0
    publish(store, pod("b", "10.1.0.1", seen_from=1050.0))
    publish(store, pod("c", "10.1.0.2", seen_from=5000.0))
    assert seen(store) == {
        ("a", ("10.1.0.1",), 900.0, 1050.0),
        ("a", (), 1050.0, 0.0),
        ("b", ("10.1.0.1",), 1050.0, 0.0),
        ("c", ("10.1.0.2",), 1100.0, 0.0),
    }


def test_a_change_of_addresses_begins_a_new_span(store, clock):
    publish(store, pod("a", "10.1.0.1"))
    clock.now = 1010.0
    publish(store, pod("a", "10.1.0.1", "fd00::1"))
    assert seen(store) == {
        ("a", ("10.1.0.1",), 1000.0, 1010.0),
        ("a", ("10.1.0.1", "fd00::1"), 1010.0, 0.0),
    }


def test_a_node_leaves_with_everything_on_it(store):
    publish(store, pod("a", "10.1.0.1", meshed=True))
    store.deregister("n1")
    assert store.nodes() == ()
    assert store.services() == ()
    assert all(one.seen_until for one in store.instances())
    index = store.index()
    store.deregister("n1")
    store.deregister("n1", "id-a")
    assert store.index() == index


def test_what_is_long_gone_is_forgotten(store, clock, monkeypatch):
    monkeypatch.setattr(store_module, "DEPARTED_KEPT", 3)
    for number in range(6):
        publish(store, pod(f"p{number}", f"10.1.0.{number}"))
        clock.now += 1
        store.deregister("n1", f"id-p{number}")
    assert {one.name for one in store.instances()} == {"p3", "p4", "p5"}
    clock.now += store_module.DEPARTED_KEPT_S + 1
    publish(store, pod("new", "10.2.0.1"))
    clock.now += 1
    store.deregister("n1", "id-new")
    assert {one.name for one in store.instances()} == {"new"}


# Registration.

names = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)
addresses = st.lists(
    st.ip_addresses().map(str).filter(lambda text: not text.startswith("::ffff:")),
    unique=True,
    max_size=5,
).map(tuple)


@st.composite
def instances(draw):
    sidecar = draw(
        st.fixed_dictionaries(
            {
                "meshed": st.just(True),
                "inbound_port": st.integers(1, 65535),
                "applied_index": st.integers(0, 2**40),
                "mode": st.sampled_from(MutualTLSMode),
            }
        )
        | st.just({})
    )
    return Instance(
        id=draw(names),
        name=draw(names),
        service=draw(names),
        node="n1",
        namespace=draw(names),
        addresses=draw(addresses.filter(bool)),
        port=draw(st.integers(0, 65535)),
        agent_api=draw(st.sampled_from(["", "unix:///a"])),
        seen_from=draw(st.floats(0, 2**40)),
        **sidecar,
    )


@given(instances())
def test_an_instance_survives_consuls_registration(instance):
    services = [
        msgspec.json.decode(msgspec.json.encode(service), type=Service)
        for service in services_of(instance)
    ]
    sidecar = services[1] if len(services) > 1 else None
    assert instance_of(NODE, services[0], sidecar) == instance
    assert is_published(instance, {instance.id: msgspec.structs.replace(instance, seen_from=1.0)})
    assert not is_published(instance, {instance.id: msgspec.structs.replace(instance, name="-")})
    assert not is_published(instance, {})


def test_a_node_survives_consuls_registration():
    for api in ("", "unix:///run/a.sock"):
        info = NodeInfo(name="n1", address="fd00::9", agent_api=api)
        assert info_of(node_of(info)) == info


def test_a_service_that_another_tool_registered_is_an_instance_too():
    service = Service(id="web-1", service="web", address="10.9.0.1", port=80)
    instance = instance_of(NODE, service, None)
    assert (instance.name, instance.addresses) == ("web-1", ("10.9.0.1",))
    at_node = instance_of(NODE, Service(id="web-2", service="web"), None)
    assert at_node.addresses == ("10.0.0.1",)
    by_name = instance_of(NODE, Service(id="web-3", service="web", address="db.example"), None)
    assert by_name.addresses == ()


# The file.


def test_the_file_is_for_its_owner_only_and_survives_closing(tmp_path):
    path = tmp_path / "catalog.db"
    path.touch(mode=0o644)
    first = Store(path)
    first.write_entry(ServiceDefaults(name="api"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    identity = first.id
    first.close()
    second = Store(path)
    assert (second.id, [entry.name for entry in second.entries()]) == (identity, ["api"])
    second.close()


@pytest.mark.parametrize("damage", ["nonsense", "truncated", "overwritten"])
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path, damage):
    path = tmp_path / "catalog.db"
    if damage == "nonsense":
        path.write_bytes(b"not a database at all" * 100)
    else:
        made = Store(path)
        for number in range(200):
            made.write_entry(ServiceDefaults(name=f"s{number}", meta={"x": "y" * 200}))
        made.close()
        content = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:4096] + b"\xff" * 20000 + content[24096:])
    with pytest.raises(StoreError, match=r"is damaged .*move it away"):
        Store(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "catalog.db"
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 99")
    other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(StoreError, match="format 99"):
        Store(path)


@pytest.mark.parametrize("made", ["directory", "link", "nowhere"])
def test_a_path_that_cannot_be_a_store_is_refused(tmp_path, made):
    path = tmp_path / "catalog.db"
    if made == "directory":
        path.mkdir()
    elif made == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path = tmp_path / "missing" / "catalog.db"
    with pytest.raises(StoreError, match=r"catalog\.db: "):
        Store(path)


def fill(store):
    for number in range(1000):
        store.write_entry(ServiceDefaults(name=f"s{number}", meta={"x": "y" * 500}))


def test_a_full_disk_refuses_the_write_and_leaves_the_store_whole(tmp_path):
    store = Store(tmp_path / "catalog.db")
    store.write_entry(ServiceDefaults(name="api"))
    before = store.contents()
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        fill(store)
    store._db.execute("PRAGMA max_page_count = 100000")
    kept = store.contents()
    assert kept.index >= before.index
    assert before.entries[0] in kept.entries
    assert store.write_entry(ServiceDefaults(name="after"))
    store.close()


WRITER = """
import sys
from pathlib import Path
from tidegate.catalog.store import Store
from tidegate.intent.entries import ServiceDefaults
store = Store(Path(sys.argv[1]))
number = 0
while True:
    store.write_entry(ServiceDefaults(name=f"s{number}"))
    print(number, flush=True)
    number += 1
"""


def test_every_acknowledged_write_is_there_after_the_writer_is_killed(tmp_path):
    path = tmp_path / "catalog.db"
    acknowledged = -1
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        try:
            while acknowledged < 30:
                acknowledged = int(writer.stdout.readline())
        finally:
            os.kill(writer.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
    store = Store(path)
    names = {entry.name for entry in store.entries()}
    assert {f"s{number}" for number in range(acknowledged + 1)} <= names
    assert len(names) <= acknowledged + 2
    assert store.index() == FIRST_INDEX + len(names)
    store.close()
