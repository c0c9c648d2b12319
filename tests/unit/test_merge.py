"""One workload out of what several sources tell of it."""

import itertools

import msgspec
import pytest

from tidegate.model import Sidecar
from tidegate.workloads.merge import merge
from tidegate.workloads.source import Description, Origin, Treatment

PATH = "/run/netns/cni-1"
OF_PROCESS = "/proc/77/ns/net"
UID = "5d1f6d1e-0000-4000-8000-000000000001"


def told(origin=Origin.KUBERNETES, netns=PATH, **fields):
    return Description(origin=origin, netns=netns, **({"id": UID} | fields))


class Node:
    """A node on which the same question is asked again and again, as an agent does."""

    def __init__(self):
        self.places = {PATH: 1, OF_PROCESS: 1}
        self.workloads, self.aliases = {}, {}

    def merge(self, *descriptions, of_node=()):
        merged = merge(
            descriptions,
            self.places.get,
            node="n1",
            before=self.workloads,
            aliases=self.aliases,
            of_node=of_node,
        )
        self.workloads = {one.id: one for one in merged.workloads}
        self.aliases = self.aliases | merged.aliases
        return merged

    def one(self, *descriptions):
        (workload,) = self.merge(*descriptions).workloads
        return workload

    def comes_back(self):
        """Another agent, which knows the aliases of before and nothing else."""
        self.workloads = {}


@pytest.fixture
def node():
    return Node()


def test_each_source_adds_what_it_alone_knows(node):
    workload = node.one(
        told(name="api-1", service="api", meshed=True, sidecar=Sidecar.OWN, reason="Consul's"),
        told(Origin.CNI, interface="eth7", addresses=("10.0.0.7",), created_at=5.0),
    )
    assert (workload.id, workload.node, workload.netns) == (UID, "n1", PATH)
    assert (workload.name, workload.service, workload.reason) == ("api-1", "api", "Consul's")
    assert (workload.interface, workload.addresses) == ("eth7", ("10.0.0.7",))
    assert (workload.meshed, workload.sidecar, workload.created_at) == (True, Sidecar.OWN, 5.0)


def test_what_no_source_knows_is_filled_in(node):
    node.places["/run/netns/My_Pod.1"] = 2
    workload = node.one(told(Origin.CNI, netns="/run/netns/My_Pod.1"))
    assert (workload.name, workload.service) == ("My_Pod.1", "my-pod-1")
    assert (workload.interface, workload.namespace) == ("eth0", "default")
    assert (workload.meshed, workload.sidecar) == (False, Sidecar.TIDEGATE)
    nameless = node.one(told(Origin.CNI, netns=OF_PROCESS, id="0123456789abcdef"))
    assert nameless.name == "0123456789ab", "a process's path names nothing"


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_of_the_same_thing_the_better_source_is_believed_whatever_the_order(node, order):
    all_three = (
        told(Origin.FILES, service="of-file", meshed=False),
        told(Origin.KUBERNETES, service="of-pod", meshed=True, namespace="shop"),
        told(Origin.CNI, service="of-call", namespace="other", annotations={"a": "b"}),
    )
    workload = node.one(*(all_three[number] for number in order))
    assert (workload.service, workload.meshed, workload.namespace) == ("of-file", False, "shop")
    assert workload.annotations == {"a": "b"}


def test_what_sources_say_differently_is_told_with_who_is_believed(node):
    merged = node.merge(
        told(Origin.KUBERNETES, name="api-1", service="api", meshed=True),
        told(Origin.PROCESSES, service="web", meshed=False),
    )
    assert merged.problems == (
        "api-1, service: kubernetes says api, processes says web; kubernetes is believed",
        "api-1, meshed: kubernetes says yes, processes says no; kubernetes is believed",
    )


def test_what_a_cni_call_knew_when_the_pod_began_contradicts_nobody(node):
    merged = node.merge(told(service="new", meshed=True), told(Origin.CNI, service="old"))
    assert merged.problems == ()


def test_a_namespace_is_one_workload_by_whatever_paths_it_is_told(node):
    workload = node.one(told(netns=OF_PROCESS, name="api-1"), told(Origin.CNI))
    assert workload.netns == PATH, "a path that lasts is better than one of a process"
    node.comes_back()
    assert node.one(told(netns=OF_PROCESS, name="api-1")).netns == OF_PROCESS


def test_a_path_is_kept_as_long_as_it_leads_to_the_namespace(node):
    assert node.one(told(netns=OF_PROCESS)).netns == OF_PROCESS
    assert node.one(told(netns=OF_PROCESS), told(Origin.CNI)).netns == OF_PROCESS
    del node.places[OF_PROCESS]
    workload = node.one(told(netns=OF_PROCESS, name="api-1"), told(Origin.CNI))
    assert (workload.netns, workload.name) == (PATH, "api-1"), "and what is told by its id counts"


def test_another_namespace_at_the_same_path_is_the_same_workload_and_has_its_path(node):
    first = node.one(told(Origin.CNI))
    node.places[PATH] = 2
    assert node.one(told(Origin.CNI)) == first


def test_a_workload_whose_namespace_is_gone_is_gone_unless_a_file_has_it(node):
    node.one(told(Origin.CNI), told())
    del node.places[PATH]
    assert node.merge(told(Origin.CNI), told()).workloads == ()
    assert node.one(told(Origin.FILES, name="api-1")).name == "api-1"


@pytest.mark.parametrize("first", [Origin.CNI, Origin.KUBERNETES])
def test_a_workload_keeps_the_id_that_it_had_first_whichever_source_comes_and_goes(node, first):
    both = {
        Origin.CNI: told(Origin.CNI, id="cni-c0ffee"),
        Origin.KUBERNETES: told(Origin.KUBERNETES, id=UID, name="api-1"),
    }
    identifier = node.one(both[first]).id
    assert identifier == both[first].id
    assert node.one(*both.values()).id == identifier
    for origin in (*both, *both):
        assert node.one(both[origin]).id == identifier
        node.comes_back()
        assert node.one(both[origin]).id == identifier, "after a restart too"


def test_both_ids_at_once_are_one_workload_by_the_better_source(node):
    both = (told(Origin.CNI, id="cni-c0ffee"), told(Origin.KUBERNETES))
    assert node.one(*both).id == UID
    node.comes_back()
    assert node.one(both[0]).id == UID, "also for an agent that has only the other source"


def test_a_workload_that_is_told_in_two_namespaces_is_in_that_of_the_better_source(node):
    node.places["/run/netns/cni-2"] = 2
    merged = node.merge(told(), told(Origin.CNI, netns="/run/netns/cni-2"))
    (workload,) = merged.workloads
    assert workload.netns == PATH
    assert merged.problems == (
        f"{UID} is told to be in two network namespaces, {PATH} and /run/netns/cni-2; {PATH} is believed",
    )


@pytest.mark.parametrize("ages", [(1.0, 2.0), (2.0, 1.0)])
def test_of_two_namespaces_by_the_same_source_the_younger_is_the_workloads(node, ages):
    node.places["/run/netns/cni-2"] = 2
    old, young = ages
    (workload,) = node.merge(
        told(Origin.CNI, created_at=old),
        told(Origin.CNI, netns="/run/netns/cni-2", created_at=young),
    ).workloads
    assert workload.netns == ("/run/netns/cni-2" if young > old else PATH)


def test_two_workloads_of_one_source_in_one_namespace_are_a_problem(node):
    merged = node.merge(
        told(Origin.FILES, id="a", name="a", service="a"),
        told(Origin.FILES, id="b", name="b", service="b"),
    )
    (workload,) = merged.workloads
    assert (workload.id, workload.service) == ("a", "a")
    assert merged.problems == (
        f"files: a and b are in one network namespace ({PATH}); a is believed",
    )
    assert merged.aliases == {}, "b is not another name of a"


def test_a_pod_in_the_nodes_own_namespace_is_left_alone_and_a_service_is_not(node):
    pods = (told(name="proxy", namespace="kube-system"), told(Origin.CNI, id="cni-1"))
    merged = node.merge(*pods, of_node={1})
    assert merged.workloads == ()
    assert [one.treatment for one in merged.left_alone] == [Treatment.HOST_NETWORK] * 2
    assert (merged.left_alone[0].name, merged.left_alone[0].namespace) == ("proxy", "kube-system")
    service = told(Origin.PROCESSES, id="web", name="web")
    assert node.merge(service, of_node={1}).workloads[0].name == "web"


def test_the_name_that_a_workload_had_stays_while_nobody_knows_another(node):
    node.one(told(Origin.CNI, name="api-1"))
    assert node.one(told(Origin.CNI)).name == "api-1"


def test_the_same_again_is_the_same_again(node):
    descriptions = (told(name="api-1", service="api"), told(Origin.CNI, id="cni-1"))
    first = node.merge(*descriptions)
    assert msgspec.structs.asdict(node.merge(*descriptions)) == msgspec.structs.asdict(first)
