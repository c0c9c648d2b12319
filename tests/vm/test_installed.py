"""tidegate under systemd: installed, restarted, rebooted with its machine, while somebody knocks at the service."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from tests.vm import installed, machine

LIMIT_S = 2400.0
PROBER = "10.99.0.2"

pytestmark = pytest.mark.timeout(LIMIT_S + 600)


class Line(NamedTuple):
    boot: str
    at: float
    what: str


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    with installed.disk() as disk:
        return json.loads(machine.boot(*disk, LIMIT_S))


def lines(text: str, boot: str) -> list[Line]:
    return [line for line in _lines(text) if line.boot == boot]


def _lines(text: str) -> Iterator[Line]:
    for line in text.splitlines():
        parts = line.split()
        # The last line of a boot may be cut off.
        if len(parts) == 3:
            yield Line(parts[0], float(parts[1]), parts[2])


def test_everything_that_was_tried_worked(seen: dict[str, Any]) -> None:
    assert "failure" not in seen, f"{seen['failure']}\n{seen['journal']}"
    assert len(seen["boots"]) == 2
    assert seen["steps"][-1] == "the second boot"


@pytest.mark.parametrize("number", [0, 1])
def test_nothing_ever_reached_the_service_but_through_its_sidecar(
    seen: dict[str, Any], number: int
) -> None:
    boot = seen["boots"][number]
    accepted = Counter(line.what for line in lines(seen["accepted"], boot))
    assert accepted.pop("listens") >= 1
    assert set(accepted) == {"127.0.0.1"}, accepted


@pytest.mark.parametrize("number", [0, 1])
def test_it_was_closed_from_before_it_started_until_its_sidecar_was_there(
    seen: dict[str, Any], number: int
) -> None:
    boot = seen["boots"][number]
    knocks = lines(seen["knocks"], boot)
    listens = next(line.at for line in lines(seen["accepted"], boot) if line.what == "listens")
    answered = next(line.at for line in knocks if line.what == "answered")
    assert knocks[0].at < listens < answered
    between = [line.what for line in knocks if listens < line.at < answered]
    assert len(between) >= 3, "nobody knocked while there was no sidecar yet"
