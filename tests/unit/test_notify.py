"""What systemd hears from a service: by datagrams to the socket of NOTIFY_SOCKET, sd_notify(3)."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tidegate.node import notify


@pytest.fixture(params=["path", "abstract"])
def heard(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[str]]]:
    """What has come to the socket, message by message."""
    address = {"path": str(tmp_path / "notify"), "abstract": f"@tidegate-{os.getpid()}"}
    named = address[request.param]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(named.replace("@", "\0"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", named)

        def read() -> list[str]:
            said = []
            while True:
                try:
                    said.append(listener.recv(4096).decode())
                except BlockingIOError:
                    return said

        yield read


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_fed_at", float("-inf"))
    monkeypatch.setattr(notify, "_told", set())
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


def test_each_message_is_one_datagram_as_systemd_reads_it(heard: Callable[[], list[str]]) -> None:
    notify.ready()
    notify.stopping()
    notify.status("two\nlines  of text")
    assert heard() == ["READY=1", "STOPPING=1", "STATUS=two lines of text"]


def test_a_reload_is_told_with_the_time_by_the_clock_that_systemd_compares(
    heard: Callable[[], list[str]],
) -> None:
    notify.reloading()
    word, usec = heard()[0].split("\n")
    assert word == "RELOADING=1"
    assert usec.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_the_watchdog_is_fed_where_systemd_wants_it_and_not_more_often_than_it_needs(
    heard: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    notify.watchdog()
    assert heard() == []
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notify.watchdog()
    notify.watchdog()
    assert heard() == ["WATCHDOG=1"]
    monkeypatch.setattr(notify, "_fed_at", notify._fed_at - 15.0)
    notify.watchdog()
    assert heard() == ["WATCHDOG=1"]


def test_a_watchdog_of_another_process_is_not_ours_to_feed(
    heard: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_interval() is None
    notify.watchdog()
    assert heard() == []


def test_without_systemd_nothing_happens() -> None:
    notify.ready()
    notify.status("well")


@pytest.mark.parametrize("address", ["/nonexistent/notify", "vsock:2:1234"])
def test_a_socket_that_does_not_take_it_is_told_once_and_stops_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with caplog.at_level(logging.WARNING):
        notify.ready()
        notify.ready()
    assert len(caplog.records) == 1
    assert address in caplog.records[0].fields["reason"]
