"""IP sets of the current network namespace, over netlink: sets of ports and of networks.

A rule of the legacy tables asks a set by its index and costs one look-up, however much the set holds. Which sets
there should be, and what for, is not known here.
"""

import contextlib
import enum
import errno
import functools
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
from pyroute2.netlink.nfnetlink.ipset import (
    IPSET_CMD_ADD,
    IPSET_CMD_DESTROY,
    IPSET_CMD_LIST,
    ipset_msg,
)

from tidegate.kernel import netns, nfnetlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import NETLINK_NETFILTER, Netlink
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

    @property
    def size(self) -> int:
        """How many ports or networks it holds."""
        return _ports(self.entries) if self.kind is Kind.PORTS else len(self.entries)


@functools.lru_cache(maxsize=64)
def _ports(ranges: tuple[str, ...]) -> int:
    spans = (ports.partition("-") for ports in ranges)
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


class Found(msgspec.Struct, frozen=True):
    """A set as the kernel has it, without what it holds."""

    name: str
    index: int
    """What rules call it by."""
    kind: Kind | None
    """None for one of another kind than those above."""
    in_use: bool
    """Whether a rule or another set asks it."""


# linux/netfilter/ipset/ip_set.h: of commands, then of IPSET_ATTR_ADT and below
_IPSET_ATTR_PROTOCOL = 1
_IPSET_ATTR_SETNAME = 2
_IPSET_ATTR_TYPENAME = 3
_IPSET_ATTR_FAMILY = 5
_IPSET_ATTR_FLAGS = 6
_IPSET_ATTR_DATA = 7
_IPSET_ATTR_ADT = 8
_IPSET_ATTR_INDEX = 11
_IPSET_FLAG_LIST_HEADER = 1 << 2
_IPSET_ATTR_IP = 1
_IPSET_ATTR_IPADDR = {4: 1, 6: 2}
_IPSET_ATTR_CIDR = 3
_IPSET_ATTR_PORT = 4
_IPSET_ATTR_PORT_TO = 5
_IPSET_ATTR_REFERENCES = 25
_IPSET_ERR_BUSY = 4100
# linux/netlink.h, linux/netfilter/nfnetlink.h
_NLA_F_NESTED = 1 << 15
_NLA_F_NET_BYTEORDER = 1 << 14
_PORT = struct.Struct("!H")
_ADD = IPSET_CMD_ADD | NFNL_SUBSYS_IPSET << 8
_DESTROY = IPSET_CMD_DESTROY | NFNL_SUBSYS_IPSET << 8
_PROTOCOL = 7
"""IPSET_PROTOCOL: the one that tells a set's index, since Linux 4.20."""
_ENTRIES_PER_MESSAGE = 1000
"""An attribute has at most 64 KiB; an entry of the largest kind takes 36 bytes."""
_MOST_HEADS_BYTES = 2**18
"""How much of a listing without entries is read: about 2,000 sets, 20 ms."""
_MOST_TOLD_BYTES = 64
"""More than an entry takes in a listing."""
_SPARE_BYTES = 2**16
"""More than a set's head takes, and a part of a listing that is read too far."""

_T = TypeVar("_T")


_ASKED = struct.pack("=BBH", socket.AF_INET, 0, 0) + attribute(
    _IPSET_ATTR_PROTOCOL, bytes([_PROTOCOL])
)
"""What a message that goes to the kernel begins with (struct nfgenmsg, and which protocol this is)."""
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

    Only the first 2,000 sets of a namespace, whatever their names, are looked at: anybody can make 65,000.
    KernelError when they cannot be read.
    """
    heads: dict[str, Found] = {}
    with _conversation(_MOST_HEADS_BYTES) as kernel, contextlib.suppress(nfnetlink.Enough):
        for head in map(_Part.read, _dump(kernel, _HEADS_ONLY)):
            if head.name.startswith(prefix):
                heads[head.name] = head.found
    return tuple(heads[name] for name in sorted(heads))


def find(names: Iterable[str]) -> dict[str, Found]:
    """The sets of these names, as far as they are there. KernelError when they cannot be read."""
    heads = {}
    with _conversation() as kernel:
        for name in names:
            asked = _HEADS_ONLY + nfnetlink.text_attribute(_IPSET_ATTR_SETNAME, name)
            for part in _dump(kernel, asked):
                heads[name] = _Part.read(part).found
    return heads


def content(one: Found, most: int) -> Set | None:
    """What a set holds, of which so many ports or networks are read, and not many more.

    None when that is no Set: it is of another kind, holds too much, something else is said about its entries (that they
    end some time, or are exceptions), or it has gone meanwhile. KernelError when it cannot be read.
    """
    if one.kind is None:
        return None
    asked = nfnetlink.text_attribute(_IPSET_ATTR_SETNAME, one.name)
    try:
        with _conversation(_SPARE_BYTES + most * _MOST_TOLD_BYTES) as kernel:
            parts = [_Part.read(part) for part in _dump(kernel, asked)]
    except nfnetlink.Enough:
        return None
    if [part.kind for part in parts if part.type] != [one.kind]:
        return None
    entries = [
        dict(attributes_in(entry)) for part in parts for _, entry in attributes_in(part.entries)
    ]
    if not set[int]().union(*entries) <= _TOLD[one.kind]:
        return None
    return Set(one.name, one.kind, tuple(_entries(one.kind, entries)))


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


def destroy(names: Iterable[str]) -> tuple[str, ...]:
    """Remove these sets, as far as they are there; those stay, and are returned, that a rule asks. KernelError."""
    doomed = tuple(names)
    kept = []
    # There may be thousands, and a message of pyroute2's costs 0.3 ms; here it is 0.01 ms.
    with Netlink(NETLINK_NETFILTER, "destroy IP sets") as kernel:
        for name in doomed:
            try:
                kernel.ask(_DESTROY, _ASKED + nfnetlink.text_attribute(_IPSET_ATTR_SETNAME, name))
            except KernelError as error:
                # Not every kernel says that a set is not there.
                if error.errno == _IPSET_ERR_BUSY:
                    kept.append(name)
                elif error.errno != errno.ENOENT and error.errno not in nfnetlink.NO_SUBSYSTEM:
                    raise
    return tuple(kept)


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
    references: int
    entries: bytes

    @classmethod
    def read(cls, message: bytes) -> Self:
        told = dict(attributes_in(message))
        head = dict(attributes_in(told.get(_IPSET_ATTR_DATA, b"")))
        return cls(
            name=told.get(_IPSET_ATTR_SETNAME, b"").rstrip(b"\0").decode(errors="replace"),
            index=int.from_bytes(told.get(_IPSET_ATTR_INDEX, b""), "big"),
            type=told.get(_IPSET_ATTR_TYPENAME, b"").rstrip(b"\0"),
            family=int.from_bytes(told.get(_IPSET_ATTR_FAMILY, b""), "big"),
            references=int.from_bytes(head.get(_IPSET_ATTR_REFERENCES, b""), "big"),
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

    @property
    def found(self) -> Found:
        return Found(self.name, self.index, self.kind, in_use=self.references > 0)


def _conversation(most: int = nfnetlink.MOST_BYTES) -> Conversation:
    return Conversation(nfnetlink.SUBSYSTEM_IPSET, socket.AF_INET, "IP sets", most)


def _dump(kernel: Conversation, asked: bytes) -> Iterator[bytes]:
    """The messages of a listing, as attributes."""
    protocol = attribute(_IPSET_ATTR_PROTOCOL, bytes([_PROTOCOL]))
    try:
        for answer in kernel.dump(IPSET_CMD_LIST, protocol + asked):
            yield answer.attributes
    except KernelError as error:
        if error.errno not in nfnetlink.NO_SUBSYSTEM:
            raise


_TOLD = {
    Kind.PORTS: {_IPSET_ATTR_PORT},
    Kind.IPV4_NETWORKS: {_IPSET_ATTR_IP, _IPSET_ATTR_CIDR},
    Kind.IPV6_NETWORKS: {_IPSET_ATTR_IP, _IPSET_ATTR_CIDR},
}
"""What is told of an entry that is nothing but a port or a network."""


def _entries(kind: Kind, told: Iterable[dict[int, bytes]]) -> Iterator[str]:
    if kind is Kind.PORTS:
        yield from _merged(sorted(int.from_bytes(one[_IPSET_ATTR_PORT], "big") for one in told))
    else:
        yield from map(str, sorted(map(_unpacked_network, told)))


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
