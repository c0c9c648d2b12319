"""What a pod that means harm puts into its own network namespace."""

import socket
import struct

from tidegate.kernel import nf_tables, nf_transaction, nfnetlink
from tidegate.kernel.nf_transaction import Step
from tidegate.kernel.nfnetlink import Request

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_BATCH_BEGIN, _NEWTABLE, _BATCH_END = 16, 10 << 8, 17
_NEWCHAIN = 3
_REQUEST, _CREATE = 1, 0x400
_INET = 1
_OWNED, _PERSISTENT = 2, 4


def owned_table(name: str, *chains: str, persistent: bool = False) -> socket.socket:
    """A socket with which a table of family inet lives and dies, chains and all, and which alone may change it.

    A persistent one stays when the socket is closed. In the calling thread's namespace.
    """
    owner = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    flags = _OWNED | (_PERSISTENT if persistent else 0)
    told = _attribute(1, name.encode() + b"\0") + _attribute(2, flags.to_bytes(4, "big"))
    frame = struct.pack("=BBH", 0, 0, socket.htons(10))
    of_inet = struct.pack("=BBH", _INET, 0, 0)
    made = [
        _attribute(1, name.encode() + b"\0") + _attribute(3, chain.encode() + b"\0")
        for chain in chains
    ]
    messages = (
        (_BATCH_BEGIN, frame),
        (_NEWTABLE, of_inet + told),
        *((_NEWTABLE | _NEWCHAIN, of_inet + chain) for chain in made),
        (_BATCH_END, frame),
    )
    owner.send(
        b"".join(
            struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _CREATE, 0, 0) + body
            for kind, body in messages
        )
    )
    assert nf_tables.table_flags("inet", name) == flags
    return owner


def table(name: str) -> Step:
    """Make a table of family inet, if it is not there."""
    named = _attribute(1, name.encode() + b"\0")
    return Step(Request(_NEWTABLE & 0xFF, _CREATE, _INET, named), f"create table {name}")


def crowd(count: int) -> None:
    """So many tables in the calling thread's namespace."""
    nf_transaction.run([table(f"crowd-{number}") for number in range(count)])


def chains(table: str, names: list[bytes]) -> None:
    """Chains of these names, which no program would give them, in a table of family inet that is there."""
    requests = [
        Request(
            _NEWCHAIN,
            _CREATE,
            _INET,
            _attribute(1, table.encode() + b"\0") + _attribute(3, name + b"\0"),
        )
        for name in names
    ]
    assert nfnetlink.transact(nfnetlink.SUBSYSTEM_NFTABLES, requests) is None


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
