"""The server side of the traffic, a process of its own: `python -m tests.bench.peer KIND FD`.

So it has a processor and an interpreter to itself, as the client does. It serves one connection after the
other on the listening socket that it inherits as FD, until it is killed.
"""

import socket
import sys

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_BUFFER = 1 << 20


def sink(connection: socket.socket) -> None:
    """Reads everything, then says that it has."""
    buffer = bytearray(_BUFFER)
    while connection.recv_into(buffer):
        continue
    connection.sendall(ANSWER)


def answer(connection: socket.socket) -> None:
    """Answers each request, which comes in one piece."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while connection.recv(4096):
        connection.sendall(ANSWER)


KINDS = {"sink": sink, "answer": answer}


def main() -> None:
    """Serves until it is killed."""
    serve = KINDS[sys.argv[1]]
    with socket.socket(fileno=int(sys.argv[2])) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                serve(connection)


if __name__ == "__main__":
    main()
