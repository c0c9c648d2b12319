"""The command line as people meet it: help, exit codes, and one sentence where something is wrong."""

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys

import pytest

from tidegate.cli import main as main_module
from tidegate.cli import target
from tidegate.cli.main import COMMANDS, main, make_parser
from tidegate.errors import InputError, TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.lab import runtime, state

ROOT_ONLY = [
    ["flows"],
    ["ready"],
    ["ready", "api"],
    ["strict", "api"],
    ["permissive", "api"],
    ["onboard", "status"],
    ["onboard", "plan", "api"],
    ["intentions", "suggest"],
    ["resecure"],
    ["agent", "run"],
    ["server"],
    ["status"],
    ["doctor"],
    ["uninstall"],
    ["observe"],
    ["classify", "capture.pcap"],
    ["lab", "up"],
    ["lab", "down"],
    ["lab", "status"],
]
ASK_AN_AGENT = (
    "flows", "ready", "strict", "permissive", "onboard", "intentions", "resecure", "status",
)  # fmt: skip
NOBODY = 65534


UNKNOWN = 2


def sentence(capsys) -> str:
    """What was printed: nothing but one sentence on standard error."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tidegate: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("tidegate: ").rstrip("\n")


def usage_error(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


# Help and usage


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_its_own(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"tidegate {command}" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    name, number = capsys.readouterr().out.split()
    assert name == "tidegate"
    assert number[0].isdigit()


def test_without_a_command_it_shows_those_that_there_are(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(f"\n    {command} " in printed.err for command in COMMANDS)


def test_an_unknown_command_is_answered_with_those_that_there_are(capsys):
    text = usage_error(capsys, "nonsense")
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("doctor --nonsense", "there is no option --nonsense; see `tidegate doctor --help`"),
        ("flow", "there is no command 'flow'; expected flows; see `tidegate --help`"),
        ("lab exc api", "there is no command 'exc'; expected exec; see `tidegate lab --help`"),
        (
            "strict api --gard=5s",
            "there is no option --gard; expected --guard; see `tidegate strict --help`",
        ),
        ("ready api web", "'web' is one argument too many; see `tidegate ready --help`"),
        (
            "flows --class plain",
            "argument --class: 'plain' is no choice; expected plaintext; see `tidegate flows --help`",
        ),
        (
            "redirect apply --backend ebpf",
            "argument --backend: 'ebpf' is no choice; expected one of auto, nftables, iptables;"
            " see `tidegate redirect apply --help`",
        ),
    ],
)
def test_a_word_that_is_mistyped_is_answered_with_the_one_that_was_meant(capsys, words, answer):
    assert usage_error(capsys, *words.split()) == f"tidegate: {answer}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["agent"],
        ["agent", "walk"],
        ["strict"],
        ["permissive"],
        ["onboard"],
        ["intentions"],
        ["resecure", "--window", "soon"],
        ["strict", "api", "--guard", "soon"],
        ["strict", "api", "--guard", "0"],
        ["strict", "api", "--guard", "-5s"],
        ["ready", "api", "web"],
        ["flows", "--window", "24 hours"],
    ],
)
def test_bad_arguments_are_bad_usage(capsys, argv):
    text = usage_error(capsys, *argv)
    assert text.startswith("tidegate: ")
    assert text.endswith(" --help`\n")
    assert text.count("\n") == 1


def test_one_command_does_not_import_the_others():
    code = (
        "import sys; from tidegate.cli.main import make_parser; make_parser('config');"
        "sys.exit('tidegate.kernel.bpf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_place_of_a_service_is_made_and_removed_without_loading_the_agent_or_an_http_client():
    code = (
        "import sys; from tidegate.cli.main import make_parser; make_parser('sidecar');"
        "sys.exit(bool({'tidegate.node.daemon', 'tidegate.node.keeper', 'aiohttp'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_durations_and_options_arrive_as_values():
    args = make_parser("strict").parse_args(["strict", "api", "--guard", "1h30m", "--force"])
    assert (args.service, args.guard, args.force) == ("api", 5400.0, True)
    assert make_parser("strict").parse_args(["strict", "api"]).guard == 600.0


# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (TidegateError("it did not work"), 1, "it did not work"),
        (InputError("is wrong", source="f", field="x"), 2, "f: x: is wrong"),
        (KernelError("no such device", 19), 1, "no such device"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(monkeypatch, capsys, error, code, text):
    def fail(_args):
        raise error

    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.set_defaults(run=fail)
    monkeypatch.setattr(main_module, "make_parser", lambda _command: parser)
    assert main(["any"]) == code
    assert sentence(capsys) == text


@pytest.mark.parametrize("argv", ROOT_ONLY, ids=" ".join)
def test_without_root_nothing_is_known_and_it_is_one_sentence(monkeypatch, capsys, argv):
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert main(argv) == UNKNOWN
    told = sentence(capsys)
    assert told.startswith("this needs root: ")
    assert told.endswith("; try sudo")
    asks = argv[0] in ASK_AN_AGENT
    assert ("only root may ask an agent" in told) is asks


@pytest.mark.parametrize(
    ("command", "content"),
    [
        (["agent", "run"], b"nod: x"),
        (["agent", "run"], b""),
        (["agent", "run"], b"a: ["),
        (["agent", "run"], b"\xff\xfe"),
        (["agent", "run"], None),
        (["server"], b"nod: x"),
        (["server"], b""),
        (["server"], None),
    ],
)
def test_a_bad_configuration_is_one_sentence_and_exit_2(
    monkeypatch, capsys, tmp_path, command, content
):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    before = set(tmp_path.rglob("*"))
    assert main([*command, "--config", str(path)]) == 2
    assert sentence(capsys).startswith(f"{path}: ")
    assert set(tmp_path.rglob("*")) == before, "nothing is touched"


def test_an_agent_that_cannot_listen_says_so_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "agent.sock").write_text("not a socket")
    (tmp_path / "agent.yaml").write_text(
        f"{{node: n1, server: 'unix:///s', workloads: /w, trust_domain: mesh.consul,"
        f" run_dir: {tmp_path}/run, state_dir: {tmp_path}/state, bpffs: {tmp_path}/bpf,"
        f" socket: {tmp_path}/agent.sock}}"
    )
    monkeypatch.setattr("tidegate.cli.agent.log.set_up", lambda: None)
    assert main(["agent", "run", "--config", str(tmp_path / "agent.yaml")]) == 1
    assert "is no socket" in sentence(capsys)


@pytest.mark.parametrize(
    "command",
    [
        "flows",
        "ready api",
        "strict api",
        "permissive api",
        "onboard status",
        "intentions suggest",
        "resecure",
    ],
)
def test_where_no_agent_answers_nothing_is_known_and_it_says_what_to_do(
    monkeypatch, capsys, machine, command
):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main([*command.split(), "--socket", str(machine / "none.sock")]) == UNKNOWN
    told = sentence(capsys)
    assert told.startswith(f"no agent answers at unix://{machine}/none.sock: ")
    assert "tidegate doctor" in told
    assert main(command.split()) == UNKNOWN
    assert sentence(capsys).startswith(f"no agent runs here: there is no {machine}/agent.sock")


def test_a_fault_in_standard_input_says_that_it_is_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'Kind = "mash"')))
    assert main(["config", "write", "-"]) == 1
    assert sentence(capsys).startswith("standard input: ")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["config", "write", "-"]) == 1
    assert sentence(capsys).startswith("standard input: byte 0 is not UTF-8")


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (["api", "--", "ip", "-6", "address"], ["ip", "-6", "address"]),
        (["api", "ip", "-6", "address"], ["ip", "-6", "address"]),
        (
            ["--lab", "demo", "api", "sh", "-c", "a -- b", "--", "c"],
            ["sh", "-c", "a -- b", "--", "c"],
        ),
    ],
)
def test_lab_exec_takes_a_command_as_it_is_with_and_without_dashes_before(
    monkeypatch, machine, words, runs
):
    (machine / "lab" / "demo").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    ran = []
    monkeypatch.setattr(runtime, "exec_in", lambda *asked: ran.append(asked))
    main(["lab", "exec", *words])
    assert ran == [("demo", "api", runs)]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["api"], "no command is given; expected one, such as: api -- ip address"),
        (["api", "--"], "no command is given; expected one, such as: api -- ip address"),
        (
            ["api", "--lab", "demo", "--", "ip"],
            "--lab stands where the command should; expected options before POD",
        ),
    ],
)
def test_lab_exec_without_a_command_says_what_is_missing(capsys, words, problem):
    assert main(["lab", "exec", *words]) == 2
    assert sentence(capsys) == problem


def test_output_that_nobody_reads_is_no_error():
    code = "import sys; from tidegate.cli.main import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, "config", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


# Which tidegate is spoken to


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without any tidegate, and nothing in the environment."""
    for name in ("TIDEGATE_LAB", "TIDEGATE_SOCKET", "TIDEGATE_HTTP_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(state, "BASE", tmp_path / "lab")
    monkeypatch.setattr(target, "AGENT_SOCKET", tmp_path / "agent.sock")
    monkeypatch.setattr(target, "SERVER_SOCKET", tmp_path / "server.sock")
    return tmp_path


def chosen(*argv):
    parser = argparse.ArgumentParser()
    target.add_options(parser)
    return parser.parse_args(argv)


def test_where_nothing_runs_it_says_how_to_start(machine, capsys):
    with pytest.raises(TidegateError, match=r"no agent runs here: .*`tidegate lab up`"):
        target.agent_address(chosen())
    with pytest.raises(TidegateError, match=r"no intent server runs here: .*--http-addr"):
        target.server_address(chosen())
    with pytest.raises(TidegateError, match="no lab is up; `tidegate lab up` starts one"):
        target.the_lab(chosen())
    assert main(["config", "read", "-kind", "mesh", "-name", "mesh"]) == 1, "as Consul's command"
    assert sentence(capsys).startswith("no intent server runs here: ")


def test_this_nodes_agent_and_server_are_the_default(machine):
    with contextlib.ExitStack() as open_sockets:
        for name in ("agent", "server"):
            listener = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(machine / f"{name}.sock"))
            listener.listen()
        assert target.agent_address(chosen()) == f"unix://{machine}/agent.sock"
        assert target.server_address(chosen()) == f"unix://{machine}/server.sock"


def test_an_option_wins_over_the_environment(machine, monkeypatch):
    monkeypatch.setenv("TIDEGATE_SOCKET", "/env.sock")
    monkeypatch.setenv("TIDEGATE_HTTP_ADDR", "http://env:1")
    assert target.agent_addresses(chosen()) == ("unix:///env.sock",)
    assert target.server_address(chosen()) == "http://env:1"
    assert target.agent_addresses(chosen("--socket", "/x.sock")) == ("unix:///x.sock",)
    assert target.server_address(chosen("--http-addr", "http://x:2")) == "http://x:2"
    (machine / "lab" / "demo").mkdir(parents=True)
    address = target.server_address(chosen("--lab", "demo"))
    assert address.startswith(f"unix://{machine}/lab/demo/")


def test_a_lab_that_is_not_up_is_named_with_those_that_are(machine):
    (machine / "lab" / "demo").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no lab 'other' is up \(up: demo\)"):
        target.the_lab(chosen("--lab", "other"))


def test_the_only_lab_needs_no_name_and_several_do(machine):
    (machine / "lab" / "demo").mkdir(parents=True)
    assert target.the_lab(chosen()) == "demo"
    (machine / "lab" / "two").mkdir()
    with pytest.raises(InputError, match="several labs are up: demo, two"):
        target.the_lab(chosen())
