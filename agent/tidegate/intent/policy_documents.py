"""Policies as documents: tidegate's own in YAML or JSON, and Consul's redirect-traffic-config.

A document of tidegate's has the names of the structs in policy.py, and values in the forms that annotations have, or as
YAML's numbers, bools and lists. It is partial: what it does not say stays as in the base. Consul's says everything that
it can say: what is missing there is empty.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from tidegate.errors import InputError
from tidegate.intent.documents import read_documents
from tidegate.intent.fields import Place, as_object, described, folded, line_of, nearest
from tidegate.intent.network_text import as_name, clipped
from tidegate.intent.policy import DEFAULT, MAX_FAULTS, Dns, Policy
from tidegate.intent.policy_parsing import Lookup, Names, no_such_name
from tidegate.intent.policy_settings import SETTINGS, Draft, value_of
from tidegate.model import DEFAULT_OUTBOUND_PORT

_DNS_PORT = 53
_BLANK: Final = "\ufeff \t\r\n"
_A_POLICY: Final = "one policy, fields in { }"
_SWITCHES: Final = {
    **dict.fromkeys(("true", "yes", "on", "y", "enabled"), "true"),
    **dict.fromkeys(("false", "no", "off", "n", "disabled"), "false"),
}
"""Words that people write for a bool."""

_SECTIONS: Final = tuple(dict.fromkeys(path.partition(".")[0] for path in SETTINGS if "." in path))


def policy_from_document(
    text: str,
    source: str,
    base: Policy = DEFAULT,
    *,
    users: Lookup = no_such_name,
    groups: Lookup = no_such_name,
) -> Policy:
    """The policy of a YAML or JSON document: `base`, changed by what the document says.

    `source` is its file. `users` and `groups` find the number of a name. InputError for what is no document;
    InputErrors with all faults of one, each with its line if it is YAML.
    """
    if text.strip(_BLANK) == "null":
        raise InputError("is null", source=source, expected=_A_POLICY)
    documents = read_documents(text, source)
    if len(documents) > 1:
        problem = f"holds {len(documents)} documents"
        raise InputError(problem, source=source, expected="one policy")
    if not documents and text.lstrip(_BLANK).startswith("["):
        raise InputError("is an empty list", source=source, expected=_A_POLICY)
    if not documents:
        # A file that was cut off would else drop every exclusion.
        raise InputError(
            "holds nothing", source=source, expected="a policy, {} for the built-in one"
        )
    return policy_from_fields(documents[0], source, base=base, users=users, groups=groups)


def policy_from_fields(
    document: Any,
    source: str,
    path: str = "",
    *,
    base: Policy = DEFAULT,
    users: Lookup = no_such_name,
    groups: Lookup = no_such_name,
) -> Policy:
    """As `policy_from_document`, of an object that stands at `path` of a document and has been read."""
    draft = Draft(base, Names(users, groups))
    _read_object(document, draft, draft.place(path, source), "")
    return draft.finish()


def policy_to_document(policy: Policy) -> dict[str, Any]:
    """All settings of a policy as plain data, such that `policy_from_document` reads them again."""
    document: dict[str, Any] = {}
    for path, setting in SETTINGS.items():
        section, _, name = path.rpartition(".")
        fields = document.setdefault(section, {}) if section else document
        fields[name] = setting.kind.write(value_of(policy, path))
    return document


def policy_from_consul_config(
    json_text: str,
    base: Policy = DEFAULT,
    *,
    source: str = "redirect-traffic-config",
    users: Lookup = no_such_name,
) -> Policy:
    """The policy of Consul's redirect-traffic-config (sdk/iptables Config): `base`, changed by it.

    InputErrors with all faults.
    """
    draft = Draft(base, Names(users))
    read_consul_config(draft, json_text, draft.place("", source))
    return draft.finish()


def read_consul_config(draft: Draft, json_text: str, place: Place) -> None:
    """Puts what Consul's configuration says into a draft; faults go to `place`.

    It redirects both directions. NetNS and IptablesProvider are Consul's own business.
    """
    raw = _consul_fields(json_text, place)
    if raw is None:
        draft.spoil(*SETTINGS)
        return
    fields: dict[str, Any] = {}
    places: dict[str, Place] = {}
    known = {folded(name): name for name in (*_CONSUL_PATHS, *_CONSUL_OTHERS)}
    strangers = []
    for key, value in raw.items():
        name = known.get(folded(key))
        if name is None:
            strangers.append(key)
        elif value is not None:
            fields[name] = value
            places[name] = place.inside(name)
    _refuse(strangers, place, {}, known.values())
    for path in ("inbound.enabled", "outbound.enabled"):
        draft.put(path, True, place)
    for name, path in _CONSUL_PATHS.items():
        at = places.get(name, place.inside(name))
        value = fields.get(name, "")
        if value in ("", 0) and path in _CONSUL_DEFAULTS:
            draft.put(path, _CONSUL_DEFAULTS[path], at)
        elif value in ("", 0) and path in _CONSUL_REQUIRED:
            at.fault("is missing", _CONSUL_REQUIRED[path])
            draft.spoil(path)
        else:
            draft.read(value, at, path)
    _read_consul_dns(draft, fields, place)


_CONSUL_PATHS: Final[Mapping[str, str]] = {
    "ProxyUserID": "proxy.uids",
    "ProxyInboundPort": "inbound.port",
    "ProxyOutboundPort": "outbound.port",
    "ExcludeInboundPorts": "inbound.exclude_ports",
    "ExcludeOutboundPorts": "outbound.exclude_ports",
    "ExcludeOutboundCIDRs": "outbound.exclude_cidrs",
    "ExcludeUIDs": "outbound.exclude_uids",
}
_CONSUL_OTHERS: Final = ("ConsulDNSIP", "ConsulDNSPort", "NetNS", "IptablesProvider")
_CONSUL_DEFAULTS: Final = {"outbound.port": DEFAULT_OUTBOUND_PORT}
_CONSUL_REQUIRED: Final = {
    "proxy.uids": "the user id of the sidecar",
    "inbound.port": "the port of the inbound listener",
}


def _read_consul_dns(draft: Draft, fields: Mapping[str, Any], place: Place) -> None:
    """Consul: the address alone takes all queries to its port 53; with a port, those to the address go to that port."""
    address, port = fields.get("ConsulDNSIP", ""), fields.get("ConsulDNSPort", 0)
    draft.put("dns.enabled", bool(address or port), place)
    if not address and not port:
        return
    at = place.inside("ConsulDNSIP")
    if address:
        draft.read(address, at, "dns.addresses")
    else:
        draft.put("dns.addresses", Dns().addresses, at)
    if not port:
        draft.put("dns.port", _DNS_PORT, at)
        draft.put("dns.resolvers", (), at)
        return
    draft.read(port, place.inside("ConsulDNSPort"), "dns.port")
    draft.put("dns.resolvers", draft.value("dns.addresses"), at)


def _consul_fields(json_text: str, place: Place) -> Mapping[str, Any] | None:
    """The object of a JSON text, None when there is none (and `place` knows why)."""
    expected = "Consul's redirect configuration, a JSON object"
    if not json_text.lstrip(_BLANK).startswith("{"):
        place.fault(f"{described(clipped(json_text))} is not a JSON object", expected)
        return None
    try:
        (document,) = read_documents(json_text, "")
    except InputError as error:
        where = f"{error.field}: " if error.field else ""
        place.fault(f"{where}{error.problem}", error.expected)
        return None
    return document


def _read_object(raw: Any, draft: Draft, place: Place, section: str) -> None:
    """Reads the settings of a section; "" for the whole document."""
    prefix = f"{section}." if section else ""
    known = [path.removeprefix(prefix) for path in SETTINGS if path.rpartition(".")[0] == section]
    sections = () if section else _SECTIONS
    fields = as_object(raw, place, _instead_of(raw, section))
    strangers = []
    for key, value in fields.items():
        at = place.inside(key, line_of(fields, key))
        if key in sections:
            if value is not None:
                _read_object(value, draft, at, key)
        elif key in known:
            draft.read(value, at, f"{prefix}{key}")
        else:
            strangers.append(key)
    _refuse(strangers, place, fields, [*sections, *known])


def _instead_of(raw: Any, section: str) -> str:
    """What would be right for a section: its switch if a word for one stands there, and it has one."""
    switch = _SWITCHES.get(str(raw).lower()) if isinstance(raw, bool | str) else None
    if switch is None or f"{section}.enabled" not in SETTINGS:
        return "fields in { }"
    return f"{section}: {{enabled: {switch}}}"


def _refuse(
    strangers: list[str], place: Place, fields: Mapping[str, Any], known: Iterable[str]
) -> None:
    words = list(known)
    for key in strangers[:MAX_FAULTS]:
        at = place.inside(as_name(key), line_of(fields, key))
        at.fault("is not a field here", nearest(clipped(key), words))
    if len(strangers) > MAX_FAULTS:
        rest = place._replace(line=line_of(fields, strangers[MAX_FAULTS]) or place.line)
        rest.fault(f"and {len(strangers) - MAX_FAULTS} more fields that do not exist")
