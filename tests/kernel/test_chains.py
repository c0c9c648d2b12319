"""What is listed of a namespace's chains: everything where that is little, and what is sought where it is much."""

import consul_rules
import pytest

from tidegate.kernel import chains, legacy_tables, netns, nfnetlink
from tidegate.kernel.chains import Base, Chain, Store
from tidegate.kernel.legacy_tables import Family
from tidegate.kernel.netlink import Disturbed

FLOOD = chains.MOST + 200
PROGRAMS = {Family.IPV4: "iptables-legacy", Family.IPV6: "ip6tables-legacy"}


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces."""
    return new_namespace()


def listed(pod, sought=()):
    return netns.run_in(pod, chains.listed, sought)


def flood(pod, number=FLOOD, table="many"):
    """A table of so many chains, made before any other."""
    names = "".join(f"chain c{n} {{ }}\n" for n in range(number))
    consul_rules.run(pod, "nft", "-f", "-", text=f"table inet {table} {{\n{names}}}\n")


def test_chains_of_both_stores_are_listed_with_where_they_are_asked(pod):
    script = """
        table inet one {
            chain named { counter; }
            chain early { type filter hook prerouting priority -301; policy drop; counter; }
            chain empty { type nat hook output priority 7; }
        }
        table netdev two { chain incoming { type filter hook ingress device lo priority 0; }; }
    """
    consul_rules.run(pod, "nft", "-f", "-", text=script)
    consul_rules.run(pod, "iptables-legacy", "-t", "mangle", "-N", "OTHERS")
    found = listed(pod)
    assert found.unseen == ()
    assert set(found.chains) == {
        Chain(Store.NF_TABLES, "inet", "one", "named"),
        Chain(
            Store.NF_TABLES, "inet", "one", "early", Base("filter", "prerouting", -301, drops=True)
        ),
        Chain(
            Store.NF_TABLES,
            "inet",
            "one",
            "empty",
            Base("nat", "output", 7, drops=False),
            is_empty=True,
        ),
        Chain(
            Store.NF_TABLES,
            "netdev",
            "two",
            "incoming",
            Base("filter", "ingress", 0, drops=False),
            is_empty=True,
        ),
        Chain(Store.LEGACY, "ip", "mangle", "OTHERS"),
    }


def test_as_many_chains_as_are_looked_at_are_listed_whole(pod):
    flood(pod, chains.MOST)
    found = listed(pod)
    assert {chain.name for chain in found.chains} == {f"c{n}" for n in range(chains.MOST)}
    assert found.unseen == ()


def test_of_more_chains_those_that_are_sought_are_found_and_the_rest_is_told(pod):
    flood(pod)
    consul_rules.run(pod, "nft", "table ip late { chain mine { counter; }; chain other { }; }")
    sought = [
        Chain(Store.NF_TABLES, "ip", "late", "mine"),
        Chain(Store.NF_TABLES, "ip", "late", "not-there"),
        Chain(Store.NF_TABLES, "ip6", "late", "mine"),
        Chain(Store.NF_TABLES, "inet", "many", "c0"),
    ]
    found = listed(pod, sought)
    assert len(found.chains) == chains.MOST + 1
    assert [chain.name for chain in found.chains if chain.table == "late"] == ["mine"]
    assert found.unseen == (
        f"there are more than {chains.MOST} chains in nf_tables, and not all were looked at",
    )


def test_of_tables_that_change_all_the_time_those_that_are_sought_are_found(pod, monkeypatch):
    flood(pod, 3)

    def disturbed(*_):
        raise Disturbed("cannot list")

    monkeypatch.setattr(nfnetlink.Conversation, "dump", disturbed)
    sought = Chain(Store.NF_TABLES, "inet", "many", "c2", is_empty=True)
    assert listed(pod, [sought]) == (
        (sought,),
        ("the chains of nf_tables change faster than they can be listed",),
    )


@pytest.mark.parametrize("family", Family)
def test_legacy_tables_are_read_as_iptables_reads_them(pod, family):
    program = PROGRAMS[family]
    loopback, other = ("127.0.0.11", "10.0.0.1") if family is Family.IPV4 else ("::1", "fd00::1")
    rules = (
        "-t nat -N OTHERS",
        "-t nat -N LAST",
        "-t nat -A OTHERS -p tcp -j REDIRECT --to-ports 5",
        "-t nat -A OTHERS -p udp",
        f"-t nat -A OUTPUT -d {loopback} -j OTHERS",
        f"-t nat -A OUTPUT -d {other} -g LAST",
        f"-t nat -A OUTPUT ! -d {loopback} -j ACCEPT",
        "-t nat -A OUTPUT -p tcp -j RETURN",
        "-t raw -P PREROUTING DROP",
    )
    consul_rules.run(pod, "sh", "-e", text="\n".join(f"{program} {rule}" for rule in rules))
    table = netns.run_in(pod, legacy_tables.read, family, "nat", 2**20)
    assert table.chains() == ("LAST", "OTHERS")
    assert table.hooks() == ("prerouting", "input", "output", "postrouting")
    assert not any(map(table.drops, table.hooks()))
    told = [(r.target, r.verdict, r.goes_to, r.to_loopback) for r in table.built_in("output")]
    assert told == [
        ("", None, "OTHERS", True),
        ("", None, "LAST", False),
        ("", 1, None, False),
        ("", None, None, False),
    ]
    assert [rule.target for rule in table.rules("OTHERS")] == ["REDIRECT", ""]
    assert list(table.built_in("prerouting")) == []
    raw = netns.run_in(pod, legacy_tables.read, family, "raw", 2**20)
    assert [hook for hook in raw.hooks() if raw.drops(hook)] == ["prerouting"]


def test_a_legacy_table_that_is_too_large_is_not_read_and_is_told(pod):
    rules = "-A OUTPUT -p tcp -m comment --comment x -j ACCEPT\n" * 3000
    consul_rules.run(pod, "iptables-legacy-restore", text=f"*raw\n:MINE -\n{rules}COMMIT\n")
    consul_rules.run(pod, "iptables-legacy", "-t", "nat", "-N", "THEIRS")
    found = listed(pod)
    assert [chain.name for chain in found.chains] == ["THEIRS"]
    (unseen,) = found.unseen
    assert unseen.startswith("the legacy table raw of ip is too large: ")
    whole = netns.run_in(pod, chains.of_legacy_tables, 2**24)
    assert {chain.name for chain in whole.chains} == {"MINE", "THEIRS"}
    assert whole.unseen == ()


def test_looking_wakes_no_legacy_table(pod):
    listed(pod)
    assert netns.run_in(pod, legacy_tables.existing, Family.IPV4) == frozenset()
