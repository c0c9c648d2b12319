"""Tracing of real connections in real namespaces, by what bcc compiles here.

Skipped, with the reason, where bcc or kernel headers cannot be had.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from namespaces import DEADLINE_S, Pair, dial, echoes, serving
from tracing import (
    Ring,
    connecting_elsewhere,
    following,
    in_cgroup,
    loaded_programs,
    only,
    own_cgroup,
    tracing,
    why_not,
)

from tidegate.cli import trace as command
from tidegate.kernel import cgroups, netns, nftables
from tidegate.observe.trace import session
from tidegate.observe.trace.records import End, Endpoint, Outcome, Redirected, Tracked

OUTBOUND, INBOUND, APPLICATION, DIRECT = 15001, 20000, 8080, 7070
UID = 4321
GREETED = "server-first"
"""Class of what the tests' servers do: they speak first."""
MANY = 300
RESETS_ARE_TOLD = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 10)
REDIRECTED = f"""
table inet redirected {{
 chain output {{
  type nat hook output priority -100
  tcp dport {APPLICATION} redirect to :{OUTBOUND}
 }}
 chain prerouting {{
  type nat hook prerouting priority -100
  tcp dport {APPLICATION} redirect to :{INBOUND}
 }}
}}
"""
TRANSPARENT = f"""
table inet transparent {{
 chain prerouting {{
  type filter hook prerouting priority -150
  ip protocol tcp tcp dport {APPLICATION} tproxy ip to :{INBOUND} meta mark set 1
 }}
}}
"""
CLIENT = """
import socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
client.sendall(b"ping")
print(client.recv(100))
"""


@pytest.fixture(scope="module", autouse=True)
def _bcc() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


def name_of(path: str) -> str:
    return Path(path).name


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def talk(netns_path: str, address: str, port: int) -> str:
    """A connection that is greeted and echoed; the client's end of it."""
    connection, _ = dial(netns_path, address, port)
    with connection:
        assert echoes(connection)
        host, own = connection.getsockname()[:2]
    return at(host.removeprefix("::ffff:"), own)


def test_a_connection_is_told_at_both_ends_with_its_processes(pair: Pair) -> None:
    argv = [session.PYTHON, "-c", CLIENT, pair.peer_ipv4, str(DIRECT)]
    with serving(pair.peer, "peer", [DIRECT]), tracing() as trace:
        client = netns.spawn(pair.pod, argv, user=UID, stdout=subprocess.PIPE)
        client.communicate(timeout=DEADLINE_S)
        records = trace.stop()
    connect = only(records, event="connect", pid=client.pid)
    accept = only(records, event="accept", pid=os.getpid(), peer=connect["local"])
    assert connect["uid"] == UID
    assert accept["uid"] == 0
    assert connect["comm"] == Path(session.PYTHON).name
    assert connect["netns"] == name_of(pair.pod)
    assert accept["netns"] == name_of(pair.peer)
    assert connect["peer"] == accept["local"] == at(pair.peer_ipv4, DIRECT)
    for end in (connect, accept):
        assert end["redirected"] == "no"
        assert end["outcome"] == "established"
        assert end["first_byte_ms"] > 0
        assert end["first_byte_seen_at"] == "arrival"
    assert connect["first_byte_ms"] > connect["handshake_ms"] > 0
    assert trace.end["lost_events"] == 0


def test_what_is_redirected_is_told_with_what_was_dialled_and_where_it_went(pair: Pair) -> None:
    netns.run_in(pair.pod, nftables.load, REDIRECTED)
    expected = {}
    with (
        serving(pair.pod, "pod", [OUTBOUND, INBOUND, DIRECT]),
        serving(pair.peer, "peer", [DIRECT]),
        tracing("--netns", pair.pod) as trace,
    ):
        for version, mapped in ((4, ""), (6, ""), (4, "::ffff:")):
            peer, pod = pair.peer_address(version), pair.pod_address(version)
            sidecar = at("127.0.0.1" if version == 4 else "::1", OUTBOUND)
            client = talk(pair.pod, mapped + peer, APPLICATION)
            for end in ("connect", "accept"):
                expected[end, client] = ("yes", at(peer, APPLICATION), sidecar, None)
            client = talk(pair.pod, mapped + peer, DIRECT)
            expected["connect", client] = ("no", at(peer, DIRECT), at(peer, DIRECT), GREETED)
            client = talk(pair.peer, mapped + pod, APPLICATION)
            expected["accept", client] = ("yes", at(pod, APPLICATION), at(pod, INBOUND), GREETED)
            client = talk(pair.peer, mapped + pod, DIRECT)
            expected["accept", client] = ("no", at(pod, DIRECT), at(pod, DIRECT), GREETED)
        records = trace.stop()
    assert len(records) == len(expected)
    assert {
        (one["event"], one["local" if one["event"] == "connect" else "peer"]): (
            one["redirected"],
            one["dialled"],
            one["went"],
            one["class"],
        )
        for one in records
    } == expected


def test_a_refused_connection_is_told_with_the_sidecar_that_was_not_there(pair: Pair) -> None:
    netns.run_in(pair.pod, nftables.load, REDIRECTED)
    with tracing("--netns", pair.pod) as trace:
        for version in (4, 6):
            for port in (APPLICATION, DIRECT):
                with pytest.raises(ConnectionRefusedError):
                    dial(pair.pod, pair.peer_address(version), port)
        records = trace.stop()
    assert len(records) == 4
    for version, loopback in ((4, "127.0.0.1"), (6, "::1")):
        peer = pair.peer_address(version)
        redirected = only(records, dialled=at(peer, APPLICATION))
        direct = only(records, dialled=at(peer, DIRECT))
        for one in (redirected, direct):
            assert (one["outcome"], one["error"]) == ("failed", "ECONNREFUSED")
            assert one["first_byte_ms"] is None
        # Where nothing listens the kernel tells of its RST from 6.10 on (docs/trace.md).
        told = ("yes", at(loopback, OUTBOUND)) if RESETS_ARE_TOLD else ("unknown", None)
        assert (redirected["redirected"], redirected["went"]) == told
        assert (direct["redirected"], direct["went"]) == ("no", at(peer, DIRECT))


def test_a_connect_that_fails_before_a_packet_is_sent_is_told(
    new_namespace: Callable[[], str],
) -> None:
    lonely = new_namespace()
    with following(lonely) as trace:
        with pytest.raises(OSError, match="unreachable"):
            dial(lonely, "192.0.2.1", 80)
        (failed,) = trace.stop()
    assert (failed.end, failed.outcome, failed.reason) == (
        End.CONNECT,
        Outcome.FAILED,
        "ENETUNREACH",
    )
    assert failed.dialled == Endpoint("192.0.2.1", 80)
    assert failed.process.pid == os.getpid()


def test_a_transparent_proxy_is_told_by_its_listener(pair: Pair) -> None:
    netns.run_in(pair.pod, nftables.load, TRANSPARENT)
    for setting in (
        ["ip", "rule", "add", "fwmark", "1", "lookup", "100"],
        ["ip", "route", "add", "local", "default", "dev", "lo", "table", "100"],
    ):
        with netns.spawn(pair.pod, setting) as done:
            assert done.wait(DEADLINE_S) == 0

    def listen() -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
        listener.bind(("0.0.0.0", INBOUND))
        listener.listen()
        return listener

    with netns.run_in(pair.pod, listen) as listener, following(pair.pod) as trace:
        client = netns.run_in(
            pair.peer, socket.create_connection, (pair.pod_ipv4, APPLICATION), DEADLINE_S
        )
        accepted, _ = listener.accept()
        client.close()
        accepted.close()
        (accept,) = trace.stop()
    where = trace.connections.whereabouts(accept, Tracked.NOT)
    assert where.dialled == accept.local == Endpoint(pair.pod_ipv4, APPLICATION)
    assert (where.redirected, where.went) == (Redirected.YES, Endpoint(pair.pod_ipv4, INBOUND))


def test_an_accept_that_waited_since_before_is_told(new_namespace: Callable[[], str]) -> None:
    place = new_namespace()
    listener = netns.run_in(place, socket.create_server, ("127.0.0.1", DIRECT))

    def accept_one() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("worker")
        listener.accept()[0].close()

    waiting = threading.Thread(target=accept_one)
    waiting.start()
    try:
        with following(place) as trace:
            # The thread waits in accept(2) since before; nothing else has to be waited for.
            client = netns.run_in(place, socket.create_connection, ("127.0.0.1", DIRECT))
            assert client.recv(1) == b""
            client.close()
            records = trace.stop()
    finally:
        waiting.join()
        listener.close()
    (accept,) = (one for one in records if one.end is End.ACCEPT)
    # It was accepted by a thread, which has a name of its own.
    assert accept.process.pid == os.getpid()
    assert accept.process.comm == Path("/proc/self/comm").read_text().strip()
    assert accept.first_byte_s is None


def test_a_first_byte_that_came_with_the_handshake_is_told_when_it_is_read(
    new_namespace: Callable[[], str],
) -> None:
    place = new_namespace()
    listener = netns.run_in(place, socket.create_server, ("127.0.0.1", DIRECT))
    # The handshake's own acknowledgement is dropped: the one that counts brings the payload.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
    with listener, following(place) as trace:
        client = netns.run_in(place, socket.create_connection, ("127.0.0.1", DIRECT))
        client.sendall(b"early")
        accepted, _ = listener.accept()
        assert accepted.recv(5) == b"early"
        client.close()
        accepted.close()
        records = trace.stop()
    (accept,) = (one for one in records if one.end is End.ACCEPT)
    assert accept.at_read
    assert accept.first_byte_s is not None


def test_the_container_of_a_process_that_has_ended_is_known_by_its_cgroup(
    new_namespace: Callable[[], str],
) -> None:
    place, container = new_namespace(), "5a" * 32
    with own_cgroup(f"cri-containerd-{container}.scope") as cgroup, following(place) as trace:
        client = netns.spawn(
            place,
            in_cgroup(cgroup, sys.executable, "-c", CLIENT, "127.0.0.1", str(DIRECT)),
            stderr=subprocess.DEVNULL,
        )
        client.wait(DEADLINE_S)
        (refused,) = trace.stop()
        assert refused.process.pid == client.pid
        assert refused.reason == "ECONNREFUSED"
        assert cgroups.path_of(refused.process.cgroup) == str(
            cgroup.relative_to(cgroups.mounted_at())
        )
        assert command._container(refused.process.cgroup, refused.process.pid) == container
    assert cgroups.path_of(refused.process.cgroup) is None


@pytest.mark.parametrize("version", [4, 6])
def test_a_program_of_a_cgroup_that_connects_elsewhere_is_a_redirection(
    pair: Pair, version: int
) -> None:
    peer, sidecar = pair.peer_address(version), "127.0.0.1" if version == 4 else "::1"
    argv = [sys.executable, "-c", CLIENT, peer]
    with (
        own_cgroup() as cgroup,
        serving(pair.pod, "pod", [OUTBOUND]),
        tracing("--netns", pair.pod) as trace,
    ):
        with connecting_elsewhere(cgroup, sidecar, OUTBOUND):
            for port in (APPLICATION, OUTBOUND):
                client = netns.spawn(
                    pair.pod, in_cgroup(cgroup, *argv, str(port)), stdout=subprocess.DEVNULL
                )
                assert client.wait(DEADLINE_S) == 0
        records = trace.stop()
    for port in (APPLICATION, OUTBOUND):
        connect = only(records, event="connect", dialled=at(peer, port))
        assert connect["redirected"] == "yes"
        assert connect["went"] == connect["peer"] == at(sidecar, OUTBOUND)
        assert connect["outcome"] == "established"
    assert len(records) == 4


def test_connections_of_io_uring_are_told_the_accepting_end_by_who_reads(
    new_namespace: Callable[[], str],
) -> None:
    place = new_namespace()
    with Ring() as ring, following(place) as trace:
        listener = netns.run_in(place, socket.create_server, ("127.0.0.1", DIRECT))
        client = netns.run_in(place, socket.socket)
        ring.connect(client, "127.0.0.1", DIRECT)
        accepted = ring.accept(listener)
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"
        for each in (client, accepted, listener):
            each.close()
        records = trace.stop()
    (connect,) = (one for one in records if one.end is End.CONNECT)
    (accept,) = (one for one in records if one.end is End.ACCEPT)
    for one in (connect, accept):
        assert one.process.pid == os.getpid()
        assert one.outcome is Outcome.ESTABLISHED
    assert connect.dialled == connect.peer == accept.local == Endpoint("127.0.0.1", DIRECT)
    assert connect.first_byte_s is None
    assert accept.first_byte_s is not None
    # It was not accept(2) that told of it.
    assert accept.listener_port == 0


def test_only_the_connections_of_a_process_are_told(pair: Pair) -> None:
    argv = ["sh", "-c", 'read line; exec "$@"', "sh", sys.executable, "-c", CLIENT]
    with serving(pair.peer, "peer", [DIRECT]):
        client = netns.spawn(pair.pod, [*argv, pair.peer_ipv4, str(DIRECT)], stdin=subprocess.PIPE)
        with tracing("--pid", str(client.pid)) as trace:
            talk(pair.pod, pair.peer_ipv4, DIRECT)
            client.communicate(b"go\n", timeout=DEADLINE_S)
            records = trace.stop()
    assert only(records)["pid"] == client.pid


def test_many_short_connections_at_once_are_each_told_once(pair: Pair) -> None:
    with (
        serving(pair.peer, "peer", [DIRECT]),
        tracing("--netns", pair.pod) as trace,
    ):
        opened = [dial(pair.pod, pair.peer_ipv4, DIRECT)[0] for _ in range(MANY)]
        ports = {connection.getsockname()[1] for connection in opened}
        for connection in opened:
            connection.close()
        records = trace.stop()
    assert len(ports) == MANY
    assert sorted(one["local"] for one in records) == sorted(at(pair.pod_ipv4, p) for p in ports)
    assert {one["redirected"] for one in records} == {"no"}
    assert {one["event"] for one in records} == {"connect"}
    assert trace.end == {"event": "end", "lost_events": 0, "not_followed": 0, "not_accepted": 0}
    assert trace.told == ""


def changed_program(path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    text = session._PROGRAM.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(session, "_PROGRAM", path)


def open_in(place: str, count: int) -> None:
    """So many connections, all open at a time, then closed."""
    listener = netns.run_in(place, socket.create_server, ("127.0.0.1", DIRECT))
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        for _ in range(count):
            client = netns.run_in(place, socket.create_connection, ("127.0.0.1", DIRECT))
            stack.enter_context(client)
            stack.enter_context(listener.accept()[0])


def test_events_for_which_there_was_no_room_are_counted(
    new_namespace: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_program(tmp_path / "p.c", monkeypatch, "RING_PAGES 256", "RING_PAGES 1")
    place = new_namespace()
    with following(place) as trace:
        # Nobody reads meanwhile: the pipe takes 64 KiB, then the reader waits.
        open_in(place, MANY)
        events, losses = trace.trace.stop()
    # CONNECTING, ESTABLISHED, LANDED, ACCEPTED and CLOSED twice of each.
    assert losses.events > 0
    assert len(events) + losses.events == 6 * MANY
    assert losses.sockets == 0


def test_connections_that_could_not_be_followed_are_counted(
    new_namespace: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_program(tmp_path / "p.c", monkeypatch, "OPEN_SOCKETS 65536", "OPEN_SOCKETS 4")
    place = new_namespace()
    with following(place) as trace:
        open_in(place, 10)
        trace.stop()
    assert trace.losses.sockets > 0
    assert trace.losses.events == 0


def test_without_system_calls_an_accept_is_told_by_who_reads(
    new_namespace: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = tuple(hook for hook in session._HOOKS if not hook[0].startswith("sys_"))
    monkeypatch.setattr(
        session, "_HOOKS", (*hooks[:-1], ("no_such_tracepoint", "on_call"), hooks[-1])
    )
    monkeypatch.setitem(session._LOST_WITHOUT, "no_such_tracepoint", "something")
    place = new_namespace()
    with following(place) as trace:
        with netns.run_in(place, socket.create_server, ("127.0.0.1", DIRECT)) as listener:
            client = netns.run_in(place, socket.create_connection, ("127.0.0.1", DIRECT))
            accepted, _ = listener.accept()
            client.sendall(b"x")
            accepted.recv(1)
            client.close()
            accepted.close()
        records = trace.stop()
    assert trace.trace.notes == (
        "this kernel cannot tell something: no tracepoint no_such_tracepoint",
    )
    (accept,) = (one for one in records if one.end is End.ACCEPT)
    assert accept.process.pid == os.getpid()
    assert len(records) == 2


def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_program(tmp_path / "p.c", monkeypatch, "enum loss {", "enum loss { ]")
    with (
        pytest.raises(
            session.TidegateError, match=r"bcc cannot compile the trace.*error: expected"
        ),
        session.started(),
    ):
        pass


def left_behind() -> dict[str, object]:
    """Of what others who trace leave. Mounts and programs of other kinds come and go by whoever works here."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "mounts": [line for line in mounts if line.split()[2] in ("tracefs", "debugfs")],
        "modules": sorted(map(str, Path("/lib/modules").glob("*/*"))),
        "files": sorted(path.name for path in Path(tempfile.gettempdir()).glob("*bcc*")),
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_nothing_is_left_when_the_command_ends(pair: Pair, number: signal.Signals) -> None:
    before, programs = left_behind(), loaded_programs()
    with tracing("--netns", pair.pod) as trace:
        during = {one for one in loaded_programs() - programs if one[1].startswith("on_")}
        assert {name for _, name in during} == {function for _, function in session._HOOKS}
        trace.process.send_signal(number)
        trace.process.communicate(timeout=DEADLINE_S)
    # The reader ends by itself, when it notices.
    deadline = time.monotonic() + DEADLINE_S
    while left := loaded_programs() & during:
        assert time.monotonic() < deadline, left
    assert left_behind() == before
