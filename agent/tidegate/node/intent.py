"""What should be, from the intent server; kept in a file so that an agent without a server goes on as before.

An unreachable server changes nothing: the last answer stays in force, and how old it is shows as a problem. Where the
config entries are a cluster's custom resources, what the server has of them is not looked at.
"""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tidegate.catalog.client import CatalogClient, Snapshot
from tidegate.catalog.registration import NodeInfo
from tidegate.errors import TidegateError
from tidegate.intent.entries import from_server, to_consul
from tidegate.model import Instance
from tidegate.node.log import Log
from tidegate.state_files import write_atomically

if TYPE_CHECKING:
    from tidegate.catalog.kubernetes import CustomResources

ANSWER_S = 2.0
"""How long a round waits for the server; sidecars and rules are looked after without it."""

log = Log("intent")


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as it is kept in a file: entries in Consul's JSON."""

    at: float
    """When the server first answered so."""
    index: int
    entries: tuple[dict[str, Any], ...]
    instances: tuple[Instance, ...]
    nodes: tuple[NodeInfo, ...]
    default_allow: bool
    trust_domain: str
    datacenter: str
    root_id: str = ""


class IntentSource:
    """The latest snapshot of config entries and catalog."""

    def __init__(
        self, catalog: CatalogClient, path: Path, resources: "CustomResources | None" = None
    ) -> None:
        """`resources` are the config entries, where they are not the server's."""
        self._catalog = catalog
        self._resources = resources
        self._path = path
        self._snapshot: Snapshot | None = None
        self._answered_at = 0.0
        self._problem = ""
        self._unkept = ""
        self._recall()

    def current(self) -> Snapshot:
        """The latest snapshot; an empty one before the first answer."""
        return self._snapshot or Snapshot()

    @property
    def known(self) -> bool:
        """Whether any server ever said what should be."""
        return self._snapshot is not None

    def problems(self) -> tuple[str, ...]:
        """Why the snapshot may be out of date."""
        own = tuple(problem for problem in (self._problem, self._unkept) if problem)
        return own if self._resources is None else (*own, *self._resources.problems())

    @property
    def answered_at(self) -> float:
        """When the server last answered; 0 for never."""
        return self._answered_at

    @property
    def outdated(self) -> str:
        """Why what should be may be something else by now; empty when the server has just said it."""
        if self._problem or self._resources is None:
            return self._problem
        return self._resources.outdated

    @property
    def is_of_cluster(self) -> bool:
        """Whether config entries are custom resources, which are changed in the cluster only."""
        return self._resources is not None

    async def refresh(self) -> Snapshot:
        """Asks the server; the former snapshot where it does not answer."""
        try:
            async with asyncio.timeout(ANSWER_S):
                snapshot = await self._catalog.snapshot()
            if self._resources is not None:
                snapshot = self._resources.overlay(snapshot)
        except (TidegateError, TimeoutError) as error:
            reason = str(error) or f"the intent server does not answer within {ANSWER_S:.0f} s"
            if not self._problem:
                log.warning("no answer from the intent server", reason=reason)
            age = time.time() - self._answered_at
            old = f"; intent is {age:.0f} s old" if self.known else ""
            self._problem = f"{reason}{old}"
            return self.current()
        if self._problem:
            log.info("the intent server answers again")
            self._problem = ""
        self._answered_at = time.time()
        if snapshot != self._snapshot or self._unkept:
            self._snapshot = snapshot
            self._keep(snapshot)
        return snapshot

    def _keep(self, snapshot: Snapshot) -> None:
        kept = _Kept(
            at=self._answered_at,
            index=snapshot.index,
            entries=tuple(to_consul(entry) for entry in snapshot.entries),
            instances=snapshot.instances,
            nodes=snapshot.nodes,
            default_allow=snapshot.default_allow,
            trust_domain=snapshot.trust_domain,
            root_id=snapshot.root_id,
            datacenter=snapshot.datacenter,
        )
        try:
            write_atomically(self._path, msgspec.json.encode(kept))
        except OSError as error:
            if not self._unkept:
                log.warning("intent cannot be kept", file=str(self._path), reason=error.strerror)
            self._unkept = f"{self._path} cannot be written: {error.strerror}"
        else:
            self._unkept = ""

    def _recall(self) -> None:
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
            entries = tuple(from_server(entry, str(self._path)) for entry in kept.entries)
        except FileNotFoundError:
            return
        except (msgspec.DecodeError, UnicodeDecodeError, TidegateError, OSError) as error:
            log.warning("kept intent is unreadable", file=str(self._path), reason=str(error))
            return
        self._catalog.remember(kept.instances)
        self._answered_at = kept.at
        self._snapshot = Snapshot(
            index=kept.index,
            entries=entries,
            instances=kept.instances,
            nodes=kept.nodes,
            default_allow=kept.default_allow,
            trust_domain=kept.trust_domain,
            root_id=kept.root_id,
            datacenter=kept.datacenter,
        )
