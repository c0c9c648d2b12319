"""IP sets: made, read as they were made, replaced, taken away; and those that others made."""

import pytest
from legacy import set_names, sh

from tidegate.kernel import ipset, netns
from tidegate.kernel.errors import KernelError

PORTS, IPV4, IPV6 = ipset.Kind.PORTS, ipset.Kind.IPV4_NETWORKS, ipset.Kind.IPV6_NETWORKS
MANY_PORTS = tuple(map(str, range(3, 2001, 2)))


@pytest.fixture
def pod(new_namespace):
    """A namespace without interfaces."""
    return new_namespace()


def create(pod, *sets):
    netns.run_in(pod, ipset.create, sets)


def found(pod, prefix=""):
    return {one.name: one for one in netns.run_in(pod, ipset.found, prefix)}


def content(pod, name, most=70_000):
    one = netns.run_in(pod, ipset.find, [name])[name]
    return netns.run_in(pod, ipset.content, one, most)


def test_sets_are_read_as_they_were_made(pod):
    made = (
        ipset.Set("a", PORTS, ("0", *MANY_PORTS, "2001-60000", "65535")),
        ipset.Set("b", IPV4, ("0.0.0.0/1", "192.0.2.1/32")),
        ipset.Set("c", IPV6, ("2001:db8::/32", "fd00::1/128")),
        ipset.Set("empty", IPV6, ()),
    )
    create(pod, *made)
    assert [one.kind for one in found(pod).values()] == [PORTS, IPV4, IPV6, IPV6]
    assert tuple(content(pod, one.name, one.size) for one in made) == made


def test_sets_are_found_by_the_beginning_of_their_names_or_by_all_of_it(pod):
    create(pod, *(ipset.Set(name, PORTS, ()) for name in ("x-b", "x-a", "y")))
    assert list(found(pod, "x-")) == ["x-a", "x-b"]
    by_name = netns.run_in(pod, ipset.find, ["y", "nowhere", "x-a"])
    assert by_name == {"y": found(pod)["y"], "x-a": found(pod)["x-a"]}
    assert len({one.index for one in found(pod).values()}) == 3


def test_a_set_that_a_rule_asks_is_in_use_and_stays(pod):
    create(pod, ipset.Set("asked", IPV4, ()), ipset.Set("not-asked", IPV4, ()))
    sh(pod, "iptables-legacy -A OUTPUT -m set --match-set asked dst -j ACCEPT")
    assert [one.in_use for one in found(pod).values()] == [True, False]
    assert netns.run_in(pod, ipset.destroy, ["nowhere", "asked", "not-asked"]) == ("asked",)
    assert set_names(pod) == ["asked"]


def test_in_a_namespace_without_sets_nothing_is_found_and_nothing_to_be_destroyed(pod):
    assert found(pod) == {}
    assert netns.run_in(pod, ipset.find, ["x"]) == {}
    assert netns.run_in(pod, ipset.destroy, ["x"]) == ()


class TestSetsOfOthers:
    def test_of_another_kind_are_found_and_not_read(self, pod):
        sh(
            pod,
            "ipset create a hash:ip; ipset create b hash:net family inet6; ipset create c list:set",
        )
        assert [one.kind for one in found(pod).values()] == [None, IPV6, None]
        assert content(pod, "a") is None

    @pytest.mark.parametrize(
        ("made", "added"),
        [
            ("hash:net timeout 600", "10.0.0.0/8"),
            ("hash:net", "10.0.0.0/8 nomatch"),
            ("hash:net comment", "10.0.0.0/8 comment x"),
            ("bitmap:port range 1-9 counters", "5"),
        ],
    )
    def test_whose_entries_say_more_than_ours_are_told_from_ours(self, pod, made, added):
        sh(pod, f"ipset create a {made}; ipset add a {added}")
        assert content(pod, "a") is None

    def test_that_hold_more_than_is_wanted_are_not_read_to_their_end(self, pod):
        networks = tuple(f"10.{n >> 8}.{n & 255}.0/24" for n in range(9000))
        create(pod, ipset.Set("a", IPV4, networks))
        assert content(pod, "a", 9000).entries == tuple(sorted(networks, key=_by_number))
        assert content(pod, "a", 3) is None

    def test_are_listed_up_to_a_bound_and_each_is_found_by_its_name(self, pod, monkeypatch):
        sets = [ipset.Set(f"tg-{number}", PORTS, ()) for number in range(400)]
        create(pod, *sets)
        assert len(found(pod)) == 400
        monkeypatch.setattr(ipset, "_MOST_HEADS_BYTES", 2**15)
        assert 0 < len(found(pod)) < 400
        assert list(netns.run_in(pod, ipset.find, ["tg-399"])) == ["tg-399"]


def _by_number(network):
    return tuple(map(int, network.partition("/")[0].split(".")))


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        (ipset.swap, ["a", "b"], "cannot swap the sets a and b: they are of different types"),
        (ipset.create, [[ipset.Set("x" * 32, PORTS, ())]], "cannot create the set x"),
        (ipset.create, [[ipset.Set("a", PORTS, ())]], "cannot create the set a: File exists"),
        (ipset.create, [[ipset.Set("x", IPV4, ("::/1",))]], "cannot fill the set x"),
    ],
)  # fmt: skip
def test_what_the_kernel_refuses_is_an_error_that_names_the_set(pod, function, arguments, problem):
    create(pod, ipset.Set("a", PORTS, ()), ipset.Set("b", IPV4, ()))
    with pytest.raises(KernelError, match=problem):
        netns.run_in(pod, function, *arguments)


def test_sets_of_one_kind_change_places(pod):
    create(pod, ipset.Set("a", PORTS, ("1",)), ipset.Set("b", PORTS, ("2-3",)))
    before = found(pod)
    netns.run_in(pod, ipset.swap, "a", "b")
    assert content(pod, "a").entries == ("2-3",)
    assert found(pod) == before
