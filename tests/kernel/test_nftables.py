"""nf_tables by libnftables and by its own messages: what is loaded, listed, counted and told."""

import errno
import select

import pytest
from namespaces import DEADLINE_S, namespace, open_descriptors

from tidegate.kernel import cgroups, netns, nf_tables, nftables
from tidegate.kernel.errors import KernelError

TABLE = """
table inet tg-nft {
    set ports {
        type inet_service
        flags interval
        elements = { 80, 1000-1010 }
    }

    chain first {
        type filter hook output priority 0; policy accept;
        tcp dport @ports counter accept comment "some ports"
        meta skuid { 5, 7 } counter packets 3 bytes 4 counter packets 5 bytes 6 drop
    }

    chain second {
        counter comment "last"
    }
}
"""
CHAINS = ("first", "second")
PLENTY = 2**20


@pytest.fixture
def inside(new_namespace):
    """Calls a function in a namespace of the test's own."""
    path = new_namespace()
    return lambda function, *arguments: netns.run_in(path, function, *arguments)


def contents(most=PLENTY):
    return nf_tables.contents("inet", "tg-nft", CHAINS, most)


def test_a_transaction_is_taken_whole_or_not_at_all(inside):
    inside(nftables.load, TABLE)
    before = inside(contents)
    with pytest.raises(KernelError, match="No such file or directory") as refused:
        inside(nftables.load, "flush table inet tg-nft\ndelete table inet nowhere\n")
    assert refused.value.errno == errno.ENOENT
    assert inside(contents) == before


def test_a_complaint_about_syntax_is_one_sentence(inside):
    with pytest.raises(KernelError, match=r"^nftables: syntax error, unexpected newline"):
        inside(nftables.load, "add table\n")


def test_a_listing_has_no_counts_and_no_numbers_of_priorities_by_name(inside):
    inside(nftables.load, TABLE)
    listing = inside(nftables.list_text, "inet", "tg-nft")
    assert "priority 0;" in listing
    assert "packets" not in listing
    assert "elements = { 80, 1000-1010 }" in listing
    assert inside(nftables.list_text, "ip", "tg-nft") is None


def test_a_table_with_flags_is_listed_by_its_flags_alone(inside):
    inside(nftables.load, f"{TABLE}\nadd table inet tg-nft {{ flags dormant; }}\n")
    assert inside(nftables.list_text, "inet", "tg-nft") == "table inet tg-nft {\n\tflags 1\n}\n"
    assert inside(nf_tables.table_flags, "inet", "tg-nft") == 1
    assert inside(nf_tables.table_flags, "ip", "tg-nft") is None


def test_every_transaction_makes_the_generation_one_higher(inside):
    assert inside(nf_tables.generation) == 1
    inside(nftables.load, TABLE)
    assert inside(nf_tables.generation) == 2
    inside(nftables.list_text, "inet", "tg-nft")
    assert inside(nf_tables.generation) == 2
    inside(nftables.load, "add element inet tg-nft ports { 5 }\nadd table ip tg-nft\n")
    assert inside(nf_tables.generation) == 3


def test_the_same_text_has_the_same_contents_in_every_namespace_and_whatever_was_counted(inside):
    uncounted = TABLE.replace(" packets 3 bytes 4", "").replace(" packets 5 bytes 6", "")
    inside(nftables.load, TABLE)
    for text in (TABLE, uncounted):
        assert netns.run_in_new(lambda text: (nftables.load(text), contents())[1], text) == inside(
            contents
        )


@pytest.mark.parametrize(
    "change",
    [
        "add element inet tg-nft ports { 5 }",
        "delete element inet tg-nft ports { 80 }",
        "add rule inet tg-nft second accept",
        "insert rule inet tg-nft first accept",
        "flush chain inet tg-nft second",
        "add chain inet tg-nft third",
        "add set inet tg-nft more { type uid; }",
        "add counter inet tg-nft count",
        "add chain inet tg-nft first { policy drop; }",
        "add table inet tg-nft { flags dormant; }",
    ],
)
def test_every_change_is_another_contents(inside, change):
    inside(nftables.load, TABLE)
    before = inside(contents)
    inside(nftables.load, f"{change}\n")
    assert inside(contents) != before


def test_what_is_longer_than_wanted_is_cut_off_and_equals_nothing_else(inside):
    inside(nftables.load, TABLE)
    whole = inside(contents)
    cut = inside(contents, whole.size // 2)
    assert whole.complete
    assert not cut.complete
    assert cut != whole
    assert cut.size < whole.size
    inside(nftables.load, "add set inet tg-nft huge { type ipv4_addr; }\n")
    addresses = ", ".join(f"10.0.{number >> 8}.{number & 255}" for number in range(20_000))
    inside(nftables.load, f"add element inet tg-nft huge {{ {addresses} }}\n")
    assert inside(contents, 2 * whole.size).size < 2 * whole.size + 2**16


def test_a_table_that_is_not_there_has_no_contents_and_no_rules(inside):
    assert inside(contents) is None
    assert inside(nf_tables.rules, "inet", "tg-nft") is None
    assert not inside(nf_tables.has_chain, "inet", "tg-nft", "first")


def test_rules_come_in_order_with_their_comments_and_counts(inside):
    inside(nftables.load, TABLE)
    assert inside(nf_tables.has_chain, "inet", "tg-nft", "first")
    assert not inside(nf_tables.has_chain, "inet", "tg-nft", "third")
    rules = inside(nf_tables.rules, "inet", "tg-nft")
    assert [(rule.chain, rule.comment, rule.packets) for rule in rules] == [
        ("first", "some ports", 0),
        ("first", "", 8),
        ("second", "last", 0),
    ]


def test_a_rule_tells_its_handle_and_where_it_leads(inside):
    inside(nftables.load, TABLE)
    inside(nftables.load, "add rule inet tg-nft first tcp dport 1 counter jump second\n")
    inside(nftables.load, "add rule inet tg-nft first goto second\n")
    rules = inside(nf_tables.rules, "inet", "tg-nft")
    assert [rule.targets for rule in rules] == [
        set(), set(), {"second"}, {"second"}, set(),
    ]  # fmt: skip
    inside(nftables.load, f"delete rule inet tg-nft first handle {rules[2].handle}\n")
    left = inside(nf_tables.rules, "inet", "tg-nft")
    assert left == [*rules[:2], *rules[3:]]


def test_a_table_tells_how_much_is_in_it_and_whose_it_is(inside):
    assert inside(nf_tables.object_count, "inet", "tg-nft") is None
    assert inside(nf_tables.table_owner, "inet", "tg-nft") is None
    inside(nftables.load, TABLE)
    # Two chains and a set; one without a name belongs to its rule.
    assert inside(nf_tables.object_count, "inet", "tg-nft") == 3
    assert inside(nf_tables.table_owner, "inet", "tg-nft") is None


def test_the_monitor_tells_changes_of_its_namespace_only(inside, new_namespace):
    with inside(nf_tables.open_monitor) as monitor:
        assert not monitor.getblocking()
        assert not monitor.get_inheritable()
        netns.run_in(new_namespace(), nftables.load, TABLE)
        inside(nftables.list_text, "inet", "tg-nft")
        with pytest.raises(BlockingIOError):
            monitor.recv(1)
        inside(nftables.load, TABLE)
        assert select.select([monitor], [], [], DEADLINE_S)[0] == [monitor]


def test_reading_leaves_no_descriptor_open(inside):
    inside(nftables.load, TABLE)
    before = open_descriptors()
    for _ in range(20):
        inside(contents)
        inside(contents, 10)
        inside(nf_tables.rules, "inet", "tg-nft")
        inside(nf_tables.generation)
    assert open_descriptors() == before


def test_namespaces_are_told_apart_by_their_cookies():
    cookies = set()
    with namespace() as one, namespace() as two:
        assert netns.cookie(one) == netns.cookie(one)
        assert netns.run_in(two, netns.cookie, netns.CURRENT) == netns.cookie(two)
        cookies |= {netns.cookie(one), netns.cookie(two), netns.cookie(netns.CURRENT)}
    with namespace() as three:
        cookies.add(netns.cookie(three))
    assert len(cookies) == 4
    with pytest.raises(KernelError, match=three):
        netns.cookie(three)


class TestCgroups:
    def test_a_cgroup_is_found_by_its_path_and_told_by_its_inode(self):
        place = cgroups.mounted_at() / "tg-nft-found" / "below"
        place.mkdir(parents=True)
        try:
            found = cgroups.find("tg-nft-found/below")
            assert found.id == place.stat().st_ino
            assert found.level == 2
            assert f"/sys/fs/cgroup/{found.path}" == str(place)
        finally:
            place.rmdir()
            place.parent.rmdir()

    @pytest.mark.parametrize("path", ["", "/", "/absolute", "a/../../b", ".."])
    def test_what_is_no_path_below_the_root_is_refused(self, path):
        with pytest.raises(KernelError, match="is no path below the root of cgroup v2"):
            cgroups.find(path)

    def test_what_is_no_cgroup_is_refused(self):
        with pytest.raises(KernelError, match="there is no cgroup tg-nft-nowhere"):
            cgroups.find("tg-nft-nowhere")
        with pytest.raises(KernelError, match="is no cgroup but a file of one"):
            cgroups.find("cgroup.procs")

    def test_a_mount_where_the_library_does_not_look_is_of_no_use(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cgroups, "_LOOKED_UP_BELOW", tmp_path)
        with pytest.raises(KernelError, match="cgroup v2 is not mounted below"):
            cgroups.find("some")
