"""BPF programs as filters of the clsact qdisc: linux/pkt_sched.h, linux/pkt_cls.h, over rtnetlink.

For kernels without tcx links. Filters outlive the process that made them and are known by the program that they run;
what somebody else has on the interface keeps its place and stays. By hand and not by pyroute2, whose messages do not
know TCA_BPF_ID, and because one message has to hold a qdisc and the filters that it is made for.
Works in the calling thread's network namespace. Failures are KernelErrors.
"""

import enum
import errno
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from tidegate.kernel.bpf import Program
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    NETLINK_ROUTE,
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    Request,
    attribute,
    attributes_in,
    text_attribute,
    text_of,
    undisturbed,
)

_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_TCMSG = struct.Struct("=BxxxiIII")
"""struct tcmsg of linux/rtnetlink.h: family, ifindex, handle, parent, info."""
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_TCA_BPF_FLAG_ACT_DIRECT = 1
_TC_H_CLSACT = 0xFFFFFFF1
_CLSACT_HANDLE = 0xFFFF0000
_ETH_P_ALL = 3
_PRIORITIES = range(2, 0x10000)
"""The lower one is asked first. Who asks for 1 (Cilium does) would get into the place of who is there."""
_HANDLE = 0x7467
"""Not one that others ask for by habit."""
_GONE = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})
"""What is said of a filter, or its qdisc, or its interface, that is not there."""
_MADE = "+clsact"
"""Ends the name of a filter that came together with its qdisc: that goes with the last filter."""


class Hook(enum.IntEnum):
    """Where packets pass: the parents TC_H_MIN_INGRESS and TC_H_MIN_EGRESS of clsact."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


class Filter(NamedTuple):
    """One filter of an interface, of whichever kind."""

    hook: Hook
    priority: int
    protocol: int
    handle: int
    kind: str
    name: str
    """Its name with whatever ends it, for kind bpf."""
    program_id: int
    """0 for other kinds than bpf."""

    @property
    def owner(self) -> str:
        """The name that `attach` was given."""
        return self.name.removesuffix(_MADE)

    @property
    def brought_qdisc(self) -> bool:
        """Whether the qdisc is there because of this filter."""
        return self.name.endswith(_MADE)


def filters(ifindex: int) -> tuple[Filter, ...]:
    """All filters of an interface at either hook; () where there is no such interface or no clsact."""
    return undisturbed(_filters, ifindex)


def interfaces() -> tuple[int, ...]:
    """Indexes of the interfaces of this namespace that have a clsact qdisc."""
    return undisturbed(_interfaces)


def attach(ifindex: int, programs: Mapping[Hook, Program], owner: str) -> None:
    """Attaches one program at each hook, or none: before all filters but those of the very first priorities.

    The programs say what becomes of a packet (direct action); by TC_ACT_UNSPEC, that the next filter does.
    """
    what = f"attach {owner} to interface {ifindex}"
    present = filters(ifindex)
    taken = {(each.hook, each.priority) for each in present}
    with Netlink(NETLINK_ROUTE, what) as netlink:
        qdisc = _qdisc(ifindex)
        if qdisc not in ("", "clsact"):
            raise KernelError(
                f"cannot {what}: it has a qdisc of kind {qdisc}, which leaves no room for clsact",
                errno.EEXIST,
            )
        brought = not qdisc or any(each.brought_qdisc for each in present)
        requests = [] if qdisc else [_make_qdisc(ifindex)]
        requests += [
            _set_filter(
                ifindex,
                Filter(
                    hook=hook,
                    priority=next(each for each in _PRIORITIES if (hook, each) not in taken),
                    protocol=socket.htons(_ETH_P_ALL),
                    handle=_HANDLE,
                    kind="bpf",
                    name=owner + _MADE * brought,
                    program_id=program.id,
                ),
                program,
                NLM_F_CREATE | NLM_F_EXCL,
            )
            for hook, program in programs.items()
        ]
        try:
            # In one system call: a process that is killed leaves no qdisc without the filters that tell whose it is.
            netlink.do_all(requests)
        except KernelError:
            detach(ifindex, {program.id for program in programs.values()})
            if not qdisc:
                _remove_empty_qdisc(ifindex)
            raise


def replace(ifindex: int, old: Filter, program: Program) -> None:
    """Puts another program in the place of a filter's; no packet passes without one."""
    with Netlink(NETLINK_ROUTE, f"replace {old.owner} on interface {ifindex}") as netlink:
        netlink.do_all([_set_filter(ifindex, old, program, 0)])


def detach(ifindex: int, program_ids: Collection[int]) -> None:
    """Removes the filters that run one of these programs, and the qdisc if they brought it and nobody uses it."""
    remove(ifindex, [each for each in filters(ifindex) if each.program_id in program_ids])


def remove(ifindex: int, unwanted: Iterable[Filter]) -> None:
    """Removes these filters, and the qdisc if they brought it and nobody uses it."""
    brought = False
    for each in unwanted:
        brought = brought or each.brought_qdisc
        with Netlink(NETLINK_ROUTE, f"detach {each.owner} from interface {ifindex}") as netlink:
            head = _head(ifindex, each.handle, each.hook, each.priority << 16 | each.protocol)
            try:
                netlink.do(_RTM_DELTFILTER, head + text_attribute(_TCA_KIND, each.kind))
            except KernelError as error:
                if error.errno not in _GONE:
                    raise
    if brought:
        _remove_empty_qdisc(ifindex)


def _remove_empty_qdisc(ifindex: int) -> None:
    if filters(ifindex) or _qdisc(ifindex) != "clsact":
        return
    with Netlink(NETLINK_ROUTE, f"remove the qdisc of interface {ifindex}") as netlink:
        try:
            netlink.do(_RTM_DELQDISC, _head(ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0))
        except KernelError as error:
            if error.errno not in _GONE:
                raise


def _qdisc(ifindex: int) -> str:
    """The kind of qdisc that an interface has in the place of clsact; empty for none."""
    return undisturbed(_qdiscs).get(ifindex, "")


def _interfaces() -> tuple[int, ...]:
    return tuple(index for index, kind in _qdiscs().items() if kind == "clsact")


def _qdiscs() -> dict[int, str]:
    found = {}
    with Netlink(NETLINK_ROUTE, "list the qdiscs") as netlink:
        for body in _dump(netlink, _RTM_GETQDISC, _head(0, 0, 0, 0)):
            _, ifindex, handle, parent, _ = _TCMSG.unpack_from(body)
            if parent == _TC_H_CLSACT and handle == _CLSACT_HANDLE:
                attributes = dict(attributes_in(body[_TCMSG.size :]))
                found[ifindex] = text_of(attributes.get(_TCA_KIND, b""))
    return found


def _filters(ifindex: int) -> tuple[Filter, ...]:
    found = []
    for hook in Hook:
        with Netlink(NETLINK_ROUTE, f"list the filters of interface {ifindex}") as netlink:
            for body in _dump(netlink, _RTM_GETTFILTER, _head(ifindex, 0, hook, 0)):
                described = _filter(hook, body)
                if described.handle:
                    found.append(described)
    return tuple(found)


def _dump(netlink: Netlink, kind: int, body: bytes) -> Iterator[bytes]:
    try:
        yield from netlink.dump(kind, body)
    except KernelError as error:
        # A kernel without CONFIG_NET_SCHED has no traffic control.
        if error.errno != errno.EOPNOTSUPP:
            raise


def _filter(hook: Hook, body: bytes) -> Filter:
    _, _, handle, _, info = _TCMSG.unpack_from(body)
    attributes = dict(attributes_in(body[_TCMSG.size :]))
    kind = text_of(attributes.get(_TCA_KIND, b""))
    options = dict(attributes_in(attributes.get(_TCA_OPTIONS, b""))) if kind == "bpf" else {}
    program_id = struct.unpack("=I", options[_TCA_BPF_ID])[0] if _TCA_BPF_ID in options else 0
    return Filter(
        hook=hook,
        priority=info >> 16,
        protocol=info & 0xFFFF,
        handle=handle,
        kind=kind,
        name=text_of(options.get(_TCA_BPF_NAME, b"")),
        program_id=program_id,
    )


def _make_qdisc(ifindex: int) -> Request:
    head = _head(ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0)
    return Request(
        _RTM_NEWQDISC, head + text_attribute(_TCA_KIND, "clsact"), NLM_F_CREATE | NLM_F_EXCL
    )


def _set_filter(ifindex: int, wanted: Filter, program: Program, flags: int) -> Request:
    options = (
        attribute(_TCA_BPF_FD, struct.pack("=I", program.fd))
        + text_attribute(_TCA_BPF_NAME, wanted.name)
        + attribute(_TCA_BPF_FLAGS, struct.pack("=I", _TCA_BPF_FLAG_ACT_DIRECT))
    )
    head = _head(ifindex, wanted.handle, wanted.hook, wanted.priority << 16 | wanted.protocol)
    return Request(
        _RTM_NEWTFILTER,
        head
        + text_attribute(_TCA_KIND, wanted.kind)
        + attribute(_TCA_OPTIONS | NLA_F_NESTED, options),
        flags,
    )


def _head(ifindex: int, handle: int, parent: int, info: int) -> bytes:
    return _TCMSG.pack(socket.AF_UNSPEC, ifindex, handle, parent, info)
