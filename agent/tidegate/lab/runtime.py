"""The lab as a whole: brings it up, says how it is, changes it, takes it down without a trace.

Level-triggered like the agent: `up` compares the file with what is and changes the difference,
`down` looks at what is there, not at what was written down, so both also work after a crash. Puts
network, server, agents and applications together; what each of them does, it leaves to them.
"""

import asyncio
import contextlib
import enum
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from tidegate.errors import InputError, InputErrors
from tidegate.intent.annotations import policy_from_annotations
from tidegate.intent.entries import Entry, Mesh, check_write, parse_entries
from tidegate.intent.policy import Inbound, Policy
from tidegate.kernel import netns
from tidegate.lab import apps, control, mounts, network, processes, state, traffic
from tidegate.lab.network import Layout
from tidegate.lab.spec import (
    OUTSIDE,
    LabSpec,
    PodSpec,
    check_lab_name,
)
from tidegate.lab.state import (
    LabError,
    LabPaths,
    LabStatus,
    NodeStatus,
    PodStatus,
    TargetStatistics,
)
from tidegate.node.users import group_id, user_id

_SOME_POLICY = Policy(inbound=Inbound(node_addresses=("192.0.2.1/32",)))
"""What the annotations of a lab file are checked against: which addresses a node has is not decided yet."""


class Part(enum.Flag):
    """What a lab consists of beyond its network."""

    CONTROL = enum.auto()
    """The server, its config entries, and an agent per node."""
    APPS = enum.auto()
    ALL = CONTROL | APPS


class CommandNotFoundError(LabError):
    exit_code = 127


def up(
    spec: LabSpec,
    *,
    parts: Part = Part.ALL,
    progress: Callable[[str], None] = lambda step: None,
    source: str = "",
) -> None:
    """Make the lab be as `spec` says. Repeat it with a changed spec to change only the difference.

    `progress` is told each step in words; `source` is the lab file, for messages.
    Raises InputErrors before anything is made, LabBusyError, LabError,
    KernelError. A lab that fails before it was ever complete is taken down again.
    """
    check(spec, source)
    paths = LabPaths(spec.name)
    with state.locked(paths):
        _refuse_other_identity(spec, paths)
        try:
            _bring_up(spec, paths, parts, progress)
        except BaseException:
            if not paths.complete.exists():
                _clear(paths)
            raise
        state.write_bytes(paths.complete, b"")


def _refuse_other_identity(spec: LabSpec, paths: LabPaths) -> None:
    """Certificates and server names of a lab that is up cannot become others."""
    present = state.read(paths.spec, LabSpec)
    if present is None or not paths.complete.exists():
        return
    for field in ("trust_domain", "datacenter"):
        before, after = getattr(present, field), getattr(spec, field)
        if before != after:
            raise InputError(
                f"lab {spec.name} is up with {before!r} and cannot change to {after!r}",
                field=field,
                expected=f"`tidegate lab down --name {spec.name}` first",
            )


def down(lab: str) -> None:
    """Take down whatever there is of a lab, also after a crash half-way; nothing to do is fine.

    Returns when its namespaces, processes, mounts and files are really gone. Raises LabBusyError, LabError.
    """
    check_lab_name(lab, source="lab")
    paths = LabPaths(lab)
    with state.locked(paths):
        _clear(paths)


def labs() -> tuple[str, ...]:
    """Names of the labs that have a directory, sorted; `down` also cleans up without one, if it is named."""
    return state.labs()


def check(spec: LabSpec, source: str = "") -> None:
    """Check what the lab file says in other languages: config entries and annotations. Raises InputErrors.

    `source` is the lab file, for faults of annotations; config entries know where they stand.
    """
    faults: list[InputError] = []
    entries: list[tuple[str, Entry]] = []
    for text in spec.config:
        with _collecting(faults):
            entries += [(text.source, entry) for entry in parse_entries(text.text, text.source)]
    meshes = {entry.partition: entry for _, entry in entries if isinstance(entry, Mesh)}
    for place, entry in entries:
        with _collecting(faults, f"{place}: {entry.kind}/{entry.name}"):
            check_write(None, entry, meshes.get(entry.partition))
    for index, pod in enumerate(spec.pods):
        with _collecting(faults, f"pods[{index}].annotations of pod {pod.name}", source):
            policy_from_annotations(pod.annotations, _SOME_POLICY, users=user_id, groups=group_id)
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
        control.write_workloads(paths, spec, _layout(paths))


def trigger(lab: str, pod: str, *, timeout_s: float = 10.0) -> tuple[TargetStatistics, ...]:
    """Make every manual call of a pod's application once and return how those targets fare now.

    Raises InputError for a pod without manual calls, LabError when the application does not run or
    the calls do not end in time.
    """
    paths = LabPaths(lab)
    spec = state.read_spec(paths)
    return apps.trigger(paths, _pod(spec, pod), timeout_s)


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
    said = asyncio.run(control.ask_agents(paths, spec.nodes))
    server = processes.recorded(paths, control.SERVER)
    return LabStatus(
        lab=lab,
        server_pid=server.pid if server else 0,
        server_alive=processes.alive(server),
        nodes=tuple(_node_status(paths, layout, node, said[node]) for node in spec.nodes),
        pods=tuple(_pod_status(paths, layout, pod, said[pod.node]) for pod in spec.pods),
    )


@contextlib.contextmanager
def _collecting(faults: list[InputError], field: str = "", source: str = "") -> Iterator[None]:
    """Add the input errors of the body to `faults`, with the place they are in before their own.

    `source` is that of errors that know none.
    """
    try:
        yield
    except InputError as error:
        for fault in error.faults if isinstance(error, InputErrors) else (error,):
            where = ": ".join(part for part in (field, fault.field) if part)
            faults.append(
                InputError(
                    fault.problem,
                    source=fault.source or source,
                    field=where,
                    expected=fault.expected,
                )
            )


def _refuse_unknown(names: Sequence[str], known: Sequence[str], what: str, lab: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"lab {lab} has no {what} {name}", expected=f"one of {', '.join(known)}"
            )


def _pod(spec: LabSpec, name: str) -> PodSpec:
    _refuse_unknown((name,), [pod.name for pod in spec.pods], "pod", spec.name)
    return next(pod for pod in spec.pods if pod.name == name)


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
        for process in (apps.process_name(name), control.agent_name(name)):
            processes.stop(paths, process)
        _forget_workload(paths, name)
    network.ensure(layout)
    state.write(paths.layout, layout)
    state.write(paths.spec, spec)
    state.write_bytes(paths.hosts, _hosts(spec, layout).encode())
    if Part.CONTROL in parts:
        control.start(spec, paths, layout, progress)
    if Part.APPS in parts:
        apps.start(spec, paths, layout, progress)


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
            file.unlink(missing_ok=True)
    names = network.stale(layout)
    processes.end_all(names)
    for name in names:
        network.delete(name)
    for directory in paths.nodes.iterdir():
        if directory.name not in spec.nodes:
            _remove_tree(directory)
    kept = {
        control.SERVER,
        *(control.agent_name(node) for node in spec.nodes),
        *(apps.process_name(pod.name) for pod in spec.pods),
    }
    for file in paths.processes.glob("*.json"):
        if file.stem not in kept:
            processes.stop(paths, file.stem)
    pods = {pod.name for pod in spec.pods}
    for file in (*paths.traffic.glob("*.json"), *paths.apps.iterdir()):
        if file.stem not in pods:
            file.unlink(missing_ok=True)


def _forget_workload(paths: LabPaths, name: str) -> None:
    """A pod whose namespace is new is a new workload: it must not inherit the id of the last one."""
    for file in paths.nodes.glob(f"*/workloads/{name}.json"):
        file.unlink(missing_ok=True)


def _hosts(spec: LabSpec, layout: Layout) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for pod in spec.pods:
        names = " ".join(pod.names)
        lines += [f"{address} {names}" for address in layout.pod_addresses(pod.name)]
    for node in spec.nodes:
        lines += [f"{address} {node}" for address in layout.node_addresses(node)]
    lines += [f"{address} {OUTSIDE}" for address in layout.outside_addresses()]
    return "".join(f"{line}\n" for line in lines)


# Status


def _node_status(
    paths: LabPaths, layout: Layout, node: str, said: control.Said | None
) -> NodeStatus:
    record = processes.recorded(paths, control.agent_name(node))
    return NodeStatus(
        name=node,
        namespace=network.namespace(layout.lab, node),
        addresses=layout.node_addresses(node),
        agent_pid=record.pid if record else 0,
        agent_alive=processes.alive(record),
        agent_answers=said is not None,
        problems=said.problems if said else (),
    )


def _pod_status(
    paths: LabPaths, layout: Layout, pod: PodSpec, said: control.Said | None
) -> PodStatus:
    record = processes.recorded(paths, apps.process_name(pod.name))
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
        statistics=apps.statistics(paths, pod.name),
        agent=said.about(pod.name) if said else None,
    )


# Down


def _clear(paths: LabPaths) -> None:
    names = network.namespaces(paths.lab)
    processes.end_all(names)
    mounts.unmount_below(paths.root)
    for name in names:
        network.delete(name)
    _remove_tree(paths.root)
    left = (*network.namespaces(paths.lab), *mounts.below(paths.root))
    if left:
        raise LabError(f"lab {paths.lab} left something behind: {', '.join(left)}")


def _remove_tree(directory: Path) -> None:
    """Remove a directory with all that is in it, also while parts of it go by themselves."""
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
