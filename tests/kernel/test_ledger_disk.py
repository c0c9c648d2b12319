"""The ledger on a disk that is full, and on one that becomes read-only: a small tmpfs of the test's own."""

import contextlib
import subprocess

import pytest

from tidegate.model import CountedEdge, Direction, EdgeCount, EdgeKey, FlowClass
from tidegate.observe.ledger import Ledger

T0 = 1_700_000_000.0


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    options = "size=1m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tg-ledger", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def told(now, connections, count=10):
    return [
        CountedEdge(
            slot=slot,
            generation=1,
            live=True,
            key=EdgeKey(
                workload=1,
                direction=Direction.INBOUND,
                peer=f"10.0.{slot // 250}.{slot % 250}",
                port=80,
                flow_class=FlowClass.MESH,
            ),
            count=EdgeCount(
                connections=connections,
                bytes_to_server=0,
                bytes_to_client=0,
                first_seen=T0,
                last_seen=now,
            ),
        )
        for slot in range(count)
    ]


def counts(ledger):
    return {edge.count.connections for edge in ledger.window(None, None, 0, 1e11)}


def test_a_full_disk_is_told_and_nothing_is_lost_when_there_is_room_again(disk):
    ledger = Ledger.open(disk / "ledger.db")
    ledger.record(T0, "g", told(T0, 1), {})
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    for number in range(2, 40):
        ledger.record(T0 + number, "g", told(T0 + number, number, 300), {})
    [problem] = ledger.problems()
    assert "full" in problem
    assert counts(ledger) == {39}
    assert not ledger.is_stored
    ballast.unlink()
    ledger.record(T0 + 40, "g", told(T0 + 40, 40, 300), {})
    assert ledger.problems() == ()
    ledger.close()
    ledger = Ledger.open(disk / "ledger.db")
    assert counts(ledger) == {40}
    ledger.close()


def test_a_history_that_cannot_be_written_from_the_start_is_kept_in_memory(disk):
    Ledger.open(disk / "ledger.db").close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ledger = Ledger.open(disk / "ledger.db")
    assert "lasts only as long as this agent" in ledger.problems()[0]
    ledger.record(T0, "g", told(T0, 3), {})
    assert counts(ledger) == {3}
    ledger.close()
