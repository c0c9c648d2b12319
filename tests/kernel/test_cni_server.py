"""CNI calls through the real plugin: containers are redirected before they start, and nothing is left of them."""

import errno
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cni_agent import DEADLINE_S, Agent, Runtime, process
from namespaces import eventually, landing, namespace, pair_of, serving, tell
from redirecting import APP, INBOUND, OUTBOUND, PORTS

from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import TidegateError
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.kernel import links, netns, nftables
from tidegate.model import Sidecar
from tidegate.node import cni_calls
from tidegate.node.metrics import CniResult
from tidegate.workloads.attachments import Attachment, Attachments
from tidegate.workloads.cni import AttachmentKey
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment

AT_ONCE = 50
POD = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=uid-1"
CONSUL = '{"ProxyUserID":"5995","ProxyInboundPort":20000,"ProxyOutboundPort":15001,"ExcludeInboundPorts":["8080"]}'


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with Agent(tmp_path).running() as running:
        yield running


@pytest.fixture
def runtime(agent: Agent) -> Runtime:
    return Runtime(agent.config.socket)


def rules(path: str) -> str:
    """What the namespace has of nftables, whoever made it."""
    return netns.run_in(path, nftables.list_text, "inet", "tidegate") or ""


def rules_of(policy: Policy, path: str) -> tuple[str, ...]:
    return Engine().check(path, policy)


def test_when_add_returns_connections_go_to_the_sidecar(agent: Agent, runtime: Runtime) -> None:
    with pair_of() as pair, serving(pair.pod, "pod", PORTS), serving(pair.peer, "peer", PORTS):
        assert landing(pair.peer, pair.pod_ipv4, APP).port == APP
        assert runtime.call("ADD", pair.pod) == {}
        for version in (4, 6):
            assert landing(pair.peer, pair.pod_address(version), APP).port == INBOUND
            assert landing(pair.pod, pair.peer_address(version), APP, uid=1).port == OUTBOUND
        eventually(lambda: agent.woken == 1)
        assert runtime.call("DEL", pair.pod) == {}
        assert landing(pair.peer, pair.pod_ipv4, APP).port == APP
        assert rules(pair.pod) == ""


def test_add_and_del_may_be_repeated(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    for _ in range(2):
        assert runtime.call("ADD", pod) == {}
        assert rules_of(DEFAULT, pod) == ()
    assert runtime.call("CHECK", pod) == {}
    for _ in range(2):
        assert runtime.call("DEL", pod) == {}
        assert rules(pod) == ""
    assert agent.attachments.list() == ()


@pytest.mark.parametrize("tells_path", [True, False])
def test_del_ends_an_attachment_whose_namespace_is_gone(
    agent: Agent, runtime: Runtime, tells_path: bool
) -> None:
    with namespace() as pod:
        assert runtime.call("ADD", pod) == {}
    assert runtime.call("DEL", pod if tells_path else "") == {}
    assert list((agent.config.socket.parent / "attachments").iterdir()) == []
    assert runtime.call("DEL", pod) == {}


def test_del_without_the_path_takes_the_rules_away(
    runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    assert runtime.call("ADD", pod) == {}
    assert runtime.call("DEL", "") == {}
    assert rules(pod) == ""


def test_del_takes_away_what_an_add_left_that_nobody_remembers(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    agent.engine.apply(pod, DEFAULT)
    assert runtime.call("DEL", pod) == {}
    assert rules(pod) == ""


def test_del_leaves_the_rules_that_another_attachment_has(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    assert runtime.call("ADD", pod) == {}
    assert runtime.call("ADD", pod, interface="net1") == {}
    assert len(agent.attachments.list()) == 1
    assert runtime.call("DEL", pod, interface="net1") == {}
    assert rules_of(DEFAULT, pod) == ()
    assert runtime.call("DEL", pod) == {}
    assert rules(pod) == ""


def test_del_takes_the_rules_away_when_the_daemon_has_let_go(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    """Before that it would repair them, and tell that somebody had changed them."""
    pod = new_namespace()
    assert runtime.call("ADD", pod) == {}
    agent.in_force[pod] = DEFAULT
    eventually(lambda: agent.woken == 1)
    ending = runtime.start("DEL", pod)
    eventually(lambda: agent.woken == 2)
    assert agent.attachments.is_leaving(netns.identity(pod))
    assert agent.attachments.list() == ()
    assert rules_of(DEFAULT, pod) == ()
    del agent.in_force[pod]
    assert ending.error() == {}
    assert rules(pod) == ""
    assert runtime.call("ADD", pod) == {}
    assert not agent.attachments.is_leaving(netns.identity(pod))


def test_check_tells_of_a_rule_that_is_gone(
    runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    assert runtime.call("ADD", pod) == {}
    netns.run_in(pod, nftables.load, "flush chain inet tidegate inbound")
    error = runtime.call("CHECK", pod)
    assert error["code"] == 101
    assert "inbound" in error["details"]
    netns.run_in(pod, nftables.load, "delete table inet tidegate")
    assert "missing" in runtime.call("CHECK", pod)["details"]


def test_check_goes_by_the_policy_that_is_in_force_now(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    assert runtime.call("ADD", pod) == {}
    agent.in_force[pod] = Policy(drop_invalid=True)
    assert runtime.call("CHECK", pod)["code"] == 101
    agent.engine.apply(pod, agent.in_force[pod])
    assert runtime.call("CHECK", pod) == {}


def test_check_of_a_container_that_was_never_attached_says_so(
    runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    assert runtime.call("CHECK", new_namespace())["code"] == 3


def test_status_says_when_the_agent_has_not_looked_at_its_node(
    agent: Agent, runtime: Runtime
) -> None:
    assert runtime.call("STATUS", "") == {}
    agent.ready = False
    assert runtime.call("STATUS", "")["code"] == 50


def test_gc_ends_what_the_runtime_does_not_know(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    kept, lost = new_namespace(), new_namespace()
    assert runtime.call("ADD", kept, "kept") == {}
    assert runtime.call("ADD", lost, "lost") == {}
    valid = [{"containerID": "kept", "ifname": "eth0"}]
    assert runtime.call("GC", "")["code"] == 7
    assert rules_of(DEFAULT, lost) == ()
    assert runtime.call("GC", "", **{"cni.dev/valid-attachments": valid}) == {}
    assert rules(lost) == ""
    assert rules_of(DEFAULT, kept) == ()
    assert [one.netns for one in agent.attachments.list()] == [kept]


def test_gc_goes_on_after_what_it_cannot_clear_away_and_names_it(
    agent: Agent,
    runtime: Runtime,
    new_namespace: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stuck, lost = new_namespace(), new_namespace()
    assert runtime.call("ADD", stuck, "stuck") == {}
    assert runtime.call("ADD", lost, "lost") == {}
    remove = agent.attachments.remove

    def refuse(key: AttachmentKey) -> Attachment | None:
        if key.container_id == "stuck":
            raise OSError(errno.EROFS, "Read-only file system")
        return remove(key)

    monkeypatch.setattr(agent.attachments, "remove", refuse)
    answer = runtime.call("GC", "", **{"cni.dev/valid-attachments": []})
    assert "Read-only file system" in answer["details"]
    assert rules(lost) == ""
    assert [one.netns for one in agent.attachments.list()] == [stuck]


def test_while_no_more_files_can_be_opened_calls_wait(
    agent: Agent,
    runtime: Runtime,
    new_namespace: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusals = [OSError(errno.EMFILE, "Too many open files")] * 3
    accept = socket.socket.accept

    def refuse(listener: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise refusals.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refuse)
    assert runtime.call("ADD", new_namespace()) == {}
    assert refusals == []


def test_many_containers_start_at_once(
    agent: Agent,
    runtime: Runtime,
    new_namespace: Callable[[], str],
    pytestconfig: pytest.Config,
) -> None:
    pods = [new_namespace() for _ in range(AT_ONCE)]
    began = time.monotonic()
    calls = [runtime.start("ADD", pod, f"c{number}") for number, pod in enumerate(pods)]
    ended = []
    for one in calls:
        assert one.error() == {}
        ended.append(time.monotonic() - began)
    assert {one.netns for one in agent.attachments.list()} == {*pods}
    for pod in pods:
        assert rules_of(DEFAULT, pod) == ()
    calls = [runtime.start("DEL", pod, f"c{number}") for number, pod in enumerate(pods)]
    assert [one.error() for one in calls] == [{}] * AT_ONCE
    assert [rules(pod) for pod in pods] == [""] * AT_ONCE
    middle = statistics.median(ended)
    told = f"{AT_ONCE} containers at once: the last ADD ended after {ended[-1] * 1e3:.0f} ms"
    tell(pytestconfig, f"{told}, half of them after {middle * 1e3:.0f} ms")


def test_an_agent_that_is_killed_in_an_add_is_asked_again_and_forgets_nothing(
    tmp_path: Path,
) -> None:
    runtime = Runtime(tmp_path / "cni.sock", wait_s=20)
    with namespace() as pod, process(tmp_path) as start:
        pid = start()
        assert runtime.call("ADD", pod, "before") == {}
        os.kill(pid, signal.SIGSTOP)
        calls = [runtime.start("ADD", pod, f"c{number}") for number in range(4)]
        for one in calls:
            eventually(lambda call=one: call.waits)
        os.kill(pid, signal.SIGKILL)
        start()
        assert [one.error() for one in calls] == [{}] * 4
        assert rules_of(DEFAULT, pod) == ()
        assert runtime.call("CHECK", pod, "before") == {}


def test_a_record_ends_when_its_namespace_does(agent: Agent, runtime: Runtime) -> None:
    """As of a container whose runtime was killed: nobody ever says that it ended."""
    with namespace() as pod:
        assert runtime.call("ADD", pod) == {}
        assert [one.id for one in agent.attachments.list()] == ["cni-c1"]
    assert agent.attachments.list() == ()
    assert Attachments(agent.config.socket.parent / "attachments").list() == ()


def test_a_path_that_has_come_to_be_another_namespaces_is_none_of_the_container(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str], tmp_path: Path
) -> None:
    one, other = new_namespace(), new_namespace()
    path = tmp_path / "netns"
    path.symlink_to(one)
    assert runtime.call("ADD", str(path)) == {}
    path.unlink()
    path.symlink_to(other)
    agent.engine.apply(other, DEFAULT)
    assert "another network namespace" in runtime.call("CHECK", str(path))["msg"]
    assert runtime.call("DEL", str(path)) == {}
    assert rules_of(DEFAULT, other) == ()


def test_a_network_that_does_not_ask_for_it_is_only_observed(
    agent: Agent, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    runtime = Runtime(agent.config.socket, mesh=False)
    assert runtime.call("ADD", pod) == {}
    assert rules(pod) == ""
    (described,) = agent.attachments.list()
    assert described.meshed is False
    assert runtime.call("CHECK", pod) == {}
    assert runtime.call("DEL", pod) == {}


def test_nomads_argument_is_taken_as_consul_cni_takes_it(
    agent: Agent, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    runtime = Runtime(agent.config.socket, mesh=False, sidecar="tidegate")
    assert runtime.call("ADD", pod, arguments=f"CONSUL_IPTABLES_CONFIG={CONSUL}") == {}
    assert "8080" in rules(pod)
    (described,) = agent.attachments.list()
    assert (described.meshed, described.sidecar) == (True, Sidecar.OWN)


def test_annotations_of_the_network_are_obeyed_and_wrong_ones_named(
    agent: Agent, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    right = {"tidegate.io/exclude-inbound-ports": "9102"}
    assert Runtime(agent.config.socket, annotations=right).call("ADD", pod) == {}
    assert "9102" in rules(pod)
    wrong = {"tidegate.io/exclude-inbound-ports": "many"}
    error = Runtime(agent.config.socket, annotations=wrong).call("ADD", pod, "c2")
    assert error["code"] == 7
    assert "exclude-inbound-ports" in error["details"]
    (problem,) = agent.server.problems()
    assert "c2" in problem
    assert "many" in problem


def test_a_failure_is_told_until_the_container_starts(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    missing = f"{new_namespace()}-missing"
    assert runtime.call("ADD", missing, arguments=POD)["code"] == 100
    (problem,) = agent.server.problems()
    assert problem.startswith("shop/web-0 cannot start: ")
    assert runtime.call("ADD", new_namespace(), arguments=POD) == {}
    assert agent.server.problems() == ()


def test_the_nodes_own_network_is_never_redirected(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    node = new_namespace()
    runtime = Runtime(tmp_path / "cni.sock")
    with process(tmp_path, node) as start:
        start()
        assert runtime.call("ADD", node)["code"] == 4
        assert rules(node) == ""
        assert runtime.call("ADD", new_namespace()) == {}


def test_nothing_of_the_agent_keeps_a_namespace_alive(runtime: Runtime) -> None:
    with namespace() as peer:
        with namespace() as pod:
            links.create_veth(pod, "eth0", peer, "host0")
            assert runtime.call("ADD", pod) == {}
        # The kernel removes one end of a veth pair with the namespace of the other.
        eventually(lambda: netns.run_in(peer, socket.if_nameindex) == [(1, "lo")])


def test_a_sidecar_that_the_agent_starts_is_waited_for_with_the_rules_in_place(
    agent: Agent,
) -> None:
    runtime = Runtime(agent.config.socket, sidecar="tidegate")
    with pair_of() as pair:
        adding = runtime.start("ADD", pair.pod)
        eventually(lambda: agent.attachments.list())
        assert rules_of(DEFAULT, pair.pod) == ()
        with pytest.raises(ConnectionRefusedError):
            landing(pair.peer, pair.pod_ipv4, APP)
        assert adding.process.poll() is None
        with serving(pair.pod, "sidecar", (INBOUND, OUTBOUND)):
            assert adding.error() == {}


class Kubernetes:
    """Says of each pod what it was told to say."""

    def __init__(self, answer: Description | LeftAlone | Exception | None) -> None:
        self.answer = answer
        self.known_by_now: Description | LeftAlone | None = None
        self.asked: list[tuple[str, str, str]] = []

    def known(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        return self.known_by_now

    async def look_up(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        self.asked.append((namespace, name, uid))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


POD_OF_CONSUL = Description(
    origin=Origin.KUBERNETES,
    netns="/proc/7/ns/net",
    id="uid-1",
    name="web-0",
    namespace="shop",
    service="web",
    meshed=True,
    sidecar=Sidecar.OWN,
    annotations={"consul.hashicorp.com/redirect-traffic-config": CONSUL},
)


def test_what_kubernetes_says_of_a_pod_is_obeyed_and_recorded(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    pods = Kubernetes(POD_OF_CONSUL)
    with Agent(tmp_path, pods=pods).running() as agent:
        runtime = Runtime(agent.config.socket, mesh=False)
        assert runtime.call("ADD", pod, arguments=POD) == {}
    assert pods.asked == [("shop", "web-0", "uid-1")]
    assert "8080" in rules(pod)
    again = Attachments(tmp_path / "attachments")
    (described,) = again.list()
    expected = msgspec.structs.replace(
        POD_OF_CONSUL,
        origin=Origin.CNI,
        netns=pod,
        interface="eth0",
        created_at=described.created_at,
    )
    assert described == expected
    assert again.find("uid-1", "shop", "web-0") == pod
    assert again.find("", "shop", "web-0") == pod
    assert again.find("another", "shop", "web-0") is None


def test_a_pod_that_kubernetes_has_told_of_starts_without_a_question(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    pods = Kubernetes(TidegateError("the API server is away"))
    pods.known_by_now = POD_OF_CONSUL
    with Agent(tmp_path, pods=pods).running() as agent:
        assert Runtime(agent.config.socket).call("ADD", pod, arguments=POD) == {}
        (described,) = agent.attachments.list()
    assert pods.asked == []
    assert "8080" in rules(pod)
    assert (described.netns, described.service) == (pod, "web")


class Slow(Kubernetes):
    """Has the event loop wait for each answer."""

    def __init__(self) -> None:
        super().__init__(None)
        self.may_answer = threading.Event()

    async def look_up(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        await super().look_up(namespace, name, uid, netns)
        assert self.may_answer.wait(DEADLINE_S)
        return self.answer


def test_a_container_of_which_all_is_known_waits_for_nothing_else_that_the_agent_does(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pods = Slow()
    with Agent(tmp_path, pods=pods).running() as agent:
        runtime = Runtime(agent.config.socket)
        asking = runtime.start("ADD", new_namespace(), arguments=POD)
        eventually(lambda: pods.asked)
        other = new_namespace()
        assert runtime.call("ADD", other, "c2") == {}
        assert rules_of(DEFAULT, other) == ()
        assert asking.process.poll() is None
        pods.may_answer.set()
        assert asking.error() == {}


def test_a_del_waits_for_the_add_of_its_container(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    pods = Slow()
    pods.answer = POD_OF_CONSUL
    with Agent(tmp_path, pods=pods).running() as agent:
        runtime = Runtime(agent.config.socket)
        adding = runtime.start("ADD", pod, arguments=POD)
        eventually(lambda: pods.asked)
        ending = runtime.start("DEL", pod)
        eventually(lambda: ending.waits)
        # Whoever is taken in after it, and answered, shows that it was taken in.
        assert runtime.call("ADD", new_namespace(), "c2") == {}
        pods.may_answer.set()
        assert (adding.error(), ending.error()) == ({}, {})
        assert rules(pod) == ""
        assert len(agent.attachments.list()) == 1


def test_an_add_waits_for_the_del_of_its_container(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    assert runtime.call("ADD", pod) == {}
    agent.in_force[pod] = DEFAULT
    ending = runtime.start("DEL", pod)
    eventually(lambda: agent.attachments.list() == ())
    adding = runtime.start("ADD", pod)
    eventually(lambda: adding.waits)
    assert runtime.call("ADD", new_namespace(), "c2") == {}
    assert adding.process.poll() is None
    del agent.in_force[pod]
    assert (ending.error(), adding.error()) == ({}, {})
    assert rules_of(DEFAULT, pod) == ()


def test_calls_that_wait_when_the_agent_ends_are_broken_off(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    with socket.socket(socket.AF_UNIX) as silent:
        with Agent(tmp_path).running() as agent:
            runtime = Runtime(agent.config.socket, sidecar="tidegate")
            silent.connect(str(agent.config.socket))
            calls = [runtime.start("ADD", pod), runtime.start("DEL", pod)]
            eventually(lambda: agent.attachments.list())
            for one in calls:
                eventually(lambda call=one: call.waits)
        assert silent.recv(1) == b""
        assert calls[0].error()["code"] == 11
        assert calls[1].error() == {}
    assert rules_of(DEFAULT, pod) == ()


def test_a_request_may_come_in_pieces_but_not_for_ever(
    agent: Agent, new_namespace: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"\0".join((b"STATUS", b"", b"", b"", b"", b'{"name":"net"}'))
    request = b"TGC1" + len(body).to_bytes(4) + body
    with socket.socket(socket.AF_UNIX) as patient:
        patient.connect(str(agent.config.socket))
        for at in range(len(request)):
            patient.sendall(request[at : at + 1])
        assert patient.recv(4096) == b'{"done":true}'
    monkeypatch.setattr(cni_calls, "REQUEST_S", 0.1)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(agent.config.socket))
        slow.sendall(request[:-1])
        assert slow.recv(4096) == b""


def test_a_pod_that_is_left_alone_starts_untouched(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    alone = LeftAlone(
        origin=Origin.KUBERNETES,
        id="uid-1",
        name="web-0",
        namespace="shop",
        treatment=Treatment.EXCLUDED,
        reason="",
    )
    pod = new_namespace()
    with Agent(tmp_path, pods=Kubernetes(alone)).running() as agent:
        runtime = Runtime(agent.config.socket)
        for command in ("ADD", "CHECK", "DEL"):
            assert runtime.call(command, pod, arguments=POD) == {}
        assert agent.attachments.list() == ()
    assert rules(pod) == ""


def test_pods_of_excluded_namespaces_start_without_a_question(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pods = Kubernetes(TidegateError("the API server is away"))
    pod = new_namespace()
    with Agent(tmp_path, pods=pods).running() as agent:
        runtime = Runtime(agent.config.socket)
        arguments = "K8S_POD_NAMESPACE=infra;K8S_POD_NAME=dns-0"
        assert runtime.call("ADD", pod, arguments=arguments) == {}
    assert pods.asked == []
    assert rules(pod) == ""


def test_while_nobody_can_say_what_a_pod_is_it_fails_or_starts_as_configured(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    with Agent(
        tmp_path, pods=Kubernetes(TidegateError("the API server is away"))
    ).running() as agent:
        error = Runtime(agent.config.socket).call("ADD", pod, arguments=POD)
        assert error["code"] == 11
        assert "shop/web-0" in error["msg"]
        assert "the API server is away" in error["details"]
        runtime = Runtime(agent.config.socket, on_agent_absent="open")
        assert runtime.call("ADD", pod, arguments=POD) == {}
        (described,) = agent.attachments.list()
        assert described.meshed is None
        assert "the API server is away" in (described.reason or "")


def test_rules_of_another_mesh_are_no_reason_to_fail(
    runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    chain = "type nat hook output priority -100;"
    consul = f"table inet consul_tproxy {{\nchain CONSUL_NAT_OUTPUT {{\n{chain}\n}}\n}}"
    netns.run_in(pod, nftables.load, consul)
    assert runtime.call("ADD", pod) == {}
    assert "table inet tidegate" in rules(pod)


def test_a_call_in_another_language_is_told_what_to_do(agent: Agent) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.connect(str(agent.config.socket))
        old.sendall(b"TGC9xxxx")
        assert b"tidegate cni install" in old.recv(4096)


def test_whoever_says_nothing_or_too_much_holds_up_nobody(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    try:
        for one in silent:
            one.connect(str(agent.config.socket))
            one.sendall(b"TGC1\0")
        with socket.socket(socket.AF_UNIX) as greedy:
            greedy.connect(str(agent.config.socket))
            greedy.sendall(b"TGC1\x7f\xff\xff\xff")
            assert b"too large" in greedy.recv(4096)
        assert runtime.call("ADD", new_namespace()) == {}
    finally:
        for one in silent:
            one.close()


def test_the_socket_is_roots_alone_and_gone_with_the_agent(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    with agent.running():
        assert agent.config.socket.stat().st_mode & 0o777 == 0o600
    assert not agent.config.socket.exists()


def test_calls_are_counted_by_command_and_result(
    agent: Agent, runtime: Runtime, new_namespace: Callable[[], str]
) -> None:
    pod = new_namespace()
    for command in ("ADD", "CHECK", "DEL", "CHECK"):
        runtime.call(command, pod)
    runtime.call("ADD", pod, arguments="K8S_POD_NAMESPACE=infra")
    runtime.call("ADD", "/nonexistent")
    eventually(lambda: len(agent.metrics.calls) == 6)
    assert agent.metrics.calls == [
        ("ADD", CniResult.OK),
        ("CHECK", CniResult.OK),
        ("DEL", CniResult.OK),
        ("CHECK", CniResult.REFUSED),
        ("ADD", CniResult.LEFT_ALONE),
        ("ADD", CniResult.FAILED),
    ]


def test_a_full_disk_fails_the_container_that_only_cni_knows(
    tmp_path: Path, new_namespace: Callable[[], str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    try:
        with Agent(disk).running() as agent:
            with pytest.raises(OSError, match="No space left"):
                (disk / "ballast").write_bytes(bytes(1 << 20))
            pod = new_namespace()
            error = Runtime(agent.config.socket).call("ADD", pod)
            assert error["code"] == 11
            assert "No space left on device" in error["msg"]
        assert rules_of(DEFAULT, pod) == ()
        with Agent(disk, pods=Kubernetes(POD_OF_CONSUL)).running() as agent:
            runtime = Runtime(agent.config.socket)
            assert runtime.call("ADD", new_namespace(), arguments=POD) == {}
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
