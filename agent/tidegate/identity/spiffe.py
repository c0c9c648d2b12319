"""Names of services inside the mesh: SPIFFE URIs and server names, in the forms that Consul uses.

Pure text. Every part of a name is validated here, so that what comes out can be compared, matched
by a regular expression or put into a certificate as it is. Sources: Consul
agent/connect/uri_service.go (SPIFFE) and agent/connect/sni.go (SNI).
"""

import re

from tidegate.errors import InputError

DEFAULT_NAMESPACE = "default"
DEFAULT_DATACENTER = "dc1"

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LONGEST_NAME = 253


def label(text: str, field: str) -> str:
    """`text` if it is one lower-case DNS label (RFC 1123), else InputError naming `field`."""
    if not _LABEL.fullmatch(text):
        raise InputError(
            f"{text!r} is not a name",
            field=field,
            expected="1 to 63 of a-z, 0-9 and -, with no - at the start or end",
        )
    return text


def trust_domain(text: str) -> str:
    """`text` if it is a lower-case DNS name such as "1a2b.consul", else InputError."""
    if len(text) > _LONGEST_NAME or not all(_LABEL.fullmatch(part) for part in text.split(".")):
        raise InputError(
            f"{text!r} is not a trust domain",
            field="trust_domain",
            expected='a lower-case DNS name such as "1a2b3c.consul"',
        )
    return text


def service_id(
    domain: str,
    service: str,
    namespace: str = DEFAULT_NAMESPACE,
    datacenter: str = DEFAULT_DATACENTER,
) -> str:
    """The SPIFFE URI of a service. InputError when a part is no valid name."""
    return (
        f"spiffe://{trust_domain(domain)}/ns/{label(namespace, 'namespace')}"
        f"/dc/{label(datacenter, 'datacenter')}/svc/{label(service, 'service')}"
    )


def sni(
    domain: str,
    service: str,
    namespace: str = DEFAULT_NAMESPACE,
    datacenter: str = DEFAULT_DATACENTER,
) -> str:
    """The server name that callers of a service put into their ClientHello. InputError as above."""
    return (
        f"{label(service, 'service')}.{label(namespace, 'namespace')}"
        f".{label(datacenter, 'datacenter')}.internal.{trust_domain(domain)}"
    )
