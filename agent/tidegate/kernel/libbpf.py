"""libbpf by ctypes: the functions that are used of it, as its headers declare them, and what it says when it refuses.

Knows the library's calling conventions. Every refusal becomes a KernelError.
"""

import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

from tidegate.kernel.errors import KernelError

LIBRARY = "libbpf.so.1"

RING_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
"""ring_buffer_sample_fn of bpf/libbpf.h."""

_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_WARN = 0
"""LIBBPF_WARN of bpf/libbpf.h."""

# Result and arguments of each function, as bpf/bpf.h and bpf/libbpf.h declare them.
_int, _u32, _u64 = ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64
_text, _pointer, _size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_set_print": (_pointer, (_PRINT,)),
    "bpf_object__open_mem": (_pointer, (_pointer, _size, _pointer)),
    "bpf_object__load": (_int, (_pointer,)),
    "bpf_object__close": (None, (_pointer,)),
    "bpf_object__btf": (_pointer, (_pointer,)),
    "bpf_object__next_map": (_pointer, (_pointer, _pointer)),
    "bpf_object__next_program": (_pointer, (_pointer, _pointer)),
    "bpf_map__name": (_text, (_pointer,)),
    "bpf_map__fd": (_int, (_pointer,)),
    "bpf_map__is_internal": (ctypes.c_bool, (_pointer,)),
    "bpf_map__type": (_u32, (_pointer,)),
    "bpf_map__key_size": (_u32, (_pointer,)),
    "bpf_map__value_size": (_u32, (_pointer,)),
    "bpf_map__max_entries": (_u32, (_pointer,)),
    "bpf_map__map_flags": (_u32, (_pointer,)),
    "bpf_map__btf_key_type_id": (_u32, (_pointer,)),
    "bpf_map__btf_value_type_id": (_u32, (_pointer,)),
    "bpf_map__reuse_fd": (_int, (_pointer, _int)),
    "bpf_map__set_max_entries": (_int, (_pointer, _u32)),
    "bpf_map__initial_value": (_pointer, (_pointer, ctypes.POINTER(_size))),
    "btf__type_by_id": (_pointer, (_pointer, _u32)),
    "btf__name_by_offset": (_text, (_pointer, _u32)),
    "btf__find_by_name_kind": (_int, (_pointer, _text, _u32)),
    "btf__load_vmlinux_btf": (_pointer, ()),
    "btf__free": (None, (_pointer,)),
    "bpf_program__name": (_text, (_pointer,)),
    "bpf_program__fd": (_int, (_pointer,)),
    "bpf_obj_get": (_int, (_text,)),
    "bpf_obj_pin": (_int, (_int, _text)),
    "bpf_obj_get_info_by_fd": (_int, (_int, _pointer, ctypes.POINTER(_u32))),
    "bpf_program__set_autoload": (_int, (_pointer, ctypes.c_bool)),
    "bpf_link_create": (_int, (_int, _int, _int, _pointer)),
    "bpf_link_update": (_int, (_int, _int, _pointer)),
    "bpf_link_detach": (_int, (_int,)),
    "bpf_map_lookup_elem": (_int, (_int, _pointer, _pointer)),
    "bpf_map_update_elem": (_int, (_int, _pointer, _pointer, _u64)),
    "bpf_map_delete_elem": (_int, (_int, _pointer)),
    "bpf_map_lookup_batch": (
        _int,
        (_int, _pointer, _pointer, _pointer, _pointer, ctypes.POINTER(_u32), _pointer),
    ),
    "bpf_prog_query": (
        _int,
        (_int, _u32, _u32, _pointer, _pointer, ctypes.POINTER(_u32)),
    ),
    "bpf_prog_get_fd_by_id": (_int, (_u32,)),
    "bpf_prog_test_run_opts": (_int, (_int, _pointer)),
    "ring_buffer__new": (_pointer, (_int, RING_SAMPLE, _pointer, _pointer)),
    "ring_buffer__consume": (_int, (_pointer,)),
    "ring_buffer__free": (None, (_pointer,)),
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
def libbpf() -> ctypes.CDLL:
    """The library, with the types of its functions. KernelError when this system has none."""
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
def warnings() -> Iterator[list[str]]:
    """What libbpf warns of meanwhile, on this thread."""
    lines: list[str] = []
    _said.lines = lines
    try:
        yield lines
    finally:
        _said.lines = None


def refusal(what: str, result: int) -> KernelError:
    """That something cannot be done, with the kernel's reason: a negative result, or errno where it is none."""
    number = -result if result < 0 else ctypes.get_errno()
    return KernelError(f"{what}: {os.strerror(number)}", number)


_INSTRUCTION = re.compile(r"\d+: \([0-9a-f]{2}\) ")
_SOURCE = re.compile(r"; *[^ @]")
_ASIDE = re.compile(
    r"processed \d+ insns|verification time|stack depth|(cur|old) state:|mark_precise:"
)
"""Lines of a log that say how it went, and not what is wrong."""
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
    lines = [line for line in lines if not _ASIDE.match(line)]
    if not lines:
        return ""
    instruction = next((line for line in reversed(lines) if _INSTRUCTION.match(line)), "")
    source = next((line for line in reversed(lines) if _SOURCE.match(line)), "")
    parts = [f"the verifier rejects {program[1] if program else 'the program'}: {lines[-1]}"]
    if instruction:
        parts.append(f"at instruction {instruction.partition(' ; ')[0].rstrip()}")
    if source:
        parts.append(f"source: {source.lstrip('; ')}")
    return "; ".join(parts)
