"""The place of one service of this machine: its own network namespace with its rules, and the way into it.

`make` runs before the service starts, at every boot, and asks nobody: the rules are in force before there is a link by
which anything could come, and lead to ports on which nobody listens until the agent has started the sidecar. Closed,
not open. The agent finds the namespace and the rules as they should be.
"""

import asyncio
import hashlib
import time

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import InputError, TidegateError, nearest
from tidegate.kernel import netns
from tidegate.kernel.door import Door
from tidegate.kernel.errors import KernelError
from tidegate.model import Workload
from tidegate.node.config import AgentConfig
from tidegate.node.policies import policy_for
from tidegate.workloads.processes.settings import Network, ProcessConfig
from tidegate.workloads.processes.source import HOST

INTERFACE = "eth0"
"""Of the service, in its namespace."""
ASKED_EVERY_S = 0.5

_GATEWAYS = ("169.254.1.1", "fe80::1")
"""Link-local addresses of the host on each of the links, IPv4 and IPv6."""
_WITHOUT_DAD = {
    "ipv6/conf/all/accept_dad": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/all/accept_ra": "0",
    "ipv6/conf/default/accept_ra": "0",
}


class PlaceError(TidegateError):
    """The place of a service is not as it has to be."""


class _SaidOfWorkload(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    meshed: bool
    problem: str = ""


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of an agent's GET /v1/status."""

    workloads: tuple[_SaidOfWorkload, ...] = ()


def described(config: AgentConfig, name: str) -> ProcessConfig:
    """The service whose workload is called so. InputError when the configuration has none."""
    services = {one.workload_name: one for one in config.processes}
    if name not in services:
        expected = nearest(name, sorted(services)) if services else "a section `processes`"
        raise InputError(f"no service is called {name!r}", field="processes", expected=expected)
    return services[name]


def make(config: AgentConfig, one: ProcessConfig) -> None:
    """Make the place, rules first; what is there and right stays as it is.

    A service that the source has to find is in a place of somebody else's: InputError. KernelError when the kernel
    refuses, PlaceError when it has other rules than it should.
    """
    if one.host_network is not None:
        _redirect(config, one, HOST)
        return
    if one.network is None:
        raise InputError(
            f"{one.workload_name} has no place that could be made for it",
            field="processes",
            expected="network or host_network",
        )
    if one.workload_name not in netns.names():
        netns.create(one.workload_name)
    _redirect(config, one, netns.path(one.workload_name))
    _join(one.workload_name, one.network)


def remove(name: str, one: ProcessConfig | None) -> None:
    """Take the place away, if it is there; `one` is None for a service that the configuration has no more.

    Call it when the service has ended. KernelError when the kernel refuses.
    """
    if one is not None and one.host_network is not None:
        Engine().remove(HOST)
        return
    if one is not None and one.network is None:
        return
    with Door(HOST) as host:
        host.delete_link(link(name))
    netns.delete(name)


def link(name: str) -> str:
    """Name of the host's end of the link to a service; 15 bytes are what the kernel has (linux/if.h, IFNAMSIZ)."""
    whole = f"tg-{name}"
    # An underscore is in the name of no service.
    digest = f"tg_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return whole if len(whole) <= len(digest) else digest


def wait_until_redirected(config: AgentConfig, name: str, seconds: float) -> None:
    """Until the agent has the service in the mesh, its sidecar included. PlaceError when it has not in that time."""
    said = asyncio.run(_asked(config, name, time.monotonic() + seconds))
    if said:
        raise PlaceError(f"{name} is not in the mesh after {seconds:g} s: {said}")


async def _asked(config: AgentConfig, name: str, until: float) -> str:
    """Why the service is not in the mesh at the end; empty once it is."""
    while True:
        said = await _said(config, name)
        if not said or time.monotonic() > until:
            return said
        await asyncio.sleep(ASKED_EVERY_S)


async def _said(config: AgentConfig, name: str) -> str:
    # An HTTP client takes longer to load than all else here to run, and a machine that shuts down waits for `remove`.
    from tidegate.node.client import AgentClient

    try:
        async with AgentClient(f"unix://{config.socket}") as agent:
            said = msgspec.convert(await agent.get("/v1/status"), _Said)
    except TidegateError as error:
        return str(error)
    about = next((one for one in said.workloads if one.name == name), None)
    if about is None:
        return "the agent does not know it"
    return "" if about.meshed else about.problem or "its sidecar is not ready"


def _redirect(config: AgentConfig, one: ProcessConfig, netns_path: str) -> None:
    if not one.meshed:
        return
    workload = Workload(
        id="",
        name=one.workload_name,
        service=one.service,
        node=config.node,
        netns=netns_path,
        sidecar=one.sidecar,
        annotations=one.redirected_by,
    )
    policy = policy_for(workload, config.redirect.policy)
    engine = Engine(config.redirect.backend)
    engine.apply(netns_path, policy, adopt=config.redirect.adopt)
    differences = engine.check(netns_path, policy)
    if differences:
        raise PlaceError(f"{one.workload_name} is not redirected: {'; '.join(differences)}")


def _join(name: str, network: Network) -> None:
    """A veth pair from the service's namespace to the host, which routes its addresses there."""
    families = [":" in address for address in network.addresses]
    gateways = [_GATEWAYS[is_ipv6] for is_ipv6 in families]
    try:
        with Door(HOST) as host, Door(netns.path(name)) as inside:
            if any(families):
                inside.sysctls(_WITHOUT_DAD)
            inside.up("lo")
            inside.ensure_veth(INTERFACE, host, link(name))
            host.addresses(link(name), gateways, lengths=(32, 64))
            if not all(families):
                host.sysctls({f"ipv4/conf/{link(name)}/forwarding": "1"})
            inside.addresses(INTERFACE, network.addresses)
            for gateway in gateways:
                inside.route("default", INTERFACE, via=gateway, onlink=True)
            for address in network.addresses:
                host.route(address, link(name))
    except NetlinkError as error:
        raise KernelError(f"cannot join {name} to the host: {error}", error.code) from error
