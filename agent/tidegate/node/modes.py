"""A service's mode: what its own entry says, changing that, and waiting until every sidecar runs it."""

import asyncio
import time
from typing import Protocol

import msgspec

from tidegate.errors import TidegateError
from tidegate.intent.entries import Entry, EntryKey, Kind, ServiceDefaults
from tidegate.model import Instance, MutualTLSMode, ServiceName
from tidegate.node.mesh import ChangedMeanwhile

POLL_S = 0.25
ENFORCE_DEADLINE_S = 60.0
WRITES = 5
"""How often an entry is read and written again that somebody else changes at the same time."""


class Mesh(Protocol):
    """What changing a mode needs of the rest of the agent."""

    async def read_entry(self, key: EntryKey) -> Entry | None: ...

    async def write_entry(self, entry: Entry) -> int:
        """Writes and returns the index from which the entry holds; ChangedMeanwhile when another write came between."""
        ...

    async def instances(self, service: str | None) -> tuple[Instance, ...]: ...

    async def sidecar_problems(self, service: str) -> tuple[str, ...]:
        """Why sidecars of the service do not run as they should, one sentence each."""
        ...


async def own_entry(mesh: Mesh, service: str) -> ServiceDefaults:
    """The service's own entry as the server has it now; one that says nothing where there is none."""
    name = ServiceName.of(service)
    entry = await mesh.read_entry(EntryKey(Kind.SERVICE_DEFAULTS, *name))
    if isinstance(entry, ServiceDefaults):
        return entry
    return ServiceDefaults(name=name.name, namespace=name.namespace, partition=name.partition)


async def set_mode(mesh: Mesh, service: str, mode: MutualTLSMode | None) -> int:
    """Writes the mode into the service's own entry, all else of which stays; the index from which it holds."""
    for _ in range(WRITES):
        defaults = await own_entry(mesh, service)
        try:
            return await mesh.write_entry(msgspec.structs.replace(defaults, mutual_tls_mode=mode))
        except ChangedMeanwhile:
            continue
    raise TidegateError(f"the service-defaults of {service} are being changed by somebody else")


async def running_mode(mesh: Mesh, service: str, index: int, mode: MutualTLSMode) -> int:
    """Waits until every sidecar of the service runs `mode` by an intent of at least `index`; how many do.

    TidegateError, which names those that are behind and says what is wrong with them, after ENFORCE_DEADLINE_S.
    """
    deadline = time.monotonic() + ENFORCE_DEADLINE_S
    while True:
        meshed = [one for one in await mesh.instances(service) if one.meshed]
        behind = [one.name for one in meshed if one.applied_index < index or one.mode is not mode]
        if meshed and not behind:
            return len(meshed)
        if time.monotonic() >= deadline:
            who = f"of {', '.join(behind)}" if behind else f"of any {service}"
            late = f"after {ENFORCE_DEADLINE_S:.0f} s the sidecar {who} does not run {mode} mode"
            raise TidegateError(": ".join((late, *await mesh.sidecar_problems(service))))
        await asyncio.sleep(POLL_S)
