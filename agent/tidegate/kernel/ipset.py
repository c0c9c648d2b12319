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
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import msgspec

from tidegate.kernel import netns, nfnetlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    MOST_BYTES,
    NLA_F_NESTED,
    NLA_F_NET_BYTEORDER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Enough,
    attribute,
    attributes_in,
    number_of,
    text_attribute,
    text_of,
)
from tidegate.kernel.nfnetlink import Conversation

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


# linux/netfilter/ipset/ip_set.h: commands, their attributes, then those of IPSET_ATTR_DATA
_IPSET_CMD_CREATE = 2
_IPSET_CMD_DESTROY = 3
_IPSET_CMD_SWAP = 6
_IPSET_CMD_LIST = 7
_IPSET_CMD_ADD = 9
_IPSET_CMD_TYPE = 13
_IPSET_ATTR_PROTOCOL = 1
_IPSET_ATTR_SETNAME = 2
_IPSET_ATTR_TYPENAME = 3
_IPSET_ATTR_SETNAME2 = 3
_IPSET_ATTR_REVISION = 4
_IPSET_ATTR_FAMILY = 5
_IPSET_ATTR_FLAGS = 6
_IPSET_ATTR_DATA = 7
_IPSET_ATTR_ADT = 8
_IPSET_ATTR_LINENO = 9
_IPSET_ATTR_INDEX = 11
_IPSET_FLAG_LIST_HEADER = 1 << 2
_IPSET_ATTR_IP = 1
_IPSET_ATTR_IPADDR = {4: 1, 6: 2}
_IPSET_ATTR_CIDR = 3
_IPSET_ATTR_PORT = 4
_IPSET_ATTR_PORT_TO = 5
_IPSET_ATTR_REFERENCES = 25
_IPSET_ERR_BUSY = 4100
_REASONS = {
    4099: "there are as many sets as there can be",
    _IPSET_ERR_BUSY: "a rule or another set asks it",
    4102: "they are of different types",
}
"""What IPSET_ERR_* mean, for which the C library has no words."""
_PORT = struct.Struct("!H")
_READ = "read IP sets"
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

_OF_PROTOCOL = attribute(_IPSET_ATTR_PROTOCOL, bytes([_PROTOCOL]))
"""What every message to the kernel begins with."""
_HEADS_ONLY = attribute(
    _IPSET_ATTR_FLAGS | NLA_F_NET_BYTEORDER, _IPSET_FLAG_LIST_HEADER.to_bytes(4, "big")
)


class _Made(NamedTuple):
    """What a set is created as."""

    type: str
    family: int
    data: bytes = b""


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
    with _conversation(_READ, _MOST_HEADS_BYTES) as kernel, contextlib.suppress(Enough):
        for head in map(_Part.read, _dump(kernel, _HEADS_ONLY)):
            if head.name.startswith(prefix):
                heads[head.name] = head.found
    return tuple(heads[name] for name in sorted(heads))


def find(names: Iterable[str]) -> dict[str, Found]:
    """The sets of these names, as far as they are there. KernelError when they cannot be read."""
    heads = {}
    with _conversation(_READ) as kernel:
        for name in names:
            asked = _HEADS_ONLY + text_attribute(_IPSET_ATTR_SETNAME, name)
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
    asked = text_attribute(_IPSET_ATTR_SETNAME, one.name)
    try:
        with _conversation(_READ, _SPARE_BYTES + most * _MOST_TOLD_BYTES) as kernel:
            parts = [_Part.read(part) for part in _dump(kernel, asked)]
    except Enough:
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
    for one in wanted:
        made = _MADE[one.kind]
        named = text_attribute(_IPSET_ATTR_SETNAME, one.name)
        with _conversation(f"create the set {one.name}") as kernel:
            told = _type(kernel, made) + attribute(_IPSET_ATTR_DATA | NLA_F_NESTED, made.data)
            kernel.do(_IPSET_CMD_CREATE, _OF_PROTOCOL + named + told, NLM_F_CREATE | NLM_F_EXCL)
        pack = _packed_ports if one.kind is Kind.PORTS else _packed_network
        with _conversation(f"fill the set {one.name}") as kernel:
            for at in range(0, len(one.entries), _ENTRIES_PER_MESSAGE):
                packed = b"".join(map(pack, one.entries[at : at + _ENTRIES_PER_MESSAGE]))
                entries = attribute(_IPSET_ATTR_ADT | NLA_F_NESTED, packed)
                kernel.do(_IPSET_CMD_ADD, _OF_PROTOCOL + named + _NO_LINE + entries)


def swap(name: str, other: str) -> None:
    """Let two sets of one kind change places, for the rules that ask them too: in one step. KernelError."""
    named = text_attribute(_IPSET_ATTR_SETNAME, name) + text_attribute(_IPSET_ATTR_SETNAME2, other)
    with _conversation(f"swap the sets {name} and {other}") as kernel:
        kernel.do(_IPSET_CMD_SWAP, _OF_PROTOCOL + named)


def destroy(names: Iterable[str]) -> tuple[str, ...]:
    """Remove these sets, as far as they are there; those stay, and are returned, that a rule asks. KernelError."""
    kept = []
    with _conversation("destroy IP sets") as kernel:
        for name in names:
            try:
                kernel.do(
                    _IPSET_CMD_DESTROY, _OF_PROTOCOL + text_attribute(_IPSET_ATTR_SETNAME, name)
                )
            except KernelError as error:
                # Not every kernel says that a set is not there.
                if error.errno == _IPSET_ERR_BUSY:
                    kept.append(name)
                elif error.errno != errno.ENOENT and error.errno not in nfnetlink.NO_SUBSYSTEM:
                    raise
    return tuple(kept)


_MADE = {
    Kind.PORTS: _Made(
        "bitmap:port",
        socket.AF_UNSPEC,
        attribute(_IPSET_ATTR_PORT | NLA_F_NET_BYTEORDER, _PORT.pack(0))
        + attribute(_IPSET_ATTR_PORT_TO | NLA_F_NET_BYTEORDER, _PORT.pack(65535)),
    ),
    Kind.IPV4_NETWORKS: _Made("hash:net", socket.AF_INET),
    Kind.IPV6_NETWORKS: _Made("hash:net", socket.AF_INET6),
}
_NO_LINE = attribute(_IPSET_ATTR_LINENO | NLA_F_NET_BYTEORDER, bytes(4))
"""Somewhere for the kernel to tell the number of the entry that it refuses: it wants that."""


def _type(kernel: Conversation, made: _Made) -> bytes:
    """The kernel's newest type of such sets, as attributes of one. KernelError when it has none."""
    told = text_attribute(_IPSET_ATTR_TYPENAME, made.type)
    told += attribute(_IPSET_ATTR_FAMILY, bytes([made.family]))
    try:
        answer = kernel.ask(_IPSET_CMD_TYPE, _OF_PROTOCOL + told)
    except KernelError as error:
        if error.errno not in nfnetlink.NO_SUBSYSTEM:
            raise
        raise KernelError("the kernel has no IP sets", errno.EPROTONOSUPPORT) from error
    if answer is None:
        raise KernelError(f"the kernel has no IP sets of type {made.type}", errno.EPROTONOSUPPORT)
    return told + attribute(_IPSET_ATTR_REVISION, dict(attributes_in(answer))[_IPSET_ATTR_REVISION])


def _packed_ports(ports: str) -> bytes:
    first, _, last = ports.partition("-")
    numbers = ((_IPSET_ATTR_PORT, int(first)), (_IPSET_ATTR_PORT_TO, int(last or first)))
    packed = (attribute(kind | NLA_F_NET_BYTEORDER, _PORT.pack(port)) for kind, port in numbers)
    return attribute(_IPSET_ATTR_DATA | NLA_F_NESTED, b"".join(packed))


def _packed_network(network: str) -> bytes:
    parsed = ipaddress.ip_network(network)
    kind = _IPSET_ATTR_IPADDR[parsed.version] | NLA_F_NET_BYTEORDER
    address = attribute(kind, parsed.network_address.packed)
    content = attribute(_IPSET_ATTR_IP | NLA_F_NESTED, address)
    content += attribute(_IPSET_ATTR_CIDR, bytes([parsed.prefixlen]))
    return attribute(_IPSET_ATTR_DATA | NLA_F_NESTED, content)


class _Part(msgspec.Struct, frozen=True):
    """What one message of a listing tells about a set; a large one comes in several, of which the first has a head."""

    name: str
    index: int
    type: str
    family: int
    references: int
    entries: bytes

    @classmethod
    def read(cls, message: bytes) -> Self:
        told = dict(attributes_in(message))
        head = dict(attributes_in(told.get(_IPSET_ATTR_DATA, b"")))
        return cls(
            name=text_of(told.get(_IPSET_ATTR_SETNAME, b"")),
            index=number_of(told.get(_IPSET_ATTR_INDEX, b"")),
            type=text_of(told.get(_IPSET_ATTR_TYPENAME, b"")),
            family=number_of(told.get(_IPSET_ATTR_FAMILY, b"")),
            references=number_of(head.get(_IPSET_ATTR_REFERENCES, b"")),
            entries=told.get(_IPSET_ATTR_ADT, b""),
        )

    @property
    def kind(self) -> Kind | None:
        match self.type, self.family:
            case "bitmap:port", _:
                return Kind.PORTS
            case "hash:net", socket.AF_INET:
                return Kind.IPV4_NETWORKS
            case "hash:net", socket.AF_INET6:
                return Kind.IPV6_NETWORKS
            case _:
                return None

    @property
    def found(self) -> Found:
        return Found(self.name, self.index, self.kind, in_use=self.references > 0)


@contextlib.contextmanager
def _conversation(what: str, most: int = MOST_BYTES) -> Iterator[Conversation]:
    try:
        with Conversation(nfnetlink.SUBSYSTEM_IPSET, socket.AF_INET, what, most) as kernel:
            yield kernel
    except KernelError as error:
        if error.errno not in _REASONS:
            raise
        raise KernelError(f"cannot {what}: {_REASONS[error.errno]}", error.errno) from error


def _dump(kernel: Conversation, asked: bytes) -> Iterator[bytes]:
    """The messages of a listing, as attributes."""
    try:
        for answer in kernel.dump(_IPSET_CMD_LIST, _OF_PROTOCOL + asked):
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
        yield from _merged(sorted(number_of(one[_IPSET_ATTR_PORT]) for one in told))
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
