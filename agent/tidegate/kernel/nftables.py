"""libnftables in this process: commands and listings as JSON, in the calling thread's namespace.

One call is one transaction: the kernel takes all of it or nothing. No process starts and no text
is put together. Knows the library's C interface (nftables/libnftables.h) and JSON schema
(libnftables-json(5)); which tables and rules there should be is not its business.
"""

import ctypes
import errno
import functools
import json
import os
import socket
import struct
import threading
from typing import Any

from tidegate.kernel.errors import KernelError

LIBRARY = "libnftables.so.1"

Object = dict[str, Any]
"""One JSON object of libnftables' schema, such as {"add": {"table": {...}}} or {"rule": {...}}."""

# nftables/libnftables.h
_NFT_CTX_OUTPUT_JSON = 1 << 4
_NFT_CTX_OUTPUT_NUMERIC_PROTO = 1 << 7
_NFT_CTX_OUTPUT_NUMERIC_PRIO = 1 << 8
_NFT_CTX_OUTPUT_NUMERIC_SYMBOL = 1 << 9
_OUTPUT = (
    _NFT_CTX_OUTPUT_JSON
    | _NFT_CTX_OUTPUT_NUMERIC_PROTO
    | _NFT_CTX_OUTPUT_NUMERIC_PRIO
    | _NFT_CTX_OUTPUT_NUMERIC_SYMBOL
)

_NOWHERE = "internal:0:0-0: Error: "
"""How the library names the place of an error in JSON input, which it does not know."""

_one_at_a_time = threading.Lock()
"""The library keeps global state (names, a cache of interfaces): one context at a time."""


def run(commands: list[Object]) -> None:
    """Load `commands` into the current namespace in one transaction.

    KernelError with the library's message when the library or the kernel refuses any of them; then
    nothing has changed.
    """
    _call({"nftables": commands})


def list_table(family: str, name: str) -> list[Object] | None:
    """What a table of the current namespace holds, in the kernel's order; None without a table.

    Of a table with flags (enum nft_table_flags, such as dormant) only the table itself is listed, with its
    flags as a number: libnftables 1.0.6 prints them out of memory that it has freed.
    """
    flags = _table_flags(family, name)
    if flags is None:
        return None
    if flags:
        return [{"table": {"family": family, "name": name, "flags": flags}}]
    listed = _call({"nftables": [{"list": {"table": {"family": family, "name": name}}}]})
    return [item for item in listed if "metainfo" not in item]


# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NFT_MSG_GETTABLE = 10 << 8 | 1
_NFTA_TABLE_NAME = 1
_NFTA_TABLE_FLAGS = 2
_NFPROTO = {"inet": 1, "ip": 2, "ip6": 10}
_HEADER = struct.Struct("=IHHIIBBH")
"""struct nlmsghdr and struct nfgenmsg"""
_ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr"""
_NETLINK_ANSWER = 8192


def _table_flags(family: str, name: str) -> int | None:
    text = name.encode() + b"\0"
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(text), _NFTA_TABLE_NAME) + text
    attribute += bytes(-len(attribute) % 4)
    length = _HEADER.size + len(attribute)
    header = _HEADER.pack(length, _NFT_MSG_GETTABLE, _NLM_F_REQUEST, 0, 0, _NFPROTO[family], 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.send(header + attribute)
        answer = netlink.recv(_NETLINK_ANSWER)
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, 16)[0]
        if number == errno.ENOENT:
            return None
        raise KernelError(f"cannot read nftables: {os.strerror(number)}", number)
    return _flags_in(answer[_HEADER.size :])


def _flags_in(attributes: bytes) -> int:
    at = 0
    while at < len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if kind == _NFTA_TABLE_FLAGS:
            return int.from_bytes(attributes[at + _ATTRIBUTE.size : at + length], "big")
        at += (length + 3) & ~3
    return 0


def _call(request: Object) -> list[Object]:
    library = _library()
    with _one_at_a_time:
        context = library.nft_ctx_new(0)
        if not context:
            raise KernelError("libnftables gives no context: out of memory", errno.ENOMEM)
        try:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_output_set_flags(context, _OUTPUT)
            failed = library.nft_run_cmd_from_buffer(context, json.dumps(request).encode())
            output: bytes = library.nft_ctx_get_output_buffer(context)
            problem: bytes = library.nft_ctx_get_error_buffer(context)
        finally:
            library.nft_ctx_free(context)
    if failed:
        raise _refusal(problem.decode(errors="replace"))
    listed: list[Object] = json.loads(output)["nftables"] if output.strip() else []
    return listed


def _refusal(problem: str) -> KernelError:
    """The library tells the kernel's error number by its text only, in its first line."""
    reason = (problem.strip().splitlines() or ["no reason given"])[0].removeprefix(_NOWHERE)
    kernel_errors = (number for number in errno.errorcode if reason.endswith(os.strerror(number)))
    return KernelError(f"nftables: {reason}", next(kernel_errors, 0))


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
