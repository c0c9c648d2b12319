"""`tidegate redirect` without a kernel: where a policy comes from, what explain and dry-run say, bad input."""

import argparse
import asyncio
import errno
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import msgspec
import pytest
from aiohttp import web

from tidegate.cli import policies, redirect_text, target
from tidegate.cli.main import COMMANDS as MAIN_COMMANDS
from tidegate.cli.main import main, make_parser
from tidegate.enforce.redirect.backend import BackendName, Change, InstalledLine
from tidegate.enforce.redirect.engine import Applied, Choice
from tidegate.enforce.redirect.foreign import Foreign, Left, Mesh
from tidegate.enforce.redirect.rules import Hook, rules_for
from tidegate.intent.policy import (
    Dns,
    IdRange,
    Inbound,
    Mark,
    Mode,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Proxy,
    UserPorts,
)
from tidegate.intent.policy_documents import policy_from_document
from tidegate.kernel import netns
from tidegate.kernel.chains import Store
from tidegate.kernel.errors import KernelError
from tidegate.kernel.features import Feature
from tidegate.kernel.sockets import Listener
from tidegate.lab import state

COMMANDS = ("apply", "show", "check", "explain", "policy", "verify", "remove")
QUESTIONS = ("show", "check", "verify")
NOBODY = 65534
BAD_INPUT = 2

EVERYTHING = Policy(
    proxy=Proxy(
        uids=(1, 2), gids=(3,), mark=Mark(1, 255), cgroup="pod/sidecar", self_calls_inbound=True
    ),
    inbound=Inbound(
        include_ports=(PortRange(1, 100),),
        exclude_ports=(PortRange(22, 22),),
        exclude_cidrs=("10.0.0.0/8", "fd00::/8"),
        exclude_interfaces=("eth1",),
        include_interfaces=("eth0",),
        direct_probes=True,
        node_addresses=("192.0.2.1/32", "2001:db8::1/128"),
    ),
    outbound=Outbound(
        include_cidrs=("10.0.0.0/8", "fd00::/8"),
        include_ports=(PortRange(443, 443),),
        exclude_ports=(PortRange(22, 22),),
        exclude_cidrs=("10.1.0.0/16", "fd01::/16"),
        exclude_uids=(IdRange(7, 8),),
        exclude_gids=(IdRange(9, 9),),
        exclude_user_ports=(
            UserPorts((Protocol.TCP,), (PortRange(5432, 5432),), (IdRange(5, 6),)),
        ),
        include_interfaces=("eth0",),
        exclude_interfaces=("eth1",),
    ),
    dns=Dns(
        enabled=True, addresses=("127.0.0.1", "2001:db8::53"), resolvers=("10.96.0.10", "fd00::a")
    ),
    drop_invalid=True,
)


def run(capsys, *argv, code=0):
    """Standard output and standard error of a command that ends as it should."""
    assert main(["redirect", *argv]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.out, printed.err


def usage_error(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["redirect", *argv])
    assert caught.value.code == BAD_INPUT
    return capsys.readouterr().err


def explained(capsys, *argv):
    return json.loads(run(capsys, "explain", *argv, "--json")[0])


def line_of(capsys, *argv):
    return explained(capsys, *argv)["line"]


@pytest.fixture
def stdin(monkeypatch):
    def give(text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return give


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without any tidegate, whose namespaces are the files of a directory."""
    for name in ("TIDEGATE_LAB", "TIDEGATE_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(state, "BASE", tmp_path / "lab")
    monkeypatch.setattr(target, "AGENT_SOCKET", tmp_path / "agent.sock")
    monkeypatch.setattr(netns, "DIRECTORY", tmp_path / "netns")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "netns").mkdir()
    return tmp_path


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_that_it_accepts(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main(["redirect", command, "--help"])
    assert caught.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    commands = [line.partition("|")[0] for line in examples.splitlines() if line.strip()]
    assert commands
    for line in commands:
        words = shlex.split(line)
        assert words[:3] == ["tidegate", "redirect", command]
        make_parser("redirect").parse_args(words[1:])


@pytest.mark.parametrize("command", ["show", "check", "verify", "remove"])
def test_a_command_on_a_namespace_needs_one_and_only_one(capsys, command):
    assert "one of the arguments --netns --pid --workload is required" in usage_error(
        capsys, command
    )
    text = usage_error(capsys, command, "--netns", "a", "--pid", "1")
    assert "not allowed with argument" in text


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["explain"], "required"),
        (["explain", "sideways", "10.0.0.1:1"], "expected one of inbound, outbound"),
        (["apply", "--netns", "a", "--backend", "ebtables"], "expected nftables or iptables"),
        (["show", "--pid", "self"], "argument --pid: 'self' is not the number of a process"),
    ],
)
def test_bad_usage_is_told_in_one_line(capsys, argv, problem):
    text = usage_error(capsys, *argv)
    assert text.startswith("tidegate: ")
    assert problem in text
    assert text.endswith(f"; see `tidegate redirect {argv[0]} --help`\n")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("10.0.0.1", "10.0.0.1: is not ADDRESS:PORT; expected such as 10.1.2.3:443"),
        ("10.0.0.1:0", "10.0.0.1:0: there is no port 0; expected 1 to 65535"),
        ("10.0.0.1:99999", "10.0.0.1:99999: there is no port 99999; expected 1 to 65535"),
        ("10.0.0:80", "10.0.0: is not an IP address; expected such as 10.1.2.3 or fd00::1"),
        ("fd00::1:443", "fd00::1:443: is not ADDRESS:PORT; expected IPv6 as in [fd00::1]:443"),
        ("[1.2.3.4]:80", "[1.2.3.4]:80: brackets are for IPv6; expected 1.2.3.4:80"),
        (
            "[fe80::1%eth0]:443",
            "fe80::1%eth0: names an interface; expected fe80::1, and --interface eth0",
        ),
        ("localhost:80", "localhost: names are not looked up; expected an address"),
        ("10.0.0.1:1 --from web", "--from: web: names are not looked up; expected an address"),
        (
            "10.0.0.1:1 --protocol tpc",
            "--protocol: 'tpc' is no protocol; expected one of icmp, igmp, ipip, tcp, udp, dccp, ipv6, gre, esp, ah, "
            "icmpv6, ospf, pim, vrrp, l2tp, sctp, udplite, or a number to 255",
        ),
        (
            "10.0.0.1:1 --uid 4294967295",
            "--uid: 4294967295 is no user id; expected 0 to 4294967294",
        ),
        (
            "10.0.0.1:1 --uid nobody-of-this-name",
            "--uid: there is no user 'nobody-of-this-name' here; expected a number or the name of a user",
        ),
        (
            "10.0.0.1:1 --gid nobody-of-this-name",
            "--gid: there is no group 'nobody-of-this-name' here; expected a number or the name of a group",
        ),
        (
            "10.0.0.1:1 --mark 0x100000000",
            "--mark: '0x100000000' is not a packet mark; expected such as 0x1 or 17",
        ),
        (
            "10.0.0.1:1 --interface eth0123456789abcdef",
            "--interface: 'eth0123456789abcdef' is not the name of an interface; "
            "expected 1 to 15 ASCII characters without white space, quotes, / : * +",
        ),
    ],
)
def test_what_is_no_connection_is_told_as_every_bad_input_is(capsys, argv, told):
    _, err = run(capsys, "explain", "outbound", *argv.split(), code=BAD_INPUT)
    assert err == f"tidegate: {told}\n"


# Explain


@pytest.mark.parametrize(
    ("argv", "line", "goes"),
    [
        (
            "outbound 10.1.2.3:443",
            "to-outbound-listener",
            "the sidecar's outbound listener, port 15001",
        ),
        ("outbound [fd77::2]:443", "to-outbound-listener", "the sidecar's outbound listener"),
        ("outbound 10.1.2.3:443 --uid root", "to-outbound-listener", "outbound listener"),
        ("outbound 10.1.2.3:443 --protocol UDP", "other-protocol", "not redirected"),
        ("outbound 10.1.2.3:443 --protocol 17", "other-protocol", "not redirected"),
        ("outbound 10.1.2.3:443 --protocol 6", "to-outbound-listener", "outbound listener"),
        ("outbound 10.1.2.3:443 --protocol sctp", "other-protocol", "not redirected"),
        ("outbound 10.1.2.3:443 --older", "older", "not redirected"),
        ("outbound 127.0.0.9:443", "own-address", "not redirected"),
        ("outbound 127.0.0.9:443 --interface eth0", "loopback-ipv4", "not redirected"),
        (
            "inbound [fd77::2]:8080 --from fd77::1",
            "to-inbound-listener",
            "inbound listener, port 20000",
        ),
        ("inbound 10.0.0.2:20000", "inbound-listener", "not redirected"),
        ("inbound 10.0.0.2:15001", "outbound-listener", "inbound listener, port 20000"),
        ("inbound 10.0.0.2:8080 --forwarded", "forwarded", "not redirected"),
    ],
)
def test_explain_says_where_a_connection_goes_and_which_line_decides(capsys, argv, line, goes):
    out, err = run(capsys, "explain", *argv.split())
    first, second = out.splitlines()
    assert first.startswith(argv.split()[0])
    assert first.endswith(goes) or goes in first
    assert second.startswith(f"decided by {line}: ")
    assert err == ""


def test_explain_for_programs_has_the_connection_the_action_and_the_whole_list(capsys):
    said = explained(
        capsys,
        *["inbound", "10.0.0.2:80", "--from", "10.0.0.9"],
    )
    assert said["connection"] == {
        "direction": "inbound",
        "destination": "10.0.0.2",
        "port": 80,
        "source": "10.0.0.9",
        "interface": "eth0",
        "uid": None,
        "gid": None,
        "mark": 0,
        "cgroup": "",
        "protocol": "tcp",
        "opening": True,
        "tracked": "new",
        "forwarded": False,
    }
    assert said["action"] == {"kind": "redirect", "port": 20000}
    assert said["line"] == "to-inbound-listener" == said["list"][-1]["line"]
    assert said["list"][0] == {"line": "not-tcp", "when": "not tcp", "then": {"kind": "leave"}}
    assert said["notes"] == []
    client = ("--gid", "7", "--mark", "0x10", "--cgroup", "/a/b/")
    asked = explained(capsys, "outbound", "10.0.0.2:80", *client)["connection"]
    assert (asked["gid"], asked["mark"], asked["cgroup"]) == (7, 16, "a/b")


@pytest.mark.parametrize(
    ("named", "protocol", "phrase"),
    [
        ("6", "tcp", "tcp"),
        ("17", "udp", "udp"),
        ("132", "sctp", "sctp"),
        ("ICMP", "icmp", "icmp"),
        ("253", "253", "protocol 253"),
    ],
)
def test_explain_takes_protocols_by_name_and_number(capsys, named, protocol, phrase):
    argv = ("outbound", "10.0.0.2:80", "--protocol", named)
    assert explained(capsys, *argv)["connection"]["protocol"] == protocol
    out, _ = run(capsys, "explain", *argv)
    assert out.startswith(f"outbound {phrase} 10.0.0.2:80 ")


def test_explain_of_an_ipv4_mapped_address_says_that_ipv4_lines_decide(capsys):
    argv = ("outbound", "[::ffff:127.0.0.1]:443", "--interface", "eth0")
    out, err = run(capsys, "explain", *argv)
    assert out.startswith("outbound tcp 127.0.0.1:443 on eth0 goes where it was going")
    assert "decided by loopback-ipv4" in out
    note = "::ffff:127.0.0.1 is 127.0.0.1 on the wire: the IPv4 lines decide"
    assert err == f"NOTE: {note}\n"
    said = explained(capsys, *argv)
    assert said["notes"] == [note]
    assert said["connection"]["destination"] == "127.0.0.1"
    mapped = ("inbound", "10.0.0.2:80", "--from", "::ffff:10.0.0.9")
    assert explained(capsys, *mapped)["connection"]["source"] == "10.0.0.9"


@pytest.mark.parametrize(
    ("dialled", "loopback", "line"),
    [("[::]", "::1", "own-address"), ("0.0.0.0", "127.0.0.1", "own-address")],
)
def test_explain_of_the_unspecified_address_is_that_of_loopback(capsys, dialled, loopback, line):
    said = explained(capsys, "outbound", f"{dialled}:80")
    assert said["line"] == line
    assert said["connection"]["destination"] == loopback
    assert said["connection"]["interface"] == "lo"
    assert said["notes"] == [
        f"{dialled.strip('[]')} is {loopback} on the wire: loopback is what dialling it means"
    ]


@pytest.mark.parametrize(
    ("direction", "option"),
    [
        ("outbound", ["--forwarded"]),
        ("inbound", ["--uid", "0"]),
        ("inbound", ["--gid", "0"]),
        ("inbound", ["--mark", "0"]),
        ("inbound", ["--cgroup", "/"]),
    ],
)
def test_what_only_the_other_direction_has_is_refused(capsys, direction, option):
    _, err = run(capsys, "explain", direction, "10.0.0.2:80", *option, code=BAD_INPUT)
    other = "inbound" if direction == "outbound" else "outbound"
    assert err.startswith(f"tidegate: {option[0]}: ")
    assert f"only of an {other} connection" in err


@pytest.mark.parametrize("option", ["--all", "-a"])
def test_explain_shows_the_whole_list_with_a_mark_at_the_line_that_decides(capsys, option):
    out, _ = run(capsys, "explain", "outbound", "10.0.0.1:80", "--uid", "5995", option)
    marked = [line.split() for line in out.splitlines() if line.startswith("=>")]
    assert marked == [["=>", "proxy", "by", "user", "5995", "leave"]]
    assert "to-outbound-listener" in out


def test_explain_tells_why_no_line_decides(capsys, stdin):
    stdin("inbound: {enabled: false}\noutbound: {enabled: false}\n")
    out, _ = run(capsys, "explain", "outbound", "10.0.0.1:80", "--policy", "-")
    assert "redirects nothing outbound" in out
    stdin("outbound: {include_cidrs: [10.0.0.0/8]}\n")
    out, _ = run(capsys, "explain", "outbound", "192.0.2.1:80", "--policy", "-")
    assert "none of them matches" in out
    stdin("families: [ipv6]\n")
    out, _ = run(capsys, "explain", "outbound", "192.0.2.1:80", "--policy", "-")
    assert "decided by ipv4-off: the policy does not cover this family" in out


def test_explain_refuses_a_client_of_another_family(capsys):
    _, err = run(capsys, "explain", "inbound", "10.0.0.2:80", "--from", "fd00::1", code=BAD_INPUT)
    assert err == (
        "tidegate: --from: fd00::1 and 10.0.0.2 are of two families; "
        "expected an address of the destination's family\n"
    )


def test_long_lists_are_cut_for_people_and_whole_for_programs(capsys, stdin):
    ports = ",".join(str(port) for port in range(2, 2002, 2))
    policy = json.dumps({"tidegate.io/exclude-outbound-ports": ports})
    stdin(policy)
    out, _ = run(capsys, "explain", "outbound", "10.0.0.1:4", "--annotations", "-")
    assert out.splitlines()[1].endswith("14, 16 and 992 more")
    stdin(policy)
    said = explained(capsys, "outbound", "10.0.0.1:4", "--annotations", "-")
    (line,) = (line for line in said["list"] if line["line"] == "excluded-port")
    assert line["when"].endswith(" 1998, 2000")


@pytest.mark.parametrize("mode", Mode)
def test_every_line_that_a_policy_can_have_has_words(mode):
    for _hook, lines in rules_for(msgspec.structs.replace(EVERYTHING, mode=mode)).lists:
        for line in lines:
            assert redirect_text.condition(line.matches)
            assert redirect_text.action(line.action)
            assert redirect_text.goes(EVERYTHING, line.action)
    assert {hook for hook, _ in rules_for(EVERYTHING).lists} == set(Hook) - {Hook.INBOUND_TPROXY}


# Where the policy comes from


def test_a_policy_is_read_from_yaml_json_and_standard_input(capsys, stdin, tmp_path):
    yaml, json_ = tmp_path / "policy.yaml", tmp_path / "policy.json"
    yaml.write_text("outbound:\n  exclude_ports: ['5432', 6000-6010]\n")
    json_.write_text('{"outbound": {"exclude_ports": ["5432", "6000-6010"]}}')
    for file in (yaml, json_):
        argv = ("outbound", "10.0.0.1:6005", "--policy", str(file))
        assert line_of(capsys, *argv) == "excluded-port"
    stdin(yaml.read_text())
    assert line_of(capsys, "outbound", "10.0.0.1:5432", "--policy", "-") == "excluded-port"


def test_a_policy_is_printed_whole_with_what_is_not_the_default_marked(capsys, stdin):
    stdin("outbound: {exclude_ports: [5432, 6000-6010]}\nmode: tproxy\n")
    out, err = run(capsys, "policy", "--policy", "-")
    assert err == ""
    lines = out.splitlines()
    assert "  port: 15001" in lines
    assert [line for line in lines if "#" in line] == [
        '  exclude_ports: [5432, "6000-6010"]  # default: []; by --policy',
        'mode: "tproxy"  # default: "redirect"; by --policy',
    ]
    assert "#" not in run(capsys, "policy")[0]


def test_a_printed_policy_tells_which_source_said_a_setting_last(capsys, stdin, tmp_path):
    annotations = tmp_path / "annotations.yaml"
    annotations.write_text(
        "tidegate.io/exclude-outbound-ports: '1'\ntidegate.io/drop-invalid: 'true'\n"
        "tidegate.io/exclude-inbound-ports: '9'\n"
    )
    stdin("outbound: {exclude_ports: [5432]}\ninbound: {exclude_ports: [9]}\n")
    out, _ = run(capsys, "policy", "--annotations", str(annotations), "--policy", "-")
    assert [line.strip() for line in out.splitlines() if "#" in line] == [
        "exclude_ports: [9]  # default: []; by --policy",
        "exclude_ports: [1]  # default: []; by --annotations",
        "drop_invalid: true  # default: false; by --annotations",
    ]


@pytest.mark.parametrize("policy", [Policy(), EVERYTHING], ids=["built-in", "everything"])
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["yaml", "json"])
def test_a_policy_that_is_printed_reads_back_as_it_was(capsys, stdin, policy, option):
    stdin(policies.as_yaml(policy))
    printed, _ = run(capsys, "policy", "--policy", "-", *option)
    if option:
        printed = json.dumps(json.loads(printed)["policy"])
    assert policy_from_document(printed, "printed") == policy


ANNOTATIONS = {
    "mapping.yaml": "tidegate.io/exclude-outbound-ports: '5432'\nother.example/thing: x\n",
    "commented.yaml": "# of web\n\"tidegate.io/exclude-outbound-ports\": '5432'\n",
    "mapping.json": '{"consul.hashicorp.com/transparent-proxy-exclude-outbound-ports": "5432"}',
    "pod.yaml": (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\n"
        "  annotations:\n    tidegate.io/exclude-outbound-ports: '5432'\n"
    ),
    "deployment.yaml": (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  annotations: {a/b: c}\nspec:\n  template:\n"
        "    metadata:\n      annotations:\n        tidegate.io/exclude-outbound-ports: '5432'\n"
    ),
    "cronjob.yaml": (
        "kind: CronJob\nspec: {jobTemplate: {spec: {template: {metadata: {annotations: "
        "{tidegate.io/exclude-outbound-ports: '5432'}}}}}}\n"
    ),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations_are_a_mapping_or_those_of_a_manifest(capsys, tmp_path, name):
    file = tmp_path / name
    file.write_text(ANNOTATIONS[name])
    argv = ("outbound", "10.0.0.1:5432", "--annotations", str(file))
    assert line_of(capsys, *argv) == "excluded-port"


@pytest.mark.parametrize(
    ("manifest", "path"),
    [
        ("kind: Pod\nmetadata: {name: web}\n", "metadata.annotations"),
        ("kind: Pod\nmetadata: {annotations: {}}\n", "metadata.annotations"),
        (
            "kind: Deployment\nmetadata: {annotations: {a/b: c}}\nspec: {template: {spec: {}}}\n",
            "spec.template.metadata.annotations",
        ),
    ],
)
def test_a_manifest_without_annotations_has_the_built_in_policy_and_a_warning(
    capsys, stdin, manifest, path
):
    stdin(manifest)
    argv = ("explain", "outbound", "10.0.0.1:80", "--annotations", "-")
    out, err = run(capsys, *argv)
    assert "decided by to-outbound-listener" in out
    assert err == f"WARNING: standard input: the manifest has no annotations ({path})\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tidegate.io/exclude-outbound-ports: 5432\n", 'is not a string; expected "5432"'),
        (
            "tidegate.io/exclude-outbound-ports: [80, 443]\ntidegate.io/exclude-uids: 'nobody-of-this-name'\n"
            "tidegate.io/mode: true\n",
            'tidegate.io/exclude-outbound-ports: is not a string; expected "80,443"\n'
            'standard input: tidegate.io/mode: is not a string; expected "true"\n'
            "standard input: tidegate.io/exclude-uids: there is no user 'nobody-of-this-name' here; "
            "expected a number or the name of a user\n"
            "standard input: tidegate.io/mode: 'true' is not a mode; expected redirect or tproxy",
        ),
        ("kind: Pod\nmetadata: {annotations: [a]}\n", "metadata.annotations: is not a mapping"),
        (
            "spec: {template: {}}\n",
            "spec: is a mapping; expected annotations only, or a whole manifest with its kind\n",
        ),
        (
            "kind: Pod\nmetadata: {name: a}\n---\nkind: Deployment\nmetadata: {name: b}\n",
            "holds 2 documents (Pod a, Deployment b); expected one of them, in a file of its own",
        ),
        ("a: b\n---\nkind: Pod\n", "holds 2 documents (a mapping, a Pod)"),
        ("", "holds nothing; expected one mapping, or one manifest"),
        ("{", "line 1, column 2: found the end of the text; expected a name in quotes"),
        (
            "kind: List\nitems:\n- kind: Pod\n  metadata: {name: a}\n- {kind: Pod}\n",
            "is a List of 2 manifests (Pod a, a Pod); expected one of them, "
            "such as `kubectl get pod a -o yaml` prints",
        ),
        ("kind: PodList\nitems: []\n", "is a PodList of 0 manifests; expected one manifest"),
    ],
)
def test_annotations_that_are_none_are_refused(capsys, stdin, text, problem):
    stdin(text)
    argv = ("explain", "outbound", "10.0.0.1:1", "--annotations", "-")
    _, err = run(capsys, *argv, code=BAD_INPUT)
    assert err.startswith("tidegate: standard input: ")
    assert problem in err


CONSUL = '{"ProxyUserID": "4242", "ProxyInboundPort": 20000, "ExcludeOutboundPorts": ["3"]}'


def test_consuls_own_configuration_is_taken_as_it_is(capsys, stdin, tmp_path):
    file = tmp_path / "redirect.json"
    file.write_text(CONSUL)
    for option in (CONSUL, f"@{file}", "-"):
        stdin(CONSUL)
        argv = ("outbound", "10.0.0.1:80", "--uid", "4242", "--consul-config", option)
        assert line_of(capsys, *argv) == "proxy"


def test_later_sources_change_what_earlier_ones_gave(capsys, tmp_path):
    policy, annotations = tmp_path / "policy.yaml", tmp_path / "annotations.yaml"
    policy.write_text("outbound: {exclude_ports: ['1'], exclude_uids: ['77']}\n")
    annotations.write_text("tidegate.io/exclude-outbound-ports: '2'\n")
    # The order of the options on the command line does not matter.
    sources = ("--annotations", str(annotations), "--policy", str(policy))
    assert line_of(capsys, "outbound", "10.0.0.1:1", *sources) == "to-outbound-listener"
    assert line_of(capsys, "outbound", "10.0.0.1:2", *sources) == "excluded-port"
    assert line_of(capsys, "outbound", "10.0.0.1:3", "--uid", "77", *sources) == "excluded-uid"
    sources = (*sources, "--consul-config", CONSUL)
    assert line_of(capsys, "outbound", "10.0.0.1:2", *sources) == "to-outbound-listener"


def test_standard_input_can_be_read_only_once(capsys, stdin):
    stdin("{}")
    argv = ("explain", "outbound", "10.0.0.1:1", "--policy", "-", "--annotations", "-")
    _, err = run(capsys, *argv, code=BAD_INPUT)
    assert err.startswith("tidegate: --policy and --annotations both read standard input")


def test_all_faults_of_all_sources_are_told_at_once(capsys, tmp_path):
    policy, annotations = tmp_path / "policy.yaml", tmp_path / "annotations.yaml"
    policy.write_text("inbound: {port: 70000}\noutbound: {exclude_cidrs: [10.0.0.0/33]}\n")
    annotations.write_text(
        "tidegate.io/exclude-outbound-ports: 80-70,x\ntidegate.io/exclude-uids: nobody-of-this-name\n"
    )
    argv = ["--policy", str(policy), "--annotations", str(annotations), "--consul-config", "@/none"]
    out, err = run(capsys, "apply", "--dry-run", *argv, code=BAD_INPUT)
    assert out == ""
    for fault in ("70000", "10.0.0.0/33", "80-70", "'x'", "nobody-of-this-name"):
        assert fault in err
    assert "/none: cannot be read: No such file or directory" in err
    assert err.count(str(annotations)) == 3


def test_standard_input_is_called_that(capsys, stdin):
    stdin("outbound: {exclude_ports: ['70000']}\n")
    _, err = run(capsys, "apply", "--dry-run", "--policy", "-", code=BAD_INPUT)
    assert err.startswith("tidegate: standard input: ")
    stdin("{")
    _, err = run(capsys, "apply", "--dry-run", "--consul-config", "-", code=BAD_INPUT)
    assert "-: " not in err


def test_a_file_that_cannot_be_read_is_one_sentence(capsys, tmp_path):
    _, err = run(capsys, "apply", "--dry-run", "--policy", str(tmp_path), code=BAD_INPUT)
    assert err == f"tidegate: {tmp_path}: cannot be read: Is a directory; expected a file, or -\n"


# Dry run


@pytest.fixture
def nobody(monkeypatch):
    """A user who may not make a namespace."""

    def refuse(*_):
        raise KernelError("cannot make a network namespace", 1)

    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    monkeypatch.setattr(netns, "run_in_new", refuse)


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_a_dry_run_needs_no_root_and_prints_the_ruleset_alone(nobody, capsys, backend):
    out, _ = run(capsys, "apply", "--dry-run", "--backend", backend)
    assert re.search(r"15001\b", out)
    assert out.endswith("\n")
    as_json = json.loads(run(capsys, "apply", "--dry-run", "--backend", backend, "--json")[0])
    assert as_json == {"backend": backend, "ruleset": out}


@pytest.mark.parametrize(
    ("backend", "warning"),
    [
        ("nftables", ""),
        ("auto", "WARNING: without root nothing can be tried; this is for nftables\n"),
        (
            "iptables",
            "WARNING: without root nothing can be tried; this is for a kernel with IP sets\n",
        ),
    ],
)
def test_a_dry_run_without_root_says_what_it_could_not_try(nobody, capsys, backend, warning):
    assert run(capsys, "apply", "--dry-run", "--backend", backend)[1] == warning


def test_a_dry_run_of_a_policy_that_redirects_nothing_prints_nothing(capsys, stdin):
    stdin("inbound: {enabled: false}\noutbound: {enabled: false}\n")
    out, err = run(capsys, "apply", "--dry-run", "--policy", "-", "--backend", "nftables")
    assert out == ""
    assert "redirects nothing" in err


# Which namespace


@pytest.mark.parametrize("command", [one for one in COMMANDS if one not in ("explain", "policy")])
def test_without_root_it_is_one_sentence(monkeypatch, capsys, command):
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    out, err = run(capsys, command, "--netns", "x", code=2)
    assert out == ""
    reasons = {
        "apply": "it loads rules into the kernel",
        "show": "it reads the rules of a network namespace",
        "check": "it reads the rules of a network namespace",
        "verify": "it sends probes inside a network namespace",
        "remove": "it takes rules out of the kernel",
    }
    assert err == f"tidegate: this needs root: {reasons[command]}; try sudo\n"
    assert err.count("\n") == 1


def test_an_unknown_namespace_is_answered_with_those_near_it(machine, capsys):
    for name in ("shop-1", "shop-2", "till"):
        (machine / "netns" / name).touch()
    _, err = run(capsys, "apply", "--netns", "shop1", code=BAD_INPUT)
    assert err == (
        "tidegate: --netns: there is no network namespace 'shop1'; "
        "expected one of shop-1, shop-2 (and 1 other)\n"
    )
    _, err = run(capsys, "remove", "--netns", "zzz", code=BAD_INPUT)
    assert err.endswith("expected one of shop-1, shop-2, till\n")
    for number in range(10):
        (machine / "netns" / f"agent-{number}").touch()
    _, err = run(capsys, "remove", "--netns", "til", code=BAD_INPUT)
    assert err.endswith("expected one of till (and 12 others)\n")
    _, err = run(capsys, "remove", "--netns", "zzz", code=BAD_INPUT)
    assert err.endswith("expected one of agent-0, agent-1, agent-2 (and 10 others)\n")
    _, err = run(capsys, "show", "--netns", "no name", code=BAD_INPUT)
    assert "'no name' is not a name" in err


def test_where_no_namespace_has_a_name_it_says_so(machine, capsys):
    _, err = run(capsys, "check", "--netns", "shop", code=BAD_INPUT)
    assert err.endswith("expected a path; none has a name here\n")


@pytest.mark.parametrize("place", ["/nonexistent/netns", "/dev/null", "/tmp"])
def test_a_path_that_leads_to_no_namespace_is_bad_input(machine, capsys, place):
    _, err = run(capsys, "apply", "--netns", place, code=BAD_INPUT)
    assert err.startswith("tidegate: --netns: ")
    assert place in err


@pytest.mark.parametrize("command", [*QUESTIONS, "remove"])
def test_a_namespace_that_may_not_be_looked_at_is_one_sentence(
    machine, monkeypatch, capsys, command
):
    looked_at = f"/proc/{os.getpid()}/ns/net"
    stat = os.stat

    def refuse(path, **options):
        if str(path) == looked_at:
            raise PermissionError(errno.EACCES, "Permission denied", looked_at)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    _, err = run(capsys, command, "--pid", str(os.getpid()), code=BAD_INPUT)
    assert err == f"tidegate: --pid: {looked_at} may not be looked at: Permission denied\n"


@pytest.mark.parametrize("option", [("--netns", "/" + 5000 * "x"), ("--pid", 300 * "9")])
def test_what_is_too_long_for_a_path_is_bad_input(machine, capsys, option):
    _, err = run(capsys, "show", *option, code=BAD_INPUT)
    assert err.startswith(f"tidegate: {option[0]}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("command", "code"), [("show", 2), ("check", 2), ("remove", 1)])
def test_what_the_system_refuses_is_one_sentence(
    machine, monkeypatch, capsys, entered, command, code
):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files", "/x")

    monkeypatch.setattr(Engine, "backend_of", refuse)
    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    _, err = run(capsys, command, "--netns", OWN, code=code)
    assert err == "tidegate: /x: Too many open files\n"


@pytest.mark.parametrize("pid", ["0", "-3", "99999999999"])
def test_a_process_that_is_gone_is_bad_input(machine, capsys, pid):
    _, err = run(capsys, "show", f"--pid={pid}", code=BAD_INPUT)
    assert err.startswith(f"tidegate: --pid: there is no process {pid}; it may have ended")


def test_apply_needs_a_namespace_unless_it_is_dry(machine, capsys):
    _, err = run(capsys, "apply", code=BAD_INPUT)
    assert err == (
        "tidegate: no network namespace is named; expected --netns, --pid or --workload\n"
    )


# Workloads of an agent


def said_of(name, **fields):
    return {
        "id": f"id-{name}",
        "name": name,
        "netns": f"/run/netns/{name}",
        "wanted_in_mesh": True,
        "annotations": {},
        "namespace_annotations": {},
        "redirect": "ok",
        "problem": "",
        **fields,
    }


@contextmanager
def agent(path, *workloads):
    """An agent's GET /v1/status on a unix socket."""
    ready, done = threading.Event(), threading.Event()

    async def status(_request):
        return web.json_response({"node": "n1", "round_at": 1.0, "workloads": workloads})

    async def serve():
        app = web.Application()
        app.add_routes([web.get("/v1/status", status)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        ready.set()
        await asyncio.to_thread(done.wait)
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def entered(monkeypatch):
    """Namespaces that are entered without being there."""
    monkeypatch.setattr("tidegate.cli.namespaces._entered", lambda path, _option: path)
    monkeypatch.setattr(
        "tidegate.cli.connections.routes.outgoing_interface", lambda _path, _address: "eth0"
    )
    monkeypatch.setattr("tidegate.cli.redirect.block.is_blocked", lambda _path: False)
    heard = (Listener("::", 15001), Listener("0.0.0.0", 20000))
    monkeypatch.setattr("tidegate.cli.redirect.sockets.listeners", lambda: heard)
    monkeypatch.setattr(netns, "run_in", lambda _path, function, *args: function(*args))


def test_a_workload_has_the_policy_that_its_agent_works_by(machine, capsys, entered):
    policy = msgspec.to_builtins(Policy(outbound=Outbound(exclude_ports=(PortRange(7, 7),))))
    problem = "an annotation is wrong"
    with agent(machine / "agent.sock", said_of("web", policy=policy, problem=problem)):
        argv = ("outbound", "10.0.0.1:7", "--workload", "web")
        assert line_of(capsys, *argv) == "excluded-port"
        given = ("--consul-config", CONSUL)
        assert line_of(capsys, *argv, *given) == "to-outbound-listener"
        out, err = run(
            capsys, "apply", "--dry-run", "--workload", "id-web", "--backend", "nftables"
        )
        assert "7" in re.findall(r"\d+", out)
        assert err == "WARNING: the agent says of web: an annotation is wrong\n"


def test_a_workload_without_policy_has_that_of_its_annotations(machine, capsys, entered):
    web = said_of(
        "web",
        policy=None,
        namespace_annotations={
            "tidegate.io/exclude-outbound-ports": "7",
            "tidegate.io/exclude-uids": "9",
        },
        annotations={"tidegate.io/exclude-outbound-ports": "8"},
    )
    bad = said_of("bad", annotations={"tidegate.io/exclude-outbound-ports": "70000"})
    with agent(machine / "agent.sock", web, bad):
        argv = ("--workload", "web")
        assert line_of(capsys, "outbound", "10.0.0.1:7", *argv) == "to-outbound-listener"
        assert line_of(capsys, "outbound", "10.0.0.1:8", *argv) == "excluded-port"
        assert line_of(capsys, "outbound", "10.0.0.1:7", "--uid", "9", *argv) == "excluded-uid"
        _, err = run(capsys, "check", "--workload", "bad", code=BAD_INPUT)
        assert err.startswith("tidegate: workload bad: tidegate.io/exclude-outbound-ports: ")


def test_the_policy_of_a_workload_is_printed_with_who_said_what(machine, capsys, entered):
    policy = Policy(
        inbound=Inbound(exclude_ports=(PortRange(9, 9),)),
        outbound=Outbound(exclude_ports=(PortRange(7, 7),), exclude_cidrs=("192.0.2.1/32",)),
    )
    web = said_of(
        "web",
        policy=msgspec.to_builtins(policy),
        namespace_annotations={
            "tidegate.io/exclude-inbound-ports": "9",
            "tidegate.io/exclude-outbound-ports": "8",
        },
        annotations={"tidegate.io/exclude-outbound-ports": "7"},
    )
    faulty = {**web, "name": "faulty", "annotations": {"tidegate.io/mode": "none"}}
    with agent(machine / "agent.sock", web, faulty):
        out, _ = run(capsys, "policy", "--workload", "web")
        assert [line.strip() for line in out.splitlines() if "#" in line] == [
            "exclude_ports: [9]  # default: []; by its namespace",
            "exclude_ports: [7]  # default: []; by its annotations",
            'exclude_cidrs: ["192.0.2.1/32"]  # default: []; by the node',
        ]
        # Nobody knows which annotations the policy in force came from.
        out, _ = run(capsys, "policy", "--workload", "faulty")
        assert "exclude_ports: [7]  # default: []\n" in out
        said = json.loads(run(capsys, "policy", "--workload", "web", "--json")[0])
        assert policy_from_document(json.dumps(said["policy"]), "printed") == policy
        assert said["said_by"] == {
            "inbound.exclude_ports": "its namespace",
            "outbound.exclude_ports": "its annotations",
            "outbound.exclude_cidrs": "the node",
        }


def test_a_workload_that_is_to_have_no_sidecar_is_told_of(machine, capsys, entered):
    with agent(machine / "agent.sock", said_of("nightly", wanted_in_mesh=False)):
        _, err = run(capsys, "explain", "outbound", "10.0.0.1:7", "--workload", "nightly")
    assert err == (
        "WARNING: nightly is to have no sidecar; this is the policy that it would have\n"
    )


def test_an_unknown_workload_is_answered_with_those_that_there_are(machine, capsys):
    with agent(machine / "agent.sock", said_of("web"), said_of("api")):
        _, err = run(capsys, "show", "--workload", "wob", code=BAD_INPUT)
    assert err == "tidegate: --workload: no workload 'wob' is known (known: api, web)\n"


def test_a_name_that_two_workloads_bear_needs_an_id(machine, capsys):
    twins = said_of("web"), said_of("web", id="other")
    with agent(machine / "agent.sock", *twins):
        _, err = run(capsys, "show", "--workload", "web", code=BAD_INPUT)
    assert "'web' is several workloads: id-web on n1, other on n1; expected an id" in err


def test_an_agent_that_says_too_little_is_named(machine, capsys):
    with agent(machine / "agent.sock", {"name": "web"}):
        _, err = run(capsys, "show", "--workload", "web", code=2)
    assert f"the agent at unix://{machine}/agent.sock answers /v1/status in a way" in err
    assert err.count("\n") == 1


def test_where_no_agent_answers_a_question_cannot_be_told(machine, capsys):
    argv = ("--workload", "web", "--socket", str(machine / "none.sock"))
    _, err = run(capsys, "check", *argv, code=2)
    path = f"unix://{machine}/none.sock"
    assert err == f"tidegate: no agent answers at {path} (no such file or directory)\n"
    run(capsys, "remove", *argv, code=2)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(machine / "none.sock"))
    _, err = run(capsys, "check", *argv, code=2)
    assert (
        err
        == f"tidegate: no agent answers at {path} (connection refused: it has ended, and its log says why)\n"
    )


def test_the_agents_of_a_lab_are_all_asked(machine, capsys):
    parser = argparse.ArgumentParser()
    target.add_options(parser)
    paths = state.LabPaths("demo")
    for node in ("n1", "n2"):
        paths.node(node).mkdir(parents=True)
    state.write_bytes(paths.spec, b'{"name": "demo", "nodes": ["n1", "n2"], "pods": []}')
    expected = tuple(f"unix://{paths.agent_socket(node)}" for node in ("n1", "n2"))
    assert target.agent_addresses(parser.parse_args(["--lab", "demo"])) == expected
    assert target.agent_addresses(parser.parse_args([])) == expected
    with agent(paths.agent_socket("n2")):
        assert target.agents_of_this_machine() == expected[1:]
        assert target.agent_address(parser.parse_args([])) == expected[1]


def test_a_workload_is_found_although_another_node_of_the_lab_does_not_answer(
    machine, monkeypatch, capsys, entered
):
    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    paths = state.LabPaths("demo")
    for node in ("n1", "n2"):
        paths.node(node).mkdir(parents=True)
    state.write_bytes(paths.spec, b'{"name": "demo", "nodes": ["n1", "n2"], "pods": []}')
    with agent(paths.agent_socket("n2"), said_of("web", netns=OWN)):
        assert line_of(capsys, "outbound", "10.0.0.1:7", "--workload", "web")
        run(capsys, "check", "--workload", "web")
        _, err = run(capsys, "check", "--workload", "wob", code=2)
    assert err == (
        "tidegate: no workload 'wob' is known (known: web), but not every agent was heard: "
        f"no agent answers at unix://{paths.agent_socket('n1')} (no such file or directory)\n"
    )


class Engine:
    """Stands for the engine: nothing is in the kernel, and nothing gets there."""

    choice = Choice(BackendName.NFTABLES, "it works")

    def __init__(self, wanted=""):
        pass

    def apply(self, _path, _policy, *, adopt):
        return Applied(change=Change.CREATED, backend=BackendName.NFTABLES)

    def check(self, _path, _policy):
        return ()

    def current(self, _path):
        return None

    def gaps(self, path, _policy):
        if path.startswith("/run/"):
            raise KernelError(f"no network namespace at {path}", 2)
        return ("IPv6 goes around the sidecar",)

    def backend_of(self, _path):
        return None

    def remove(self, _path):
        return Change.UNCHANGED


OWN = "/proc/self/ns/net"
CONSUL_RULES = Foreign(Mesh.CONSUL, Store.LEGACY, "ip", "nat", ("CONSUL_PROXY_OUTPUT",))


def test_whoever_changes_the_namespace_of_an_agents_workload_is_warned(
    machine, monkeypatch, capsys, entered
):
    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    policy = Policy(outbound=Outbound(exclude_ports=(PortRange(7, 7),)))
    web = said_of("web", netns=OWN, policy=msgspec.to_builtins(policy))
    with agent(machine / "agent.sock", web, said_of("gone")):
        warning = "WARNING: web belongs to the agent of n1, which keeps its redirection"
        assert warning in run(capsys, "apply", "--netns", OWN)[1]
        assert warning in run(capsys, "remove", "--netns", OWN)[1]
        # What the agent itself would do is no contradiction.
        assert warning not in run(capsys, "apply", "--workload", "web")[1]
    out, err = run(capsys, "remove", "--netns", OWN, "--json")
    assert json.loads(out)["warnings"] == []
    assert err == ""


def test_whoever_redirects_the_shell_itself_is_warned(machine, monkeypatch, capsys, entered):
    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    warning = (
        f"{OWN} is the network namespace of this shell: everything that runs in it is redirected"
    )
    out, err = run(capsys, "apply", "--netns", OWN, "--json")
    assert f"WARNING: {warning}\n" in err
    assert json.loads(out)["warnings"] == [warning, "IPv6 goes around the sidecar"]


def test_the_doctor_names_the_ways_around_the_sidecars_of_an_agents_workloads(
    machine, monkeypatch, capsys
):
    doctor = "tidegate.cli.doctor"
    monkeypatch.setattr(f"{doctor}.Engine", Engine)
    monkeypatch.setattr(f"{doctor}.probe_all", lambda: ())
    monkeypatch.setattr(f"{doctor}.choose", lambda _wanted: Engine.choice)
    monkeypatch.setattr(f"{doctor}.foreign.find", lambda _path: (CONSUL_RULES,))
    known = (
        said_of("web", netns=OWN),
        said_of("gone"),
        said_of("outside", netns=OWN, wanted_in_mesh=False),
        said_of(
            "typo",
            netns=OWN,
            wanted_in_mesh=False,
            annotations={"tidegate.io/exclude-uids": "nobody-of-this-name"},
        ),
    )
    with agent(machine / "agent.sock", *known):
        main(["doctor", "--json"])
        said = json.loads(capsys.readouterr().out)["redirection"]
        assert said["faulty_annotations"] == {
            "typo on n1": [
                "tidegate.io/exclude-uids: there is no user 'nobody-of-this-name' here; "
                "expected a number or the name of a user"
            ]
        }
        assert said["ways_around"] == {
            "web on n1": [str(CONSUL_RULES), "IPv6 goes around the sidecar"],
            "gone on n1": ["not known: no network namespace at /run/netns/gone"],
        }
        main(["doctor"])
        out = capsys.readouterr().out
        assert "web on n1: IPv6 goes around the sidecar\n" in out
        assert "typo on n1: annotation tidegate.io/exclude-uids: " in out
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["redirection"]["ways_around"] == {}


def test_the_doctor_finds_a_machine_without_any_backend_ill(machine, monkeypatch, capsys):
    def refuse(wanted):
        raise KernelError(f"{wanted} is not there", 95)

    monkeypatch.setattr("tidegate.cli.doctor.choose", refuse)
    monkeypatch.setattr("tidegate.cli.doctor.probe_all", lambda: ())
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no backend works here" in out
    assert "iptables is not there" in out


def test_the_doctor_never_cuts_a_path(machine, monkeypatch, capsys):
    path = "/opt/" + "a-long-directory/" * 20 + "envoy"
    feature = Feature(name="Envoy", present=True, detail=f"{path} here", lost_without="all")
    gone = msgspec.structs.replace(feature, name="ipset", present=False, needed=False)
    monkeypatch.setattr("tidegate.cli.doctor.probe_all", lambda: (feature, gone))
    monkeypatch.setattr("tidegate.cli.doctor.choose", lambda _wanted: Engine.choice)
    monkeypatch.setattr("tidegate.cli.doctor.Engine", Engine)
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        main(["doctor"])
        out = capsys.readouterr().out
        assert re.search(rf"^present +Envoy +{path} here$", out, re.MULTILINE)
        assert re.search(rf"^missing +ipset +{path} here; without it: all$", out, re.MULTILINE)


def test_a_rule_without_a_name_is_shown_as_such(machine, monkeypatch, capsys, entered):
    rules = (
        InstalledLine(hook=Hook.OUTBOUND, name="proxy", packets=3),
        InstalledLine(hook=Hook.OUTBOUND, name="", packets=4),
    )
    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    monkeypatch.setattr(Engine, "current", lambda _self, _path: rules)
    out, _ = run(capsys, "show", "--netns", "/x")
    assert re.search(r"^ +\(unnamed rule\) +4$", out, re.MULTILINE)


def test_taking_over_is_offered_only_where_it_would_help(machine, monkeypatch, capsys, entered):
    istio = Foreign(Mesh.ISTIO, Store.LEGACY, "ip", "nat", ("ISTIO_OUTPUT",))

    def apply(_self, _path, _policy, *, adopt):
        left = (istio,) if adopt else (CONSUL_RULES, istio)
        return Applied(
            change=Change.CREATED, backend=BackendName.NFTABLES, foreign=tuple(map(Left, left))
        )

    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    monkeypatch.setattr(Engine, "apply", apply)
    _, err = run(capsys, "apply", "--netns", OWN)
    assert f"WARNING: {CONSUL_RULES}; --adopt replaces it\n" in err
    assert f"WARNING: {istio}\n" in err
    _, err = run(capsys, "apply", "--netns", OWN, "--adopt")
    assert "--adopt" not in err


def test_what_cannot_be_taken_over_is_told_once_with_the_reason(
    machine, monkeypatch, capsys, entered
):
    left = Left(CONSUL_RULES, "busy")
    applied = Applied(change=Change.CREATED, backend=BackendName.NFTABLES, foreign=(left,))
    monkeypatch.setattr("tidegate.cli.redirect.Engine", Engine)
    monkeypatch.setattr(Engine, "apply", lambda *_, **__: applied)
    monkeypatch.setattr(Engine, "gaps", lambda *_: ("IPv6 is off",))
    out, err = run(capsys, "apply", "--netns", OWN, "--adopt", "--json")
    assert json.loads(out)["warnings"][-2:] == [str(left), "IPv6 is off"]
    assert err.endswith(f"WARNING: {left}\nWARNING: IPv6 is off\n")


def test_the_version_is_told_without_importing_any_command():
    program = (
        "import sys; from tidegate.cli.main import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('tidegate.cli.') and name != 'tidegate.cli.main'])"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, text=True, capture_output=True, check=True)
    assert re.fullmatch(r"tidegate [\d.]+\n\[\]\n", done.stdout)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in MAIN_COMMANDS)


def test_help_says_what_a_backend_is_compared_with_and_taken_from(capsys):
    def help_of(command):
        with pytest.raises(SystemExit):
            main(["redirect", command, "--help"])
        return " ".join(capsys.readouterr().out.split())

    assert "the backend whose rules are there" in help_of("check")
    assert "takes over from the other backend" in help_of("apply")
