"""A client that sends bytes as they are and says when it has done: python raw.py ADDRESS PORT HEX...

Sends each argument in a segment of its own, then reads what comes until the other end closes or nothing has come for a
while. Uses the standard library only.
"""

import socket
import sys

PATIENCE_S = 0.5


def main() -> None:
    address, port, *texts = sys.argv[1:]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect((address, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for text in texts:
            connection.sendall(bytes.fromhex(text))
        try:
            while texts and connection.recv(4096):
                pass
        except (TimeoutError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
