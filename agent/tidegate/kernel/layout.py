"""Where the fields of the running kernel's own structures lie, by its type information (BTF), read with libbpf."""

import ctypes
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tidegate.kernel.errors import KernelError
from tidegate.kernel.libbpf import libbpf, warnings

# linux/btf.h
_STRUCT, _UNION = 4, 5
_NAMES_ANOTHER = (8, 9, 10, 11, 18)
"""BTF_KIND_TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG: another name, or a quality, of the type they refer to."""
_ENTRY = ctypes.c_uint32 * 3
"""struct btf_type: name, info, size or type. And struct btf_member, which follow it: name, type, offset."""


def offsets(fields: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
    """Offset in bytes of each (structure, path of a field such as "ns.inum"); None where this kernel has no such.

    KernelError when the kernel has no type information, or libbpf is not there.
    """
    with _types() as types:
        return {(name, path): _offset(types, name, path) for name, path in fields}


@contextmanager
def _types() -> Iterator[int]:
    with warnings():
        types = libbpf().btf__load_vmlinux_btf()
    if not types:
        problem = (
            "the kernel has no type information (/sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF)"
        )
        raise KernelError(problem, ctypes.get_errno() or errno.ENOENT)
    try:
        yield types
    finally:
        libbpf().btf__free(types)


def _offset(types: int, structure: str, path: str) -> int | None:
    number = libbpf().btf__find_by_name_kind(types, structure.encode(), _STRUCT)
    return None if number < 0 else _offset_in(types, number, path)


def _offset_in(types: int, number: int, path: str) -> int | None:
    first, _, rest = path.partition(".")
    for name, member_type, offset in _members(types, number):
        if name == first and not rest:
            return offset
        if name in (first, ""):
            # What lies in a structure without a name is named as if it lay here.
            found = _offset_in(types, member_type, rest if name else path)
            if found is not None:
                return offset + found
    return None


def _members(types: int, number: int) -> Iterator[tuple[str, int, int]]:
    """Name, type and offset in bytes of each field; none of what is no structure."""
    address, kind = _resolved(types, number)
    if kind not in (_STRUCT, _UNION):
        return
    _, info, _ = _ENTRY.from_address(address)
    for index in range(info & 0xFFFF):
        at = address + ctypes.sizeof(_ENTRY) * (index + 1)
        name, member_type, offset = _ENTRY.from_address(at)
        # With kind_flag the upper eight bits are the width of a bit field.
        bits = offset & 0xFFFFFF if info >> 31 else offset
        yield libbpf().btf__name_by_offset(types, name).decode(), member_type, bits // 8


def _resolved(types: int, number: int) -> tuple[int, int]:
    """Address and kind of a type, behind whatever other names it has."""
    while True:
        address = libbpf().btf__type_by_id(types, number)
        _, info, number = _ENTRY.from_address(address)
        kind = info >> 24 & 0x1F
        if kind not in _NAMES_ANOTHER:
            return address, kind
