"""What Consul leaves in a namespace, written by the programs that it runs, command by command.

The lists are those of Consul's sdk/iptables and sdk/nftables with DNS redirection and one exclusion of each kind.
"""

import shutil
import subprocess
from collections.abc import Callable

import pytest
from namespaces import DEADLINE_S

from tidegate.kernel import netns

INBOUND, OUTBOUND, PROXY_UID = 20000, 15001, 5995
CHAINS = (
    "CONSUL_PROXY_INBOUND",
    "CONSUL_PROXY_IN_REDIRECT",
    "CONSUL_PROXY_OUTPUT",
    "CONSUL_PROXY_REDIRECT",
    "CONSUL_DNS_REDIRECT",
)
BASE_CHAINS = ("CONSUL_NAT_OUTPUT", "CONSUL_NAT_PREROUTING")


def run(netns_path: str, *argv: str, text: str = "") -> str:
    """What a program says inside a namespace; skips the test where there is no such program."""
    if shutil.which(argv[0]) is None:
        pytest.skip(f"there is no {argv[0]} on this machine")
    process = netns.spawn(
        netns_path,
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, problem = process.communicate(text.encode(), timeout=DEADLINE_S * 3)
    assert process.returncode == 0, (argv, text, problem.decode())
    return output.decode()


def by_iptables(netns_path: str, program: str, loopback: str, resolver: str) -> None:
    """sdk/iptables/iptables.go: one process per rule, in this order."""
    rules = [
        *(f"-N {chain}" for chain in CHAINS),
        f"-A CONSUL_PROXY_REDIRECT -p tcp -j REDIRECT --to-port {OUTBOUND}",
        f"-A CONSUL_DNS_REDIRECT -p udp --dport 53 -j DNAT --to-destination {resolver}",
        f"-A CONSUL_DNS_REDIRECT -p tcp --dport 53 -j DNAT --to-destination {resolver}",
        f"-A OUTPUT -p udp -d {loopback} --dport 53 -j CONSUL_DNS_REDIRECT",
        f"-A OUTPUT -p tcp -d {loopback} --dport 53 -j CONSUL_DNS_REDIRECT",
        "-A OUTPUT -p tcp -j CONSUL_PROXY_OUTPUT",
        f"-A CONSUL_PROXY_OUTPUT -m owner --uid-owner {PROXY_UID} -j RETURN",
        f"-A CONSUL_PROXY_OUTPUT -d {loopback} -j RETURN",
        "-A CONSUL_PROXY_OUTPUT -j CONSUL_PROXY_REDIRECT",
        "-I CONSUL_PROXY_OUTPUT -p tcp --dport 9999 -j RETURN",
        f"-I CONSUL_PROXY_OUTPUT -d {loopback} -j RETURN",
        "-I CONSUL_PROXY_OUTPUT -m owner --uid-owner 5996 -j RETURN",
        f"-A CONSUL_PROXY_IN_REDIRECT -p tcp -j REDIRECT --to-port {INBOUND}",
        "-A PREROUTING -p tcp -j CONSUL_PROXY_INBOUND",
        "-A CONSUL_PROXY_INBOUND -p tcp -j CONSUL_PROXY_IN_REDIRECT",
        "-I CONSUL_PROXY_INBOUND -p tcp --dport 9998 -j RETURN",
    ]
    run(netns_path, "sh", "-e", text="\n".join(f"{program} -t nat {rule}" for rule in rules))


def with_legacy_tables(netns_path: str) -> None:
    run(netns_path, "iptables-legacy", "--version")
    by_iptables(netns_path, "iptables-legacy", "127.0.0.1/32", "127.0.0.1:8600")
    by_iptables(netns_path, "ip6tables-legacy", "::1/128", "[::1]:8600")


def with_iptables_nft(netns_path: str) -> None:
    run(netns_path, "iptables-nft", "--version")
    by_iptables(netns_path, "iptables-nft", "127.0.0.1/32", "127.0.0.1:8600")
    by_iptables(netns_path, "ip6tables-nft", "::1/128", "[::1]:8600")


def with_nft(netns_path: str, table: str = "consul_tproxy") -> None:
    """sdk/nftables/nftables.go: one script."""
    hook = "type nat hook {} priority -100 ;"
    script = [
        f"add table inet {table}",
        f"delete table inet {table}",
        f"add table inet {table}",
        *(f"add chain inet {table} {chain}" for chain in CHAINS),
        f"add chain inet {table} CONSUL_NAT_OUTPUT {{ {hook.format('output')} }}",
        f"add chain inet {table} CONSUL_NAT_PREROUTING {{ {hook.format('prerouting')} }}",
        *(
            f"add rule inet {table} {rule}"
            for rule in (
                f"CONSUL_PROXY_REDIRECT meta l4proto tcp redirect to :{OUTBOUND}",
                "CONSUL_DNS_REDIRECT udp dport 53 dnat ip to 127.0.0.1:8600",
                "CONSUL_DNS_REDIRECT tcp dport 53 dnat ip to 127.0.0.1:8600",
                "CONSUL_NAT_OUTPUT ip daddr 127.0.0.1 udp dport 53 jump CONSUL_DNS_REDIRECT",
                "CONSUL_NAT_OUTPUT ip daddr 127.0.0.1 tcp dport 53 jump CONSUL_DNS_REDIRECT",
                "CONSUL_NAT_OUTPUT meta l4proto tcp jump CONSUL_PROXY_OUTPUT",
                f"CONSUL_PROXY_OUTPUT skuid {PROXY_UID} return",
                "CONSUL_PROXY_OUTPUT ip daddr 127.0.0.1/32 return",
                "CONSUL_PROXY_OUTPUT ip6 daddr ::1/128 return",
                "CONSUL_PROXY_OUTPUT jump CONSUL_PROXY_REDIRECT",
                f"CONSUL_PROXY_IN_REDIRECT meta l4proto tcp redirect to :{INBOUND}",
                "CONSUL_NAT_PREROUTING meta l4proto tcp jump CONSUL_PROXY_INBOUND",
                "CONSUL_PROXY_INBOUND meta l4proto tcp jump CONSUL_PROXY_IN_REDIRECT",
            )
        ),
    ]
    run(netns_path, "nft", "-f", "-", text="\n".join(script))


def with_nft_draft(netns_path: str) -> None:
    """As the first drafts did, in a table whose name says nothing."""
    with_nft(netns_path, "nat")


LEFT_BY: dict[str, Callable[[str], None]] = {
    "legacy tables": with_legacy_tables,
    "iptables-nft": with_iptables_nft,
    "consul_tproxy": with_nft,
    "inet nat": with_nft_draft,
}
"""Every way in which Consul has written its rules."""
