"""nf_tables' transactions by its own messages: what is made equals what libnftables makes, and refusals are told."""

import errno
import os

import msgspec
import pytest
from hostile import crowd, owned_table
from namespaces import open_descriptors

from tidegate.kernel import netns, nf_tables, nf_transaction, nftables
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import text_attribute
from tidegate.kernel.nf_transaction import creation, run

NAME = "tg-nft"
PLENTY = 2**24
CHAINS = ("first", "second")

TEXTS = {
    "nothing": "",
    "chains": """
        chain first { type nat hook prerouting priority -100; policy accept; }
        chain second { type filter hook output priority -300; policy drop; }
    """,
    "rules": """
        chain first {
            type nat hook prerouting priority -100; policy accept;
            meta l4proto != tcp counter return comment "other"
            fib daddr type != local counter return
            iifname "lo" counter return
            ct state invalid counter drop
            tcp dport 1 counter dnat to :20000 comment "to the sidecar"
            ip saddr 10.0.0.0/8 meta l4proto udp counter dnat ip to 127.0.0.1:8600
            counter jump second
        }
        chain second {
            meta mark & 0x000000f0 == 0x00000010 counter return
            tcp flags & (fin | syn | rst | ack) == syn counter redirect to :15001
        }
    """,
    "tproxy": """
        chain first {
            type filter hook prerouting priority -150; policy accept;
            socket wildcard 0 counter return
            meta l4proto tcp counter tproxy to :20000 accept
        }
    """,
    "zone": """
        chain first {
            type filter hook output priority -300; policy accept;
            udp dport 53 counter ct original zone set 53 return
        }
    """,
    "sets without a name": """
        chain first {
            meta l4proto { tcp, udp } th dport { 53, 1000-2000 } counter accept
            meta l4proto != { tcp, udp } counter return
        }
    """,
    "sets": """
        set addresses { type ipv4_addr; flags interval
            elements = { 0.0.0.0/5, 10.0.0.0/8, 11.0.0.0/16, 11.1.0.1, 255.0.0.0/8 } }
        set networks { type ipv6_addr; flags interval; elements = { ::/3, fd00::/8, ff00::/8 } }
        set users { type uid; flags interval; elements = { 0, 5-7, 4294967294 } }
        set ports { type inet_service; flags interval; elements = { 0-5, 65535 } }
        set interfaces { type ifname; elements = { "lo", "eth0", "a-very-long-one" } }
        set nobody { type ipv4_addr; }
        chain first {
            type filter hook output priority 0; policy accept;
            ip daddr @addresses counter accept
            ip6 daddr @networks counter accept
            meta skuid @users counter accept
            tcp dport @ports counter accept
            oifname @interfaces counter accept
            ip daddr != @nobody counter accept
        }
    """,
}


@pytest.fixture
def inside(new_namespace):
    """Calls a function in a namespace of the test's own."""
    path = new_namespace()
    return lambda function, *arguments: netns.run_in(path, function, *arguments)


def contents():
    return nf_tables.contents("inet", NAME, CHAINS, PLENTY)


def twin(body):
    """What libnftables makes of it."""

    def load():
        nftables.load(f"table inet {NAME} {{\n{body}\n}}\n")
        return contents()

    return netns.run_in_new(load)


def make(body):
    run(list(creation("inet", twin(body))))


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_made_of_the_messages_is_what_they_were_read_from(inside, name):
    should = twin(TEXTS[name])
    inside(run, list(creation("inet", should)))
    assert inside(contents) == should
    assert inside(nftables.list_text, "inet", NAME) == netns.run_in_new(
        lambda: (make(TEXTS[name]), nftables.list_text("inet", NAME))[1]
    )


def test_a_set_of_more_than_an_attribute_holds_is_made_whole(inside):
    ports = ", ".join(map(str, range(1, 20_000, 2)))
    hosts = ", ".join(f"10.0.{number >> 8}.{number & 255}" for number in range(10_000))
    should = twin(f"""
        set ports {{ type inet_service; flags interval; elements = {{ {ports} }} }}
        set hosts {{ type ipv4_addr; elements = {{ {hosts} }} }}
    """)
    assert should.size > 4 * 2**16
    inside(run, list(creation("inet", should)))
    assert inside(contents) == should


def test_a_transaction_is_taken_whole_or_not_at_all(inside):
    inside(make, TEXTS["rules"])
    before = inside(contents)
    generation = inside(nf_tables.generation)
    steps = [
        nf_transaction.deletion("inet", NAME),
        *creation("inet", twin(TEXTS["sets"])),
        nf_transaction.deletion("ip6", "nowhere"),
    ]
    with pytest.raises(KernelError, match="cannot delete table ip6 nowhere: No such file") as told:
        inside(run, steps)
    assert told.value.errno == errno.ENOENT
    assert inside(contents) == before
    assert inside(nf_tables.generation) == generation


def test_a_refusal_names_what_is_refused(inside):
    whole = twin(TEXTS["sets"])
    inside(run, list(creation("inet", whole)))
    with pytest.raises(KernelError, match=f"cannot create table inet {NAME}: File exists"):
        inside(run, list(creation("inet", whole)))
    named = text_attribute(1, NAME) + text_attribute(2, "addresses")
    for changed, what in (
        ({"chains": ()}, r"add a rule to chain first of table inet tg-nft \(its rule number 1\)"),
        ({"sets": whole.sets[1:]}, "add elements to set addresses of table inet tg-nft"),
        ({"sets": (named,)}, "create set addresses of table inet tg-nft"),
    ):
        broken = msgspec.structs.replace(whole, **changed)
        with pytest.raises(KernelError, match=f"^nftables: cannot {what}: "):
            netns.run_in_new(run, list(creation("inet", broken)))


def test_with_a_generation_nothing_is_taken_after_somebody_elses_change(inside):
    generation = inside(nf_tables.generation)
    steps = list(creation("inet", twin(TEXTS["rules"])))
    inside(nftables.load, "add table inet other\n")
    with pytest.raises(KernelError, match="somebody else has changed them meanwhile") as told:
        inside(run, steps, generation)
    assert told.value.errno == errno.ERESTART
    assert inside(contents) is None
    inside(run, steps, generation + 1)
    assert inside(nf_tables.generation) == generation + 2
    assert inside(nf_tables.table_flags, "inet", "other") == 0


def test_a_clearance_is_right_whether_or_not_there_is_a_table(inside):
    for _ in range(2):
        inside(run, [nf_transaction.clearance("inet", NAME)])
        assert inside(contents) is None
        inside(make, TEXTS["sets"])
        inside(nftables.load, f"add table inet {NAME} {{ flags dormant; }}\n")


def test_chains_and_rules_go_one_by_one(inside):
    inside(make, TEXTS["rules"])
    jump = next(rule for rule in inside(nf_tables.rules, "inet", NAME) if rule.targets)
    going = (
        nf_transaction.chain_flush("inet", NAME, "second"),
        nf_transaction.chain_deletion("inet", NAME, "second"),
    )
    with pytest.raises(KernelError, match=f"delete chain second of table inet {NAME}: .* busy"):
        inside(run, going)
    inside(run, (nf_transaction.rule_deletion("inet", NAME, "first", jump.handle), *going))
    assert {rule.chain for rule in inside(nf_tables.rules, "inet", NAME)} == {"first"}
    assert inside(nf_tables.object_count, "inet", NAME) == 1
    with pytest.raises(KernelError, match=f"delete a rule of chain first of table inet {NAME}"):
        inside(run, [nf_transaction.rule_deletion("inet", NAME, "first", jump.handle)])


def test_who_owns_a_table_is_told_where_the_kernel_refuses(inside):
    with inside(owned_table, NAME) as owner:
        assert inside(nf_tables.table_owner, "inet", NAME) == owner.getsockname()[0]
        with pytest.raises(
            KernelError,
            match=f"cannot delete table inet {NAME}: Operation not permitted, because table inet {NAME} "
            rf"belongs to process {os.getpid()} \(.+\), and only that may change it",
        ):
            inside(run, [nf_transaction.deletion("inet", NAME)])
    assert inside(contents) is None


def test_it_does_not_matter_what_others_have(inside):
    inside(crowd, 1000)
    inside(make, TEXTS["sets"])
    assert inside(contents) == twin(TEXTS["sets"])
    inside(run, [nf_transaction.deletion("inet", NAME)])
    assert inside(contents) is None
    assert inside(nf_tables.table_flags, "inet", "crowd-999") == 0


def test_many_refusals_at_once_are_one_error(inside):
    steps = [nf_transaction.deletion("inet", f"nowhere-{number}") for number in range(5000)]
    with pytest.raises(KernelError, match="cannot delete table inet nowhere-0: No such file"):
        inside(run, steps)


def test_transactions_leave_no_descriptor_open(inside):
    steps = list(creation("inet", twin(TEXTS["rules"])))
    before = open_descriptors()
    for _ in range(20):
        inside(run, steps)
        with pytest.raises(KernelError):
            inside(run, steps)
        inside(run, [nf_transaction.deletion("inet", NAME)])
    assert open_descriptors() == before
