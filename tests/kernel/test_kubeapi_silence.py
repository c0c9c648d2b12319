"""A Kubernetes API server that is cut off without a word: no end of the connection is ever told."""

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import DEADLINE_S, pair_of

sys.path.append(str(Path(__file__).parent.parent / "unit"))
from kubernetes_api import KubernetesApi
from kubernetes_pods import pod
from test_kubeapi import access_to, following, wait_for

from tidegate.kernel import links, netns
from tidegate.kubeapi import client as client_module
from tidegate.kubeapi import following as following_module

WEB = pod("web-0-aaaaa")


class Server:
    """An API server in a namespace of its own, beside that of the client."""

    def __init__(self, home: str, host: str) -> None:
        self.api = KubernetesApi()
        self.api.host = host
        self._home = home
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=netns.run_in, args=(home, self._loop.run_forever))
        self._thread.start()
        self.do(self.api.start())

    def do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def cut_off(self) -> None:
        assert netns.spawn(self._home, ["ip", "link", "set", "host0", "down"]).wait() == 0

    def join(self) -> None:
        links.set_up(self._home, "host0")

    def close(self) -> None:
        self.do(self.api.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def client_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Server]]:
    """Where the client is; and the server."""
    # All that is waited for takes seconds here, not half minutes; only the kernel notices.
    patient = [
        (*option, min(value, 1000 if value > 100 else 1))
        for *option, value in client_module._KEEPALIVE
    ]
    monkeypatch.setattr(client_module, "_KEEPALIVE", patient)
    monkeypatch.setattr(client_module, "ANSWER_S", 0.5)
    monkeypatch.setattr(following_module, "RETRY_S", (0.05, 0.1))
    monkeypatch.setattr(following_module, "STEADY_S", 0.1)
    with pair_of() as pair:
        server = Server(pair.peer, pair.peer_ipv4)
        try:
            yield pair.pod, server
        finally:
            server.close()


def test_a_server_that_is_cut_off_is_noticed_and_found_again(
    client_home: tuple[str, Server],
) -> None:
    home, server = client_home

    async def follow() -> None:
        async with following(access_to(server.api)) as (mirror, followed):
            await wait_for(lambda: followed.is_connected)
            server.cut_off()
            await mirror.until(lambda: "no Kubernetes API server answers" in followed.problem)
            server.join()
            await mirror.until(lambda: not followed.problem)
            await asyncio.to_thread(server.do, server.api.put(WEB))
            await mirror.until_are("web-0-aaaaa")

    netns.run_in(home, asyncio.run, follow())
