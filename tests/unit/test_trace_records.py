"""Records of traced connections, how they look, and what is said where something is missing."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest
from msgspec.structs import replace

from tidegate.cli import trace as command
from tidegate.cli import workloads
from tidegate.cli.main import main, make_parser
from tidegate.cli.workloads import KnownWorkload, Node
from tidegate.errors import TidegateError
from tidegate.model import FlowClass
from tidegate.observe.classifier import KUMA, MeshProfile, consul_profile
from tidegate.observe.trace import session
from tidegate.observe.trace.records import (
    MOST_CONNECTIONS,
    PATIENCE_S,
    Connection,
    Connections,
    End,
    Endpoint,
    Event,
    Kind,
    Outcome,
    Process,
    Redirected,
    Traced,
    Tracked,
    Whereabouts,
    container_in,
)
from tidegate.observe.trace.session import Headers, Losses, Missing, find_headers, started

MS = 1_000_000
CLIENT, SERVER = Endpoint("10.0.0.2", 40000), Endpoint("10.1.0.9", 80)
SIDECAR, PUBLIC = Endpoint("127.0.0.1", 15001), Endpoint("10.1.0.9", 20000)
NOTHING = Endpoint("::", 0)
POD, OTHER = 7, 8
EPOCH = 1000.0
CALLER = {"pid": 41, "uid": 1000, "comm": "curl", "cgroup": 5}
WORKER = {"pid": 42, "uid": 5995, "comm": "envoy", "cgroup": 6}

needs_btf = pytest.mark.skipif(
    not Path("/sys/kernel/btf/vmlinux").exists(), reason="this kernel has no type information"
)


def event(kind: Kind, at_ms: float, **fields: object) -> Event:
    told = {"socket": 1, "netns": POD, "local": CLIENT, "peer": SERVER, **fields}
    return Event(kind=kind, at=int(at_ms * MS), **told)


def connecting(at_ms: float = 0, **fields: object) -> Event:
    return event(
        Kind.CONNECTING,
        at_ms,
        **{"local": Endpoint(CLIENT.address, 0), "dialled": SERVER, **CALLER, **fields},
    )


def landed(at_ms: float, local: Endpoint, **fields: object) -> Event:
    return event(Kind.LANDED, at_ms, socket=2, **{"local": local, "peer": CLIENT, **fields})


def accepted(at_ms: float, local: Endpoint, **fields: object) -> Event:
    return event(
        Kind.ACCEPTED, at_ms, socket=2, **{"local": local, "peer": CLIENT, **WORKER, **fields}
    )


def connections_of(*events: Event) -> Connections:
    connections = Connections(EPOCH)
    connections.take(events)
    return connections


def record_of(*events: Event) -> Connection:
    (record,) = connections_of(*events).rest()
    return record


# What becomes of events


def test_a_connect_is_told_when_its_first_byte_has_come() -> None:
    connections = connections_of(connecting(5), event(Kind.ESTABLISHED, 6))
    assert connections.finished(100 * MS) == []
    connections.take([event(Kind.FIRST_BYTE, 9)])
    (record,) = connections.finished(100 * MS)
    assert record == Connection(
        end=End.CONNECT,
        at=EPOCH + 0.005,
        netns=POD,
        process=Process(pid=41, comm="curl", uid=1000, cgroup=5),
        local=CLIENT,
        peer=SERVER,
        dialled=SERVER,
        listener_port=0,
        outcome=Outcome.ESTABLISHED,
        error=0,
        handshake_s=0.001,
        first_byte_s=0.004,
    )
    assert connections.rest() == []


def test_an_accept_is_told_when_it_is_accepted_and_its_first_byte_has_come() -> None:
    connections = connections_of(
        landed(1, SERVER), event(Kind.FIRST_BYTE, 3, socket=2, local=SERVER, peer=CLIENT)
    )
    assert connections.finished(100 * MS) == []
    connections.take([accepted(7, SERVER, listener_port=80)])
    (record,) = connections.finished(100 * MS)
    assert (record.end, record.process.comm) == (End.ACCEPT, "envoy")
    assert (record.handshake_s, record.first_byte_s) == (0.006, 0.002)


@pytest.mark.parametrize(
    ("events", "outcome", "reason"),
    [
        ([], Outcome.WAITING, ""),
        ([event(Kind.CLOSED, 9, error=111)], Outcome.FAILED, "ECONNREFUSED"),
        ([event(Kind.CLOSED, 9, error=110)], Outcome.FAILED, "ETIMEDOUT"),
        ([event(Kind.CLOSED, 9)], Outcome.FAILED, "given up"),
        ([event(Kind.ESTABLISHED, 5)], Outcome.ESTABLISHED, ""),
        ([event(Kind.ESTABLISHED, 5), event(Kind.CLOSED, 9, error=104)], Outcome.ESTABLISHED, ""),
    ],
)
def test_what_becomes_of_a_connect_without_payload(
    events: list[Event], outcome: Outcome, reason: str
) -> None:
    record = record_of(connecting(), *events)
    assert (record.outcome, record.reason, record.first_byte_s) == (outcome, reason, None)


def test_a_connect_that_sent_nothing_is_told_with_what_was_dialled() -> None:
    record = record_of(
        event(Kind.NOT_SENT, 1, local=NOTHING, peer=NOTHING, dialled=SERVER, error=101, **CALLER)
    )
    assert (record.dialled, record.reason) == (SERVER, "ENETUNREACH")


def test_a_connection_without_payload_is_told_after_a_while() -> None:
    connections = connections_of(connecting(0), connecting(5000, socket=3))
    assert connections.finished(int(PATIENCE_S * 1e9) - 1) == []
    (record,) = connections.finished(int(PATIENCE_S * 1e9))
    assert record.at == EPOCH
    assert len(connections.rest()) == 1


def test_what_nobody_accepted_is_counted_and_not_told() -> None:
    connections = connections_of(
        landed(1, SERVER), event(Kind.CLOSED, 2, socket=2, local=SERVER, peer=CLIENT)
    )
    assert connections.rest() == []
    assert connections.not_accepted == 1


def test_what_has_just_arrived_at_the_end_is_not_counted_as_not_accepted() -> None:
    connections = connections_of(landed(1, SERVER))
    assert connections.rest() == []
    assert connections.not_accepted == 0
    assert connections.finished(int(PATIENCE_S * 2e9)) == []
    assert connections.not_accepted == 1


def test_a_socket_whose_end_was_lost_is_told_when_it_is_used_again() -> None:
    connections = connections_of(connecting(0), connecting(5))
    assert [record.at for record in connections.rest()] == [EPOCH, EPOCH + 0.005]


def test_the_oldest_connection_is_dropped_and_counted_when_too_many_are_open() -> None:
    connections = connections_of(*(connecting(n, socket=n) for n in range(MOST_CONNECTIONS + 2)))
    assert connections.dropped == 2
    assert len(connections.rest()) == MOST_CONNECTIONS


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_who_dials_the_unspecified_address_is_not_redirected(address: str) -> None:
    loopback = Endpoint("127.0.0.1" if address == "0.0.0.0" else "::1", 80)
    connections = connections_of(
        connecting(dialled=Endpoint(address, 80), peer=loopback),
        event(Kind.ESTABLISHED, 1, peer=loopback),
    )
    (record,) = connections.rest()
    assert connections.whereabouts(record, Tracked.NOT).redirected is Redirected.NO


# Where connections go


def redirection(tracked: Endpoint | Tracked, *events: Event, end: End = End.CONNECT) -> Whereabouts:
    connections = connections_of(*events)
    (record,) = (one for one in connections.rest() if one.end is end)
    return connections.whereabouts(record, tracked)


OPENED = (connecting(0), event(Kind.ESTABLISHED, 1))
REFUSED = (connecting(0), event(Kind.CLOSED, 2, error=111))


@pytest.mark.parametrize(
    ("tracked", "events", "redirected", "went"),
    [
        (SIDECAR, OPENED, Redirected.YES, SIDECAR),
        (SERVER, OPENED, Redirected.NO, SERVER),
        # Nothing tracks an open connection: nothing translates it.
        (Tracked.NOT, OPENED, Redirected.NO, SERVER),
        # Of one that was refused connection tracking knows nothing either way.
        (Tracked.NOT, REFUSED, Redirected.UNKNOWN, None),
        (Tracked.NOT_ASKED, OPENED, Redirected.UNKNOWN, None),
        # The other end was seen.
        (Tracked.NOT_ASKED, (*OPENED, landed(1, SIDECAR)), Redirected.YES, SIDECAR),
        (Tracked.NOT_ASKED, (*OPENED, landed(1, SERVER, netns=OTHER)), Redirected.NO, SERVER),
        # In another namespace the same address is somebody else's.
        (Tracked.NOT_ASKED, (*OPENED, landed(1, SIDECAR, netns=OTHER)), Redirected.UNKNOWN, None),
        # The port had been another connection's before.
        (
            Tracked.NOT_ASKED,
            (landed(0, SIDECAR), connecting(5), event(Kind.ESTABLISHED, 6)),
            Redirected.UNKNOWN,
            None,
        ),
        (
            Tracked.NOT,
            (
                connecting(0),
                event(Kind.REFUSED_HERE, 1, socket=0, local=SIDECAR, peer=CLIENT),
                event(Kind.CLOSED, 2, error=111),
            ),
            Redirected.YES,
            SIDECAR,
        ),
        # A program of a cgroup changed the destination of the socket itself.
        (
            Tracked.NOT_ASKED,
            (connecting(0, dialled=Endpoint("10.96.0.1", 80)), event(Kind.ESTABLISHED, 1)),
            Redirected.YES,
            None,
        ),
    ],
)
def test_where_a_connect_went(
    tracked: Endpoint | Tracked,
    events: tuple[Event, ...],
    redirected: Redirected,
    went: Endpoint | None,
) -> None:
    where = redirection(tracked, *events)
    assert (where.redirected, where.went) == (redirected, went)


@pytest.mark.parametrize(
    ("tracked", "events", "expected"),
    [
        (SERVER, [accepted(1, PUBLIC)], (Redirected.YES, SERVER, PUBLIC)),
        (SERVER, [accepted(1, SERVER)], (Redirected.NO, SERVER, SERVER)),
        (Tracked.NOT, [accepted(1, SERVER)], (Redirected.NO, SERVER, SERVER)),
        (Tracked.NOT_ASKED, [accepted(1, SERVER)], (Redirected.UNKNOWN, SERVER, SERVER)),
        (Tracked.NOT_ASKED, [*OPENED, accepted(1, SERVER)], (Redirected.NO, SERVER, SERVER)),
        (
            Tracked.NOT,
            [accepted(1, SERVER, listener_port=20000)],
            (Redirected.YES, SERVER, PUBLIC),
        ),
    ],
)
def test_what_was_dialled_of_an_accept(
    tracked: Endpoint | Tracked,
    events: list[Event],
    expected: tuple[Redirected, Endpoint, Endpoint],
) -> None:
    where = redirection(tracked, *events, end=End.ACCEPT)
    assert (where.redirected, where.dialled, where.went) == expected


def test_containers_are_found_in_the_names_of_their_cgroups() -> None:
    number = "0f" * 32
    for path in (
        f"kubepods.slice/kubepods-pod1.slice/cri-containerd-{number}.scope",
        f"kubepods/besteffort/pod1/{number}",
        f"system.slice/docker-{number}.scope",
        f"machine.slice/libpod-{number}.scope/container",
        f"12:memory:/docker/{number}",
    ):
        assert container_in(path) == number, path
    for path in ("", "user.slice/session-1.scope", f"kubepods/{number}ab"):
        assert container_in(path) == "", path


# How they look


def traced(**fields: object) -> Traced:
    connection = record_of(*OPENED, event(Kind.FIRST_BYTE, 4))
    where = Whereabouts.of(SERVER, SIDECAR)
    return Traced(**{"connection": connection, "whereabouts": where, "netns": "net:[7]", **fields})


def test_a_connection_as_json() -> None:
    told = traced(workload="shop", container="ab", flow_class=FlowClass.MESH)
    assert command.json_of(told) == {
        "event": "connect",
        "at": EPOCH,
        "pid": 41,
        "comm": "curl",
        "uid": 1000,
        "container": "ab",
        "workload": "shop",
        "netns": "net:[7]",
        "local": "10.0.0.2:40000",
        "peer": "10.1.0.9:80",
        "dialled": "10.1.0.9:80",
        "went": "127.0.0.1:15001",
        "redirected": "yes",
        "class": "mesh",
        "outcome": "established",
        "error": None,
        "handshake_ms": 1.0,
        "first_byte_ms": 4.0,
        "first_byte_seen_at": "arrival",
    }


def test_a_connection_as_a_line_stands_under_its_heading() -> None:
    line = command.line_of(traced(workload="shop", flow_class=FlowClass.TLS))
    for title, text in (
        ("what", "connect "),
        ("process", "curl/41 "),
        ("workload", "shop "),
        ("connection", "10.0.0.2:40000 -> 10.1.0.9:80 "),
        ("redirected", "to 127.0.0.1:15001 "),
        ("class", "tls "),
        ("first byte", "4.0 ms"),
    ):
        assert line[command.HEADING.index(title) :].startswith(text), title


@pytest.mark.parametrize(
    ("events", "tracked", "texts"),
    [
        (REFUSED, Tracked.NOT, ("cannot be told", "failed: ECONNREFUSED")),
        (OPENED, Tracked.NOT, (" no ", " none")),
        ((connecting(0),), Tracked.NOT_ASKED, ("cannot be told", "not connected yet")),
        ((*OPENED, event(Kind.FIRST_READ, 2)), Tracked.NOT, ("2.0 ms (when read)",)),
    ],
)
def test_what_is_not_known_is_said(
    events: tuple[Event, ...], tracked: Tracked, texts: tuple[str, ...]
) -> None:
    connections = connections_of(*events)
    (record,) = connections.rest()
    line = command.line_of(
        traced(connection=record, whereabouts=connections.whereabouts(record, tracked))
    )
    for text in texts:
        assert text in line


def test_the_name_of_a_process_cannot_steer_a_terminal() -> None:
    record = record_of(connecting(comm="a\x1b[2Jb"))
    line = command.line_of(traced(connection=record))
    assert "a?[2Jb/41" in line
    assert "\x1b" not in line


def test_losses_are_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    teller = command.Teller({}, {}, None, only_pid=None, as_json=True)
    teller.take([landed(1, SERVER), event(Kind.CLOSED, 2, socket=2, local=SERVER, peer=CLIENT)])
    teller.finish(Losses(events=3, sockets=2))
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "event": "end",
        "lost_events": 3,
        "not_followed": 2,
        "not_accepted": 1,
    }
    assert err.splitlines() == [
        "tidegate: events lost, because there were more at a time than could be read: 3",
        "tidegate: connections not followed, because too many were open at a time: 2",
        "tidegate: connections that came in, and that no process was seen to accept: 1",
    ]


def test_that_nobody_connected_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    teller = command.Teller({}, {}, None, only_pid=None, as_json=False)
    teller.finish(Losses())
    assert capsys.readouterr() == ("no connections\n", "")


# Whom to follow


def node_of(*pods: tuple[str, str, str]) -> Node:
    """An agent's answer: name, service and path of each workload's network namespace."""
    return Node(
        node="n",
        workloads=tuple(
            KnownWorkload(
                id=name,
                name=name,
                service=service,
                netns=netns,
                wanted_in_mesh=True,
                annotations={},
                namespace_annotations={},
            )
            for name, service, netns in pods
        ),
    )


def test_a_service_is_the_namespaces_of_its_workloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    nodes = (
        node_of(("one", "shop", f"{tmp_path}/a"), ("two", "other", f"{tmp_path}/b")),
        node_of(("three", "shop", f"{tmp_path}/c"), ("gone", "other", f"{tmp_path}/none")),
    )
    monkeypatch.setattr("tidegate.cli.target.agents_of_this_machine", lambda: ())
    monkeypatch.setattr("tidegate.cli.workloads.known", lambda addresses: nodes)
    args = make_parser("trace").parse_args(["trace", "--service", "shop"])
    number = {name: (tmp_path / name).stat().st_ino for name in "abc"}
    assert command._chosen_paths(args) == {
        number["a"]: f"{tmp_path}/a",
        number["c"]: f"{tmp_path}/c",
    }
    assert command._workload_names(nodes) == {
        number["a"]: "one",
        number["b"]: "two",
        number["c"]: "three",
    }


def test_an_agent_that_knows_the_namespace_says_in_which_trust_domain_its_mesh_is(
    tmp_path: Path,
) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    here, there = (tmp_path / name for name in "ab")
    nodes = (
        replace(node_of(("one", "shop", str(here))), trust_domain="one.test"),
        replace(node_of(("two", "shop", str(there)), ("gone", "", "/none")), trust_domain="2.test"),
        node_of(("old", "shop", str(here))),
    )
    number = here.stat().st_ino
    assert workloads.meshes(nodes, [number]) == {("consul", "one.test")}
    assert workloads.meshes(nodes, []) == set()


def test_the_mesh_of_a_workload_is_recognised_by_its_agents_trust_domain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def observing(paths: dict[int, str], profile: MeshProfile) -> NoReturn:
        seen.append(profile)
        raise TidegateError("that is all")

    here = replace(node_of(("one", "shop", str(tmp_path))), trust_domain="one.test")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("tidegate.cli.target.agents_of_this_machine", lambda: ())
    monkeypatch.setattr("tidegate.cli.workloads.known", lambda addresses: (here,))
    monkeypatch.setattr("tidegate.cli.trace.observing", observing)
    for options in ((), ("--profile", "kuma")):
        assert main(["trace", "--service", "shop", *options]) == 1
    assert seen == [consul_profile("one.test"), KUMA]


# What is missing


def headers_at(directory: Path, *files: str) -> None:
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).touch()


def test_headers_that_are_missing_are_named_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"apt-get install python3-bpfcc linux-headers-"):
        find_headers(tmp_path, tmp_path / "none")
    (tmp_path / "6.1.0" / "build").mkdir(parents=True)
    with pytest.raises(Missing, match=f"there are none in {tmp_path}: "):
        find_headers(tmp_path, tmp_path / "none")


def test_headers_of_the_running_kernel_are_left_to_bcc(tmp_path: Path) -> None:
    (tmp_path / os.uname().release / "build").mkdir(parents=True)
    assert find_headers(tmp_path, tmp_path / "none") == Headers(None)


def test_headers_of_another_kernel_are_used(tmp_path: Path) -> None:
    whole, split = tmp_path / "5.15-whole", tmp_path / "6.1-split"
    headers_at(whole / "build", "include/linux/kconfig.h", "include/generated/autoconf.h")
    assert find_headers(tmp_path, tmp_path / "none").source == str(whole / "build")
    headers_at(split / "source", "include/linux/kconfig.h")
    headers_at(split / "build", "include/generated/autoconf.h")
    found = find_headers(tmp_path, tmp_path / "none")
    assert found.source == str(split / "source")
    assert f"-I{split}/build/include" in found.flags


def test_a_processor_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with (
        pytest.raises(Missing, match="processors of type riscv64; expected one of x86_64, aarch64"),
        started(headers=Headers(None)),
    ):
        pass


def test_a_kernel_that_lacks_a_field_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tidegate.kernel.btf.offsets_in_kernel",
        lambda fields: {field: 8 if field != ("sock", "sk_err") else None for field in fields},
    )
    with (
        pytest.raises(Missing, match=r"does not know this kernel: it has no sock.sk_err$"),
        started(headers=Headers(None)),
    ):
        pass


@pytest.fixture
def reader(tmp_path: Path) -> Callable[[str], str]:
    """Path of a program that stands in for the system's Python."""

    def write(script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


@needs_btf
def test_a_python_that_is_missing_is_named_with_what_to_install(tmp_path: Path) -> None:
    with (
        pytest.raises(Missing, match=r"No such file.*`apt-get install python3-bpfcc"),
        started(python=str(tmp_path / "none"), headers=Headers(None)),
    ):
        pass


@needs_btf
def test_a_python_without_bcc_is_told_what_to_install() -> None:
    # That of the tests' own environment, which does not see Debian's packages.
    with (
        pytest.raises(Missing, match=r"cannot import \(No module named 'bcc'\): `apt-get install"),
        started(python=sys.executable, headers=Headers(None)),
    ):
        pass


@needs_btf
def test_a_bcc_without_its_library_is_told_what_to_install(
    reader: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "bcc.py").write_text("import ctypes\nctypes.CDLL('libnone.so.0')\n")
    python = reader(f'shift; PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    with (
        pytest.raises(Missing, match=r"cannot import \(libnone.so.0: cannot open.*apt-get install"),
        started(python=python, headers=Headers(None)),
    ):
        pass


@needs_btf
def test_what_a_kernel_cannot_tell_is_noted(reader: Callable[[str], str]) -> None:
    python = reader("""echo '{"ready": {"tcp_probe": "no", "sys_exit": "no"}}'; cat >/dev/null""")
    with started(python=python, headers=Headers(None)) as trace:
        assert trace.notes == (
            "this kernel cannot tell when a first byte arrived (told is when it was read): "
            "no tracepoint tcp_probe",
            "this kernel cannot tell who accepted (told is who read), and connects that failed before "
            "a packet was sent: no tracepoint sys_exit",
        )


@needs_btf
def test_without_the_states_of_sockets_there_is_no_tracing(reader: Callable[[str], str]) -> None:
    python = reader("""echo '{"ready": {"inet_sock_set_state": "no such"}}'; cat >/dev/null""")
    with (
        pytest.raises(Missing, match=r"inet_sock_set_state, from Linux 4\.16 on"),
        started(python=python, headers=Headers(None)),
    ):
        pass


@needs_btf
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo first >&2; echo last >&2", "tracing did not begin: first; last"),
        (
            """echo why >&2; echo '{"failed": {"what": "compile", "reason": "it failed"}}'""",
            "bcc cannot compile the trace: it failed: why",
        ),
    ],
)
def test_a_reader_that_does_not_begin_is_told_with_its_words(
    reader: Callable[[str], str], script: str, message: str
) -> None:
    with (
        pytest.raises(TidegateError, match=message),
        started(python=reader(f"read question; {script}"), headers=Headers(None)),
    ):
        pass


@needs_btf
def test_a_reader_that_ends_by_itself_is_told_with_its_words(
    reader: Callable[[str], str],
) -> None:
    python = reader("""read question; echo '{"ready": {}}'; echo killed >&2""")
    with started(python=python, headers=Headers(None)) as trace:
        with pytest.raises(TidegateError, match="tracing ended by itself: killed"):
            trace.events(10.0)
        with pytest.raises(TidegateError, match="what was lost is not known: killed"):
            trace.stop()


def test_more_namespaces_than_can_be_chosen_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tidegate.kernel.btf.offsets_in_kernel", lambda fields: dict.fromkeys(fields, 0)
    )
    many = range(session.MOST_NETNS + 1)
    with (
        pytest.raises(TidegateError, match="1025 network namespaces are more than the 1024"),
        started(many, headers=Headers(None)),
    ):
        pass


def test_only_root_may_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["trace"]) == 2
    assert "this needs root" in capsys.readouterr().err


@pytest.mark.parametrize("other", [["--netns", "a"], ["--pid", "1"], ["--workload", "a"]])
def test_a_service_is_not_named_beside_another_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: list[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("tidegate.cli.target.agents_of_this_machine", lambda: ())
    assert main(["trace", "--service", "api", *other]) == 2
    assert f"--service: is given beside {other[0]}" in capsys.readouterr().err


def test_a_service_that_no_agent_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("tidegate.cli.target.agents_of_this_machine", lambda: ())
    assert main(["trace", "--service", "api"]) == 2
    assert "no agent that answers has a workload of service 'api' (known: none)" in (
        capsys.readouterr().err
    )


def test_a_service_is_looked_for_at_the_agent_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def known(addresses: Iterable[str]) -> tuple[Node, ...]:
        asked.append(tuple(addresses))
        return (node_of(("pay-1", "pay", "")),)

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("tidegate.cli.target.agents_of_this_machine", lambda: ("unix:///b.sock",))
    monkeypatch.setattr("tidegate.cli.workloads.known", known)
    assert main(["trace", "--service", "api", "--socket", "/a.sock"]) == 2
    assert asked[1:] == [("unix:///a.sock",)]
    assert "(known: pay)" in capsys.readouterr().err


def test_whom_to_ask_is_not_named_where_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("tidegate.cli.target.agents_of_this_machine", lambda: ())
    assert main(["trace", "--lab", "demo"]) == 2
    assert "--lab: says whom to ask" in capsys.readouterr().err


def test_the_commands_of_the_page_are_understood() -> None:
    page = Path(__file__).parents[2] / "docs" / "trace.md"
    commands = re.findall(
        r"^\$ sudo \.venv/bin/tidegate (trace .*)$", page.read_text(), re.MULTILINE
    )
    assert len(commands) == 6
    for line in commands:
        assert make_parser("trace").parse_args(line.split()).run == command.run_trace


def test_the_page_names_every_field_and_says_what_to_install() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()
    for name in command.json_of(traced()):
        assert f"`{name}`" in page, name
    assert session._INSTALL.strip("`") in page
    assert command.HEADING in page
