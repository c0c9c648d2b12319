"""What tests of the pins share: small programs with the real maps, other people's programs, a node, and its crashes."""

import ctypes
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import Pair

from tidegate.kernel import netns, tc
from tidegate.kernel.bpf import AttachType, Link, Map, Program
from tidegate.kernel.bpf_object import Object
from tidegate.kernel.libbpf import libbpf
from tidegate.observe.classifier import Attachment, Classifier, Side
from tidegate.observe.hold import By

SOURCES = Path(__file__).parents[2] / "bpf"
LIBBPF = ctypes.CDLL("libbpf.so.1")
WORKLOAD, OTHER_WORKLOAD = 7, 8
PORT = 8080

STUB = """
#include "structs.h"
#define TG_FLOWS_MAX 1024
#define TG_PREFIXES_MAX 16
#define TG_EDGES_MAX 1024
#include "maps.h"
struct count {
#ifdef OTHER_LAYOUT
	__u64 packets;
	__u64 opened;
#else
	__u64 opened;
	__u64 packets;
#endif
};
/* By whether it was counted inside a workload's namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct count);
} seen SEC(".maps");
const volatile __u32 scope = 0;
const volatile __u32 link_header = 14;
static __always_inline int see(struct __sk_buff *skb, __u32 index)
{
	struct count *count = bpf_map_lookup_elem(&seen, &index);
	__u8 flags = 0;

	if (!count || !scope)
		return -1;
	__sync_fetch_and_add(&count->packets, 1);
	bpf_skb_load_bytes(skb, link_header + 20 + 13, &flags, sizeof(flags));
	if (skb->protocol == __builtin_bswap16(0x0800) && flags == 2)
		__sync_fetch_and_add(&count->opened, 1);
	return -1;
}
/* What leaves a pod comes in at its end on the node, and to_pod sees the other way round. */
SEC("tc") int from_pod(struct __sk_buff *skb) { return see(skb, !skb->ingress_ifindex); }
SEC("tc") int to_pod(struct __sk_buff *skb) { return see(skb, !!skb->ingress_ifindex); }
char LICENSE[] SEC("license") = "GPL";
"""
"""Programs that count SYNs, with the real maps, smaller: the real programs take the verifier a second."""

FOREIGN = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");
static __always_inline int see(int verdict)
{
	__u32 zero = 0;
	__u64 *value = bpf_map_lookup_elem(&seen, &zero);

	if (value)
		__sync_fetch_and_add(value, 1);
	return verdict;
}
SEC("tc") int passes(struct __sk_buff *skb) { return see(0); }
SEC("tc") int drops(struct __sk_buff *skb)
{
	return skb->protocol == __builtin_bswap16(0x0800) ? see(2) : 0;
}
char LICENSE[] SEC("license") = "GPL";
"""

TELLER = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} hellos SEC(".maps");
const volatile __u8 small = 1;
const volatile __u64 large = 2;
const volatile __u32 scope = 0;
const volatile __u32 report = 0;
SEC("tc") int from_pod(struct __sk_buff *skb)
{
	__u8 entry[BYTES_AT + 3] = { 9 };

	if (!report)
		return 0;
	*(__u32 *)&entry[8] = skb->len;
	*(__u32 *)&entry[12] = 2;
	entry[KEY_AT] = 5;
	entry[BYTES_AT] = 'h';
	entry[BYTES_AT + 1] = 'i';
	bpf_ringbuf_output(&hellos, entry, BYTES_AT + 2, 0);
	return 0;
}
SEC("tc") int to_pod(struct __sk_buff *skb) { return small * 100 + large * 10 + scope; }
char LICENSE[] SEC("license") = "GPL";
"""


def build(directory: Path, name: str, source: str | Path, *flags: str) -> Path:
    if isinstance(source, str):
        written = directory / f"{name}.bpf.c"
        written.write_text(source)
        source = written
    compiled = directory / f"{name}.bpf.o"
    machine = subprocess.run(
        ["clang", "-print-multiarch"], check=False, capture_output=True, text=True
    ).stdout.strip()
    command = ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-I{SOURCES}", *flags]
    subprocess.run(
        [*command, f"-I/usr/include/{machine or 'x86_64-linux-gnu'}", "-c", source, "-o", compiled],
        check=True,
    )
    return compiled


class Foreign:
    """Somebody else's program on the node's end of a pair, at ingress."""

    def __init__(self, pair: Pair, directory: Path, compiled: Path, name: str) -> None:
        self._pair = pair
        self._pin = directory / "foreign"
        with Object.open(compiled) as opened:
            opened.load()
            self.seen = opened.map("seen")
            self.program = opened.program(name)
        self.program.pin(self._pin)
        self._link = -1

    def attach_by_tcx(self) -> None:
        """As others do: behind who is there."""
        self._link = netns.run_in(
            self._pair.peer,
            libbpf().bpf_link_create,
            self.program.fd,
            index(self._pair.peer, "host0"),
            AttachType.TCX_INGRESS,
            None,
        )
        assert self._link >= 0

    def attach_by_tc(self, priority: int) -> None:
        run_tc(self._pair.peer, "qdisc replace dev host0 clsact")
        run_tc(
            self._pair.peer,
            f"filter add dev host0 ingress prio {priority} handle 1 bpf da pinned {self._pin}",
        )

    def count(self) -> int:
        return int.from_bytes(self.seen.lookup(bytes(4)), "little")

    def close(self) -> None:
        if self._link >= 0:
            os.close(self._link)
        self.program.close()
        self.seen.close()


def run_tc(netns_path: str, arguments: str) -> str:
    def run() -> str:
        command = ["tc", *arguments.split()]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return netns.run_in(netns_path, run)


def index(netns_path: str, name: str) -> int:
    return netns.run_in(netns_path, socket.if_nametoindex, name)


def filters(netns_path: str, name: str) -> tuple[tc.Filter, ...]:
    return netns.run_in(netns_path, tc.filters, index(netns_path, name))


def qdiscs(netns_path: str) -> tuple[int, ...]:
    return netns.run_in(netns_path, tc.interfaces)


class Node:
    """Classifiers as a node has them whose own namespace is the peer's; one workload there, and one inside."""

    def __init__(self, pair: Pair, directory: Path, by: tuple[By, ...], stub: Path) -> None:
        self.pair, self.directory, self.by, self.stub = pair, directory, by, stub

    def open(self, object_path: Path | None = None) -> Classifier:
        return self.here(Classifier.open, self.directory, object_path or self.stub, by=self.by)

    def private(self, flows: int | None = None) -> Classifier:
        return self.here(
            Classifier.private, report=False, flows=flows, object_path=self.stub, by=self.by
        )

    def here(self, function: Callable, *args: object, **kwargs: object):
        return netns.run_in(self.pair.peer, function, *args, **kwargs)

    def observe(self, classifier: Classifier) -> Attachment:
        ifindex = index(self.pair.peer, "host0")
        return self.here(classifier.attach, WORKLOAD, ifindex, Side.HOST, (PORT,))

    def observe_inside(self, classifier: Classifier) -> Attachment:
        ifindex = index(self.pair.pod, "eth0")
        arguments = (OTHER_WORKLOAD, ifindex, Side.INSIDE, (PORT,))
        return netns.run_in(self.pair.pod, classifier.attach, *arguments)

    def attachments(self, classifier: Classifier) -> list[Attachment]:
        found = self.here(classifier.attachments)
        return sorted(found, key=lambda each: each.workload_key)

    def remove(self, classifier: Classifier) -> None:
        self.here(classifier.remove)

    def programs(self) -> set[int]:
        """Numbers of the programs that are attached, by links or filters."""
        attached = {
            each.program_id
            for netns_path, name in ((self.pair.peer, "host0"), (self.pair.pod, "eth0"))
            for each in filters(netns_path, name)
        }
        for pin in (self.directory / "classifier" / "links").glob("*/*_pod"):
            with Link.open_pinned(pin) as link:
                attached.add(link.program_id())
        return attached

    def kept(self) -> set[tuple[str, int]]:
        """Kinds and numbers of all that is pinned."""
        return {
            (path.relative_to(self.directory / "classifier").parts[0], number_of(path))
            for path in (self.directory / "classifier").rglob("*")
            if path.is_file()
        }


def number_of(pin: Path) -> int:
    """The kernel's number of a pinned program, link or map: the second field of all three info structures."""
    fd = libbpf().bpf_obj_get(bytes(pin))
    info, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
    try:
        assert libbpf().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)) == 0
    finally:
        os.close(fd)
    return struct.unpack_from("=II", info)[1]


def is_there(kind: str, number: int) -> bool:
    fd = {
        "programs": LIBBPF.bpf_prog_get_fd_by_id,
        "links": LIBBPF.bpf_link_get_fd_by_id,
        "maps": LIBBPF.bpf_map_get_fd_by_id,
    }[kind](number)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def in_child(work: Callable[[], None]) -> int:
    """Runs it in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


STEPS = (
    (Program, "pin"), (Map, "pin"), (Link, "pin"), (Link, "attach"), (Link, "replace"), (Link, "detach"),
    (Path, "mkdir"), (Path, "rmdir"), (shutil, "rmtree"), (tc, "attach"), (tc, "replace"), (tc, "detach"),
)  # fmt: skip
"""What changes the kernel."""


def crashes(work: Callable[[], object]) -> Iterator[None]:
    """Comes back after each of the places in which a process can be killed at this work."""
    for step in range(1, 100):
        if in_child(lambda step=step: die_at(step, work)) == 0:
            return
        yield
    pytest.fail("this work has no end")


def die_at(step: int, work: Callable[[], object]) -> None:
    left = [step]

    def dying(function: Callable) -> Callable:
        def stepped(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if not left[0]:
                os._exit(1)
            return function(*args, **kwargs)

        return stepped

    for where, name in STEPS:
        function = getattr(where, name)
        setattr(where, name, dying(function))
    work()
