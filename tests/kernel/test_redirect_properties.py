"""Whatever the policy and whatever the connection: both backends do what the evaluator says.

TIDEGATE_POLICIES is how many policies are tried (25), TIDEGATE_SEED with which seed (0): a run is repeated by its
seed. For a long one: TIDEGATE_POLICIES=2000 TIDEGATE_SEED=$RANDOM.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from matrix import (
    APPS,
    CGROUP,
    DNS_PROXY,
    INBOUND,
    MARK,
    OTHER_INBOUND,
    OTHER_OUTBOUND,
    OUTBOUND,
    PROXY_GID,
    SECOND_PROXY_UID,
    USERS,
    Dial,
    Landed,
    decide,
    expected,
    site,
)
from namespaces import tell

from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import Tracked, rules_for
from tidegate.errors import InputErrors
from tidegate.intent.policy import (
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

POLICIES = int(os.environ.get("TIDEGATE_POLICIES", "25"))
SEED = int(os.environ.get("TIDEGATE_SEED", "0"))
CONNECTIONS = 20

BACKENDS = (NftablesBackend(), IptablesBackend())

UIDS = sorted({user.uid for user in USERS.values()})
GIDS = sorted({user.gid for user in USERS.values()})
PORTS = sorted({53, DNS_PROXY, *APPS, INBOUND, OUTBOUND, OTHER_INBOUND, OTHER_OUTBOUND, 7})
INTERFACES = ("eth0", "guest0", "net1", "none9")
NETWORKS = (
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.77.0.0/24",
    "10.77.0.1/32",
    "10.77.0.9/32",
    "10.78.0.0/31",
    "10.79.0.0/16",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "192.0.2.0/24",
    "198.51.100.10/32",
    "::/0",
    "2001:db8::/32",
    "2001:db8:2::10/128",
    "fd00::/8",
    "fd77::/64",
    "fd77::9/128",
    "fd79::/16",
    "fe80::/10",
)
NODES = ("10.77.0.1/32", "10.77.0.9/32", "fd77::1/128", "192.0.2.10/32")


def some(values, most=3):
    """A tuple of a few of these values."""
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


def optional(strategy):
    """Mostly nothing: what is always there hides what comes after it."""
    return st.one_of(st.none(), st.none(), strategy)


def spans(kind, numbers):
    ends = st.tuples(st.sampled_from(numbers), st.sampled_from((0, 0, 0, 1, 1000)))
    return st.lists(
        ends.map(lambda pair: kind(max(pair[0] - pair[1], 1), pair[0])), max_size=3
    ).map(tuple)


few = st.sampled_from((True, False, False))
ports = spans(PortRange, PORTS)
uids = spans(IdRange, [uid for uid in UIDS if uid])
gids = spans(IdRange, [gid for gid in GIDS if gid])
protocols = st.sampled_from(
    ((Protocol.TCP,), (Protocol.UDP,), (Protocol.TCP, Protocol.UDP), (Protocol.UDP, Protocol.TCP))
)
user_ports = st.builds(UserPorts, protocols, ports.filter(len), uids.filter(len))
proxies = st.builds(
    Proxy,
    uids=some((5995, SECOND_PROXY_UID, 0), 2),
    gids=some((PROXY_GID, 0), 1),
    mark=optional(st.sampled_from((Mark(MARK), Mark(MARK, 0xFFFF), Mark(0, 0x10000)))),
    cgroup=st.sampled_from(("", "", f"{CGROUP}/sidecar", CGROUP)),
    self_calls_inbound=few,
)
inbounds = st.builds(
    Inbound,
    enabled=st.sampled_from((True, True, True, False)),
    port=st.sampled_from((INBOUND, INBOUND, OTHER_INBOUND)),
    include_ports=optional(ports),
    exclude_ports=ports,
    exclude_cidrs=some(NETWORKS[1:], 2),
    include_interfaces=optional(some(INTERFACES)),
    exclude_interfaces=some(INTERFACES, 1),
    direct_probes=few,
    node_addresses=some(NODES, 2),
)
outbounds = st.builds(
    Outbound,
    enabled=st.sampled_from((True, True, True, False)),
    port=st.sampled_from((OUTBOUND, OUTBOUND, OTHER_OUTBOUND)),
    include_cidrs=optional(some(NETWORKS)),
    include_ports=ports,
    exclude_ports=ports,
    exclude_cidrs=some(NETWORKS[1:], 2),
    exclude_uids=uids,
    exclude_gids=gids,
    exclude_user_ports=st.lists(user_ports, max_size=2).map(tuple),
    include_interfaces=optional(some(INTERFACES)),
    exclude_interfaces=some(INTERFACES, 1),
)
resolvers = st.builds(
    Dns,
    enabled=st.booleans(),
    resolvers=st.one_of(
        st.just(()), some(("10.77.0.1", "192.0.2.10", "127.0.0.53", "fd77::1", "2001:db8:1::10"))
    ),
    addresses=st.sampled_from(
        (
            ("127.0.0.1", "::1"),
            ("127.0.0.1",),
            ("::1",),
            ("198.51.100.10", "2001:db8:2::10"),
            ("::1", "10.77.0.1"),
            ("fd77::1",),
        )
    ),
    port=st.just(DNS_PROXY),
)
families = st.sampled_from((*[(Family.IPV4, Family.IPV6)] * 4, (Family.IPV4,), (Family.IPV6,), ()))


@st.composite
def policies(draw):
    try:
        return Policy(
            proxy=draw(proxies),
            inbound=draw(inbounds),
            outbound=draw(outbounds),
            dns=draw(resolvers),
            families=draw(families),
            mode=draw(st.sampled_from(Mode)),
            drop_invalid=draw(few),
        )
    except InputErrors:
        reject()


OF_PEER = ("pod", "pod-net1", "pod-guest0", "link-local-pod", "guest")
OF_POD = (
    *("peer", "stranger", "peer-net1", "far", "farther", "metadata", "link-local-peer", "guest"),
    *("pod", "pod-net1", "loopback", "loopback-53", "loopback-3"),
)


@st.composite
def dials(draw):
    at = draw(st.sampled_from(("pod", "pod", "peer", "guest")))
    places = {"pod": OF_POD, "peer": OF_PEER, "guest": ("pod", "pod-guest0", "peer", "far")}
    to = draw(st.sampled_from(places[at]))
    protocol = draw(st.sampled_from((Protocol.TCP, Protocol.TCP, Protocol.UDP)))
    if to.startswith("link-local"):
        protocol = Protocol.TCP
    sources = {
        "pod": ("", "own-call") if to in ("pod", "pod-net1") else ("",),
        "peer": ("", "stranger", "far") if to == "pod" else ("",),
        "guest": ("",),
    }
    return Dial(
        at=at,
        to=to,
        port=draw(st.sampled_from(PORTS if protocol is Protocol.TCP else (53, DNS_PROXY))),
        user=draw(st.sampled_from(sorted(USERS))) if at == "pod" else "app",
        protocol=protocol,
        source=draw(st.sampled_from(sources[at])),
        mapped=draw(few) if at == "pod" else False,
    )


connections = st.lists(
    st.tuples(dials(), st.sampled_from((4, 6))).filter(lambda pair: pair[0].possible(pair[1])),
    min_size=CONNECTIONS,
    max_size=CONNECTIONS,
)


@pytest.fixture(scope="module")
def lab(request):
    tell(request.config, f"redirect properties: {POLICIES} policies, seed {SEED}")
    with site() as made:
        yield made


def where(outcome):
    return (outcome.server, outcome.port) if isinstance(outcome, Landed) else outcome


@seed(SEED)
@settings(
    max_examples=POLICIES,
    deadline=None,
    database=None,
    # The failure names the connection; shrinking the policy around it takes minutes.
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(policy=policies(), battery=connections)
def test_whatever_the_policy_connections_land_where_explain_says(lab, policy, battery):
    rules = rules_for(policy)
    lab.prepare(policy.mode)
    for backend in BACKENDS:
        backend.apply(lab.pod, rules)
        try:
            assert backend.check(lab.pod, rules) == ()
            attempts = lab.open(battery)
            wrong = [
                f"{backend.name}: IPv{attempt.version} {attempt.dial.name}: landed "
                f"{attempt.outcome}, should {want} by {decide(rules, attempt.dial, attempt.version)}"
                for attempt in attempts
                if attempt.outcome
                != (want := expected(rules, attempt.dial, attempt.version, attempt.client))
            ]
            assert wrong == []
            lab.hang_up(attempts)
            # With drop_invalid, what answers a SYN that cannot be placed is dropped too, whoever sent it.
            for tracked in (Tracked.KNOWN, *([] if policy.drop_invalid else [Tracked.INVALID])):
                missed = [pair for pair in battery if pair[0].can_be_missed]
                wrong = [
                    f"{backend.name}: IPv{attempt.version} {attempt.dial.name}, {tracked}: landed "
                    f"{attempt.outcome}, should {want}"
                    for attempt, want in lab.open_missed(rules, missed, tracked)
                    if where(attempt.outcome) != where(want)
                ]
                assert wrong == []
            lab.hang_up()
        finally:
            backend.remove(lab.pod)
