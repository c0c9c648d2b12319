"""A Kubernetes API server for some kinds of objects, as its documentation describes it, with every fault at will.

Lists in pages by limit and continue, not older than a version; all at once where any version will do; watches from a
version on, with bookmarks and a time limit; what was compacted away is answered with 410, by an ERROR event or by the
status; tokens that expire; rights that are missing; field selectors. Versions are opaque to clients: they are numbers
here, and grow by more than one.
"""

import asyncio
import base64
import copy
import functools
import json

from aiohttp import web

FORBIDDEN = (
    'pods is forbidden: User "system:serviceaccount:tidegate-system:tidegate" cannot {verb} resource'
    ' "pods" in API group "" at the cluster scope'
)


def status(code, reason, message, causes=()):
    """meta/v1 Status."""
    details = {"causes": [{"reason": one, "message": message} for one in causes]} if causes else {}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details,
        "code": code,
    }


class KubernetesApi:
    """Serves `/api/v1/pods`, or other collections, of objects that tests put into it."""

    def __init__(self, kinds=None):
        """`kinds` are those of the collections, by their paths."""
        self.kinds = kinds or {"/api/v1/pods": "Pod"}
        self.version = 1000
        self.oldest = 0
        """Versions below this one were compacted away."""
        self.objects = {}
        self.history = []
        """(version, type, object) of all that has happened."""
        self.tokens = None
        """Those that are taken; None: nobody has to say who he is."""
        self.forbidden = set()
        """Verbs (list, watch, get) that are refused."""
        self.page = 500
        """Most objects in one answer, whatever limit is asked for."""
        self.expired_by_status = False
        """Whether a watch from a version that was compacted away is answered with 410, and not with an event."""
        self.failing = None
        """A Status that every question is answered with."""
        self.retry_after = None
        self.text = None
        """What every question is answered with, with status 200: something that is no API server."""
        self.held = None
        """An event that every answer waits for."""
        self.cut_lists = False
        """Whether lists break off in the middle."""
        self.serves_others = False
        """Whether field selectors are ignored."""
        self.sends_bookmarks = True
        self.ends_watches = False
        """Whether each watch is ended as soon as it has begun."""
        self.tls = None
        self.requests = []
        """(verb, query, token) of all questions."""
        self.watching = 0
        """How many watches are under way."""
        self._streams = set()
        self._bell = asyncio.Condition()
        self._cuts = 0
        self._ends = 0
        self.host = "127.0.0.1"
        """Where it listens."""
        self._runner = None
        self._port = 0

    @property
    def address(self):
        return f"{'https' if self.tls else 'http'}://{self.host}:{self._port}"

    async def start(self):
        app = web.Application()
        app.add_routes([web.get("/{path:.*}", self._answer)])
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, self.host, self._port, reuse_address=True, ssl_context=self.tls
        )
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self):
        """It goes, and comes back by `start` at the same address with what it had."""
        await self.cut()
        await self._runner.cleanup()

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.stop()

    def asked(self, verb):
        """The queries of all questions of a verb."""
        return [query for one, query, _ in self.requests if one == verb]

    # What others do to its state.

    async def put(self, item, *, event=None):
        """Makes or replaces an object; one of another uid goes first, as in the API nothing is replaced."""
        key = self._key(item)
        former = self.objects.get(key)
        if former and former["metadata"].get("uid") != item["metadata"].get("uid"):
            await self.delete(item)
            former = None
        item = copy.deepcopy(item)
        item["metadata"]["resourceVersion"] = self._next()
        self.objects[key] = item
        await self._record(event or ("MODIFIED" if former else "ADDED"), item)

    async def delete(self, item):
        gone = copy.deepcopy(self.objects.pop(self._key(item)))
        gone["metadata"]["resourceVersion"] = self._next()
        await self._record("DELETED", gone)

    async def lose(self, item):
        """An object goes, and no watch is told."""
        del self.objects[self._key(item)]
        self._next()

    async def compact(self):
        """It forgets what has happened until now."""
        self.version += 10
        self.oldest = self.version
        self.history.clear()

    async def restore(self, version):
        """An older state of its database: versions are lower than before."""
        self.version = version
        self.oldest = 0
        self.history.clear()

    async def bookmark(self):
        """Tells all watches that may be told so which version they have reached."""
        version = self._next()
        item = {"metadata": {"resourceVersion": version, "creationTimestamp": None}}
        await self._record("BOOKMARK", item)

    async def send(self, line):
        """Writes bytes into all watches."""
        for stream in self._streams:
            await stream.write(line)

    async def cut(self):
        """Cuts all connections of watches, in the middle of whatever they send."""
        self._cuts += 1
        await self._ring()

    async def end_watches(self):
        """Ends all watches as at their time limit."""
        self._ends += 1
        await self._ring()

    async def until_watched(self, watches=1):
        async with self._bell, asyncio.timeout(10):
            await self._bell.wait_for(lambda: self.watching >= watches)

    def _key(self, item):
        metadata = item["metadata"]
        return metadata.get("namespace", "default"), metadata["name"], item["kind"]

    def _next(self):
        self.version += 3
        return str(self.version)

    def _has_news(self, since, cuts, ends):
        happened = bool(self.history) and self.history[-1][0] > since
        return happened or (cuts, ends) != (self._cuts, self._ends)

    async def _record(self, kind, item):
        self.history.append((self.version, kind, item))
        await self._ring()

    async def _ring(self):
        async with self._bell:
            self._bell.notify_all()

    # How it answers.

    async def _answer(self, request):
        verb = "get"
        if request.path in self.kinds:
            verb = "watch" if request.query.get("watch") in ("1", "true") else "list"
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.requests.append((verb, dict(request.query), token))
        if self.held is not None:
            await self.held.wait()
        if self.text is not None:
            return web.Response(text=self.text)
        if self.tokens is not None and token not in self.tokens:
            return self._refuse(status(401, "Unauthorized", "Unauthorized"))
        if verb in self.forbidden:
            return self._refuse(status(403, "Forbidden", FORBIDDEN.format(verb=verb)))
        if self.failing is not None:
            return self._refuse(self.failing)
        match verb:
            case "get":
                return self._get(request)
            case "list":
                return await self._list(request)
            case _:
                return await self._watch(request)

    def _refuse(self, why):
        headers = {"Retry-After": self.retry_after} if self.retry_after else None
        return web.json_response(why, status=why["code"], headers=headers)

    def _get(self, request):
        *_, namespaces, namespace, _, name = ("", *request.path.split("/"))
        item = self.objects.get((namespace, name, "Pod"))
        if namespaces != "namespaces" or item is None:
            return self._refuse(status(404, "NotFound", f'pods "{name}" not found'))
        return web.json_response(item)

    def _selected(self, request, items):
        kind = self.kinds[request.path]
        items = [one for one in items if one["kind"] == kind]
        selector = request.query.get("fieldSelector", "")
        if not selector or self.serves_others:
            return items
        field, _, wanted = selector.partition("=")
        assert field == "spec.nodeName", f"field label not supported: {field}"
        return [one for one in items if one.get("spec", {}).get("nodeName") == wanted]

    async def _list(self, request):
        query = request.query
        asked, match = query.get("resourceVersion", ""), query.get("resourceVersionMatch", "")
        limit = min(int(query.get("limit") or self.page), self.page)
        begin, version = 0, self.version
        if "continue" in query:
            if asked:
                text = "specifying resource version is not allowed when using continue"
                return self._refuse(status(400, "BadRequest", text))
            version, begin = json.loads(base64.urlsafe_b64decode(query["continue"]))
            if version < self.oldest:
                text = (
                    "The provided continue parameter is too old to display a consistent list result"
                )
                return self._refuse(status(410, "Expired", text))
        elif asked not in ("", "0"):
            if match != "NotOlderThan":
                text = 'resourceVersionMatch "" is forbidden with limit: exact versions are served only while kept'
                return self._refuse(status(410, "Expired", text))
            if int(asked) > self.version:
                text = f"Too large resource version: {asked}, current: {self.version}"
                return self._refuse(status(504, "Timeout", text, ["ResourceVersionTooLarge"]))
        items = self._selected(request, [self.objects[key] for key in sorted(self.objects)])
        if asked == "0":
            # From the watch cache, which has no pages (kubernetes issue 118394).
            limit = len(items)
        if request.path.startswith("/api/"):
            # What a list of a built-in kind has is of the list's kind, and does not say so.
            items = [
                {name: one[name] for name in one if name not in ("kind", "apiVersion")}
                for one in items
            ]
        more = ""
        if len(items) > begin + limit:
            more = base64.urlsafe_b64encode(json.dumps([version, begin + limit]).encode()).decode()
        answer = {
            "kind": f"{self.kinds[request.path]}List",
            "metadata": {"resourceVersion": str(version)} | ({"continue": more} if more else {}),
            "items": items[begin : begin + limit] or None,
        }
        body = json.dumps(answer).encode()
        if self.cut_lists:
            response = web.StreamResponse()
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            request.transport.close()
            return response
        return web.Response(body=body, content_type="application/json")

    async def _watch(self, request):
        since = int(request.query.get("resourceVersion") or 0)
        seconds = float(request.query.get("timeoutSeconds", "1800"))
        bookmarks = request.query.get("allowWatchBookmarks") == "true" and self.sends_bookmarks
        expired = status(410, "Expired", f"too old resource version: {since} ({self.oldest})")
        if since < self.oldest and self.expired_by_status:
            return self._refuse(expired)
        response = web.StreamResponse()
        response.content_type = "application/json"
        response.enable_chunked_encoding()
        await response.prepare(request)
        if since < self.oldest:
            await response.write(json.dumps({"type": "ERROR", "object": expired}).encode() + b"\n")
            return response
        if self.ends_watches:
            return response
        cuts, ends = self._cuts, self._ends
        self._streams.add(response)
        self.watching += 1
        await self._ring()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    for version, kind, item in list(self.history):
                        if version <= since:
                            continue
                        since = version
                        selected = (
                            bookmarks if kind == "BOOKMARK" else self._selected(request, [item])
                        )
                        if selected:
                            line = json.dumps({"type": kind, "object": item})
                            await response.write(line.encode() + b"\n")
                    if cuts != self._cuts:
                        request.transport.close()
                        return response
                    if ends != self._ends:
                        return response
                    news = functools.partial(self._has_news, since, cuts, ends)
                    async with self._bell:
                        await self._bell.wait_for(news)
        except TimeoutError:
            return response
        finally:
            self._streams.discard(response)
            self.watching -= 1
