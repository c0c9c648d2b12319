"""Rulesets for nftables as people read them in review.

After an intended change write the golden files anew with TIDEGATE_WRITE_GOLDEN=1.
"""

import os
from pathlib import Path

import pytest

from tidegate.enforce.redirect import nftables
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import (
    Drop,
    Hook,
    Line,
    OnInterface,
    Rules,
    ToPort,
    rules_for,
)
from tidegate.intent.policy import (
    DEFAULT,
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
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError

GOLDEN = Path(__file__).parent / "golden" / "redirect"

POLICIES = {
    "default": DEFAULT,
    "excluding": Policy(
        inbound=Inbound(
            exclude_ports=(PortRange(9090, 9090), PortRange(5000, 5500)),
            exclude_cidrs=("192.0.2.0/24", "2001:db8::1/128"),
            direct_probes=True,
            node_addresses=("10.0.0.1/32", "fd00::1/128"),
        ),
        outbound=Outbound(
            exclude_ports=tuple(PortRange(port, port) for port in range(7000, 7100, 2)),
            exclude_cidrs=("10.0.0.0/8", "192.168.0.0/16", "fd00::/8"),
            exclude_uids=(IdRange(1000, 1009), IdRange(0, 0)),
            exclude_gids=(IdRange(200, 200),),
            exclude_user_ports=(
                UserPorts((Protocol.TCP,), (PortRange(5432, 5433), PortRange(80, 80)),
                          (IdRange(1, 1), IdRange(7, 9))),
            ),
            exclude_interfaces=("eth1", "cilium_host"),
        ),
    ),
    "including": Policy(
        inbound=Inbound(
            include_ports=(PortRange(8080, 8081), PortRange(443, 443)),
            include_interfaces=("eth0",),
        ),
        outbound=Outbound(
            include_cidrs=("10.96.0.0/12", "fd96::/108"),
            include_ports=(PortRange(443, 443),),
            include_interfaces=("eth0", "eth1"),
        ),
    ),
    "dns": Policy(
        dns=Dns(enabled=True, resolvers=("10.96.0.10", "10.96.0.11", "fd96::a"), addresses=("127.0.0.1", "::1")),
    ),
    "tproxy-ipv4": Policy(mode=Mode.TPROXY, families=(Family.IPV4,), drop_invalid=True),
    "ipv6-with-dns": Policy(families=(Family.IPV6,), dns=Dns(enabled=True)),
    "proxy-by-everything": Policy(
        proxy=Proxy(
            uids=(5995, 5996), gids=(42,), mark=Mark(0x10, 0xF0), cgroup="pod1/sidecar",
            self_calls_inbound=True,
        ),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _a_cgroup(monkeypatch):
    def find(path):
        return Cgroup(4711, f"unified/{path}", len(path.split("/")))

    monkeypatch.setattr(nftables.cgroups, "find", find)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_ruleset_is_the_golden_one(name):
    rendered = NftablesBackend().render(rules_for(POLICIES[name]))
    golden = GOLDEN / f"{name}.nft"
    if os.environ.get("TIDEGATE_WRITE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text()


def test_there_is_no_golden_file_of_a_ruleset_that_is_no_more():
    assert {path.stem for path in GOLDEN.glob("*.nft")} == set(POLICIES)


def test_a_list_that_closes_another_shares_its_sets_where_they_are_equal():
    def rendered(again):
        lists = (
            (Hook.OUTBOUND, (Line("some", (ToPort((PortRange(1, 1), PortRange(3, 3))),)),)),
            (Hook.INVALID_OUTBOUND, (Line("some", (ToPort(again),), Drop()),)),
        )
        return NftablesBackend().render(Rules(families=(Family.IPV4,), lists=lists))

    text = rendered((PortRange(1, 1), PortRange(3, 3)))
    assert text.count("set ") == 1
    assert text.count("dport @outbound-some ") == 2
    text = rendered((PortRange(1, 1), PortRange(4, 4)))
    assert text.count("set ") == 2
    assert "dport @invalid-outbound-some counter drop" in text


def test_a_policy_that_redirects_nothing_is_no_text():
    assert NftablesBackend().render(rules_for(Policy(families=()))) == ""


@pytest.mark.parametrize(
    "name", ['a"b', "a\\b", "a\nb", "eth*", "a\tb", "a\x00b", "a\x7fb", "a b", "\x85", ""]
)
def test_a_name_that_nft_could_take_for_something_else_is_never_written(name):
    line = Line("some", (OnInterface((name,)),))
    rules = Rules(families=(Family.IPV4,), lists=((Hook.OUTBOUND, (line,)),))
    with pytest.raises(KernelError, match="cannot be written in nftables' syntax"):
        NftablesBackend().render(rules)
