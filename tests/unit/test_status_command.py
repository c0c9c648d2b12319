"""`tidegate status` as a person, a script and a probe meet it."""

import json
import os
import threading

import pytest

from tidegate.cli import status, target
from tidegate.cli.main import main
from tidegate.lab import state
from tidegate.node.client import AgentRefused, AgentUnreachable

WEB = {
    "id": "1", "name": "web-1", "service": "web", "namespace": "default", "netns": "/run/netns/web",
    "wanted_in_mesh": True, "meshed": True, "redirect": "ok", "sidecar": "tidegate",
    "state": "running", "mode": "permissive", "observed_since": 1.0, "repairs": 0,
    "last_repair": "", "notes": [], "reason": "", "problem": "", "something": "later",
}  # fmt: skip
JOB = {
    **WEB, "id": "2", "name": "job", "service": "job", "namespace": "batch", "wanted_in_mesh": False,
    "meshed": False, "redirect": "none", "state": "", "mode": "", "reason": "it has no sidecar",
}  # fmt: skip
LEFT = {
    "origin": "kubernetes", "id": "3", "name": "proxy-x", "namespace": "kube-system",
    "treatment": "host-network", "reason": "it shares the node's network namespace",
}  # fmt: skip
LOST = {**LEFT, "name": "lost", "treatment": "not-found", "reason": "no process of it was found"}


def node(*workloads, left=(), problems=(), round_at=5.0):
    return {
        "node": "n1",
        "trust_domain": "t.example",
        "round_at": round_at,
        "workloads": list(workloads),
        "left_alone": list(left),
        "problems": list(problems),
    }


READY = {"verdicts": [{"service": "web", "verdict": "NOT READY", "reasons": []}]}


class Agents:
    """Stand for the agents: by path, an answer, an exception, or several answers one after the other."""

    def __init__(self, monkeypatch, tmp_path):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.delenv("TIDEGATE_LAB", raising=False)
        monkeypatch.delenv("TIDEGATE_SOCKET", raising=False)
        monkeypatch.setattr(state, "BASE", tmp_path)
        monkeypatch.setattr(target, "AGENT_SOCKET", tmp_path / "agent.sock")
        (tmp_path / "agent.sock").touch()
        monkeypatch.setattr(status, "AgentClient", self.client)
        self.answers = {"/v1/status": node(WEB), "/v1/ready": READY, "/healthz": {}}
        self.socket = tmp_path / "agent.sock"
        self.asked = []

    def client(self, address, timeout_s=30.0):
        agents = self

        class Client:
            async def __aenter__(self):
                return self

            async def __aexit__(self, *_):
                pass

            async def get(self, path):
                agents.asked.append(path)
                answer = agents.answers[path]
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if isinstance(answer, Exception):
                    raise answer
                return answer

        return Client()


@pytest.fixture
def agents(monkeypatch, tmp_path):
    return Agents(monkeypatch, tmp_path)


@pytest.fixture
def shown(agents, capsys):
    """Exit code and lines of what is printed when the agent answers this."""

    def show(answer, *options):
        agents.answers["/v1/status"] = answer
        code = main(["status", *options])
        return code, capsys.readouterr().out.splitlines()

    return show


def test_each_workload_is_one_line_in_order(shown):
    code, lines = shown(node(WEB, JOB))
    assert code == 0
    assert lines[0].startswith("node n1: looked at ")
    assert lines[1].split() == [
        "workload", "service", "redirect", "observed", "sidecar", "mode", "verdict",
    ]  # fmt: skip
    batch, web = lines[2], lines[3]
    assert batch.split()[:3] == ["batch/job", "job", "none"]
    assert batch.split()[-3:] == ["-", "-", "-"]
    assert web.split()[:3] == ["web-1", "web", "ok"]
    assert web.split()[-4:] == ["running", "permissive", "NOT", "READY"]
    assert lines[4:] == ["batch/job: not in the mesh: it has no sidecar"]


def test_what_is_left_alone_is_told_with_its_reason(shown):
    code, lines = shown(node(WEB, left=(LEFT,)))
    assert code == 0
    said = "left alone: kube-system/proxy-x: host-network: it shares the node's network namespace"
    assert lines[-1] == said


def test_of_many_workloads_what_is_the_same_is_said_once_and_what_is_wrong_last(shown):
    jobs = [{**JOB, "id": f"j{n}", "name": f"job-{n}"} for n in range(240)]
    wrong = {**WEB, "redirect": "drifted", "problem": "the rules are gone"}
    proxies = [{**LEFT, "name": f"proxy-{n}"} for n in range(9)]
    code, lines = shown(node(wrong, *jobs, left=(*proxies, LOST), problems=("the disk is full",)))
    assert code == 1
    assert lines[0].endswith("; 241 workloads: 240 none, 1 drifted")
    assert lines[2 + 241 :] == [
        "240 of them: not in the mesh: it has no sidecar",
        "left alone: 9 of them: host-network: it shares the node's network namespace",
        "web-1: the rules are gone",
        "left alone: kube-system/lost: not-found: no process of it was found",
        "problem: the disk is full",
    ]


def test_a_narrow_terminal_breaks_no_line_of_a_workload(shown, monkeypatch):
    monkeypatch.setattr(status.tables, "PLAIN_WIDTH", 40)
    _, lines = shown(node(*({**WEB, "id": str(n), "name": f"web-{n}"} for n in range(3))))
    assert [line.split()[0] for line in lines[2:]] == ["web-0", "web-1", "web-2"]


def test_what_runs_and_was_not_found_is_wrong(shown):
    code, lines = shown(node(WEB, left=(LOST,)))
    assert (code, lines[-1]) == (
        1,
        "left alone: kube-system/lost: not-found: no process of it was found",
    )


@pytest.mark.parametrize("redirect", ["drifted", "blocked", "failed"])
def test_a_redirection_that_is_not_as_it_should_be_is_wrong(shown, redirect):
    code, lines = shown(node({**WEB, "redirect": redirect}))
    assert code == 1
    assert lines[2].split()[2] == redirect


@pytest.mark.parametrize("redirect", ["ok", "none", "waiting", "a-word-of-later"])
def test_other_redirections_are_not(shown, redirect):
    assert shown(node({**WEB, "redirect": redirect}))[0] == 0


def test_a_workloads_problem_is_told_by_name_and_is_wrong(shown):
    code, lines = shown(node({**WEB, "problem": "its sidecar is away"}))
    assert (code, lines[-1]) == (1, "web-1: its sidecar is away")


def test_an_agents_problem_is_told_and_is_wrong(shown):
    code, lines = shown(node(problems=("the disk is full",)))
    assert (code, lines[-2:]) == (1, ["no workloads", "problem: the disk is full"])


def test_repairs_and_ways_around_the_sidecar_are_told_and_are_not_wrong(shown):
    said = {"repairs": 2, "last_repair": "a rule was gone", "notes": ["IPv6 goes around"]}
    code, lines = shown(node({**WEB, **said}))
    assert code == 0
    assert lines[-2:] == [
        "web-1: its redirection was changed and put back 2 times; the last time: a rule was gone",
        "web-1: IPv6 goes around",
    ]


def test_a_sidecar_of_its_own_is_told_so(shown):
    _, lines = shown(node({**WEB, "sidecar": "own", "state": ""}))
    assert " its own " in lines[2]


def test_a_workload_that_is_not_observed_is_told_so(shown):
    _, lines = shown(node({**WEB, "observed_since": 0.0}))
    assert lines[2].split()[3] == "no"


def test_an_agent_that_has_not_looked_around_is_neither_well_nor_unwell(shown):
    code, lines = shown(node(round_at=0.0))
    assert (code, lines[0]) == (2, "node n1: the agent has not looked around yet")


def test_without_the_rest_of_the_mesh_only_the_verdicts_are_missing(agents, shown):
    agents.answers["/v1/ready"] = AgentRefused("node n2 does not answer", 1)
    code, lines = shown(node(WEB))
    assert code == 0
    assert lines[2].split()[-2:] == ["permissive", "-"]


def test_an_agent_that_does_not_answer_is_one_sentence_and_exit_code_2(agents, capsys):
    agents.answers["/v1/status"] = AgentUnreachable("no agent answers at unix:///x (refused)")
    assert main(["status"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "tidegate: no agent answers at unix:///x (refused)\n"


def test_an_answer_of_another_version_is_one_sentence(agents, capsys):
    agents.answers["/v1/status"] = {"node": "n1"}
    assert main(["status"]) == 2
    assert "answers in a way that this command does not know" in capsys.readouterr().err


def test_without_an_agent_it_says_so_and_exits_2(agents, capsys):
    agents.socket.unlink()
    assert main(["status"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tidegate: no agent runs here: there is no {agents.socket}")


def test_whoever_is_not_root_is_told_so(agents, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["status"]) == 2
    assert capsys.readouterr().err.startswith("tidegate: this needs root: ")


def test_json_says_the_same_as_one_object(shown):
    code, lines = shown(node(WEB, left=(LEFT,), problems=("x",)), "--json")
    said = json.loads("\n".join(lines))
    assert said["exit_code"] == code == 1
    (one,) = said["nodes"]
    assert one["problems"] == ["x"]
    assert one["left_alone"][0]["treatment"] == "host-network"
    (workload,) = one["workloads"]
    assert (workload["redirect"], workload["verdict"]) == ("ok", "NOT READY")


# As a probe


@pytest.mark.parametrize("answer", [node({**WEB, "problem": "x"}), node(round_at=0.0)])
def test_a_probe_is_not_about_workloads(agents, shown, answer):
    assert shown(answer, "--quiet") == (0, [])
    assert agents.asked == ["/healthz"]


@pytest.mark.parametrize(
    "failure",
    [AgentRefused("no round has ended for 61 s", 2), AgentUnreachable("no agent answers")],
)
def test_a_probe_of_an_agent_that_does_not_live_fails_and_says_why(agents, capsys, failure):
    agents.answers["/healthz"] = failure
    assert main(["status", "--quiet"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"tidegate: {failure}\n")


# Watching


class _Looks:
    """Ends the watch after so many looks."""

    def __init__(self, monkeypatch, looks):
        monkeypatch.setattr(status, "REFRESH_S", 0.0)
        self.left = looks
        monkeypatch.setattr(threading.Event, "wait", self.wait)

    def wait(self, _timeout=None):
        self.left -= 1
        return self.left == 0


def test_watching_prints_again_only_when_something_has_changed(agents, monkeypatch, capsys):
    waits = node(problems=("intent is 5 s old",), round_at=5.0)
    still = node(problems=("intent is 6 s old",), round_at=6.0)
    agents.answers["/v1/status"] = [node(WEB), node(WEB, round_at=6.0), waits, still]
    _Looks(monkeypatch, 4)
    assert main(["status", "--watch", "--json"]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["exit_code"] for one in told] == [0, 1]


def test_watching_goes_on_while_the_agent_is_away(agents, monkeypatch, capsys):
    agents.answers["/v1/status"] = [node(WEB), AgentUnreachable("no agent answers"), node(WEB)]
    _Looks(monkeypatch, 3)
    assert main(["status", "--watch"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "tidegate: no agent answers\n"
    assert printed.out.count("node n1") == 2
