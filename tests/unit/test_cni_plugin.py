"""The CNI plugin as runtimes start it, against agents that answer, lie, die, hang, and are not there."""

import json
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cni_plugin import (
    DEADLINE_S,
    DONE,
    PREVIOUS,
    Printed,
    agent,
    answering,
    call,
    configuration,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.node.cni_install import VERSIONS, packaged_plugin
from tidegate.workloads import cni

TRY_AGAIN, NOT_AVAILABLE = 11, 50


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cni.sock"


def test_the_result_of_the_plugins_before_is_passed_on_byte_for_byte(path: Path) -> None:
    with agent(path, answering(DONE)):
        printed = call(configuration(path, previous=PREVIOUS))
    assert (printed.stdout, printed.stderr, printed.status) == (PREVIOUS, b"", 0)


def test_a_result_of_megabytes_is_passed_on_and_not_sent_to_the_agent(path: Path) -> None:
    huge = b'{"ips":[' + b",".join(
        b'{"address":"10.0.%d.%d/8"}' % (i >> 8 & 255, i & 255) for i in range(100_000)
    )
    huge += b"]}"
    with agent(path, answering(DONE)) as requests:
        printed = call(configuration(path, previous=huge))
    assert printed.stdout == huge
    assert len(requests[0]) < 1000


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("previous", [b"", b"null"])
def test_the_first_plugin_of_a_chain_answers_with_an_empty_result_of_the_right_version(
    path: Path, version: str, previous: bytes
) -> None:
    with agent(path, answering(DONE)):
        printed = call(configuration(path, version=version, previous=previous))
    result = json.loads(printed.stdout)
    assert result.pop("cniVersion") == version
    assert result == {"interfaces": [], "ips": [], "routes": [], "dns": {}}
    assert printed.status == 0


def test_the_agent_reads_the_call_as_it_was_made(path: Path) -> None:
    text = configuration(path, previous=PREVIOUS, mesh=True, annotations={"a": "é"})
    with agent(path, answering(DONE)) as requests:
        call(text)
    request = cni.parse(requests[0])
    assert request.command is cni.Command.ADD
    assert request.key == ("net", "c1", "eth0")
    assert request.netns == "/run/netns/c1"
    assert (request.pod_namespace, request.pod_name) == ("shop", "web-0")
    assert request.plugin.mesh
    assert request.annotations == {"a": "é"}


@pytest.mark.parametrize("command", ["DEL", "CHECK", "STATUS", "GC"])
def test_commands_without_a_result_print_nothing_when_they_succeed(
    path: Path, command: str
) -> None:
    with agent(path, answering(DONE)):
        assert call(
            configuration(path, version="1.1.0", previous=PREVIOUS), command
        ).is_silent_success


def test_the_agents_error_reaches_the_runtime_in_the_agents_words(path: Path) -> None:
    error = cni.CniError(cni.Code.NOT_REDIRECTED, 'the "kernel" says nö', "line\nline")
    with agent(path, answering(cni.failed(error))):
        printed = call(configuration(path, previous=PREVIOUS))
    assert printed.error == {
        "cniVersion": "1.0.0",
        "code": 100,
        "msg": 'the "kernel" says nö',
        "details": "line\nline",
    }


GOES_ON = [
    ("ADD", {}, "shop", TRY_AGAIN),
    ("ADD", {"on_agent_absent": "open"}, "shop", 0),
    ("ADD", {}, "kube-system", 0),
    ("ADD", {}, "tidegate-system", 0),
    ("ADD", {"always_start": ["infra"]}, "infra", 0),
    ("ADD", {"always_start": ["infra"]}, "kube-system", TRY_AGAIN),
    ("ADD", {"always_start": [""]}, "", TRY_AGAIN),
    ("DEL", {}, "shop", 0),
    ("CHECK", {"on_agent_absent": "open"}, "shop", TRY_AGAIN),
    ("CHECK", {}, "kube-system", 0),
    ("STATUS", {}, "", NOT_AVAILABLE),
    ("STATUS", {"on_agent_absent": "open"}, "", 0),
    ("GC", {"on_agent_absent": "open"}, "", TRY_AGAIN),
]


@pytest.mark.parametrize(("command", "said", "namespace", "code"), GOES_ON)
def test_without_an_agent_what_starts_fails_unless_it_may_start_and_what_ends_ends(
    path: Path, command: str, said: dict[str, object], namespace: str, code: int
) -> None:
    text = configuration(path, version="1.1.0", previous=PREVIOUS, **said)
    printed = call(text, command, arguments=f"A=b;K8S_POD_NAMESPACE={namespace};C=d")
    if code:
        assert printed.error["code"] == code
        assert str(path) in printed.error["details"]
    else:
        assert printed.stdout == (PREVIOUS if command == "ADD" else b"")
        assert printed.status == 0


def test_the_message_without_an_agent_says_what_to_do(path: Path) -> None:
    error = call(configuration(path)).error
    assert "outside the mesh" in error["msg"]
    assert "No such file or directory" in error["details"]
    assert "on_agent_absent" in error["details"]
    assert "always_start" in error["details"]


LIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"{}",
    b'{"done":false}',
    b'{"done":"true"}',
    b'{"code":7}',
    b'{"code":"7","msg":"x"}',
    b'{"code":0,"msg":"x"}',
    b'{"code":-1,"msg":"x"}',
    b'{"code":7,"msg":5}',
    DONE + b"{}",
    DONE[:-1],
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"\0" * 100,
    b" " * 70_000 + DONE,
    b"[" * 60_000,
]


@pytest.mark.parametrize("lie", LIES, ids=range(len(LIES)))
def test_what_is_no_answer_is_as_no_agent_and_is_never_printed(path: Path, lie: bytes) -> None:
    with agent(path, answering(lie)):
        assert call(configuration(path, previous=PREVIOUS)).error["code"] == TRY_AGAIN
        text = configuration(path, previous=PREVIOUS, on_agent_absent="open")
        assert call(text).stdout == PREVIOUS


def test_an_agent_may_answer_in_pieces_and_without_reading(path: Path) -> None:
    def answer_in_pieces(connection: socket.socket) -> None:
        for byte in DONE:
            connection.sendall(bytes((byte,)))

    large = configuration(path, previous=PREVIOUS, annotations={"a": "x" * 250_000})
    with agent(path, answer_in_pieces):
        assert call(large).stdout == PREVIOUS
    with agent(path, answering(DONE), reads=False):
        assert call(large).stdout == PREVIOUS


def test_an_agent_that_dies_at_each_call_is_not_asked_for_ever(path: Path) -> None:
    with agent(path, answering(b"")) as requests:
        error = call(configuration(path, wait_s=600, timeout_s=600)).error
    assert error["code"] == TRY_AGAIN
    assert "hung up in the middle" in error["details"]
    assert len(requests) == 4


def test_an_agent_that_takes_no_calls_is_given_up(path: Path) -> None:
    """Nobody accepts, and the queue is full: connect(2) says EAGAIN."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        assert call(configuration(path, timeout_s=1)).error["code"] == TRY_AGAIN


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        Path.touch,
        lambda path: path.symlink_to("/nonexistent"),
        lambda path: path.symlink_to(path.name),
        os.mkfifo,
    ],
    ids=["directory", "file", "dangling link", "link to itself", "fifo"],
)
def test_what_is_no_socket_is_as_no_agent(path: Path, make: Callable[[Path], object]) -> None:
    make(path)
    error = call(configuration(path)).error
    assert error["code"] == TRY_AGAIN
    assert error["details"].startswith(f"{path}: ")


def test_without_a_free_descriptor_it_says_so(path: Path) -> None:
    done = subprocess.run(
        [packaged_plugin()],
        input=configuration(path),
        env={"CNI_COMMAND": "ADD"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)),
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert Printed(done.stdout, done.stderr, done.returncode).error["code"] == TRY_AGAIN


def test_an_agent_that_dies_in_the_middle_is_asked_again_when_it_is_back(path: Path) -> None:
    def die(connection: socket.socket) -> None:
        connection.sendall(DONE[:5])

    with agent(path, die, answering(DONE)) as requests:
        printed = call(configuration(path, previous=PREVIOUS, wait_s=10))
    assert printed.stdout == PREVIOUS
    assert len(requests) == 2
    assert requests[0] == requests[1]


def test_an_agent_that_starts_while_the_plugin_waits_is_asked(path: Path) -> None:
    answered = []
    waiting = threading.Thread(
        target=lambda: answered.append(call(configuration(path, previous=PREVIOUS, wait_s=10)))
    )
    waiting.start()
    with agent(path, answering(DONE)):
        waiting.join()
    assert answered[0].stdout == PREVIOUS


@pytest.mark.parametrize("said", [b"", DONE[:5]])
def test_an_agent_that_never_answers_is_given_up(path: Path, said: bytes) -> None:
    released = threading.Event()

    def hang(connection: socket.socket) -> None:
        connection.sendall(said)
        released.wait(DEADLINE_S)

    with agent(path, hang):
        printed = call(configuration(path, timeout_s=1))
        released.set()
    assert printed.error["code"] == TRY_AGAIN
    assert "no answer in time" in printed.error["details"]


HOSTILE = [
    b"",
    b"\0",
    b" \n",
    b"[]",
    b"null",
    b'"text"',
    b"{",
    b"}",
    b'{"cniVersion":"1.0.0"',
    b'{"cniVersion":"1.0.0",}',
    b'{"cniVersion":"1.0.0"} x',
    b'{"cniVersion":"1.0.0"}{"cniVersion":"1.0.0"}',
    b'\xef\xbb\xbf{"cniVersion":"1.0.0"}',
    b'{"cniVersion":"1.0.0","x":"\n"}',
    b'{"cniVersion":"1.0.0","x":"\\u12"}',
    b'{"cniVersion":"1.0.0","x":"\\q"}',
    b'{"cniVersion":"1.0.0","x":01}',
    b'{"cniVersion":"1.0.0","x":1.}',
    b'{"cniVersion":"1.0.0","x":nul}',
    b'{"cniVersion":"1.0.0","x":[1,]}',
    b'{"cniVersion":"1.0.0","x":[}',
    b'{"cniVersion":"1.0.0","x":[1}]',
    b'{"cniVersion":"1.0.0",\0"x":1}',
    b"{" * 1_000_000,
    b'{"a":' * 513 + b"1" + b"}" * 513,
    b"[" * 5_000_000,
    b" " * (16 << 20),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_what_is_no_json_object_is_refused_whatever_it_is(text: bytes, command: str) -> None:
    assert call(text, command).error["code"] == 6


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(), json_values), st.booleans(), st.sampled_from([None, 1]))
def test_any_json_passes_untouched(
    result: dict[str, object], ascii_only: bool, indent: int | None
) -> None:
    previous = json.dumps(result, ensure_ascii=ascii_only, indent=indent).encode(
        errors="backslashreplace"
    )
    text = configuration("/nonexistent", previous=previous, on_agent_absent="open")
    assert call(text).stdout == previous


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes_there_is_one_json_object_or_nothing(data: st.DataObject) -> None:
    text = bytearray(configuration("/nonexistent", previous=PREVIOUS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    printed = call(bytes(text), arguments="K8S_POD_NAMESPACE=kube-system")
    assert printed.stderr == b""
    # What is in strings is passed on as it came, also when it is no UTF-8.
    assert isinstance(json.loads(printed.stdout.decode("latin-1")), dict)


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "1.2.0", "", "1.0.0 "])
def test_other_versions_of_cni_are_refused(path: Path, version: str) -> None:
    error = call(configuration(path, version=version)).error
    assert error["code"] == 1
    assert "1.1.0" in error["details"]


def test_the_last_of_two_members_of_a_name_counts_however_it_is_written() -> None:
    text = configuration("/nonexistent", on_agent_absent="open", previous=PREVIOUS)
    doubled = b'{"cniVersion":"9.9.9","prev\\u0052esult":{},"PrevResult":{},' + text[1:]
    assert call(doubled).stdout == PREVIOUS
    escaped = text.replace(b'"prevResult"', b'"\\u0070rev\\u0052esult"')
    assert call(escaped).stdout == PREVIOUS
    assert json.loads(call(escaped.replace(b"\\u0070", b"\\u0170")).stdout)["ips"] == []


@pytest.mark.parametrize("previous", [b"5", b"[]", b'""', b"false"])
def test_a_result_that_is_no_object_is_refused(previous: bytes) -> None:
    error = call(configuration("/nonexistent", on_agent_absent="open", previous=previous)).error
    assert error["code"] == 7
    assert "prevResult" in error["details"]


def test_results_as_deep_as_anybody_nests_them_are_passed_on() -> None:
    deep = b'{"a":' * 511 + b"{}" + b"}" * 511
    text = configuration("/nonexistent", on_agent_absent="open", previous=deep[5:-1])
    assert call(text).stdout == deep[5:-1]


def test_which_namespace_starts_says_the_last_argument_of_that_name() -> None:
    text = configuration("/nonexistent")
    for arguments, starts in (
        ("K8S_POD_NAMESPACE=shop;K8S_POD_NAMESPACE=kube-system", True),
        ("K8S_POD_NAMESPACE=kube-system;K8S_POD_NAMESPACE=shop", False),
        ("XK8S_POD_NAMESPACE=kube-system", False),
        ("K8S_POD_NAME=K8S_POD_NAMESPACE=kube-system", False),
        ("K8S_POD_NAMESPACE=kube-system" + "x" * 70_000, False),
        (";" * 70_000 + "K8S_POD_NAMESPACE=kube-system;", True),
    ):
        assert call(text, arguments=arguments).status == (0 if starts else 1), arguments[:80]


@pytest.mark.parametrize(
    ("command", "version"), [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0")]
)
def test_a_version_that_has_no_such_command_refuses_it(
    path: Path, command: str, version: str
) -> None:
    assert call(configuration(path, version=version), command).error["code"] == 1


@pytest.mark.parametrize("command", ["", "add", "UPDATE"])
def test_a_command_that_is_none_is_refused(command: str) -> None:
    error = call(configuration("/nonexistent"), command).error
    assert error["code"] == 4
    assert "CNI_COMMAND" in error["msg"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("on_agent_absent", "Open"),
        ("on_agent_absent", True),
        ("on_agent_absent", ["open"]),
        ("always_start", "shop"),
        ("always_start", {"shop": "shop"}),
        ("always_start", [["shop"], {"a": "shop"}, "shop\0", "sho"]),
        ("wait_s", 601),
    ],
)
def test_a_setting_that_is_wrong_is_told_by_the_agent_and_starts_nothing_without_it(
    path: Path, field: str, value: object
) -> None:
    text = configuration(path, **{field: value})
    assert call(text).error["code"] == TRY_AGAIN

    def judge(connection: socket.socket) -> None:
        with pytest.raises(cni.CniError) as refusal:
            cni.parse(requests[0])
        connection.sendall(cni.failed(refusal.value))

    with agent(path, judge) as requests:
        error = call(text).error
    assert error["code"] == 7
    assert f"tidegate.{field}" in error["details"]


@pytest.mark.skipif(cni.DEFAULT_SOCKET.exists(), reason="an agent of this machine would be asked")
@pytest.mark.parametrize("value", [5, "/" + "x" * 107, "/a\0b", None])
def test_a_socket_that_cannot_be_is_the_default(value: object) -> None:
    section = {} if value is None else {"socket": value}
    text = {"cniVersion": "1.0.0", "name": "n", "tidegate": {**section, "wait_s": 0}}
    error = call(json.dumps(text).encode()).error
    assert error["code"] == TRY_AGAIN
    assert error["details"].startswith(f"{cni.DEFAULT_SOCKET}: ")


def test_versions_are_told_without_a_configuration() -> None:
    printed = call(b"", "VERSION")
    told = json.loads(printed.stdout)
    assert told == {"cniVersion": "1.1.0", "supportedVersions": list(VERSIONS)}
    assert printed.status == 0


def test_a_call_that_is_too_large_for_the_agent_is_refused(path: Path) -> None:
    text = configuration(path, annotations={"a": "x" * cni.MAX_REQUEST_BYTES})
    assert call(text).error["code"] == 7


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_with_standard_descriptors_closed_nothing_is_printed_where_it_does_not_belong(
    path: Path, closed: tuple[int, ...]
) -> None:
    """The socket to the agent may get the number of standard output."""

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    with agent(path, answering(DONE)) as requests:
        done = subprocess.run(
            [packaged_plugin()],
            input=None if 0 in closed else configuration(path, previous=PREVIOUS),
            env={
                "CNI_COMMAND": "ADD",
                "CNI_CONTAINERID": "c",
                "CNI_NETNS": "/n",
                "CNI_IFNAME": "e",
            },
            preexec_fn=close,
            stdout=subprocess.PIPE,
            timeout=DEADLINE_S,
            check=False,
        )
        assert PREVIOUS not in b"".join(requests)
    if 0 in closed:
        assert done.returncode == 1
        assert not requests
    elif 1 not in closed:
        assert done.stdout == PREVIOUS


def test_output_that_nobody_takes_is_a_failure(path: Path) -> None:
    with agent(path, answering(DONE)), Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [packaged_plugin()],
            input=configuration(path, previous=PREVIOUS),
            env={"CNI_COMMAND": "ADD"},
            stdout=full,
            timeout=DEADLINE_S,
            check=False,
        )
    assert done.returncode == 1


def test_the_plugin_needs_nothing_of_its_host() -> None:
    told = subprocess.run(
        ["/usr/bin/readelf", "--dynamic", "--program-headers", packaged_plugin()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "NEEDED" not in told
    assert "INTERP" not in told
