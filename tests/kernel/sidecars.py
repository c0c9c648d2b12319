"""What tests with real Envoys share: a pod's sidecar, its application, and callers of both."""

import contextlib
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from namespaces import Pair

from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.envoy import EnvoyProcess, binary
from tidegate.enforce.sidecar.files import SidecarFiles
from tidegate.enforce.sidecar.spec import Endpoint, LocalService, SidecarSpec, Upstream
from tidegate.identity import spiffe
from tidegate.identity.ca import Leaf, MeshCA
from tidegate.intent.policy import Mode, Policy
from tidegate.kernel import netns
from tidegate.model import IntentionRule, MutualTLSMode

DEADLINE_S = 20
DRAIN_S = 2
DOMAIN = "0f1e2d3c.consul"
UID = 5995
PORT = 8080
OTHER_PORT = 9090

API = SidecarSpec(
    service="api",
    trust_domain=DOMAIN,
    mode=MutualTLSMode.PERMISSIVE,
    port=PORT,
    intentions=(IntentionRule(source="web", allow=True),),
)
ADMIN = LocalService(
    service="api-admin",
    port=OTHER_PORT,
    mode=MutualTLSMode.PERMISSIVE,
    intentions=(IntentionRule(source="ops", allow=True),),
)
SEVERAL = msgspec.structs.replace(API, more_services=(ADMIN,))
WEB = SidecarSpec(service="web", trust_domain=DOMAIN)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)


@dataclass
class App:
    """A TCP server that speaks only when spoken to, and remembers who came."""

    accepted: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def echoing(netns_path: str, port: int) -> Iterator[App]:
    app = App()
    listener = netns.run_in(
        netns_path,
        lambda: socket.create_server(
            ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
        ),
    )
    connections: list[socket.socket] = []

    def echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(4096):
                connection.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                app.accepted += 1
                connections.append(connection)
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield app
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def dial(netns_path: str, address: str, port: int, source: str = "") -> socket.socket:
    """A connection from inside a namespace, from the address `source` where one is given."""
    bound = (source, 0) if source else None
    return netns.run_in(
        netns_path,
        lambda: socket.create_connection((address, port), timeout=DEADLINE_S, source_address=bound),
    )


def echoes(connection: socket.socket) -> bool:
    """Whether the application answers; False when the connection is closed instead."""
    try:
        connection.sendall(b"hello, application\n")
        return connection.recv(64) == b"hello, application\n"
    except (ConnectionError, ssl.SSLError):
        return False


def call(netns_path: str, address: str, port: int = PORT, source: str = "") -> bool:
    """One request over a new connection."""
    try:
        with dial(netns_path, address, port, source) as connection:
            return echoes(connection)
    except ConnectionError:
        return False


@dataclass
class Sidecar:
    """One pod's Envoy, as the node would run it."""

    ca: MeshCA
    netns_path: str
    files: SidecarFiles
    envoy: EnvoyProcess
    admin: SidecarAdmin

    def write_leaves(self, *services: str) -> tuple[Leaf, render.Secrets]:
        """New leaves for services, of which it gives the first, and the secrets with them."""
        leaves = [self.ca.issue(spiffe.service_id(DOMAIN, service), 3600) for service in services]
        certificates = [
            render.ServiceCertificate(
                service=service, certificate_pem=leaf.certificate_pem, key_pem=leaf.key_pem
            )
            for service, leaf in zip(services, leaves, strict=True)
        ]
        secrets = render.render_secrets(certificates, self.ca.roots_pem)
        assert self.files.write_secrets(secrets)
        return leaves[0], secrets

    def rotate(self, *services: str) -> Leaf:
        leaf, secrets = self.write_leaves(*services)
        until(
            lambda: self.admin.applied_secrets(secrets.leaves) == secrets.version,
            f"{services[0]} has its new leaf",
        )
        return leaf

    def start(self, spec: SidecarSpec) -> None:
        self.write_leaves(*(one.service for one in spec.services))
        self.files.write_bootstrap(render.bootstrap(f"test-{spec.service}", spec.service))
        configuration = render.render(spec)
        self.files.write_configuration(configuration)
        self.envoy.ensure(time.monotonic(), transparent=spec.transparent)
        self.until_applied(configuration)

    def apply(self, spec: SidecarSpec) -> None:
        configuration = render.render(spec)
        assert self.files.write_configuration(configuration)
        self.until_applied(configuration)

    def until_applied(self, configuration: render.Configuration) -> None:
        until(
            lambda: (
                self.admin.ready()
                and self.admin.applied_version(configuration.ecds) == configuration.version
            ),
            f"version {configuration.version} is applied; log: {self.log()}",
        )

    def log(self) -> str:
        return (self.files.directory / "envoy.log").read_text()


@contextlib.contextmanager
def sidecar(
    state: Path, ca: MeshCA, spec: SidecarSpec, netns_path: str, policy: Policy | None = None
) -> Iterator[Sidecar]:
    files = SidecarFiles(state / spec.service, uid=UID, gid=UID)
    envoy = EnvoyProcess(files, netns_path, envoy=binary(), drain_time_s=DRAIN_S)
    made = Sidecar(ca, netns_path, files, envoy, SidecarAdmin(files.working))
    try:
        made.start(spec)
        mode = Mode.TPROXY if spec.transparent else Mode.REDIRECT
        Engine().apply(netns_path, policy or Policy(mode=mode))
        yield made
    finally:
        envoy.stop(5)
        end_sidecars(netns_path)


def end_sidecars(netns_path: str) -> None:
    """What a failed test may have started besides, in a namespace that is the test's own."""
    for pid in netns.pids(netns_path):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}").stat().st_uid == UID:
                os.kill(pid, signal.SIGKILL)


def calling_api(pair: Pair) -> SidecarSpec:
    endpoints = tuple(
        Endpoint(address=address, service_port=PORT) for address in (pair.pod_ipv4, pair.pod_ipv6)
    )
    upstream = Upstream(service="api", port=PORT, endpoints=endpoints)
    return msgspec.structs.replace(WEB, upstreams=(upstream,))


def tls(
    state: Path,
    connection: socket.socket,
    ca: MeshCA,
    leaf: Leaf | None,
    server_name: str | None = None,
) -> ssl.SSLSocket:
    """A mesh client's TLS over a connection, with OpenSSL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ca.roots_pem)
    if leaf is not None:
        pem = state / f"client-{leaf.serial}.pem"
        pem.write_text(leaf.certificate_pem + leaf.key_pem)
        context.load_cert_chain(pem)
    return context.wrap_socket(connection, server_hostname=server_name)
