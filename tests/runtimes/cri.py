"""Speaks CRI to containerd, as a kubelet does: `python3 cri.py SOCKET`, then a call per line on standard input.

Run by Debian's Python, which has gRPC (python3-grpcio). A call is [method, message], a message maps field numbers to
text, numbers, messages, or lists of them (cri-api, pkg/apis/runtime/v1/api.proto). Each is answered by a line: {"ok":
message} with bytes as text and messages left encoded in base64, or {"error": text}.
"""

import base64
import json
import sys

import grpc

_TIMEOUT_S = 60
_VARINT, _BYTES = 0, 2


def encoded(message):
    return b"".join(
        _field(int(number), one)
        for number, value in message.items()
        for one in (value if isinstance(value, list) else [value])
    )


def _field(number, value):
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    content = encoded(value) if isinstance(value, dict) else value.encode()
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def decoded(content):
    """Field numbers to lists of numbers and of base64."""
    fields, at = {}, 0
    while at < len(content):
        tag, at = _read_varint(content, at)
        value, at = _read_varint(content, at)
        if tag & 7 == _BYTES:
            value, at = base64.b64encode(content[at : at + value]).decode(), at + value
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _read_varint(content, at):
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def main():
    with grpc.insecure_channel(f"unix://{sys.argv[1]}") as channel:
        for line in sys.stdin:
            method, message = json.loads(line)
            call = channel.unary_unary(
                f"/runtime.v1.RuntimeService/{method}",
                request_serializer=encoded,
                response_deserializer=decoded,
            )
            try:
                answer = {"ok": call(message, timeout=_TIMEOUT_S)}
            except grpc.RpcError as error:
                answer = {"error": error.details()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
