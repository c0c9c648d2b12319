"""A lab on several machines: what each of them is given is what agents, servers and systemd take."""

import os
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import yaml

from tidegate.catalog.settings import ServerConfig
from tidegate.intent.entries import parse_entries
from tidegate.lab import machine
from tidegate.lab.spec import load
from tidegate.lab.traffic import AppConfig
from tidegate.workloads.processes.settings import ProcessConfig, check

DEMO = Path(machine.__file__).parent / "demo.yaml"
AT = ("--at", "node1=192.168.56.11", "--at", "node2=192.168.56.12")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="files are given to the applications' user"
)


@pytest.fixture
def machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, tuple[Path, list[str]]]:
    """By node: where its files are, and the units that are to be started."""
    made = {}
    for node in ("node1", "node2"):
        root = tmp_path / node
        apps = root / "etc/tidegate/lab"
        apps.mkdir(parents=True)
        for file in ("pay.crt", "pay.key"):
            (apps / file).write_text(f"the {file}")
        assert machine.main([str(DEMO), "--node", node, *AT, "--root", str(root)]) == 0
        made[node] = root, capsys.readouterr().out.split()
    return made


def processes(root: Path) -> dict[str, ProcessConfig]:
    agent = yaml.safe_load((root / "etc/tidegate/agent.yaml").read_text())
    found = msgspec.convert(agent["processes"], tuple[ProcessConfig, ...])
    check(found)
    return {one.workload_name: one for one in found}


def test_every_pod_of_the_lab_is_a_service_of_its_nodes_machine(
    machines: dict[str, tuple[Path, list[str]]],
) -> None:
    spec = load(DEMO)
    for node, (root, units) in machines.items():
        pods = {pod.name: pod for pod in spec.pods if pod.node == node}
        found = processes(root)
        assert found.keys() == pods.keys()
        for name, one in found.items():
            pod = pods[name]
            assert (one.service, one.port, one.meshed) == (pod.service, pod.port, pod.mesh)
            assert one.annotations == pod.annotations
            unit = root / f"etc/systemd/system/{name}.service"
            (config,) = re.findall(r"tidegate.lab.traffic (\S+)", unit.read_text())
            app = msgspec.json.decode((root / config.lstrip("/")).read_bytes(), type=AppConfig)
            assert app.pod == name
            assert f"{name}.service" in units


def test_a_call_goes_to_the_address_that_the_other_machine_gives_its_service(
    machines: dict[str, tuple[Path, list[str]]],
) -> None:
    (root, _), (other, _) = machines["node1"], machines["node2"]
    text = (root / "etc/tidegate/lab/tlsonly.json").read_bytes()
    (call,) = msgspec.json.decode(text, type=AppConfig).calls
    network = processes(other)["pay"].network
    assert network is not None
    assert call.addresses == network.addresses
    assert call.trusted_certificates == "the pay.crt"
    routes = (root / "etc/systemd/system/tidegate-lab-routes.service").read_text()
    way = f"{call.addresses[0].rpartition('.')[0]}.0/24 via 192.168.56.12\n"
    assert f"ExecStart=/usr/sbin/ip route replace {way}" in routes


def test_the_first_machine_has_the_server_and_all_entries_and_both_agents_ask_it(
    machines: dict[str, tuple[Path, list[str]]],
) -> None:
    root, units = machines["node1"]
    server = msgspec.yaml.decode(
        (root / "etc/tidegate/server.yaml").read_bytes(),
        type=ServerConfig,
        dec_hook=lambda kind, text: kind(text),
    )
    assert units.index("tidegate-server.service") < units.index("tidegate-agent.service")
    assert "tidegate-server.service" not in machines["node2"][1]
    file = root / "etc/tidegate/lab/entries.json"
    entries = parse_entries(file.read_text(), file.name)
    assert [entry.kind for entry in entries][:2] == ["mesh", "service-defaults"]
    assert len(entries) == len(load(DEMO).config)
    for place, _ in machines.values():
        agent = yaml.safe_load((place / "etc/tidegate/agent.yaml").read_text())
        assert agent["server"] in server.listens
        assert agent["peers"] == f"{agent['node_addresses'][0]}:20201"


def test_entries_that_the_file_had_before_are_not_written_again(
    machines: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    root, _ = machines["node1"]
    entries = root / "etc/tidegate/lab/entries.json"
    shutil.copy(DEMO, entries.with_name("lab.yaml"))
    assert machine.main([str(DEMO), "--node", "node1", *AT, "--root", str(root)]) == 0
    assert not entries.exists()
    changed = tmp_path / "lab.yaml"
    changed.write_text(
        DEMO.read_text().replace("{Name: web, Action: allow}", "{Name: web, Action: deny}")
    )
    assert machine.main([str(changed), "--node", "node1", *AT, "--root", str(root)]) == 0
    (entry,) = parse_entries(entries.read_text(), entries.name)
    assert (entry.kind, entry.name) == ("service-intentions", "api")


def test_a_pod_that_would_replace_a_service_of_the_system_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    (units / "api.service").write_text("")
    assert machine.main([str(DEMO), "--node", "node1", *AT, "--root", str(tmp_path)]) == 2
    assert "this machine has api.service already" in capsys.readouterr().err
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--node", "node3", *AT), "'node3' is no node"),
        (("--node", "node1", *AT[:2]), "where is node2?"),
    ],
)
def test_a_machine_that_the_lab_does_not_have_is_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine.main([str(DEMO), *arguments, "--root", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_drop_in_is_that_of_the_units_of_services(
    machines: dict[str, tuple[Path, list[str]]],
) -> None:
    root, _ = machines["node1"]
    repository = Path(__file__).parent.parent.parent
    published = (repository / "systemd/tidegate-sidecar.conf").read_text()
    written = (root / "etc/systemd/system/api.service.d/tidegate.conf").read_text()
    said = [line for line in published.splitlines() if line and not line.startswith("#")]
    assert written.splitlines() == said
    shutil.rmtree(root)
