"""What a CNI call says to the agent, and how wrong ones are refused."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InputError
from tidegate.model import Sidecar
from tidegate.node import cni_install
from tidegate.workloads import cni
from tidegate.workloads.cni import CniConfig, CniError, Code, Command

SOURCES = Path(__file__).parents[2] / "init/cni"


def request(
    *,
    command: str = "ADD",
    container: str = "c1",
    netns: str = "/run/netns/c1",
    interface: str = "eth0",
    arguments: str = "",
    **fields: object,
) -> bytes:
    environment = (command, container, netns, interface, arguments)
    text = json.dumps({"name": "net", "cniVersion": "1.0.0", **fields})
    return b"\0".join(part.encode() for part in (*environment, text))


def test_a_call_without_settings_asks_for_nothing() -> None:
    parsed = cni.parse(request(arguments="A=b;;c;K8S_POD_NAME=web=0"))
    assert parsed.command is Command.ADD
    assert parsed.arguments == {"A": "b", "K8S_POD_NAME": "web=0"}
    assert not parsed.plugin.mesh
    assert parsed.plugin.sidecar is Sidecar.TIDEGATE
    assert parsed.valid is None
    assert parsed.shown == "web=0"
    assert cni.parse(request()).shown == "container c1"


@pytest.mark.parametrize("field", ["cni.dev/valid-attachments", "cni.dev/attachments"])
def test_gc_says_what_is_valid_by_either_name(field: str) -> None:
    valid = [{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "net1"}]
    parsed = cni.parse(
        request(command="GC", container="", netns="", interface="", **{field: valid})
    )
    assert parsed.valid == {("a", "eth0"), ("b", "net1")}


@pytest.mark.parametrize(
    ("wrong", "code", "told"),
    [
        ({"command": "VERSION"}, Code.INVALID_ENVIRONMENT, "CNI_COMMAND"),
        ({"container": ""}, Code.INVALID_ENVIRONMENT, "CNI_CONTAINERID"),
        ({"container": "../c"}, Code.INVALID_ENVIRONMENT, "CNI_CONTAINERID"),
        ({"container": "c" * 600}, Code.INVALID_ENVIRONMENT, "CNI_CONTAINERID"),
        ({"interface": ""}, Code.INVALID_ENVIRONMENT, "CNI_IFNAME"),
        ({"interface": ".."}, Code.INVALID_ENVIRONMENT, "CNI_IFNAME"),
        ({"interface": "a/b"}, Code.INVALID_ENVIRONMENT, "CNI_IFNAME"),
        ({"interface": "sixteen-letters-"}, Code.INVALID_ENVIRONMENT, "CNI_IFNAME"),
        ({"netns": ""}, Code.INVALID_ENVIRONMENT, "CNI_NETNS"),
        ({"netns": "run/netns/c1"}, Code.INVALID_ENVIRONMENT, "CNI_NETNS"),
        ({"name": ""}, Code.INVALID_CONFIG, "name"),
        ({"name": 5}, Code.INVALID_CONFIG, "name"),
        ({"tidegate": []}, Code.INVALID_CONFIG, "tidegate"),
        ({"tidegate": {"mash": True}}, Code.INVALID_CONFIG, "mash"),
        ({"tidegate": {"sidecar": "mine"}}, Code.INVALID_CONFIG, "sidecar"),
        ({"tidegate": {"annotations": {"a": 5}}}, Code.INVALID_CONFIG, "annotations"),
        ({"tidegate": {"socket": 5}}, Code.INVALID_CONFIG, "tidegate.socket"),
        ({"tidegate": {"socket": "run/cni.sock"}}, Code.INVALID_CONFIG, "tidegate.socket"),
        ({"tidegate": {"socket": "/" + "x" * 107}}, Code.INVALID_CONFIG, "tidegate.socket"),
        ({"tidegate": {"socket": "/a\0b"}}, Code.INVALID_CONFIG, "tidegate.socket"),
        ({"tidegate": {"on_agent_absent": "Open"}}, Code.INVALID_CONFIG, "tidegate.on_agent"),
        ({"tidegate": {"wait_s": -1}}, Code.INVALID_CONFIG, "tidegate.wait_s"),
        ({"tidegate": {"wait_s": "3"}}, Code.INVALID_CONFIG, "tidegate.wait_s"),
        ({"tidegate": {"timeout_s": 601}}, Code.INVALID_CONFIG, "tidegate.timeout_s"),
        ({"tidegate": {"timeout_s": 1.5}}, Code.INVALID_CONFIG, "tidegate.timeout_s"),
        ({"tidegate": {"timeout_s": 10**30}}, Code.INVALID_CONFIG, "tidegate.timeout_s"),
        ({"tidegate": {"always_start": "infra"}}, Code.INVALID_CONFIG, "tidegate.always_start"),
    ],
)
def test_a_call_that_is_wrong_is_refused_by_what_is_wrong(
    wrong: dict[str, object], code: Code, told: str
) -> None:
    with pytest.raises(CniError, match=re.escape(told)) as refusal:
        cni.parse(request(**wrong))
    assert refusal.value.code is code


def test_settings_that_are_wrong_keep_no_container_from_ending() -> None:
    wrong = {"wait_s": "3", "mash": True}
    assert cni.parse(request(command="DEL", netns="", tidegate=wrong)).key == ("net", "c1", "eth0")
    for command in ("ADD", "CHECK", "GC", "STATUS"):
        with pytest.raises(CniError):
            cni.parse(request(command=command, tidegate=wrong))


@given(st.binary(max_size=300))
def test_whatever_the_plugin_sends_is_read_or_refused(body: bytes) -> None:
    for sent in (body, request()[: len(body)] + body, request() + body):
        with contextlib.suppress(CniError):
            cni.parse(sent)


def test_errors_can_be_told_whatever_is_in_them() -> None:
    told = json.loads(cni.failed(CniError(Code.DECODING, "\udc80 and é", "\0")))
    assert told == {"code": 6, "msg": "\\udc80 and é", "details": "\0"}


def test_the_plugin_and_the_agent_agree() -> None:
    """On what is written in both languages."""
    plugin = (SOURCES / "tidegate-cni.c").read_text()
    assert f"REQUEST_MAX = {cni.MAX_REQUEST_BYTES >> 10} << 10" in plugin
    assert f'memcpy(request, "{cni.MAGIC.decode()}", 4);' in plugin
    assert ", ".join(f'"{name}"' for name in cni.FIELDS) in plugin
    assert ", ".join(f'"{version}"' for version in cni_install.VERSIONS) in plugin
    assert str(cni.DEFAULT_SOCKET) in plugin
    defaults = cni.PluginConfig()
    assert f"wait_s = {defaults.wait_s}, timeout_s = {defaults.timeout_s};" in plugin
    namespaces = ",".join(f'\\"{name}\\"' for name in cni.ALWAYS_START)
    assert f"[{namespaces}]" in plugin
    for code in (Code.INVALID_ENVIRONMENT, Code.DECODING, Code.INVALID_CONFIG, Code.TRY_AGAIN):
        assert f"\t{code.name} = {int(code)}," in plugin


@pytest.mark.parametrize("socket", ["run/cni.sock", "/" + "x" * 107])
def test_a_socket_that_cannot_be_is_refused(socket: str) -> None:
    with pytest.raises(InputError, match="socket"):
        cni.check(CniConfig(socket=Path(socket)))
    cni.check(CniConfig())
