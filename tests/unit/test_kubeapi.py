"""Following an API server: documented behaviour and every fault of it, against a double that behaves as documented."""

import asyncio
import contextlib
import functools
import json
import ssl

import kubernetes_pods as shapes
import pytest
from certificates import certificate
from kubernetes_api import KubernetesApi, status

from tidegate.errors import InputError
from tidegate.kubeapi import client as client_module
from tidegate.kubeapi import following as following_module
from tidegate.kubeapi.access import ApiAccess
from tidegate.kubeapi.client import ApiClient
from tidegate.kubeapi.errors import ApiRefused, ApiUnreachable
from tidegate.kubeapi.following import Following

PATH = "/api/v1/pods"
MINE = {"fieldSelector": f"spec.nodeName={shapes.NODE}"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(following_module, "RETRY_S", (0.005, 0.05))
    monkeypatch.setattr(following_module, "STEADY_S", 0.2)


class Pauses:
    """asyncio for what follows, in which time that it pauses does not pass: how long each pause would have been."""

    def __init__(self):
        self.seconds = []

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        self.seconds.append(seconds)
        await asyncio.sleep(0.001)


@pytest.fixture
def pauses(monkeypatch):
    made = Pauses()
    monkeypatch.setattr(following_module, "asyncio", made)
    return made


def in_a_loop(scenario):
    """A test that is a coroutine."""

    @functools.wraps(scenario)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(scenario(*args, **kwargs), 60))

    return run


def pods(number):
    return [shapes.pod(f"web-{index}-aaaaa", uid=f"uid-{index}") for index in range(number)]


class Names:
    """A mirror: names of all that there is, and what was told."""

    def __init__(self):
        self.names = set()
        self.told = []
        self.wakes = 0
        self._news = asyncio.Event()

    def listed(self, items):
        self.names = set(items)
        self.told.append(("listed", *sorted(items)))

    def changed(self, item):
        self.names.add(item)
        self.told.append(("changed", item))

    def gone(self, item):
        self.names.discard(item)
        self.told.append(("gone", item))

    def wake(self):
        self.wakes += 1
        self._news.set()

    async def until(self, condition):
        """Waits until it is so after something was told."""
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def until_are(self, *names):
        await self.until(lambda: self.names == set(names))


def name_in(content):
    return json.loads(content)["metadata"]["name"]


def access_to(api, **changes):
    return ApiAccess(**{"server": api.address, "token_file": None, "ca_file": None} | changes)


@contextlib.asynccontextmanager
async def following(access, **options):
    """Follows the pods of the node; mirror and what follows."""
    client, mirror, stop = ApiClient(access), Names(), asyncio.Event()
    followed = Following(client, PATH, MINE, name_in, mirror, **options)
    running = asyncio.create_task(followed.run(stop, mirror.wake))
    try:
        yield mirror, followed
    finally:
        stop.set()
        await running
        await client.close()


@in_a_loop
async def test_pods_come_change_and_go_as_events_tell_in_order():
    async with KubernetesApi() as api:
        first, second, third = pods(3)
        await api.put(first)
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until_are("web-0-aaaaa")
            await api.until_watched()
            await api.put(second)
            await api.put(first)
            await api.delete(second)
            await api.put(third)
            await mirror.until(lambda: mirror.told[-1] == ("changed", "web-2-aaaaa"))
            assert mirror.told == [
                ("listed", "web-0-aaaaa"),
                ("changed", "web-1-aaaaa"),
                ("changed", "web-0-aaaaa"),
                ("gone", "web-1-aaaaa"),
                ("changed", "web-2-aaaaa"),
            ]
            assert followed.problem == ""
            assert followed.version == str(api.version)
        assert len(api.asked("list")) == 1


@in_a_loop
async def test_only_pods_of_this_node_are_asked_for():
    async with KubernetesApi() as api:
        await api.put(shapes.pod("other-0-aaaaa", node="another-node"))
        async with following(access_to(api)) as (mirror, _):
            await api.until_watched()
            await api.put(shapes.pod("other-1-aaaaa", node="another-node"))
            await api.put(pods(1)[0])
            await mirror.until_are("web-0-aaaaa")
        for query in (*api.asked("list"), *api.asked("watch")):
            assert query["fieldSelector"] == f"spec.nodeName={shapes.NODE}"


@in_a_loop
async def test_a_list_in_pages_is_one_list():
    async with KubernetesApi() as api:
        api.page = 4
        for one in pods(10):
            await api.put(one)
        async with following(access_to(api), version="900") as (mirror, _):
            await mirror.until(lambda: len(mirror.names) == 10)
        assert len(mirror.told) == 1
        first, *more = api.asked("list")
        assert first["limit"] == str(client_module.PAGE)
        assert [set(query) for query in more] == 2 * [{"fieldSelector", "limit", "continue"}]


@in_a_loop
async def test_a_list_whose_version_expires_between_its_pages_is_begun_anew():
    async with KubernetesApi() as api:
        api.page = 4
        for one in pods(10):
            await api.put(one)
        client, mirror = ApiClient(access_to(api)), Names()
        followed = Following(client, PATH, MINE, name_in, mirror, version="900")
        page = client.page

        async def compacting(path, query, limit):
            found = await page(path, query, limit)
            if not mirror.wakes:
                mirror.wake()
                await api.compact()
            return found

        client.page = compacting
        stop = asyncio.Event()
        running = asyncio.create_task(followed.run(stop, mirror.wake))
        await mirror.until(lambda: len(mirror.names) == 10)
        stop.set()
        await running
        await client.close()
        assert [query.get("resourceVersion") for query in api.asked("list")] == [
            "900", None, None, None, None,
        ]  # fmt: skip


@in_a_loop
async def test_a_watch_that_ends_goes_on_from_the_last_version_and_bookmarks_count():
    async with KubernetesApi() as api:
        await api.put(pods(1)[0])
        async with following(access_to(api)) as (mirror, followed):
            await api.until_watched()
            await api.bookmark()
            await wait_for(lambda: followed.version == str(api.version))
            bookmarked = followed.version
            await api.end_watches()
            await wait_for(lambda: len(api.asked("watch")) == 2)
            await api.until_watched()
            await api.put(pods(2)[1])
            await mirror.until_are("web-0-aaaaa", "web-1-aaaaa")
        assert api.asked("watch")[1]["resourceVersion"] == bookmarked
        assert api.asked("watch")[1]["allowWatchBookmarks"] == "true"
        assert len(api.asked("list")) == 1
        assert mirror.told.count(("changed", "web-0-aaaaa")) == 0, "a bookmark is no pod"


async def wait_for(condition):
    until = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < until, "waited in vain"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("by_status", [False, True], ids=["event", "status"])
@in_a_loop
async def test_a_version_that_the_server_has_forgotten_has_everything_listed_anew(
    by_status, monkeypatch
):
    # The last list is long ago.
    monkeypatch.setattr(following_module, "STEADY_S", 0.0)
    async with KubernetesApi() as api:
        api.expired_by_status = by_status
        first, second = pods(2)
        await api.put(first)
        async with following(access_to(api)) as (mirror, followed):
            await api.until_watched()
            await api.stop()
            await api.delete(first)
            await api.put(second)
            await api.compact()
            await mirror.until(lambda: "no Kubernetes API server answers" in followed.problem)
            await api.start()
            await mirror.until_are("web-1-aaaaa")
            await mirror.until(lambda: not followed.problem)
        assert len(api.asked("list")) == 2
        assert api.asked("list")[1]["resourceVersionMatch"] == "NotOlderThan"


@in_a_loop
async def test_a_server_that_answers_410_to_whatever_it_is_asked_is_not_asked_without_a_pause(
    pauses,
):
    async with KubernetesApi() as api:
        api.oldest = 1 << 40
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "too old resource version" in followed.problem)
            await wait_for(lambda: len(pauses.seconds) > 10)
            # A list that is begun once more, and a watch, for each pause.
            assert len(api.requests) <= 3 * len(pauses.seconds) + 3
            asked, paused = len(api.requests), len(pauses.seconds)
            api.failing = status(410, "Expired", "too old resource version: 0")
            await wait_for(lambda: len(pauses.seconds) > paused + 10)
            assert len(api.requests) - asked <= 3 * (len(pauses.seconds) - paused) + 3


@in_a_loop
async def test_a_server_that_was_restored_to_an_older_state_is_listed_without_a_version():
    async with KubernetesApi() as api:
        await api.put(pods(1)[0])
        async with following(access_to(api), version=str(1 << 40)) as (mirror, _):
            await mirror.until_are("web-0-aaaaa")
        assert [query.get("resourceVersion") for query in api.asked("list")] == [str(1 << 40), None]


@in_a_loop
async def test_the_version_that_was_known_before_is_the_oldest_that_is_taken():
    async with KubernetesApi() as api:
        async with following(access_to(api), version="900") as (mirror, _):
            await mirror.until_are()
            await api.until_watched()
        (query,) = api.asked("list")
        assert query["resourceVersion"] == "900"
        assert query["resourceVersionMatch"] == "NotOlderThan"


@in_a_loop
async def test_an_event_that_a_watch_has_lost_is_made_up_for_by_the_next_list(monkeypatch):
    monkeypatch.setattr(following_module, "RESYNC_S", 0.0)
    async with KubernetesApi() as api:
        first, second = pods(2)
        await api.put(first)
        await api.put(second)
        async with following(access_to(api)) as (mirror, _):
            await api.until_watched()
            await api.lose(first)
            await api.end_watches()
            await mirror.until_are("web-1-aaaaa")


@in_a_loop
async def test_a_token_that_has_expired_is_replaced_by_what_the_file_has_then(tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")
    async with KubernetesApi() as api:
        api.tokens = {"first"}
        await api.put(pods(1)[0])
        async with following(access_to(api, token_file=token)) as (mirror, followed):
            await mirror.until_are("web-0-aaaaa")
            await api.until_watched()
            api.tokens = {"second"}
            await api.end_watches()
            await mirror.until(lambda: "401: Unauthorized" in followed.problem)
            assert mirror.names == {"web-0-aaaaa"}
            token.write_text("second\n")
            await mirror.until(lambda: not followed.problem)
            await api.put(pods(2)[1])
            await mirror.until_are("web-0-aaaaa", "web-1-aaaaa")
        assert {used for _, _, used in api.requests} == {"first", "second"}
        assert len(api.asked("list")) == 1


@pytest.mark.parametrize("content", [None, b"", b"a\nb", b"\xff\xfe", b"x" * (65 << 10)])
@in_a_loop
async def test_a_token_file_that_is_of_no_use_is_named(tmp_path, content):
    token = tmp_path / "token"
    if content is not None:
        token.write_bytes(content)
    async with KubernetesApi() as api:
        client = ApiClient(access_to(api, token_file=token))
        with pytest.raises(ApiUnreachable, match=r"token_file.*token"):
            await client.get(PATH)
        await client.close()
        assert not api.requests


@pytest.mark.parametrize("verb", ["list", "watch"])
@in_a_loop
async def test_a_right_that_is_missing_is_told_in_the_servers_words_until_it_is_given(verb):
    async with KubernetesApi() as api:
        api.forbidden = {verb}
        await api.put(pods(1)[0])
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: f"cannot {verb} resource" in followed.problem)
            api.forbidden = set()
            await mirror.until(lambda: not followed.problem)
            await mirror.until_are("web-0-aaaaa")


@in_a_loop
async def test_a_server_that_fails_is_left_alone_for_as_long_as_it_asks(pauses):
    async with KubernetesApi() as api:
        api.failing = status(429, "TooManyRequests", "the server is currently unable")
        api.retry_after = "7"
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "refuses with 429" in followed.problem)
            await wait_for(lambda: len(pauses.seconds) > 2)
            api.failing = None
            await mirror.until_are()
            await mirror.until(lambda: not followed.problem)
        assert min(pauses.seconds[:2]) >= 7


@in_a_loop
async def test_pauses_between_failures_double_up_to_the_longest_and_are_spread(pauses, monkeypatch):
    monkeypatch.setattr(following_module, "RETRY_S", (0.25, 30.0))
    async with KubernetesApi() as api:
        api.failing = status(500, "InternalError", "etcdserver: leader changed")
        async with following(access_to(api)) as (_, followed):
            await wait_for(lambda: len(pauses.seconds) >= 20)
            assert "etcdserver: leader changed" in followed.problem
    for number, seconds in enumerate(pauses.seconds):
        longest = min(0.25 * 2**number, 30.0)
        assert longest / 2 <= seconds <= longest
    assert len({round(seconds, 6) for seconds in pauses.seconds[8:]}) > 1


@pytest.mark.parametrize(
    "text",
    [
        "<html>portal</html>",
        "[]",
        "null",
        '{"metadata": {}, "items": {}}',
        '{"metadata":' + "[" * 60_000,
    ],
)
@in_a_loop
async def test_something_that_is_no_api_server_is_told_and_takes_nothing_away(text):
    async with KubernetesApi() as api:
        await api.put(pods(1)[0])
        api.text = text
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "sends no list" in followed.problem)
            api.text = None
            await mirror.until_are("web-0-aaaaa")
            await api.until_watched()
            api.text = text
            await api.cut()
            await mirror.until(lambda: "ends in the middle of an event" in followed.problem)
            assert mirror.names == {"web-0-aaaaa"}
            api.text = None
            await mirror.until(lambda: not followed.problem)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b'{"type": "SURPRISE", "object": {}}\n',
        b'{"type": 3}\n',
        b'{"object": {}}\n',
        b'{"type": "ADDED", "object": {"metadata": ' + b"[" * 60_000 + b"\n",
    ],
)
@in_a_loop
async def test_after_an_event_that_nobody_understands_everything_is_listed_anew(line):
    async with KubernetesApi() as api:
        first, second = pods(2)
        await api.put(first)
        async with following(access_to(api)) as (mirror, followed):
            await api.until_watched()
            await api.lose(first)
            await api.put(second)
            await mirror.until_are("web-0-aaaaa", "web-1-aaaaa")
            await api.send(line)
            await mirror.until_are("web-1-aaaaa")
            await mirror.until(lambda: not followed.problem)


@in_a_loop
async def test_half_an_event_is_none_and_comes_whole_with_the_next_watch():
    async with KubernetesApi() as api:
        async with following(access_to(api)) as (mirror, _):
            await api.until_watched()
            await api.send(b'{"type": "ADDED", "object": {"metadata": {"name": "half')
            await api.cut()
            await wait_for(lambda: len(api.asked("watch")) > 1)
            await api.put(pods(1)[0])
            await mirror.until_are("web-0-aaaaa")
        assert ("changed", "half") not in mirror.told
        assert len(api.asked("list")) == 1


@in_a_loop
async def test_half_a_list_is_none():
    async with KubernetesApi() as api:
        for one in pods(5):
            await api.put(one)
        api.cut_lists = True
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: bool(followed.problem))
            assert mirror.told == []
            api.cut_lists = False
            await mirror.until(lambda: len(mirror.names) == 5)


@in_a_loop
async def test_events_in_many_pieces_are_whole():
    async with KubernetesApi() as api, following(access_to(api)) as (mirror, _):
        await api.until_watched()
        line = json.dumps({"type": "ADDED", "object": pods(1)[0]}).encode() + b"\n\n"
        for index in range(0, len(line), 37):
            await api.send(line[index : index + 37])
        await mirror.until_are("web-0-aaaaa")


class Chunks:
    """An answer that comes in these pieces."""

    def __init__(self, *chunks):
        self.content = self
        self.chunks = chunks

    async def iter_any(self):
        for chunk in self.chunks:
            yield chunk


@pytest.mark.parametrize(
    "chunks",
    [
        (b"one\ntwo\n",),
        (b"o", b"ne", b"\n", b"two\n"),
        (b"one\nt", b"wo", b"\n"),
        (b"\n\none\n \n", b"\ntwo\n\n"),
        (b"one", b"\ntwo\n"),
    ],
)
@in_a_loop
async def test_lines_are_whole_however_they_come(chunks):
    assert [line async for line in client_module._lines(Chunks(*chunks))] == [b"one", b"two"]


@in_a_loop
async def test_an_event_without_end_is_given_up_and_everything_is_listed_anew(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_EVENT_BYTES", 64 << 10)
    async with KubernetesApi() as api, following(access_to(api)) as (mirror, followed):
        await api.until_watched()
        for _ in range(20):
            await api.send(b"x" * (8 << 10))
        await mirror.until(lambda: "more than 65536 bytes at once" in followed.problem)
        await wait_for(lambda: len(api.asked("list")) > 1)
        await api.put(pods(1)[0])
        await mirror.until_are("web-0-aaaaa")


@in_a_loop
async def test_an_error_in_the_midst_of_a_watch_is_told_and_the_watch_taken_up_where_it_was():
    async with KubernetesApi() as api, following(access_to(api)) as (mirror, followed):
        await api.until_watched()
        version = followed.version
        text = "unable to decode an event from the watch stream: http2: client connection lost"
        error = {"type": "ERROR", "object": status(500, "InternalError", text)}
        await api.send(json.dumps(error).encode() + b"\n")
        await mirror.until(lambda: "refuses with 500: unable to decode" in followed.problem)
        await api.put(pods(1)[0])
        await mirror.until_are("web-0-aaaaa")
        assert len(api.asked("list")) == 1
        assert api.asked("watch")[1]["resourceVersion"] == version


@in_a_loop
async def test_a_proxy_in_the_environment_is_not_asked(monkeypatch):
    """The server is on the node's own network; variables are for what an image was built with."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with KubernetesApi() as api, following(access_to(api)) as (mirror, _):
        await api.put(pods(1)[0])
        await mirror.until_are("web-0-aaaaa")


@in_a_loop
async def test_a_list_that_is_too_large_at_once_comes_in_small_pages(monkeypatch):
    """A server gives all objects at once where it need not ask its database."""
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 32 << 10)
    async with KubernetesApi() as api:
        for one in pods(30):
            await api.put(one)
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: len(mirror.names) == 30)
            assert followed.problem == ""
        first, second, *_ = api.asked("list")
        assert (first["resourceVersion"], "resourceVersion" in second) == ("0", False)
        assert second["limit"] == str(client_module.SMALL_PAGE)


@in_a_loop
async def test_a_list_whose_smallest_part_is_too_large_is_given_up(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 4 << 10)
    async with KubernetesApi() as api:
        for one in pods(10):
            await api.put(one)
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "more than 4096 bytes at once" in followed.problem)
            assert mirror.told == []


@in_a_loop
async def test_a_list_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(following_module, "MAX_ITEMS", 5)
    async with KubernetesApi() as api:
        api.page = 2
        for one in pods(10):
            await api.put(one)
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "more than 5 objects" in followed.problem)
            assert mirror.told == []


@in_a_loop
async def test_watches_that_end_at_once_are_a_problem_and_are_not_asked_for_without_a_pause(pauses):
    async with KubernetesApi() as api:
        api.ends_watches = True
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "ends each watch at once" in followed.problem)
            wakes = mirror.wakes
            await wait_for(lambda: len(pauses.seconds) > 10)
            assert mirror.wakes == wakes, "the same problem is told once"
            assert len(api.asked("watch")) <= len(pauses.seconds) + 1
            api.ends_watches = False
            await api.until_watched()
            await api.put(pods(1)[0])
            await mirror.until(lambda: not followed.problem)


@in_a_loop
async def test_watches_that_last_again_are_well_although_nothing_happens(monkeypatch):
    monkeypatch.setattr(client_module, "IDLE_S", 0.3)
    async with KubernetesApi() as api:
        api.ends_watches = True
        async with following(access_to(api)) as (mirror, followed):
            await mirror.until(lambda: "ends each watch at once" in followed.problem)
            api.ends_watches = False
            await mirror.until(lambda: not followed.problem)
        assert not mirror.names


@in_a_loop
async def test_a_server_that_hangs_is_given_up_and_what_was_seen_stays(monkeypatch):
    monkeypatch.setattr(client_module, "ANSWER_S", 0.1)
    async with KubernetesApi() as api:
        await api.put(pods(1)[0])
        async with following(access_to(api)) as (mirror, followed):
            await api.until_watched()
            api.held = asyncio.Event()
            await api.cut()
            await mirror.until(lambda: "not in time" in followed.problem)
            assert mirror.names == {"web-0-aaaaa"}
            api.held.set()
            api.held = None
            await mirror.until(lambda: not followed.problem)


@in_a_loop
async def test_a_silent_watch_is_asked_for_anew_and_is_no_problem(monkeypatch):
    monkeypatch.setattr(client_module, "IDLE_S", 0.3)
    async with KubernetesApi() as api:
        async with following(access_to(api)) as (mirror, followed):
            await wait_for(lambda: len(api.asked("watch")) >= 3)
            assert followed.failures == 0
            await api.put(pods(1)[0])
            await mirror.until_are("web-0-aaaaa")
        assert len(api.asked("list")) == 1


@in_a_loop
async def test_following_ends_when_it_is_to_stop_whatever_it_waits_for():
    async with KubernetesApi() as api:
        async with following(access_to(api)):
            await api.until_watched()
        await wait_for(lambda: api.watching == 0)
        api.held = asyncio.Event()
        async with following(access_to(api)):
            await wait_for(lambda: len(api.asked("list")) == 2)
    async with following(access_to(api)) as (mirror, followed):
        await mirror.until(lambda: bool(followed.problem))


@in_a_loop
async def test_one_object_is_got_or_is_not_there():
    async with KubernetesApi() as api:
        await api.put(pods(1)[0])
        client = ApiClient(access_to(api))
        found = await client.get("/api/v1/namespaces/shop/pods/web-0-aaaaa")
        assert json.loads(found)["metadata"]["name"] == "web-0-aaaaa"
        assert await client.get("/api/v1/namespaces/shop/pods/web-9-aaaaa") is None
        api.failing = status(403, "Forbidden", "no")
        with pytest.raises(ApiRefused, match="refuses with 403: no"):
            await client.get("/api/v1/namespaces/shop/pods/web-0-aaaaa")
        api.failing = None
        api.held = asyncio.Event()
        with pytest.raises(ApiUnreachable, match="not in time"):
            await client.get("/api/v1/namespaces/shop/pods/web-0-aaaaa", limit_s=0.05)
        api.held.set()
        await client.close()


def serving_as(directory, name):
    """The file of a certificate that vouches for itself, and what a server uses it with."""
    files, _, _ = certificate(directory, name)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    return files[0].read_bytes(), context


@in_a_loop
async def test_a_server_is_trusted_by_the_ca_file_as_it_is_then(tmp_path):
    first, first_tls = serving_as(tmp_path, "first")
    second, second_tls = serving_as(tmp_path, "second")
    ca = tmp_path / "ca.crt"
    ca.write_bytes(first)
    async with KubernetesApi() as api:
        await api.stop()
        api.tls = first_tls
        await api.start()
        await api.put(pods(1)[0])
        async with following(access_to(api, ca_file=ca)) as (mirror, followed):
            await mirror.until_are("web-0-aaaaa")
            await api.until_watched()
            await api.stop()
            api.tls = second_tls
            await api.start()
            await mirror.until(lambda: "its certificate is not trusted" in followed.problem)
            ca.write_bytes(second)
            await mirror.until(lambda: not followed.problem)
            await api.put(pods(2)[1])
            await mirror.until_are("web-0-aaaaa", "web-1-aaaaa")


@pytest.mark.parametrize("content", [None, b"no certificate"])
@in_a_loop
async def test_a_ca_file_that_is_of_no_use_is_named(tmp_path, content):
    ca = tmp_path / "ca.crt"
    if content is not None:
        ca.write_bytes(content)
    client = ApiClient(ApiAccess(server="https://127.0.0.1:1", token_file=None, ca_file=ca))
    with pytest.raises(ApiUnreachable, match=r"ca_file: .*ca\.crt cannot be used"):
        await client.get(PATH)


def test_the_server_is_the_one_that_the_environment_of_a_pod_names(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    assert ApiAccess().address() == "https://10.96.0.1:6443"
    assert ApiAccess(server="https://api:443/").address() == "https://api:443"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00:96::1")
    assert ApiAccess().address() == "https://[fd00:96::1]:6443"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(InputError, match="KUBERNETES_SERVICE_HOST is not set"):
        ApiAccess().address()
