"""The lab of the Vagrantfile on two machines: provisioned as Vagrant does it, made strict, and one of them rebooted."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tests.vm import installed, machine
from tests.vm.machine import Done, Told

REPOSITORY = installed.REPOSITORY
LIMIT_S = 5400.0
DEADLINE_S = 300.0
WAIT = "300s"
PAUSE_S = 10.0
"""Each look has a machine busy for as long."""
TIDEGATE, AGENT = "tidegate", "/etc/tidegate/agent.yaml"
KNOCK, KNOCKS = "/root/guest/knock.py", "/root/knocks"
OUR_UNITS = "--unit=tidegate-*"
UNITS = ("tidegate-server", "tidegate-agent", "api", "db", "tlsonly", "nightly")
HEARD = {
    ("web", "api", "mesh"),
    ("legacy", "api", "plaintext"),
    ("tlsonly", "pay", "tls"),
    ("web", "db", "plaintext"),
}
INTENTION = """\
Kind = "service-intentions"
Name = "api"
Sources = [{ Name = "web" Action = "allow" }, { Name = "legacy" Action = "allow" }]
"""
FAULTS = re.compile(
    r"traceback|permission denied|operation not permitted|read-only file system", re.I
)

# As in a checkout in which nothing was built yet.
_MADE = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.o", "plugins")

pytestmark = pytest.mark.timeout(LIMIT_S)


class Lab:
    """The machines of the Vagrantfile, made one after the other as by `vagrant up`."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._begun = time.monotonic()
        secrets = os.environ | {"VAGRANT_DOTFILE_PATH": str(directory / "dot")}
        self.said = json.loads(
            subprocess.run(
                ["ruby", Path(__file__).parent / "vagrantfile.rb", REPOSITORY / "Vagrantfile"],
                env=secrets,
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
        first = next(iter(self.said.values()))
        self._install = next(one["inline"] for one in first["provisions"] if "inline" in one)
        self.say("the disk")
        files = self._uploaded(first["provisions"])
        self._disk = stack.enter_context(installed.built_disk(files, self._install))
        self.machines: dict[str, Told] = {}

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self._begun:7.1f} s: {what}", flush=True)

    def up(self, name: str) -> Told:
        """Boots a machine and provisions it, as `vagrant up NAME`."""
        self.say(f"{name}: boots")
        place = self._directory / name
        place.mkdir()
        wires = [self._directory / f"{each}.wire" for each in self.said]
        here, there = sorted(wires, key=lambda wire: wire.stem != name)
        self.machines[name] = one = self._stack.enter_context(
            machine.told(name, *self._disk, (here, there), place)
        )
        one.until_booted(DEADLINE_S)
        network = (
            f"[Match]\nName=eth0\n[Network]\nDHCP=no\nAddress={self.said[name]['address']}/24\n"
        )
        must(one, "hostnamectl", "hostname", self.said[name]["hostname"])
        must(one, "tee", "/etc/systemd/network/50-vagrant-eth0.network", stdin=network)
        must(one, "systemctl", "restart", "systemd-networkd")
        self.provision(name)
        return one

    def provision(self, name: str) -> None:
        """As `vagrant provision NAME`; what the disk has already is not installed again."""
        self.say(f"{name}: is provisioned")
        one = self.machines[name]
        must(one, "cp", "-rT", "/root/files/tmp", "/tmp")
        must(one, "chown", "-R", "1000:1000", "/tmp/tidegate")
        for provision in self.said[name]["provisions"]:
            match provision:
                case {"kind": "shell", "path": path, "args": arguments}:
                    script = (REPOSITORY / path).read_text()
                    must(one, "tee", "/tmp/vagrant-shell", stdin=script)
                    must(one, "chmod", "755", "/tmp/vagrant-shell")
                    must(one, "/tmp/vagrant-shell", *arguments)
                case {"kind": "shell", "inline": command}:
                    assert command == self._install

    def _uploaded(self, provisions: list[dict[str, Any]]) -> Path:
        """What the machine has of the files that are uploaded, as a tree of its own."""
        tree = self._directory / "files"
        for provision in provisions:
            if provision["kind"] == "file":
                source = REPOSITORY / provision["source"]
                place = tree / provision["destination"].lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, place, ignore=_MADE, copy_function=shutil.copy)
                else:
                    shutil.copy(source, place)
        (tree / "tmp").chmod(0o1777)
        return tree


def must(one: Told, *command: str, stdin: str = "", status: int = 0) -> str:
    done = one.order(*command, stdin=stdin)
    assert done.status == status, f"{one.name}: {' '.join(command)} ended with {done}"
    return done.output


def until(what: str, holds: Callable[[], Any], limit_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(PAUSE_S)


def flows(one: Told) -> set[tuple[str, str, str]]:
    done = one.order("sh", "-c", f"{TIDEGATE} flows --json 2>/dev/null")
    if done.status:
        return set()
    rows = json.loads(done.output)["flows"]
    return {(row["caller"]["service"], row["server"]["service"], row["class"]) for row in rows}


def answered(one: Told, pod: str, target: str) -> int:
    """How many of a pod's requests were answered since its application started."""
    statistics = json.loads(must(one, "cat", f"/var/lib/tidegate-lab/{pod}.json"))
    return next(each["ok"] for each in statistics["targets"] if each["target"] == target)


class Seen(NamedTuple):
    """What the story saw, step by step."""

    active: str
    """Of the first machine's units, while there is no second one."""
    legacy: Done
    """The verdict on api while a caller is not in the mesh."""
    ready: Done
    alone: Done
    """The verdict, asked for on the first machine, on a service of the second one, while that has no agent."""
    strict: Done
    refused: list[str]
    """What becomes of knocks in plaintext at the strict service, from either machine."""
    knocks: Counter[str]
    """And from before the first machine reboots until the lab is well again."""
    journals: list[str]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    # Not below the directory of pytest: the path of a unix socket is short.
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lab = Lab(stack, directory)
        try:
            yield story(lab)
        except AssertionError as error:
            last = {each.name: journal(each)[-60:] for each in lab.machines.values()}
            words = "\n".join(f"{name}: {line}" for name, lines in last.items() for line in lines)
            raise AssertionError(f"{error}\n{words}") from error


def story(lab: Lab) -> Seen:
    one = lab.up("node1")
    active = must(one, "systemctl", "is-active", *UNITS)
    two = lab.up("node2")

    lab.say("the agents tell each other what they see")
    until("either agent tells what both see", lambda: flows(one) & flows(two) >= HEARD)
    legacy = one.order(TIDEGATE, "ready", "api")

    lab.say("the caller in plaintext comes into the mesh")
    must(two, "sed", "-i", "/service: legacy/,/meshed:/s/meshed: false/meshed: true/", AGENT)
    must(two, "systemctl", "reload", "tidegate-agent")
    must(one, TIDEGATE, "config", "write", "-", stdin=INTENTION)
    ready = one.order(TIDEGATE, "ready", "api", "--wait", WAIT)

    lab.say("node2 has no agent for a while")
    must(two, "systemctl", "stop", "tidegate-agent")
    alone = one.order(TIDEGATE, "ready", "pay")
    must(two, "systemctl", "start", "tidegate-agent")
    must(one, TIDEGATE, "ready", "api", "--wait", WAIT)

    lab.say("api becomes strict, as node2 is told")
    strict = two.order(TIDEGATE, "strict", "api", "--guard", "5s")
    services = yaml.safe_load(must(one, "cat", AGENT))["processes"]
    (address,) = (each["network"]["addresses"][0] for each in services if each["name"] == "api")
    for each in (one, two):
        unit = ("systemd-run", "--quiet", "--unit=knock", "--service-type=notify")
        must(each, *unit, "python3", KNOCK, address, "8080", KNOCKS)
    refused = [must(each, "head", "-n", "1", KNOCKS).split()[-1] for each in (one, two)]

    lab.say("node1 reboots")
    journals = journal(one, OUR_UNITS)
    one.reboot()
    one.until_booted(DEADLINE_S)
    lab.say("node1 has booted")
    before = answered(two, "web", "api")
    until("web calls api again", lambda: answered(two, "web", "api") >= before + 20)
    until("either agent sees it", lambda: ("web", "api", "mesh") in flows(one) & flows(two))
    knocks = Counter(line.split()[-1] for line in must(two, "cat", KNOCKS).splitlines())
    lab.say("the lab is well again")
    journals += [*journal(one, OUR_UNITS), *journal(two, OUR_UNITS)]
    return Seen(active, legacy, ready, alone, strict, refused, knocks, journals)


def journal(one: Told, *chosen: str) -> list[str]:
    """What was said on a machine in this boot, by everything or by some units."""
    command = ("journalctl", "--boot", "--no-pager", "--output=cat", *chosen)
    return one.order(*command).output.splitlines()


def test_the_first_machine_comes_up_while_there_is_no_second_one(seen: Seen) -> None:
    assert set(seen.active.split()) == {"active"}


def test_a_caller_in_plaintext_on_the_other_machine_is_named(seen: Seen) -> None:
    assert seen.legacy.status == 1
    assert "legacy" in seen.legacy.output


def test_a_verdict_needs_the_evidence_of_the_machine_that_the_service_is_on(seen: Seen) -> None:
    assert seen.ready.status == 0, seen.ready.output
    assert seen.alone.status == 2
    assert "node2" in seen.alone.output


def test_a_service_that_went_strict_refuses_plaintext_from_either_machine(seen: Seen) -> None:
    assert seen.strict.status == 0, seen.strict.output
    assert "answered" not in seen.refused


def test_nothing_reached_the_service_in_plaintext_while_its_machine_rebooted(seen: Seen) -> None:
    assert "answered" not in seen.knocks
    assert seen.knocks["TimeoutError"], "it was never away"
    assert seen.knocks["ended"], "its sidecar never refused anything"


def test_no_unit_was_denied_what_it_needs(seen: Seen) -> None:
    assert not [line for line in seen.journals if FAULTS.search(line)]
