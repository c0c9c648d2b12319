"""libnftables in this process: loading and listing, in the calling thread's namespace.

One call is one transaction: the kernel takes all of it or nothing. No process starts. Knows the library's C interface
(nftables/libnftables.h); which tables and rules there should be is not its business.

The library is written for a program that ends with its command: it calls exit(3) when memory is short, and parses
whatever the namespace holds. Where others may have put something there, call these functions by isolation.run_in.
"""

import ctypes
import enum
import errno
import functools
import json
import os
import re
import threading
from typing import Any

from tidegate.kernel import nf_tables
from tidegate.kernel.errors import KernelError

LIBRARY = "libnftables.so.1"

Object = dict[str, Any]
"""One command in libnftables' JSON schema, such as {"add": {"table": {...}}}."""


class _Output(enum.IntFlag):
    """NFT_CTX_OUTPUT_* of nftables/libnftables.h."""

    STATELESS = 1 << 2
    JSON = 1 << 4
    NUMERIC_PROTO = 1 << 7
    NUMERIC_PRIO = 1 << 8
    NUMERIC_SYMBOL = 1 << 9


_NUMERIC = _Output.NUMERIC_PROTO | _Output.NUMERIC_PRIO | _Output.NUMERIC_SYMBOL

_PLACE = re.compile(r"([^\s:]+:[0-9]+:[0-9]+-[0-9]+: )?Error: ")
"""How the library begins a complaint: of JSON with a place in it, of text without."""

_one_at_a_time = threading.Lock()
"""The library keeps global state (names, a cache of interfaces): one context at a time."""

# A child that forks off must find the library at rest (isolation.py).
os.register_at_fork(
    before=_one_at_a_time.acquire,
    after_in_parent=_one_at_a_time.release,
    after_in_child=_one_at_a_time.release,
)


def prepare() -> None:
    """Load the library, as has to be done before isolation.run_in. KernelError when it is not there."""
    _library()


def load(text: str) -> None:
    """Load commands in nft(8)'s syntax into the current namespace, in one transaction.

    KernelError with the library's message when the library or the kernel refuses any of them; then
    nothing has changed.
    """
    _call(text, _NUMERIC)


def list_text(family: str, name: str) -> str | None:
    """A table of the current namespace in nft(8)'s syntax, without counts; None without a table.

    Of a table with flags (enum nft_table_flags, such as dormant) only the flags, as a number: libnftables 1.0.6
    prints them out of memory that it has freed.
    """
    flags = nf_tables.table_flags(family, name)
    if flags is None:
        return None
    if flags:
        return f"table {family} {name} {{\n\tflags {flags}\n}}\n"
    output = _Output.NUMERIC_PROTO | _Output.NUMERIC_PRIO | _Output.STATELESS
    return _call(f"list table {family} {name}", output)


def run(commands: list[Object]) -> None:
    """Load `commands` into the current namespace in one transaction.

    KernelError with the library's message when the library or the kernel refuses any of them; then
    nothing has changed.
    """
    _call(json.dumps({"nftables": commands}), _NUMERIC | _Output.JSON)


def _call(commands: str, output: _Output) -> str:
    library = _library()
    with _one_at_a_time:
        context = library.nft_ctx_new(0)
        if not context:
            raise KernelError("libnftables gives no context: out of memory", errno.ENOMEM)
        try:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_output_set_flags(context, output)
            failed = library.nft_run_cmd_from_buffer(context, commands.encode())
            listed: bytes = library.nft_ctx_get_output_buffer(context)
            problem: bytes = library.nft_ctx_get_error_buffer(context)
        finally:
            library.nft_ctx_free(context)
    if failed:
        raise _refusal(problem.decode(errors="replace"))
    return listed.decode(errors="replace")


def _refusal(problem: str) -> KernelError:
    """The library tells the kernel's error number by its text only, in its first line."""
    reason = _PLACE.sub("", (problem.strip().splitlines() or ["no reason given"])[0], count=1)
    meant = [number for number in errno.errorcode if os.strerror(number) in reason]
    number = max(meant, key=lambda number: len(os.strerror(number)), default=0)
    return KernelError(f"nftables: {reason}", number)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise KernelError(f"cannot load {LIBRARY}: {error}") from error
    context = ctypes.c_void_p
    for name, result, arguments in (
        ("nft_ctx_new", context, [ctypes.c_uint32]),
        ("nft_ctx_free", None, [context]),
        ("nft_ctx_output_set_flags", None, [context, ctypes.c_uint]),
        ("nft_ctx_buffer_output", ctypes.c_int, [context]),
        ("nft_ctx_buffer_error", ctypes.c_int, [context]),
        ("nft_ctx_get_output_buffer", ctypes.c_char_p, [context]),
        ("nft_ctx_get_error_buffer", ctypes.c_char_p, [context]),
        ("nft_run_cmd_from_buffer", ctypes.c_int, [context, ctypes.c_char_p]),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
