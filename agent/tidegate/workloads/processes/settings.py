"""Which services of this machine are workloads: the section `processes` of an agent's configuration."""

import contextlib
import ipaddress
import pwd
import re
from collections.abc import Iterable, Iterator

import msgspec

from tidegate.errors import InputError
from tidegate.intent.network_text import canonical_address, check_interface
from tidegate.intent.policy import MAX_ID, check_port
from tidegate.model import DEFAULT_PROXY_UID, ServiceName, ServicePort, Sidecar

MAX_PROCESSES = 256
"""Most services of one machine."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]{1,240}\.(service|scope)")

_INBOUND_PORTS = "tidegate.io/include-inbound-ports"
_OTHER_USERS = "tidegate.io/exclude-uids"
_HOST_POLICY = {
    "tidegate.io/mode": "redirect",
    "tidegate.io/drop-invalid": "false",
}
"""In the host's namespace packets of others are not to be dropped, and need no routes of their own."""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network namespace of the service's own, which `tidegate sidecar up NAME` makes before the service starts."""

    addresses: tuple[str, ...]
    """The service's addresses, at most one of each family. Other machines have to have a route to them by this one."""


class HostNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That the service shares the host's network namespace, and is redirected there all the same.

    Inbound, connections to the service's ports; outbound, those of its user. All else of the host is left alone.
    """

    user: str
    """Name or number of the user that the service runs as, and nobody else does."""


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One service of this machine, and where it is to be found: exactly one of network to host_network says it."""

    service: str
    """Text of a ServiceName."""
    port: int = 0
    """TCP port that it listens on, 0 for a service that only calls."""
    more_ports: tuple[ServicePort, ...] = ()
    """Further services in the same network namespace, behind the same sidecar."""
    name: str = ""
    """Of the workload, and of its namespace in /run/netns; empty for the name that the service has in its tenant."""
    network: Network | None = None
    unit: str = ""
    """Of systemd: all its processes are in one network namespace."""
    pid: int | str = 0
    """Number of a process, or path of the file that has it."""
    listens: int = 0
    """TCP port on which one of its processes listens."""
    host_network: HostNetwork | None = None
    interface: str | None = None
    """By which callers come to it; None for eth0."""
    meshed: bool = True
    sidecar: Sidecar = Sidecar.TIDEGATE
    annotations: dict[str, str] = {}

    @property
    def workload_name(self) -> str:
        return self.name or ServiceName.of(self.service).name

    @property
    def redirected_by(self) -> dict[str, str]:
        """Its annotations, with what has to hold in the host's namespace. InputError when its user is gone."""
        if self.host_network is None:
            return self.annotations
        return self.annotations | _host_annotations(self, _redirected_user(self.host_network))


def check(processes: Iterable[ProcessConfig]) -> None:
    """Raises InputError, with the field such as "[0].unit", for what cannot be."""
    names: list[str] = []
    on_host = ""
    for number, one in enumerate(processes):
        with _within(f"[{number}]"):
            _check(one)
            if one.workload_name in names:
                problem = f"{one.workload_name!r} is there twice"
                raise InputError(problem, field="name", expected="a name of its own")
            if one.host_network is not None and on_host:
                raise InputError(
                    f"{on_host} is in the host's network namespace already, which can have one sidecar",
                    field="host_network",
                    expected=f"{one.service} among the more_ports of {on_host}, or a network of its own",
                )
        names.append(one.workload_name)
        on_host = on_host or (one.service if one.host_network else "")
    if len(names) > MAX_PROCESSES:
        raise InputError(f"there are {len(names)}", expected=f"{MAX_PROCESSES}")


@contextlib.contextmanager
def _within(field: str) -> Iterator[None]:
    """Errors of what is done meanwhile are about something in this field."""
    try:
        yield
    except InputError as error:
        where = ".".join(part for part in (field, error.field) if part)
        raise InputError(error.problem, field=where, expected=error.expected) from error


def _check(one: ProcessConfig) -> None:
    if not one.service:
        raise InputError("is empty", field="service", expected="the name of a service")
    if not _NAME.fullmatch(one.workload_name):
        raise InputError(
            f"{one.workload_name!r} is no name of a workload",
            field="name",
            expected="1 to 40 small letters, digits and -",
        )
    _check_place(one)
    for field, port in (
        ("port", one.port or None),
        ("listens", one.listens or None),
        *((f"more_ports[{number}].port", of.port) for number, of in enumerate(one.more_ports)),
    ):
        if port is not None:
            with _within(field):
                check_port(port)
    if one.interface is not None:
        with _within("interface"):
            check_interface(one.interface)
    if one.network is not None:
        with _within("network.addresses"):
            _check_addresses(one.network.addresses)
    if one.host_network is not None:
        with _within("host_network"):
            _check_host_network(one, one.host_network)


def _check_place(one: ProcessConfig) -> None:
    said = {
        "network": one.network is not None,
        "unit": bool(one.unit),
        "pid": bool(one.pid),
        "listens": bool(one.listens),
        "host_network": one.host_network is not None,
    }
    places = [place for place, is_said in said.items() if is_said]
    if len(places) != 1:
        problem = f"{' and '.join(places)} are said" if places else "it is not said where it is"
        raise InputError(problem, expected=f"exactly one of {', '.join(said)}")
    if one.unit and not _UNIT.fullmatch(one.unit):
        raise InputError(f"{one.unit!r} is no unit", field="unit", expected="such as web.service")
    match one.pid:
        case int() if one.pid < 0:
            raise InputError(f"{one.pid} is no process", field="pid", expected="a number")
        case str() if one.pid and not one.pid.startswith("/"):
            problem = f"{one.pid!r} depends on where the agent is started"
            raise InputError(problem, field="pid", expected="a number, or /...")


def _check_addresses(addresses: tuple[str, ...]) -> None:
    versions = [ipaddress.ip_address(canonical_address(address)).version for address in addresses]
    if not versions or len(set(versions)) < len(versions):
        raise InputError(
            f"has {len(versions)} addresses", expected="one of IPv4, one of IPv6, or both"
        )


def _check_host_network(one: ProcessConfig, host: HostNetwork) -> None:
    user = _redirected_user(host)
    if user in (0, DEFAULT_PROXY_UID):
        whose = "root, as the agent and what else keeps the host" if user == 0 else "the sidecar's"
        raise InputError(
            f"{host.user!r} is {whose}", field="user", expected="a user of the service's own"
        )
    decided = sorted(one.annotations.keys() & _host_annotations(one, user).keys())
    if decided:
        problem = f"in the host's network namespace {', '.join(decided)} cannot be chosen"
        raise InputError(problem, expected="none of these annotations")


def _redirected_user(host: HostNetwork) -> int:
    """The number of the user. InputError when there is none of that name or number."""
    if host.user.isdecimal() and int(host.user) <= MAX_ID:
        return int(host.user)
    try:
        return pwd.getpwnam(host.user).pw_uid
    except KeyError as error:
        raise InputError(
            f"there is no user {host.user!r}", field="user", expected="one of this machine"
        ) from error


def _host_annotations(one: ProcessConfig, user: int) -> dict[str, str]:
    """What makes a policy about nothing but the service's ports, and what its user opens."""
    ports = sorted({port for port in (one.port, *(of.port for of in one.more_ports)) if port})
    others = f"0-{user - 1}" + (f",{user + 1}-{MAX_ID}" if user < MAX_ID else "")
    return {
        **_HOST_POLICY,
        _INBOUND_PORTS: ",".join(map(str, ports)),
        _OTHER_USERS: others,
    }
