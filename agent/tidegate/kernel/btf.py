"""What a compiled object says about its types: linux/btf.h, read through libbpf.

Names of variables with their places, and layouts of types as text.
"""

import ctypes
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tidegate.kernel.errors import KernelError
from tidegate.kernel.libbpf import libbpf

# BTF_KIND_* of linux/btf.h
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
    size: int
    """In bytes; of what has none, the number of the type that it refers to."""
    address: int
    """Where its entries begin."""


class Btf:
    """The types of an object that is open; not to be used after it is closed."""

    def __init__(self, pointer: int | None) -> None:
        if not pointer:
            raise KernelError("a file of BPF programs has no BTF")
        self._pointer = pointer

    def variables(self, section: str) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of each variable in a section; none where there is no such section."""
        number = libbpf().btf__find_by_name_kind(self._pointer, section.encode(), _DATASEC)
        if number < 0:
            return {}
        return {
            self._type(variable).name: (offset, size)
            for variable, offset, size in self._entries(self._type(number), _MEMBER)
        }

    def describe(self, number: int) -> str:
        """Where everything in a type is and what it is called, down to the integers; 0 is no type."""
        if number == 0:
            return "nothing"
        described = self._type(number)
        if described.kind in _TRANSPARENT:
            return self.describe(described.size)
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

    def _type(self, number: int) -> _Type:
        address = libbpf().btf__type_by_id(self._pointer, number)
        if not address:
            raise KernelError(f"a file of BPF programs has no type {number}")
        name, info, size = _TYPE.unpack(ctypes.string_at(address, _TYPE.size))
        kind, entries = info >> 24 & 0x1F, info & 0xFFFF
        return _Type(self._name(name), kind, entries, size, address + _TYPE.size)

    def _entries(self, described: _Type, entry: struct.Struct) -> Iterator[tuple[int, ...]]:
        data = ctypes.string_at(described.address, described.entries * entry.size)
        return entry.iter_unpack(data)

    def _name(self, offset: int) -> str:
        name: bytes = libbpf().btf__name_by_offset(self._pointer, offset)
        return name.decode()
