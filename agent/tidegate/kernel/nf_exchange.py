"""nf_tables' rules, put into a namespace that nobody has touched, and read back: word for word as once before.

What the kernel answers in such a namespace depends on nothing but what it is told: handles, counts, and the number of
the rule set that each answer bears are the same in all of them. So the conversation is held once in a namespace made
for that, and recorded; in others the same is said, and what is heard is compared byte by byte. If it is equal, the
namespace has these rules, and no others. Knows how nf_tables is asked for all that there is; which rules there should
be is not its business.
"""

from collections.abc import Iterable, Iterator, Sequence
from socket import socket
from typing import NamedTuple

from tidegate.kernel import netlink, nf_tables, nf_transaction, nfnetlink
from tidegate.kernel import nf_tables_h as h
from tidegate.kernel.netlink import NETLINK_NETFILTER, NLMSG_DONE, NLMSG_ERROR
from tidegate.kernel.nf_transaction import Step
from tidegate.kernel.nfnetlink import SUBSYSTEM_NFTABLES


class Turn(NamedTuple):
    """One message to the kernel, and all that it says to that."""

    said: bytes
    heard: bytes


Exchange = tuple[Turn, ...]
"""The transaction, then the questions."""


def recorded(steps: Sequence[Step], family: str, table: str, sets: Iterable[bytes]) -> Exchange:
    """Takes the steps, which make one table with these sets, in the calling thread's namespace, untouched until then.

    KernelError when the kernel refuses.
    """
    transaction = nf_transaction.packed(steps, nf_tables.UNTOUCHED)
    with _connected() as kernel:
        return tuple(
            Turn(said, b"".join(_listened(kernel, said)))
            for said in (transaction, *_questions(family, table, sets))
        )


def repeated(exchange: Exchange) -> bool:
    """Says the same in the calling thread's namespace; whether all is answered as it was when it was recorded.

    Otherwise that is not known: somebody was there before, and the transaction was not taken; or it was, and packets
    were counted already, or a set has its elements in another order, as those have that the kernel keeps as hash
    tables. KernelError when there is no socket to ask by.
    """
    with _connected() as kernel:
        return all(_answers(kernel, turn) for turn in exchange)


def _connected() -> socket:
    try:
        return netlink.connected(NETLINK_NETFILTER)
    except OSError as error:
        raise netlink.refusal(_WHAT, error.errno) from error


_WHAT = "change and read the nftables rules"


def _questions(family: str, table: str, sets: Iterable[bytes]) -> Iterator[bytes]:
    """For all chains and rules of the namespace, whosever they are, and for all sets if there are to be any."""
    names = tuple(sets)
    kinds = (h.NFT_MSG_GETCHAIN, h.NFT_MSG_GETRULE, *((h.NFT_MSG_GETSET,) if names else ()))
    for kind in kinds:
        yield nfnetlink.question(SUBSYSTEM_NFTABLES, kind, 0, b"")
    for name in names:
        asked = nf_tables.elements_of(table, name)
        yield nfnetlink.question(
            SUBSYSTEM_NFTABLES, h.NFT_MSG_GETSETELEM, nf_tables.FAMILIES[family], asked
        )


def _listened(kernel: socket, said: bytes) -> Iterator[bytes]:
    """Says something, and hears all that the kernel says to it."""
    try:
        kernel.send(said)
        while True:
            datagram = netlink.received(kernel)
            yield datagram
            for message in netlink.messages(datagram):
                if message.kind in (NLMSG_ERROR, NLMSG_DONE):
                    if message.error:
                        raise netlink.refusal(_WHAT, message.error)
                    return
    except OSError as error:
        raise netlink.refusal(_WHAT, error.errno) from error


def _answers(kernel: socket, turn: Turn) -> bool:
    """Whether the kernel says what it said then; what is more or else is not listened to."""
    said, heard = turn
    at = 0
    try:
        kernel.send(said)
        while at < len(heard):
            datagram = netlink.received(kernel)
            if not datagram or not heard.startswith(datagram, at):
                return False
            at += len(datagram)
    except OSError:
        # It has no room for what is said, or less to say than it had.
        return False
    return True
