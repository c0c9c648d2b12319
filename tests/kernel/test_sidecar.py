"""Real Envoys in network namespaces, configured and kept by enforce/sidecar, with real traffic."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair
from sidecars import (
    API,
    DOMAIN,
    DRAIN_S,
    OTHER_PORT,
    PORT,
    SEVERAL,
    UID,
    WEB,
    App,
    Sidecar,
    call,
    calling_api,
    dial,
    echoes,
    echoing,
    sidecar,
    tls,
    until,
)

from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.envoy import EnvoyProcess, Phase, binary
from tidegate.enforce.sidecar.files import SidecarError, SidecarFiles
from tidegate.enforce.sidecar.spec import Endpoint, Upstream
from tidegate.identity import spiffe
from tidegate.identity.ca import MeshCA
from tidegate.intent.policy import Family
from tidegate.kernel import netns
from tidegate.model import IntentionRule, MutualTLSMode


@pytest.fixture
def ca(state: Path) -> MeshCA:
    return MeshCA.create(state / "ca", DOMAIN)


@pytest.fixture
def api(state: Path, ca: MeshCA, pair: Pair) -> Iterator[Sidecar]:
    """The sidecar of the service api in the pod of the pair, permissive."""
    with sidecar(state, ca, API, pair.pod) as made:
        yield made


@pytest.fixture
def app(pair: Pair) -> Iterator[App]:
    """The application of the service api."""
    with echoing(pair.pod, PORT) as made:
        yield made


@pytest.fixture
def web(state: Path, ca: MeshCA, pair: Pair, api: Sidecar) -> Iterator[Sidecar]:
    """The sidecar of the service web at the other end of the pair, with api as upstream."""
    with sidecar(state, ca, calling_api(pair), pair.peer) as made:
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_a_call_to_an_upstream_travels_as_mtls(
    pair: Pair, api: Sidecar, app: App, web: Sidecar, version: int
) -> None:
    assert call(pair.peer, pair.pod_address(version))
    assert app.accepted == 1
    stats = api.admin.sidecar_stats()
    assert stats.public_connections == stats.tls_handshakes == 1
    assert stats.permissive_connections == stats.tls_handshake_failures == 0
    assert web.admin.sidecar_stats().passthrough_connections == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_transparent_sidecar_takes_connections_with_their_addresses_as_they_are(
    state: Path, ca: MeshCA, pair: Pair, app: App, version: int
) -> None:
    transparent = msgspec.structs.replace(API, transparent=True)
    with (
        sidecar(state, ca, transparent, pair.pod) as api,
        sidecar(state, ca, calling_api(pair), pair.peer) as web,
    ):
        address = pair.pod_address(version)
        assert call(pair.peer, address), "through mTLS"
        assert api.admin.sidecar_stats().public_connections == 1
        web.apply(WEB)
        assert call(pair.peer, address), "in plaintext"
        assert api.admin.sidecar_stats().permissive_connections == 1
        api.apply(msgspec.structs.replace(transparent, mode=MutualTLSMode.STRICT))
        assert not call(pair.peer, address)
        assert app.accepted == 2
        capabilities = Path(f"/proc/{api.envoy.state.pid}/status").read_text()
        assert "CapEff:\t0000000000002000" in capabilities, "CAP_NET_RAW and nothing else"


def test_a_sidecar_that_becomes_transparent_is_started_again_with_what_it_needs(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    with sidecar(state, ca, API, pair.pod) as api:
        before = api.envoy.state.pid
        transparent = msgspec.structs.replace(API, transparent=True)
        api.files.write_configuration(render.render(transparent))
        api.envoy.ensure(time.monotonic(), transparent=True)
        api.until_applied(render.render(transparent))
        assert api.envoy.state.pid not in (0, before)


@pytest.mark.parametrize("version", [4, 6])
def test_plaintext_enters_in_permissive_and_not_in_strict_mode(
    pair: Pair, api: Sidecar, app: App, version: int
) -> None:
    assert call(pair.peer, pair.pod_address(version))
    stats = api.admin.sidecar_stats()
    assert (stats.permissive_connections, stats.public_connections) == (1, 0)

    api.apply(msgspec.structs.replace(API, mode=MutualTLSMode.STRICT))
    assert not call(pair.peer, pair.pod_address(version))
    assert app.accepted == 1, "strict let a plaintext client's connection reach the application"
    until(lambda: api.admin.sidecar_stats().tls_handshake_failures == 1, "the refusal is counted")


def test_in_strict_mode_a_client_that_waits_for_the_server_is_refused_after_the_handshake_timeout(
    pair: Pair, api: Sidecar, app: App
) -> None:
    api.apply(msgspec.structs.replace(API, mode=MutualTLSMode.STRICT))
    with dial(pair.peer, pair.pod_ipv4, PORT) as connection:
        assert connection.recv(64) == b""
    assert app.accepted == 0
    until(lambda: api.admin.sidecar_stats().tls_handshake_failures == 1, "the refusal is counted")


def test_open_connections_are_counted_by_the_chain_that_they_came_through(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    def active() -> tuple[int, int]:
        stats = api.admin.sidecar_stats()
        return stats.public_active, stats.permissive_active

    assert active() == (0, 0)
    with dial(pair.peer, pair.pod_ipv4, PORT) as first, dial(pair.peer, pair.pod_ipv6, PORT):
        assert echoes(first)
        until(lambda: active() == (2, 0), "two by mTLS")
        web.apply(WEB)
        with dial(pair.peer, pair.pod_ipv4, PORT) as plaintext:
            assert echoes(plaintext)
            until(lambda: active() == (2, 1), "one without")
            api.apply(msgspec.structs.replace(API, mode=MutualTLSMode.STRICT))
            assert active()[1] == 1, "it is still open while it drains"
            until(lambda: active()[1] == 0, "it is closed")
    until(lambda: active() == (0, 0), "all are closed")


def test_tls_of_the_application_enters_in_permissive_mode_untouched(
    pair: Pair, api: Sidecar, app: App
) -> None:
    with dial(pair.peer, pair.pod_ipv4, PORT) as connection:
        hello = bytes.fromhex("16030100050100000100")
        connection.sendall(hello)
        assert connection.recv(64) == hello
    assert api.admin.sidecar_stats().permissive_connections == 1


def test_a_service_that_no_intention_allows_is_denied(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    api.apply(msgspec.structs.replace(API, intentions=()))
    assert not call(pair.peer, pair.pod_ipv4)
    until(lambda: api.admin.sidecar_stats().rbac_denied == 1, "the refusal is counted")


def test_a_wildcard_intention_spares_the_services_named_before_it(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    everybody = IntentionRule(source="*", allow=True, precedence=8)
    not_web = IntentionRule(source="web", allow=False)
    api.apply(msgspec.structs.replace(API, intentions=(not_web, everybody)))
    assert not call(pair.peer, pair.pod_ipv4)
    api.apply(msgspec.structs.replace(API, intentions=(everybody,)))
    assert call(pair.peer, pair.pod_ipv4)


def test_where_all_may_call_by_default_a_denied_service_may_not(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    api.apply(msgspec.structs.replace(API, intentions=(), default_allow=True))
    assert call(pair.peer, pair.pod_ipv4)
    not_web = (IntentionRule(source="web", allow=False),)
    api.apply(msgspec.structs.replace(API, intentions=not_web, default_allow=True))
    assert not call(pair.peer, pair.pod_ipv4)


def test_a_client_without_a_certificate_of_the_mesh_never_reaches_the_application(
    pair: Pair, state: Path, ca: MeshCA, api: Sidecar, app: App
) -> None:
    stranger = MeshCA.create(state / "stranger", DOMAIN)
    web_id = spiffe.service_id(DOMAIN, "web")
    leaves = [(None, False), (stranger.issue(web_id, 60), False), (ca.issue(web_id, 60), True)]
    for leaf, welcome in leaves:
        with (
            dial(pair.peer, pair.pod_ipv4, 20000) as connection,
            tls(state, connection, ca, leaf) as secured,
        ):
            assert echoes(secured) is welcome
    assert app.accepted == 1


def test_a_caller_refuses_a_server_of_another_service(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    assert call(pair.peer, pair.pod_ipv4)
    api.rotate("impostor")
    assert not call(pair.peer, pair.pod_ipv4)


def test_flipping_the_mode_loses_no_mtls_connection_and_no_request(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    stop = threading.Event()
    outcomes: list[bool] = []

    def new_requests() -> None:
        while not stop.is_set():
            outcomes.append(call(pair.peer, pair.pod_ipv4))

    def one_connection() -> None:
        with dial(pair.peer, pair.pod_ipv6, PORT) as connection:
            while not stop.is_set():
                outcomes.append(echoes(connection))

    threads = [threading.Thread(target=work) for work in (new_requests, one_connection)]
    for thread in threads:
        thread.start()
    try:
        for flip in range(20):
            mode = MutualTLSMode.PERMISSIVE if flip % 2 else MutualTLSMode.STRICT
            seen = len(outcomes)
            api.apply(msgspec.structs.replace(API, mode=mode))
            until(lambda seen=seen: len(outcomes) > seen + 20, "requests run after the flip")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert outcomes.count(False) == 0
    updates = api.admin.stats(["listener_manager.listener_in_place_updated"])
    assert list(updates.values()) == [20]


def test_plaintext_connections_that_are_open_at_strict_end_with_the_drain_time(
    pair: Pair, api: Sidecar, app: App
) -> None:
    with dial(pair.peer, pair.pod_ipv4, PORT) as connection:
        assert echoes(connection)
        api.apply(msgspec.structs.replace(API, mode=MutualTLSMode.STRICT))
        assert echoes(connection), "it goes on while it drains"
        assert not call(pair.peer, pair.pod_ipv4), "no new one comes in"
        until(lambda: not echoes(connection), "the open connection is closed")


def test_changing_intentions_leaves_open_connections_alone_and_decides_on_new_ones(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    with dial(pair.peer, pair.pod_ipv4, PORT) as connection:
        assert echoes(connection)
        added = (*API.intentions, IntentionRule(source="legacy", allow=True))
        api.apply(msgspec.structs.replace(API, intentions=added))
        assert call(pair.peer, pair.pod_ipv4)
        api.apply(msgspec.structs.replace(API, intentions=()))
        assert not call(pair.peer, pair.pod_ipv4)
        after_draining = time.monotonic() + 2 * DRAIN_S
        until(lambda: not echoes(connection) or time.monotonic() > after_draining, "")
        assert echoes(connection)


def test_adding_an_upstream_leaves_connections_of_other_chains_alone(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    elsewhere = Upstream(
        service="db",
        port=OTHER_PORT,
        endpoints=(Endpoint(address="10.77.0.77", service_port=OTHER_PORT),),
    )
    before = calling_api(pair)
    api.write_leaves("api", "api-admin")
    api.apply(SEVERAL)
    with (
        echoing(pair.pod, OTHER_PORT),
        dial(pair.peer, pair.pod_ipv4, PORT) as to_upstream,
        dial(pair.peer, pair.pod_ipv4, OTHER_PORT) as passed_through,
    ):
        assert echoes(to_upstream)
        assert echoes(passed_through)
        after = msgspec.structs.replace(before, upstreams=(elsewhere, *before.upstreams))
        web.apply(after)
        web.apply(before)
        web.apply(after)
        after_draining = time.monotonic() + 2 * DRAIN_S
        while time.monotonic() < after_draining:
            assert echoes(to_upstream)
            assert echoes(passed_through)


def test_what_is_no_upstream_passes_through_unless_only_mesh_destinations_are_allowed(
    pair: Pair, api: Sidecar, app: App, web: Sidecar
) -> None:
    web.apply(WEB)
    assert call(pair.peer, pair.pod_ipv4)
    assert web.admin.sidecar_stats().passthrough_connections == 1
    assert api.admin.sidecar_stats().permissive_connections == 1

    only_mesh = msgspec.structs.replace(calling_api(pair), mesh_destinations_only=True)
    web.apply(only_mesh)
    assert call(pair.peer, pair.pod_ipv4)
    assert not call(pair.peer, pair.pod_ipv4, OTHER_PORT)
    assert web.admin.sidecar_stats().passthrough_connections == 1


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_dialling_the_outbound_listener_itself_is_refused(
    pair: Pair, api: Sidecar, address: str
) -> None:
    pid = api.envoy.state.pid
    assert not call(pair.pod, address, 15001)
    state = api.envoy.ensure(time.monotonic())
    assert (state.phase, state.pid, state.restarts) == (Phase.RUNNING, pid, 0)
    assert api.admin.sidecar_stats().passthrough_connections == 0


def test_a_rotated_certificate_is_presented_and_open_connections_stay(
    pair: Pair, state: Path, ca: MeshCA, api: Sidecar, app: App, web: Sidecar
) -> None:
    def presented() -> str:
        leaf = ca.issue(spiffe.service_id(DOMAIN, "web"), 60)
        with (
            dial(pair.pod, "127.0.0.1", 20000) as connection,
            tls(state, connection, ca, leaf) as secured,
        ):
            return f"{int(secured.getpeercert()['serialNumber'], 16):x}"

    with dial(pair.peer, pair.pod_ipv4, PORT) as connection:
        assert echoes(connection)
        first = presented()
        web.rotate("web")
        second = api.rotate("api").serial
        assert presented() == second != first
        assert call(pair.peer, pair.pod_ipv4)
        assert echoes(connection)


def test_a_rejected_configuration_is_reported_and_the_old_one_stays_in_force(
    pair: Pair, api: Sidecar, app: App
) -> None:
    good = render.render(API)
    assert api.admin.rejection() is None
    assert api.admin.applied_version() == good.version
    broken = good.lds.replace(b'"0.0.0.0"', b'"0.0.0.999"').replace(
        good.version.encode(), b"broken"
    )
    assert broken != good.lds
    api.files.write_configuration(msgspec.structs.replace(good, lds=broken))
    until(api.admin.rejection, "the rejection is known")
    assert "0.0.0.999" in (api.admin.rejection() or "")
    assert api.admin.applied_version() == good.version
    assert call(pair.peer, pair.pod_ipv4)

    strict = msgspec.structs.replace(API, mode=MutualTLSMode.STRICT)
    api.apply(strict)
    assert api.admin.rejection() is None


def test_a_killed_envoy_is_started_again_after_a_delay_that_doubles(
    pair: Pair, api: Sidecar, app: App
) -> None:
    now = time.monotonic()
    delay = 0.5
    for restart in range(3):
        killed = api.envoy.state.pid
        os.kill(killed, signal.SIGKILL)
        until(lambda: api.envoy.state.pid == 0, "the process is gone")
        state = api.envoy.ensure(now)
        assert (state.phase, state.pid) == (Phase.BACKING_OFF, 0)
        assert "SIGKILL" in state.last_exit
        assert api.envoy.ensure(now + delay - 0.01).phase is Phase.BACKING_OFF
        now += delay
        state = api.envoy.ensure(now)
        assert state.pid not in (0, killed)
        assert state.restarts == restart + 1
        until(lambda: api.envoy.state.phase is Phase.RUNNING, "it runs again")
        delay *= 2
    until(lambda: call(pair.peer, pair.pod_ipv4), "it serves again")


def test_an_envoy_is_called_so_where_processes_are_listed(api: Sidecar) -> None:
    process = Path(f"/proc/{api.envoy.state.pid}")
    assert (process / "comm").read_text() == "envoy\n"
    assert (process / "cmdline").read_bytes().startswith(b"envoy\0")
    assert (process / "exe").samefile(binary())
    assert not [*(api.files.directory / "bin").iterdir()]


def test_a_program_where_the_proxy_user_cannot_go_is_started_all_the_same(
    state: Path, pair: Pair
) -> None:
    # No Envoy, but a program that refuses Envoy's options.
    hidden = state / "hidden"
    hidden.mkdir(mode=0o700)
    shutil.copy("/bin/sleep", hidden)
    files = SidecarFiles(state / "api", uid=UID, gid=UID)
    envoy = EnvoyProcess(files, pair.pod, envoy=hidden / "sleep")
    now = time.monotonic()
    envoy.ensure(now)
    until(lambda: envoy.state.pid == 0, "the program gives up")
    assert "exited with status 1: Try" in envoy.ensure(now).last_exit


def test_a_start_that_was_cut_short_does_not_hinder_the_next(api: Sidecar) -> None:
    api.envoy.stop(5)
    (api.files.directory / "bin" / "envoy").symlink_to("/proc/self/fd/99")
    assert api.envoy.ensure(time.monotonic()).pid != 0


def test_a_returning_agent_adopts_the_envoy_that_is_there(api: Sidecar) -> None:
    pid = api.envoy.state.pid
    for forget in (False, True):
        if forget:
            (api.files.directory / "envoy.pid").unlink()
        again = EnvoyProcess(api.files, api.netns_path, envoy=binary())
        state = again.ensure(time.monotonic())
        assert (state.phase, state.pid, state.restarts) == (Phase.RUNNING, pid, 0)


def test_an_adopted_envoy_is_restarted_and_stopped_like_an_own_one(api: Sidecar) -> None:
    again = EnvoyProcess(api.files, api.netns_path, envoy=binary())
    now = time.monotonic()
    os.kill(again.ensure(now).pid, signal.SIGKILL)
    until(lambda: again.state.pid == 0, "the process is gone")
    assert again.ensure(now).phase is Phase.BACKING_OFF
    pid = again.ensure(now + 1).pid
    assert pid != 0
    EnvoyProcess(api.files, api.netns_path, envoy=binary()).stop(5)
    until(lambda: again.state.pid == 0, "the process is gone")
    assert not [found for found in netns.pids(api.netns_path) if found == pid]


def test_a_process_that_is_no_sidecar_is_neither_adopted_nor_ended(
    state: Path, ca: MeshCA, pair: Pair
) -> None:
    files = SidecarFiles(state / "api", uid=UID, gid=UID)
    envoy = EnvoyProcess(files, pair.pod, envoy=binary())
    files.prepare()
    with netns.spawn(pair.pod, ["sleep", "60"], user=UID, group=UID, cwd="/") as other:
        started = Path(f"/proc/{other.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
        record = f'{{"pid":{other.pid},"started":{started}}}'
        (files.directory / "envoy.pid").write_text(record)
        envoy.stop(5)
        assert other.poll() is None
        other.kill()


def test_an_envoy_that_cannot_start_says_why(state: Path, pair: Pair) -> None:
    files = SidecarFiles(state / "api", uid=UID, gid=UID)
    envoy = EnvoyProcess(files, pair.pod, envoy=binary())
    files.write_bootstrap(b'{"admin": {"nonsense": 1}}')
    now = time.monotonic()
    envoy.ensure(now)
    until(lambda: envoy.state.pid == 0, "Envoy gives up")
    last_exit = envoy.ensure(now).last_exit
    assert "exited with status 1" in last_exit
    assert "nonsense" in last_exit


def test_an_envoy_that_gets_no_inotify_instance_says_which_limit_to_raise(
    state: Path, ca: MeshCA, pair: Pair
) -> None:
    """The limit is that of all sidecars of a machine: they have one user. Here it is another one's."""
    user = 5994
    files = SidecarFiles(state / "api", uid=user, gid=user)
    envoy = EnvoyProcess(files, pair.pod, envoy=binary())
    api = Sidecar(ca, pair.pod, files, envoy, SidecarAdmin(files.working))
    api.write_leaves("api")
    files.write_bootstrap(render.bootstrap("test-api", "api"))
    files.write_configuration(render.render(API))
    code = f"import os, ctypes; os.setuid({user}); init = ctypes.CDLL(None).inotify_init"
    code = f"{code}\nwhile init() >= 0: pass\nprint(flush=True); input()"
    taking = [sys.executable, "-c", code]
    with subprocess.Popen(taking, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taker:
        assert taker.stdout is not None
        taker.stdout.readline()
        now = time.monotonic()
        until(lambda: envoy.ensure(now).last_exit, "it ends")
        assert "raise fs.inotify.max_user_instances" in envoy.state.last_exit
        taker.communicate()
    until(lambda: envoy.ensure(now + 1).phase is Phase.RUNNING, "it runs")
    envoy.stop(5)


def test_stopping_twice_is_the_same_as_once(api: Sidecar) -> None:
    pid = api.envoy.state.pid
    api.envoy.stop(5)
    api.envoy.stop(5)
    assert pid not in netns.pids(api.netns_path)
    assert api.envoy.state.phase is Phase.STOPPED
    api.files.remove()
    api.files.remove()
    assert not api.files.directory.exists()


def test_a_log_that_grew_too_long_is_cut_and_its_end_kept(api: Sidecar) -> None:
    log = api.files.directory / "envoy.log"
    with log.open("a") as file:
        file.write("x" * 1024 * 1024 + "\nthe end\n")
    api.envoy.ensure(time.monotonic())
    assert log.stat().st_size == 0
    assert (api.files.directory / "envoy.log.1").read_text().endswith("the end\n")


def test_a_second_envoy_cannot_take_connections_of_the_first(
    state: Path, ca: MeshCA, pair: Pair, api: Sidecar, app: App
) -> None:
    files = SidecarFiles(state / "second", uid=UID, gid=UID)
    second = Sidecar(
        ca,
        pair.pod,
        files,
        EnvoyProcess(files, pair.pod, envoy=binary()),
        SidecarAdmin(files.working),
    )
    try:
        second.write_leaves("api")
        files.write_bootstrap(render.bootstrap("second", "api"))
        files.write_configuration(render.render(API))
        second.envoy.ensure(time.monotonic())
        until(second.admin.ready, "the second Envoy runs")
        until(second.admin.rejection, "it cannot listen")
        assert "Address already in use" in second.log()
        assert second.admin.applied_version() is None
    finally:
        second.envoy.stop(5)


def test_a_pod_with_one_family_has_a_sidecar_for_that_family(
    state: Path, ca: MeshCA, pair: Pair
) -> None:
    for family in Family:
        spec = msgspec.structs.replace(API, service=f"only-{family}", families=(family,))
        with sidecar(state, ca, spec, pair.pod), echoing(pair.pod, PORT):
            assert call(pair.peer, pair.pod_address(4)) is (family is Family.IPV4)
            assert call(pair.peer, pair.pod_address(6)) is (family is Family.IPV6)


def test_the_keys_of_a_sidecar_are_for_its_user_only(api: Sidecar) -> None:
    leaf = (api.files.working / render.LEAF_FILE).stat()
    assert (leaf.st_uid, leaf.st_mode & 0o777) == (UID, 0o600)
    working = api.files.working.stat()
    assert (working.st_uid, working.st_mode & 0o777) == (UID, 0o700)
    admin = (api.files.working / render.ADMIN_SOCKET).stat()
    assert admin.st_mode & 0o777 == 0o600
    owner = api.files.directory.stat()
    assert (owner.st_uid, owner.st_mode & 0o022) == (0, 0)
    command = subprocess.run(["cat", f"/proc/{api.envoy.state.pid}/status"], capture_output=True)
    assert b"CapEff:\t0000000000000000" in command.stdout


def test_an_unchanged_configuration_writes_nothing(api: Sidecar) -> None:
    before = {path: path.stat().st_ino for path in api.files.working.iterdir()}
    assert not api.files.write_configuration(render.render(API))
    assert before == {path: path.stat().st_ino for path in api.files.working.iterdir()}


def test_links_that_the_proxy_user_plants_are_not_followed(state: Path) -> None:
    files = SidecarFiles(state / "api", uid=UID, gid=UID)
    files.prepare()
    victim = state / "victim"
    victim.write_text("untouched")
    for name in (render.BOOTSTRAP_FILE, f".{render.BOOTSTRAP_FILE}.new"):
        (files.working / name).symlink_to(victim)
    assert files.write_bootstrap(b"{}")
    assert victim.read_text() == "untouched"
    assert victim.stat().st_uid == 0
    assert (files.working / render.BOOTSTRAP_FILE).read_bytes() == b"{}"


def test_a_directory_that_the_proxy_user_cannot_pass_is_named(state: Path) -> None:
    closed = state / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(SidecarError, match=r"closed: .* cannot pass"):
        SidecarFiles(closed / "api", uid=UID, gid=UID).prepare()


def test_asking_an_envoy_that_is_not_there_is_an_error_for_a_person(state: Path) -> None:
    admin = SidecarAdmin(state)
    assert not admin.ready()
    with pytest.raises(SidecarError, match="does not answer"):
        admin.sidecar_stats()
