"""The units of systemd/: systemd understands them, and what they may do is what docs/systemd.md explains."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
SYSTEMD = REPOSITORY / "systemd"
UNITS = ("tidegate-agent.service", "tidegate-server.service", "tidegate-sidecar@.service")
MOST_EXPOSED = {
    "tidegate-agent.service": 35,
    "tidegate-server.service": 16,
    "tidegate-sidecar@.service": 42,
}
"""In tenths, as `systemd-analyze security` counts."""

analyzes = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )


@analyzes
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    units = tmp_path / "etc/systemd/system"
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    units.mkdir(parents=True)
    for program in ("opt/tidegate/bin/tidegate", "bin/kill", "bin/mkdir", "bin/web"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch(mode=0o755)
    for unit in UNITS:
        shutil.copy(SYSTEMD / unit, units)
    (units / "web.service").write_text("[Service]\nExecStart=/bin/web\n")
    (units / "web.service.d").mkdir()
    shutil.copy(SYSTEMD / "tidegate-sidecar.conf", units / "web.service.d")
    names = [*UNITS[:2], "tidegate-sidecar@web.service", "web.service"]
    verified = analyze("verify", "--man=no", f"--root={tmp_path}", *names)
    assert (verified.returncode, verified.stderr) == (0, "")


@analyzes
@pytest.mark.parametrize("unit", UNITS)
def test_no_unit_is_more_exposed_than_it_has_to_be(unit: str) -> None:
    most = MOST_EXPOSED[unit]
    judged = analyze("security", "--offline=true", f"--threshold={most}", SYSTEMD / unit)
    assert judged.returncode == 0, judged.stdout


@analyzes
@pytest.mark.parametrize("unit", UNITS[::2])
def test_whatever_an_exposed_unit_may_do_is_explained(unit: str) -> None:
    judged = analyze("security", "--offline=true", "--json=short", SYSTEMD / unit)
    column = 1 if "agent" in unit else 2
    found = {each["name"] for each in json.loads(judged.stdout) if each["set"] is False}
    explained = set()
    for line in (REPOSITORY / "docs/systemd.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[column]:
            explained |= {name.replace("\\|", "|") for name in re.findall(r"`([^`]+)`", cells[0])}
    assert found - explained == set()


def test_scripts_are_of_the_shell_that_every_machine_has() -> None:
    for script in SYSTEMD.glob("*.sh"):
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/bin/sh\n")
        subprocess.run(["/bin/sh", "-n", script], check=True)


def test_the_sidecars_user_is_the_one_that_rules_know() -> None:
    from tidegate.model import DEFAULT_PROXY_UID

    assert f" {DEFAULT_PROXY_UID} " in (SYSTEMD / "tidegate.sysusers.conf").read_text()


def test_a_sidecar_may_open_as_many_files_as_it_needs() -> None:
    from tidegate.enforce.sidecar.render import FILE_DESCRIPTORS

    unit = (SYSTEMD / "tidegate-agent.service").read_text()
    (limit,) = re.findall(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)
    assert int(limit) >= FILE_DESCRIPTORS


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")
def test_vagrant_understands_the_lab_of_two_machines(tmp_path: Path) -> None:
    told = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=REPOSITORY,
        env=os.environ
        | {"VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert {"node1", "node2"} <= set(re.findall(r"==> (\w+):", told.stdout))
    secrets = tmp_path / "dot/tidegate"
    assert {each.name for each in secrets.iterdir()} == {
        *("agent.token", "server.crt", "server.key", "pay.crt", "pay.key")
    }
    assert all(each.stat().st_mode & 0o077 == 0 for each in secrets.glob("*.[kt]*"))
