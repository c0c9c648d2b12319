"""What every backend of the redirect engine does. A backend renders lines of rules.py; it decides nothing.

A backend works on one network namespace at a time, by path. It owns the objects that bear tidegate's name and
never touches another. Its methods may be called from any thread, for different namespaces at the same time.
"""

import enum
from typing import Protocol

import msgspec

from tidegate.enforce.redirect.rules import Hook, Rules


class BackendName(enum.StrEnum):
    """The kernel's interfaces that redirection can go through."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    """The legacy tables (ip_tables, ip6_tables), for kernels without nf_tables."""


class Change(enum.StrEnum):
    """What a call did to the kernel."""

    UNCHANGED = "unchanged"
    CREATED = "created"
    REPLACED = "replaced"
    REMOVED = "removed"


class InstalledLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line as the kernel has it."""

    hook: Hook
    name: str
    """Name of the line in rules.py; of a rule that is not tidegate's, whatever its comment says."""
    packets: int
    """Packets that this line decided on since the rules were loaded; in a nat list, connections."""


class Backend(Protocol):
    """One way to have the kernel follow the decision lists."""

    @property
    def name(self) -> BackendName: ...

    def render(self, rules: Rules) -> str:
        """What `apply` loads where nothing is, byte for byte; "" when nothing is redirected.

        KernelError for a line that this machine cannot express, such as a cgroup that does not exist.
        """

    def apply(self, netns_path: str, rules: Rules) -> Change:
        """Make the namespace follow the rules; with none, remove what is there.

        Changes nothing when the kernel has these rules already. Open connections stay as they are. KernelError
        when the namespace is gone or the kernel refuses; the rules are then what they were.
        """

    def create(self, netns_path: str, rules: Rules) -> bool:
        """Have exactly these rules in a namespace that has none of anybody, and compare; whether that is so then.

        The short way for new workloads. Where it leads nowhere, `apply` and `check` do all that it may have left.
        KernelError as of `apply`.
        """

    def check(self, netns_path: str, rules: Rules) -> tuple[str, ...]:
        """How the kernel differs from the rules, one sentence each; () when it does not.

        KernelError when that cannot be told.
        """

    def current(self, netns_path: str) -> tuple[InstalledLine, ...] | None:
        """The lines that the namespace has, in order, with their counters; None without any."""

    def withdraw(self, netns_path: str) -> Change:
        """Take away everything of this backend; redirected connections go on. Idempotent.

        For when another backend has taken over: translations outlive the rules that made them.
        """

    def remove(self, netns_path: str) -> Change:
        """Take away everything of this backend, and the translations that outlive it; idempotent."""
