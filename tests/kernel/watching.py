"""What tests of the classifier on real interfaces share: clients and servers of every class, captures, `observe`."""

import datetime
import json
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from namespaces import DEADLINE_S, Pair

from tidegate.kernel import netns

TIDEGATE = [sys.executable, "-m", "tidegate.cli.main"]
PORT, TLS_PORT, CLOSED_PORT = 8080, 8443, 9
TRUST_DOMAIN = "0a1b2c3d-0000-4000-8000-00000000000a.consul"
MESH_SNI = f"api.default.dc1.internal.{TRUST_DOMAIN}"
REQUEST = b"GET /large HTTP/1.1\r\nHost: api\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + bytes(400_000)

_ETH_P_ALL = 3


@dataclass
class Observer:
    """`tidegate observe --json`, attached."""

    process: "subprocess.Popen[str]"

    def end(self, number: int = signal.SIGINT) -> dict[str, Any]:
        """Tells it to end; what it says it has seen."""
        self.process.send_signal(number)
        return self.seen()

    def seen(self) -> dict[str, Any]:
        """Waits for its end; what it says it has seen."""
        out, self.errors = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, self.errors
        answer = json.loads(out)
        assert isinstance(answer, dict)
        return answer


@contextmanager
def observing(*options: str, inside: str = netns.CURRENT) -> Iterator[Observer]:
    """Runs the command, in a namespace, and waits until it is attached."""
    process = netns.run_in(
        inside,
        lambda: subprocess.Popen(
            [*TIDEGATE, "observe", "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ),
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first == "ready\n", first + process.stderr.read()
        yield Observer(process)
    finally:
        process.kill()
        process.wait()


def run(*arguments: str, stdin: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Runs a tidegate command to its end."""
    return subprocess.run(
        [*TIDEGATE, *arguments], input=stdin, capture_output=True, timeout=60, check=False
    )


def server_context(directory: Path) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate that nobody checks; it speaks h2 if asked."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = directory / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    return context


@contextmanager
def answering(netns_path: str, tls: ssl.SSLContext) -> Iterator[None]:
    """Servers for both families in a namespace, one of them of TLS: they answer one request and close."""
    listeners = {port: netns.run_in(netns_path, listen, port) for port in (PORT, TLS_PORT)}
    threads = [
        threading.Thread(target=_accept_all, args=(listener, tls if port == TLS_PORT else None))
        for port, listener in listeners.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for listener in listeners.values():
            listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for listener in listeners.values():
            listener.close()


def connect(netns_path: str, address: str, port: int) -> socket.socket:
    return netns.run_in(netns_path, socket.create_connection, (address, port), DEADLINE_S)


def ask(connection: socket.socket) -> int:
    """Sends a request and reads the answer to its end; how long that was."""
    with connection:
        connection.sendall(REQUEST)
        read = 0
        while received := connection.recv(1 << 16):
            read += len(received)
        return read


def ask_tls(connection: socket.socket, sni: str | None, alpn: Sequence[str] = ()) -> int:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return ask(context.wrap_socket(connection, server_hostname=sni))


def call_in_every_way(pair: Pair, version: int) -> None:
    """From the pod: plaintext, the mesh's TLS, other TLS, and a port where nobody listens."""
    address = pair.peer_address(version)
    ask(connect(pair.pod, address, PORT))
    ask_tls(connect(pair.pod, address, TLS_PORT), MESH_SNI)
    ask_tls(connect(pair.pod, address, TLS_PORT), "pay.example.org", ["h2", "http/1.1"])
    with pytest.raises(ConnectionRefusedError):
        connect(pair.pod, address, CLOSED_PORT)


@contextmanager
def capturing(netns_path: str, interface: str) -> Iterator[list[bytes]]:
    """The frames that pass an interface, both ways; all of them once the context has ended."""
    frames: list[bytes] = []
    packet_socket = netns.run_in(
        netns_path, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)
    )
    with packet_socket:
        packet_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        packet_socket.bind((interface, _ETH_P_ALL))
        try:
            yield frames
        finally:
            packet_socket.setblocking(False)
            while True:
                try:
                    frames.append(packet_socket.recv(1 << 18))
                except BlockingIOError:
                    break


def pcap(frames: Sequence[bytes], *, link_type: int = 1, snap_length: int = 1 << 18) -> bytes:
    """A capture of frames; of each it has at most `snap_length` bytes."""
    out = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, snap_length, link_type)]
    for frame in frames:
        kept = frame[:snap_length]
        out += [struct.pack("<IIII", 0, 0, len(kept), len(frame)), kept]
    return b"".join(out)


def listen(port: int) -> socket.socket:
    """A listener for both families in the calling thread's namespace."""
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
    )


def _accept_all(listener: socket.socket, tls: ssl.SSLContext | None) -> None:
    with ThreadPoolExecutor(4) as pool:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            pool.submit(_answer, connection, tls)


def _answer(connection: socket.socket, tls: ssl.SSLContext | None) -> None:
    connection.settimeout(DEADLINE_S)
    try:
        if tls:
            connection = tls.wrap_socket(connection, server_side=True)
        with connection:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                received = connection.recv(4096)
                if not received:
                    return
                request += received
            connection.sendall(ANSWER)
    except OSError:
        connection.close()
