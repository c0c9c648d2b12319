"""The short way for new workloads: rules put in place and proven by one conversation, where nobody's rules are."""

import socket
import subprocess

import consul_rules
import pytest
from rulesets import ruleset

from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.redirect.foreign import Mesh
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    Inbound,
    Mode,
    Outbound,
    Policy,
    PortRange,
    Proxy,
)
from tidegate.kernel import links, netns, nf_exchange, nf_tables

EXCLUDING = Policy(
    proxy=Proxy(uids=(5995, 1337)),
    inbound=Inbound(exclude_ports=(PortRange(22, 22), PortRange(9000, 9100))),
    outbound=Outbound(
        exclude_ports=(PortRange(5432, 5432), PortRange(6379, 6380)),
        exclude_cidrs=("10.0.0.0/8", "192.0.2.0/24", "fd00::/8"),
    ),
)
POLICIES = {
    "defaults": DEFAULT,
    "sets": EXCLUDING,
    "one family": Policy(families=(Family.IPV4,)),
    "resolver": Policy(dns=Dns(enabled=True)),
}
NFT = {"check": True, "capture_output": True, "text": True}


def nft(path, *words):
    name = path.rpartition("/")[2]
    subprocess.run(["ip", "netns", "exec", name, "nft", *words], **NFT)


@pytest.fixture
def pod(new_namespace):
    return new_namespace()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_where_nobody_was_one_conversation_puts_the_rules_in_place(new_namespace, policy):
    backend, pods = NftablesBackend(), [new_namespace() for _ in range(3)]
    assert all(backend.create(pod, rules_for(policy)) for pod in pods)
    applied = new_namespace()
    Engine().apply(applied, policy)
    for pod in pods:
        assert ruleset(pod) == ruleset(applied)
        assert Engine().check(pod, policy) == ()
        assert netns.run_in(pod, nf_tables.generation) == nf_tables.UNTOUCHED + 1


def test_a_set_that_the_kernel_tells_in_any_order_is_proven_all_the_same(new_namespace):
    for _ in range(8):
        pod = new_namespace()
        _, differences = Engine().establish(pod, Policy(mode=Mode.TPROXY))
        assert differences == ()
        assert Engine().check(pod, Policy(mode=Mode.TPROXY)) == ()


def test_what_is_proven_is_known_and_not_read_again(pod):
    backend = NftablesBackend()
    assert backend.create(pod, rules_for(DEFAULT))
    assert backend.check(pod, rules_for(DEFAULT)) == ()
    assert backend.apply(pod, rules_for(DEFAULT)) is Change.UNCHANGED
    nft(pod, "flush chain inet tidegate outbound")
    assert backend.check(pod, rules_for(DEFAULT))


def test_where_somebody_was_nothing_is_done_by_the_short_way(pod):
    nft(pod, "add table inet others")
    before = ruleset(pod)
    assert not NftablesBackend().create(pod, rules_for(DEFAULT))
    assert ruleset(pod) == before
    applied, differences = Engine().establish(pod, DEFAULT)
    assert (applied.change, differences) == (Change.CREATED, ())
    assert Engine().check(pod, DEFAULT) == ()


def test_an_answer_that_differs_in_one_byte_proves_nothing(pod, monkeypatch):
    backend = NftablesBackend()
    recorded = nf_exchange.recorded

    def distorted(*asked):
        *first, (said, heard) = recorded(*asked)
        middle = len(heard) // 2
        other = bytes([heard[middle] ^ 1])
        return (*first, nf_exchange.Turn(said, heard[:middle] + other + heard[middle + 1 :]))

    monkeypatch.setattr(nf_exchange, "recorded", distorted)
    assert not backend.create(pod, rules_for(DEFAULT))
    # What it has loaded is compared by the long way, and found to be right.
    engine = Engine.by(backend, "a test")
    applied, differences = engine.establish(pod, DEFAULT)
    assert (applied.change, differences) == (Change.UNCHANGED, ())


def test_packets_that_came_between_do_not_make_rules_wrong(pod, monkeypatch):
    repeated = nf_exchange.repeated

    def with_traffic(exchange):
        first, *questions = exchange
        assert repeated((first,))
        links.set_up(netns.CURRENT, "lo")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"", ("127.0.0.1", 9))
        proven = repeated(tuple(questions))
        assert not proven
        return proven

    monkeypatch.setattr(nf_exchange, "repeated", with_traffic)
    _, differences = Engine().establish(pod, DEFAULT)
    assert differences == ()


@pytest.mark.parametrize("name", BackendName)
def test_establishing_again_changes_nothing(pod, name):
    engine = Engine(name)
    assert engine.establish(pod, EXCLUDING).applied.change is Change.CREATED
    before = ruleset(pod)
    applied, differences = engine.establish(pod, EXCLUDING)
    assert (applied.change, differences, ruleset(pod)) == (Change.UNCHANGED, (), before)


def test_legacy_rules_are_told_and_those_of_the_other_backend_replaced(new_namespace):
    theirs, ours = new_namespace(), new_namespace()
    consul_rules.with_legacy_tables(theirs)
    applied, differences = Engine(BackendName.NFTABLES).establish(theirs, DEFAULT)
    assert differences == ()
    assert {left.found.mesh for left in applied.foreign} == {Mesh.CONSUL}
    Engine(BackendName.IPTABLES).apply(ours, DEFAULT)
    applied, differences = Engine(BackendName.NFTABLES).establish(ours, DEFAULT)
    assert (applied.replaced_backend, differences) == (BackendName.IPTABLES, ())
    assert Engine(BackendName.NFTABLES).check(ours, DEFAULT) == ()


def test_nothing_to_redirect_is_established_at_once(pod):
    nothing = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
    applied, differences = Engine().establish(pod, nothing)
    assert (applied.change, differences, ruleset(pod)) == (Change.UNCHANGED, (), [])
