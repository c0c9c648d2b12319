"""What the agents of this machine say of their workloads: which namespace, which policy, how its redirection is."""

import asyncio
import contextlib
from collections.abc import Collection, Iterable
from typing import NamedTuple

import msgspec

from tidegate.errors import InputError, TidegateError
from tidegate.intent.policy import Policy
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError

TIMEOUT_S = 5.0


class KnownWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """What the redirect commands read of one workload in the answer of GET /v1/status."""

    id: str
    name: str
    netns: str
    wanted_in_mesh: bool
    annotations: dict[str, str]
    namespace_annotations: dict[str, str]
    service: str = ""
    policy: Policy | None = None
    """The policy that the agent works by; None while it has none for this workload."""
    problem: str = ""
    """What the agent says is wrong, such as annotations that have no effect because of a fault."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent answers."""

    node: str
    workloads: tuple[KnownWorkload, ...]
    trust_domain: str = ""
    profile: str = "consul"
    """How TLS of the mesh is recognised there."""


def known(addresses: Iterable[str]) -> tuple[Node, ...]:
    """What the agents answer, without those that do not answer in time or as this command understands it."""
    return tuple(answer for answer in _answers(addresses) if isinstance(answer, Node))


class Mesh(NamedTuple):
    """Which mesh an agent is of."""

    profile: str
    trust_domain: str


def meshes(nodes: Iterable[Node], numbers: Collection[int]) -> set[Mesh]:
    """Those of the agents that have a workload in one of these network namespaces (inode numbers)."""
    found = set()
    for node in nodes:
        for one in node.workloads:
            # A workload that went while it was told of is in none.
            with contextlib.suppress(KernelError):
                if node.trust_domain and netns.identity(one.netns).inode in numbers:
                    found.add(Mesh(node.profile, node.trust_domain))
    return found


def find(name: str, addresses: Iterable[str]) -> KnownWorkload:
    """The workload of a name or an id, whichever agent has it.

    InputError when none has it, or there are several; TidegateError when an agent that might have it does not answer.
    """
    answers = _answers(addresses)
    nodes = [answer for answer in answers if isinstance(answer, Node)]
    everyone = [(node.node, one) for node in nodes for one in node.workloads]
    found = [(node, one) for node, one in everyone if name in (one.id, one.name)]
    if len(found) > 1:
        ids = ", ".join(f"{one.id} on {node}" for node, one in found)
        raise InputError(
            f"{name!r} is several workloads: {ids}", field="--workload", expected="an id"
        )
    if found:
        return found[0][1]
    unheard = [answer for answer in answers if isinstance(answer, TidegateError)]
    if unheard and not nodes:
        raise unheard[0]
    names = ", ".join(sorted(one.name for _, one in everyone)) or "none"
    problem = f"no workload {name!r} is known (known: {names})"
    if unheard:
        reasons = "; ".join(map(str, unheard))
        raise TidegateError(f"{problem}, but not every agent was heard: {reasons}")
    raise InputError(problem, field="--workload")


def _answers(addresses: Iterable[str]) -> list[Node | TidegateError]:
    async def ask(address: str) -> Node | TidegateError:
        try:
            return await _ask(address)
        except TidegateError as error:
            return error

    async def ask_all() -> list[Node | TidegateError]:
        return await asyncio.gather(*map(ask, addresses))

    return asyncio.run(ask_all())


async def _ask(address: str) -> Node:
    # The HTTP client takes longer to import than most commands take, and most have no agent to ask.
    from tidegate.node.client import AgentClient, AgentUnreachable

    async with AgentClient(address, timeout_s=TIMEOUT_S) as agent:
        answer = await agent.get("/v1/status")
    try:
        return msgspec.convert(answer, Node)
    except msgspec.ValidationError as error:
        problem = (
            f"the agent at {address} answers /v1/status in a way that this command does not know"
        )
        raise AgentUnreachable(f"{problem}: {error}") from error
