"""`tidegate flows`: when it asks once, and when it goes on."""

import json

import pytest
from rich.console import Console

from tidegate.cli import evidence
from tidegate.cli.main import main


class Agent:
    """Stands for an agent without flows, which others do or do not answer, one answer after the other."""

    silent = ((),)
    most = 10_000
    """Answers; then somebody presses Ctrl-C."""

    def __init__(self, _address):
        self.asked = 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def get(self, path, **_query):
        assert path == "/v1/flows"
        if self.asked == self.most:
            raise KeyboardInterrupt
        self.asked += 1
        silent = self.silent[min(self.asked, len(self.silent)) - 1]
        problems = [f"{node} does not answer" for node in silent]
        return {"flows": [], "problems": problems, "asked": self.asked}


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


def test_nodes_that_do_not_answer_are_told(monkeypatch, capsys):
    monkeypatch.setattr(Agent, "silent", (("n2",),))
    assert main(["flows"]) == 0
    assert capsys.readouterr().err == "tidegate: n2 does not answer\n"


def test_who_follows_is_told_once_for_each_time_that_a_node_does_not_answer(monkeypatch, capsys):
    monkeypatch.setattr(Agent, "silent", (("n2",), ("n2", "n3"), ("n3",), ("n2", "n3")))
    monkeypatch.setattr(Agent, "most", 6)
    assert main(["flows", "--follow"]) == 130
    told = capsys.readouterr().err.splitlines()
    assert told == [f"tidegate: {node} does not answer" for node in ("n2", "n3", "n2")]


def test_on_a_terminal_nodes_that_do_not_answer_are_below_the_table(monkeypatch, capsys):
    monkeypatch.setattr(Agent, "silent", (("n2",),))
    monkeypatch.setattr(Agent, "most", 1)
    console = Console(force_terminal=True, highlight=False, width=80)
    monkeypatch.setattr(evidence.tables, "console", lambda: console)
    assert main(["flows", "--follow"]) == 130
    shown = capsys.readouterr().out
    assert shown.index("caller") < shown.index("n2 does not answer")
