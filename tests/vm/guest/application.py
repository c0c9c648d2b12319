"""The service: answers everybody in plaintext, and notes from where each connection came.

`application.py PORT LOG`; a line of the log has the boot's id, the time in seconds since the epoch, and an address, or
the word "listens" where it begins.
"""

import socket
import sys
import time
from pathlib import Path

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\nConnection: close\r\n\r\nthis is the application\n"
)


def main() -> None:
    port, log = int(sys.argv[1]), Path(sys.argv[2])
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with log.open("a", buffering=1) as told, socket.create_server(("", port)) as server:
        told.write(f"{boot} {time.time():.3f} listens\n")
        while True:
            caller, (address, _) = server.accept()
            told.write(f"{boot} {time.time():.3f} {address}\n")
            with caller:
                caller.settimeout(5)
                try:
                    caller.recv(4096)
                    caller.sendall(ANSWER)
                except OSError:
                    continue


if __name__ == "__main__":
    main()
