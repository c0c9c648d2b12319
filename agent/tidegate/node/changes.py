"""The two changes of onboarding that nobody has to guard: a service becomes permissive, and the mesh is re-secured.

Each is told as events, the last of which has an exit code. Both only write entries and wait until the sidecars run
them; an agent that is killed in between leaves nothing half done that doing it again does not complete.
"""

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec

from tidegate.catalog.client import Snapshot
from tidegate.errors import TidegateError
from tidegate.intent.changes import mesh_entry_of, partitions, secured
from tidegate.intent.entries import EntryKey, Kind, Mesh, warning_for
from tidegate.model import Instance, MutualTLSMode, ServiceName
from tidegate.node import modes
from tidegate.node.log import Log
from tidegate.node.mesh import ChangedMeanwhile, MeshView, refuse_unknown, services_known
from tidegate.node.onboarding import Onboarding, mode_settings, settings_of
from tidegate.verdict.resecuring import Breakage, Hurt, Proof, breakages, proofs

log = Log("changes")


class ChangeEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened during a change. The last one, and no other, has an `exit_code`."""

    event: str
    message: str
    service: str = ""
    breakages: tuple[Breakage, ...] = ()
    proofs: tuple[Proof, ...] = ()
    exit_code: int | None = None


async def permissive(mesh: MeshView, service: str, *, force: bool) -> AsyncIterator[ChangeEvent]:
    """Makes a service permissive, and waits until every sidecar of it is. `force`: also one that nobody knows yet."""
    snapshot = await mesh.snapshot()
    if not force:
        refuse_unknown(service, services_known(snapshot))

    def tell(event: str, message: str, exit_code: int | None = None) -> ChangeEvent:
        log.info(message, event=event, service=service)
        return ChangeEvent(event=event, message=message, service=service, exit_code=exit_code)

    instances = await mesh.instances(service)
    held = [one.name for one in instances if one.registered_mode is MutualTLSMode.STRICT]
    if held:
        why = f"the registration of {', '.join(held)} says strict, and wins over config entries"
        yield tell("refused", f"{service}: {why}: not changed", 2)
        return
    own = await modes.own_entry(mesh, service)
    if own.mutual_tls_mode is MutualTLSMode.PERMISSIVE:
        index = own.modify_index
        yield tell("unchanged", f"{service}: MutualTLSMode is permissive already")
    else:
        command = await mesh.opens_gate(service)
        if command:
            yield tell("refused", _closed(service, command), 1)
            return
        index = await modes.set_mode(mesh, service, MutualTLSMode.PERMISSIVE)
        yield tell("written", f"{service}: MutualTLSMode is permissive now")
        warning = warning_for(await modes.own_entry(mesh, service))
        if warning:
            yield tell("warning", f"WARNING: {warning}")
    if not any(one.meshed for one in instances):
        yield tell("waiting-for-sidecar", f"{service} is permissive as soon as it has a sidecar", 0)
        return
    try:
        count = await modes.running_mode(mesh, service, index, MutualTLSMode.PERMISSIVE)
    except TidegateError as error:
        yield tell("behind", str(error), 1)
        return
    yield tell("enforced", f"{service}: {count} of {count} sidecars run permissive mode", 0)


def _closed(service: str, command: str) -> str:
    return (
        f"{service} cannot become permissive: AllowEnablingPermissiveMutualTLS is false in the mesh config entry; "
        f"`{command}` opens it"
    )


async def resecure(
    mesh: MeshView, onboarding: Onboarding, window_s: float | None, *, force: bool
) -> AsyncIterator[ChangeEvent]:
    """Closes the gate and the way out of the mesh in every partition, unless somebody would notice, and proves it."""
    facts = await onboarding.facts(window_s)
    snapshot = await mesh.snapshot()
    living = tuple(snapshot.living().values())
    against = breakages(facts, mode_settings(snapshot.entries, living))
    yield _of_breakages(against)
    if against and not force:
        only_unseen = all(one.kind is Hurt.UNSEEN for one in against)
        yield ChangeEvent(
            event="refused",
            message="not changed (--force changes it all the same)",
            breakages=against,
            exit_code=2 if only_unseen else 1,
        )
        return
    for partition in partitions(snapshot.entries, services_known(snapshot)):
        before = await _mesh_entry(mesh, partition)
        after = secured(before)
        where = "" if partition == "default" else f" of partition {partition}"
        if after == before:
            yield ChangeEvent(
                event="unchanged", message=f"the mesh entry{where} is as it should be"
            )
            continue
        try:
            await mesh.write_entry(after)
        except ChangedMeanwhile as error:
            yield ChangeEvent(
                event="failed", message=f"{error}; see what it says, and try again", exit_code=1
            )
            return
        log.info("the mesh was re-secured", partition=partition)
        yield ChangeEvent(
            event="written",
            message=f"the mesh entry{where}: AllowEnablingPermissiveMutualTLS is false, MeshDestinationsOnly is true",
        )
    yield await _proved(mesh)


def _of_breakages(against: tuple[Breakage, ...]) -> ChangeEvent:
    calls = sum(one.kind is Hurt.CALL for one in against)
    others = len(against) - calls
    if not against:
        message = "nothing would break: nobody calls out of the mesh, and nobody is permissive"
    else:
        told = []
        if calls:
            told.append(
                f"{calls} {'destination' if calls == 1 else 'destinations'} would be cut off"
            )
        if others:
            told.append(
                f"{others} {'thing stays' if others == 1 else 'things stay'} open or unknown"
            )
        message = " and ".join(told)
    return ChangeEvent(event="checked", message=message, breakages=against)


async def _mesh_entry(mesh: MeshView, partition: str) -> Mesh:
    entry = await mesh.read_entry(EntryKey(Kind.MESH, "mesh", partition=partition))
    return entry if isinstance(entry, Mesh) else Mesh(partition=partition)


async def _proved(mesh: MeshView) -> ChangeEvent:
    """Waits until every sidecar runs what is written now, and says what is so."""
    deadline = time.monotonic() + modes.ENFORCE_DEADLINE_S
    while True:
        snapshot = await mesh.snapshot()
        meshed = [one for one in snapshot.living().values() if one.meshed]
        behind = tuple(one.name for one in meshed if _is_behind(one, snapshot))
        if not behind or time.monotonic() >= deadline:
            break
        await asyncio.sleep(modes.POLL_S)
    found = proofs(
        settings_of(snapshot.entries, services_known(snapshot)),
        mode_settings(snapshot.entries, meshed),
        behind,
        len(meshed),
    )
    if mesh.outdated:
        return ChangeEvent(
            event="unproved", message=f"not proved: {mesh.outdated}", proofs=found, exit_code=2
        )
    holds = all(one.holds for one in found)
    return ChangeEvent(
        event="proved" if holds else "unproved",
        message="the mesh is secure: everything in it is mTLS"
        if holds
        else "the mesh is not secure yet",
        proofs=found,
        exit_code=0 if holds else 1,
    )


def _is_behind(one: Instance, snapshot: Snapshot) -> bool:
    """Whether a sidecar is not known to run the mesh entry of its partition."""
    entry = mesh_entry_of(snapshot.entries, ServiceName.of(one.service).partition)
    return one.applied_index < entry.modify_index
