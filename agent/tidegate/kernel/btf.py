"""What a compiled object, or the running kernel, says about its types (BTF): linux/btf.h, read through libbpf.

Names of variables with their places, where the fields of structures lie, and layouts of types as text.
"""

import ctypes
import errno
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tidegate.kernel.errors import KernelError
from tidegate.kernel.libbpf import libbpf, warnings

# BTF_KIND_* of linux/btf.h
_VOID = 0
_INT = 1
_ARRAY = 3
_STRUCT = 4
_UNION = 5
_ENUM = 6
_DATASEC = 15
_TRANSPARENT = frozenset({8, 9, 10, 11, 14, 18})
"""Typedefs, volatile, const, restrict, variables and type tags: the type behind them is what counts."""

_TYPE = struct.Struct("=III")
"""struct btf_type"""
_MEMBER = struct.Struct("=III")
"""struct btf_member, struct btf_array and struct btf_var_secinfo"""
_ENUMERATOR = struct.Struct("=Ii")
"""struct btf_enum"""
_NUMBER = struct.Struct("=I")


class _Type(NamedTuple):
    name: str
    kind: int
    entries: int
    """How many entries follow it."""
    has_widths: bool
    """Whether its members' offsets have the width of a bit field in their upper eight bits (kind_flag)."""
    size: int
    """In bytes; of what has none, the number of the type that it refers to."""
    address: int
    """Where its entries begin."""


class Btf:
    """The types of an object that is open, or of the kernel; not to be used after it is closed."""

    def __init__(self, pointer: int, whose: str) -> None:
        """`whose` is how a KernelError calls what has these types."""
        self._pointer = pointer
        self._whose = whose

    def variables(self, section: str) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of each variable in a section; none where there is no such section."""
        number = libbpf().btf__find_by_name_kind(self._pointer, section.encode(), _DATASEC)
        if number < 0:
            return {}
        return {
            self._type(variable).name: (offset, size)
            for variable, offset, size in self._entries(self._type(number), _MEMBER)
        }

    def offset(self, structure: str, path: str) -> int | None:
        """Where a field lies, in bytes, by its path such as "ns.inum"; None where there is no such."""
        number = libbpf().btf__find_by_name_kind(self._pointer, structure.encode(), _STRUCT)
        return None if number < 0 else self._offset(number, path)

    def describe(self, number: int) -> str:
        """Where everything in a type is and what it is called, down to the integers; number 0 is no type."""
        described = self._behind(number)
        if described.kind == _VOID:
            return "nothing"
        if described.kind == _INT:
            (encoding,) = next(self._entries(described._replace(entries=1), _NUMBER))
            return f"{described.size} bytes as {encoding:#x}"
        if described.kind == _ARRAY:
            element, _, count = next(self._entries(described._replace(entries=1), _MEMBER))
            return f"{count} of ({self.describe(element)})"
        if described.kind in (_STRUCT, _UNION):
            members = ", ".join(
                f"{self._name(name)} at {offset}: {self.describe(member)}"
                for name, member, offset in self._entries(described, _MEMBER)
            )
            return f"{described.size} bytes {{{members}}}"
        if described.kind == _ENUM:
            names = ", ".join(
                f"{self._name(name)} = {value}"
                for name, value in self._entries(described, _ENUMERATOR)
            )
            return f"{described.size} bytes of {names}"
        return f"kind {described.kind}"

    def _offset(self, number: int, path: str) -> int | None:
        described = self._behind(number)
        if described.kind not in (_STRUCT, _UNION):
            return None
        first, _, rest = path.partition(".")
        for name_at, member, bits in self._entries(described, _MEMBER):
            name = self._name(name_at)
            offset = (bits & 0xFFFFFF if described.has_widths else bits) // 8
            if name == first and not rest:
                return offset
            if name in (first, ""):
                # What lies in a structure without a name is named as if it lay here.
                found = self._offset(member, rest if name else path)
                if found is not None:
                    return offset + found
        return None

    def _behind(self, number: int) -> _Type:
        """A type, behind whatever other names it has."""
        described = self._type(number)
        while described.kind in _TRANSPARENT:
            described = self._type(described.size)
        return described

    def _type(self, number: int) -> _Type:
        address = libbpf().btf__type_by_id(self._pointer, number)
        if not address:
            raise KernelError(f"{self._whose} has no type {number}")
        name, info, size = _TYPE.unpack(ctypes.string_at(address, _TYPE.size))
        return _Type(
            name=self._name(name),
            kind=info >> 24 & 0x1F,
            entries=info & 0xFFFF,
            has_widths=bool(info >> 31),
            size=size,
            address=address + _TYPE.size,
        )

    def _entries(self, described: _Type, entry: struct.Struct) -> Iterator[tuple[int, ...]]:
        data = ctypes.string_at(described.address, described.entries * entry.size)
        return entry.iter_unpack(data)

    def _name(self, offset: int) -> str:
        name: bytes = libbpf().btf__name_by_offset(self._pointer, offset)
        return name.decode()


def offsets_in_kernel(fields: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
    """Offset in bytes of each (structure, path of a field) of the running kernel; None where it has no such.

    KernelError when the kernel has no type information, or libbpf is not there.
    """
    with _kernel() as types:
        return {field: types.offset(*field) for field in fields}


@contextmanager
def _kernel() -> Iterator[Btf]:
    with warnings():
        pointer = libbpf().btf__load_vmlinux_btf()
    if not pointer:
        problem = (
            "the kernel has no type information (/sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF)"
        )
        raise KernelError(problem, ctypes.get_errno() or errno.ENOENT)
    try:
        yield Btf(pointer, "the kernel")
    finally:
        libbpf().btf__free(pointer)
