"""What tests of the backends share: ports and policies, a pair with servers, and policies that say everything."""

from collections.abc import Iterator
from contextlib import contextmanager

from namespaces import Pair, pair_of, serving

from tidegate.intent.policy import (
    Dns,
    Family,
    IdRange,
    Inbound,
    Mark,
    Mode,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Proxy,
    UserPorts,
)
from tidegate.kernel import cgroups

INBOUND, OUTBOUND, APP, OTHER = 20000, 15001, 8080, 5432
PORTS = (INBOUND, OUTBOUND, APP, OTHER)
PROXY_UID = 5995


def ports(*numbers: int) -> tuple[PortRange, ...]:
    return tuple(PortRange(number, number) for number in numbers)


def excluding_ports(*numbers: int) -> Policy:
    return Policy(outbound=Outbound(exclude_ports=ports(*numbers)))


IPV4_ONLY = Policy(families=(Family.IPV4,))
IPV6_ONLY = Policy(families=(Family.IPV6,))
NOTHING = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
WITH_ALL_TABLES = Policy(dns=Dns(enabled=True), drop_invalid=True)


@contextmanager
def pair_with_servers() -> Iterator[Pair]:
    """Servers on all ports of both ends; each test applies a policy of its own."""
    with pair_of() as pair, serving(pair.pod, "pod", PORTS), serving(pair.peer, "peer", PORTS):
        yield pair


@contextmanager
def cgroup(*names: str) -> Iterator[str]:
    """Path of a new cgroup below the root of cgroup v2."""
    made = [cgroups.mounted_at() / "/".join(names[: depth + 1]) for depth in range(len(names))]
    for path in made:
        path.mkdir()
    try:
        yield "/".join(names)
    finally:
        for path in reversed(made):
            path.rmdir()


def policies_that_say_everything(cgroup_path: str) -> dict[str, Policy]:
    """Policies that use every criterion and every action, by name."""
    return {
        "proxy": Policy(
            proxy=Proxy(
                uids=(1, 2, 7),
                gids=(3, 9),
                mark=Mark(0x10, 0xF0),
                cgroup=cgroup_path,
                self_calls_inbound=True,
            )
        ),
        "whole mark": Policy(proxy=Proxy(uids=(), mark=Mark(5))),
        "dns": WITH_ALL_TABLES,
        "dns of some": Policy(dns=Dns(enabled=True, resolvers=("10.0.0.1", "10.0.0.9", "fd00::1"))),
        "tproxy": Policy(mode=Mode.TPROXY, drop_invalid=True),
        "including": Policy(
            inbound=Inbound(include_ports=ports(1, 5), include_interfaces=("eth0", "eth1")),
            outbound=Outbound(
                include_ports=ports(9),
                include_cidrs=("10.0.0.0/8", "192.0.2.0/24", "fd00::/8"),
                include_interfaces=("a", "b"),
            ),
        ),
        "including no interface": Policy(outbound=Outbound(include_interfaces=())),
        "excluding": Policy(
            inbound=Inbound(
                exclude_cidrs=("0.0.0.0/0", "::/0"),
                exclude_interfaces=("a", "b-c.d@e", "fifteen-letters"),
                direct_probes=True,
                node_addresses=("10.0.0.1/32", "fd00::1/128"),
            ),
            outbound=Outbound(
                exclude_gids=(IdRange(0, 4294967294),),
                exclude_uids=(IdRange(0, 1), IdRange(4294967294, 4294967294)),
                exclude_ports=(
                    *(PortRange(port, port + 2) for port in range(1, 99, 4)),
                    PortRange(30000, 65535),
                ),
                exclude_cidrs=("10.0.0.0/9", "172.16.0.1/32", "fd00:1::/33", "fd00:2::1/128"),
                exclude_user_ports=(
                    UserPorts((Protocol.TCP,), ports(5, 8), (IdRange(1, 1), IdRange(3, 4))),
                    UserPorts((Protocol.TCP, Protocol.UDP), ports(5), (IdRange(1, 1),)),
                ),
            ),
        ),
    }
