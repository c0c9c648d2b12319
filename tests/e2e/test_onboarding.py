"""docs/onboarding.md, section by section, with its own commands: a whole mesh is onboarded under load.

Each test goes on where the one before it ended. Beside the document's services there is one that speaks first and one
caller that turns to TLS midway, so that callers of every class come along. No request may fail, except where
strict mode is meant to refuse one.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from labs import Lab, eventually, lab_up, start, tidegate

from tidegate.catalog.client import CatalogClient
from tidegate.intent.entries import Kind
from tidegate.lab import runtime
from tidegate.node.client import AgentClient

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/onboarding.md"
FILE = ROOT / "docs/onboarding.yaml"
NAME = "onboarding"
MAIL = 2525
EXTRA_PODS = f"""
  - name: mail
    node: node2
    port: {MAIL}
  - name: sender
    node: node1
  - name: secure
    node: node1
"""
SERVICES = ("orders", "stock", "pay", "mail")
EDGES = {
    ("stock", "orders"),
    ("orders", "stock"),
    ("web", "orders"),
    ("legacy", "stock"),
    ("till", "pay"),
    ("sender", "mail"),
    ("secure", "mail"),
}
CLASSES = (
    ("web", "orders", "plaintext"),
    ("till", "pay", "tls"),
    ("sender", "mail", "server-first"),
    ("secure", "mail", "starttls"),
)


class Speakers:
    """The mail server and its two callers, in their pods."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        certificate, key = self._directory / "mail.pem", self._directory / "mail.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-subj", "/CN=mail", "-keyout", key, "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        self._run("mail", "serve", str(MAIL), str(certificate), str(key))
        for pod, kind in (("sender", "plain"), ("secure", "starttls")):
            self._run(pod, "call", "mail", str(MAIL), kind, str(self._directory / pod))

    def _run(self, pod: str, *words: str) -> None:
        script = [sys.executable, str(Path(__file__).with_name("protocols.py")), *words]
        command = [sys.executable, "-m", "tidegate.cli.main", "lab", "exec", "--lab", NAME, pod]
        self._processes.append(subprocess.Popen([*command, "--", *script]))

    def answered(self, pod: str) -> int:
        return self._counts(pod)[0]

    def failures(self) -> list[str]:
        counted = {pod: self._counts(pod) for pod in ("sender", "secure")}
        return [
            f"{pod}: {count[1]} failed, {count[2]}" for pod, count in counted.items() if count[1]
        ]

    def _counts(self, pod: str) -> tuple[int, int, str]:
        try:
            counts, why = (self._directory / pod).read_text().splitlines()
        except FileNotFoundError:
            return 0, 0, ""
        ok, failed = counts.split()
        return int(ok), int(failed), why

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
            process.wait(timeout=10)


class Mesh(Lab):
    """The lab, the document's commands in it, and everybody who calls."""

    def __init__(self, file: Path, speakers: Speakers) -> None:
        super().__init__(NAME)
        self._file = file
        self._before: list[str] = []
        self.speakers = speakers

    def follow(self, section: int, **exit_codes: int) -> dict[str, str]:
        """Runs the commands of a section; what each printed. `exit_codes` of those that end with another than 0."""
        printed = {}
        for line in commands(section):
            runnable = line.replace("sudo ", "").replace(
                ".venv/bin/", f"{Path(sys.executable).parent}/"
            )
            done = subprocess.run(
                ["/bin/bash", "-o", "pipefail", "-c", runnable.replace("docs/onboarding.yaml", str(self._file))],
                cwd=ROOT,
                env={**os.environ, "TIDEGATE_LAB": NAME},
                text=True,
                capture_output=True,
                timeout=120,
                check=False,
            )  # fmt: skip
            command = line.split("tidegate ", 1)[1]
            allowed = next(
                (code for words, code in exit_codes.items() if words in command.replace(" ", "_")),
                0,
            )
            assert done.returncode == allowed, f"{line}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr, done.stderr
            printed[command] = done.stdout
        return printed

    def failed(self) -> list[str]:
        """Whose requests failed since `begin`."""
        counted = [*self.failures(), *self.speakers.failures()]
        return [told for told in counted if told not in self._before]

    def begin(self) -> None:
        """From now on no request may fail; of two that call each other one is there before the other."""
        self._have_told()
        eventually(
            lambda: all(
                target["ok"]
                for one in self._statistics()
                for target in one["targets"]
                if (one["pod"], target["target"]) in EDGES
            ),
            "everybody to be answered",
        )
        self._have_told()
        self._before = self.failed()

    def _have_told(self) -> None:
        now = time.time()
        eventually(
            lambda: all(one["written_at"] > now for one in self._statistics()),
            "everybody to have told what happened until now",
        )

    def _statistics(self) -> list[dict[str, Any]]:
        return [pod["statistics"] for pod in self.status()["pods"] if pod["statistics"]]

    def status(self) -> Any:
        return msgspec.to_builtins(runtime.status(self.name))

    def ask(self, path: str, **query: str) -> Any:
        """What the first node's agent answers, without a command being started each time."""

        async def asked() -> Any:
            async with AgentClient(f"unix://{self.root}/nodes/node1/agent.sock") as agent:
                return await agent.get(path, **query)

        return asyncio.run(asked())

    def classes(self, caller: str, service: str) -> set[str]:
        """How one calls the other of late; connections without payload left out."""
        return {
            row["class"]
            for row in self.ask("/v1/flows", window="3")["flows"]
            if (row["caller"]["workload"], row["server"]["workload"]) == (caller, service)
            and row["class"] != "empty"
        }

    def onboarding(self) -> dict[str, Any]:
        """What `onboard status` says, services by name."""
        answer = self.ask("/v1/onboard/status")
        return answer | {"services": {one["service"]: one for one in answer["services"]}}

    def mode(self, service: str) -> str:
        return str(self.onboarding()["services"][service]["mode"])

    def intentions(self) -> set[tuple[str, str]]:
        """Who may call whom, by the entries."""

        async def read() -> set[tuple[str, str]]:
            async with CatalogClient(f"unix://{self.root}/server.sock") as catalog:
                entries = await catalog.read_entries(Kind.SERVICE_INTENTIONS)
            return {(source.name, entry.name) for entry in entries for source in entry.sources}

        return asyncio.run(read())


def commands(section: int) -> list[str]:
    [text] = re.findall(rf"^## {section}\. .*?(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S)
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    directory = tmp_path_factory.mktemp("onboarding")
    file = directory / "lab.yaml"
    file.write_text(FILE.read_text().replace("\nconfig:\n", f"{EXTRA_PODS}\nconfig:\n"))
    speakers = Speakers(directory)
    with lab_up(NAME, file):
        try:
            speakers.start()
            yield Mesh(file, speakers)
        finally:
            speakers.stop()


def test_1_at_a_glance_it_shows_who_stands_where_and_what_to_do(mesh: Mesh) -> None:
    def everybody_calls() -> bool:
        rows = mesh.ask("/v1/flows")["flows"]
        seen = {(row["caller"]["workload"], row["server"]["workload"]) for row in rows}
        return seen >= EDGES

    eventually(everybody_calls, "everybody to call")
    for speaker in ("sender", "secure"):
        eventually(lambda one=speaker: mesh.speakers.answered(one), f"{speaker} to be answered")
    mesh.begin()
    for caller, service, flow_class in CLASSES:
        eventually(
            lambda ends=(caller, service), one=flow_class: one in mesh.classes(*ends),
            f"{caller} to be seen calling {service}: {flow_class}",
        )
    printed = mesh.follow(1, onboard_status=1)
    status = next(text for command, text in printed.items() if command == "onboard status")
    assert "permissive mode is not allowed" in status
    plan = printed["onboard plan orders stock pay"]
    assert "orders and stock call each other in a circle" in plan
    assert plan.count("next        Configure global settings") == 3
    answer = mesh.onboarding()
    assert set(answer["services"]) >= {*SERVICES, "web", "legacy", "till", "nightly"}
    assert len(answer["next_steps"]) == 3
    assert all(step["commands"] for step in answer["next_steps"])


def test_2_and_3_services_become_permissive_only_once_the_mesh_allows_it(mesh: Mesh) -> None:
    refused = mesh.run("permissive", "orders")
    assert refused.returncode == 1
    [opening] = re.findall(r"`(echo .*?)` opens it", refused.stdout)
    assert "AllowEnablingPermissiveMutualTLS" in opening
    mesh.follow(2)
    mesh.follow(3)
    assert mesh.run("permissive", "mail").returncode == 0
    assert {mesh.mode(service) for service in SERVICES} == {"permissive"}
    unknown = mesh.run("permissive", "order")
    assert unknown.returncode == 2
    assert "did you mean orders?" in unknown.stderr


def test_4_the_suggested_intentions_are_exactly_who_was_seen(mesh: Mesh) -> None:
    mesh.follow(4)
    assert mesh.intentions() == EDGES
    assert "no intention is missing" in mesh.run("intentions", "suggest").stdout


def test_5_services_get_their_sidecars_while_they_are_called(mesh: Mesh) -> None:
    mesh.follow(5, onboard_status=1)
    assert mesh.run("lab", "onboard", "mail").returncode == 0
    eventually(
        lambda: mesh.classes("orders", "stock") == mesh.classes("stock", "orders") == {"mesh"},
        "orders and stock to use the mesh both ways",
    )
    eventually(lambda: mesh.classes("web", "orders") == {"mesh"}, "web to use the mesh")

    def in_mesh() -> bool:
        services = mesh.onboarding()["services"]
        return all(services[name]["meshed"] == services[name]["instances"] for name in SERVICES)

    eventually(in_mesh, "every service to be in the mesh")
    assert mesh.failed() == []


def test_6_the_downstreams_that_still_send_plaintext_are_named_and_onboarded(mesh: Mesh) -> None:
    services = mesh.onboarding()["services"]
    left = {
        (one["name"], service): set(one["classes"])
        for service in SERVICES
        for one in services[service]["downstreams"]
        if one["blocks"] and not one["onboarded"]
    }
    assert set(left) == {
        ("legacy", "stock"),
        ("till", "pay"),
        ("sender", "mail"),
        ("secure", "mail"),
    }
    assert left["till", "pay"] == {"tls"}
    assert "starttls" in left["secure", "mail"]
    printed = mesh.follow(6, ready=1)
    plan = printed["onboard plan stock pay"]
    assert "legacy (plaintext) is not in the mesh, has an intention" in plan
    assert "till (tls) is not in the mesh, has an intention" in plan
    assert "legacy" in printed["ready stock"]
    [first, *_] = mesh.onboarding()["next_steps"]
    assert first["moves"], "the first step brings somebody further"
    assert mesh.run("lab", "onboard", "sender", "secure").returncode == 0
    for caller, service in sorted(EDGES):
        eventually(
            lambda ends=(caller, service): mesh.classes(*ends) == {"mesh"},
            f"{caller} to call {service} through the mesh",
        )
    assert mesh.failed() == []


def test_7_they_go_strict_one_by_one_under_guard(mesh: Mesh) -> None:
    printed = mesh.follow(7)
    assert printed["ready --wait 60s"].count("READY") >= len(SERVICES)
    for service in ("orders", "stock", "pay"):
        assert (
            f"{service} is strict; no known caller was refused"
            in printed[f"strict {service} --guard 2s"]
        )
    assert mesh.run("strict", "mail", "--guard", "1s").returncode == 0
    assert {mesh.mode(service) for service in SERVICES} == {"strict"}
    assert (
        mesh.exec("outside", "curl", "-sS", "--max-time", "3", "http://stock:8080/").returncode != 0
    )
    assert mesh.failed() == []


def test_7_a_guard_rolls_back_also_after_its_agent_was_killed_in_between(mesh: Mesh) -> None:
    assert mesh.run("permissive", "pay").returncode == 0
    mesh.json("ready", "pay", "--wait", "40s")
    flip = start("strict", "--lab", mesh.name, "pay", "--guard", "5m", "--json")
    eventually(lambda: mesh.pod("pay")["agent"]["mode"] == "strict", "strict mode")
    guards = mesh.root / "nodes/node1/state/guards/pay.json"
    eventually(lambda: json.loads(guards.read_bytes())["enforced_at"], "the guard to watch")
    agent = mesh.agent("node1")
    agent.send_signal(signal.SIGKILL)
    psutil.wait_procs([agent], timeout=10)
    flip.communicate(timeout=30)
    assert flip.returncode == 2, (
        "whoever waits is told that its agent is gone, not that it rolled back"
    )
    refused = mesh.exec("nightly", "curl", "-skS", "--max-time", "3", "https://pay:8443/")
    assert refused.returncode != 0
    assert tidegate("lab", "up", "--lab", mesh.name).returncode == 0
    eventually(lambda: mesh.mode("pay") == "permissive", "the next agent to roll back")
    eventually(lambda: not guards.exists(), "the guard to be over")
    services = mesh.ask("/v1/onboard/status", window="600")["services"]
    [nightly] = [
        one
        for service in services
        if service["service"] == "pay"
        for one in service["downstreams"]
        if one["name"] == "nightly"
    ]
    assert (nightly["blocks"], nightly["onboarded"], nightly["permission"]) == (
        True,
        False,
        "missing",
    )
    suggest = ("intentions", "suggest", "pay", "--all-callers", "--window", "10m", "--write")
    assert mesh.run(*suggest).returncode == 0
    assert ("nightly", "pay") in mesh.intentions()
    assert mesh.failed() == []


def test_8_the_mesh_is_re_secured_once_nothing_would_break(mesh: Mesh) -> None:
    kept = mesh.run("resecure")
    assert kept.returncode == 1, kept.stdout
    assert "service-defaults/pay is permissive" in kept.stdout
    calling_out = mesh.exec("till", "curl", "-sS", "--max-time", "3", "http://legacy:1/")
    assert calling_out.returncode != 0, "nothing answers there"
    plaintext = "till calls legacy:1"
    eventually(lambda: plaintext in mesh.run("resecure").stdout, "resecure to name who would fail")
    eventually(lambda: plaintext not in mesh.run("resecure").stdout, "the window to have passed")
    mesh.json("ready", "pay", "--wait", "40s")
    assert mesh.run("strict", "pay", "--guard", "1s").returncode == 0
    assert mesh.run("lab", "onboard", "nightly").returncode == 0
    eventually(lambda: mesh.pod("nightly")["agent"]["meshed"], "nightly to be in the mesh")
    printed = mesh.follow(8)
    proof = next(text for command, text in printed.items() if command == "resecure")
    assert "the mesh is secure" in proof
    assert "default/default: service-defaults and registrations:" in proof
    listed = next(text for command, text in printed.items() if command.startswith("config list"))
    assert listed == "", "nobody is permissive"
    refused = mesh.run("permissive", "pay")
    assert refused.returncode == 1
    answered = {pod: mesh.answered(pod) for pod in ("orders", "stock", "web", "legacy", "till")}
    eventually(
        lambda: all(mesh.answered(pod) > count for pod, count in answered.items()),
        "everybody to be answered in the mesh that is secure",
    )
    assert mesh.failed() == []


def test_9_nothing_is_left(mesh: Mesh) -> None:
    mesh.speakers.stop()
    mesh.follow(9)
    assert not mesh.root.exists()
