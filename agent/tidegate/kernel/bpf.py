"""A typed door to bpf(2), through libbpf by ctypes: objects, maps, programs, links, and their pins.

Knows the library's and the kernel's calling conventions and turns every refusal into a KernelError; knows
nothing of what the programs are for. Everything here works on the calling thread's network namespace.
Handles hold a file descriptor until they are closed; what is pinned lives on without them.
"""

import contextlib
import ctypes
import enum
import errno
import functools
import mmap
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tidegate.kernel.errors import KernelError

LIBRARY = "libbpf.so.1"


class MapType(enum.IntEnum):
    """enum bpf_map_type of linux/bpf.h, as far as it is used here."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    STACK = 23


class AttachType(enum.IntEnum):
    """enum bpf_attach_type of linux/bpf.h, as far as it is used here."""

    TCX_INGRESS = 46
    TCX_EGRESS = 47


_LINK_TYPE_TCX = 11
_BATCH = 4096
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


_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_WARN = 0
"""LIBBPF_WARN of bpf/libbpf.h."""

# Result and arguments of each function, as bpf/bpf.h and bpf/libbpf.h declare them.
_int, _u32, _u64 = ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64
_text, _pointer, _size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_set_print": (_pointer, (_PRINT,)),
    "bpf_object__open_file": (_pointer, (_text, _pointer)),
    "bpf_object__load": (_int, (_pointer,)),
    "bpf_object__close": (None, (_pointer,)),
    "bpf_object__next_map": (_pointer, (_pointer, _pointer)),
    "bpf_object__next_program": (_pointer, (_pointer, _pointer)),
    "bpf_map__name": (_text, (_pointer,)),
    "bpf_map__fd": (_int, (_pointer,)),
    "bpf_map__is_internal": (ctypes.c_bool, (_pointer,)),
    "bpf_map__type": (_u32, (_pointer,)),
    "bpf_map__key_size": (_u32, (_pointer,)),
    "bpf_map__value_size": (_u32, (_pointer,)),
    "bpf_map__reuse_fd": (_int, (_pointer, _int)),
    "bpf_map__set_initial_value": (_int, (_pointer, _pointer, _size)),
    "bpf_program__name": (_text, (_pointer,)),
    "bpf_program__fd": (_int, (_pointer,)),
    "bpf_obj_get": (_int, (_text,)),
    "bpf_obj_pin": (_int, (_int, _text)),
    "bpf_obj_get_info_by_fd": (_int, (_int, _pointer, ctypes.POINTER(_u32))),
    "bpf_link_create": (_int, (_int, _int, _int, _pointer)),
    "bpf_link_detach": (_int, (_int,)),
    "bpf_map_lookup_elem": (_int, (_int, _pointer, _pointer)),
    "bpf_map_update_elem": (_int, (_int, _pointer, _pointer, _u64)),
    "bpf_map_delete_elem": (_int, (_int, _pointer)),
    "bpf_map_lookup_batch": (
        _int,
        (_int, _pointer, _pointer, _pointer, _pointer, ctypes.POINTER(_u32), _pointer),
    ),
    "bpf_prog_test_run_opts": (_int, (_int, ctypes.POINTER(_TestRunOptions))),
}

_said = threading.local()


def _on_print(level: int, form: bytes, arguments: int) -> int:
    """Keeps libbpf's warnings for the KernelError of this thread's current call."""
    lines: list[str] | None = getattr(_said, "lines", None)
    if level == _WARN and lines is not None:
        text = ctypes.create_string_buffer(1 << 20)
        _libc().vsnprintf(text, len(text), form, arguments)
        lines.append(text.value.decode(errors="replace"))
    return 0


_on_print_c = _PRINT(_on_print)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.vsnprintf.argtypes = (_pointer, _size, _text, _pointer)
    return libc


@functools.cache
def _libbpf() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as error:
        raise KernelError(
            f"{LIBRARY} cannot be loaded ({error}); Debian has it in libbpf1"
        ) from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    library.libbpf_set_print(_on_print_c)
    return library


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    _said.lines = lines
    try:
        yield lines
    finally:
        _said.lines = None


def _refusal(what: str, result: int) -> KernelError:
    number = -result if result < 0 else ctypes.get_errno()
    return KernelError(f"{what}: {os.strerror(number)}", number)


_INSTRUCTION = re.compile(r"^\d+: \([0-9a-f]{2}\) .*")
_LOG_BEGIN, _LOG_END = "-- BEGIN PROG LOAD LOG --", "-- END PROG LOAD LOG --"


def verifier_message(said: str) -> str:
    """What the verifier objected to, out of libbpf's output: program, reason, instruction, source line.

    Empty where the output holds no verifier log.
    """
    if _LOG_BEGIN not in said:
        return ""
    program = re.search(r"prog '([^']+)'", said)
    log = said.partition(_LOG_BEGIN)[2].partition(_LOG_END)[0]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"processed \d+ insns|verification time", line)]
    if not lines:
        return ""
    instruction = next((line for line in reversed(lines) if _INSTRUCTION.match(line)), "")
    source = next((line for line in reversed(lines) if line.startswith(";")), "")
    parts = [f"the verifier rejects {program[1] if program else 'the program'}: {lines[-1]}"]
    if instruction:
        parts.append(f"at instruction {instruction.partition(' ; ')[0]}")
    if source:
        parts.append(f"source: {source.lstrip('; ')}")
    return "; ".join(parts)


class _Handle:
    """Something that the kernel keeps as long as this file descriptor, or a pin, refers to it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def pin(self, path: Path) -> None:
        """Gives it a name on a bpffs, under which it outlives this process."""
        result = _libbpf().bpf_obj_pin(self.fd, bytes(path))
        if result < 0:
            raise _refusal(f"cannot pin at {path} (is it on a bpffs?)", result)

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
        fd: int = _libbpf().bpf_obj_get(bytes(path))
        if fd < 0:
            raise _refusal(f"cannot open the pin {path}", fd)
        return fd


def _info(fd: int, info: ctypes.Structure, what: str) -> None:
    size = _u32(ctypes.sizeof(info))
    result = _libbpf().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    if result < 0:
        raise _refusal(f"cannot ask about {what}", result)


@functools.cache
def possible_cpus() -> int:
    """How many values an element of a per-processor map has."""
    return int(re.split(r"[-,]", _POSSIBLE_CPUS.read_text().strip())[-1]) + 1


class Map(_Handle):
    """A map in the kernel. Keys and values are bytes of exactly key_size and value_size."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name
        info = _MapInfo()
        _info(fd, info, f"map {name}")
        self.type = info.type
        self.id: int = info.id
        """The kernel's number for this map: no other map has it until the next boot."""
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.max_entries: int = info.max_entries

    @classmethod
    def open_pinned(cls, path: Path) -> "Map":
        return cls(cls._get(path), path.name)

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, or None. For a per-processor map: all values, one behind the other."""
        size = self.value_size
        if self.type == MapType.PERCPU_ARRAY:
            size = (size + 7) // 8 * 8 * possible_cpus()
        value = ctypes.create_string_buffer(size)
        result = _libbpf().bpf_map_lookup_elem(self.fd, self._key(key), value)
        if result == -errno.ENOENT:
            return None
        if result < 0:
            raise _refusal(f"cannot look into map {self.name}", result)
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Sets the value of a key; a hash replaces a value as a whole."""
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name} has values of {self.value_size} bytes")
        result = _libbpf().bpf_map_update_elem(self.fd, self._key(key), value, 0)
        if result < 0:
            raise _refusal(f"cannot set a value of map {self.name}", result)

    def delete(self, key: bytes) -> bool:
        """Removes a key; whether it was there."""
        result = _libbpf().bpf_map_delete_elem(self.fd, self._key(key))
        if result == -errno.ENOENT:
            return False
        if result < 0:
            raise _refusal(f"cannot remove a key of map {self.name}", result)
        return True

    def push(self, value: bytes) -> None:
        """Puts a value on a stack or into a queue; a KernelError when that is full."""
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name} has values of {self.value_size} bytes")
        result = _libbpf().bpf_map_update_elem(self.fd, None, value, 0)
        if result < 0:
            raise _refusal(f"cannot put a value into map {self.name}", result)

    def mapped(self, size: int | None = None) -> mmap.mmap:
        """The memory of an array that was made to be mapped, all or its first bytes: values one behind the other.

        Each value begins at a multiple of eight bytes. The caller closes it.
        """
        if size is None:
            size = (self.value_size + 7) // 8 * 8 * self.max_entries
        try:
            return mmap.mmap(self.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        except OSError as error:
            raise _refusal(f"cannot map the memory of map {self.name}", -(error.errno or 0)) from None

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
            result = _libbpf().bpf_map_lookup_batch(
                self.fd, start, token, keys, values, ctypes.byref(count), None
            )
            if result == -errno.ENOSPC and size < self.max_entries:
                # One bucket of the hash holds more than a batch.
                size = min(2 * size, self.max_entries)
                continue
            if result < 0 and result != -errno.ENOENT:
                raise _refusal(f"cannot read map {self.name}", result)
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
        result = _libbpf().bpf_prog_test_run_opts(self.fd, ctypes.byref(options))
        if result < 0:
            raise _refusal(f"cannot run program {self.name}", result)
        return TestRun(ctypes.c_int32(options.retval).value, options.duration)


class Link(_Handle):
    """A program attached to an interface, as long as this handle or a pin lives."""

    @classmethod
    def attach(cls, program: Program, ifindex: int, where: AttachType) -> "Link":
        """Attaches behind the programs that are there already. Needs Linux 6.6 (tcx)."""
        fd = _libbpf().bpf_link_create(program.fd, ifindex, where, None)
        if fd == -errno.EINVAL:
            raise KernelError(
                f"cannot attach {program.name} to interface {ifindex}: the kernel has no tcx links "
                "(Linux 6.6 and later have them)",
                errno.EINVAL,
            )
        if fd < 0:
            raise _refusal(f"cannot attach {program.name} to interface {ifindex}", fd)
        return cls(fd)

    @classmethod
    def open_pinned(cls, path: Path) -> "Link":
        return cls(cls._get(path))

    def interface(self) -> int:
        """The index of the interface, 0 once that is gone."""
        info = _LinkInfo()
        _info(self.fd, info, "a link")
        return int(info.ifindex) if info.type == _LINK_TYPE_TCX else 0

    def detach(self) -> None:
        """Takes the program off its interface now; a link that only loses its last pin does so later."""
        result = _libbpf().bpf_link_detach(self.fd)
        # ENOLINK, Linux 6.6: the interface went first.
        if result < 0 and result != -errno.ENOLINK:
            raise _refusal("cannot detach a link", result)


class Object:
    """A compiled file of programs and maps: open it, settle its maps, load it, take out what was made.

    What is taken out lives on when the object is closed.
    """

    def __init__(self, pointer: int, path: Path) -> None:
        self._pointer: int | None = pointer
        self._path = path

    @classmethod
    def open(cls, path: Path) -> "Object":
        if not path.is_file():
            raise KernelError(
                f"{path}: no such file; compiled programs are part of the package", errno.ENOENT
            )
        with _warnings() as said:
            pointer = _libbpf().bpf_object__open_file(bytes(path), None)
        if not pointer:
            reason = said[-1].strip() if said else os.strerror(ctypes.get_errno())
            raise KernelError(f"{path} is not a file of BPF programs: {reason}", ctypes.get_errno())
        return cls(pointer, path)

    def map_names(self) -> tuple[str, ...]:
        """The maps that the source declares, without those that hold its constants and variables."""
        return tuple(
            name for name, handle in self._maps() if not _libbpf().bpf_map__is_internal(handle)
        )

    def reuse(self, existing: Map) -> None:
        """Loads with a map that exists, of the same name. A KernelError if it has another layout."""
        handle = self._map(existing.name)
        library = _libbpf()
        wanted = (
            library.bpf_map__type(handle),
            library.bpf_map__key_size(handle),
            library.bpf_map__value_size(handle),
        )
        found = (existing.type, existing.key_size, existing.value_size)
        for what, want, have in zip(("type", "key size", "value size"), wanted, found, strict=True):
            if want != have:
                raise KernelError(
                    f"map {existing.name} exists with another layout: its {what} is {have}, "
                    f"these programs need {want}",
                    errno.EEXIST,
                )
        self._check(library.bpf_map__reuse_fd(handle, existing.fd), f"reuse map {existing.name}")

    def set_constants(self, value: bytes) -> None:
        """Sets the `const volatile` variables of the programs: the whole of .rodata."""
        name, handle = next(
            ((name, handle) for name, handle in self._maps() if name.endswith(".rodata")),
            ("", None),
        )
        if handle is None:
            raise KernelError(f"{self._path} has no constants to set")
        result = _libbpf().bpf_map__set_initial_value(handle, value, len(value))
        self._check(result, f"set the {len(value)} bytes of {name}")

    def load(self) -> None:
        """Makes the maps and gives the programs to the verifier."""
        with _warnings() as said:
            result = _libbpf().bpf_object__load(self._pointer)
        if result < 0:
            text = "".join(said)
            reason = verifier_message(text) or (said[-1].strip() if said else os.strerror(-result))
            raise KernelError(f"cannot load {self._path.name}: {reason}", -result)

    def map(self, name: str) -> Map:
        """A handle of its own on a loaded map."""
        return Map(os.dup(_libbpf().bpf_map__fd(self._map(name))), name)

    def program(self, name: str) -> Program:
        """A handle of its own on a loaded program."""
        library = _libbpf()
        handle = library.bpf_object__next_program(self._pointer, None)
        while handle:
            if library.bpf_program__name(handle).decode() == name:
                return Program(os.dup(library.bpf_program__fd(handle)), name)
            handle = library.bpf_object__next_program(self._pointer, handle)
        raise KernelError(f"{self._path} has no program {name}")

    def close(self) -> None:
        """Frees the object; again is no error."""
        if self._pointer is not None:
            _libbpf().bpf_object__close(self._pointer)
            self._pointer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _maps(self) -> Iterator[tuple[str, int]]:
        library = _libbpf()
        handle = library.bpf_object__next_map(self._pointer, None)
        while handle:
            yield library.bpf_map__name(handle).decode(), handle
            handle = library.bpf_object__next_map(self._pointer, handle)

    def _map(self, name: str) -> int:
        for found, handle in self._maps():
            if found == name:
                return handle
        raise KernelError(f"{self._path} has no map {name}")

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            raise _refusal(f"{self._path.name}: cannot {what}", result)
