"""The redirect engine: which backend this machine gets, and what the backends don't know of each other.

A backend does the work on one namespace. The engine picks it by trying, takes away what another backend or another
mesh left behind without a moment in which traffic goes unredirected, and tells where traffic goes around the
sidecar in spite of the rules. There is no gap because the old rules go only after the new ones are in place: the
kernel decides on each connection once, by whichever rules it meets first.
"""

import functools
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec

from tidegate.enforce.redirect import block, foreign
from tidegate.enforce.redirect.backend import Backend, BackendName, Change, InstalledLine
from tidegate.enforce.redirect.iptables import OWNED, SET_PREFIX, IptablesBackend
from tidegate.enforce.redirect.nftables import FAMILIES, TABLE, NftablesBackend
from tidegate.enforce.redirect.rules import Rules, rules_for
from tidegate.errors import InputError
from tidegate.intent.policy import Family, Outbound, Policy, PortRange
from tidegate.kernel import chains, ipset, links, netns
from tidegate.kernel.chains import Chain, Store
from tidegate.kernel.errors import KernelError

AUTO: Final = "auto"

_BACKENDS: Mapping[BackendName, Callable[[], Backend]] = {
    BackendName.NFTABLES: NftablesBackend,
    BackendName.IPTABLES: IptablesBackend,
}
"""In the order of preference."""

_STORES = {
    BackendName.NFTABLES: "nf_tables of this kernel",
    BackendName.IPTABLES: "the legacy table nat of this kernel",
}
"""Where the rules of each backend go."""
_FAMILY_NAMES = {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}
_VERSIONS = {Family.IPV4: 4, Family.IPV6: 6}


class Choice(msgspec.Struct, frozen=True):
    """The backend of this machine, and why it is this one."""

    backend: BackendName
    why: str


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What `Engine.apply` did."""

    change: Change
    backend: BackendName
    replaced_backend: BackendName | None = None
    """The other backend, whose rules were there and are gone."""
    adopted: tuple[str, ...] = ()
    """What another mesh had left and is gone, one sentence each."""
    foreign: tuple[str, ...] = ()
    """What another mesh has left and is still there, one sentence each."""


def choose(wanted: str) -> Choice:
    """The backend for "auto", or the one named, once it has shown that it works here.

    Each is tried on a namespace made for that, with rules as `apply` loads them; what is found holds for the life of
    the process. InputError for a name that is none; KernelError when no backend works, or the named one does not.
    """
    if wanted == AUTO:
        return _best()
    try:
        backend = BackendName(wanted)
    except ValueError as error:
        expected = ", ".join((AUTO, *BackendName))
        raise InputError(f"{wanted!r} is not a backend", expected=f"one of {expected}") from error
    return Choice(backend, f"it was asked for; {_probed(backend)}")


class Engine:
    """Redirection of any namespace of this machine. Namespaces may be worked on at the same time."""

    def __init__(self, wanted: str = AUTO) -> None:
        """Nothing is tried yet: the errors of `choose` come from whatever needs a backend first."""
        self._wanted = wanted
        self._chosen: Choice | None = None

    @property
    def choice(self) -> Choice:
        """The backend that rules go through."""
        if self._chosen is None:
            self._chosen = choose(self._wanted)
        return self._chosen

    @property
    def _backend(self) -> Backend:
        return _backend(self.choice.backend)

    @property
    def _other(self) -> Backend:
        (other,) = set(BackendName) - {self.choice.backend}
        return _backend(other)

    def render(self, policy: Policy) -> str:
        """What `apply` loads where nothing is, byte for byte; "" when nothing is redirected."""
        return self._backend.render(rules_for(policy))

    def apply(self, netns_path: str, policy: Policy, *, adopt: bool = False) -> Applied:
        """Make the namespace redirect as the policy says, through this engine's backend alone.

        With `adopt`, what Consul left goes as well. Open connections stay as they are. KernelError when the namespace
        is gone or the kernel refuses: its rules are then what they were, or the new ones together with old ones,
        which the next call takes away.
        """
        rules = rules_for(policy)
        change, listed = netns.run_in(netns_path, self._apply, rules)
        replaced = self._other.name if self._other.name in _owners(listed) else None
        if replaced:
            change = _joined(change, self._take_over(netns_path, bool(rules.lists)))
        found = foreign.recognised(listed)
        going = tuple(item for item in found if adopt and item.removable)
        if going:
            foreign.remove(netns_path, going)
        return Applied(
            change=change,
            backend=self._backend.name,
            replaced_backend=replaced,
            adopted=tuple(str(item) for item in going),
            foreign=tuple(str(item) for item in found if item not in going),
        )

    def check(self, netns_path: str, policy: Policy) -> tuple[str, ...]:
        """How the namespace differs from the policy, one sentence each; () when it does not.

        KernelError when that cannot be told.
        """
        differences, listed = netns.run_in(netns_path, self._check, rules_for(policy))
        name = self._other.name
        others = (
            (f"rules of the backend {name} are there as well",) if name in _owners(listed) else ()
        )
        return (*differences, *others, *(str(item) for item in foreign.recognised(listed)))

    def backend_of(self, netns_path: str) -> BackendName | None:
        """Whose rules the namespace has; of both, this engine's; None without any."""
        owners = _owners(_listed(netns_path))
        return next(
            (name for name in (self._backend.name, self._other.name) if name in owners), None
        )

    def current(self, netns_path: str) -> tuple[InstalledLine, ...] | None:
        """The lines that the namespace has, through whichever backend, with their counters; None without any."""
        owner = self.backend_of(netns_path)
        return None if owner is None else _backend(owner).current(netns_path)

    def remove(self, netns_path: str) -> Change:
        """Take away everything of tidegate, of both backends, and the translations that outlive it; idempotent."""
        owners = set(_owners(_listed(netns_path)))
        if self._chosen is not None:
            owners.add(self._chosen.backend)
        if netns.run_in(netns_path, ipset.found, SET_PREFIX):
            owners.add(BackendName.IPTABLES)
        changes = [_backend(owner).remove(netns_path) for owner in sorted(owners)]
        changes.append(block.unblock(netns_path))
        return Change.REMOVED if Change.REMOVED in changes else Change.UNCHANGED

    def gaps(self, netns_path: str, policy: Policy) -> tuple[str, ...]:
        """Ways around the sidecar that the policy, the namespace or another mesh leaves open, one sentence each.

        KernelError when the namespace is gone.
        """
        reach = links.reach(netns_path)
        return (
            *_family_gaps(policy, reach),
            *_direction_gaps(policy),
            *_dns_gaps(policy, reach),
            *self._unexpressible(policy),
            *(str(item) for item in foreign.find(netns_path)),
        )

    def _apply(self, rules: Rules) -> tuple[Change, tuple[Chain, ...]]:
        """Apply by this engine's backend in the current namespace; the chains that are there then."""
        return self._backend.apply(netns.CURRENT, rules), chains.listed()

    def _check(self, rules: Rules) -> tuple[tuple[str, ...], tuple[Chain, ...]]:
        return self._backend.check(netns.CURRENT, rules), chains.listed()

    def _take_over(self, netns_path: str, redirects: bool) -> Change:
        """Take the other backend's rules away, which this engine's have replaced if there are any."""
        if redirects:
            self._other.withdraw(netns_path)
            return Change.REPLACED
        return self._other.remove(netns_path)

    def _unexpressible(self, policy: Policy) -> Iterator[str]:
        try:
            self.render(policy)
        except KernelError as error:
            yield f"the backend {self._backend.name} cannot apply the policy: {error}"


@functools.cache
def _backend(name: BackendName) -> Backend:
    return _BACKENDS[name]()


def _listed(netns_path: str) -> tuple[Chain, ...]:
    return netns.run_in(netns_path, chains.listed)


def _owners(listed: Iterable[Chain]) -> frozenset[BackendName]:
    """The backends that have rules where these chains are."""
    return frozenset(owner for chain in listed if (owner := _owner(chain)) is not None)


def _owner(chain: Chain) -> BackendName | None:
    if chain.store is Store.LEGACY:
        return BackendName.IPTABLES if re.fullmatch(OWNED, chain.name) else None
    own = chain.table == TABLE and chain.family in FAMILIES
    return BackendName.NFTABLES if own else None


def _joined(change: Change, others: Change) -> Change:
    """What two backends' changes are together: the old rules of one give way to the new ones of the other."""
    return others if change in (Change.UNCHANGED, Change.CREATED) else change


# Sets, both families and both directions, so that a kernel that lacks any of what rules need is told apart.
_PROBE: Final = Policy(outbound=Outbound(exclude_ports=(PortRange(1, 1), PortRange(3, 4))))


def _best() -> Choice:
    refusals: list[KernelError] = []
    for backend in _BACKENDS:
        try:
            why = _probed(backend)
        except KernelError as error:
            refusals.append(error)
        else:
            return Choice(backend, "; ".join((*(str(refusal) for refusal in refusals), why)))
    number = refusals[0].errno
    raise KernelError(f"no backend works here: {'; '.join(map(str, refusals))}", number)


@functools.cache
def _probed(backend: BackendName) -> str:
    """What there is to say for a backend. KernelError, which is not remembered, when it does not work."""
    try:
        netns.run_in_new(_try, _backend(backend), _PROBE)
    except KernelError as error:
        whole = KernelError(
            f"{_STORES[backend]} does not take tidegate's rules: {error}", error.errno
        )
    else:
        return f"{_STORES[backend]} takes tidegate's rules"
    try:
        netns.run_in_new(
            _try, _backend(backend), msgspec.structs.replace(_PROBE, families=(Family.IPV4,))
        )
    except KernelError:
        raise whole from None
    return f"{_STORES[backend]} takes tidegate's rules for IPv4 only ({whole})"


def _try(backend: Backend, policy: Policy) -> None:
    """Load and read back rules in the calling thread's namespace."""
    rules = rules_for(policy)
    backend.apply(netns.CURRENT, rules)
    differences = backend.check(netns.CURRENT, rules)
    if differences:
        raise KernelError(f"rules do not read back as they were loaded: {differences[0]}")


def _family_gaps(policy: Policy, reach: links.Reach) -> Iterator[str]:
    for family in (family for family in Family if family not in policy.families):
        name, version = _FAMILY_NAMES[family], _VERSIONS[family]
        has = [
            address
            for address in reach.addresses
            if ipaddress.ip_address(address).version == version
        ]
        if not has and version in reach.default_routes:
            has = [f"a default route of {name}"]
        if has:
            yield (
                f"{name} is off in the policy and the workload has {', '.join(has)}: "
                f"its {name} traffic goes around the sidecar"
            )


def _direction_gaps(policy: Policy) -> Iterator[str]:
    inbound, outbound = policy.inbound, policy.outbound
    if not inbound.enabled or inbound.include_ports == ():
        yield "inbound redirection is off in the policy: connections to the workload go around the sidecar"
    if not outbound.enabled or (outbound.include_cidrs == () and not outbound.include_ports):
        yield "outbound redirection is off in the policy: connections of the workload go around the sidecar"


def _dns_gaps(policy: Policy, reach: links.Reach) -> Iterator[str]:
    dns = policy.dns
    if not dns.enabled:
        return
    served = {ipaddress.ip_address(address).version for address in dns.addresses}
    asked = {ipaddress.ip_address(address).version for address in dns.resolvers or reach.addresses}
    for family in policy.families:
        if _VERSIONS[family] in asked - served:
            name = _FAMILY_NAMES[family]
            yield f"DNS queries over {name} are not redirected: the policy has no {name} address to send them to"
