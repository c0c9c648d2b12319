"""What an agent says of a server that speaks of another mesh than its configuration."""

import asyncio
from pathlib import Path

import pytest

from tidegate.catalog.client import Snapshot
from tidegate.node.config import AgentConfig
from tidegate.node.exchange import Exchange
from tidegate.node.problems import Problems

CONFIG = AgentConfig(
    node="n1", server="http://127.0.0.1:1", workloads=Path("/nowhere"), trust_domain="consul"
)


class Intent:
    """Stands for the intent server; `now` is what it says."""

    known = True

    async def refresh(self):
        pass

    def current(self):
        return self.now


def told(*snapshots):
    """The agent's problems after these answers."""
    problems, intent = Problems(), Intent()
    exchange = Exchange(CONFIG, None, intent, problems, lambda: None)
    for intent.now in snapshots:
        asyncio.run(exchange.refresh())
    return [*problems]


@pytest.mark.parametrize(
    ("field", "said"), [("trust_domain", "11111111-2222.consul"), ("datacenter", "east")]
)
def test_another_mesh_is_a_problem_that_says_what_to_write(field, said):
    (problem,) = told(Snapshot(**{field: said}))
    assert f"write {field}: {said}" in problem


def test_the_same_mesh_is_none_and_neither_is_a_server_that_says_nothing():
    assert told(Snapshot(trust_domain="consul", datacenter="dc1"), Snapshot(index=2)) == []


def test_a_problem_is_gone_when_the_server_says_otherwise():
    assert told(Snapshot(trust_domain="other"), Snapshot(trust_domain="consul")) == []
