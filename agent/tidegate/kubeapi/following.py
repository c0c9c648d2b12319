"""Keeping what an API server has of one kind in view: list once, then watch, for ever.

As client-go's reflector does it. A watch goes on from the last version that was seen, bookmarks included; all is listed
anew when the server has forgotten that version (410), when it sent what nobody understands, and now and then, because a
watch that loses an event does not say so. A failure is told and tried again after a pause that doubles and is spread,
so that the agents of many nodes do not come back all at once. What was seen before stays.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from tidegate.kubeapi.client import PAGE, SMALL_PAGE, ApiClient, Event
from tidegate.kubeapi.errors import UNREADABLE, ApiError, ApiRefused, ApiTooLarge

RETRY_S = (0.25, 30.0)
"""First and longest pause after a failure; it doubles, and is spread by half."""
STEADY_S = 5.0
"""A watch that lasted so long, or told anything, did not fail, however it ends; one that ends sooner is no better than
a refusal."""
WATCH_S = (240.0, 480.0)
"""How long a watch is asked to last: spread, so that not all end at once."""
RESYNC_S = 900.0
"""After which time everything is listed anew, spread by half."""
ANY_VERSION = "0"
"""What a server has at hand, however old: asked for when nothing is known yet."""
MAX_ITEMS = 20_000
"""Objects of one list; more are a server that does not come to an end."""
LATEST_VERSION = ""
"""Nothing older than the question: the server has to ask its database."""

T = TypeVar("T")
_T = TypeVar("_T", contravariant=True)


class Mirror(Protocol[_T]):
    """What is told of what the server has, in order, in the thread of the event loop."""

    def listed(self, items: Sequence[_T]) -> None:
        """These are all there are."""

    def changed(self, item: _T) -> None:
        """This one is new, or is as it says from now on."""

    def gone(self, item: _T) -> None:
        """This one is no more; as it was last."""


class _Metadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""


class _Versioned(msgspec.Struct):
    metadata: _Metadata


class Following(Generic[T]):
    """One collection of objects, such as /api/v1/pods, kept in view."""

    def __init__(
        self,
        client: ApiClient,
        path: str,
        query: Mapping[str, str],
        read: Callable[[bytes], T],
        mirror: Mirror[T],
        *,
        version: str = ANY_VERSION,
    ) -> None:
        """`query` selects objects; `read` makes of each what `mirror` is told, and never raises; `version` is the
        latest that was seen before: the server answers nothing older."""
        self._client = client
        self._path = path
        self._query = dict(query)
        self._read = read
        self._mirror = mirror
        self._version = version
        self._listed_at: float | None = None
        """By the monotonic clock; None: all has to be listed."""
        self._resync_s = RESYNC_S
        """After which time it is listed again."""
        self._steady_at: float | None = None
        """From when on the watch under way is no failure, by the monotonic clock; None before it has begun."""
        self.answered_at = 0.0
        """When the server last said anything; 0: never."""
        self.problem = ""
        """Why what is known may be out of date."""
        self.failures = 0
        """How often asking has failed."""
        self.is_connected = False
        """Whether a watch is under way."""

    @property
    def version(self) -> str:
        """The latest that was seen."""
        return self._version

    async def run(self, stop: asyncio.Event, wake: Callable[[], None]) -> None:
        """Until `stop`. `wake` is called after whatever was told, and when `problem` comes or goes."""
        following = asyncio.create_task(self._follow(wake))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
        finally:
            for task in (following, stopping):
                task.cancel()
            await asyncio.gather(following, stopping, return_exceptions=True)

    async def _follow(self, wake: Callable[[], None]) -> None:
        pause = RETRY_S[0]
        while True:
            self._steady_at = None
            error: ApiError | None = None
            try:
                if self._is_list_due:
                    await self._list(wake)
                await self._watch(wake)
            except ApiError as caught:
                error = caught
            finally:
                self.is_connected = False
            expired = isinstance(error, ApiRefused) and error.is_expired
            was_long_ago = self._listed_at is not None and not self._was_listed_within(STEADY_S)
            if expired or (isinstance(error, ApiRefused) and error.is_nonsense):
                self._listed_at = None
            if expired and was_long_ago:
                # So it goes after a long absence; it is no failure.
                continue
            is_steady = self._steady_at is not None and time.monotonic() > self._steady_at
            if is_steady:
                pause = RETRY_S[0]
                if self.problem == self._too_short:
                    self._tell("", wake)
            if isinstance(error, ApiRefused) or not is_steady:
                self.failures += 1
                self._tell(str(error or self._too_short), wake)
            least = error.retry_after_s if isinstance(error, ApiRefused) else 0.0
            await asyncio.sleep(max(least, pause * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
            pause = min(2 * pause, RETRY_S[1])

    def _was_listed_within(self, seconds: float) -> bool:
        return self._listed_at is not None and time.monotonic() - self._listed_at < seconds

    @property
    def _is_list_due(self) -> bool:
        return not self._was_listed_within(self._resync_s)

    async def _list(self, wake: Callable[[], None]) -> None:
        try:
            items, version = await self._all(self._version)
        except ApiTooLarge:
            items, version = await self._all(LATEST_VERSION, SMALL_PAGE)
        except ApiRefused as error:
            if not (error.is_expired or error.is_ahead):
                raise
            items, version = await self._all(LATEST_VERSION)
        self._version = version
        self._listed_at = time.monotonic()
        self._resync_s = RESYNC_S * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        self._mirror.listed(items)
        self._answered()
        wake()

    async def _all(self, version: str, limit: int = PAGE) -> tuple[list[T], str]:
        """All objects, as of the version that is given with them, which is at least `version`."""
        items: list[T] = []
        query = self._query | _not_older(version)
        while True:
            page = await self._client.page(self._path, query, limit)
            items += (self._read(bytes(raw)) for raw in page.items)
            if not page.version:
                raise self._client.nonsense("a list without a version")
            if len(items) > MAX_ITEMS:
                raise self._client.nonsense(f"more than {MAX_ITEMS} objects")
            if not page.more:
                return items, page.version
            query = self._query | {"continue": page.more}

    async def _watch(self, wake: Callable[[], None]) -> None:
        seconds = random.uniform(*WATCH_S)  # noqa: S311 - no secret
        query = self._query | {
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": f"{seconds:.0f}",
        }
        async with self._client.watch(self._path, query) as events:
            self._steady_at = time.monotonic() + STEADY_S
            self.is_connected = True
            if self.problem != self._too_short:
                self._recovered(wake)
            async for event in events:
                self._take_in(event)
                self._steady_at = 0.0
                self._recovered(wake)
                if event.type != "BOOKMARK":
                    wake()

    def _take_in(self, event: Event) -> None:
        content = bytes(event.object)
        match event.type:
            case "ADDED" | "MODIFIED":
                self._mirror.changed(self._read(content))
            case "DELETED":
                self._mirror.gone(self._read(content))
            case "BOOKMARK":
                pass
            case _:
                raise self._client.nonsense("an event of an unknown type")
        # One without a version is told again, should the watch begin anew.
        with contextlib.suppress(*UNREADABLE):
            found = msgspec.json.decode(content, type=_Versioned)
            self._version = found.metadata.resource_version or self._version

    @property
    def _too_short(self) -> str:
        return f"the Kubernetes API server at {self._client.address} ends each watch at once"

    def _recovered(self, wake: Callable[[], None]) -> None:
        self._answered()
        self._tell("", wake)

    def _answered(self) -> None:
        self.answered_at = time.time()

    def _tell(self, problem: str, wake: Callable[[], None]) -> None:
        if problem != self.problem:
            self.problem = problem
            wake()


def _not_older(version: str) -> dict[str, str]:
    match version:
        case "":
            return {}
        case "0":
            return {"resourceVersion": version}
        case _:
            return {"resourceVersion": version, "resourceVersionMatch": "NotOlderThan"}
