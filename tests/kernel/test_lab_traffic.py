"""The lab's applications: callers that count right over both families, and see what goes wrong."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from tidegate.errors import InputError
from tidegate.kernel import netns
from tidegate.lab import apps, network, processes, runtime, state, traffic
from tidegate.lab.network import Layout
from tidegate.lab.runtime import Part
from tidegate.lab.spec import AppKind, AppSpec, CallKind, CallSpec, LabSpec, PodSpec
from tidegate.lab.state import AppStatistics, LabError, LabPaths, TargetStatistics

LAB = "f4"
DEADLINE_S = 20.0
SERVERS = {AppKind.HTTP: 8080, AppKind.TLS: 8443, AppKind.TCP: 5432}


def call(target: str, kind: CallKind, **changes: object) -> CallSpec:
    made = CallSpec(
        target=target,
        port=SERVERS[AppKind(kind.value)],
        kind=kind,
        every_s=0.02,
        timeout_s=DEADLINE_S,
    )
    return msgspec.structs.replace(made, **changes)


def every_kind() -> LabSpec:
    """A server of each kind, and a pod that calls them all from the other node."""
    servers = tuple(
        PodSpec(name=kind, node="n1", service=f"{kind}-service", port=port, app=AppSpec(kind=kind))
        for kind, port in SERVERS.items()
    )
    calls = tuple(call(f"{kind}-service", CallKind(kind.value)) for kind in SERVERS)
    manual = tuple(msgspec.structs.replace(one, every_s=None) for one in calls)
    return LabSpec(
        name=LAB,
        nodes=("n1", "n2"),
        pods=(
            PodSpec(
                name="caller",
                node="n2",
                service="caller",
                app=AppSpec(kind=AppKind.CALLER, calls=calls),
            ),
            PodSpec(
                name="rare",
                node="n2",
                service="rare",
                app=AppSpec(kind=AppKind.CALLER, calls=manual),
            ),
            *servers,
        ),
    )


def only(spec: LabSpec, *pods: str) -> LabSpec:
    return msgspec.structs.replace(spec, pods=tuple(p for p in spec.pods if p.name in pods))


def with_calls(spec: LabSpec, *calls: CallSpec) -> LabSpec:
    """The spec with other calls of the pod `caller`."""
    app = AppSpec(kind=AppKind.CALLER, calls=calls)
    return msgspec.structs.replace(
        spec,
        pods=tuple(
            msgspec.structs.replace(pod, app=app) if pod.name == "caller" else pod
            for pod in spec.pods
        ),
    )


@pytest.fixture
def up() -> Iterator[Callable[[LabSpec], None]]:
    yield lambda spec: runtime.up(spec, parts=Part.APPS)
    runtime.down(LAB)


def statistics(pod: str) -> AppStatistics:
    found = state.read(LabPaths(LAB).statistics(pod), AppStatistics)
    assert found is not None
    return found


def target(name: str = "http-service") -> TargetStatistics:
    return next(one for one in statistics("caller").targets if one.target == name)


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"waited in vain; {statistics('caller')}"
        time.sleep(0.02)


def app(pod: str) -> psutil.Process:
    record = processes.recorded(LabPaths(LAB), f"app-{pod}")
    assert record is not None
    return psutil.Process(record.pid)


def test_callers_of_every_kind_are_answered_and_none_fails(up) -> None:
    up(every_kind())
    eventually(lambda: all(one.ok >= 20 for one in statistics("caller").targets))
    for one in statistics("caller").targets:
        assert (one.failed, one.last_error) == (0, "")
        assert one.ok <= one.connections <= one.ok + 1, "a connection for each request"


def test_a_request_is_counted_once_by_the_caller_and_once_by_the_server(up) -> None:
    up(only(every_kind(), "rare", *SERVERS))
    assert [one.ok for one in statistics("rare").targets] == [0, 0, 0], "nobody told it to call"
    for number in (1, 2, 3):
        told = runtime.trigger(LAB, "rare")
        assert [(one.ok, one.failed, one.connections) for one in told] == [(number, 0, number)] * 3
    # A request to the database is three lines: PING, SET and GET.
    served = {"http": 3, "tls": 3, "tcp": 9}
    eventually_served = time.monotonic() + DEADLINE_S
    while {name: statistics(name).served for name in served} != served:
        assert time.monotonic() < eventually_served
        time.sleep(0.02)


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_connections_take_turns_between_the_families(up, family: str) -> None:
    spec = only(every_kind(), "caller", "http")
    # A request that is under way when the route goes fails by its time limit.
    up(with_calls(spec, call("http", CallKind.HTTP, timeout_s=4.0)))
    eventually(lambda: target("http").ok > 4)
    assert target("http").failed == 0
    subprocess.run(["ip", "-n", f"tg-{LAB}-caller", family, "route", "del", "default"], check=True)
    eventually(lambda: target("http").failed > 2)
    failed, ok = target("http").failed, target("http").ok
    eventually(lambda: target("http").ok > ok + 2 and target("http").failed > failed + 2)


def test_a_service_is_called_at_all_of_its_pods(up) -> None:
    pods = tuple(
        PodSpec(name=name, node="n1", service="both", port=8080, app=AppSpec(kind=AppKind.HTTP))
        for name in ("one", "two")
    )
    spec = only(every_kind(), "caller")
    spec = with_calls(spec, call("both", CallKind.HTTP))
    up(msgspec.structs.replace(spec, pods=(*spec.pods, *pods)))
    eventually(lambda: statistics("one").served > 3 and statistics("two").served > 3)
    assert target("both").failed == 0


def test_keepalive_is_the_number_of_requests_per_connection(up) -> None:
    spec = only(every_kind(), "caller", *SERVERS)
    up(with_calls(spec, *(call(kind, CallKind(kind.value), keepalive=5) for kind in SERVERS)))
    eventually(lambda: all(one.ok >= 25 for one in statistics("caller").targets))

    def are_right() -> bool:
        # A request is under way a moment before its connection is.
        return all(
            one.connections == -(-(one.ok + one.in_flight) // 5)
            for one in statistics("caller").targets
        )

    eventually(are_right)
    assert all(one.failed == 0 for one in statistics("caller").targets)


@pytest.mark.parametrize("kind", list(SERVERS))
def test_a_killed_server_shows_as_failed_until_it_is_back(up, kind: AppKind) -> None:
    spec = with_calls(
        only(every_kind(), "caller", kind), call(kind, CallKind(kind.value), keepalive=1000)
    )
    up(spec)
    eventually(lambda: target(kind).ok > 2)
    caller = app("caller").pid
    app(kind).kill()
    eventually(lambda: target(kind).failed > 2)
    assert target(kind).last_error
    assert target(kind).last_error_at > target(kind).last_ok_at > 0
    up(spec)
    ok = target(kind).ok
    eventually(lambda: target(kind).ok > ok + 2)
    assert app("caller").pid == caller, "an application that still runs is left alone"


LIES = {
    CallKind.HTTP: {
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n": "503 Busy",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Request: x\r\n\r\nhttp\n": "another request",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n": "99999999 bytes",
        b"HTTP/1.1 200 OK\r\nContent-Le": "closed within the answer",
        b"": "closed without an answer",
    },
    CallKind.TCP: {
        b"PONG somebody\n": "'somebody' answered",
        b"PONG tcp\nNO\n": "'NO' to 'SET",
        b"PONG tcp\nOK\nVALUE old\n": "'VALUE old' to 'GET",
        b"NOISE\n": "'NOISE' to PING",
        b"PO": "closed without an answer",
    },
}


@pytest.mark.parametrize("kind", list(LIES))
def test_a_wrong_answer_counts_as_failed(up, kind: CallKind) -> None:
    lies = dict(enumerate(LIES[kind], start=9000))
    calls = tuple(call(kind, kind, port=port) for port in lies)
    spec = with_calls(only(every_kind(), "caller", kind), *calls)
    runtime.up(spec, parts=Part(0))
    with ExitStack() as liars:
        for port, answer in lies.items():
            liars.enter_context(lying(kind, port, answer))
        up(spec)
        eventually(lambda: all(one.failed > 2 for one in statistics("caller").targets))
        counted = statistics("caller").targets
    for one in counted:
        assert one.ok == 0
        assert LIES[kind][lies[one.port]] in one.last_error


def test_a_server_that_does_not_answer_in_time_counts_as_failed(up) -> None:
    spec = with_calls(only(every_kind(), "caller", "tcp"), call("tcp", CallKind.TCP, timeout_s=0.1))
    up(spec)
    eventually(lambda: target("tcp").ok > 2)
    app("tcp").suspend()
    eventually(lambda: target("tcp").failed > 0)
    assert target("tcp").last_error == "no answer within 0.1 s"


def test_a_caller_with_tls_refuses_a_certificate_that_is_not_the_servers(up) -> None:
    spec = only(every_kind(), "caller", "tls")
    spec = with_calls(spec, call("tls", CallKind.TLS))
    up(spec)
    eventually(lambda: target("tls").ok > 2)
    paths = LabPaths(LAB)
    app("tls").kill()
    paths.app_certificate("tls").unlink()
    apps.ensure_certificate(paths, spec.pods[1])
    argv = [sys.executable, "-m", "tidegate.lab.traffic", str(paths.app("tls"))]
    processes.start(paths, "app-tls", f"tg-{LAB}-tls", argv, "")
    eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in target("tls").last_error)
    ok = target("tls").ok
    failed = target("tls").failed
    eventually(lambda: target("tls").failed > failed + 2)
    assert target("tls").ok == ok


def test_applications_run_as_nobody_and_end_at_once_when_told(up) -> None:
    up(only(every_kind(), "caller", "http", "tls", "tcp"))
    for pod in ("caller", *SERVERS):
        process = app(pod)
        assert {*process.uids(), *process.gids()} == {traffic.NOBODY}
        groups = Path(f"/proc/{process.pid}/status").read_text().split("Groups:")[1].split("\n")[0]
        assert groups.strip() == ""
        process.terminate()
        process.wait(timeout=DEADLINE_S)
    assert LabPaths(LAB).app_key("tls").stat().st_mode & 0o777 == 0o600


def test_up_again_leaves_the_applications_alone_and_a_change_restarts_only_its_own(up) -> None:
    spec = every_kind()
    up(spec)
    before = {pod.name: app(pod.name).pid for pod in spec.pods}
    up(spec)
    assert {pod.name: app(pod.name).pid for pod in spec.pods} == before
    up(with_calls(spec, call("http", CallKind.HTTP)))
    after = {pod.name: app(pod.name).pid for pod in spec.pods}
    assert {name for name in before if before[name] != after[name]} == {"caller"}
    up(only(spec, "http"))
    assert processes.recorded(LabPaths(LAB), "app-caller") is None
    assert not psutil.pid_exists(after["caller"])
    assert app("http").pid == before["http"]


def test_an_application_that_cannot_start_is_told_with_its_last_words(up) -> None:
    spec = only(every_kind(), "http")
    runtime.up(spec, parts=Part(0))
    inside = netns.path(f"tg-{LAB}-http")
    with (
        netns.run_in(inside, _listener, SERVERS[AppKind.HTTP]),
        pytest.raises(LabError, match=r"application of http ended.*\n  cannot listen on port 8080"),
    ):
        up(spec)
    assert len(network.namespaces(LAB)) == 4, "the lab that was up stays"


def test_triggering_needs_a_call_that_waits_for_it(up) -> None:
    up(only(every_kind(), "http"))
    with pytest.raises(InputError, match="pod http has no call"):
        runtime.trigger(LAB, "http")
    with pytest.raises(InputError, match="no pod nobody"):
        runtime.trigger(LAB, "nobody")


def test_the_status_shows_applications_and_traffic_without_an_agent(up) -> None:
    up(every_kind())
    eventually(lambda: target().ok > 0)
    app("tcp").kill()
    eventually(lambda: not runtime.status(LAB).pods[4].app_alive)
    status = runtime.status(LAB)
    pods = {pod.name: pod for pod in status.pods}
    assert pods["http"].app_alive
    assert pods["caller"].statistics.targets[0].ok > 0
    assert {pod.agent for pod in status.pods} == {None}
    assert [node.agent_answers for node in status.nodes] == [False, False]
    msgspec.json.encode(status)


HOSTILE = (
    b"\x16\x03\x01\x02\x00" + b"\x00" * 100,
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000,
    b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"SET a " + b"x" * 100_000 + b"\n",
    b"\xff\xfe\n",
)


def test_hostile_requests_do_not_take_a_server_down(up) -> None:
    up(every_kind())
    layout = state.read(LabPaths(LAB).layout, Layout)
    running = {kind: app(kind) for kind in SERVERS}
    for kind, port in SERVERS.items():
        for request in HOSTILE:
            address = layout.pod_addresses(kind)[0]
            netns.run_in(netns.path(f"tg-{LAB}-caller"), attack, address, port, request)
    before = {one.target: one.ok for one in statistics("caller").targets}
    eventually(lambda: all(one.ok > before[one.target] for one in statistics("caller").targets))
    assert all(process.is_running() for process in running.values())
    assert [one.failed for one in statistics("caller").targets] == [0, 0, 0]
    for kind in SERVERS:
        assert "Traceback" not in LabPaths(LAB).log(f"app-{kind}").read_text()


def attack(address: str, port: int, request: bytes) -> None:
    """Send a request and wait until the server has ended the connection."""
    with (
        socket.create_connection((address, port), timeout=DEADLINE_S) as connection,
        suppress(OSError),
    ):
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


@contextmanager
def lying(pod: str, port: int, answer: bytes) -> Iterator[None]:
    """A server in a pod that gives every request the same answer."""
    with netns.run_in(netns.path(f"tg-{LAB}-{pod}"), _listener, port) as listener:
        liar = threading.Thread(target=_lie, args=(listener, answer))
        liar.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            liar.join()


def _listener(port: int) -> socket.socket:
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
    )


def _lie(listener: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, suppress(ConnectionError):
            connection.recv(4096)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
