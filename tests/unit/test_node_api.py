"""The agent's API over a real unix socket: answers, refusals, and what it says of other nodes' agents."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import threading
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tidegate.catalog.client import Snapshot
from tidegate.errors import TidegateError
from tidegate.model import Instance
from tidegate.node import api
from tidegate.node import mesh as mesh_module
from tidegate.node.client import AgentClient, AgentRefused, AgentUnreachable
from tidegate.node.config import AgentConfig
from tidegate.node.guard import Event
from tidegate.node.mesh import LocalEvidence, MeshView, NodeEvidence, NodeFlows
from tidegate.node.pulse import Pulse
from tidegate.verdict.evidence import InstanceEvidence


def instance(name, node, agent_api="", **fields):
    return Instance(
        id=f"id-{name}",
        name=name,
        service=fields.pop("service", "api"),
        node=node,
        meshed=True,
        agent_api=agent_api,
        **fields,
    )


class Intent:
    """Stands for node.intent: one snapshot for ever."""

    outdated = ""

    def __init__(self, *instances):
        self.snapshot = Snapshot(index=1, instances=instances)

    def current(self):
        return self.snapshot

    async def refresh(self):
        return self.snapshot


class Guard:
    """Tells these events for each flip that is asked for."""

    def __init__(self, *events):
        self.events = events
        self.asked = []

    def strict(self, service, guard_s, *, force):
        self.asked.append((service, guard_s, force))
        if service == "busy":
            raise TidegateError("a flip of busy is under guard already")
        queue = asyncio.Queue()
        for event in (*self.events, None):
            queue.put_nowait(event)
        return queue


KEPT = Event(event="kept", message="api is strict", service="api", exit_code=0)


class Node:
    """One agent's API without the rest of the agent."""

    def __init__(self, directory: Path, *instances, name="n1", guard=None, own=()):
        self.path = directory / f"{name}.sock"
        self.pulse = Pulse()
        self.name = name
        self.guard = guard or Guard(KEPT)
        self.own = own
        self.failing = None
        config = AgentConfig(
            node=name, server="unix:///s", workloads=Path("/w"), trust_domain="mesh.consul"
        )
        self.local = LocalEvidence(self.evidence, self.flows)
        self.mesh = MeshView(config, Intent(*instances), None, self.local)

    async def evidence(self, _service, _window_s):
        if self.failing:
            raise self.failing
        return NodeEvidence(
            node=self.name,
            instances=tuple(
                InstanceEvidence(instance=one, created_at=0.0, inbound_redirected=True)
                for one in self.own
            ),
        )

    async def flows(self, _window_s):
        if self.failing:
            raise self.failing
        return NodeFlows(node=self.name, observed=tuple(one.name for one in self.own))

    @contextlib.asynccontextmanager
    async def serving(self):
        async def status():
            return {"node": self.name}

        async def exposition():
            return b"tidegate_problems 0.0\n"

        app = api.make_app(self.mesh, self.local, self.guard, status, exposition, self.pulse)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, api.listen(self.path)).start()
        try:
            async with AgentClient(f"unix://{self.path}") as client:
                yield client
        finally:
            await runner.cleanup()


def ask(node, method, path, **more):
    """Status and decoded body of one request."""

    async def one():
        async with (
            node.serving(),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(node.path))) as session,
            session.request(method, "http://agent" + path, **more) as response,
        ):
            assert response.content_type == "application/json"
            return response.status, await response.json()

    return asyncio.run(asyncio.wait_for(one(), 20))


# Requests


@pytest.mark.parametrize("window", ["0", "-1", "nan", "inf", "24h", "", "1e9", "2592000.1"])
@pytest.mark.parametrize(
    "path",
    ["/v1/flows", "/v1/ready", "/v1/ready/api", "/v1/node/flows", "/v1/node/evidence/api"],
)
def test_a_bad_window_is_refused(tmp_path, path, window):
    status, answer = ask(Node(tmp_path), "GET", path, params={"window": window})
    assert (status, answer["exit_code"]) == (400, 2)
    assert "window" in answer["error"]


def test_evidence_for_another_node_needs_a_window(tmp_path):
    status, answer = ask(Node(tmp_path), "GET", "/v1/node/evidence/api")
    assert (status, answer["error"]) == (400, "window: no window; expected seconds")


@pytest.mark.parametrize("name", ["API", "a_b", "-a", "a-", "a" * 64, "a.b", "é", "a%0ab"])
def test_a_bad_service_name_is_refused(tmp_path, name):
    node = Node(tmp_path)
    for path in (
        f"/v1/ready/{name}",
        f"/v1/node/evidence/{name}?window=5",
        f"/v1/flows?service={name}",
    ):
        status, answer = ask(node, "GET", path)
        assert (status, answer["exit_code"]) == (400, 2)
        assert "is not a service name" in answer["error"]
    body = json.dumps({"service": name, "guard_s": 1})
    assert ask(node, "POST", "/v1/strict", data=body)[0] == 400
    assert node.guard.asked == []


def test_an_empty_service_name_is_not_every_nameless_flow(tmp_path):
    assert ask(Node(tmp_path), "GET", "/v1/flows?service=")[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"service": "\xff", "guard_s": 1}',
        b'{"service": "api"}',
        b'{"service": "api", "guard_s": "1"}',
        b'{"service": "api", "guard_s": null}',
        b'{"service": "api", "guard_s": 0}',
        b'{"service": "api", "guard_s": -1}',
        b'{"service": "api", "guard_s": 604801}',
        b'{"service": "api", "guard_s": 1e999}',
        b'{"service": "api", "guard_s": 1, "force": 1}',
        b'{"service": "api", "guard_s": 1, "frce": true}',
        b"x" * (api.MAX_BODY_BYTES + 1),
    ],
)
def test_a_bad_body_is_refused_before_anything_is_flipped(tmp_path, body):
    node = Node(tmp_path)
    status, answer = ask(node, "POST", "/v1/strict", data=body)
    assert (status, answer["exit_code"]) == (400, 2)
    assert answer["error"]
    assert node.guard.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/status", 405)]
)
def test_a_request_that_does_not_exist_is_answered_like_every_failure(
    tmp_path, method, path, status
):
    answered, answer = ask(Node(tmp_path), method, path)
    assert answered == status
    assert path in answer["error"]
    assert answer["exit_code"] == 2


def test_what_cannot_be_done_now_is_refused_with_its_reason(tmp_path):
    body = json.dumps({"service": "busy", "guard_s": 1})
    status, answer = ask(Node(tmp_path), "POST", "/v1/strict", data=body)
    assert (status, answer["exit_code"]) == (409, 1)
    assert answer["error"] == "a flip of busy is under guard already"


def test_health_and_readiness_are_those_of_the_agent_and_not_of_its_workloads(tmp_path):
    node = Node(tmp_path)
    assert ask(node, "GET", "/healthz") == (200, {})
    assert ask(node, "GET", "/readyz") == (
        503,
        {"error": "no round has been completed yet", "exit_code": 2},
    )
    node.pulse.beat(whole=True)
    assert ask(node, "GET", "/readyz") == (200, {})


def test_the_metrics_are_text_as_prometheus_reads_it(tmp_path):
    async def scrape():
        node = Node(tmp_path)
        async with (
            node.serving(),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(node.path))) as session,
            session.get("http://agent/metrics") as response,
        ):
            return response.headers["Content-Type"], await response.text()

    content_type, text = asyncio.run(asyncio.wait_for(scrape(), 20))
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert text == "tidegate_problems 0.0\n"


def test_the_status_is_what_the_agent_says(tmp_path):
    assert ask(Node(tmp_path), "GET", "/v1/status") == (200, {"node": "n1"})


def test_an_unknown_service_has_a_verdict_that_says_so(tmp_path):
    status, answer = ask(Node(tmp_path), "GET", "/v1/ready/nosuch")
    assert status == 200
    [verdict] = answer["verdicts"]
    assert verdict["verdict"] == "UNKNOWN"
    assert "no-instance" in [reason["kind"] for reason in verdict["reasons"]]


def test_without_a_name_every_meshed_service_is_judged_in_order(tmp_path):
    instances = [
        instance(name, "n1", service=name, seen_until=until)
        for name, until in (("web", 0.0), ("api", 0.0), ("old", 5.0))
    ]
    _, answer = ask(Node(tmp_path, *instances), "GET", "/v1/ready")
    assert [one["service"] for one in answer["verdicts"]] == ["api", "web"]


# Events


def test_events_come_one_by_one_and_whole(tmp_path):
    large = Event(event="refused", message="x" * 600_000, service="api", exit_code=1)
    node = Node(tmp_path, guard=Guard(KEPT, large))

    async def one():
        async with node.serving() as client:
            body = {"service": "api", "guard_s": 2.5, "force": True}
            return [event async for event in client.stream("/v1/strict", body)]

    events = asyncio.run(asyncio.wait_for(one(), 20))
    assert [event["event"] for event in events] == ["kept", "refused"]
    assert events[1]["message"] == large.message
    assert node.guard.asked == [("api", 2.5, True)]


def test_a_refusal_of_a_flip_reaches_the_client_with_its_exit_code(tmp_path):
    async def one():
        async with Node(tmp_path).serving() as client:
            async for _ in client.stream("/v1/strict", {"service": "API", "guard_s": 1}):
                pass

    with pytest.raises(AgentRefused, match="is not a service name") as caught:
        asyncio.run(asyncio.wait_for(one(), 20))
    assert caught.value.exit_code == 2


@contextlib.contextmanager
def answering(path: Path, answer: bytes):
    """Something at a socket that answers every request with these bytes and hangs up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"unix://{path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


BROKEN = {
    "no JSON": reply(b"<html>"),
    "invalid UTF-8": reply(b'{"node": "\xff"}'),
    "half an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{",
    "no HTTP": b"220 smtp ready\r\n",
    "nothing": b"",
    "an error page": reply(b"oops", "500 Internal Server Error"),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_client_tells_a_broken_answer_in_one_sentence(tmp_path, answer):
    async def one(address):
        async with AgentClient(address) as client:
            await client.get("/v1/status")

    with answering(tmp_path / "s", answer) as address, pytest.raises(TidegateError) as caught:
        asyncio.run(asyncio.wait_for(one(address), 20))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["unix:///nowhere/s", "http://127.0.0.1:1", "ftp://x", "x"])
def test_where_no_agent_is_the_client_says_so(address):
    async def one():
        async with AgentClient(address) as client:
            await client.get("/v1/status")

    with pytest.raises(AgentUnreachable, match="no agent answers at"):
        asyncio.run(asyncio.wait_for(one(), 20))


# The agents of other nodes


def verdict_of(node):
    async def one():
        return await node.mesh.verdict("api", 60.0)

    return asyncio.run(asyncio.wait_for(one(), 20))


def missing(verdict):
    return [reason.message for reason in verdict.reasons if reason.kind == "evidence-missing"]


def test_evidence_of_all_nodes_comes_together(tmp_path):
    here, there = instance("api-1", "n1"), instance("api-2", "n2", f"unix://{tmp_path}/n2.sock")
    other = Node(tmp_path, name="n2", own=(there,))

    async def one():
        async with other.serving():
            node = Node(tmp_path, here, there, own=(here,))
            return await node.mesh.verdict("api", 60.0), await node.mesh.flows(None, None)

    verdict, flows = asyncio.run(asyncio.wait_for(one(), 20))
    assert {one.workload for one in verdict.coverage.instances} == {"api-1", "api-2"}
    assert flows.observed == ("api-1", "api-2")
    assert flows.problems == ()


def test_flows_of_a_service_that_nobody_knows_are_refused_with_those_that_are_known(tmp_path):
    node = Node(tmp_path, instance("web-1", "n1", service="web"), instance("api-1", "n1"))
    assert ask(node, "GET", "/v1/flows?service=api")[0] == 200
    status, answer = ask(node, "GET", "/v1/flows?service=ap")
    assert (status, answer["exit_code"]) == (400, 2)
    assert (
        answer["error"] == "service: no service 'ap' is known; did you mean api? (known: api, web)"
    )
    nobody = Node(tmp_path, name="n2")
    assert "(known: none yet)" in ask(nobody, "GET", "/v1/flows?service=api")[1]["error"]


@pytest.mark.parametrize(
    ("agent_api", "why"),
    [
        ("unix:///nowhere/agent.sock", "no agent answers at unix:///nowhere/agent.sock"),
        ("", "it has not said where its agent answers"),
        ("nonsense", "no agent answers at nonsense"),
    ],
)
def test_a_node_whose_agent_does_not_answer_is_named_with_the_reason(tmp_path, agent_api, why):
    here, there = instance("api-1", "n1"), instance("api-2", "n2", agent_api)
    node = Node(tmp_path, here, there, own=(here,))
    [told] = [one for one in missing(verdict_of(node)) if "n2" in one]
    assert why in told
    [problem] = asyncio.run(node.mesh.flows(None, None)).problems
    assert problem.startswith("n2 does not answer: ")
    assert why in problem


@pytest.mark.parametrize(
    "answer",
    [*BROKEN.values(), reply(b'{"instances": 3}'), reply(b"[]"), reply(b'{"instances": [{}]}')],
)
def test_a_node_whose_answer_does_not_decode_is_named(tmp_path, answer):
    here = instance("api-1", "n1")
    with answering(tmp_path / "s", answer) as address:
        verdict = verdict_of(Node(tmp_path, here, instance("api-2", "n2", address), own=(here,)))
    assert any("node n2" in one for one in missing(verdict))
    assert not verdict.coverage.complete


def test_the_answer_of_another_nodes_agent_is_not_taken_for_that_of_the_node(tmp_path):
    own_path = f"unix://{tmp_path}/n1.sock"
    here, there = instance("api-1", "n1", own_path), instance("api-2", "n2", own_path)

    async def one():
        node = Node(tmp_path, here, there, own=(here,))
        async with node.serving():
            return await node.mesh.verdict("api", 60.0), await node.mesh.flows(None, None)

    verdict, flows = asyncio.run(asyncio.wait_for(one(), 20))
    assert any(
        f"node n2 could not be read: n1 answers at {own_path}" in one for one in missing(verdict)
    )
    (problem,) = flows.problems
    assert problem == (
        f"n2 does not answer: n1 answers at {own_path}; `peers` in its configuration says where it can be reached"
    )


def test_what_somebody_else_has_registered_of_a_workload_is_not_missed(tmp_path):
    here = instance("api-1", "n1", f"unix://{tmp_path}/n1.sock", addresses=("10.0.0.1",))
    twin = instance("api-1-of-consul", "n1-virtual", addresses=("10.0.0.1",))
    stranger = instance("api-2-of-consul", "n1-virtual", addresses=("10.0.0.2",))
    told = missing(verdict_of(Node(tmp_path, here, twin, own=(here,))))
    assert not any("n1-virtual" in one for one in told)
    told = missing(verdict_of(Node(tmp_path, here, stranger, own=(here,))))
    assert any("n1-virtual" in one for one in told)


def test_an_agent_that_hangs_is_not_waited_for_longer_than_the_client_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh_module, "PEER_TIMEOUT_S", 0.2)
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        there = instance("api-2", "n2", f"unix://{tmp_path}/s")
        verdict = verdict_of(Node(tmp_path, there))
    assert any("node n2" in one for one in missing(verdict))


def test_the_own_nodes_failure_is_named_like_any_other(tmp_path):
    here = instance("api-1", "n1")
    node = Node(tmp_path, here, own=(here,))
    node.failing = TidegateError("history cannot be read")
    assert any("node n1" in one and "history" in one for one in missing(verdict_of(node)))


def test_a_living_instance_that_its_agent_does_not_know_is_not_passed_over(tmp_path):
    here, unread = instance("api-1", "n1"), instance("api-3", "n1")
    gone = instance("api-4", "n1", seen_until=time.time())
    verdict = verdict_of(Node(tmp_path, here, unread, gone, own=(here,)))
    assert any("knows nothing of api-3" in one for one in missing(verdict))
    assert not any("api-4" in one for one in missing(verdict))


def test_a_node_answers_where_any_of_its_instances_says(tmp_path):
    there = instance("api-2", "n2", f"unix://{tmp_path}/n2.sock")
    silent = instance("api-3", "n2")
    other = Node(tmp_path, name="n2", own=(there, silent))

    async def one():
        async with other.serving():
            return await Node(tmp_path, there, silent).mesh.verdict("api", 60.0)

    assert not any("n2" in one for one in missing(asyncio.run(asyncio.wait_for(one(), 20))))


# The socket


def test_the_socket_is_for_root_from_its_first_moment(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "agent.sock"
    modes = []

    class Watched(socket.socket):
        def bind(self, address):
            super().bind(address)
            modes.append(stat.S_IMODE(Path(address).stat().st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        with api.listen(path):
            assert modes == [0o600]
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_socket_that_nobody_answers_at_is_replaced(tmp_path):
    path = tmp_path / "agent.sock"
    api.listen(path).close()
    assert path.exists()
    with api.listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_that_an_agent_answers_at_is_left_alone(tmp_path):
    path = tmp_path / "agent.sock"
    with api.listen(path):
        before = path.stat().st_ino
        with pytest.raises(TidegateError, match=r"answers at .* already"):
            api.listen(path)
        assert path.stat().st_ino == before


def test_a_socket_that_was_taken_away_is_there_again_and_nothing_is_left_of_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(api, "LOOK_S", 0.01)
    path = tmp_path / "run" / "agent.sock"
    served = []

    @contextlib.asynccontextmanager
    async def serve(listener):
        served.append(listener)
        yield

    async def there_again(before):
        until = time.monotonic() + 10
        while len(served) == before or served[before - 1].fileno() != -1:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))

    async def scenario():
        async with api.serving_at(path, serve):
            path.unlink()
            await there_again(1)
            shutil.rmtree(path.parent)
            await there_again(2)
            # Another agent's is left alone, and tried for again.
            path.unlink()
            with api.listen(path):
                file = path.stat().st_ino
                await asyncio.sleep(0.05)
                assert path.stat().st_ino == file
            await there_again(3)
        assert not path.exists()
        assert [one.fileno() for one in served] == [-1] * 4

    asyncio.run(scenario())


def test_an_agent_too_busy_to_answer_is_not_replaced(tmp_path):
    path = tmp_path / "agent.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
        with pytest.raises(TidegateError, match="already"):
            api.listen(path)


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_no_socket_is_never_removed(tmp_path, kind):
    path, victim = tmp_path / "agent.sock", tmp_path / "victim"
    victim.write_text("precious")
    match kind:
        case "file":
            path.write_text("precious")
        case "link":
            path.symlink_to(victim)
        case "directory":
            path.mkdir()
    with pytest.raises(TidegateError, match="is no socket"):
        api.listen(path)
    assert path.exists()
    assert victim.read_text() == "precious"


def test_a_path_that_cannot_be_listened_at_is_an_error_for_a_person(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "agent.sock", tmp_path / ("s" * 108)):
        with pytest.raises(TidegateError, match="cannot listen at"):
            api.listen(path)
