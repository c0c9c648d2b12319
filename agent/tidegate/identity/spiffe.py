"""Names of services inside the mesh: SPIFFE URIs and server names, in the forms that Consul uses.

Pure text. Every part of a name is validated here, so that what comes out can be compared, matched
by a regular expression or put into a certificate as it is. Sources: Consul
agent/connect/uri_service.go (SPIFFE) and agent/connect/sni.go (SNI).
"""

import re

from tidegate.errors import InputError
from tidegate.model import DEFAULT_TENANT, ServiceName

DEFAULT_DATACENTER = "dc1"

AGENT_SERVICE = "tidegate-agent"
"""The service that the nodes' agents are to each other. No workload can be it: it could ask what agents may."""

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


def service_name(text: str) -> ServiceName:
    """The parts of a service's text, all of them names. InputError names the part that is none."""
    name = ServiceName.of(text)
    label(name.name, "service")
    label(name.namespace, "namespace")
    label(name.partition, "partition")
    return name


def service_id(domain: str, service: str, datacenter: str = DEFAULT_DATACENTER) -> str:
    """The SPIFFE URI of a service, given as the text of its ServiceName. InputError when a part is no valid name."""
    name = service_name(service)
    return (
        f"spiffe://{trust_domain(domain)}{partition_path(name.partition)}/ns/{name.namespace}"
        f"/dc/{label(datacenter, 'datacenter')}/svc/{name.name}"
    )


def partition_path(partition: str) -> str:
    """How a SPIFFE URI begins its path: the default partition is not said."""
    return "" if partition == DEFAULT_TENANT else f"/ap/{partition}"


def sni(domain: str, service: str, datacenter: str = DEFAULT_DATACENTER) -> str:
    """The server name that callers of a service put into their ClientHello. InputError as above."""
    name = service_name(service)
    place = f"{label(datacenter, 'datacenter')}.internal"
    if name.partition != DEFAULT_TENANT:
        place = f"{name.partition}.{place}-v1"
    return f"{name.name}.{name.namespace}.{place}.{trust_domain(domain)}"
