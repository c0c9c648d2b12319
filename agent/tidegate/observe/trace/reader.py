"""Compiles a program with bcc, attaches it, prints what it tells. Run by the system's Python, never imported.

bcc comes from Debian, only for /usr/bin/python3: so this file knows bcc and the standard library alone, and its process
keeps bcc's memory out of the one that asks. The first line of standard input is the question, a JSON object:
`text` of the program, `flags` for the compiler, `headers` (where bcc should look for the kernel's, or null for its own
choice), `hooks` (pairs of raw tracepoint and function, attached in this order) and `chosen` (network namespaces).
The end of standard input ends everything, also when whoever held it was killed: nothing that is made here outlives this
process. Answers are JSON lines: one object with `ready`, or with `failed`, then events, and one with `losses`.
"""

import ctypes
import importlib
import json
import os
import select
import socket
import sys
from typing import Any

POLL_MS = 100
MAPPED = b"\0" * 10 + b"\xff\xff"


def main() -> int:
    """Answers one question; 1 when it cannot be."""
    question = json.loads(sys.stdin.readline())
    if question["headers"]:
        os.environ["BCC_KERNEL_SOURCE"] = question["headers"]
    try:
        bcc = importlib.import_module("bcc")
    except (ImportError, OSError) as error:
        # OSError: a library that it loads is not there.
        return failed("bcc", str(error))
    try:
        program = bcc.BPF(text=question["text"], cflags=question["flags"])
    except Exception as error:  # noqa: BLE001 - bcc raises Exception itself
        return failed("compile", str(error))
    for netns in question["chosen"]:
        program["chosen"][ctypes.c_uint32(netns)] = ctypes.c_uint8(1)
    answer({"ready": attach(program, question["hooks"])})
    events = program["events"]
    events.open_ring_buffer(lambda _context, data, _size: tell(events.event(data)))
    while not select.select([sys.stdin], [], [], 0)[0]:
        program.ring_buffer_poll(POLL_MS)
        sys.stdout.flush()
    program.ring_buffer_consume()
    answer({"losses": [count.value for count in program["losses"].values()]})
    return 0


def attach(program: Any, hooks: list[list[str]]) -> dict[str, str]:
    """Attaches what can be; why the others cannot, by tracepoint."""
    refused = {}
    for tracepoint, function in hooks:
        try:
            program.attach_raw_tracepoint(tp=tracepoint.encode(), fn_name=function.encode())
        except Exception as error:  # noqa: BLE001 - bcc raises Exception itself
            refused[tracepoint] = str(error)
    return refused


def tell(event: Any) -> None:
    """Prints an event; standard output is flushed after each poll."""
    told = {
        "kind": event.kind,
        "at": event.at,
        "socket": event.socket,
        "cgroup": event.cgroup,
        "pid": event.pid,
        "uid": event.uid,
        "comm": event.comm.decode(errors="replace"),
        "netns": event.netns,
        "error": event.error,
        "local": [address(event.local), event.local_port],
        "peer": [address(event.peer), event.peer_port],
        "dialled": [address(event.dialled), event.dialled_port],
        "listener_port": event.listener_port,
    }
    sys.stdout.write(json.dumps(told) + "\n")


def address(raw: Any) -> str:
    """Text of 16 bytes; an IPv4-mapped address is written as IPv4."""
    packed = bytes(raw)
    if packed.startswith(MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[len(MAPPED) :])
    return socket.inet_ntop(socket.AF_INET6, packed)


def failed(what: str, reason: str) -> int:
    """Tells why there will be no events."""
    answer({"failed": {"what": what, "reason": reason}})
    return 1


def answer(told: dict[str, Any]) -> None:
    """Prints one JSON line."""
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        # Nobody listens any more; the interpreter would try to flush once again.
        os._exit(1)
