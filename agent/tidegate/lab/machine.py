"""A lab on several machines: writes what one of them has of it, to be run by systemd (docs/systemd.md, Vagrantfile).

`python -m tidegate.lab.machine LAB --node NODE --at NODE=ADDRESS...`; keys, certificates and the token that the
machines share have to be in /etc/tidegate/lab already. The lab file is the same as on
one machine; its nodes are the machines, its pods services with network namespaces of their own. Over IPv4 only: the
machines need no other addresses than those that are given. Starts nothing; prints the units that are to be started.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from tidegate.errors import InputError, TidegateError
from tidegate.intent.entries import parse_entries, to_request
from tidegate.lab import apps, network, runtime, traffic
from tidegate.lab.network import Layout
from tidegate.lab.spec import AppKind, LabSpec, PodSpec, load
from tidegate.lab.state import LabPaths

SERVER_PORT = 8501
PEERS_PORT = 20201
"""Where agents answer each other."""
TOKEN, CERTIFICATE, KEY = "agent.token", "server.crt", "server.key"
"""Files with what the machines have in common, beside the applications' own: POD.crt and POD.key."""

_HOME = "/opt/tidegate"
_CONFIG = "/etc/tidegate"
_APPS = f"{_CONFIG}/lab"
_LAB = f"{_APPS}/lab.yaml"
"""The lab file that the machine is as; systemd/lab.sh leaves it when it is done."""
_ENTRIES = f"{_APPS}/entries.json"
_TRAFFIC = "/var/lib/tidegate-lab"
_UNITS = "/etc/systemd/system"
_UNITS_OF_PACKAGES = "/usr/lib/systemd/system"
_ROUTES = "tidegate-lab-routes.service"


class _Layout(Layout, frozen=True, kw_only=True):
    """Addresses of IPv4 only."""

    def pod_addresses(self, pod: str) -> tuple[str, ...]:
        return super().pod_addresses(pod)[:1]


class Machine:
    """One machine's part of a lab."""

    def __init__(self, spec: LabSpec, node: str, at: Mapping[str, str], root: Path) -> None:
        """`at` has the address of each node's machine; what is written lies below `root`. InputError."""
        missing = [each for each in spec.nodes if each not in at]
        if node not in spec.nodes or missing:
            wrong = f"{node!r} is no node" if node not in spec.nodes else f"where is {missing[0]}?"
            raise InputError(wrong, source="the lab", expected=f"--node and --at of {spec.nodes}")
        self._spec = spec
        self._node = node
        self._at = at
        self._root = root
        planned = network.plan(spec, None)
        self._layout = msgspec.convert(msgspec.to_builtins(planned), _Layout)
        self._paths = LabPaths(spec.name)
        self._paths.apps, self._paths.traffic = self._place(_APPS), self._place(_TRAFFIC)

    @property
    def _has_server(self) -> bool:
        return self._node == self._spec.nodes[0]

    @property
    def _pods(self) -> tuple[PodSpec, ...]:
        return tuple(pod for pod in self._spec.pods if pod.node == self._node)

    @property
    def units(self) -> tuple[str, ...]:
        """What is to be enabled and started, in this order."""
        return (
            _ROUTES,
            *(("tidegate-server.service",) if self._has_server else ()),
            "tidegate-agent.service",
            *(f"{pod.name}.service" for pod in self._pods),
        )

    def write(self) -> None:
        """Writes configuration and units; the secrets are where they belong already.

        InputError for a pod that is called as a unit of the system.
        """
        for pod in self._pods:
            if self._place(f"{_UNITS_OF_PACKAGES}/{pod.name}.service").exists():
                wrong = f"this machine has {pod.name}.service already"
                raise InputError(wrong, source="the lab", expected="another name for the pod")
        if self._has_server:
            self._yaml("server.yaml", self._server())
            self._place(_ENTRIES).unlink(missing_ok=True)
            if entries := self._entries():
                self._write(_ENTRIES, msgspec.json.encode(entries).decode())
        self._yaml("agent.yaml", self._agent())
        self._write("/etc/sysctl.d/90-tidegate.conf", "net.ipv4.ip_forward = 1\n")
        self._write(f"{_UNITS}/{_ROUTES}", self._routes())
        self._paths.traffic.mkdir(parents=True, exist_ok=True)
        os.chown(self._paths.traffic, traffic.NOBODY, traffic.NOBODY)
        for pod in self._pods:
            config = apps.configuration(self._spec, self._paths, self._layout, pod)
            self._write(f"{_APPS}/{pod.name}.json", msgspec.json.encode(config).decode())
            self._write(f"{_UNITS}/{pod.name}.service", _unit(pod))
            self._write(f"{_UNITS}/{pod.name}.service.d/tidegate.conf", _DROP_IN)

    def _server(self) -> dict[str, Any]:
        spec = self._spec
        return {
            "state_dir": "/var/lib/tidegate-server",
            "listen": [
                "unix:///run/tidegate/server.sock",
                f"https://{self._at[self._node]}:{SERVER_PORT}",
            ],
            "tls": {"cert_file": f"{_APPS}/{CERTIFICATE}", "key_file": f"{_APPS}/{KEY}"},
            "tokens": [
                {
                    "name": "agent",
                    "secret_file": f"{_APPS}/{TOKEN}",
                    "rights": ["catalog:write", "config:write", "identity:write"],
                }
            ],
            "trust_domain": spec.trust_domain,
            "datacenter": spec.datacenter,
            "default_intention_policy": spec.default_intention_policy.value,
            "leaf_lifetime": spec.leaf_lifetime_s,
        }

    def _entries(self) -> list[dict[str, Any]]:
        """What of the file's entries is not in the file that was there before: that has been written already."""
        before = self._place(_LAB)
        written = {text.text for text in load(before).config} if before.exists() else set()
        return [
            to_request(entry)
            for text in self._spec.config
            if text.text not in written
            for entry in parse_entries(text.text, text.source)
        ]

    def _agent(self) -> dict[str, Any]:
        spec = self._spec
        server = f"https://{self._at[spec.nodes[0]]}:{SERVER_PORT}"
        return {
            "node": self._node,
            "node_addresses": [self._at[self._node]],
            "server": server,
            "consul": {"token_file": f"{_APPS}/{TOKEN}", "ca_file": f"{_APPS}/{CERTIFICATE}"},
            "peers": f"{self._at[self._node]}:{PEERS_PORT}",
            "trust_domain": spec.trust_domain,
            "datacenter": spec.datacenter,
            "window": spec.window_s,
            "leaf_lifetime": spec.leaf_lifetime_s,
            "processes": [_process(pod, self._layout) for pod in self._pods],
        }

    def _routes(self) -> str:
        ways = [
            f"ExecStart=/usr/sbin/ip route replace {self._layout.pod_networks(node)[0]} via {self._at[node]}"
            for node in self._spec.nodes
            if node != self._node
        ]
        return _ROUTES_UNIT.format(ways="\n".join(ways) or "ExecStart=/usr/bin/true")

    def _yaml(self, name: str, content: dict[str, Any]) -> None:
        self._write(f"{_CONFIG}/{name}", yaml.safe_dump(content, sort_keys=False))

    def _place(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def _write(self, place: str, text: str) -> None:
        file = self._place(place)
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        file.write_text(text)


def _process(pod: PodSpec, layout: Layout) -> dict[str, Any]:
    return {
        "service": pod.service,
        "name": pod.name,
        "port": pod.port,
        "more_ports": [{"service": one.service, "port": one.port} for one in pod.more_ports],
        "network": {"addresses": list(layout.pod_addresses(pod.name))},
        "meshed": pod.mesh,
        "annotations": pod.annotations,
    }


def _unit(pod: PodSpec) -> str:
    if pod.app.kind is AppKind.NONE:
        return _UNIT.format(pod=pod.name, type="oneshot", command="/usr/bin/true")
    command = f"{_HOME}/bin/python -m tidegate.lab.traffic {_APPS}/{pod.name}.json"
    return _UNIT.format(pod=pod.name, type="exec", command=command)


_UNIT = """\
[Unit]
Description=The lab's {pod}
[Service]
Type={type}
RemainAfterExit=yes
ExecStart={command}
[Install]
WantedBy=multi-user.target
"""

_DROP_IN = """\
[Unit]
Requires=tidegate-sidecar@%N.service
After=tidegate-sidecar@%N.service
[Service]
NetworkNamespacePath=/run/netns/%N
"""

_ROUTES_UNIT = """\
[Unit]
Description=Ways to the services of the lab's other machines
Wants=network-online.target
After=network-online.target
# Which listens at an address of this network.
Before=tidegate-server.service
StartLimitIntervalSec=0
[Service]
Type=oneshot
RemainAfterExit=yes
Restart=on-failure
RestartSec=1
{ways}
[Install]
WantedBy=multi-user.target
"""


def main(argv: Sequence[str]) -> int:
    """Writes one machine's part of a lab."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.lab.machine", description=__doc__)
    parser.add_argument("lab", type=Path, help="the lab file")
    parser.add_argument("--node", required=True, help="which of its nodes this machine is")
    parser.add_argument("--at", action="append", default=[], metavar="NODE=ADDRESS")
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        spec = load(args.lab)
        runtime.check(spec, str(args.lab))
        at = dict(each.split("=", 1) for each in args.at if "=" in each)
        machine = Machine(spec, args.node, at, args.root)
        machine.write()
    except TidegateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(*machine.units)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
