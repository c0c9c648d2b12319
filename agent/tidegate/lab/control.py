"""The mesh's side of a lab: its server with config entries, and an agent per node.

Writes their configuration, starts them as a user would, and waits until they have settled. Speaks to
them through their sockets alone; what they do is theirs.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from tidegate.catalog.client import CatalogClient
from tidegate.intent.entries import Entry, EntryKey, parse_entries
from tidegate.kernel import netns
from tidegate.lab import mounts, network, processes, state
from tidegate.lab.network import Layout
from tidegate.lab.processes import with_log
from tidegate.lab.spec import OUTSIDE, ConfigText, LabSpec, PodSpec
from tidegate.lab.state import LabError, LabPaths, SidecarStatus
from tidegate.model import Workload
from tidegate.node.client import AgentClient, AgentRefused, AgentUnreachable

SERVER = "server"
"""Name of the server's process."""

START_DEADLINE_S = 30.0
SETTLE_DEADLINE_S = 60.0
ASK_EVERY_S = 0.1


class _WrittenConfig(msgspec.Struct, frozen=True, kw_only=True):
    texts: tuple[ConfigText, ...] = ()


class _SaidOfWorkload(SidecarStatus, frozen=True, kw_only=True):
    name: str


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What the lab reads of an agent's GET /v1/status."""

    round_at: float = 0.0
    workloads: tuple[_SaidOfWorkload, ...] = ()
    problems: tuple[str, ...] = ()

    def about(self, pod: str) -> SidecarStatus | None:
        return next((workload for workload in self.workloads if workload.name == pod), None)


def start(spec: LabSpec, paths: LabPaths, layout: Layout, progress: Callable[[str], None]) -> None:
    """Make server, config entries and agents be as the lab file says, and wait until all is settled.

    What runs already with the same configuration is left alone. Raises LabError with what did not
    come up and why, CatalogRefused for an entry that the server does not take.
    """
    mounts.mount_bpffs(paths.bpf)
    progress("server")
    server_config = _yaml(
        {
            "state_dir": str(paths.server_state),
            "listen": _url(paths.server_socket),
            "trust_domain": spec.trust_domain,
            "datacenter": spec.datacenter,
            "default_intention_policy": spec.default_intention_policy.value,
            "leaf_lifetime": spec.leaf_lifetime_s,
        }
    )
    state.write_bytes(paths.server_config, server_config)
    argv = _tidegate("server", "--config", str(paths.server_config))
    digest = processes.digest(*argv, server_config)
    if not processes.runs_just_so(paths, SERVER, digest):
        processes.stop(paths, SERVER)
        processes.start(paths, SERVER, network.namespace(spec.name, OUTSIDE), argv, digest)
        _wait_for_socket(paths, SERVER, paths.server_socket)
    progress(f"config entries: {len(spec.config)}")
    _write_config(spec, paths)
    progress(f"agents: {', '.join(spec.nodes)}")
    write_workloads(paths, spec, layout)
    _start_agents(spec, paths, layout)
    progress(f"sidecars: {', '.join(pod.name for pod in spec.pods if pod.mesh) or 'none'}")
    _wait_until_settled(spec, paths)


def write_workloads(paths: LabPaths, spec: LabSpec, layout: Layout) -> None:
    """Tell the agents which pods there are; a file that says it already is left alone."""
    for pod in spec.pods:
        file = paths.workload(pod.node, pod.name)
        before = state.read(file, Workload)
        workload = Workload(
            id=before.id if before else f"{spec.name}-{pod.name}-{time.time_ns():x}",
            name=pod.name,
            service=pod.service,
            node=pod.node,
            netns=netns.path(network.namespace(spec.name, pod.name)),
            interface=network.POD_INTERFACE,
            port=pod.port,
            more_ports=pod.more_ports,
            addresses=layout.pod_addresses(pod.name),
            meshed=pod.mesh,
            annotations=pod.annotations,
            created_at=before.created_at if before else time.time(),
        )
        if workload != before:
            state.write(file, workload)


async def ask_agents(paths: LabPaths, nodes: Sequence[str]) -> dict[str, Said | None]:
    """What each agent says; None for one that does not answer."""

    async def ask(node: str) -> Said | None:
        try:
            async with AgentClient(_url(paths.agent_socket(node))) as client:
                return msgspec.convert(await client.get("/v1/status"), Said)
        except (AgentUnreachable, AgentRefused):
            return None
        except msgspec.ValidationError as error:
            raise LabError(f"the agent of {node} answers /v1/status with: {error}") from error

    return dict(zip(nodes, await asyncio.gather(*map(ask, nodes)), strict=True))


def agent_name(node: str) -> str:
    """Name of the agent's process, and of its log."""
    return f"agent-{node}"


def _start_agents(spec: LabSpec, paths: LabPaths, layout: Layout) -> None:
    started = []
    for node in spec.nodes:
        config = _yaml(
            {
                "node": node,
                "node_addresses": [
                    *layout.node_addresses(node),
                    *layout.fabric_addresses(node),
                ],
                "server": _url(paths.server_socket),
                "run_dir": str(paths.agent_run(node)),
                "state_dir": str(paths.agent_state(node)),
                "socket": str(paths.agent_socket(node)),
                "bpffs": str(paths.agent_pins(node)),
                "workloads": str(paths.workloads(node)),
                "trust_domain": spec.trust_domain,
                "datacenter": spec.datacenter,
                "window": spec.window_s,
                "leaf_lifetime": spec.leaf_lifetime_s,
                "environment": "lab",
                "lab": spec.name,
            }
        )
        state.write_bytes(paths.agent_config(node), config)
        argv = _tidegate("agent", "run", "--config", str(paths.agent_config(node)))
        namespace = network.namespace(spec.name, node)
        digest = processes.digest(*argv, config)
        if not processes.runs_just_so(paths, agent_name(node), digest):
            processes.stop(paths, agent_name(node))
            processes.start(paths, agent_name(node), namespace, argv, digest)
            started.append(node)
    for node in started:
        _wait_for_socket(paths, agent_name(node), paths.agent_socket(node))


def _write_config(spec: LabSpec, paths: LabPaths) -> None:
    """Write the entries that the lab file has changed, and delete those that it has dropped.

    Entries that somebody else has written or changed stay as they are.
    """
    written = (state.read(paths.written_config, _WrittenConfig) or _WrittenConfig()).texts
    before = {entry for text in written for entry in _keyed(text)}
    changed = [text for text in spec.config if text.text not in {old.text for old in written}]
    wanted = {key for text in spec.config for key in _keyed(text)}
    asyncio.run(
        _send_config(
            _url(paths.server_socket),
            [entry for text in changed for entry in parse_entries(text.text, text.source)],
            sorted(before - wanted),
        )
    )
    state.write(paths.written_config, _WrittenConfig(texts=spec.config))


def _keyed(text: ConfigText) -> list[EntryKey]:
    return [entry.key for entry in parse_entries(text.text, text.source)]


async def _send_config(address: str, entries: Sequence[Entry], gone: Sequence[EntryKey]) -> None:
    async with CatalogClient(address) as client:
        for entry in entries:
            await client.write_entry(entry)
        for key in gone:
            await client.delete_entry(key)


def _wait_for_socket(paths: LabPaths, name: str, path: Path) -> None:
    def answers() -> bool:
        _require_alive(paths, name)
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(path)) == 0

    processes.wait_until(
        answers,
        START_DEADLINE_S,
        lambda: with_log(paths, name, f"{name} does not answer at {path}"),
    )


def _require_alive(paths: LabPaths, name: str) -> None:
    if not processes.alive(processes.recorded(paths, name)):
        raise LabError(with_log(paths, name, f"{name} ended while it was starting"))


def _wait_until_settled(spec: LabSpec, paths: LabPaths) -> None:
    """Wait until every pod is observed, and meshed as it should be, and every agent knows all others.

    The first connection of an application that starts afterwards is counted, and speaks mTLS where
    it should.
    """
    problems: list[str] = []

    def settled() -> bool:
        for node in spec.nodes:
            _require_alive(paths, agent_name(node))
        said = asyncio.run(ask_agents(paths, spec.nodes))
        unsettled = [
            f"{pod.name} {problem}"
            for pod in spec.pods
            if (problem := _unsettled(pod, said[pod.node])) is not None
        ]
        told = [problem for one in said.values() if one for problem in one.problems]
        problems[:] = [*unsettled, *told]
        return not unsettled

    processes.wait_until(
        settled,
        SETTLE_DEADLINE_S,
        poll_s=ASK_EVERY_S,
        failure=lambda: f"the lab does not settle: {'; '.join(problems)}; logs are in {paths.logs}",
    )
    # The first round publishes what has settled; a round that begins after it has seen that.
    for rounds in (1, 2):
        _wait_for_rounds(spec, paths, rounds)


def _unsettled(pod: PodSpec, said: Said | None) -> str | None:
    """What is not yet as it should be with a pod."""
    about = said.about(pod.name) if said else None
    match about:
        case None:
            return "is unknown to its agent"
        case SidecarStatus(meshed=False, problem=problem) if pod.mesh:
            return f"is not in the mesh ({problem or 'no problem told'})"
        case SidecarStatus(meshed=True) if not pod.mesh:
            return "is still in the mesh"
        case SidecarStatus(observed_since=0.0, problem=""):
            return "is not observed"
        case _:
            return None


def _wait_for_rounds(spec: LabSpec, paths: LabPaths, rounds: int) -> None:
    """Wait until every agent has gone through that many more of its rounds."""
    ends: dict[str, set[float]] = {node: set() for node in spec.nodes}

    def passed() -> bool:
        for node, said in asyncio.run(ask_agents(paths, spec.nodes)).items():
            if said:
                ends[node].add(said.round_at)
        return all(len(seen) > rounds for seen in ends.values())

    processes.wait_until(
        passed,
        SETTLE_DEADLINE_S,
        poll_s=ASK_EVERY_S,
        failure=lambda: f"an agent stands still; logs are in {paths.logs}",
    )


def _tidegate(*args: str) -> tuple[str, ...]:
    return (processes.PYTHON, "-m", "tidegate.cli.main", *args)


def _url(path: Path) -> str:
    return f"unix://{path}"


def _yaml(content: dict[str, Any]) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()
