"""Compiled files of BPF programs: opened, given their maps and constants, loaded.

What is made of them are the handles of kernel/bpf.py, which live on when the file is closed.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tidegate.kernel.bpf import Map, MapDefinition, Program
from tidegate.kernel.btf import Btf
from tidegate.kernel.errors import KernelError
from tidegate.kernel.libbpf import libbpf, refusal, verifier_message, warnings


class _OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts of bpf/libbpf.h, its beginning."""

    _fields_ = (("sz", ctypes.c_size_t), ("object_name", ctypes.c_char_p))


_CONSTANTS = ".rodata"
"""The section of `const volatile` variables, and the end of the name of the map that holds it."""


def read_object(path: Path) -> bytes:
    """What is in a compiled file. A KernelError when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KernelError(
            f"{path}: no such file; compiled programs are part of the package", errno.ENOENT
        ) from None
    except OSError as error:
        raise KernelError(f"{path} cannot be read: {error.strerror}", error.errno or 0) from error


class Object:
    """A compiled file of programs and maps: open it, settle its maps, load it, take out what was made.

    What is taken out lives on when the object is closed.
    """

    def __init__(self, pointer: int, path: Path) -> None:
        self._pointer: int | None = pointer
        self._path = path

    @classmethod
    def open(cls, path: Path, content: bytes | None = None) -> "Object":
        """Opens a file, or what is known to have been in it."""
        if content is None:
            content = read_object(path)
        options = _OpenOptions(
            sz=ctypes.sizeof(_OpenOptions), object_name=path.name.partition(".")[0].encode()
        )
        with warnings() as said:
            pointer = libbpf().bpf_object__open_mem(content, len(content), ctypes.byref(options))
        if not pointer:
            reason = said[-1].strip() if said else os.strerror(ctypes.get_errno())
            raise KernelError(f"{path} is not a file of BPF programs: {reason}", ctypes.get_errno())
        return cls(pointer, path)

    def map_names(self) -> tuple[str, ...]:
        """The maps that the source declares, without those that hold its constants and variables."""
        return tuple(
            name for name, handle in self._maps() if not libbpf().bpf_map__is_internal(handle)
        )

    def definition(self, name: str) -> MapDefinition:
        """What a map of these programs has to be."""
        library, handle = libbpf(), self._map(name)
        return MapDefinition(
            type=library.bpf_map__type(handle),
            key_size=library.bpf_map__key_size(handle),
            value_size=library.bpf_map__value_size(handle),
            max_entries=library.bpf_map__max_entries(handle),
            flags=library.bpf_map__map_flags(handle),
        )

    def layout(self, name: str) -> str:
        """All that makes the content of a map what it is: its definition, and the fields of its keys and values.

        Equal texts are equal layouts, also of other objects.
        """
        library, handle, types = libbpf(), self._map(name), self._btf()
        key = types.describe(library.bpf_map__btf_key_type_id(handle))
        value = types.describe(library.bpf_map__btf_value_type_id(handle))
        return f"{name} {tuple(self.definition(name))} {key} -> {value}"

    def reuse(self, existing: Map) -> None:
        """Loads with a map that exists, of the same name. A KernelError if it is not as these programs need it."""
        wanted = self.definition(existing.name)
        for what, want, have in zip(
            MapDefinition._fields, wanted, existing.definition(), strict=True
        ):
            if want != have:
                raise KernelError(
                    f"map {existing.name} exists with another layout: its {what.replace('_', ' ')} is {have}, "
                    f"these programs need {want}",
                    errno.EEXIST,
                )
        result = libbpf().bpf_map__reuse_fd(self._map(existing.name), existing.fd)
        self._check(result, f"reuse map {existing.name}")

    def resize(self, name: str, max_entries: int) -> None:
        """Has a map made with room for so many entries; a ring buffer, for so many bytes."""
        result = libbpf().bpf_map__set_max_entries(self._map(name), max_entries)
        self._check(result, f"make map {name} with {max_entries} entries")

    def constants(self) -> tuple[str, ...]:
        """Names of the `const volatile` variables of the programs."""
        return tuple(self._btf().variables(_CONSTANTS))

    def set_constants(self, **values: int) -> None:
        """Sets `const volatile` variables of the programs, by name; the others keep what the source says."""
        variables = self._btf().variables(_CONSTANTS)
        size = ctypes.c_size_t()
        begin = 0
        for name, handle in self._maps():
            if name.endswith(_CONSTANTS):
                begin = libbpf().bpf_map__initial_value(handle, ctypes.byref(size)) or 0
        for name, value in values.items():
            if name not in variables or not begin:
                raise KernelError(f"{self._path} has no constant {name}")
            offset, length = variables[name]
            ctypes.memmove(begin + offset, value.to_bytes(length, sys.byteorder), length)

    def leave_out_programs(self) -> None:
        """Has `load` make the maps, and give no program to the verifier."""
        for handle in self._programs():
            libbpf().bpf_program__set_autoload(handle, False)

    def load(self) -> None:
        """Makes the maps and gives the programs to the verifier."""
        with warnings() as said:
            result = libbpf().bpf_object__load(self._pointer)
        if result < 0:
            text = "".join(said)
            reason = verifier_message(text) or (said[-1].strip() if said else os.strerror(-result))
            raise KernelError(f"cannot load {self._path.name}: {reason}", -result)

    def map(self, name: str) -> Map:
        """A handle of its own on a loaded map."""
        return Map(os.dup(libbpf().bpf_map__fd(self._map(name))), name)

    def program(self, name: str) -> Program:
        """A handle of its own on a loaded program."""
        library = libbpf()
        for handle in self._programs():
            if library.bpf_program__name(handle).decode() == name:
                return Program(os.dup(library.bpf_program__fd(handle)), name)
        raise KernelError(f"{self._path} has no program {name}")

    def close(self) -> None:
        """Frees the object; again is no error."""
        if self._pointer is not None:
            libbpf().bpf_object__close(self._pointer)
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
        library = libbpf()
        handle = library.bpf_object__next_map(self._pointer, None)
        while handle:
            yield library.bpf_map__name(handle).decode(), handle
            handle = library.bpf_object__next_map(self._pointer, handle)

    def _programs(self) -> Iterator[int]:
        library = libbpf()
        handle = library.bpf_object__next_program(self._pointer, None)
        while handle:
            yield handle
            handle = library.bpf_object__next_program(self._pointer, handle)

    def _btf(self) -> Btf:
        pointer = libbpf().bpf_object__btf(self._pointer)
        if not pointer:
            raise KernelError(f"{self._path} has no BTF")
        return Btf(pointer, str(self._path))

    def _map(self, name: str) -> int:
        for found, handle in self._maps():
            if found == name:
                return handle
        raise KernelError(f"{self._path} has no map {name}")

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            raise refusal(f"{self._path.name}: cannot {what}", result)
