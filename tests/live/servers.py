"""The real servers of the corpus, each as its users run it, but small; and Envoy on both ends of a mesh connection."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from place import NOBODY, Place, server_context
from speakers import DIALECTS, speaking

from tidegate.enforce.sidecar.envoy import binary
from tidegate.kernel import netns

TLS, TLS12, NO_ALPN = 4433, 4434, 4435
"""openssl s_server: TLS up to 1.3, with ALPN; TLS 1.2 only; without ALPN."""
REDIS, REDIS_TLS = 6379, 6380
SSH = 22
MYSQL = 3306
POSTGRES, POSTGRES_PLAIN = 5432, 5433
"""The second has no TLS."""
HTTP, HTTPS, HTTP_PROXIED, HTTPS_PROXIED = 8080, 8443, 8081, 8444
"""Envoy; the last two want the PROXY protocol."""
MESH = 20000
MESH_HTTP1, MESH_HTTP2, MESH_TCP = 7001, 7002, 7003
"""Listeners of the mesh client's Envoy on its loopback."""
CLOSED = 9
MESH_SNI = "api.default.dc1.internal.0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0.consul"


@contextlib.contextmanager
def all_servers(place: Place) -> Iterator[None]:
    """Every server that a case needs, listening."""
    with contextlib.ExitStack() as stack:
        for start in (_openssl, _redis, _ssh, _mariadb, _postgres, _envoys):
            stack.enter_context(start(place))
        for dialect in DIALECTS.values():
            speaker = speaking(dialect, server_context(place))
            netns.run_in(place.pair.pod, stack.enter_context, speaker)
        yield


@contextlib.contextmanager
def _openssl(place: Place) -> Iterator[None]:
    server = [
        place.packages.program("openssl"),
        "s_server",
        "-cert",
        str(place.certificate),
        "-quiet",
    ]
    with (
        place.serving([*server, "-accept", str(TLS), "-alpn", "h2,http/1.1", "-www"], TLS),
        place.serving([*server, "-accept", str(TLS12), "-tls1_2", "-www"], TLS12),
        place.serving([*server, "-accept", str(NO_ALPN), "-www"], NO_ALPN),
    ):
        yield


@contextlib.contextmanager
def _redis(place: Place) -> Iterator[None]:
    directory = place.own("redis")
    command = [
        *(place.packages.program("redis-server"), "--dir", str(directory), "--save", ""),
        *(
            "--bind",
            "*",
            "--protected-mode",
            "no",
            "--port",
            str(REDIS),
            "--tls-port",
            str(REDIS_TLS),
        ),
        *("--tls-cert-file", str(place.certificate), "--tls-key-file", str(place.certificate)),
        *("--tls-ca-cert-file", str(place.certificate), "--tls-auth-clients", "no"),
    ]
    with place.serving(command, REDIS, REDIS_TLS):
        yield


@contextlib.contextmanager
def _ssh(place: Place) -> Iterator[None]:
    directory = place.own("ssh")
    key = directory / "host"
    place.prepare(
        [place.packages.program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    )
    command = [
        *(place.packages.program("sshd"), "-D", "-e", "-f", "/dev/null", "-h", str(key)),
        *("-p", str(SSH), "-o", f"PidFile={directory / 'pid'}"),
    ]
    with place.serving(command, SSH):
        yield


@contextlib.contextmanager
def _mariadb(place: Place) -> Iterator[None]:
    """Without tables of its own, and so without accounts: whoever comes may come in."""
    directory = place.own("mariadb")
    command = [
        *(place.packages.program("mariadbd"), "--no-defaults", f"--datadir={directory}"),
        *(
            f"--lc-messages-dir={place.packages.path('/usr/share/mysql')}",
            "--skip-grant-tables",
            "--skip-name-resolve",
        ),
        *(f"--port={MYSQL}", f"--socket={directory / 'socket'}", f"--pid-file={directory / 'pid'}"),
        *(f"--ssl-cert={place.certificate}", f"--ssl-key={place.certificate}", "--bind-address=*"),
        *(
            "--innodb-buffer-pool-size=8M",
            "--aria-pagecache-buffer-size=1M",
            "--key-buffer-size=1M",
        ),
    ]
    with place.serving(command, MYSQL):
        yield


@contextlib.contextmanager
def _postgres(place: Place) -> Iterator[None]:
    programs = place.packages.path("/usr/lib/postgresql/15/bin")
    directory = place.own("postgres")
    secured, plain = directory / "tls", directory / "plain"
    place.prepare(
        [
            str(programs / "initdb"),
            "--no-sync",
            "--auth=trust",
            "--username=app",
            "-D",
            str(secured),
        ]
    )
    with (secured / "pg_hba.conf").open("a") as rules:
        rules.write("host all all all trust\n")
    shutil.copytree(secured, plain)
    for path in (plain, *plain.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o700 if path.is_dir() else 0o600)
    common = ("-c", "listen_addresses=*", "-c", "fsync=off", "-c", "unix_socket_directories=")
    tls = ("ssl=on", f"ssl_cert_file={place.certificate}", f"ssl_key_file={place.certificate}")
    with (
        place.serving(
            [
                *(str(programs / "postgres"), "-D", str(secured), "-p", str(POSTGRES), *common),
                *(part for each in tls for part in ("-c", each)),
            ],
            POSTGRES,
        ),
        place.serving(
            [str(programs / "postgres"), "-D", str(plain), "-p", str(POSTGRES_PLAIN), *common],
            POSTGRES_PLAIN,
        ),
    ):
        yield


@contextlib.contextmanager
def _envoys(place: Place) -> Iterator[None]:
    """One Envoy that serves, in the pod, and one that calls as a sidecar does, at the other end."""
    program = place.directory / "envoy"
    shutil.copy(binary(), program)
    program.chmod(0o755)
    with (
        _envoy(place, program, "server", _serving_envoy(place), place.pair.pod),
        _envoy(place, program, "client", _calling_envoy(place), place.pair.peer),
    ):
        yield


@contextlib.contextmanager
def _envoy(
    place: Place, program: Path, name: str, configuration: dict[str, object], where: str
) -> Iterator[None]:
    directory = place.own(f"envoy-{name}")
    path = directory / "envoy.json"
    path.write_text(json.dumps(configuration))
    os.chown(path, NOBODY, NOBODY)
    command = [
        *(
            str(program),
            "-c",
            str(path),
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "-l",
            "warning",
        ),
    ]
    resources = configuration["static_resources"]
    assert isinstance(resources, dict)
    ports = [each["address"]["socket_address"]["port_value"] for each in resources["listeners"]]
    with place.serving(command, *ports, where=where):
        yield


_API = "type.googleapis.com/envoy.extensions"


def _extension(name: str, kind: str, **fields: object) -> dict[str, object]:
    return {"name": name, "typed_config": {"@type": f"{_API}.{kind}", **fields}}


def _http(**route: object) -> dict[str, object]:
    """A connection manager for HTTP/1 and, where the client begins so, HTTP/2, with one route."""
    hosts = [{"name": "any", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **route}]}]
    router = _extension("envoy.filters.http.router", "filters.http.router.v3.Router")
    return _extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="http",
        route_config={"virtual_hosts": hosts},
        http_filters=[router],
    )


def _tcp(cluster: str) -> dict[str, object]:
    kind = "filters.network.tcp_proxy.v3.TcpProxy"
    return _extension("envoy.filters.network.tcp_proxy", kind, stat_prefix="tcp", cluster=cluster)


def _listener(
    port: int,
    proxy: dict[str, object],
    *,
    address: str = "::",
    tls: object = None,
    **fields: object,
) -> dict[str, object]:
    chain: dict[str, object] = {"filters": [proxy]}
    if tls:
        chain["transport_socket"] = tls
    socket_address = {"address": address, "port_value": port, "ipv4_compat": address == "::"}
    return {
        "name": str(port),
        "address": {"socket_address": socket_address},
        "filter_chains": [chain],
        **fields,
    }


def _cluster(name: str, address: str, port: int, **fields: object) -> dict[str, object]:
    endpoint = {"address": {"socket_address": {"address": address, "port_value": port}}}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
        **fields,
    }


def _serving_envoy(place: Place) -> dict[str, object]:
    pem = {"filename": str(place.certificate)}
    common = {
        "tls_certificates": [{"certificate_chain": pem, "private_key": pem}],
        "alpn_protocols": ["h2", "http/1.1"],
    }
    kind = "transport_sockets.tls.v3.DownstreamTlsContext"
    tls = _extension("envoy.transport_sockets.tls", kind, common_tls_context=common)
    proxied = [
        _extension(
            "envoy.filters.listener.proxy_protocol",
            "filters.listener.proxy_protocol.v3.ProxyProtocol",
        )
    ]
    hello = _http(direct_response={"status": 200, "body": {"inline_string": "hello\n"}})
    return {
        "static_resources": {
            "listeners": [
                _listener(HTTP, hello),
                _listener(HTTPS, hello, tls=tls),
                _listener(HTTP_PROXIED, hello, listener_filters=proxied),
                _listener(HTTPS_PROXIED, hello, tls=tls, listener_filters=proxied),
                _listener(MESH, _tcp("application"), tls=tls),
            ],
            "clusters": [_cluster("application", "127.0.0.1", HTTP)],
        }
    }


def _calling_envoy(place: Place) -> dict[str, object]:
    """The same service three ways, by the names of Consul's mesh."""

    def cluster(name: str, *alpn: str, protocol: str | None = None) -> dict[str, object]:
        fields: dict[str, object] = {
            "transport_socket": _extension(
                "envoy.transport_sockets.tls",
                "transport_sockets.tls.v3.UpstreamTlsContext",
                sni=MESH_SNI,
                common_tls_context={"alpn_protocols": list(alpn)},
            )
        }
        if protocol:
            kind = f"{_API}.upstreams.http.v3.HttpProtocolOptions"
            options = {"@type": kind, "explicit_http_config": {protocol: {}}}
            fields["typed_extension_protocol_options"] = {kind.partition("/")[2]: options}
        return _cluster(name, place.ipv4, MESH, **fields)

    local = "127.0.0.1"
    return {
        "static_resources": {
            "listeners": [
                _listener(MESH_HTTP1, _http(route={"cluster": "http1"}), address=local),
                _listener(MESH_HTTP2, _http(route={"cluster": "http2"}), address=local),
                _listener(MESH_TCP, _tcp("tcp"), address=local),
            ],
            "clusters": [
                cluster("http1", "http/1.1", protocol="http_protocol_options"),
                cluster("http2", "h2", protocol="http2_protocol_options"),
                cluster("tcp"),
            ],
        }
    }
