"""The lab as a whole: brings it up, says how it is, changes it, and takes it down without a trace.

Level-triggered like the agent: `up` compares the file with what is and changes the difference, `down` looks at
what is there, not at what was written down, so both also work after a crash. Puts network, processes,
server, agents and applications together; what each of them does, it leaves to them.
"""

import asyncio
import contextlib
import datetime
import enum
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tidegate.catalog.client import CatalogClient
from tidegate.errors import InputError, InputErrors
from tidegate.intent.entries import Entry, Kind, parse_entries
from tidegate.intent.policy import policy_from_annotations
from tidegate.kernel import netns
from tidegate.lab import mounts, network, processes, state, traffic
from tidegate.lab.network import Layout
from tidegate.lab.spec import (
    OUTSIDE,
    AppKind,
    CallKind,
    CallSpec,
    ConfigText,
    LabSpec,
    PodSpec,
    check_lab_name,
)
from tidegate.lab.state import (
    AppStatistics,
    LabError,
    LabPaths,
    LabStatus,
    NodeStatus,
    PodStatus,
    SidecarStatus,
    TargetStatistics,
)
from tidegate.model import Workload
from tidegate.node.client import AgentClient, AgentRefused, AgentUnreachable

START_DEADLINE_S = 30.0
SETTLE_DEADLINE_S = 60.0
ASK_EVERY_S = 0.1
GRACE_S = 2.0
"""How long a process may take to end before it is forced to."""

SERVER = "server"


class Part(enum.Flag):
    """What a lab consists of beyond its network."""

    CONTROL = enum.auto()
    """The server, its config entries, and an agent per node."""
    APPS = enum.auto()
    ALL = CONTROL | APPS


class CommandNotFoundError(LabError):
    exit_code = 127


class _WrittenConfig(msgspec.Struct, frozen=True, kw_only=True):
    texts: tuple[ConfigText, ...] = ()


class _SaidOfWorkload(SidecarStatus, frozen=True, kw_only=True):
    name: str


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """What the lab reads of an agent's GET /v1/status."""

    round_at: float = 0.0
    workloads: tuple[_SaidOfWorkload, ...] = ()
    problems: tuple[str, ...] = ()

    def about(self, pod: str) -> SidecarStatus | None:
        return next((workload for workload in self.workloads if workload.name == pod), None)


def up(
    spec: LabSpec,
    *,
    parts: Part = Part.ALL,
    progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Make the lab be as `spec` says. Repeat it with a changed spec to change only the difference.

    `progress` is told each step in words. Raises InputErrors before anything is made, LabBusyError, LabError,
    KernelError. A lab that fails before it was ever complete is taken down again.
    """
    check(spec)
    paths = LabPaths(spec.name)
    with state.locked(paths):
        try:
            _bring_up(spec, paths, parts, progress)
        except BaseException:
            if not paths.complete.exists():
                _clear(paths)
            raise
        state.write_bytes(paths.complete, b"")


def down(lab: str) -> None:
    """Take down whatever there is of a lab, also after a crash half-way; nothing to do is fine.

    Returns when its namespaces, processes, mounts and files are really gone. Raises LabBusyError, LabError.
    """
    check_lab_name(lab, source="lab")
    paths = LabPaths(lab)
    with state.locked(paths):
        _clear(paths)


def labs() -> tuple[str, ...]:
    """Names of the labs of which anything is there, sorted."""
    return tuple(sorted({*state.labs(), *network.labs_with_namespaces()}))


def check(spec: LabSpec) -> None:
    """Check what the lab file says in other languages: config entries and annotations. Raises InputErrors."""
    faults: list[InputError] = []
    for text in spec.config:
        with _collecting(faults):
            parse_entries(text.text, text.source)
    for pod in spec.pods:
        with _collecting(faults, f"pod {pod.name}"):
            policy_from_annotations(pod.annotations)
    if faults:
        raise InputErrors(tuple(faults))


def onboard(lab: str, pods: Sequence[str]) -> None:
    """Put pods into the mesh: their agent gives them a sidecar, their applications notice nothing.

    Raises InputError for what is no pod, LabBusyError, LabError.
    """
    paths = LabPaths(lab)
    with state.locked(paths):
        spec = state.read_spec(paths)
        _refuse_unknown(pods, [pod.name for pod in spec.pods], "pod", spec.name)
        spec = msgspec.structs.replace(
            spec,
            pods=tuple(
                msgspec.structs.replace(pod, mesh=pod.mesh or pod.name in pods) for pod in spec.pods
            ),
        )
        state.write(paths.spec, spec)
        _write_workloads(paths, spec, _layout(paths))


def trigger(lab: str, pod: str, *, timeout_s: float = 10.0) -> tuple[TargetStatistics, ...]:
    """Make every manual call of a pod's application once and return how those targets fare now.

    Raises InputError for a pod without manual calls, LabError when the application does not run or the calls
    do not end in time.
    """
    paths = LabPaths(lab)
    spec = state.read_spec(paths)
    _refuse_unknown((pod,), [pod.name for pod in spec.pods], "pod", spec.name)
    found = spec.pod(pod)
    manual = [
        index for index, call in enumerate(found.app.calls if found else ()) if call.every_s is None
    ]
    if not manual:
        raise InputError(f"pod {pod} has no call that waits to be told", expected="every: manual")
    before = _manual_targets(paths, pod, manual)
    record = processes.recorded(paths, _app_name(pod))
    if record is None or not processes.send(record, traffic.TRIGGER):
        raise LabError(f"the application of pod {pod} does not run")
    processes.wait_until(
        lambda: all(
            now.ok + now.failed > then.ok + then.failed
            for now, then in zip(_manual_targets(paths, pod, manual), before, strict=True)
        ),
        timeout_s,
        lambda: f"the calls of pod {pod} did not end within {timeout_s:g} s",
    )
    return _manual_targets(paths, pod, manual)


def exec_in(lab: str, name: str, argv: Sequence[str]) -> NoReturn:
    """Become a command in a pod, in a node or outside. Names of pods and services resolve there.

    Never returns. Raises InputError for what is neither, CommandNotFoundError.
    """
    paths = LabPaths(lab)
    spec = state.read_spec(paths)
    names = [*(pod.name for pod in spec.pods), *spec.nodes, OUTSIDE]
    _refuse_unknown((name,), names, "pod or node", spec.name)
    mounts.enter_pod(netns.path(network.namespace(lab, name)), paths.hosts)
    try:
        os.execvp(argv[0], list(argv))  # noqa: S606 (becoming that program is the point)
    except OSError as error:
        raise CommandNotFoundError(f"cannot run {argv[0]}: {error.strerror}") from error


def status(lab: str) -> LabStatus:
    """How the lab is right now. LabError when it is not up."""
    paths = LabPaths(lab)
    spec = state.read_spec(paths)
    layout = _layout(paths)
    said = asyncio.run(_ask_agents(paths, spec.nodes))
    server = processes.recorded(paths, SERVER)
    return LabStatus(
        lab=lab,
        server_pid=server.pid if server else 0,
        server_alive=processes.alive(server),
        nodes=tuple(_node_status(paths, layout, node, said[node]) for node in spec.nodes),
        pods=tuple(_pod_status(paths, layout, pod, said[pod.node]) for pod in spec.pods),
    )


@contextlib.contextmanager
def _collecting(faults: list[InputError], field: str = "") -> Iterator[None]:
    """Add the input errors of the body to `faults`, with the place they are in before their own."""
    try:
        yield
    except InputError as error:
        for fault in error.faults if isinstance(error, InputErrors) else (error,):
            where = ": ".join(part for part in (field, fault.field) if part)
            faults.append(
                InputError(fault.problem, source=fault.source, field=where, expected=fault.expected)
            )


def _refuse_unknown(names: Sequence[str], known: Sequence[str], what: str, lab: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"lab {lab} has no {what} {name}", expected=f"one of {', '.join(known)}"
            )


def _layout(paths: LabPaths) -> Layout:
    layout = state.read(paths.layout, Layout)
    if layout is None:
        raise LabError(f"lab {paths.lab} is not up; `tidegate lab up` starts one")
    return layout


# Up


def _bring_up(spec: LabSpec, paths: LabPaths, parts: Part, progress: Callable[[str], None]) -> None:
    _make_directories(paths, spec)
    layout = network.plan(spec, state.read(paths.layout, Layout))
    _remove_what_left(paths, spec, layout)
    progress(f"network: {len(spec.nodes)} nodes, {len(spec.pods)} pods")
    for name in network.missing(layout):
        for process in (_app_name(name), _agent_name(name)):
            processes.stop(paths, process, GRACE_S)
        _forget_workload(paths, name)
    network.ensure(layout)
    state.write(paths.layout, layout)
    state.write(paths.spec, spec)
    state.write_bytes(paths.hosts, _hosts(spec, layout).encode())
    if Part.CONTROL in parts:
        _start_control(spec, paths, layout, progress)
    if Part.APPS in parts:
        _start_apps(spec, paths, layout, progress)


def _make_directories(paths: LabPaths, spec: LabSpec) -> None:
    """Directories for root only, but for those on the way to what a sidecar's user must reach."""
    passable = [state.BASE, paths.root, paths.nodes]
    closed = [paths.logs, paths.traffic, paths.apps, paths.processes, paths.server_state]
    for node in spec.nodes:
        passable += [paths.node(node), paths.agent_run(node)]
        closed += [paths.agent_state(node), paths.workloads(node)]
    for directory in (*passable, *closed):
        directory.mkdir(mode=0o700, exist_ok=True)
    for directory in passable:
        directory.chmod(0o711)
    os.chown(paths.traffic, traffic.NOBODY, traffic.NOBODY)


def _remove_what_left(paths: LabPaths, spec: LabSpec, layout: Layout) -> None:
    """Take away the pods and nodes that the spec does not have any more, or has elsewhere."""
    wanted = {(pod.node, pod.name) for pod in spec.pods}
    for file in paths.nodes.glob("*/workloads/*.json"):
        if (file.parent.parent.name, file.stem) not in wanted:
            file.unlink()
    names = network.stale(layout)
    processes.end_all(names, GRACE_S)
    for name in names:
        network.delete(name)
    for directory in paths.nodes.iterdir():
        if directory.name not in spec.nodes:
            shutil.rmtree(directory)
    kept = {
        SERVER,
        *(_agent_name(node) for node in spec.nodes),
        *(_app_name(pod.name) for pod in spec.pods),
    }
    for file in paths.processes.glob("*.json"):
        if file.stem not in kept:
            processes.stop(paths, file.stem, GRACE_S)
    pods = {pod.name for pod in spec.pods}
    for file in (*paths.traffic.glob("*.json"), *paths.apps.iterdir()):
        if file.stem not in pods:
            file.unlink()


def _forget_workload(paths: LabPaths, name: str) -> None:
    """A pod whose namespace is new is a new workload: it must not inherit the id of the last one."""
    for file in paths.nodes.glob(f"*/workloads/{name}.json"):
        file.unlink()


def _hosts(spec: LabSpec, layout: Layout) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for pod in spec.pods:
        names = pod.name if pod.service == pod.name else f"{pod.name} {pod.service}"
        lines += [f"{address} {names}" for address in layout.pod_addresses(pod.name)]
    for node in spec.nodes:
        lines += [f"{address} {node}" for address in layout.node_addresses(node)]
    lines += [f"{address} {OUTSIDE}" for address in layout.outside_addresses()]
    return "".join(f"{line}\n" for line in lines)


def _keep_running(
    paths: LabPaths, name: str, namespace: str, argv: Sequence[str], digest: str
) -> bool:
    """Start a process unless it runs just so already. Whether it was started."""
    record = processes.recorded(paths, name)
    if record is not None and record.digest == digest and processes.alive(record):
        return False
    processes.stop(paths, name, GRACE_S)
    processes.start(paths, name, namespace, argv, digest)
    return True


def _tidegate(*args: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tidegate.cli.main", *args)


def _agent_name(node: str) -> str:
    return f"agent-{node}"


def _app_name(pod: str) -> str:
    return f"app-{pod}"


# The server and the agents


def _start_control(
    spec: LabSpec, paths: LabPaths, layout: Layout, progress: Callable[[str], None]
) -> None:
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
    started = _keep_running(
        paths,
        SERVER,
        network.namespace(spec.name, OUTSIDE),
        argv,
        processes.digest(*argv, server_config),
    )
    if started:
        _wait_for_socket(paths, SERVER, paths.server_socket)
    progress(f"config entries: {len(spec.config)}")
    _write_config(spec, paths)
    progress(f"agents: {', '.join(spec.nodes)}")
    _write_workloads(paths, spec, layout)
    _start_agents(spec, paths, layout)
    progress(f"sidecars: {', '.join(pod.name for pod in spec.pods if pod.mesh) or 'none'}")
    _wait_until_settled(spec, paths)


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
        if _keep_running(paths, _agent_name(node), namespace, argv, digest):
            started.append(node)
    for node in started:
        _wait_for_socket(paths, _agent_name(node), paths.agent_socket(node))


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


def _keyed(text: ConfigText) -> list[tuple[Kind, str]]:
    return [(entry.kind, entry.name) for entry in parse_entries(text.text, text.source)]


async def _send_config(
    address: str, entries: Sequence[Entry], gone: Sequence[tuple[Kind, str]]
) -> None:
    async with CatalogClient(address) as client:
        for entry in entries:
            await client.write_entry(entry)
        for kind, name in gone:
            await client.delete_entry(kind, name)


def _write_workloads(paths: LabPaths, spec: LabSpec, layout: Layout) -> None:
    for pod in spec.pods:
        file = paths.workload(pod.node, pod.name)
        before = state.read(file, Workload)
        now = time.time()
        workload = Workload(
            id=before.id if before else f"{spec.name}-{pod.name}-{time.time_ns():x}",
            name=pod.name,
            service=pod.service,
            node=pod.node,
            netns=netns.path(network.namespace(spec.name, pod.name)),
            interface=network.POD_INTERFACE,
            port=pod.port,
            addresses=layout.pod_addresses(pod.name),
            meshed=pod.mesh,
            annotations=pod.annotations,
            created_at=before.created_at if before else now,
        )
        if workload != before:
            state.write(file, workload)


def _wait_for_socket(paths: LabPaths, name: str, path: Path) -> None:
    def answers() -> bool:
        if not processes.alive(processes.recorded(paths, name)):
            raise LabError(_with_log(paths, name, f"{name} ended while it was starting"))
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(path)) == 0

    processes.wait_until(
        answers,
        START_DEADLINE_S,
        lambda: _with_log(paths, name, f"{name} does not answer at {path}"),
    )


def _wait_until_settled(spec: LabSpec, paths: LabPaths) -> None:
    """Wait until every pod is observed and meshed as it should be, and every agent knows of all others.

    An application that starts afterwards is counted from its first connection on, and speaks mTLS from its
    first connection on where it should.
    """
    problems: list[str] = []

    def settled() -> bool:
        said = asyncio.run(_ask_agents(paths, spec.nodes))
        problems[:] = [
            f"{pod.name} {problem}"
            for pod in spec.pods
            if (problem := _unsettled(pod, said[pod.node])) is not None
        ]
        return not problems

    processes.wait_until(
        settled,
        SETTLE_DEADLINE_S,
        poll_s=ASK_EVERY_S,
        failure=lambda: f"the lab does not settle: {'; '.join(problems)}; logs are in {paths.logs}",
    )
    # The first round publishes what has settled; a round that begins after it has seen that.
    for rounds in (1, 2):
        _wait_for_rounds(spec, paths, rounds)


def _unsettled(pod: PodSpec, said: _Said | None) -> str | None:
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
        for node, said in asyncio.run(_ask_agents(paths, spec.nodes)).items():
            if said:
                ends[node].add(said.round_at)
        return all(len(seen) > rounds for seen in ends.values())

    processes.wait_until(
        passed,
        SETTLE_DEADLINE_S,
        poll_s=ASK_EVERY_S,
        failure=lambda: f"an agent stands still; logs are in {paths.logs}",
    )


def _with_log(paths: LabPaths, name: str, problem: str) -> str:
    tail = processes.log_tail(paths, name)
    return f"{problem}; its last words:\n{tail}" if tail else f"{problem}, and logged nothing"


# The applications


def _start_apps(
    spec: LabSpec, paths: LabPaths, layout: Layout, progress: Callable[[str], None]
) -> None:
    pods = [pod for pod in spec.pods if pod.app.kind is not AppKind.NONE]
    for pod in spec.pods:
        if pod.app.kind is AppKind.NONE:
            processes.stop(paths, _app_name(pod.name), GRACE_S)
        if pod.app.kind is AppKind.TLS:
            _ensure_certificate(paths, pod)
    for batch in _start_order(spec, pods):
        progress(f"applications: {', '.join(pod.name for pod in batch)}")
        started = [pod for pod in batch if _start_app(spec, paths, layout, pod)]
        for pod in started:
            _wait_for_app(paths, pod)


def _start_order(spec: LabSpec, pods: Sequence[PodSpec]) -> Iterator[list[PodSpec]]:
    """The applications in batches, each after those that it calls where they do not call in circles."""
    waiting = {pod.name: pod for pod in pods}
    while waiting:
        batch = [
            pod
            for pod in waiting.values()
            if not any(
                target.name in waiting and target.name != pod.name
                for call in pod.app.calls
                for target in spec.pods_of(call.target)
            )
        ] or list(waiting.values())
        for pod in batch:
            del waiting[pod.name]
        yield batch


def _start_app(spec: LabSpec, paths: LabPaths, layout: Layout, pod: PodSpec) -> bool:
    serves_tls = pod.app.kind is AppKind.TLS
    config = msgspec.json.encode(
        traffic.AppConfig(
            pod=pod.name,
            kind=pod.app.kind,
            port=pod.port,
            statistics=str(paths.statistics(pod.name)),
            certificate=str(paths.app_certificate(pod.name)) if serves_tls else "",
            key=str(paths.app_key(pod.name)) if serves_tls else "",
            calls=tuple(_call(spec, paths, layout, call) for call in pod.app.calls),
        )
    )
    argv = (sys.executable, "-m", "tidegate.lab.traffic", str(paths.app(pod.name)))
    record = processes.recorded(paths, _app_name(pod.name))
    digest = processes.digest(*argv, config)
    if record is not None and record.digest == digest and processes.alive(record):
        return False
    processes.stop(paths, _app_name(pod.name), GRACE_S)
    paths.statistics(pod.name).unlink(missing_ok=True)
    state.write_bytes(paths.app(pod.name), config)
    namespace = network.namespace(spec.name, pod.name)
    return _keep_running(paths, _app_name(pod.name), namespace, argv, digest)


def _call(spec: LabSpec, paths: LabPaths, layout: Layout, call: CallSpec) -> traffic.CallConfig:
    pods = spec.pods_of(call.target)
    certificates = [
        paths.app_certificate(pod.name).read_text()
        for pod in pods
        if call.kind is CallKind.TLS and pod.app.kind is AppKind.TLS
    ]
    return traffic.CallConfig(
        target=call.target,
        addresses=tuple(address for pod in pods for address in layout.pod_addresses(pod.name)),
        answers=tuple(pod.name for pod in pods),
        port=call.port,
        kind=call.kind,
        every_s=call.every_s,
        keepalive=call.keepalive,
        timeout_s=call.timeout_s,
        trusted_certificates="".join(certificates),
        server_name=call.target,
    )


def _wait_for_app(paths: LabPaths, pod: PodSpec) -> None:
    name = _app_name(pod.name)

    def runs() -> bool:
        if not processes.alive(processes.recorded(paths, name)):
            raise LabError(
                _with_log(paths, name, f"the application of {pod.name} ended while it was starting")
            )
        return paths.statistics(pod.name).exists()

    processes.wait_until(
        runs,
        START_DEADLINE_S,
        lambda: _with_log(paths, name, f"the application of {pod.name} does not start"),
    )


def _ensure_certificate(paths: LabPaths, pod: PodSpec) -> None:
    """Make the self-signed certificate of an application that speaks TLS of its own, once."""
    names = [x509.DNSName(name) for name in sorted({pod.name, pod.service})]
    if paths.app_certificate(pod.name).exists():
        certificate = x509.load_pem_x509_certificate(paths.app_certificate(pod.name).read_bytes())
        known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        if list(known.value) == names:
            return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, pod.service)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    state.write_bytes(
        paths.app_key(pod.name),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    state.write_bytes(
        paths.app_certificate(pod.name), certificate.public_bytes(serialization.Encoding.PEM)
    )


def _statistics(paths: LabPaths, pod: str) -> AppStatistics | None:
    return state.read(paths.statistics(pod), AppStatistics)


def _manual_targets(
    paths: LabPaths, pod: str, indexes: Sequence[int]
) -> tuple[TargetStatistics, ...]:
    statistics = _statistics(paths, pod)
    if statistics is None or len(statistics.targets) <= max(indexes):
        raise LabError(f"the application of pod {pod} does not run")
    return tuple(statistics.targets[index] for index in indexes)


# Status


async def _ask_agents(paths: LabPaths, nodes: Sequence[str]) -> dict[str, _Said | None]:
    """What each agent says; None for one that does not answer."""

    async def ask(node: str) -> _Said | None:
        try:
            async with AgentClient(_url(paths.agent_socket(node))) as client:
                return msgspec.convert(await client.get("/v1/status"), _Said)
        except (AgentUnreachable, AgentRefused):
            return None
        except msgspec.ValidationError as error:
            raise LabError(f"the agent of {node} answers /v1/status with: {error}") from error

    return dict(zip(nodes, await asyncio.gather(*map(ask, nodes)), strict=True))


def _node_status(paths: LabPaths, layout: Layout, node: str, said: _Said | None) -> NodeStatus:
    record = processes.recorded(paths, _agent_name(node))
    return NodeStatus(
        name=node,
        namespace=network.namespace(layout.lab, node),
        addresses=layout.node_addresses(node),
        agent_pid=record.pid if record else 0,
        agent_alive=processes.alive(record),
        agent_answers=said is not None,
        problems=said.problems if said else (),
    )


def _pod_status(paths: LabPaths, layout: Layout, pod: PodSpec, said: _Said | None) -> PodStatus:
    record = processes.recorded(paths, _app_name(pod.name))
    return PodStatus(
        name=pod.name,
        node=pod.node,
        service=pod.service,
        port=pod.port,
        namespace=network.namespace(layout.lab, pod.name),
        addresses=layout.pod_addresses(pod.name),
        mesh=pod.mesh,
        app_kind=pod.app.kind,
        app_pid=record.pid if record else 0,
        app_alive=processes.alive(record),
        statistics=_statistics(paths, pod.name),
        agent=said.about(pod.name) if said else None,
    )


# Down


def _clear(paths: LabPaths) -> None:
    names = network.namespaces(paths.lab)
    processes.end_all(names, GRACE_S)
    mounts.unmount_below(paths.root)
    for name in names:
        network.delete(name)
    if paths.root.exists():
        shutil.rmtree(paths.root)
    left = (*network.namespaces(paths.lab), *mounts.below(paths.root))
    if left:
        raise LabError(f"lab {paths.lab} left something behind: {', '.join(left)}")


def _url(path: Path) -> str:
    return f"unix://{path}"


def _yaml(content: dict[str, Any]) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()
