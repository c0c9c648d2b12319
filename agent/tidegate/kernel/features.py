"""Which of the kernel's features and libraries are here, found out by trying each.

Never by a version, nor by the presence of a program: a probe does on a small scale what tidegate does, in
a throw-away network namespace or on descriptors of its own, and leaves nothing behind. No probe waits for
anything outside the kernel.
"""

import ctypes
import errno
import mmap
import os
import platform
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from tidegate.kernel import cgroups, ipset, links, netns, nftables, tc, tun, xtables, xtables_rules
from tidegate.kernel.bpf import Program
from tidegate.kernel.errors import KernelError
from tidegate.kernel.legacy_tables import Family
from tidegate.kernel.nftables import Object


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that tidegate needs."""

    name: str
    present: bool
    detail: str
    """What was found, or why it is not there."""
    lost_without: str
    needed: bool = True
    """False for what something else can stand in for: one backend of redirection is enough."""


def probe_all() -> tuple[Feature, ...]:
    """Tries every feature, for at most a few seconds altogether. To be run as root."""
    return tuple(_probe(name, probe, lost) for name, lost, probe in _PROBES)


def _probe(name: str, probe: Callable[[], str], lost_without: str) -> Feature:
    try:
        present, detail = True, probe()
    except (KernelError, OSError) as error:
        present, detail = False, str(error)
    return Feature(
        name=name,
        present=present,
        detail=detail,
        lost_without=lost_without,
        needed=name not in _REPLACEABLE,
    )


def _network_namespaces() -> str:
    return netns.run_in_new(lambda: "a new one was made and entered")


def _veth() -> str:
    def make() -> str:
        links.create_veth(netns.CURRENT, "probe0", netns.CURRENT, "probe1")
        return "a pair was made"

    return netns.run_in_new(make)


def _ipv6() -> str:
    def bind() -> str:
        links.set_up(netns.CURRENT, "lo")
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener:
            listener.bind(("::1", 0))
        return "::1 can be bound in a new namespace"

    return netns.run_in_new(bind)


def _redirection(family: str) -> Callable[[], str]:
    table = {"family": family, "table": "probe"}
    chain = {"type": "nat", "hook": "output", "prio": -100, "policy": "accept"}
    is_tcp = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}
    redirect = {"redirect": {"port": 1}}
    commands: list[Object] = [
        {"add": {"table": {"family": family, "name": "probe"}}},
        {"add": {"chain": {**table, "name": "probe", **chain}}},
        {"add": {"rule": {**table, "chain": "probe", "expr": [is_tcp, redirect]}}},
    ]

    def load() -> str:
        netns.run_in_new(nftables.run, commands)
        return f"a redirection was loaded into a table of family {family}"

    return load


def _rules(text: str) -> Callable[[], str]:
    def load() -> str:
        netns.run_in_new(nftables.load, text)
        return "a rule was loaded into a new namespace"

    return load


_TPROXY = """
table ip probe {
    chain prerouting { type filter hook prerouting priority -150; meta l4proto tcp tproxy to :1; }
}
table ip6 probe {
    chain prerouting { type filter hook prerouting priority -150; meta l4proto tcp tproxy to :1; }
}
"""
_ZONES = """
table inet probe {
    chain output { type filter hook output priority -300; ct original zone set 1; }
}
"""


def _cgroup_matching() -> str:
    place = cgroups.mounted_at() / f"tidegate-probe-{os.getpid()}-{threading.get_ident()}"
    place.mkdir()
    try:
        found = cgroups.find(place.name)
        sender = f'socket cgroupv2 level {found.level} "{found.path}"'
        chain = f"type filter hook output priority 0; {sender} return;"
        _rules(f"table inet probe {{\nchain output {{ {chain} }}\n}}")()
        tables = "*filter\n:PROBE - [0:0]\n-I OUTPUT 1 -j PROBE\n"
        rule = f"-A PROBE -m cgroup --path {place.name} -j RETURN\n"
        _legacy(Family.IPV4, f"{tables}{rule}COMMIT")()
    finally:
        place.rmdir()
    return "rules for a new cgroup were loaded, with both backends"


def _legacy(family: Family, text: str) -> Callable[[], str]:
    def load() -> str:
        ((table, content),) = xtables_rules.compiled(family, xtables_rules.parse(text)).items()
        # Nobody else knows the namespace, so nobody needs the lock.
        netns.run_in_new(xtables.replace, family, table, "PROBE", content, {})
        return f"a rule was loaded into the table {table} of a new namespace"

    return load


_LEGACY_REDIRECTION = """*nat
:PROBE - [0:0]
-I OUTPUT 1 -j PROBE
-A PROBE -p tcp -j REDIRECT --to-ports 1
COMMIT
"""
_LEGACY_TPROXY = """*mangle
:PROBE - [0:0]
-I PREROUTING 1 -j PROBE
-A PROBE -p tcp -j TPROXY --on-port 1
COMMIT
"""
_LEGACY_ZONES = """*raw
:PROBE - [0:0]
-I OUTPUT 1 -j PROBE
-A PROBE -p udp -j CT --zone-orig 1
COMMIT
"""


def _sets() -> str:
    if not ipset.is_available():
        raise KernelError("the kernel has no IP sets of ports and networks", errno.EPROTONOSUPPORT)
    return "sets of ports and of networks were made"


def _tun() -> str:
    def make() -> str:
        with tun.opened("probe0"):
            return "one was made"

    return netns.run_in_new(make)


def _library(name: str) -> Callable[[], str]:
    def load() -> str:
        ctypes.CDLL(name)
        return name

    return load


# linux/bpf.h: enum bpf_cmd, bpf_map_type, bpf_prog_type, bpf_attach_type
_BPF_MAP_CREATE = 0
_BPF_PROG_LOAD = 5
_BPF_LINK_CREATE = 28
_BPF_MAP_TYPE_RINGBUF = 27
_BPF_PROG_TYPE_SCHED_CLS = 3
_BPF_TCX_INGRESS = 46

_BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}
"""Number of bpf(2) by machine (asm/unistd.h)."""

_INSTRUCTIONS = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
"""r0 = TCX_NEXT; exit"""

_libc = ctypes.CDLL(None, use_errno=True)


def _sched_cls() -> str:
    os.close(_load_sched_cls())
    return "a program was loaded"


def _attaching() -> str:
    def attach() -> str:
        loopback = socket.if_nametoindex("lo")
        with Program(_load_sched_cls(), "probe") as program:
            attribute = struct.pack("=IIII", program.fd, loopback, _BPF_TCX_INGRESS, 0)
            try:
                os.close(_bpf(_BPF_LINK_CREATE, attribute, "attach a tcx link"))
            except KernelError as refused:
                tc.attach(loopback, {tc.Hook.INGRESS: program}, "tidegate-probe")
                return f"a clsact filter was attached in a new namespace ({refused})"
        return "a tcx link was attached in a new namespace"

    return netns.run_in_new(attach)


def _ring_buffer() -> str:
    attribute = struct.pack("=IIIII", _BPF_MAP_TYPE_RINGBUF, 0, 0, mmap.PAGESIZE, 0)
    os.close(_bpf(_BPF_MAP_CREATE, attribute, "make a ring buffer"))
    return "one was made"


def _load_sched_cls() -> int:
    instructions = ctypes.create_string_buffer(_INSTRUCTIONS, len(_INSTRUCTIONS))
    licence = ctypes.create_string_buffer(b"GPL")
    attribute = struct.pack(
        "=IIQQ",
        _BPF_PROG_TYPE_SCHED_CLS,
        len(_INSTRUCTIONS) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
    )
    return _bpf(_BPF_PROG_LOAD, attribute, "load a sched_cls program")


def _bpf(command: int, attribute: bytes, what: str) -> int:
    number = _BPF_SYSCALL.get(platform.machine())
    if number is None:
        raise KernelError(f"the number of bpf(2) is not known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attribute, len(attribute))
    return _checked(_libc.syscall(number, command, buffer, len(attribute)), what)


# linux/mount.h; the numbers of new system calls are the same on all machines (asm-generic/unistd.h).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1


def _bpffs() -> str:
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    places = [fields[1] for fields in lines if fields[2] == "bpf"]
    if places:
        return f"mounted at {places[0]}"
    context = _checked(_libc.syscall(_FSOPEN, b"bpf", _FSOPEN_CLOEXEC), "open a bpf file system")
    try:
        created = _libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        _checked(created, "make a bpf file system")
        mount = _libc.syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
        os.close(_checked(mount, "mount a bpf file system"))
    finally:
        os.close(context)
    return "not mounted, but can be"


_BTF_MAGIC = struct.pack("=H", 0xEB9F)
"""BTF_MAGIC of linux/btf.h."""


def _btf() -> str:
    with Path("/sys/kernel/btf/vmlinux").open("rb") as types:
        if types.read(2) != _BTF_MAGIC:
            raise KernelError("/sys/kernel/btf/vmlinux holds no BTF", errno.EINVAL)
    return "/sys/kernel/btf/vmlinux"


def _capability(name: str, bit: int) -> Callable[[], str]:
    def read() -> str:
        status = Path("/proc/thread-self/status").read_text().splitlines()
        (effective,) = (line.split()[1] for line in status if line.startswith("CapEff:"))
        if not int(effective, 16) >> bit & 1:
            raise KernelError(f"this process does not have {name}", errno.EPERM)
        return "in effect"

    return read


def _bpf_capability() -> str:
    """CAP_SYS_ADMIN is enough (linux/capability.h, bpf_capable)."""
    try:
        return _capability("CAP_BPF", 39)()
    except KernelError:
        _capability("CAP_SYS_ADMIN", 21)()
        return "a part of CAP_SYS_ADMIN"


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot {what}: {os.strerror(number)}", number)
    return result


_WITHOUT_LEGACY = "the iptables backend, which does without nftables"

_PROBES: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("capability CAP_NET_ADMIN", "everything", _capability("CAP_NET_ADMIN", 12)),
    ("capability CAP_SYS_ADMIN", "everything", _capability("CAP_SYS_ADMIN", 21)),
    ("capability CAP_BPF", "observation", _bpf_capability),
    ("network namespaces", "everything", _network_namespaces),
    ("veth interfaces", "the lab", _veth),
    ("IPv6", "redirection and observation of IPv6 traffic", _ipv6),
    ("libnftables", "redirection", _library(nftables.LIBRARY)),
    ("nftables redirection, inet tables", "redirection", _redirection("inet")),
    ("nftables redirection, IPv4", "redirection of IPv4 traffic", _redirection("ip")),
    ("nftables redirection, IPv6", "redirection of IPv6 traffic", _redirection("ip6")),
    ("nftables transparent proxy", "mode tproxy with nftables", _rules(_TPROXY)),
    ("nftables conntrack zones", "redirection of DNS with nftables", _rules(_ZONES)),
    ("legacy tables, IPv4", _WITHOUT_LEGACY, _legacy(Family.IPV4, _LEGACY_REDIRECTION)),
    ("legacy tables, IPv6", _WITHOUT_LEGACY, _legacy(Family.IPV6, _LEGACY_REDIRECTION)),
    (
        "legacy transparent proxy",
        "mode tproxy with iptables",
        _legacy(Family.IPV4, _LEGACY_TPROXY),
    ),
    (
        "legacy conntrack zones",
        "redirection of DNS with iptables",
        _legacy(Family.IPV4, _LEGACY_ZONES),
    ),
    ("IP sets", "exclusions that cost one look-up, with iptables", _sets),
    ("matching of cgroups v2", "sidecars that are told by their cgroup", _cgroup_matching),
    ("TUN devices", "live probes of inbound redirection", _tun),
    ("libbpf", "observation", _library("libbpf.so.1")),
    ("bpf(2) with traffic control programs", "observation", _sched_cls),
    ("tcx links or clsact filters", "observation", _attaching),
    ("BPF ring buffers", "ClientHellos that span packets", _ring_buffer),
    ("BPF file system", "counts that outlive the agent", _bpffs),
    ("kernel type information (BTF)", "tracing on demand", _btf),
)

_REPLACEABLE = frozenset(
    name
    for name, _, _ in _PROBES
    if name.startswith(
        ("nftables ", "libnftables", "legacy ", "IP sets", "TUN ", "matching of cgroups")
    )
)
