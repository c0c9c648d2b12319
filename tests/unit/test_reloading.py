"""An agent goes on by another configuration when it is asked to, and by the present one when that cannot be used."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from tidegate.errors import InputError
from tidegate.node import running as running_module
from tidegate.node.config import AgentConfig

CONFIG = AgentConfig(
    node="n1", server="unix:///s", workloads=Path("/w"), trust_domain="mesh.consul"
)


def asked_for(*found):
    """What comes of asking once for each of these: a configuration, or why it cannot be read."""

    async def scenario():
        stop, asked = asyncio.Event(), asyncio.Event()
        answers = iter(found)

        def reread():
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        rereading = running_module._Rereading(CONFIG, reread, asked)
        following = asyncio.create_task(rereading.next(stop))
        for _ in found:
            asked.set()
            while asked.is_set():  # noqa: ASYNC110 - whoever takes it clears it
                await asyncio.sleep(0)
        stop.set()
        return await asyncio.wait_for(following, 20)

    return asyncio.run(scenario())


def test_another_configuration_is_taken():
    other = msgspec.structs.replace(CONFIG, window=60.0)
    assert asked_for(other) is other


@pytest.mark.parametrize("field", ["node", "server", "run_dir", "state_dir", "bpffs"])
def test_what_only_a_restart_can_change_is_refused_by_name(caplog, field):
    value = Path("/other") if field.endswith("dir") or field == "bpffs" else "other"
    assert asked_for(msgspec.structs.replace(CONFIG, **{field: value})) is None
    (record,) = caplog.records
    assert record.getMessage() == (
        f"the configuration stays as it was: {field}: cannot change while the agent runs;"
        " expected a restart, which loses nothing"
    )


def test_a_file_that_cannot_be_used_is_told_and_the_next_one_is_taken(caplog):
    good = msgspec.structs.replace(CONFIG, window=60.0)
    assert asked_for(InputError("is no configuration", source="agent.yaml"), good) is good
    assert "stays as it was: agent.yaml: is no configuration" in caplog.text
