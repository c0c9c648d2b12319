"""Every setting of a policy, once: its place in the policy, how its value is read and written, tidegate's annotation.

Annotations and documents are read by this table. A Draft collects what they say, from wherever they say it, and
becomes a policy when all is said: what contradicts on the way there is not looked at.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from tidegate.errors import InputError, InputErrors
from tidegate.intent import policy_parsing as parsing
from tidegate.intent.fields import FaultOnLine, Place, described
from tidegate.intent.network_text import canonical_address, canonical_network
from tidegate.intent.policy import (
    MAX_FAULTS,
    MAX_ITEMS,
    Contradiction,
    Mark,
    Policy,
    PortRange,
    not_too_many,
)
from tidegate.intent.policy_parsing import Names

ALL: Final = "all"
NO_FAMILY: Final = "names no family, and would so take all rules away"
_ALL_WORDS = frozenset({ALL, "*"})

T = TypeVar("T")
Parse = Callable[[str, Names], T]


class FaultyError(Exception):
    """A value cannot be read; why has been told to the place."""


class Kind(Protocol):
    """How a value is written."""

    def read(self, raw: Any, place: Place, names: Names) -> Any:
        """The value of a text, or of what YAML and JSON have for it. FaultyError when there is none."""

    def write(self, value: Any) -> Any:
        """What `read` takes, as plain data."""


class One(Generic[T]):
    """A single value."""

    def __init__(self, parse: Parse[T], write: Callable[[T], Any] = str) -> None:
        self._parse = parse
        self.write = write

    def read(self, raw: Any, place: Place, names: Names) -> T:
        try:
            return self._parse(_text(raw), names)
        except InputError as error:
            place.fault(error.problem, error.expected)
            raise FaultyError from error


class Flag(One[bool]):
    """A bool, or a word for one."""

    def __init__(self) -> None:
        super().__init__(lambda text, _: parsing.parse_bool(text), bool)

    def read(self, raw: Any, place: Place, names: Names) -> bool:
        return raw if isinstance(raw, bool) else super().read(raw, place, names)


class Many(Generic[T]):
    """A list, or a text with separators. Items are trimmed, empty ones do not count."""

    def __init__(
        self, parse: Parse[T], write: Callable[[T], Any] = str, *, separator: str = ","
    ) -> None:
        self._parse = parse
        self._write = write
        self._separator = separator

    def read(self, raw: Any, place: Place, names: Names) -> tuple[T, ...] | None:
        items = self._items(raw, place)
        if len(items) > MAX_ITEMS:
            place.fault(f"the list has {len(items)} items", f"at most {MAX_ITEMS}")
            raise FaultyError
        values: list[T] = []
        found: list[InputError] = []
        for item, at in items:
            try:
                values.append(self._parse(_text(item), names))
            except InputError as error:
                at._replace(faults=found).fault(error.problem, error.expected)
        if found:
            told = not_too_many(found)
            place.faults.extend(told[:MAX_FAULTS])
            for rest in told[MAX_FAULTS:]:
                place.fault(rest.problem)
            raise FaultyError
        return tuple(values)

    def write(self, value: tuple[T, ...] | None) -> Any:
        return [self._write(item) for item in value or ()]

    def _items(self, raw: Any, place: Place) -> list[tuple[Any, Place]]:
        if isinstance(raw, str):
            texts = [text.strip() for text in raw.split(self._separator)]
            return [(text, place) for text in texts if text]
        if isinstance(raw, list):
            items = [(item, place.element(index)) for index, item in enumerate(raw)]
            return [(item, at) for item, at in items if not _is_blank(item)]
        return [(raw, place)]


class Some(Many[T]):
    """As Many, but at least one."""

    def __init__(self, parse: Parse[T], *, nothing: str, expected: str) -> None:
        """`nothing` is what is wrong with an empty list, `expected` what would be right."""
        super().__init__(parse)
        self._nothing = nothing
        self._expected = expected

    def read(self, raw: Any, place: Place, names: Names) -> tuple[T, ...] | None:
        values = super().read(raw, place, names)
        if not values:
            place.fault(self._nothing, self._expected)
            raise FaultyError
        return values


class ManyOrAll(Many[T]):
    """As Many; `all` or * is None."""

    def read(self, raw: Any, place: Place, names: Names) -> tuple[T, ...] | None:
        if isinstance(raw, str) and raw.strip() in _ALL_WORDS:
            return None
        return super().read(raw, place, names)

    def write(self, value: tuple[T, ...] | None) -> Any:
        return ALL if value is None else super().write(value)


def _is_blank(raw: Any) -> bool:
    return isinstance(raw, str) and not raw.strip()


def _text(raw: Any) -> str:
    if isinstance(raw, str):
        return raw.strip()
    if isinstance(raw, int) and not isinstance(raw, bool):
        return str(raw)
    raise InputError(f"{described(raw)} stands where a value should", expected="text or a number")


def _span(span: Any) -> int | str:
    return int(span.first) if span.first == span.last else str(span)


def _mark(mark: Mark | None) -> str:
    return "none" if mark is None else f"{mark.value:#x}/{mark.mask:#x}"


def _port_item(text: str, names: Names) -> PortRange:
    return parsing.parse_port_range(text)


def _network_item(text: str, names: Names) -> str:
    return canonical_network(text)


def _host_item(text: str, names: Names) -> str:
    return canonical_network(canonical_address(text.removesuffix("/32").removesuffix("/128")))


def _address_item(text: str, names: Names) -> str:
    return canonical_address(text)


def _interface_item(text: str, names: Names) -> str:
    return parsing.parse_interface(text)


_FLAG = Flag()
_PORT: Final = One(lambda text, _: parsing.parse_port(text), int)
_PORTS: Final = Many(_port_item, _span)
_NETWORKS: Final = Many(_network_item)
_INTERFACES: Final = Many(_interface_item)
_ADDRESSES: Final = Many(_address_item)
_USERS: Final = Many(lambda text, names: parsing.parse_uid(text, names.users), int)
_GROUPS: Final = Many(lambda text, names: parsing.parse_gid(text, names.groups), int)
_USER_RANGES: Final = Many(lambda text, names: parsing.parse_id_range(text, names.users), _span)
_GROUP_RANGES: Final = Many(lambda text, names: parsing.parse_gid_range(text, names.groups), _span)
_USER_PORTS: Final = Many(
    lambda text, names: parsing.parse_user_ports(text, names.users),
    parsing.user_ports_text,
    separator=";",
)


class Setting(NamedTuple):
    """One setting."""

    path: str
    """Where it is in a Policy, and in a document."""
    kind: Kind
    annotation: str
    """The end of tidegate's annotation for it; "" where annotations say it otherwise, or may not say it."""


SETTINGS: Final[Mapping[str, Setting]] = {
    setting.path: setting
    for setting in (
        Setting("proxy.uids", _USERS, "proxy-uids"),
        Setting("proxy.gids", _GROUPS, "proxy-gids"),
        Setting(
            "proxy.mark",
            One(lambda text, _: parsing.parse_optional_mark(text), _mark),
            "proxy-mark",
        ),
        Setting("proxy.cgroup", One(lambda text, _: parsing.parse_cgroup(text)), "proxy-cgroup"),
        Setting("proxy.self_calls_inbound", _FLAG, "self-calls-inbound"),
        Setting("inbound.enabled", _FLAG, "redirect-inbound"),
        Setting("inbound.port", _PORT, "inbound-port"),
        Setting("inbound.include_ports", ManyOrAll(_port_item, _span), "include-inbound-ports"),
        Setting("inbound.exclude_ports", _PORTS, "exclude-inbound-ports"),
        Setting("inbound.exclude_cidrs", _NETWORKS, "exclude-inbound-cidrs"),
        Setting(
            "inbound.include_interfaces", ManyOrAll(_interface_item), "include-inbound-interfaces"
        ),
        Setting("inbound.exclude_interfaces", _INTERFACES, "exclude-inbound-interfaces"),
        Setting("inbound.direct_probes", _FLAG, "direct-probes"),
        Setting("inbound.node_addresses", Many(_host_item), ""),
        Setting("outbound.enabled", _FLAG, "redirect-outbound"),
        Setting("outbound.port", _PORT, "outbound-port"),
        Setting("outbound.include_cidrs", ManyOrAll(_network_item), "include-outbound-cidrs"),
        Setting("outbound.include_ports", _PORTS, "include-outbound-ports"),
        Setting("outbound.exclude_ports", _PORTS, "exclude-outbound-ports"),
        Setting("outbound.exclude_cidrs", _NETWORKS, "exclude-outbound-cidrs"),
        Setting("outbound.exclude_uids", _USER_RANGES, "exclude-uids"),
        Setting("outbound.exclude_gids", _GROUP_RANGES, "exclude-gids"),
        Setting("outbound.exclude_user_ports", _USER_PORTS, "exclude-user-ports"),
        Setting(
            "outbound.include_interfaces", ManyOrAll(_interface_item), "include-outbound-interfaces"
        ),
        Setting("outbound.exclude_interfaces", _INTERFACES, "exclude-outbound-interfaces"),
        Setting("outbound.wait_for_sidecar", _FLAG, "wait-for-sidecar"),
        Setting("dns.enabled", _FLAG, ""),
        Setting("dns.resolvers", _ADDRESSES, ""),
        Setting("dns.addresses", _ADDRESSES, ""),
        Setting("dns.port", _PORT, ""),
        Setting(
            "families",
            Some(
                lambda text, _: parsing.parse_family(text),
                nothing=NO_FAMILY,
                expected="ipv4, ipv6 or both",
            ),
            "families",
        ),
        Setting("mode", One(lambda text, _: parsing.parse_mode(text)), "mode"),
        Setting("drop_invalid", _FLAG, "drop-invalid"),
    )
}
"""By path, in the order of the structs."""


class Draft:
    """A policy that is being put together. The later value of a setting wins."""

    def __init__(self, base: Policy, names: Names) -> None:
        self.names = names
        self.faults: list[InputError] = []
        """What is wrong with the values themselves; a Place of this draft has this list."""
        self._base = base
        self._values: dict[str, Any] = {}
        self._places: dict[str, Place] = {}
        self._spoilt: set[str] = set()
        self._of_base: list[InputError] = []
        """Contradictions within the base, which have no place in the input."""

    def place(self, name: str, source: str = "") -> Place:
        """A place in an input, whose faults are this draft's."""
        return Place(self.faults, source, name)

    def value(self, path: str) -> Any:
        """What a setting is so far."""
        return self._values[path] if path in self._values else value_of(self._base, path)

    def place_of(self, path: str) -> Place | None:
        """Where a setting was said, None where it is the base's."""
        return self._places.get(path)

    def put(self, path: str, value: Any, place: Place) -> None:
        """Sets a setting, as said at `place`."""
        self._values[path] = value
        self._places[path] = place

    def read(self, raw: Any, place: Place, path: str, *others: str) -> Any:
        """Reads a value for a setting, and for others of its kind, and sets them.

        A faulty value is told and leaves them as they are; the result is then None.
        """
        try:
            value = SETTINGS[path].kind.read(raw, place, self.names)
        except FaultyError:
            self._spoilt.update((path, *others))
            return None
        for each in (path, *others):
            self.put(each, value, place)
        return value

    def spoil(self, *paths: str) -> None:
        """Tells that what was said about these settings could not be read."""
        self._spoilt.update(paths)

    def finish(self) -> Policy:
        """The policy. InputErrors with all faults, and all contradictions between what could be read, by line."""
        try:
            policy = self._made()
        except InputErrors as error:
            for fault in error.faults:
                self.contradict(fault)
        faults = [*sorted(self.faults, key=_line), *self._of_base]
        if faults:
            raise InputErrors(tuple(faults))
        return policy

    def _made(self) -> Policy:
        base = self._base
        if not self._values:
            return base
        parts: dict[str, dict[str, Any]] = {
            "": {},
            "proxy": {},
            "inbound": {},
            "outbound": {},
            "dns": {},
        }
        for path, value in self._values.items():
            section, _, name = path.rpartition(".")
            parts[section][name] = value
        replace = msgspec.structs.replace
        return replace(
            base,
            proxy=replace(base.proxy, **parts["proxy"]),
            inbound=replace(base.inbound, **parts["inbound"]),
            outbound=replace(base.outbound, **parts["outbound"]),
            dns=replace(base.dns, **parts["dns"]),
            **parts[""],
        )

    def contradict(self, fault: InputError) -> None:
        """Tells a fault in the fields of a policy at the place that said the first of them that anything said."""
        fields = fault.fields if isinstance(fault, Contradiction) else (fault.field,)
        if self._spoilt.intersection(fields):
            # It may well be a contradiction only because a value could not be read.
            return
        said = [self._places[field] for field in fields if field in self._places]
        if said:
            said[0].fault(fault.problem, fault.expected)
        else:
            self._of_base.append(fault)


def _line(fault: InputError) -> int:
    return fault.line if isinstance(fault, FaultOnLine) else 0


def value_of(policy: Policy, path: str) -> Any:
    """The value of a setting."""
    value: Any = policy
    for name in path.split("."):
        value = getattr(value, name)
    return value
