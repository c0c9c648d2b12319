"""What the agent tells anybody on the network, and how little anybody can do there."""

import asyncio
import contextlib
import socket
import urllib.error
import urllib.request

import pytest

from tidegate.addresses import Endpoint
from tidegate.errors import InputError, TidegateError
from tidegate.node import listening, pulse
from tidegate.node.metrics import CONTENT_TYPE
from tidegate.node.pulse import Pulse

TEXT = b"tidegate_problems 0.0\n"


class Site:
    """Serves on a free port of loopback."""

    def __init__(self, exposition=None, address="127.0.0.1"):
        self.pulse = Pulse()
        self.scrapes = 0
        self.address = address
        self.exposition = exposition or self.tell

    async def tell(self):
        self.scrapes += 1
        return TEXT

    def serving(self):
        return listening.listening(Endpoint(self.address, 0), self.exposition, self.pulse)

    def run(self, work):
        """What `work` returns, given the place, while this serves."""

        async def both():
            async with self.serving() as place:
                return await asyncio.wait_for(work(place), 20)

        return asyncio.run(both())

    def get(self, path, method="GET"):
        """Status, content type and body."""

        def ask(place):
            request = urllib.request.Request(f"http://{place}{path}", method=method)
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return answer.status, answer.headers["Content-Type"], answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.headers["Content-Type"], error.read()

        return self.run(lambda place: asyncio.to_thread(ask, place))


async def said(place, sent):
    """Everything that comes until the connection ends."""
    reader, writer = await asyncio.open_connection(*place)
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        writer.write(sent)
        await writer.drain()
        return await reader.read()
    return b""


def test_the_metrics_are_there():
    assert Site().get("/metrics") == (200, CONTENT_TYPE, TEXT)


def test_an_agent_that_answers_over_ipv6_does_so():
    assert Site(address="::1").get("/metrics") == (200, CONTENT_TYPE, TEXT)


def test_a_query_changes_nothing():
    assert Site().get("/metrics?name[]=x")[0] == 200


def test_a_head_request_gets_no_body():
    assert Site().get("/metrics", "HEAD") == (200, CONTENT_TYPE, b"")


@pytest.mark.parametrize("path", ["/", "/v1/status", "/metrics/", "/../metrics", "/Metrics"])
def test_nothing_else_is_there(path):
    assert Site().get(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "CONNECT", "OPTIONS"])
def test_nothing_can_be_done_there(method):
    site = Site()
    assert site.get("/metrics", method)[0] == 405
    assert not site.scrapes


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET  /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/2.0\r\n\r\n",
        b"get /metrics HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"A: " + b"x" * 9000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(sent):
    answer = Site().run(lambda place: said(place, sent))
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_connection_is_answered_once_and_closed():
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = Site().run(lambda place: said(place, 3 * request))
    assert answer.count(b"HTTP/1.1 200 OK") == 1


# Health


def test_an_agent_without_a_round_is_alive_and_not_ready():
    site = Site()
    assert site.get("/healthz")[::2] == (200, b"ok\n")
    assert site.get("/readyz")[::2] == (503, b"no round has been completed yet\n")


def test_an_agent_whose_rounds_all_fail_is_alive_and_not_ready():
    site = Site()
    site.pulse.beat(whole=False)
    assert site.get("/healthz")[0] == 200
    assert site.get("/readyz")[0] == 503


def test_an_agent_is_ready_from_its_first_whole_round_on():
    site = Site()
    site.pulse.beat(whole=True)
    site.pulse.beat(whole=False)
    assert site.get("/readyz")[::2] == (200, b"ok\n")


def test_an_agent_whose_rounds_do_not_end_is_neither_alive_nor_ready(monkeypatch):
    site = Site()
    site.pulse.beat(whole=True)
    monkeypatch.setattr(pulse, "SILENCE_S", -1.0)
    for path in ("/healthz", "/readyz"):
        status, _, text = site.get(path)
        assert (status, text[:24]) == (503, b"no round has ended for 0")


# Whoever is there


def test_what_cannot_be_told_is_said_in_one_sentence():
    async def failing():
        raise TidegateError("the disk is full")

    assert Site(failing).get("/metrics")[::2] == (503, b"the disk is full\n")


def test_scrapes_that_come_together_are_told_by_one():
    site = Site()
    request = b"GET /metrics HTTP/1.1\r\n\r\n"

    async def many(place):
        return await asyncio.gather(*(said(place, request) for _ in range(20)))

    answers = site.run(many)
    assert all(answer.endswith(TEXT) for answer in answers)
    assert site.scrapes == 1


def test_a_later_scrape_is_told_anew(monkeypatch):
    monkeypatch.setattr(listening, "FRESH_S", 0.0)
    site = Site()
    request = b"GET /metrics HTTP/1.1\r\n\r\n"

    async def twice(place):
        await said(place, request)
        await said(place, request)

    site.run(twice)
    assert site.scrapes == 2


def test_connections_that_say_nothing_end(monkeypatch):
    monkeypatch.setattr(listening, "DEADLINE_S", 0.05)
    assert Site().run(lambda place: said(place, b"GET /metrics HT")) == b""


def test_connections_beyond_the_bound_are_closed_and_those_within_are_answered(monkeypatch):
    monkeypatch.setattr(listening, "MAX_CONNECTIONS", 3)
    request = b"GET /healthz HTTP/1.1\r\n\r\n"

    async def crowd(place):
        idle = [await asyncio.open_connection(*place) for _ in range(3)]
        # Accepted in the order in which they came.
        assert not await said(place, request)
        reader, writer = idle[0]
        writer.write(request)
        answer = await reader.read()
        for _, each in idle:
            each.close()
        return answer

    assert Site().run(crowd).startswith(b"HTTP/1.1 200 OK")


def test_a_place_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Endpoint(*taken.getsockname())

        async def serve():
            async with listening.listening(place, Site().tell, Pulse()):
                pass

        with pytest.raises(TidegateError) as told:
            asyncio.run(serve())
    assert str(told.value) == f"cannot listen on {place}: Address already in use"


def test_whoever_is_connected_does_not_keep_the_agent_from_ending():
    async def hang(place):
        return await asyncio.open_connection(*place)

    Site().run(hang)


# Where


@pytest.mark.parametrize("text", ["0.0.0.0:20200", "[::]:1", "127.0.0.1:65535", "[fd00::1]:80"])
def test_an_endpoint_is_read_as_it_is_written(text):
    assert str(Endpoint.of(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "20200", ":20200", "0.0.0.0", "0.0.0.0:0", "0.0.0.0:65536", "::1:80", "[0.0.0.0]:80",
     "localhost:80", "0.0.0.0:+80", "0.0.0.0: 80", "0.0.0.0:08", "1.2.3:80", "[::1]80", "[[::1]]:80",
     "0.0.0.0:٨٠"],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused(text):
    with pytest.raises(InputError, match=r"expected such as 0\.0\.0\.0:20200"):
        Endpoint.of(text)
