"""Rulesets for the legacy tables as people read them in review.

After an intended change write the golden files anew, with TIDEGATE_WRITE_GOLDEN=1 in the environment of this test.
"""

import os
from pathlib import Path

import pytest
from test_redirect_golden_nftables import POLICIES

from tidegate.enforce.redirect import iptables
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.rules import (
    LEAVE,
    ByUser,
    Hook,
    InCgroup,
    Line,
    Not,
    OfKnownSocket,
    OfProtocol,
    OnInterface,
    Opening,
    Rules,
    ToNetwork,
    ToPort,
    Translate,
    rules_for,
)
from tidegate.intent.policy import Family, IdRange, Policy, PortRange, Protocol
from tidegate.kernel import xtables_rules
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError

TCP, UDP = OfProtocol((Protocol.TCP,)), OfProtocol((Protocol.UDP,))
BOTH = OfProtocol((Protocol.TCP, Protocol.UDP))
GOLDEN = Path(__file__).parent / "golden" / "redirect"
RENDERED = {
    **{name: (policy, True) for name, policy in POLICIES.items()},
    "excluding-without-sets": (POLICIES["excluding"], False),
}


@pytest.fixture(autouse=True)
def _a_cgroup(monkeypatch):
    monkeypatch.setattr(iptables.cgroups, "find", lambda path: Cgroup(4711, f"unified/{path}", 2))


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_a_ruleset_is_the_golden_one(name):
    policy, with_sets = RENDERED[name]
    rendered = IptablesBackend(with_sets=with_sets).render(rules_for(policy))
    golden = GOLDEN / f"{name}.iptables"
    if os.environ.get("TIDEGATE_WRITE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text()


def test_there_is_no_golden_file_of_a_ruleset_that_is_no_more():
    assert {path.stem for path in GOLDEN.glob("*.iptables")} == set(RENDERED)


def test_a_policy_that_redirects_nothing_is_no_text():
    assert IptablesBackend(with_sets=True).render(rules_for(Policy(families=()))) == ""


def written(*matches, action=LEAVE, hook=Hook.OUTBOUND, with_sets=False):
    """The rules of an IPv4 list of a line with these matches, but for another line after it."""
    lines = (Line("some", matches, action), Line("next", (OnInterface(("eth9",)),)))
    rules = Rules(families=(Family.IPV4,), lists=((hook, lines),))
    text = IptablesBackend(with_sets=with_sets).render(rules)
    rows = [row.removeprefix("-A TIDEGATE_") for row in text.splitlines() if row.startswith("-A")]
    assert rows[-1].endswith("-m comment --comment next -j RETURN")
    return rows[:-1]


class TestWhatOneRuleCannotSay:
    def test_several_users_are_several_rules(self):
        assert written(ByUser((IdRange(1, 1), IdRange(5, 9)))) == [
            "OUTBOUND -m owner --uid-owner 1 -m comment --comment some -j RETURN",
            "OUTBOUND -m owner --uid-owner 5-9 -m comment --comment some -j RETURN",
        ]

    def test_none_of_several_users_is_one_rule(self):
        (rule,) = written(Not(ByUser((IdRange(1, 1), IdRange(5, 9)))))
        assert rule == (
            "OUTBOUND -m owner ! --uid-owner 1 -m owner ! --uid-owner 5-9 "
            "-m comment --comment some -j RETURN"
        )

    def test_more_ports_than_multiport_takes_are_several_rules_and_none_of_them_is_one(self):
        ranges = tuple(PortRange(port, port + 1) for port in range(100, 140, 5))
        first, second = written(TCP, ToPort(ranges))
        assert "--dports 100:101,105:106,110:111,115:116,120:121,125:126,130:131 " in first
        assert "--dports 135:136 " in second
        (rule,) = written(TCP, Not(ToPort(ranges)))
        assert rule.count("-m multiport ! --dports") == 2

    def test_what_is_for_several_values_of_several_things_is_a_rule_for_each_pair(self):
        networks = ToNetwork(Family.IPV4, ("10.0.0.0/8", "192.0.2.1/32"))
        rules = written(
            BOTH, networks, ToPort((PortRange(53, 53),)), action=Translate("10.9.9.9", 5)
        )
        assert [rule.partition(" -m ")[0] for rule in rules] == [
            "OUTBOUND -d 10.0.0.0/8 -p tcp",
            "OUTBOUND -d 192.0.2.1/32 -p tcp",
            "OUTBOUND -d 10.0.0.0/8 -p udp",
            "OUTBOUND -d 192.0.2.1/32 -p udp",
        ]

    def test_what_cannot_be_turned_round_makes_the_rest_a_chain_of_its_own(self):
        assert written(Not(OfKnownSocket()), ByUser((IdRange(7, 7),))) == [
            "OUTBOUND -m socket -m comment --comment some -g TIDEGATE_OUTBOUND_2",
            "OUTBOUND -m owner --uid-owner 7 -m comment --comment some -j RETURN",
            "OUTBOUND -m comment --comment some -g TIDEGATE_OUTBOUND_2",
        ]

    def test_outside_several_networks_needs_no_chain_where_there_are_sets(self):
        networks = ToNetwork(Family.IPV4, ("10.0.0.0/8", "192.0.2.1/32"))
        (rule,) = written(Not(networks), with_sets=True)
        assert "-m set ! --match-set tidegate-" in rule
        assert len(written(Not(networks))) == 3

    def test_a_line_that_nothing_can_match_is_no_rule_and_its_opposite_one_for_all(self):
        for nothing in (ByUser(()), ToNetwork(Family.IPV6, ("fd00::/8",)), OnInterface(())):
            assert written(nothing) == []
            assert written(Not(nothing)) == ["OUTBOUND -m comment --comment some -j RETURN"]

    def test_a_segment_that_opens_nothing_may_be_of_another_protocol(self):
        first, second = written(BOTH, Not(Opening()))
        assert "-p tcp -m tcp ! --tcp-flags" in first
        assert "-p udp -m comment" in second
        assert written(UDP, Opening()) == []


class TestWhatCannotBeSaid:
    @pytest.mark.parametrize(
        "name", ["a" * 16, "eth+", "a\nb", "a\x85b", "a\u2028b", "", "!", "-x"]
    )
    def test_the_name_of_an_interface_that_iptables_could_take_for_something_else(self, name):
        with pytest.raises(KernelError, match="cannot"):
            written(OnInterface((name,)))

    @pytest.mark.parametrize("path", ["a\nb", "a\x00", "-x"])
    def test_the_path_of_a_cgroup_that_iptables_could_take_for_something_else(self, path):
        with pytest.raises(KernelError, match="cannot be part of a rule"):
            written(InCgroup(path))

    def test_ports_of_any_protocol(self):
        with pytest.raises(KernelError, match="line some: it is for any protocol"):
            written(ToPort((PortRange(1, 1),)))

    def test_two_networks_at_once(self):
        one, other = (
            ToNetwork(Family.IPV4, (network,)) for network in ("10.0.0.0/8", "10.1.0.0/16")
        )
        with pytest.raises(KernelError, match="line some: it says one thing twice"):
            written(one, Not(other))


class TestText:
    @pytest.mark.parametrize(
        "word", ["plain", "with blank", 'a"b', "a\\b", "it's", "a#b", "ä", "$x`y`"]
    )
    def test_a_quoted_word_is_read_as_it_was(self, word):
        assert xtables_rules.words(f"-x {xtables_rules.quoted(word)} y") == ["-x", word, "y"]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("nat\n", "line 1 of the rules is not understood: nat"),
            ("*nat\n:C - [0:0]\n-A D -j DROP\nCOMMIT", "line 3 .* -A D -j DROP"),
            ("*nat\n-D OUTPUT 1\nCOMMIT", "line 2"),
            ("*nat\n-I OUTPUT -j C\nCOMMIT", "line 2"),
            ("*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT", "line 2"),
            (f"*nat\n:{'c' * 29} - [0:0]\nCOMMIT", "line 2"),
            ("-A C -j DROP\n", "line 1"),
            ("*nat\n*raw\nCOMMIT", "line 2"),
            ("*nat\n", "table nat has no COMMIT"),
        ],
    )
    def test_a_text_of_another_dialect_is_refused_with_its_line(self, text, problem):
        with pytest.raises(KernelError, match=problem):
            xtables_rules.parse(text)
