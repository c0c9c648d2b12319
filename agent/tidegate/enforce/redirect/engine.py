"""The redirect engine: which backend this machine gets, and what the backends don't know of each other.

A backend does the work on one namespace. The engine picks it by trying, takes away what another backend or another
mesh left behind without a moment in which traffic goes unredirected, and tells where traffic goes around the
sidecar in spite of the rules. There is no gap because the old rules go only after the new ones are in place: the
kernel decides on each connection once, by whichever rules it meets first.
"""

import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import msgspec

from tidegate.enforce.redirect import block, foreign, gaps, inventory
from tidegate.enforce.redirect.backend import Backend, BackendName, Change, InstalledLine
from tidegate.enforce.redirect.foreign import Foreign, Left
from tidegate.enforce.redirect.inventory import Inventory
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import Rules, rules_for
from tidegate.errors import InputError
from tidegate.intent.policy import Family, Outbound, Policy, PortRange
from tidegate.kernel import chains, netns
from tidegate.kernel.errors import KernelError


class BackendChoice(enum.StrEnum):
    """What may be asked for: one backend, or the best that works here."""

    AUTO = "auto"
    NFTABLES = BackendName.NFTABLES.value
    IPTABLES = BackendName.IPTABLES.value


AUTO: Final = BackendChoice.AUTO

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
    adopted: tuple[Foreign, ...] = ()
    """What another mesh had and is gone."""
    foreign: tuple[Left, ...] = ()
    """What another mesh has and is still there, whether it was to be adopted or not."""


class Established(NamedTuple):
    """What `Engine.establish` did."""

    applied: Applied
    differences: tuple[str, ...]
    """How the namespace differs from the policy all the same, one sentence each, without what is told in `applied`."""


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
        expected = ", ".join(BackendChoice)
        raise InputError(f"{wanted!r} is not a backend", expected=f"one of {expected}") from error
    return Choice(backend, f"it was asked for; {_probed(backend)}")


class Engine:
    """Redirection of any namespace of this machine. Namespaces may be worked on at the same time."""

    def __init__(self, wanted: str = AUTO) -> None:
        """Nothing is tried yet: the errors of `choose` come from whatever needs a backend first."""
        self._wanted = wanted
        self._chosen: Choice | None = None
        self._given: Backend | None = None

    @classmethod
    def by(cls, backend: Backend, why: str) -> "Engine":
        """One that works by this very backend, for the reason told: nothing is tried in a namespace made for that."""
        engine = cls(backend.name)
        engine._chosen = Choice(backend.name, why)
        engine._given = backend
        return engine

    @property
    def choice(self) -> Choice:
        """The backend that rules go through."""
        if self._chosen is None:
            self._chosen = choose(self._wanted)
        return self._chosen

    @property
    def _backend(self) -> Backend:
        return self._given or _backend(self.choice.backend)

    @property
    def _other(self) -> Backend:
        (other,) = set(BackendName) - {self.choice.backend}
        return _backend(other)

    def render(self, policy: Policy) -> str:
        """What `apply` loads where nothing is, byte for byte; "" when nothing is redirected."""
        return self._backend.render(_rules(policy))

    def apply(self, netns_path: str, policy: Policy, *, adopt: bool = False) -> Applied:
        """Make the namespace redirect as the policy says, through this engine's backend alone.

        With `adopt`, what Consul left goes as well, if the kernel lets it go. Open connections stay as they are.
        KernelError when the namespace is gone or the kernel refuses: its rules are then what they were, or the new
        ones together with old ones of the other backend, which the next call takes away.
        """
        rules = _rules(policy)
        change, found = netns.run_in(netns_path, self._apply, rules)
        replaced = self._other.name if self._other.name in found.backends else None
        if replaced:
            change = _joined(change, self._take_over(netns_path, bool(rules.lists)))
        adopted: list[Foreign] = []
        left: list[Left] = []
        for item in found.foreign:
            if not adopt or not item.removable:
                left.append(Left(item))
                continue
            try:
                foreign.remove(netns_path, item)
            except KernelError as error:
                left.append(Left(item, str(error)))
            else:
                adopted.append(item)
        return Applied(
            change=change,
            backend=self._backend.name,
            replaced_backend=replaced,
            adopted=tuple(adopted),
            foreign=tuple(left),
        )

    def check(self, netns_path: str, policy: Policy) -> tuple[str, ...]:
        """How the namespace differs from the policy, one sentence each; () when it does not.

        KernelError when that cannot be told.
        """
        differences, found = netns.run_in(netns_path, self._check, _rules(policy))
        name = self._other.name
        others = (f"rules of the backend {name} are there as well",)
        return (
            *differences,
            *(others if name in found.backends else ()),
            *map(str, found.foreign),
        )

    def create(self, netns_path: str, policy: Policy) -> bool:
        """`establish` where nobody's rules are, as long as that goes the short way; whether all is as it should be."""
        return netns.run_in(netns_path, self._create, _rules(policy))

    def establish(self, netns_path: str, policy: Policy, *, adopt: bool = False) -> Established:
        """`apply`, and `check` whether it is as it should be then; at once in a namespace where nobody's rules are."""
        if self.create(netns_path, policy):
            return Established(Applied(change=Change.CREATED, backend=self._backend.name), ())
        applied = self.apply(netns_path, policy, adopt=adopt)
        told = {str(left.found) for left in applied.foreign}
        differences = self.check(netns_path, policy)
        return Established(applied, tuple(one for one in differences if one not in told))

    def backend_of(self, netns_path: str) -> BackendName | None:
        """Whose rules the namespace has; of both, this engine's; None without any."""
        owners = inventory.taken(netns_path).backends
        return next(
            (name for name in (self._backend.name, self._other.name) if name in owners), None
        )

    def current(self, netns_path: str) -> tuple[InstalledLine, ...] | None:
        """The lines that the namespace has, through whichever backend, with their counters; None without any."""
        owner = self.backend_of(netns_path)
        return None if owner is None else _backend(owner).current(netns_path)

    def remove(self, netns_path: str) -> Change:
        """Take away everything of tidegate, of both backends, and the translations that outlive it; idempotent.

        KernelError when the namespace is gone, or with all that the kernel refuses; whatever it does not refuse has
        been taken away then.
        """
        netns.identity(netns_path)
        changes: list[Change] = []
        refusals: list[KernelError] = []
        for part in _removals(netns_path):
            try:
                changes.append(part(netns_path))
            except KernelError as error:
                refusals.append(error)
        if refusals:
            raise KernelError("; ".join(map(str, refusals)), refusals[0].errno)
        return Change.REMOVED if Change.REMOVED in changes else Change.UNCHANGED

    def gaps(self, netns_path: str, policy: Policy) -> tuple[str, ...]:
        """Ways around the sidecar that the policy, the namespace or others' rules leave open, one sentence each.

        What `check` tells is not among them: other meshes' rules, and those of the other backend.
        KernelError when the namespace is gone, or cannot be looked at.
        """
        found = inventory.taken(netns_path)
        return (
            *gaps.of_policy(netns_path, policy),
            *self._unexpressible(policy),
            *gaps.of_unseen(found),
            *gaps.of_namespace(netns_path, policy, _rules(policy)),
        )

    def _create(self, rules: Rules) -> bool:
        """Whether the current namespace has the rules, and nothing of anybody else, by the short way."""
        return self._backend.create(netns.CURRENT, rules) and not chains.any_legacy()

    def _apply(self, rules: Rules) -> tuple[Change, Inventory]:
        """Apply by this engine's backend in the current namespace; what is there then."""
        return self._backend.apply(netns.CURRENT, rules), inventory.taken(netns.CURRENT)

    def _check(self, rules: Rules) -> tuple[tuple[str, ...], Inventory]:
        return self._backend.check(netns.CURRENT, rules), inventory.taken(netns.CURRENT)

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


_rules = functools.lru_cache(128)(rules_for)
"""Of long lists the rules take a while, and agents ask for those of the same policies over and over."""


def _removals(netns_path: str) -> Iterator[Callable[[str], Change]]:
    """What has to be done so that nothing of tidegate is left."""
    for name in sorted(_left_by(netns_path)):
        yield _backend(name).remove
    yield block.unblock


def _left_by(netns_path: str) -> frozenset[BackendName]:
    """The backends that may have left something."""
    try:
        return inventory.traces(netns_path)
    except KernelError:
        # Each of them says itself what it cannot do.
        return frozenset(BackendName)


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
