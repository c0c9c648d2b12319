"""The pods of this node as a source of workloads: followed by list and watch, placed, and treated.

What runs outlives what the API server says of it: a pod that was deleted there stays a workload as long as it is found
on the node, so that neither a pod that was deleted by force nor a server that has lost its memory takes rules away. The
latest answer is kept in a file: an agent that starts while the API server is away knows its pods.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from tidegate.kubeapi.client import ApiClient
from tidegate.kubeapi.errors import UNREADABLE, ApiRefused
from tidegate.kubeapi.following import ANY_VERSION, Following
from tidegate.state_files import write_atomically
from tidegate.workloads.kubernetes.placing import FindAttachment, NotPlaced, Placed, Places
from tidegate.workloads.kubernetes.pods import (
    Kept,
    Key,
    Left,
    Pod,
    Treated,
    Unclear,
    read_pod,
    treat,
)
from tidegate.workloads.kubernetes.settings import KubernetesConfig
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment, WatchState

LOOK_UP_S = 2.0
"""How long a CNI call waits for what the API server says of its pod."""
KEEP_S = 5.0
"""How often what is known is written down at most."""
ENDING_S = 10.0
"""How long a pod that was found may be nowhere before that is a problem: its processes have ended, and the server is
told so last."""
_MAX_TOLD = 50
"""Most problems of pods that are told one by one."""


class _Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The latest answer, as it is kept in a file."""

    node: str
    at: float
    """When the server last said anything."""
    version: str
    pods: tuple[Pod, ...]
    departed: tuple[Pod, ...]


class _Known(msgspec.Struct, kw_only=True):
    """What the API server said, as far as it is about this node. Changed and read under one lock."""

    pods: dict[Key, Pod] = {}
    departed: dict[str, Pod] = {}
    """By UID: the server has them no more, and they may still run."""
    unclear: dict[Key | None, str] = {}
    """Pods that could not be understood the last time, and why."""
    foreign: dict[Key, str] = {}
    """Pods that cannot be this node's, and why."""
    is_synced: bool = False
    """Whether all pods were listed since this agent runs."""


class _Look(msgspec.Struct, kw_only=True):
    """What one `list` has found so far."""

    problems: list[str]
    listed: list[Description] = []
    left: list[LeftAlone] = []


class KubernetesSource:
    """What the API server says of this node's pods.

    `list`, `left_alone`, `problems` and `is_complete` belong to one thread, `run` and `look_up` to an event loop.
    """

    def __init__(
        self,
        config: KubernetesConfig,
        node: str,
        find_attachment: FindAttachment,
        cache_file: Path,
    ) -> None:
        """`node` is what the agent calls this node; `cache_file` keeps the latest answer over restarts."""
        self._config = config
        self._node = config.node or node
        self._cache_file = cache_file
        self._places = Places(config.cgroups, find_attachment)
        self._lock = threading.Lock()
        self._known = _Known()
        self._is_unkept = False
        """Whether what is known is not what the file has."""
        self._keeping = ""
        """Why it could not be written or read."""
        self._left: tuple[LeftAlone, ...] = ()
        self._problems: tuple[str, ...] = ()
        self._is_complete = False
        self._described: dict[str, tuple[Pod, Description]] = {}
        self._found_at: dict[str, float] = {}
        """When each pod was found last, by UID and the monotonic clock."""
        self._as_of = 0.0
        """When the server said what the file has."""
        version = self._recall()
        self._client = ApiClient(config.access)
        self._following = Following(
            self._client,
            "/api/v1/pods",
            {"fieldSelector": f"spec.nodeName={self._node}"},
            self._read,
            self,
            version=version,
        )

    # What the daemon's rounds ask for.

    def list(self) -> tuple[Description, ...]:
        """All pods of this node that were found on it. What is changed of one since the last time is a new object."""
        with self._lock:
            pods = tuple(self._known.pods.values())
            departed = tuple(self._known.departed.values())
            is_synced = self._known.is_synced
            unclear = dict(self._known.unclear)
            foreign = tuple(self._known.foreign.values())
        self._places.begin()
        look = _Look(problems=[*self._of_server(), *unclear.values(), *foreign])
        if is_synced and not (pods or departed or unclear or foreign):
            # The agent's own would be among them. A server says nothing of a name that is no node's.
            look.problems.append(
                f"the Kubernetes API server has no pods on node {self._node}; expected the metadata.name of this node"
            )
        for pod in pods:
            self._look_at(pod, look, is_synced=is_synced)
        for pod in departed:
            self._look_at_departed(pod, look)
        self._forget_all_but({one.id for one in look.listed}, {pod.uid for pod in pods})
        lost = any(one.treatment is Treatment.NOT_FOUND for one in look.left)
        unknown = unclear.keys() - {pod.key for pod in pods}
        self._is_complete = is_synced and not lost and not unknown
        self._left = tuple(look.left)
        self._problems = _bounded(look.problems)
        return tuple(look.listed)

    def _look_at(self, pod: Pod, look: "_Look", *, is_synced: bool) -> None:
        """A pod that the server has, or had when it was asked last."""
        look.problems.extend(f"pod {pod.key}: {fault}" for fault in pod.faults)
        treated = self._treated(pod)
        if isinstance(treated, Left):
            look.left.append(_left_alone(pod, treated.treatment, treated.reason))
            return
        if treated.problem:
            look.problems.append(f"pod {pod.key}: {treated.problem}")
        match self._places.place(pod):
            case Placed(path):
                look.listed.append(self._description(pod, treated, path))
            case NotPlaced(why) if is_synced and self._should_run(pod):
                reason = f"its network namespace was not found: {why}"
                look.problems.append(f"pod {pod.key} runs, and {reason}")
                look.left.append(_left_alone(pod, Treatment.NOT_FOUND, reason))
            case NotPlaced():
                # Its sandbox is not made yet, or it has ended.
                pass

    def _look_at_departed(self, pod: Pod, look: "_Look") -> None:
        """A pod that the server has no more: a workload as long as it is found."""
        treated, place = self._treated(pod), self._places.place(pod)
        if isinstance(treated, Kept) and isinstance(place, Placed):
            look.listed.append(self._description(pod, treated, place.path))
            return
        with self._lock:
            self._known.departed.pop(pod.uid, None)

    def _treated(self, pod: Pod) -> Treated:
        """One that the server has declared ended, such as for a deadline or because its node did not answer, is
        treated as before while it goes on."""
        has_run = pod.is_finished and pod.uid in self._described
        if has_run and isinstance(self._places.place(pod), Placed):
            pod = msgspec.structs.replace(pod, is_finished=False)
        return treat(pod, self._config)

    def _forget_all_but(self, listed: set[str], known: set[str]) -> None:
        """What is remembered of pods that are not listed, and when pods were found that are not known either."""
        self._places.keep(listed)
        for uid in self._described.keys() - listed:
            del self._described[uid]
        for uid in self._found_at.keys() - listed - known:
            del self._found_at[uid]

    def left_alone(self) -> tuple[LeftAlone, ...]:
        """Pods that are not looked after, as of the latest `list`."""
        return self._left

    def problems(self) -> tuple[str, ...]:
        """One sentence for each thing that the latest `list` could not find out."""
        return self._problems

    @property
    def is_complete(self) -> bool:
        """Whether the API server has told of all pods, and all that run were found."""
        return self._is_complete

    @property
    def watch(self) -> WatchState:
        """How it stands with the API server; may be asked for in any thread."""
        with self._lock:
            pods = len(self._known.pods)
        return WatchState(
            is_connected=self._following.is_connected,
            answered_at=self._following.answered_at,
            failures=self._following.failures,
            pods=pods,
        )

    def _should_run(self, pod: Pod) -> bool:
        """Whether a pod that is nowhere has not just ended."""
        found_at = self._found_at.get(pod.uid)
        ends = pod.is_terminating or (
            found_at is not None and time.monotonic() - found_at < ENDING_S
        )
        return pod.has_sandbox and not ends

    def _of_server(self) -> Iterator[str]:
        if problem := self._following.problem:
            at = self._following.answered_at or self._as_of
            moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
            yield f"{problem}; pods are known {f'as of {moment}' if at else 'only by other sources'}"
        if self._keeping:
            yield self._keeping

    def _description(self, pod: Pod, treated: Kept, path: str) -> Description:
        """The same object as before, if nothing has changed."""
        former = self._described.get(pod.uid)
        self._found_at[pod.uid] = time.monotonic()
        if former is not None and former[0] == pod and former[1].netns == path:
            return former[1]
        made = _described(pod, treated, path)
        self._described[pod.uid] = (pod, made)
        return made

    # What CNI calls ask for.

    def known(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        """What `look_up` gives when that takes no question; None otherwise. From any thread."""
        pod = self._find(namespace, name, uid)
        return None if pod is None else self._told(pod, netns)

    async def look_up(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        """What is known of one pod, as `list` would tell it were it in the namespace at `netns`.

        From what is known, else by one question to the API server, which may take LOOK_UP_S. `uid` may be "". None when
        there is no such pod. ApiError when nobody can say.
        """
        pod = self._find(namespace, name, uid)
        if pod is None:
            pod = await self._ask_for(namespace, name)
        if pod is None or (uid and pod.uid != uid):
            return None
        return self._told(pod, netns)

    def _told(self, pod: Pod, netns: str) -> Description | LeftAlone:
        treated = treat(pod, self._config)
        if isinstance(treated, Left):
            return _left_alone(pod, treated.treatment, treated.reason)
        return _described(pod, treated, netns)

    def _find(self, namespace: str, name: str, uid: str) -> Pod | None:
        with self._lock:
            pod = self._known.pods.get(Key(namespace, name))
        return pod if pod is not None and uid in ("", pod.uid) else None

    async def _ask_for(self, namespace: str, name: str) -> Pod | None:
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(name, safe='')}"
        content = await self._client.get(path, limit_s=LOOK_UP_S)
        if content is None:
            return None
        pod = self._read(content)
        if isinstance(pod, Unclear):
            raise ApiRefused(200, "", pod.problem)
        return pod

    # What the API server says.

    async def run(self, stop: asyncio.Event, wake: Callable[[], None]) -> None:
        """Follows the API server until `stop`; `wake` is called after each change."""
        keeping = asyncio.create_task(self._keep_up())
        try:
            await self._following.run(stop, wake)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await asyncio.to_thread(self._keep)
            await self._client.close()

    def _read(self, content: bytes) -> Pod | Unclear:
        return read_pod(content, mirror_namespaces=self._config.mirror_namespaces)

    def listed(self, items: Sequence[Pod | Unclear]) -> None:
        """These are all pods of this node."""
        with self._lock:
            former, self._known.pods = self._known.pods, {}
            self._known.unclear, self._known.foreign = {}, {}
            for one in items:
                self._take_in(one, former)
            present = {pod.uid for pod in self._known.pods.values()}
            for pod in former.values():
                if pod.uid not in present:
                    self._depart(pod)
            self._known.is_synced = True
            self._is_unkept = True

    def changed(self, item: Pod | Unclear) -> None:
        """This one is new, or is so from now on."""
        with self._lock:
            self._take_in(item, self._known.pods)

    def gone(self, item: Pod | Unclear) -> None:
        """The server has this one no more."""
        with self._lock:
            key = item.key
            self._known.unclear.pop(key, None)
            if key is None:
                return
            self._known.foreign.pop(key, None)
            pod = self._known.pods.get(key)
            if pod is not None and (isinstance(item, Unclear) or item.uid == pod.uid):
                del self._known.pods[key]
                self._depart(pod)
            self._is_unkept = True

    def _take_in(self, item: Pod | Unclear, former: dict[Key, Pod]) -> None:
        """One that cannot be understood stays as it was in `former`."""
        known, key = self._known, item.key
        if isinstance(item, Unclear):
            known.unclear[key] = item.problem
            if key is not None and key in former:
                known.pods[key] = former[key]
            return
        known.unclear.pop(item.key, None)
        if problem := self._foreignness(item):
            known.foreign[item.key] = problem
            return
        known.foreign.pop(item.key, None)
        present = known.pods.get(item.key)
        if present == item:
            return
        self._is_unkept = True
        if present is not None and present.uid != item.uid:
            # Its name is another's by now.
            self._depart(present)
        known.departed.pop(item.uid, None)
        known.pods[item.key] = item

    def _foreignness(self, pod: Pod) -> str:
        """Why a pod that the server tells of cannot be one of this node, "" if it can."""
        if pod.node != self._node:
            return f"the Kubernetes API server tells of pod {pod.key}, which is not on node {self._node}"
        for other in self._known.pods.values():
            if other.uid == pod.uid and other.key != pod.key:
                return f"pods {other.key} and {pod.key} have one uid, {pod.uid}; only {other.key} is looked after"
        return ""

    def _depart(self, pod: Pod) -> None:
        if not pod.is_host_network:
            self._known.departed[pod.uid] = pod

    # What outlives the agent.

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            await asyncio.to_thread(self._keep)

    def _keep(self) -> None:
        with self._lock:
            if not self._is_unkept:
                return
            self._is_unkept = False
            cache = _Cache(
                node=self._node,
                at=self._following.answered_at,
                version=self._following.version,
                pods=tuple(self._known.pods.values()),
                departed=tuple(self._known.departed.values()),
            )
        try:
            write_atomically(self._cache_file, msgspec.json.encode(cache))
        except OSError as error:
            self._keeping = f"{self._cache_file} cannot be written: {error.strerror}"
            with self._lock:
                self._is_unkept = True
        else:
            self._keeping = ""

    def _recall(self) -> str:
        """Takes in what the file has, and says the version that it is of."""
        try:
            cache = msgspec.json.decode(self._cache_file.read_bytes(), type=_Cache)
        except FileNotFoundError:
            return ANY_VERSION
        except (OSError, *UNREADABLE) as error:
            reason = getattr(error, "strerror", None) or error
            self._keeping = f"{self._cache_file} is of no use: {reason}"
            return ANY_VERSION
        if cache.node != self._node:
            return ANY_VERSION
        self._as_of = cache.at
        self._known.pods = {pod.key: pod for pod in cache.pods}
        self._known.departed = {pod.uid: pod for pod in cache.departed}
        return cache.version


def _described(pod: Pod, treated: Kept, path: str) -> Description:
    return Description(
        origin=Origin.KUBERNETES,
        netns=path,
        id=pod.uid,
        name=pod.name,
        service=pod.service,
        namespace=pod.namespace,
        port=pod.port,
        more_ports=pod.more_ports,
        addresses=pod.addresses or None,
        meshed=treated.sidecar is not None,
        sidecar=treated.sidecar,
        reason=treated.reason,
        annotations=pod.annotations,
        created_at=pod.started_at or None,
    )


def _left_alone(pod: Pod, treatment: Treatment, reason: str) -> LeftAlone:
    return LeftAlone(
        origin=Origin.KUBERNETES,
        id=pod.uid,
        name=pod.name,
        namespace=pod.namespace,
        treatment=treatment,
        reason=reason,
    )


def _bounded(problems: Sequence[str]) -> tuple[str, ...]:
    more = len(problems) - _MAX_TOLD
    if more <= 0:
        return tuple(problems)
    return (*problems[:_MAX_TOLD], f"and {more} more problems with pods")
