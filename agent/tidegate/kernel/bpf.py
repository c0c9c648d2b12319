"""A typed door to bpf(2): maps, programs, links, ring buffers, and pins.

Turns every refusal into a KernelError; knows nothing of what the programs are for. Everything here works on the
calling thread's network namespace. Handles hold a file descriptor until they are closed; what is pinned lives on
without them.
"""

import ctypes
import enum
import errno
import functools
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tidegate.kernel.errors import KernelError
from tidegate.kernel.libbpf import RING_SAMPLE, libbpf, refusal


class MapType(enum.IntEnum):
    """enum bpf_map_type of linux/bpf.h, as far as it is used here."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    STACK = 23
    RINGBUF = 27


class AttachType(enum.IntEnum):
    """enum bpf_attach_type of linux/bpf.h, as far as it is used here."""

    TCX_INGRESS = 46
    TCX_EGRESS = 47


_u32 = ctypes.c_uint32
_LINK_TYPE_TCX = 11
_BPF_F_BEFORE = 1 << 3
_BATCH = 4096
_MOST_ATTACHED = 64
"""BPF_MPROG_MAX of linux/bpf_mprog.h: as many programs as an interface can have in one direction."""
_POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")


class _MapInfo(ctypes.Structure):
    """struct bpf_map_info of linux/bpf.h, its beginning."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class _ProgramInfo(ctypes.Structure):
    """struct bpf_prog_info of linux/bpf.h, its beginning."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("_until_name", ctypes.c_uint8 * 56),
        ("name", ctypes.c_char * 16),
    )


class _LinkInfo(ctypes.Structure):
    """struct bpf_link_info of linux/bpf.h (6.6), with the tcx member of its union."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
    )


class _LinkOptions(ctypes.Structure):
    """struct bpf_link_create_opts of bpf/bpf.h, its beginning."""

    _fields_ = (("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32), ("_pad", ctypes.c_uint32))


class _TestRunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of bpf/bpf.h (1.1)."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


class _Handle:
    """Something that the kernel keeps as long as this file descriptor, or a pin, refers to it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def pin(self, path: Path) -> None:
        """Gives it a name on a bpffs, under which it outlives this process."""
        result = libbpf().bpf_obj_pin(self.fd, bytes(path))
        if result < 0:
            raise refusal(f"cannot pin at {path} (is it on a bpffs?)", result)

    def close(self) -> None:
        """Gives up the file descriptor; again is no error."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def _get(path: Path) -> int:
        fd: int = libbpf().bpf_obj_get(bytes(path))
        if fd < 0:
            raise refusal(f"cannot open the pin {path}", fd)
        return fd


def _info(fd: int, info: ctypes.Structure, what: str) -> None:
    size = _u32(ctypes.sizeof(info))
    result = libbpf().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    if result < 0:
        raise refusal(f"cannot ask about {what}", result)


@functools.cache
def possible_cpus() -> int:
    """How many values an element of a per-processor map has."""
    return int(re.split(r"[-,]", _POSSIBLE_CPUS.read_text().strip())[-1]) + 1


class MapDefinition(NamedTuple):
    """What tells whether a map can serve where another was meant. Sizes are bytes."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class Map(_Handle):
    """A map in the kernel. Keys and values are bytes of exactly key_size and value_size."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name
        info = _MapInfo()
        _info(fd, info, f"map {name}")
        self.type: int = info.type
        self.id: int = info.id
        """The kernel's number for this map: no other map has it until the next boot."""
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.max_entries: int = info.max_entries
        self.flags: int = info.map_flags

    @classmethod
    def open_pinned(cls, path: Path) -> "Map":
        return cls(cls._get(path), path.name)

    def definition(self) -> MapDefinition:
        """What it was made as."""
        return MapDefinition(
            self.type, self.key_size, self.value_size, self.max_entries, self.flags
        )

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, or None. For a per-processor map: all values, one behind the other."""
        size = self.value_size
        if self.type == MapType.PERCPU_ARRAY:
            size = (size + 7) // 8 * 8 * possible_cpus()
        value = ctypes.create_string_buffer(size)
        result = libbpf().bpf_map_lookup_elem(self.fd, self._key(key), value)
        if result == -errno.ENOENT:
            return None
        if result < 0:
            raise refusal(f"cannot look into map {self.name}", result)
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Sets the value of a key; a hash replaces a value as a whole."""
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name} has values of {self.value_size} bytes")
        result = libbpf().bpf_map_update_elem(self.fd, self._key(key), value, 0)
        if result < 0:
            raise refusal(f"cannot set a value of map {self.name}", result)

    def delete(self, key: bytes) -> bool:
        """Removes a key; whether it was there."""
        result = libbpf().bpf_map_delete_elem(self.fd, self._key(key))
        if result == -errno.ENOENT:
            return False
        if result < 0:
            raise refusal(f"cannot remove a key of map {self.name}", result)
        return True

    def push(self, value: bytes) -> None:
        """Puts a value on a stack or into a queue; a KernelError when that is full."""
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name} has values of {self.value_size} bytes")
        result = libbpf().bpf_map_update_elem(self.fd, None, value, 0)
        if result < 0:
            raise refusal(f"cannot put a value into map {self.name}", result)

    def mapped(self, size: int | None = None) -> mmap.mmap:
        """The memory of an array that was made to be mapped, all or its first bytes: values one behind the other.

        Each value begins at a multiple of eight bytes. The caller closes it.
        """
        if size is None:
            size = (self.value_size + 7) // 8 * 8 * self.max_entries
        try:
            return mmap.mmap(self.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        except OSError as error:
            raise refusal(
                f"cannot map the memory of map {self.name}", -(error.errno or 0)
            ) from None

    def batches(self) -> Iterator[tuple[bytes, bytes, int]]:
        """All of a hash, as (keys one behind the other, values likewise, how many), batch by batch.

        What is there during the whole time comes exactly once; what comes or goes meanwhile, once or not.
        """
        size = min(_BATCH, self.max_entries)
        token = ctypes.create_string_buffer(max(8, self.key_size))
        start: Any = None
        while True:
            keys = ctypes.create_string_buffer(size * self.key_size)
            values = ctypes.create_string_buffer(size * self.value_size)
            count = _u32(size)
            result = libbpf().bpf_map_lookup_batch(
                self.fd, start, token, keys, values, ctypes.byref(count), None
            )
            if result == -errno.ENOSPC and size < self.max_entries:
                # One bucket of the hash holds more than a batch.
                size = min(2 * size, self.max_entries)
                continue
            if result < 0 and result != -errno.ENOENT:
                raise refusal(f"cannot read map {self.name}", result)
            if count.value:
                read = count.value
                yield keys.raw[: read * self.key_size], values.raw[: read * self.value_size], read
            if result == -errno.ENOENT:
                return
            start = token

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All of a hash, pair by pair."""
        for keys, values, count in self.batches():
            for index in range(count):
                yield (
                    keys[index * self.key_size : (index + 1) * self.key_size],
                    values[index * self.value_size : (index + 1) * self.value_size],
                )

    def _key(self, key: bytes) -> bytes:
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name} has keys of {self.key_size} bytes")
        return key


class TestRun:
    """What a program said to one packet, and how long it took."""

    __test__ = False

    def __init__(self, returned: int, duration_ns: int) -> None:
        self.returned = returned
        self.duration_ns = duration_ns


class Program(_Handle):
    """A loaded program."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name
        info = _ProgramInfo()
        _info(fd, info, f"program {name}")
        self.id: int = info.id
        """The kernel's number for this program: no other has it until the next boot."""

    @classmethod
    def open_pinned(cls, path: Path) -> "Program":
        return cls(cls._get(path), path.name)

    def test_run(self, packet: bytes, repeat: int = 1) -> TestRun:
        """Gives the program a packet, as if it had come in on the loopback interface (BPF_PROG_TEST_RUN).

        The duration is the mean over all repetitions, in nanoseconds.
        """
        data = ctypes.create_string_buffer(packet, len(packet))
        options = _TestRunOptions(
            sz=ctypes.sizeof(_TestRunOptions),
            data_in=ctypes.addressof(data),
            data_size_in=len(packet),
            repeat=repeat,
        )
        result = libbpf().bpf_prog_test_run_opts(self.fd, ctypes.byref(options))
        if result < 0:
            raise refusal(f"cannot run program {self.name}", result)
        return TestRun(ctypes.c_int32(options.retval).value, options.duration)


def attached(ifindex: int, where: AttachType) -> tuple[str, ...]:
    """Names of the tcx programs of an interface of the calling thread's namespace, in the order in which they run.

    () where the kernel has no tcx (before Linux 6.6). What is attached by clsact filters is in tc.py.
    """
    count = _u32(_MOST_ATTACHED)
    numbers = (_u32 * _MOST_ATTACHED)()
    result = libbpf().bpf_prog_query(ifindex, where, 0, None, numbers, ctypes.byref(count))
    if result == -errno.EINVAL:
        return ()
    if result < 0:
        raise refusal(f"cannot ask for the programs of interface {ifindex}", result)
    return tuple(_name_of(number) for number in numbers[: count.value])


def _name_of(number: int) -> str:
    fd = libbpf().bpf_prog_get_fd_by_id(number)
    if fd < 0:
        # It went meanwhile.
        return f"program {number}"
    info = _ProgramInfo()
    try:
        _info(fd, info, f"program {number}")
    finally:
        os.close(fd)
    return str(info.name.decode(errors="replace")) or f"program {number}"


class Link(_Handle):
    """A program attached to an interface, as long as this handle or a pin lives."""

    @classmethod
    def attach(cls, program: Program, ifindex: int, where: AttachType) -> "Link":
        """Attaches before the programs that are there already: none of them can end a packet's way unseen.

        Needs Linux 6.6 (tcx). The KernelError says EINVAL where the kernel has none.
        """
        options = _LinkOptions(sz=ctypes.sizeof(_LinkOptions), flags=_BPF_F_BEFORE)
        fd = libbpf().bpf_link_create(program.fd, ifindex, where, ctypes.byref(options))
        if fd == -errno.EINVAL:
            raise KernelError(
                f"cannot attach {program.name} to interface {ifindex}: the kernel has no tcx links "
                "(Linux 6.6 and later have them)",
                errno.EINVAL,
            )
        if fd < 0:
            raise refusal(f"cannot attach {program.name} to interface {ifindex}", fd)
        return cls(fd)

    @classmethod
    def open_pinned(cls, path: Path) -> "Link":
        return cls(cls._get(path))

    def interface(self) -> int:
        """The index of the interface, 0 once that is gone."""
        return int(self._described().ifindex)

    def program_id(self) -> int:
        """Which program is attached."""
        return int(self._described().prog_id)

    def replace(self, program: Program) -> None:
        """Puts another program in the place of the one that is attached; no packet passes without one."""
        result = libbpf().bpf_link_update(self.fd, program.fd, None)
        if result < 0:
            raise refusal(f"cannot put {program.name} in the place of another program", result)

    def _described(self) -> _LinkInfo:
        info = _LinkInfo()
        _info(self.fd, info, "a link")
        if info.type != _LINK_TYPE_TCX:
            raise KernelError("a link is not to a network interface", errno.EINVAL)
        return info

    def detach(self) -> None:
        """Takes the program off its interface now; a link that only loses its last pin does so later."""
        result = libbpf().bpf_link_detach(self.fd)
        # ENOLINK, Linux 6.6: the interface went first.
        if result < 0 and result != -errno.ENOLINK:
            raise refusal("cannot detach a link", result)


class RingBuffer:
    """What programs have sent to a ring buffer and nobody has read; close it before its map."""

    _MOST = 4096

    def __init__(self, ring: Map) -> None:
        self._name = ring.name
        self._entries: list[bytes] = []
        # The library keeps the function's address, and this object the function.
        self._sample = RING_SAMPLE(self._take)
        self._pointer: int | None = libbpf().ring_buffer__new(ring.fd, self._sample, None, None)
        if not self._pointer:
            raise refusal(f"cannot read ring buffer {self._name}", -ctypes.get_errno())

    def _take(self, _context: int, data: int, size: int) -> int:
        self._entries.append(ctypes.string_at(data, size))
        # Programs may send faster than this reads.
        return -errno.ENOSPC if len(self._entries) >= self._MOST else 0

    def drain(self) -> list[bytes]:
        """The entries since the last time, in the order in which they came; 4096 at most, the others next time."""
        result = libbpf().ring_buffer__consume(self._pointer)
        if result < 0 and result != -errno.ENOSPC:
            raise refusal(f"cannot read ring buffer {self._name}", result)
        entries, self._entries = self._entries, []
        return entries

    def close(self) -> None:
        """Lets go of the memory shared with the kernel; again is no error."""
        if self._pointer is not None:
            libbpf().ring_buffer__free(self._pointer)
            self._pointer = None
