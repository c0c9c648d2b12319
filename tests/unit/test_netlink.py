"""Messages and attributes of netlink are taken apart, and nothing else is taken for them."""

import errno
import struct

import pytest

from tidegate.kernel import netlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    Disturbed,
    Netlink,
    attribute,
    attributes_in,
    messages,
    undisturbed,
)

DONE, MULTI, INTERRUPTED = 3, 2, 16


def packed(kind, body, flags=0, sequence=1):
    whole = struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body
    return whole + bytes(-len(whole) % 4)


def test_every_message_of_a_datagram_is_found():
    datagram = packed(16, b"one") + packed(17, b"", sequence=2)
    assert [tuple(one) for one in messages(datagram)] == [(16, 0, 1, b"one"), (17, 0, 2, b"")]


@pytest.mark.parametrize(
    "datagram",
    [
        b"\0",
        bytes(16),
        struct.pack("=IHHII", 15, 16, 0, 1, 0),
        struct.pack("=IHHII", 17, 16, 0, 1, 0),
        packed(16, b"one") + b"\0\0\0\0",
    ],
)
def test_a_datagram_of_something_else_is_refused(datagram):
    with pytest.raises(KernelError, match="no netlink message") as told:
        list(messages(datagram))
    assert told.value.errno == errno.EPROTO


@pytest.mark.parametrize("data", [bytes(4), struct.pack("=HH", 3, 1), struct.pack("=HH", 5, 1)])
def test_attributes_of_a_wrong_length_are_refused(data):
    with pytest.raises(KernelError, match="no netlink message"):
        list(attributes_in(data))
    assert list(attributes_in(attribute(1, b"x"))) == [(1, b"x")]


@pytest.fixture
def says(monkeypatch):
    """The kernel's datagrams are these, one after the other."""

    def say(*datagrams):
        rest = list(datagrams)
        monkeypatch.setattr(netlink, "received", lambda _: rest.pop(0))

    return say


def dumped():
    with Netlink(netlink.NETLINK_NETFILTER, "list things") as kernel:
        return list(kernel.dump(0, b""))


def test_answers_to_another_question_are_skipped(says):
    end = bytes(4)
    says(
        packed(16, b"old!", sequence=0) + packed(DONE, end, sequence=7),
        b"",
        packed(16, b"new!", MULTI) + packed(DONE, end, MULTI),
    )
    assert dumped() == [b"new!"]


def test_a_listing_into_which_a_change_came_is_begun_again(says):
    whole = packed(16, b"this", MULTI), packed(DONE, bytes(4), MULTI)
    says(whole[0], packed(DONE, bytes(4), MULTI | INTERRUPTED), *whole)
    assert undisturbed(dumped) == [b"this"]
    says(*[packed(16, b"this", MULTI | INTERRUPTED)] * 16)
    with pytest.raises(Disturbed, match="cannot list things: they change faster than"):
        undisturbed(dumped)


def test_an_answer_that_does_not_come_is_a_refusal(says, monkeypatch):
    def nothing(_):
        raise BlockingIOError(errno.EAGAIN, "")

    monkeypatch.setattr(netlink, "received", nothing)
    with pytest.raises(KernelError, match="cannot list things: Resource temporarily unavailable"):
        dumped()
