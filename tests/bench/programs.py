"""The default policy loaded by programs: as consul-cni does it, and as somebody in a hurry would.

Consul's rules are those of its Go package sdk/iptables (Setup for IPv4 and for IPv6), with tidegate's default ports and
user: five chains, and one `iptables` process inside nsenter for each command. They do less than tidegate's.
"""

import enum
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from tidegate.intent.policy import Family
from tidegate.model import DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, DEFAULT_PROXY_UID

_LOOPBACK = {Family.IPV4: "127.0.0.1/32", Family.IPV6: "::1/128"}
_CHAINS = (
    "CONSUL_PROXY_INBOUND",
    "CONSUL_PROXY_IN_REDIRECT",
    "CONSUL_PROXY_OUTPUT",
    "CONSUL_PROXY_REDIRECT",
    "CONSUL_DNS_REDIRECT",
)


def consul_rules(family: Family, exclude_outbound_ports: Sequence[int] = ()) -> Iterator[str]:
    """What follows `iptables -t nat`, in Consul's order."""
    for chain in _CHAINS:
        yield f"-N {chain}"
    yield f"-A CONSUL_PROXY_REDIRECT -p tcp -j REDIRECT --to-port {DEFAULT_OUTBOUND_PORT}"
    yield "-A OUTPUT -p tcp -j CONSUL_PROXY_OUTPUT"
    yield f"-A CONSUL_PROXY_OUTPUT -m owner --uid-owner {DEFAULT_PROXY_UID} -j RETURN"
    yield f"-A CONSUL_PROXY_OUTPUT -d {_LOOPBACK[family]} -j RETURN"
    yield "-A CONSUL_PROXY_OUTPUT -j CONSUL_PROXY_REDIRECT"
    for port in exclude_outbound_ports:
        yield f"-I CONSUL_PROXY_OUTPUT -p tcp --dport {port} -j RETURN"
    yield f"-A CONSUL_PROXY_IN_REDIRECT -p tcp -j REDIRECT --to-port {DEFAULT_INBOUND_PORT}"
    yield "-A PREROUTING -p tcp -j CONSUL_PROXY_INBOUND"
    yield "-A CONSUL_PROXY_INBOUND -p tcp -j CONSUL_PROXY_IN_REDIRECT"


PROCESSES = sum(1 for family in Family for _ in consul_rules(family))
"""How many processes Consul starts for its default rules."""


class Variant(enum.StrEnum):
    """There are two sets of programs named iptables; the value is what follows in the programs' names."""

    LEGACY = "legacy"
    """For the legacy tables."""
    NFT = "nft"
    """For nf_tables. Debian's `iptables` is one of these."""

    def missing(self) -> str | None:
        """The first program of the set that is not installed."""
        needed = (self._program(family, suffix) for family in Family for suffix in ("", "-restore"))
        return next((program for program in needed if shutil.which(program) is None), None)

    def one_by_one(self, namespace: str) -> None:
        """Consul's rules, a process for each."""
        for family in Family:
            program = self._program(family)
            for rule in consul_rules(family):
                _in_namespace(namespace, [program, "-t", "nat", *rule.split()])

    def at_once(self, namespace: str, exclude_outbound_ports: Sequence[int] = ()) -> None:
        """The same rules, a process for each family."""
        for family in Family:
            rules = consul_rules(family, exclude_outbound_ports)
            text = "\n".join(("*nat", *rules, "COMMIT", ""))
            _in_namespace(namespace, [self._program(family, "-restore"), "--noflush"], text)

    def _program(self, family: Family, suffix: str = "") -> str:
        program = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}[family]
        return f"{program}-{self}{suffix}"


def has_nft() -> bool:
    """Whether there is a program of that name."""
    return shutil.which("nft") is not None


def load_nft(namespace: str, text: str) -> None:
    """One nft for everything."""
    _in_namespace(namespace, ["nft", "-f", "-"], text)


def _in_namespace(namespace: str, command: list[str], text: str = "") -> None:
    subprocess.run(
        ["nsenter", f"--net={namespace}", "--", *command],
        input=text,
        text=True,
        capture_output=True,
        check=True,
    )
