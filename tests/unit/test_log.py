"""What the agent writes to standard error, one JSON object per line."""

import io
import json
import logging
import sys

import pytest

from tidegate.node import log


@pytest.fixture
def lines(monkeypatch):
    """What has been logged since it was asked last; the loggers are afterwards as they were."""
    root, written = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", written)
    log.set_up()

    def read():
        said = [json.loads(line) for line in written.getvalue().splitlines()]
        written.seek(written.truncate(0))
        return said

    yield read
    root.handlers[:], root.level = handlers, level


def test_a_library_that_goes_on_saying_the_same_is_heard_once_in_a_while(lines, monkeypatch):
    asyncio = logging.getLogger("asyncio")
    for number in range(300):
        asyncio.error("socket.accept() out of system resource\nsocket: <fd=%d>", number)
    asyncio.error("something else")
    assert [one["message"].partition("\n")[0] for one in lines()] == [
        "socket.accept() out of system resource",
        "something else",
    ]
    monkeypatch.setattr(log, "REPEATED_S", 0.0)
    asyncio.error("something else")
    assert len(lines()) == 1


def test_what_the_agent_says_itself_is_never_held_back(lines):
    for _ in range(3):
        log.Log("daemon").warning("a round failed", node="n1")
    assert [one["node"] for one in lines()] == ["n1"] * 3
