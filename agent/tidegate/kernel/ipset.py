"""IP sets of the current network namespace, over netlink: sets of ports and of networks.

A rule of the legacy tables asks a set by its index and costs one look-up, however much the set holds. Which sets
there should be, and what for, is not known here.
"""

import enum
import errno
import ipaddress
import itertools
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Self, TypeVar, assert_never

import msgspec
from pyroute2 import IPSet, NetlinkError
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_IPSET, nfgen_msg
from pyroute2.netlink.nfnetlink.ipset import IPSET_CMD_ADD, IPSET_CMD_LIST, ipset_msg

from tidegate.kernel import netns, nfnetlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.nfnetlink import Conversation, attribute, attributes_in

MAX_NAME = 31
"""Most characters of a set's name (IPSET_MAXNAMELEN of linux/netfilter/ipset/ip_set.h, less its end)."""


class Kind(enum.StrEnum):
    """What a set holds, in the words of ipset(8) behind a set's name."""

    PORTS = "bitmap:port range 0-65535"
    """TCP and UDP ports."""
    IPV4_NETWORKS = "hash:net family inet"
    """Networks but 0.0.0.0/0."""
    IPV6_NETWORKS = "hash:net family inet6"
    """Networks but ::/0."""


class Set(msgspec.Struct, frozen=True):
    """One set and all of its content."""

    name: str
    kind: Kind
    entries: tuple[str, ...]
    """Ports and ranges of ports such as 8000-8010, sorted and merged; or networks in canonical form, sorted."""


class Found(msgspec.Struct, frozen=True):
    """A set as the kernel has it."""

    name: str
    index: int
    """What rules call it by."""
    set: Set | None
    """None for one of another kind than those above."""


# linux/netfilter/ipset/ip_set.h: of commands, then of IPSET_ATTR_ADT and below
_IPSET_ATTR_PROTOCOL = 1
_IPSET_ATTR_SETNAME = 2
_IPSET_ATTR_TYPENAME = 3
_IPSET_ATTR_FAMILY = 5
_IPSET_ATTR_FLAGS = 6
_IPSET_ATTR_ADT = 8
_IPSET_ATTR_INDEX = 11
_IPSET_FLAG_LIST_HEADER = 1 << 2
_IPSET_ATTR_IP = 1
_IPSET_ATTR_IPADDR = {4: 1, 6: 2}
_IPSET_ATTR_CIDR = 3
_IPSET_ATTR_PORT = 4
_IPSET_ATTR_PORT_TO = 5
_IPSET_ATTR_DATA = 7
# linux/netlink.h, linux/netfilter/nfnetlink.h
_NLA_F_NESTED = 1 << 15
_NLA_F_NET_BYTEORDER = 1 << 14
_PORT = struct.Struct("!H")
_ADD = IPSET_CMD_ADD | NFNL_SUBSYS_IPSET << 8
_PROTOCOL = 7
"""IPSET_PROTOCOL: the one that tells a set's index, since Linux 4.20."""
_ENTRIES_PER_MESSAGE = 1000
"""An attribute has at most 64 KiB; an entry of the largest kind takes 36 bytes."""

_T = TypeVar("_T")


_HEADS_ONLY = attribute(
    _IPSET_ATTR_FLAGS | _NLA_F_NET_BYTEORDER, _IPSET_FLAG_LIST_HEADER.to_bytes(4, "big")
)


class _Message(nfgen_msg):  # type: ignore[misc]
    """pyroute2's ipset_msg, with the entries as bytes: it takes 0.1 ms to encode one, and there may be thousands."""

    nla_map = tuple(
        (name, "cdata", _NLA_F_NESTED) if kind in ("attr_adt", "get_data_type") else (name, kind)
        for name, kind in ipset_msg.nla_map
    )


def is_available() -> bool:
    """Whether the kernel has sets of all kinds; finds out in a namespace of its own. Needs CAP_SYS_ADMIN.

    KernelError when that cannot be told.
    """

    def make() -> bool:
        try:
            create([Set(kind.name.lower(), kind, ()) for kind in Kind])
        except KernelError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise
            return False
        return True

    return netns.run_in_new(make)


def found(prefix: str) -> tuple[Found, ...]:
    """The sets whose names begin with `prefix`, sorted by name. () where the kernel knows no sets.

    KernelError when they cannot be read, or hold more than 16 MiB altogether.
    """
    with _conversation() as kernel:
        heads = [_Part.read(part) for part in _dump(kernel, _HEADS_ONLY)]
    names = sorted({head.name for head in heads if head.name.startswith(prefix)})
    return tuple(one for name in names if (one := _one(name)) is not None)


def create(wanted: Iterable[Set]) -> None:
    """Make these sets, with their content. KernelError when one is refused; those before it stay."""
    missing = tuple(wanted)
    if not missing:
        # A socket of pyroute2's costs milliseconds.
        return
    with _opened() as sets:
        for one in missing:
            if sets is None:
                raise KernelError("the kernel has no IP sets", errno.EPROTONOSUPPORT)
            _create(sets, one)
            for at in range(0, len(one.entries), _ENTRIES_PER_MESSAGE):
                _add(sets, one, one.entries[at : at + _ENTRIES_PER_MESSAGE])


def swap(name: str, other: str) -> None:
    """Let two sets of one kind change places, for the rules that ask them too: in one step. KernelError."""
    with _opened() as sets:
        _checked(f"swap the sets {name} and {other}", sets.swap, name, other)


def destroy(names: Iterable[str]) -> None:
    """Remove these sets. KernelError when one is not there, or a rule asks it."""
    doomed = tuple(names)
    if not doomed:
        return
    with _opened() as sets:
        for name in doomed:
            _checked(f"destroy the set {name}", sets.destroy, name)


@contextmanager
def _opened() -> Iterator[Any]:
    """A socket of pyroute2's; None where the kernel has no part for sets."""
    try:
        sets = IPSet()
    except NetlinkError as error:
        if error.code not in nfnetlink.NO_SUBSYSTEM:
            raise _refusal("ask for IP sets", error) from error
        yield None
        return
    with closing(sets):
        yield sets


def _create(sets: Any, one: Set) -> None:
    what = f"create the set {one.name}"
    match one.kind:
        case Kind.PORTS:
            _checked(what, sets.create, one.name, "bitmap:port", bitmap_ports_range=(0, 65535))
        case Kind.IPV4_NETWORKS:
            _checked(what, sets.create, one.name, "hash:net", socket.AF_INET)
        case Kind.IPV6_NETWORKS:
            _checked(what, sets.create, one.name, "hash:net", socket.AF_INET6)
        case _:
            assert_never(one.kind)


def _add(sets: Any, one: Set, entries: tuple[str, ...]) -> None:
    pack = _packed_ports if one.kind is Kind.PORTS else _packed_network
    message = _Message()
    message["nfgen_family"] = socket.AF_INET
    message["attrs"] = [
        ["IPSET_ATTR_PROTOCOL", _PROTOCOL],
        ["IPSET_ATTR_SETNAME", one.name],
        # The kernel wants to have somewhere to tell the number of the entry that it refuses.
        ["IPSET_ATTR_LINENO", 0],
        ["IPSET_ATTR_ADT", b"".join(map(pack, entries))],
    ]
    flags = NLM_F_REQUEST | NLM_F_ACK
    _checked(f"fill the set {one.name}", _exchanged, sets, message, _ADD, flags)


def _exchanged(sets: Any, message: _Message, kind: int, flags: int) -> list[Any]:
    return list(sets.nlm_request(message, kind, flags))


def _checked(what: str, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    try:
        return function(*args, **kwargs)
    except NetlinkError as error:
        raise _refusal(what, error) from error


def _refusal(what: str, error: NetlinkError) -> KernelError:
    return KernelError(f"cannot {what}: {error.args[1]}", error.code)


def _packed_ports(ports: str) -> bytes:
    first, _, last = ports.partition("-")
    numbers = ((_IPSET_ATTR_PORT, int(first)), (_IPSET_ATTR_PORT_TO, int(last or first)))
    packed = (attribute(kind | _NLA_F_NET_BYTEORDER, _PORT.pack(port)) for kind, port in numbers)
    return attribute(_IPSET_ATTR_DATA | _NLA_F_NESTED, b"".join(packed))


def _packed_network(network: str) -> bytes:
    parsed = ipaddress.ip_network(network)
    kind = _IPSET_ATTR_IPADDR[parsed.version] | _NLA_F_NET_BYTEORDER
    address = attribute(kind, parsed.network_address.packed)
    content = attribute(_IPSET_ATTR_IP | _NLA_F_NESTED, address)
    content += attribute(_IPSET_ATTR_CIDR, bytes([parsed.prefixlen]))
    return attribute(_IPSET_ATTR_DATA | _NLA_F_NESTED, content)


class _Part(msgspec.Struct, frozen=True):
    """What one message of a listing tells about a set; a large one comes in several, of which the first has a head."""

    name: str
    index: int
    type: bytes
    family: int
    entries: bytes

    @classmethod
    def read(cls, message: bytes) -> Self:
        told = dict(attributes_in(message))
        return cls(
            name=told.get(_IPSET_ATTR_SETNAME, b"").rstrip(b"\0").decode(errors="replace"),
            index=int.from_bytes(told.get(_IPSET_ATTR_INDEX, b""), "big"),
            type=told.get(_IPSET_ATTR_TYPENAME, b"").rstrip(b"\0"),
            family=int.from_bytes(told.get(_IPSET_ATTR_FAMILY, b""), "big"),
            entries=told.get(_IPSET_ATTR_ADT, b""),
        )

    @property
    def kind(self) -> Kind | None:
        match self.type, self.family:
            case b"bitmap:port", _:
                return Kind.PORTS
            case b"hash:net", socket.AF_INET:
                return Kind.IPV4_NETWORKS
            case b"hash:net", socket.AF_INET6:
                return Kind.IPV6_NETWORKS
            case _:
                return None


def _conversation() -> Conversation:
    return Conversation(nfnetlink.SUBSYSTEM_IPSET, socket.AF_INET, "IP sets")


def _one(name: str) -> Found | None:
    """A set; None when it has gone meanwhile."""
    with _conversation() as kernel:
        asked = nfnetlink.text_attribute(_IPSET_ATTR_SETNAME, name)
        parts = [_Part.read(part) for part in _dump(kernel, asked)]
    head = next((part for part in parts if part.type), None)
    if head is None:
        return None
    if head.kind is None:
        return Found(name, head.index, None)
    entries = _entries(head.kind, (part.entries for part in parts))
    return Found(name, head.index, Set(name, head.kind, entries))


def _dump(kernel: Conversation, asked: bytes) -> Iterator[bytes]:
    """The messages of a listing, as attributes."""
    protocol = attribute(_IPSET_ATTR_PROTOCOL, bytes([_PROTOCOL]))
    try:
        for answer in kernel.dump(IPSET_CMD_LIST, protocol + asked):
            yield answer.attributes
    except KernelError as error:
        if error.errno not in nfnetlink.NO_SUBSYSTEM:
            raise
    except nfnetlink.Enough as error:
        problem = f"the IP sets hold more than {nfnetlink.MOST_BYTES >> 20} MiB"
        raise KernelError(problem, errno.E2BIG) from error


def _entries(kind: Kind, contents: Iterable[bytes]) -> tuple[str, ...]:
    data = (
        dict(attributes_in(entry)) for content in contents for _, entry in attributes_in(content)
    )
    if kind is Kind.PORTS:
        ports = sorted(int.from_bytes(entry[_IPSET_ATTR_PORT], "big") for entry in data)
        return tuple(_merged(ports))
    networks = sorted(_unpacked_network(entry) for entry in data)
    return tuple(str(network) for network in networks)


def _unpacked_network(
    entry: dict[int, bytes],
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    ((_, address),) = attributes_in(entry[_IPSET_ATTR_IP])
    most = 8 * len(address)
    prefix = entry[_IPSET_ATTR_CIDR][0] if _IPSET_ATTR_CIDR in entry else most
    return ipaddress.ip_network((address, prefix))


def _merged(ports: list[int]) -> Iterator[str]:
    """Sorted ports as ranges that do not touch each other."""
    for _, run in itertools.groupby(enumerate(ports), lambda item: item[1] - item[0]):
        members = [port for _, port in run]
        yield str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
