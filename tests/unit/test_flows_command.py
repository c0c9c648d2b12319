"""`tidegate flows`: when it asks once, and when it goes on."""

import json

import pytest

from tidegate.cli import evidence
from tidegate.cli.main import main


class Agent:
    """Stands for an agent without flows."""

    def __init__(self, _address):
        self.asked = 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def get(self, path, **_query):
        assert path == "/v1/flows"
        self.asked += 1
        return {"flows": [], "problems": [], "asked": self.asked}


@pytest.fixture(autouse=True)
def _agent(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(evidence, "agent_address", lambda _args: "unix:///a.sock")
    monkeypatch.setattr(evidence, "AgentClient", Agent)
    monkeypatch.setattr(evidence, "REFRESH_S", 0.0)


@pytest.mark.parametrize("option", [[], ["--follow"]])
def test_for_a_time_is_followed_with_or_without_the_word(option, capsys):
    assert main(["flows", "--json", "--for", "50ms", *option]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["asked"] for each in answers] == list(range(1, len(answers) + 1))
    assert len(answers) > 1


def test_without_a_time_it_asks_once(capsys):
    assert main(["flows", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == 1


def test_nothing_is_said_to_be_there_by_the_filters_where_there_are_some(capsys):
    assert main(["flows"]) == 0
    assert "no flows yet" in capsys.readouterr().out
    assert main(["flows", "--port", "80"]) == 0
    assert "no such flows" in capsys.readouterr().out
