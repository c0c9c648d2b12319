"""The JSON of the embedded server's answers, field for field Consul's, and what filters can ask of it."""

import hashlib
import ssl
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tidegate.catalog.registration import Node, TaggedAddress
from tidegate.catalog.store import NodeRecord, Record
from tidegate.intent.entries import EntryKey
from tidegate.intent.filtering.filter import Filter
from tidegate.intent.filtering.shapes import Shape, shape_of

_TAGGED = {str: {"Address": str, "Port": int}}
_NODE = {
    "ID": str,
    "Node": str,
    "Address": str,
    "Datacenter": str,
    "Partition": str,
    "TaggedAddresses": {str: str},
    "Meta": {str: str},
    "CreateIndex": int,
    "ModifyIndex": int,
}
_SERVICE = {
    "Kind": str,
    "ID": str,
    "Service": str,
    "Namespace": str,
    "Partition": str,
    "Datacenter": str,
    "Tags": [str],
    "Address": str,
    "TaggedAddresses": _TAGGED,
    "Meta": {str: str},
    "Port": int,
    "Proxy": object,
    "CreateIndex": int,
    "ModifyIndex": int,
}

NODE_SHAPE = shape_of(_NODE)
AGENT_SERVICE_SHAPE = shape_of(_SERVICE)
HEALTH_SHAPE = shape_of({"Node": _NODE, "Service": _SERVICE, "Checks": [object]})
CATALOG_SERVICE_SHAPE = shape_of(
    {
        "ID": str,
        "Node": str,
        "Address": str,
        "Datacenter": str,
        "TaggedAddresses": {str: str},
        "NodeMeta": {str: str},
        "ServiceKind": str,
        "ServiceID": str,
        "ServiceName": str,
        "ServiceTags": [str],
        "ServiceAddress": str,
        "ServiceTaggedAddresses": _TAGGED,
        "ServiceMeta": {str: str},
        "ServicePort": int,
        "ServiceProxy": object,
        "Namespace": str,
        "Partition": str,
        "CreateIndex": int,
        "ModifyIndex": int,
    }
)


def selected(
    values: Iterable[dict[str, Any]], expression: str, shape: Shape
) -> list[dict[str, Any]]:
    """The values that a filter expression is true of; all of them for "". Raises FilterError."""
    return Filter(expression, shape).select(values, dict) if expression else list(values)


def not_found(key: EntryKey) -> str:
    return f'Config entry not found for "{key.kind}" / "{key.name}"'


def node(one: Node, datacenter: str) -> dict[str, Any]:
    return {
        "ID": "",
        "Node": one.node,
        "Address": one.address,
        "Datacenter": datacenter,
        "Partition": one.partition,
        "TaggedAddresses": one.tagged_addresses,
        "Meta": one.meta,
    }


def node_record(record: NodeRecord, datacenter: str) -> dict[str, Any]:
    indexes = {"CreateIndex": record.create_index, "ModifyIndex": record.modify_index}
    return node(record.node, datacenter) | indexes


def catalog_service(record: Record, datacenter: str) -> dict[str, Any]:
    """An element of /v1/catalog/service/:service."""
    place, service = record.node, record.service
    return {
        "ID": "",
        "Node": place.node,
        "Address": place.address,
        "Datacenter": datacenter,
        "TaggedAddresses": place.tagged_addresses,
        "NodeMeta": place.meta,
        "ServiceKind": service.kind,
        "ServiceID": service.id,
        "ServiceName": service.service,
        "ServiceTags": service.tags,
        "ServiceAddress": service.address,
        "ServiceTaggedAddresses": _tagged(service.tagged_addresses),
        "ServiceWeights": {"Passing": 1, "Warning": 1},
        "ServiceMeta": service.meta,
        "ServicePort": service.port,
        "ServiceEnableTagOverride": False,
        "ServiceProxy": service.proxy,
        "ServiceConnect": {},
        "Namespace": service.namespace,
        "Partition": service.partition,
        "CreateIndex": record.create_index,
        "ModifyIndex": record.modify_index,
    }


def agent_service(record: Record, datacenter: str) -> dict[str, Any]:
    """The form of /v1/health/service/:service and /v1/catalog/node/:node."""
    service = record.service
    return {
        "Kind": service.kind,
        "ID": service.id,
        "Service": service.service,
        "Namespace": service.namespace,
        "Partition": service.partition,
        "Datacenter": datacenter,
        "Tags": service.tags,
        "Address": service.address,
        "TaggedAddresses": _tagged(service.tagged_addresses),
        "Meta": service.meta,
        "Port": service.port,
        "Weights": {"Passing": 1, "Warning": 1},
        "EnableTagOverride": False,
        "Proxy": service.proxy,
        "Connect": {},
        "CreateIndex": record.create_index,
        "ModifyIndex": record.modify_index,
    }


def health(record: Record, datacenter: str) -> dict[str, Any]:
    """An element of /v1/health/service/:service. There are no checks: what is registered passes."""
    return {
        "Node": node(record.node, datacenter),
        "Service": agent_service(record, datacenter),
        "Checks": [],
    }


def tags_by_name(services: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """/v1/catalog/services, of elements of /v1/catalog/service/:service."""
    tags: dict[str, set[str]] = {}
    for service in services:
        tags.setdefault(service["ServiceName"], set()).update(service["ServiceTags"])
    return {name: sorted(found) for name, found in tags.items()}


def roots(trust_domain: str, certificates: Sequence[str]) -> dict[str, Any]:
    """/v1/connect/ca/roots: the first of the certificates is the root that issues. IDs are SHA-1 fingerprints, as
    Consul's are (agent/connect CalculateCertFingerprint).
    """
    listed = [
        {
            "ID": fingerprint(certificate),
            "Name": "tidegate mesh root",
            "ExternalTrustDomain": trust_domain.removesuffix(".consul"),
            "RootCert": certificate,
            "IntermediateCerts": None,
            "Active": number == 0,
        }
        for number, certificate in enumerate(certificates)
    ]
    return {"ActiveRootID": listed[0]["ID"], "TrustDomain": trust_domain, "Roots": listed}


def fingerprint(certificate: str) -> str:
    """SHA-1 of a certificate (PEM), in hexadecimal with colons."""
    digest = hashlib.sha1(ssl.PEM_cert_to_DER_cert(certificate), usedforsecurity=False)
    return digest.digest().hex(":")


def time_text(seconds: float) -> str:
    """RFC 3339, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _tagged(addresses: dict[str, TaggedAddress]) -> dict[str, dict[str, Any]]:
    return {
        tag: {"Address": tagged.address, "Port": tagged.port} for tag, tagged in addresses.items()
    }
