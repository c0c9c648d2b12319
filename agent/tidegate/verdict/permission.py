"""What intentions say of a caller, also where they are not enforced: on connections that permissive mode lets in.

The caller is the service that the catalog knows by the address. Pure.
"""

import enum

from tidegate.model import ServiceIntent, source_matches


class Permission(enum.StrEnum):
    """What intentions say of a caller, whether or not they are enforced on its connections."""

    ALLOWED = "allowed"
    """By an intention that names it, or a wildcard."""
    BY_DEFAULT = "by-default"
    """No intention matches; the default action allows it. A sidecar infers no upstream from that."""
    MISSING = "missing"
    """No intention matches, and the default action denies it."""
    DENIED = "denied"
    """An intention denies it."""
    UNKNOWABLE = "unknowable"
    """The catalog knows no service of that address: no intention can be about it."""

    @property
    def would_be_denied(self) -> bool:
        """Whether the caller would be refused if its connections were mTLS with its service's identity."""
        return self in (Permission.MISSING, Permission.DENIED)


def permission(intent: ServiceIntent, source: str) -> Permission:
    """What the intentions towards a service say of the service `source`, "" for nobody known."""
    if not source:
        return Permission.UNKNOWABLE
    for rule in intent.intentions:
        if source_matches(rule.source, source):
            return Permission.ALLOWED if rule.allow else Permission.DENIED
    return Permission.BY_DEFAULT if intent.default_allow else Permission.MISSING
