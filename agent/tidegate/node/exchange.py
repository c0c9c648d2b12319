"""What the agent and the intent server tell each other, beside the agent's rounds: a server that is slow holds up none.

Intent and catalog come from there, and leaf certificates for the sidecars that the agent runs; what runs on this node
goes there.
"""

import time
from collections.abc import Callable, Iterable

import msgspec

from tidegate.catalog.client import CatalogClient, CatalogRefused, LeafMaterial, Snapshot
from tidegate.catalog.registration import NodeInfo, is_published
from tidegate.errors import InputError, TidegateError
from tidegate.identity import spiffe
from tidegate.identity.spiffe import AGENT_SERVICE
from tidegate.model import Instance, Sidecar, Workload
from tidegate.node.config import AgentConfig
from tidegate.node.intent import IntentSource
from tidegate.node.keeper import Keeper
from tidegate.node.observation import published
from tidegate.node.problems import Problems
from tidegate.verdict import names


class Leaves(msgspec.Struct, frozen=True, kw_only=True):
    """New leaf certificates of one workload."""

    of: tuple[str, ...]
    """SPIFFE URIs that they are for."""
    material: tuple[LeafMaterial, ...]


class Exchange:
    """All methods are for the thread of the event loop, but for `leaves` and `taken`."""

    def __init__(
        self,
        config: AgentConfig,
        catalog: CatalogClient,
        intent: IntentSource,
        problems: Problems,
        news: Callable[[], None],
    ) -> None:
        """`news` is called when there is something that the next round should know at once."""
        self._config = config
        self._catalog = catalog
        self._intent = intent
        self._problems = problems
        self._news = news
        self._leaves: dict[str, Leaves] = {}
        self._snapshot: Snapshot | None = None
        self.roots_pem = ""
        """The mesh's root certificates, as of the latest leaf."""
        self.root_id = ""
        """Which of them issued it, as far as the server says."""

    def leaves(self, workload: Workload) -> tuple[LeafMaterial, ...]:
        """New leaves for the services that it has; none while the present ones are good."""
        found = self._leaves.get(workload.id)
        return found.material if found and found.of == self._identities(workload) else ()

    def taken(self, workload: Workload) -> None:
        """Its keeper has the new leaves."""
        self._leaves.pop(workload.id, None)

    async def refresh(self) -> Snapshot:
        """The server's latest answer."""
        await self._intent.refresh()
        # What it had before is the same object, as long as the server says the same.
        snapshot = self._intent.current()
        if self._intent.known and snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._compare(snapshot)
            self._news()
        return snapshot

    def _compare(self, snapshot: Snapshot) -> None:
        """The names of the mesh that the server says with those that this agent was told."""
        for field, said, told in (
            ("trust_domain", snapshot.trust_domain, self._config.trust_domain),
            ("datacenter", snapshot.datacenter, self._config.datacenter),
        ):
            if said and said != told:
                problem = (
                    f"the agent's configuration says {field}: {told}, and the mesh has {said}: TLS of the mesh and"
                    f" certificates are not recognised; write {field}: {said}, and start the agent again"
                )
                self._problems.tell(field, problem)
            else:
                self._problems.clear(field)

    async def fetch_leaves(self, free: Iterable[Keeper]) -> None:
        """New leaf certificates, one for each service, for those of the workloads that need them."""
        for keeper in free:
            workload = keeper.workload
            if not workload.meshed or workload.sidecar is not Sidecar.TIDEGATE:
                continue
            try:
                wanted = self._identities(workload)
                root_id = self._intent.current().root_id
                if self.leaves(workload) or not keeper.needs_leaves(time.time(), wanted, root_id):
                    continue
                self.roots_pem, self.root_id = await self._catalog.roots(), root_id
                material = [
                    await self._catalog.leaf(service, self._config.leaf_lifetime)
                    for service in names.services_of(workload)
                ]
            except TidegateError as error:
                self._problems.tell("leaf", f"no leaf for {workload.name}: {error}", workload.id)
            else:
                self._problems.clear("leaf", workload.id)
                self._leaves[workload.id] = Leaves(of=wanted, material=tuple(material))
                self._news()

    def _identities(self, workload: Workload) -> tuple[str, ...]:
        domain, datacenter = self._config.trust_domain, self._config.datacenter
        services = names.services_of(workload)
        if AGENT_SERVICE in services:
            raise InputError(
                f"the service {AGENT_SERVICE} is that of the agents themselves",
                field="service",
                expected="another name",
            )
        return tuple(spiffe.service_id(domain, service, datacenter) for service in services)

    async def publish(
        self, snapshot: Snapshot, staying: Iterable[Keeper], *, is_complete: bool
    ) -> None:
        """Tells the catalog what its answer does not say yet; of a workload that is gone only if all are known."""
        known = {
            one.id: one
            for one in snapshot.instances
            if one.node == self._config.node and not one.seen_until
        }
        kept = {keeper.workload.id: keeper for keeper in staying}
        gone = [one for one in known if one not in kept] if is_complete else []
        address = self._config.node_addresses[0] if self._config.node_addresses else "127.0.0.1"
        node = NodeInfo(name=self._config.node, address=address, agent_api=self._config.agent_api)
        try:
            for keeper in kept.values():
                # What a former agent said holds until this one has looked: callers would leave the mesh meanwhile.
                if keeper.has_looked or keeper.workload.id not in known:
                    await self._publish_one(node, keeper, snapshot, known)
            for instance_id in gone:
                await self._catalog.deregister(self._config.node, instance_id, snapshot)
        except TidegateError as error:
            self._problems.tell(
                "publish", f"the catalog does not have the latest of this node: {error}"
            )
        else:
            self._problems.clear("publish")

    async def _publish_one(
        self, node: NodeInfo, keeper: Keeper, snapshot: Snapshot, known: dict[str, Instance]
    ) -> None:
        """One by one, so that an instance that the server does not take stops no other."""
        instance = published(keeper, self._config)
        try:
            if not is_published(instance, known):
                # Until the server has the node, each answer may be the one that has it.
                told = snapshot if node in snapshot.nodes else None
                await self._catalog.register(node, [instance], told)
        except CatalogRefused as error:
            problem = f"the catalog does not take {instance.name}: {error}"
            self._problems.tell("publish", problem, keeper.workload.id)
        else:
            self._problems.clear("publish", keeper.workload.id)
