"""`onboard`, `intentions`, `permissive` and `resecure` as a person meets them: what they print, and how they exit."""

import json
import os

import pytest

from tidegate.cli import evidence, intentions, onboard
from tidegate.cli.main import main

CALLER = {
    "name": "legacy", "service": "legacy", "workloads": ["legacy-1"], "unmeshed": [{"workload": "legacy-1"}],
    "classes": ["plaintext", "mesh"], "connections": 5, "not_mesh": 3, "blocks": True, "passes_by": False,
    "onboarded": False, "permission": "missing", "last_seen": 1.0,
}  # fmt: skip
SERVICE = {
    "service": "api", "mode": "permissive", "mode_source": "service-defaults", "instances": 2, "meshed": 1,
    "connections": 8, "mesh_share": 0.625, "verdict": "NOT READY", "blocking": ["legacy"],
    "downstreams": [CALLER], "reasons": [{"message": "observed for 3 s of 8 s"}], "sidecar_problems": [],
}  # fmt: skip
STATUS = {
    "services": [SERVICE],
    "next_steps": [
        {"message": "Onboard legacy; nothing else blocks api", "commands": ["tidegate lab onboard legacy-1"]}
    ],
    "settings": [{"partition": "default", "gate_open": True, "mesh_destinations_only": False}],
    "problems": [],
    "window_s": 8.0,
    "at": 1.0,
}  # fmt: skip
DONE = {**SERVICE, "mode": "strict", "meshed": 2, "downstreams": [], "reasons": [], "blocking": []}
PLAN = {
    "services": [
        {
            "service": "api", "calls": ["db"], "called_by": ["legacy"],
            "steps": [
                {"title": "Configure intentions", "state": "done", "detail": "all have one", "commands": []},
                {"title": "Register", "state": "next", "detail": "0 of 1", "commands": ["do this"]},
            ],
        }
    ],
    "groups": [["api"]],
    "notes": [],
    "problems": [],
}  # fmt: skip
SUGGESTION = {
    "suggestion": {
        "destination": "api",
        "sources": [
            {"source": "web", "because": "mesh", "classes": ["mesh"], "connections": 4},
            {"source": "legacy", "because": "onboarding", "classes": ["plaintext"], "connections": 2},
        ],
    },
    "remarks": ["an intention denies bad, and it calls all the same"],
    "entry": {"Kind": "service-intentions", "Name": "api"},
    "written": False,
}  # fmt: skip


class Agent:
    """Answers as it is told; remembers what it was asked."""

    answer = None
    events = ()
    asked = None

    def __init__(self, _address):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def get(self, path, **query):
        Agent.asked = (path, query)
        return Agent.answer

    async def stream(self, path, body):
        Agent.asked = (path, body)
        for event in Agent.events:
            yield event


@pytest.fixture(autouse=True)
def agent(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for module in (evidence, intentions, onboard):
        monkeypatch.setattr(module, "AgentClient", Agent)
        monkeypatch.setattr(module, "agent_address", lambda _args: "unix:///a")


def run(capsys, *argv, answer=None, events=()):
    Agent.answer, Agent.events = answer, events
    code = main(list(argv))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_status_shows_each_service_who_blocks_it_and_what_to_do(capsys):
    code, out, _ = run(capsys, "onboard", "status", "--window", "1h", answer=STATUS)
    assert code == 1
    assert Agent.asked == ("/v1/onboard/status", {"window": "3600.0"})
    assert "permissive mode is allowed, the way out of the mesh is open" in out
    line = next(line for line in out.splitlines() if line.startswith("api"))
    assert line.split("  ")[0] == "api"
    assert {"permissive", "(service-defaults)", "1", "of", "2", "62%", "8", "NOT", "legacy"} <= {
        *line.split()
    }
    assert (
        "legacy -> api: 3 of 5 connections without mesh mTLS (plaintext), not in the mesh, no intention"
        in out
    )
    assert "api: observed for 3 s of 8 s" in out
    assert "1. Onboard legacy; nothing else blocks api\n   tidegate lab onboard legacy-1\n" in out


def test_the_status_exits_0_when_all_is_done_and_2_when_something_was_not_seen(capsys):
    done = {**STATUS, "services": [DONE], "next_steps": []}
    assert run(capsys, "onboard", "status", answer=done)[0] == 0
    code, out, err = run(
        capsys, "onboard", "status", answer={**done, "problems": ["n2 does not answer"]}
    )
    assert (code, err) == (2, "tidegate: n2 does not answer\n")
    assert "nothing to do now" in out


def test_a_rejected_configuration_stands_in_the_status_once_in_envoys_words(capsys):
    problem = {"workload": "api-1", "node": "n1", "problem": "refuses its configuration: bad"}
    said = {"message": "api-1: refuses its configuration: bad"}
    service = {**SERVICE, "sidecar_problems": [problem], "reasons": [said]}
    _, out, _ = run(capsys, "onboard", "status", answer={**STATUS, "services": [service]})
    assert out.count("refuses its configuration: bad") == 1


def test_a_plan_shows_states_and_the_commands_of_what_is_not_done(capsys):
    code, out, _ = run(capsys, "onboard", "plan", "api", "web", answer=PLAN)
    assert code == 0
    assert Agent.asked == ("/v1/onboard/plan", {"services": "api,web"})
    assert "api   called by legacy; calls db" in out
    assert "2. next        Register: 0 of 1\n       do this\n" in out


def test_suggestions_mark_what_is_only_needed_after_onboarding(capsys):
    answer = {"suggestions": [SUGGESTION], "problems": []}
    code, out, _ = run(capsys, "intentions", "suggest", "api", answer=answer)
    assert code == 0
    assert "+ web: 4 connections, mesh\n" in out
    assert "+ legacy: 2 connections, plaintext  (needs it once it is in the mesh)" in out
    assert '"Kind": "service-intentions"' in out
    assert "an intention denies bad" in out


def test_an_entry_that_was_not_written_is_exit_1(capsys):
    written = {"suggestions": [{**SUGGESTION, "written": True}], "problems": []}
    assert run(capsys, "intentions", "suggest", "--write", events=[written])[0] == 0
    assert Agent.asked[1] == {"service": None, "window_s": None, "all_callers": False}
    failed = {"suggestions": [SUGGESTION], "problems": []}
    assert run(capsys, "intentions", "suggest", "--write", events=[failed])[0] == 1


def test_changes_print_their_events_and_exit_as_the_last_says(capsys):
    events = [
        {
            "event": "checked",
            "message": "1 destination would be cut off",
            "breakages": [{"message": "web calls 192.0.2.1:443", "next_step": "Keep it away"}],
        },
        {
            "event": "refused",
            "message": "not changed",
            "exit_code": 1,
            "breakages": [{"message": "x"}],
        },
    ]
    code, out, _ = run(capsys, "resecure", events=events)
    assert code == 1
    assert "  - web calls 192.0.2.1:443\n    next: Keep it away\n" in out
    assert "  - x" not in out, "what was told is not told again"
    proof = {
        "holds": True,
        "message": "none is permissive",
        "partition": "east",
        "namespace": "billing",
    }
    proved = [{"event": "proved", "message": "secure", "proofs": [proof], "exit_code": 0}]
    code, out, _ = run(capsys, "resecure", "--force", events=proved)
    assert (code, Agent.asked[1]["force"]) == (0, True)
    assert "ok  east/billing: none is permissive" in out


@pytest.mark.parametrize("command", [["permissive", "api"], ["resecure"], ["strict", "api"]])
def test_an_agent_that_ends_in_between_is_told(capsys, command):
    code, out, err = run(capsys, *command, events=[{"event": "written", "message": "begun"}])
    assert code == 2
    assert out == "begun\n"
    assert err.startswith("tidegate: the agent ended before")


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["onboard", "status"], STATUS),
        (["onboard", "plan"], PLAN),
        (["intentions", "suggest"], {"suggestions": [SUGGESTION], "problems": []}),
    ],
)
def test_json_is_the_agents_answer(capsys, command, answer):
    assert json.loads(run(capsys, *command, "--json", answer=answer)[1]) == answer
