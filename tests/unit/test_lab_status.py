"""What `tidegate lab status` says of a lab, for people and for programs."""

import json
import os

import pytest

from tidegate.cli import target
from tidegate.cli.main import main
from tidegate.lab import runtime, state
from tidegate.lab.spec import AppKind
from tidegate.lab.state import LabStatus, NodeStatus, PodStatus, SidecarStatus

MESHED = {"meshed": True, "state": "running", "redirect": "ok", "observed_since": 1.0}
BLOCKED = {
    **MESHED,
    "meshed": False,
    "redirect": "blocked",
    "problem": "the kernel does not take it",
}


@pytest.fixture
def shown(monkeypatch, tmp_path, capsys):
    """Prints the status of a lab of one pod of which its agent says this."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("TIDEGATE_LAB", raising=False)
    monkeypatch.setattr(state, "BASE", tmp_path)
    monkeypatch.setattr(target, "AGENT_SOCKET", tmp_path / "agent.sock")
    (tmp_path / "demo").mkdir()

    def show(said, *options, mesh=True, answers=True, code=0):
        pod = PodStatus(
            name="web",
            node="n1",
            service="web",
            port=8080,
            namespace="tg-demo-web",
            addresses=("10.0.0.1",),
            mesh=mesh,
            app_kind=AppKind.HTTP,
            app_pid=7,
            app_alive=True,
            statistics=None,
            agent=None if said is None else SidecarStatus(**said),
        )
        node = NodeStatus(
            name="n1",
            namespace="tg-demo-n1",
            addresses=("10.0.0.9",),
            agent_pid=8,
            agent_alive=True,
            agent_answers=answers,
        )
        status = LabStatus(lab="demo", server_pid=9, server_alive=True, nodes=(node,), pods=(pod,))
        monkeypatch.setattr(runtime, "status", lambda _lab: status)
        assert main(["lab", "status", *options]) == code
        return capsys.readouterr().out

    return show


def remarks(out):
    """The lines behind the tables."""
    return [line for line in out.splitlines() if line.startswith("web: ")]


def test_where_all_is_well_there_are_no_remarks(shown):
    assert remarks(shown(MESHED)) == []
    assert remarks(shown(None)) == []


@pytest.mark.parametrize(("repairs", "times"), [(1, "once"), (3, "3 times")])
def test_repairs_are_told_with_what_was_different(shown, repairs, times):
    said = {**MESHED, "repairs": repairs, "last_repair": "table inet tidegate is missing"}
    assert remarks(shown(said)) == [
        f"web: its redirection was changed and put back {times}; "
        "the last time: table inet tidegate is missing"
    ]


def test_every_way_around_the_sidecar_is_told(shown):
    said = {**MESHED, "notes": ("IPv6 is off", "a listener is not transparent")}
    assert remarks(shown(said)) == ["web: IPv6 is off", "web: a listener is not transparent"]


def test_a_workload_that_is_blocked_says_so_with_the_reason(shown):
    out = shown(BLOCKED)
    assert remarks(out) == [
        "web: its redirection could not be applied: nothing of it passes until it can be"
    ]
    assert "the kernel does not take it" in " ".join(out.split())
    out = shown({**BLOCKED, "redirect": "failed"})
    assert remarks(out) == [
        "web: its redirection could not be applied: traffic goes around its sidecar"
    ]


def test_rules_of_another_mesh_are_told_with_the_sidecar(shown):
    problem = "Consul redirects in the nftables table inet consul_tproxy: CONSUL_PROXY_OUTPUT"
    out = shown({**MESHED, "problem": problem})
    assert f"running, {problem}" in " ".join(out.split())


def test_of_a_pod_that_is_to_have_no_sidecar_nothing_is_told(shown):
    assert remarks(shown({**MESHED, "notes": ("IPv6 is off",)}, mesh=False)) == []


def test_of_a_pod_whose_agent_does_not_answer_nothing_is_claimed(shown):
    for mesh in (True, False):
        out = " ".join(shown(None, mesh=mesh, answers=False, code=1).split())
        assert "not known, the agent of n1 does not answer" in out
    assert "wanted, the agent does not know it" in " ".join(shown(None).split())


def test_programs_get_everything(shown):
    said = {**BLOCKED, "repairs": 2, "last_repair": "x", "notes": ["y"]}
    [pod] = json.loads(shown(said, "--json"))["pods"]
    assert pod["agent"] == {"mode": "", "restarts": 0, **said}
